"""The file of a cache: its format, how it is written, checked and copied."""
