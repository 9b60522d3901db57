"""Rockchip's NPU runtime, librkllmrt.so: a closed library that holds a model and runs a prompt at a time."""
