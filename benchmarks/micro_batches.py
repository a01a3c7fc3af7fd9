"""python -m benchmarks.micro_batches: a training step's passes with micro-batches by rows and by a budget of tokens.

One step of the tiny model on one thread: the log-prob pass with signals, and the gradient steps, in seconds of the
processor, so that a busy machine matters less. Rows are random, of the lengths that the shipped configurations have.
All ways take turns; the numbers are medians. Prints a markdown table.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence

import torch

from benchmarks.record import commit, machine, software
from rhythm.credit.loss import LossConfig
from rhythm.engines.batches import micro_batches, take_rows
from rhythm.engines.interfaces import Rollout, TrainBatch
from rhythm.engines.local.train import OptimizerConfig, TorchTrain
from rhythm.tap.signals_config import SignalsConfig
from rhythm.tiny.model import TinyModelConfig, build_model, build_tokenizer

ROWS, MINI_BATCH, ROUNDS = 256, 64, 5
# Tokens of prompts and of responses, from … to.
WORK = {"countdown_tiny": ((10, 14), (12, 20)), "chain_sum_tiny": ((20, 32), (20, 130))}
WAYS: dict[str, tuple[int, int | None]] = {
    "64 rows": (64, None),
    "16 rows": (16, None),
    "1,024 tokens": (64, 1024),
    "4,096 tokens": (64, 4096),
}
TAP = SignalsConfig(horizon=(2, 10))


def main() -> int:
    torch.set_num_threads(1)
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    model = build_model(TinyModelConfig(max_positions=256), tokenizer)
    print(f"{machine()} {software()} {commit()}")
    print("\n| lengths as in | micro-batches of | padding | log-probs and signals, s | gradient steps, s |")
    print("|---|---|---|---|---|")
    for name, lens in WORK.items():
        rollout = make_rollout(*lens)
        seconds = measure(model, tokenizer, rollout)
        for way, (rows, max_tokens) in WAYS.items():
            passes, steps = (statistics.median(values) for values in zip(*seconds[way], strict=True))
            shown = padding(rollout, rows, max_tokens)
            print(f"| {name} | {way} | {shown:.0%} | {passes:.2f} | {steps:.2f} |")
    return 0


def make_rollout(prompts: tuple[int, int], responses: tuple[int, int]) -> Rollout:
    """Random tokens, of uniformly drawn lengths."""
    random = torch.Generator().manual_seed(0)
    prompt_lens, response_lens = (
        torch.randint(low, high + 1, (ROWS,), generator=random) for low, high in (prompts, responses)
    )
    lens_B1 = (prompt_lens + response_lens)[:, None]
    t = torch.arange(int(lens_B1.max()))
    inside = t < lens_B1
    return Rollout(
        input_ids=torch.where(inside, torch.randint(4, 100, inside.shape, generator=random), 0),
        attention_mask=inside,
        response_mask=inside & (t >= prompt_lens[:, None]),
        prompt_lens=prompt_lens,
        group=torch.arange(ROWS) // 8,
        logprobs=torch.zeros(inside.shape),
        finished=torch.ones(ROWS, dtype=torch.bool),
    )


def mini_batches() -> Sequence[torch.Tensor]:
    """Rows of the gradient steps."""
    return torch.randperm(ROWS, generator=torch.Generator().manual_seed(0)).split(MINI_BATCH)


def padding(rollout: Rollout, rows: int, max_tokens: int | None) -> float:
    """The share of a gradient step's positions that are padding, in its linear layers."""
    if max_tokens is not None:
        return 0.0
    parts = [take_rows(rollout, index) for index in mini_batches()]
    positions = sum(len(index) * width for part in parts for index, width in micro_batches(part, rows))
    return 1 - int(rollout.lens.sum()) / positions


def measure(model: torch.nn.Module, tokenizer: object, rollout: Rollout) -> dict[str, list[tuple[float, float]]]:
    """(seconds of the log-prob pass, of the gradient steps) of each round, of each way; the first is not counted."""
    engines = {
        way: TorchTrain(
            copy.deepcopy(model),
            tokenizer,
            optimizer=OptimizerConfig(),
            loss=LossConfig(),
            temperature=1.0,
            micro_batch_size=rows,
            max_tokens=max_tokens,
        )
        for way, (rows, max_tokens) in WAYS.items()
    }
    seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for _ in range(1 + ROUNDS):
        for way, engine in engines.items():
            started = time.process_time()
            log_probs, _ = engine.log_probs(rollout, TAP)
            scored = time.process_time()
            batch = TrainBatch(rollout, log_probs.logprobs, torch.ones(rollout.logprobs.shape))
            for index in mini_batches():
                engine.step(take_rows(batch, index))
            seconds[way].append((scored - started, time.process_time() - scored))
    return {way: values[1:] for way, values in seconds.items()}


if __name__ == "__main__":
    raise SystemExit(main())
