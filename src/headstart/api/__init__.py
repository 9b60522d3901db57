"""The HTTP interface: OpenAI's conventions, and named caches."""
