"""rhythm.tap.megatron under context parallelism: ranks are threads, each with the model and its part of the sequences.

On real ranks of Megatron: tests/engines/megatron/test_context.py.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from threading import Barrier, BrokenBarrierError, Lock
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron_sequences import LENS, NO_GROUPS, PROMPTS, SIGNALS, assert_same, expected, response_mask, sequences
from megatron_stand_in import CoreAttention, Model, packed_params
from torch import Tensor

from rhythm.credit.heads import HeadGroups
from rhythm.tap import context_parallel
from rhythm.tap.attention_form import UnsupportedAttention
from rhythm.tap.context_parallel import shard_places
from rhythm.tap.megatron import attach
from rhythm.tap.megatron_layers import MicroBatch

BUILDING = Lock()


class Ranks:
    """Threads that give each other tensors."""

    def __init__(self, size: int) -> None:
        self.size, self._barrier, self._given = size, Barrier(size, timeout=60), [torch.empty(0)] * size

    def all(self, rank: int, x: Tensor) -> list[Tensor]:
        self._given[rank] = x
        self._barrier.wait()
        given = list(self._given)
        self._barrier.wait()
        return given

    def run(self, work: Callable[[Any], Any]) -> list[Any]:
        """The results of each rank; `work` gets its group."""
        groups = [SimpleNamespace(size=lambda: self.size, rank=lambda r=r: r, ranks=self) for r in range(self.size)]

        def of_rank(group: Any) -> Any:
            try:
                return work(group)
            except BrokenBarrierError as error:
                return error
            except BaseException:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(self.size) as pool:
            results = [done.result() for done in [pool.submit(of_rank, group) for group in groups]]
        assert not any(isinstance(result, Exception) for result in results)
        return results


@pytest.fixture(autouse=True)
def threads_for_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        context_parallel, "gathered", lambda x, group: torch.cat(group.ranks.all(group.rank(), x.contiguous()))
    )


class ShardedCore(CoreAttention):
    """Attention of this rank's queries, computed by that of all ranks together."""

    group: Any

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Any:
        group, packed = self.group, options["packed_seq_params"]
        rows = [len(query) * group.size()] if packed is None else torch.diff(packed.cu_seqlens_q).tolist()
        home = torch.cat([shard_places(rows, group.size(), rank) for rank in range(group.size())]).argsort()
        whole = [torch.cat(group.ranks.all(group.rank(), x))[home] for x in (query, key, value)]
        out = super().forward(*whole, *rest, **options)
        places = shard_places(rows, group.size(), group.rank())
        return (out[0][places], out[1][:, places]) if isinstance(out, tuple) else out[places]


def model_of(group: Any, **changes: Any) -> Model:
    with BUILDING:  # with torch's one generator
        model = Model(context_parallel_size=group.size(), **changes)
    for core in model.cores():
        core.__class__ = ShardedCore
        core.group = group
    return model


def groups_of(group: Any) -> Any:
    return SimpleNamespace(tensor=None, pipeline=None, context=group)


def summed(group: Any, x: Tensor) -> Tensor:
    return torch.stack(group.ranks.all(group.rank(), x)).sum(dim=0)


def run_packed(group: Any, model: Model, tap: Any, rows: list[int], tail: int = 0) -> None:
    chunks = 2 * group.size()
    texts = [sequences()[row] for row in rows] + [torch.zeros(tail * chunks, dtype=torch.long)] * (tail > 0)
    texts = [torch.nn.functional.pad(text, (0, -len(text) % chunks)) for text in texts]
    bounds = [0, *torch.tensor([len(text) for text in texts]).cumsum(0).tolist()]
    places = shard_places([end - start for start, end in pairwise(bounds)], group.size(), group.rank())
    micro = MicroBatch(rows, [LENS[row] for row in rows], [PROMPTS[row] for row in rows], bounds[: len(rows)])
    with tap.reading(micro):
        model(torch.cat(texts)[places][None], packed_seq_params=packed_params(bounds))


