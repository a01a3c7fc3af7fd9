"""python -m benchmarks.tapped_layer: what AttentionTap adds to a layer's attention, with and without its lse.

Prints a markdown table, the processor's time per layer, so that other processes disturb it little. The attention is
transformers' sdpa function, without gradients: five layers with 9 query heads, 3 key heads and head size 64
(SmolLM2-135M's) unless told otherwise; the first eighth of each sequence is its prompt. "sweep": statistics with spans,
by a sweep over all keys. "bands": with fixed head groups, by the attention's own lse. The comparison of some output
rows, which engines make once in 16 passes, is left out. Checked first: outputs are bit for bit those of attention
alone, and the statistics of both ways are equal up to rounding.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks.measure import Timing, ratio
from rhythm.credit.signals import HeadStatistics
from rhythm.tap import attention_tap
from rhythm.tap.attention_form import AttentionCall
from rhythm.tap.attention_tap import AttentionTap
from rhythm.tap.signals_config import SignalsConfig

LAYERS = 5
LEAST_SECONDS = 0.1
WAYS = {"attention": None, "sweep": True, "bands": False}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-3}
"""Of WAAD, in tokens of at most 10, and of FAI: torch's bf16 kernel rounds exponentials to about 7e-5."""


class Layers:
    """The attention of LAYERS layers on the same random q, k and v of `rows` sequences; if `padded`, half of them are
    shorter by a quarter, padded on the right.
    """

    def __init__(
        self, heads: tuple[int, int, int], rows: int, tokens: int, dtype: torch.dtype, *, padded: bool = False
    ) -> None:
        query_heads, key_heads, size = heads
        sizes = {"hidden_size": query_heads * size, "head_dim": size, "intermediate_size": 8, "vocab_size": 8}
        config = LlamaConfig(
            num_hidden_layers=LAYERS, num_attention_heads=query_heads, num_key_value_heads=key_heads, **sizes
        )
        self._model = LlamaForCausalLM(config).eval()
        generator = torch.Generator().manual_seed(0)
        q, k, v = (
            torch.randn(rows, tokens, n, size, generator=generator).to(dtype).transpose(1, 2)
            for n in (query_heads, key_heads, key_heads)
        )
        lens_B = torch.full((rows,), tokens)
        if padded:
            lens_B[rows // 2 :] = tokens * 3 // 4
        self._real_BT = torch.arange(tokens) < lens_B[:, None]
        mask = self._real_BT[:, None, None, :] & torch.ones(tokens, tokens, dtype=torch.bool).tril()
        call = AttentionCall(
            where="llama, layer 0",
            layer=0,
            implementation="sdpa",
            function=sdpa_attention_forward,
            module=self._model.model.layers[0].self_attn,
            query=2 * q,
            key=k,
            value=v,
            mask=mask if padded else None,
            options={"scaling": size**-0.5, "dropout": 0.0},
        )
        self._calls = [replace(call, layer=layer) for layer in range(LAYERS)]
        self._options: dict[str, Any] = {
            "attention_mask": self._real_BT,
            "prompt_lens": lens_B // 8,
            "signals": SignalsConfig(layers="all"),
        }

    def run(self, span: bool | None, watch: Stopwatch | None = None) -> tuple[list[Tensor], HeadStatistics | None]:
        """Outputs and statistics; span None: attention alone. `watch`: times the statistics."""
        if span is None:
            return [call.run()[0] for call in self._calls], None
        tap = AttentionTap(self._model, **self._options)
        tap.needs_span, tap.checks_output = span, False
        tap.watch = watch or nullcontext()
        outputs = [tap.receive(call)[0] for call in self._calls]
        return outputs, tap.statistics()

    def check(self) -> None:
        """RuntimeError if a way changes the output, or its statistics are not those of the other."""
        plain, _ = self.run(None)
        swept, banded = self.run(True), self.run(False)
        for outputs, _ in (swept, banded):
            for output, expected in zip(outputs, plain, strict=True):
                if not output[self._real_BT].equal(expected[self._real_BT]):
                    raise RuntimeError("the tap changes the output of the attention")
        assert swept[1] is not None
        assert banded[1] is not None
        tolerance = TOLERANCE[self._calls[0].query.dtype]
        for name in ("waad", "fai"):
            x, y = getattr(swept[1], name), getattr(banded[1], name)
            torch.testing.assert_close(x, y, rtol=0, atol=tolerance, equal_nan=True)
        if not banded[1].span.isnan().all():
            raise RuntimeError("spans were computed although they were not wanted")


class Stopwatch(AbstractContextManager[None]):
    """Adds up the processor's seconds inside."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._started = time.process_time()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.process_time() - self._started


@torch.no_grad()
def timings(layers: Layers, rounds: int) -> dict[str, tuple[Timing, Timing]]:
    """Of each way, per layer: (the whole pass, its statistics), interleaved; each round's are means over calls of at
    least LEAST_SECONDS of the processor.
    """
    layers.check()
    calls = max(1, math.ceil(LEAST_SECONDS / _seconds(layers, True, 1)[0]))
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
    for _ in range(rounds):
        for name, span in WAYS.items():
            seconds[name].append(_seconds(layers, span, calls))
    return {name: (Timing(tuple(a for a, _ in x)), Timing(tuple(b for _, b in x))) for name, x in seconds.items()}


def _seconds(layers: Layers, span: bool | None, calls: int) -> tuple[float, float]:
    watch, started = Stopwatch(), time.process_time()
    for _ in range(calls):
        layers.run(span, watch)
    share = 1 / calls / LAYERS
    return (time.process_time() - started) * share, watch.seconds * share


def line(times: dict[str, tuple[Timing, Timing]]) -> list[str]:
    """Milliseconds of the attention and of the statistics of both ways; the ratio of the latter, and that of the whole
    passes. Medians over the rounds.
    """
    attention, sweep, bands = (times[name] for name in WAYS)
    milliseconds = (f"{1e3 * timing.median:.2f}" for timing in (attention[0], sweep[1], bands[1]))
    return [*milliseconds, f"{ratio(bands[1], sweep[1]):.2f}", f"{ratio(bands[0], sweep[0]):.2f}"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tapped_layer", description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 512, 2048])
    parser.add_argument("--heads", type=int, nargs=3, default=[9, 3, 64], metavar=("Hq", "Hkv", "D"))
    parser.add_argument("--rows", type=int, default=2, help="sequences of a pass")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--always", action="store_true", help="bands for short sequences, which the tap sweeps, too")
    options = parser.parse_args(arguments)
    if options.always:
        attention_tap.bands_pay = lambda *_: True
    torch.set_num_threads(1)
    print("| T | type | rows | attention, ms | sweep, ms | bands, ms | bands / sweep | pass, bands / sweep |")
    print("|---|---|---|---|---|---|---|---|")
    for tokens in options.tokens:
        for dtype in (torch.float32, torch.bfloat16):
            for padded in (False, True):
                layers = Layers(tuple(options.heads), options.rows, tokens, dtype, padded=padded)
                cells = line(timings(layers, options.rounds))
                kind = "padded" if padded else "whole"
                print(f"| {tokens} | {str(dtype).removeprefix('torch.')} | {kind} | {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
