"""Compares Headstart with llama.cpp's own server, from outside: `make bench`.

What is compared. Both servers are driven over HTTP by the same client with the same prompts, the same model
file and the same number of threads; llama-server is built from the very llama.cpp that is Headstart's engine,
with the same flags. It runs twice: as it comes, and with its best settings for a CPU and the load at hand
(`servers.py` has both).

What is measured. Time to first token is taken at the client, from sending the request to the first non-empty
content of the stream. A hit is checked before it counts: the server must have evaluated the new tokens and no
more, and all servers must have seen the same number of prompt tokens; otherwise the arm fails.

How. The contenders of an arm take turns, and each round begins with another one, so that other work on the
machine slows all of them down. A ratio is the median of the rounds' own ratios. The spread given is the
middle half of the values (from the first to the third quartile).
"""
