"""The examples of docs/monitors.md, run unchanged on a random Llama."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import transformers
from torch import Tensor

from rhythm.integrations.transformers import collect_statistics, register

DOC = Path(__file__).parents[2] / "docs" / "monitors.md"
SIZES = models.SIZES | models.GQA | {"num_hidden_layers": 3, "initializer_range": 0.5}


def example(section: str) -> str:
    text = DOC.read_text(encoding="utf-8").split(f"## {section}")[1]
    block = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert block is not None
    return block[1]


@pytest.fixture
def names() -> dict[str, Any]:
    register()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="rhythm").eval()
    mask = torch.ones(2, 30, dtype=torch.int64)
    mask[1, :9] = 0
    return {"model": model, "input_ids": torch.randint(0, 61, (2, 30)), "attention_mask": mask}


def maps(names: dict[str, Any]) -> list[list[Tensor]]:
    """Eager maps [H, N, N] of the real tokens: [row][layer]."""
    names["model"].set_attn_implementation("eager")
    rows = [names["input_ids"][:1], names["input_ids"][1:, 9:]]
    with torch.no_grad():
        got = [names["model"](row, output_attentions=True, use_cache=False).attentions for row in rows]
    names["model"].set_attn_implementation("rhythm")
    return [[layer[0] for layer in row] for row in got]


def test_entropy_and_sink_rate(names: dict[str, Any]) -> None:
    exec(example("Entropy and sink rate"), names)
    of_rows = maps(names)
    for layer in range(3):
        entropy, sink = (
            torch.cat([f(row[layer]) for row in of_rows], dim=-1).mean(dim=-1)
            for f in (lambda a: torch.special.entr(a).sum(-1), lambda a: a[..., 0])
        )
        assert names["metrics"][f"attention/{layer}/entropy_least"] == pytest.approx(float(entropy.min()), rel=1e-4)
        assert names["metrics"][f"attention/{layer}/sink_rate"] == float((sink > 0.3).float().mean())


def test_qk_clip(names: dict[str, Any]) -> None:
    def largest() -> Tensor:
        with torch.no_grad(), collect_statistics(also=("max_logit",), layers=[0]) as statistics:
            names["model"](names["input_ids"], attention_mask=names["attention_mask"])
        return statistics[0].max_logit.nan_to_num(-torch.inf).amax(dim=(0, 2))

    before = largest()
    threshold = float(before.sort().values[1:3].mean())  # some heads above, some below
    names["threshold"] = threshold
    exec(example("QK-Clip"), names)
    torch.testing.assert_close(largest(), before.clamp(max=threshold), rtol=1e-4, atol=1e-4)
    assert (before > threshold).any()
    assert (before < threshold).any()
