"""Measures the fastest settings on a machine, and derives a worker's settings from them."""
