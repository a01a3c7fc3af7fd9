"""Runs GRPO training from a configuration to a finished run directory."""

from rhythm.system.extras import require

require("rhythm.trainer", "pydantic", "rich", "scipy", "transformers", "yaml")
