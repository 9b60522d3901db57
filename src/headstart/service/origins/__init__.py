"""Caches that no client created by name: one module for each origin."""
