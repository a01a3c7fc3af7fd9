"""Each of the paper's sets, on a small file of rows in its schema, is trained on for a step and evaluated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import paper_sets
import pytest
import yaml
from safetensors.torch import load_file

from rhythm.cli.eval import main as evaluate
from rhythm.cli.train import main as train
from rhythm.tasks import task_class

WARM_START = {
    "steps": 80,
    "batch_size": 4,
    "learning_rate": 8e-3,
    "warmup_steps": 5,
    "model": {"layers": 3, "hidden_size": 32, "mlp_size": 48, "query_heads": 2, "key_heads": 1, "head_size": 16},
}


def configuration(name: str, directory: Path) -> Path:
    """A run of one step, whose model has nearly learned the three training rows by heart."""
    run = {
        "name": name,
        "runs_dir": str(directory),
        "steps": 1,
        "tensorboard": False,
        "task": {"name": name, "options": {"path": str(paper_sets.write_rows(name, directory)), "held_out": 0.5}},
        "reward": {"workers": 1},
        "warm_start": {"cache_dir": str(directory / "cache"), **WARM_START},
        "batch": {"prompts_per_batch": 3, "responses_per_prompt": 8, "mini_batch_size": 24, "micro_batch_size": 24},
        "sampling": {"max_new_tokens": 64},
        "signals": {"horizon": [1, 6]},
        "optimizer": {"lr": 1e-3, "warmup_steps": 1},
        "evaluation": {"samples": 1},
    }
    path = directory / f"{name}.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def only_evaluated(name: str) -> bool:
    return bool(task_class(name).config_class().held_out == 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", paper_sets.ROWS)
def test_a_step_on_the_set(name: str, tmp_path: Path) -> None:
    assert train([str(configuration(name, tmp_path))]) == 0
    start, step = records(tmp_path / name / "metrics.jsonl")
    assert start["accuracy_instances"] == 3
    assert 0 < step["reward"] == step["train_accuracy"] < 1
    assert step["zero_variance_share"] < 1
    assert step["grad_norm"] > 0
    assert step["rewards_late"] == step["rewards_raised"] == step["rewards_invalid"] == 0
    checkpoint = tmp_path / name / "checkpoints" / "step_000001"
    (warm,) = (tmp_path / "cache").glob("warm-start-*")
    before, after = load_file(warm / "model.safetensors"), load_file(checkpoint / "model.safetensors")
    assert any(not before[key].equal(after[key]) for key in before)

    if only_evaluated(name):
        task = f"{{name: {name}, options: {{path: {tmp_path / name}.jsonl}}}}"
        out = tmp_path / "evaluation"
        assert evaluate(["--model", str(checkpoint), "--out", str(out), f"tasks=[{task}]", "samples=4",
                         "sampling.max_new_tokens=64", "reward.workers=1"]) == 0  # fmt: skip
        (scores,) = json.loads((out / "results.json").read_text())["tasks"]
        assert (scores["task"], scores["problems"], scores["samples"]) == (name, paper_sets.COUNT, 4)
        assert 0 < sum(scores["correct"]) < 4 * paper_sets.COUNT
