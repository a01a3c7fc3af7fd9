"""Helpers used by all parts: optional packages, safe file writing, directory locks, progress lines."""
