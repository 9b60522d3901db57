"""The HTTP API: OpenAI's and Anthropic's conventions, and named caches."""
