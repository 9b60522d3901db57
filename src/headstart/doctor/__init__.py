"""What `headstart doctor` and the offline commands look at; never used by a running server."""
