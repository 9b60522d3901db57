"""Headstart: an OpenAI-compatible LLM server that never prefills the same prompt twice."""

__version__ = "0.1.0"
