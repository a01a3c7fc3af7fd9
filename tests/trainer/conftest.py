"""A run small enough for tests: a Qwen3 with three narrow layers, six training steps of twelve responses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rhythm.cli.config_file import load_config
from rhythm.trainer.config import TrainConfig

SMALL_RUN = """
name: small
steps: 6
tensorboard: false
task:
  options: {format: steps, numbers: 2, max_number: 9, max_target: 18, train_size: 60, test_size: 16, format_score: 0.2}
warm_start:
  steps: 120
  batch_size: 16
  learning_rate: 0.01
  warmup_steps: 5
  model: {layers: 3, hidden_size: 32, mlp_size: 48, query_heads: 2, key_heads: 1, head_size: 16}
batch: {prompts_per_batch: 4, responses_per_prompt: 4, mini_batch_size: 8, micro_batch_size: 4}
sampling: {max_new_tokens: 12}
signals: {horizon: [1, 6]}
optimizer: {lr: 1.0e-3, warmup_steps: 2}
evaluation: {every_steps: 2, samples: 2}
checkpoint: {every_steps: 2, keep: 2}
"""


@pytest.fixture(scope="module")
def without_curves() -> Iterator[None]:
    """Runs of this module leave a report without its curves, which take longer to draw than a small run to train."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rhythm.reports.run.draw_curves", lambda *_: [])
        patch.setattr("rhythm.reports.run.draw_seconds", lambda *_: None)
        yield


@pytest.fixture(scope="session")
def small_config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("small")
    path = directory / "small.yaml"
    path.write_text(SMALL_RUN + f"runs_dir: {directory / 'runs'}\n")
    path.write_text(path.read_text().replace("warm_start:", f"warm_start:\n  cache_dir: {directory / 'cache'}"))
    return path


@pytest.fixture(scope="session")
def small_config(small_config_file: Path) -> Callable[..., TrainConfig]:
    """small_config("key=value", …): the small run's configuration with overrides."""
    return lambda *overrides: load_config(small_config_file, overrides)
