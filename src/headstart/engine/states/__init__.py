"""The state store: the states of what sequences have computed, in memory and on the disk."""
