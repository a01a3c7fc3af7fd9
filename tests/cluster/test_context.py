"""A cluster run on two context parallel ranks of Megatron, against one on a single rank."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(1800)]


def test_two_ranks_train_as_one(small_cluster: Path, launch: Callable[..., Any], tmp_path: Path) -> None:
    for ranks in (1, 2):
        where = (f"name=of_{ranks}", f"runs_dir={tmp_path}", f"cluster.train.context={ranks}")
        launch(small_cluster, *where, "cluster.infer.engine=transformers", "steps=2", "evaluation.samples=0").finish()
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()][1:]
        for name in ("of_1", "of_2")
    )
    assert len(two) == 2
    for left, right in zip(one, two, strict=True):
        for key in ("loss", "grad_norm", "gamma_mean", "gamma_share", "entropy", "waad_mean", "fai_mean", "reward"):
            assert right[key] == (None if left[key] is None else pytest.approx(left[key], rel=1e-3, abs=1e-5)), key
        assert right["gamma_mean"] > 1
    assert two[0]["parity_max"] < 1e-3
    weights, expected = (
        load_file(tmp_path / name / "checkpoints" / "step_000002" / "model.safetensors") for name in ("of_2", "of_1")
    )
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-4)
