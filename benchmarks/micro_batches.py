"""python -m benchmarks.micro_batches: a training step's passes with micro-batches by rows, by a budget of tokens, and
with prompts that go through the model once.

One step of the tiny model on one thread: the log-prob pass with signals, and the gradient steps, in seconds of the
processor, so that a busy machine matters less. Rows are random, of the lengths that the shipped configurations have.
All ways take turns; the numbers are medians. Prints a markdown table.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.record import commit, machine, software
from rhythm.credit.loss import LossConfig
from rhythm.engines.batches import micro_batches, take_rows
from rhythm.engines.interfaces import Rollout, TrainBatch
from rhythm.engines.local.train import OptimizerConfig, TorchTrain
from rhythm.tap.signals_config import SignalsConfig
from rhythm.tiny.model import TinyModelConfig, build_model, build_tokenizer

ROWS, RESPONSES, MINI_BATCH, ROUNDS = 256, 8, 64, 5


@dataclass(frozen=True)
class Way:
    """How a step is cut: rows or tokens of a micro-batch, mini-batches of single responses or of whole prompts."""

    rows: int = 64
    max_tokens: int | None = None
    share_prompts: bool = False
    of_whole_prompts: bool = False

    def mini_batches(self) -> Sequence[torch.Tensor]:
        """Rows of the gradient steps."""
        units = torch.arange(ROWS).view(-1, RESPONSES if self.of_whole_prompts else 1)
        order = torch.randperm(len(units), generator=torch.Generator().manual_seed(0))
        return units[order].flatten().split(MINI_BATCH)

    def positions(self, rollout: Rollout) -> int:
        """Of the linear layers, in the gradient steps."""
        positions = 0
        for index in self.mini_batches():
            part = take_rows(rollout, index)
            if self.share_prompts:
                positions += int(part.response_lens.sum()) + int(
                    rollout.prompt_lens[part.group.unique() * RESPONSES].sum()
                )
            elif self.max_tokens is not None:
                positions += int(part.lens.sum())
            else:
                positions += sum(len(rows) * width for rows, width in micro_batches(part, self.rows))
        return positions


# Tokens of prompts and of responses, from … to.
WORK = {"countdown_tiny": ((10, 14), (12, 20)), "chain_sum_tiny": ((20, 32), (20, 130))}
WAYS: dict[str, Way] = {
    "64 rows": Way(),
    "16 rows": Way(rows=16),
    "1,024 tokens": Way(max_tokens=1024),
    "4,096 tokens": Way(max_tokens=4096),
    "64 rows, prompts shared": Way(share_prompts=True),
    "64 rows of 8 prompts, shared": Way(share_prompts=True, of_whole_prompts=True),
}
TAP = SignalsConfig(horizon=(2, 10))


def main() -> int:
    torch.set_num_threads(1)
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    model = build_model(TinyModelConfig(max_positions=256), tokenizer)
    print(f"{machine()} {software()} {commit()}")
    print("\n| lengths as in | micro-batches of | positions | log-probs and signals, s | gradient steps, s |")
    print("|---|---|---|---|---|")
    for name, lens in WORK.items():
        rollout = make_rollout(*lens)
        seconds = measure(model, tokenizer, rollout)
        for name_of_way, way in WAYS.items():
            passes, steps = (statistics.median(values) for values in zip(*seconds[name_of_way], strict=True))
            print(f"| {name} | {name_of_way} | {way.positions(rollout):,} | {passes:.2f} | {steps:.2f} |")
    return 0


def make_rollout(prompts: tuple[int, int], responses: tuple[int, int]) -> Rollout:
    """Random tokens, of uniformly drawn lengths; the prompts of a group are equal."""
    random = torch.Generator().manual_seed(0)
    prompt_lens, response_lens = (
        torch.randint(low, high + 1, (ROWS,), generator=random) for low, high in (prompts, responses)
    )
    first = torch.arange(ROWS) // RESPONSES * RESPONSES
    prompt_lens = prompt_lens[first]
    lens_B1 = (prompt_lens + response_lens)[:, None]
    t = torch.arange(int(lens_B1.max()))
    inside = t < lens_B1
    ids = torch.randint(4, 100, inside.shape, generator=random)
    ids = torch.where(t < prompt_lens[:, None], ids[first], ids)
    return Rollout(
        input_ids=torch.where(inside, ids, 0),
        attention_mask=inside,
        response_mask=inside & (t >= prompt_lens[:, None]),
        prompt_lens=prompt_lens,
        group=torch.arange(ROWS) // RESPONSES,
        logprobs=torch.zeros(inside.shape),
        finished=torch.ones(ROWS, dtype=torch.bool),
    )


def measure(model: torch.nn.Module, tokenizer: object, rollout: Rollout) -> dict[str, list[tuple[float, float]]]:
    """(seconds of the log-prob pass, of the gradient steps) of each round, of each way; the first is not counted."""
    engines = {
        name: TorchTrain(
            copy.deepcopy(model),
            tokenizer,
            optimizer=OptimizerConfig(),
            loss=LossConfig(),
            temperature=1.0,
            micro_batch_size=way.rows,
            max_tokens=way.max_tokens,
            share_prompts=way.share_prompts,
        )
        for name, way in WAYS.items()
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
    for _ in range(1 + ROUNDS):
        for name, engine in engines.items():
            started = time.process_time()
            log_probs, _ = engine.log_probs(rollout, TAP)
            scored = time.process_time()
            batch = TrainBatch(rollout, log_probs.logprobs, torch.ones(rollout.logprobs.shape))
            for index in WAYS[name].mini_batches():
                engine.step(take_rows(batch, index))
            seconds[name].append((scored - started, time.process_time() - scored))
    return {name: values[1:] for name, values in seconds.items()}


if __name__ == "__main__":
    raise SystemExit(main())
