"""Figures about a running server, made of the events that its service reports."""
