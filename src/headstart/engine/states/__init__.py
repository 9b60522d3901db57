"""The state store: what sequences have computed, in memory and on the disk."""
