"""llama.cpp behind the engine, by llama-cpp-python's low-level API."""
