"""The engine loop: scheduling, sequences, state, independent of what evaluates tokens."""
