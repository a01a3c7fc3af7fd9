"""The trainer: everything between a configuration and a finished run."""
