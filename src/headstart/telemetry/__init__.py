"""Figures about a running server, made of the events that its service reports: metrics and spans; and the
format of its log."""
