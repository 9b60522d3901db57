"""Tokenising and embeddings over HTTP."""
