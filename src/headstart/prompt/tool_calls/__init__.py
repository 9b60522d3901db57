"""Formats in which models write calls of tools: one module a format."""
