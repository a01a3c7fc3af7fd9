"""Data for the Megatron engine's tests, what the one-machine engine makes of it, and how ranks are run on it."""

from __future__ import annotations

import atexit
import copy
import json
import os
import select
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from rhythm.credit.heads import HeadGroups
from rhythm.credit.loss import LossConfig
from rhythm.engines.interfaces import Rollout, TrainBatch
from rhythm.engines.local.train import OptimizerConfig, TorchTrain
from rhythm.engines.megatron.layout import ParallelConfig
from rhythm.tap.signals_config import SignalsConfig
from rhythm.tiny.model import TinyModelConfig, build_model, build_tokenizer, save_checkpoint

LAYOUTS = {
    "one": ParallelConfig(distributed_optimizer=False),
    "tensor": ParallelConfig(tensor=2, sequence_parallel=False),
    "pipeline": ParallelConfig(pipeline=2, recompute=True),
    "data": ParallelConfig(data=2),
    "context": ParallelConfig(context=2),
    "both": ParallelConfig(tensor=2, pipeline=2),
}
OPTIONS: dict[str, Any] = {
    "optimizer": OptimizerConfig(lr=1e-3, weight_decay=0.1, max_grad_norm=0.5, token_chunk=16),
    "loss": LossConfig(kl_coef=0.1, entropy_coef=0.01),
    "temperature": 0.9,
}
TAP = SignalsConfig(backend="reference", layers=3)


@dataclass(frozen=True)
class Case:
    """What the one-machine engine makes of the same data."""

    checkpoint: Path
    rollout: Rollout
    batches: list[TrainBatch]
    results: dict[str, Any]


def make_rollout(rows: int = 7, positions: int = 40) -> Rollout:
    random = torch.Generator().manual_seed(5)
    lens = torch.randint(12, positions + 1, (rows, 1), generator=random)
    prompt_lens = torch.randint(1, 8, (rows,), generator=random)
    t = torch.arange(positions)
    mask = t < lens
    ids = torch.randint(4, 100, (rows, positions), generator=random)
    return Rollout(
        input_ids=torch.where(mask, ids, 0),
        attention_mask=mask,
        response_mask=mask & (t >= prompt_lens[:, None]),
        prompt_lens=prompt_lens,
        group=torch.arange(rows) // 2,
        logprobs=torch.zeros(rows, positions),
        finished=torch.ones(rows, dtype=torch.bool),
    )


def make_batches(rollout: Rollout, old: torch.Tensor, reference: torch.Tensor | None, count: int) -> list[TrainBatch]:
    random = torch.Generator().manual_seed(6)
    return [TrainBatch(rollout, old, torch.randn(old.shape, generator=random), reference) for _ in range(count)]


def torch_engine(model: Any, **options: Any) -> TorchTrain:
    reference = copy.deepcopy(model)
    return TorchTrain(model, build_tokenizer(), micro_batch_size=2, reference=reference, **OPTIONS | options)


def make_case(checkpoint: Path) -> Case:
    """A Qwen3 of six layers, so that both stages have sampled ones, with 8 query and 4 key heads."""
    shape = TinyModelConfig(layers=6, hidden_size=48, mlp_size=80, query_heads=8, key_heads=4, head_size=16)
    torch.manual_seed(0)
    model = build_model(shape, build_tokenizer())
    with torch.no_grad():  # a fresh model is nearly uniform: sharper weights tell right from wrong
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.ndim == 2 else parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
    save_checkpoint(model, build_tokenizer(), checkpoint)
    rollout = make_rollout()
    engine = torch_engine(model)
    results: dict[str, Any] = {"weights_at_start": copy.deepcopy(engine.weights())}
    results["log_probs"], results["signals"] = engine.log_probs(rollout, TAP)
    results["batch_signals"] = engine.log_probs(rollout, TAP.model_copy(update={"grouping": "batch"}))[1]
    groups = results["signals"].groups
    fixed = HeadGroups(groups.local[:1].roll(1, dims=1), groups.global_[:1].roll(1, dims=1))
    results["fixed_signals"] = engine.log_probs(rollout, TAP, fixed)[1]
    results["reference"] = engine.reference_log_probs(rollout)
    batches = make_batches(rollout, results["log_probs"].logprobs, results["reference"], count=4)
    results["steps"] = [engine.step(batch) for batch in batches[:-1]]
    results["weights"] = copy.deepcopy(engine.weights())
    engine.step(batches[-1])
    results["last_weights"] = copy.deepcopy(engine.weights())
    return Case(checkpoint, rollout, batches, results)


def run_ranks(scratch: Path, timeout: float = 900, **spec: Any) -> list[dict[str, Any]]:
    """Run a scenario of ranks.py; returns each rank's results."""
    torch.save(spec, scratch / "spec.pt")
    server = _ranks()
    assert server.stdin is not None
    assert server.stdout is not None
    request = {"spec": str(scratch / "spec.pt"), "out": str(scratch / "out"), "environment": dict(os.environ)}
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    answered, _, _ = select.select([server.stdout], [], [], timeout)
    code = server.stdout.readline().strip() if answered else f"not ended within {timeout:.0f} s"
    if not code.isdigit():
        _ranks.cache_clear()
        _end(server)
    log = scratch / "out.log"
    assert code == "0", f"{code}: {log.read_text()[-6000:] if log.exists() else 'not started'}"
    return [torch.load(scratch / f"out.{rank}", weights_only=False) for rank in range(spec["parallel"].ranks)]


@cache
def _ranks() -> subprocess.Popen[str]:
    """The process of ranks.py, which this one shares among its tests."""
    script = Path(__file__).parent / "engines" / "megatron" / "ranks.py"
    command = [sys.executable, "-W", "ignore", str(script)]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
    atexit.register(_end, server)
    return server


def _end(server: subprocess.Popen[str]) -> None:
    """With the ranks of a scenario that hangs."""
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.communicate()


def assert_near(actual: torch.Tensor, expected: torch.Tensor, atol: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol, equal_nan=True)


def assert_weights(actual: dict[str, Any], expected: dict[str, Any], atol: float) -> None:
    tied = {"lm_head.weight"} if "lm_head.weight" not in actual else set()
    assert actual.keys() == expected.keys() - tied
    for name, tensor in actual.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=atol, msg=lambda text: f"{name}: {text}")  # noqa: B023
