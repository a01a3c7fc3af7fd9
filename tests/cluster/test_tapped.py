"""A cluster run whose γ comes from Megatron's gradient steps themselves, against one with a pass for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(1800)]

# Two stages, so that the signals of the first one's layers are needed on the second; one gradient step a batch.
ENGINES = ("cluster.infer.engine=transformers", "cluster.train.pipeline=2", "batch.mini_batch_size=16")
STEPS = ("steps=2", "batch.max_tokens=100", "evaluation.samples=0")


def test_one_gradient_step_is_as_inline(small_cluster: Path, launch: Callable[..., Any], tmp_path: Path) -> None:
    for source in ("inline", "training"):
        where = (f"name={source}", f"runs_dir={tmp_path}", f"signals.source={source}")
        launch(small_cluster, *where, *ENGINES, *STEPS).finish()
    inline, training = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()][1:]
        for name in ("inline", "training")
    )
    assert len(training) == 2
    for left, right in zip(inline, training, strict=True):
        for key in ("loss", "grad_norm", "gamma_mean", "gamma_share", "entropy", "waad_mean", "fai_mean", "reward"):
            assert right[key] == (None if left[key] is None else pytest.approx(left[key], rel=1e-3, abs=1e-5)), key
        assert right["gamma_mean"] > 1
        assert right["seconds_attention"] > 0
    assert training[0]["parity_max"] < 1e-3
    weights, expected = (
        load_file(tmp_path / name / "checkpoints" / "step_000002" / "model.safetensors")
        for name in ("training", "inline")
    )
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-4)
