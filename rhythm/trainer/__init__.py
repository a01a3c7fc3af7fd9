"""The trainer: everything between a configuration and a finished run."""

from rhythm.system.extras import require

require("rhythm.trainer", "pydantic", "rich", "transformers", "yaml")
