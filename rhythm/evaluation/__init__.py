"""Accuracy of a checkpoint on tasks: pass@1, avg@n and pass@k with intervals, every response kept."""

from rhythm.system.extras import require

require("rhythm.evaluation", "pydantic", "rich", "transformers", "yaml")
