"""Text to token ids and back: tokenizers, chat templates, the cached part of a prompt, answers as text."""
