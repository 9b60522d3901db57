"""From a request to the engine and back to its answer."""
