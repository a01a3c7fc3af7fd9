"""Which runs of a comparison are one block: whose settings differ only in where and how they were computed."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rhythm.reports.comparison import Block
from rhythm.reports.comparison_page import compare
from rhythm.reports.methods import NO_OTHER_METHOD, OF_THE_METHOD, flat

WriteRun = Callable[..., Path]
CLUSTER: dict[str, Any] = {
    "gpus": 0,
    "infer": {"engine": "transformers", "kv_cache_gib": None},
    "train": {"engine": "torch"},
}
SEPARATE = {**CLUSTER, "placement": "separate"}
CORRECTED = {"correction": {"mode": "token_truncate"}}


def ahead(every_steps: int) -> dict[str, Any]:
    return CORRECTED | {"cluster": {**SEPARATE, "rollout_ahead": 1, "parity": {"every_steps": every_steps}}}


@pytest.fixture
def blocks_of(tmp_path: Path, write_run: WriteRun) -> Callable[..., tuple[Block, ...]]:
    """The blocks of a GRPO run, at 0.3, and a coupled one, at 0.4, with these configurations."""

    def blocks_of(grpo: dict[str, Any], coupled: dict[str, Any]) -> tuple[Block, ...]:
        runs = [
            write_run(tmp_path, "grpo", [0.3], strategy="none", config=grpo),
            write_run(tmp_path, "coupled", [0.4], strategy="coupled", config=coupled),
        ]
        return compare(runs).sections[0].blocks

    return blocks_of


@pytest.mark.parametrize(
    "config",
    [
        {"tensorboard": False},
        {"wandb": "offline"},
        {"profile_steps": [3]},
        {"checkpoint": {"every_steps": 7, "keep_best": True}},
        {"reward": {"seconds": 3, "workers": 5, "start_seconds": 9, "memory_gib": 4}},
        {"warm_start": {"cache_dir": "elsewhere"}},
        {"model": {"device": "cpu"}},
        {"model": {"gradient_checkpointing": True}},
        {"batch": {"micro_batch_size": 4}},
        {"batch": {"log_prob_micro_batch_size": 64}},
        {"batch": {"max_tokens": 4096}},
        {"batch": {"share_prompts": True}},
        {"optimizer": {"token_chunk": 64}},
        {"sampling": {"rows_at_once": 8}},
        {"signals": {"backend": "reference"}},
        {"evaluation": {"samples": 0, "rhythm_responses": 0}},
        {"cluster": CLUSTER},
        {"cluster": {**SEPARATE, "parity": {"every_steps": 9}}},
    ],
    ids=str,
)
def test_settings_that_change_nothing_about_the_method_leave_one_block(
    blocks_of: Callable[..., tuple[Block, ...]], config: dict[str, Any]
) -> None:
    (block,) = blocks_of({}, config)
    assert (block.title, [row.method for row in block.rows]) == ("", ["GRPO", "+ coupled rhythm credit"])
    assert block.rows[1].cells[0].gain == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("grpo", "coupled", "titles"),
    [
        ({}, {"evaluation": {"temperature": 1.0}}, ["evaluation.temperature=0.0", "evaluation.temperature=1.0"]),
        ({}, {"evaluation": {"instances": 128}}, ["evaluation.instances=128", "evaluation.instances=None"]),
        ({}, {"evaluation": {"every_steps": 5}}, ["evaluation.every_steps=20", "evaluation.every_steps=5"]),
        ({}, {"batch": {"shuffle": "prompts"}}, ["batch.shuffle=prompts", "batch.shuffle=responses"]),
        (CORRECTED, ahead(4), ["cluster.rollout_ahead=0", "cluster.rollout_ahead=1"]),
        (ahead(4), ahead(9), ["cluster.parity.every_steps=4", "cluster.parity.every_steps=9"]),
        (
            {"cluster": {**CLUSTER, "max_length": 512}},
            {"cluster": CLUSTER},
            ["cluster.max_length=1024", "cluster.max_length=512"],
        ),
    ],
    ids=str,
)
def test_other_settings_make_blocks_without_a_gain(
    blocks_of: Callable[..., tuple[Block, ...]], grpo: dict[str, Any], coupled: dict[str, Any], titles: list[str]
) -> None:
    blocks = blocks_of(grpo, coupled)
    assert [block.title for block in blocks] == titles
    for block in blocks:
        (row,) = block.rows
        assert math.isnan(row.cells[0].gain)


def test_further_tasks_evaluated_otherwise_make_blocks(blocks_of: Callable[..., tuple[Block, ...]]) -> None:
    tasks = [{"evaluation": {"tasks": [{"name": "countdown", "problems": n}]}} for n in (10, 20)]
    blocks = blocks_of(*tasks)
    assert len(blocks) == 2
    assert all(block.title.startswith("evaluation.tasks=[{'name': 'countdown'") for block in blocks)


def test_the_keys_without_a_block_exist(tmp_path: Path, write_run: WriteRun) -> None:
    run = write_run(tmp_path, "run", [0.3], config={"cluster": CLUSTER})
    keys = dict(flat(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))))
    assert {*OF_THE_METHOD} <= keys.keys()
    for start in NO_OTHER_METHOD:
        assert [key for key in keys if key.startswith(start.removeprefix("evaluated."))], start
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    own = {"name", "runs_dir", "seed", "warm_start.cache_dir"}  # "names, directories and the seed"
    for start in {*NO_OTHER_METHOD, *OF_THE_METHOD} - own:
        assert f"`{start.removeprefix('evaluated.')}{'*' if start.endswith('.') else ''}`" in page, start
