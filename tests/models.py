"""Shapes of the transformers models that tests build. `import models` works from every test (conftest.py)."""

from __future__ import annotations

from typing import Any

# Of any of transformers' configurations. Weights are drawn ten times wider than by default: a fresh model's attention
# is nearly uniform, and wider weights tell right from wrong.
SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
}
GQA: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 16}
