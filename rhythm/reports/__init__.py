"""Builds HTML reports of training runs."""
