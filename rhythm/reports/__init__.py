"""Pages and curves of runs."""
