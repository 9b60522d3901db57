"""Named caches over HTTP."""