def run_padded(group: Any, model: Model, tap: Any, rows: list[int], left: bool) -> None:
    chunks = 2 * group.size()
    S = max(LENS[row] for row in rows) + 2
    S += -S % chunks
    lens, first = [LENS[row] for row in rows], [S - LENS[row] if left else 0 for row in rows]
    ids, real = torch.zeros(len(rows), S, dtype=torch.long), torch.zeros(len(rows), S, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, first[i] : first[i] + lens[i]] = sequences()[row]
        real[i, first[i] : first[i] + lens[i]] = True
    with tap.reading(MicroBatch(rows, lens, [PROMPTS[row] for row in rows], first if left else None)):
        mask = ~real[:, None, None, :].expand(-1, 1, S, S)
        model(ids[:, shard_places([S], group.size(), group.rank())], attention_mask=mask)


RUNS = {
    "packed": run_packed,
    "with a tail": partial(run_packed, tail=2),
    "left": partial(run_padded, left=True),
    "right": partial(run_padded, left=False),
}


@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize("size", [2, 3])
def test_signals_are_those_of_whole_sequences(size: int, kind: str) -> None:
    def work(group: Any) -> Any:
        model = model_of(group)
        with attach(model, SIGNALS, groups=groups_of(group)) as tap:
            for rows in ([3, 1], [4], [2, 0]):
                RUNS[kind](group, model, tap, rows)
        return tap.signals(response_mask(), all_reduce=partial(summed, group))

    for signals in Ranks(size).run(work):
        assert_same(signals, expected())


def test_windows_sinks_and_a_given_lse() -> None:
    changes = {"window_size": (5, 0), "softmax_type": "learnable"}
    wanted = expected(**changes)
    fixed = HeadGroups(wanted.groups.local[:1].roll(1, dims=1), wanted.groups.global_[:1].roll(1, dims=1))

    def work(group: Any, given: bool) -> Any:
        model = model_of(group, gives_lse=given, **changes)
        options = {"lse": lambda core, output: output[1], "head_groups": fixed} if given else {}
        with attach(model, SIGNALS, groups=groups_of(group), **options) as tap:
            run_packed(group, model, tap, [0, 1, 2, 3, 4])
        return tap.signals(response_mask(), all_reduce=partial(summed, group))

    for signals in Ranks(2).run(partial(work, given=False)):
        assert_same(signals, wanted)
    for signals in Ranks(2).run(partial(work, given=True)):
        assert signals.span.isnan().all()
        assert_same(signals, expected(fixed, **changes), span=False)


def test_attention_of_another_form_is_refused_on_every_rank() -> None:
    def work(group: Any) -> Any:
        model = model_of(group)
        model.cores()[2].twist = 1.3
        with attach(model, SIGNALS, groups=groups_of(group)) as tap:
            run_packed(group, model, tap, [0, 1, 2, 3, 4])
        with pytest.raises(UnsupportedAttention, match=r"ShardedCore, layer 2: an output of .* is not that of causal"):
            tap.signals(response_mask(), all_reduce=partial(summed, group))

    Ranks(2).run(work)


def test_refused_by_name() -> None:
    with pytest.raises(UnsupportedAttention, match="context parallelism, whose 2 ranks are a group of 1 here"):
        attach(Model(context_parallel_size=2), SIGNALS, groups=NO_GROUPS)
    group = SimpleNamespace(size=lambda: 2, rank=lambda: 0)
    with pytest.raises(UnsupportedAttention, match="context parallelism, whose 1 ranks are a group of 2 here"):
        attach(Model(), SIGNALS, groups=groups_of(group))

    def read(packed: Any, tokens: int) -> None:
        model = Model(context_parallel_size=2)
        with attach(model, SIGNALS, groups=groups_of(group)) as tap, tap.reading(MicroBatch([0], [8], [1])):
            model(torch.ones(1, tokens, dtype=torch.long), packed_seq_params=packed)

    class AnyCore(CoreAttention):
        def forward(self, query: Tensor, *_: Any, **__: Any) -> Tensor:
            return query.flatten(-2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CoreAttention, "forward", AnyCore.forward)
        with pytest.raises(UnsupportedAttention, match="a row of 10 positions can't be cut into 4 chunks for 2 ranks"):
            read(packed_params([0, 10]), 5)
        with pytest.raises(UnsupportedAttention, match="packed sequences of 12 positions, of which this rank has 5"):
            read(packed_params([0, 12]), 5)
        with pytest.raises(UnsupportedAttention, match="context parallelism of 4 ranks in a group of 2"):
            read(packed_params([0, 16], local_cp_size=4), 8)
