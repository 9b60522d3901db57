"""Rockchip's NPU runtime, librkllmrt.so: a closed library that holds a model and runs one prompt at a time."""
