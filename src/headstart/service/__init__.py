"""Where prompts, caches and engines meet, and the only place where they do."""
