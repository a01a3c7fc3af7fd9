"""A model of a million parameters, and its warm start on a task's worked solutions."""
