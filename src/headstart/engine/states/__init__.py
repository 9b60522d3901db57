"""The state store: keeps what sequences have computed, in blocks of tokens."""
