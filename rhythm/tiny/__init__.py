"""A model with a million parameters, and its supervised warm start on a task's worked solutions."""
