"""Figures about a running server: metrics, made of the events that its service reports."""
