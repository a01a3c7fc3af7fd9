"""A small analysis of a tiny model, for tests of its directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rhythm.analysis import AnalysisConfig
from rhythm.tiny.model import TinyModelConfig, build_model

CONFIG = AnalysisConfig.model_validate(
    {
        "sampling": {"max_new_tokens": 14},
        "problems_at_once": 2,
        "responses_per_problem": 2,
        "signals": {"horizon": [2, 6]},
        "counterfactuals": {
            "positions": 1,
            "candidates": 1,
            "max_new_tokens": 4,
            "matched": False,
            "responses_at_once": 2,
        },
        "table2": {"permutations": 19, "resamples": 20},
        "maps": 1,
    }
)
PROBLEMS = ["1,2,3>6:", {"prompt": "4,5,6>15:"}, {"prompt": "7,8,9>24:", "response": "7+8=15,15+9=24"}, "1,1,1>3:"]
NAMES = ("00001-0", "00001-1", "00002-0", "00002-1", "00003-0", "00004-0", "00004-1")


def small_model(tokenizer: Any) -> Any:
    """Of 3 layers and 64 positions."""
    shape = TinyModelConfig(layers=3, hidden_size=32, mlp_size=32, query_heads=4, key_heads=2, head_size=8)
    return build_model(shape.model_copy(update={"max_positions": 64}), tokenizer)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.glob("responses/*.json"))}


def lacking(directory: Path) -> list[str]:
    """Files of responses without their counterfactuals."""
    return [name for name, content in contents(directory).items() if json.loads(content)["trials"] is None]
