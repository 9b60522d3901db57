"""The engine loop: scheduling, sequences, state I/O; independent of the model behind it."""
