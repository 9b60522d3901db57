"""The model interface on llama.cpp, by llama-cpp-python's low-level API."""
