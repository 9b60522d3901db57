"""Settings, their sources, and the tables of a configuration file."""
