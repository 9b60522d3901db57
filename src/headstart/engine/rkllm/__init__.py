"""Rockchip's NPU runtime, librkllmrt.so: a closed library that loads one model and runs one prompt at a
time."""
