"""Measuring what is fastest on a machine, and the settings that follow from it."""
