"""Checks for `headstart doctor` and the offline commands; never used by a running server."""
