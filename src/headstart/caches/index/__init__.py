"""The index: usage figures and hashes of weights, in SQLite."""
