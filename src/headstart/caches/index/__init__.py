"""Usage figures and hashes of weights, in SQLite."""
