"""The engine: token ids in, token ids out, in a worker process of its own, one for each model.

`client` runs in the server and speaks to `worker` over a socket; `core` and the models run in the worker
only.
"""
