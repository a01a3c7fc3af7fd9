"""Tasks: problem instances, their prompts, worked solutions and rewards."""

from __future__ import annotations

from rhythm.tasks.base import TASKS, Reward, Task, load_for_rewards, load_task, task_class
from rhythm.tasks.isolation import isolated

__all__ = ["TASKS", "Reward", "Task", "isolated", "load_for_rewards", "load_task", "task_class"]
