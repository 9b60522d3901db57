"""The only layer in which prompts, caches and engines meet."""
