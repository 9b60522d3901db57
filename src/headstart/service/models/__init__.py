"""Models: loading, unloading, their settings and tuning."""
