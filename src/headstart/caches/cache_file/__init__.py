"""The cache file: its format, and how it is written, checked and copied."""
