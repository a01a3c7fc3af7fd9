"""rhythm.tap.megatron on a model with Megatron's names and calls, against the statistics of each sequence alone. On
Megatron itself: tests/engines/megatron.
"""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron_sequences import LENS, NO_GROUPS, PROMPTS, SIGNALS, assert_same, expected, response_mask, sequences
from megatron_stand_in import Model, packed_params
from torch import Tensor

from rhythm.credit.heads import HeadGroups
from rhythm.credit.signals import RhythmSignals
from rhythm.ops.statistics import attention_statistics
from rhythm.tap.attention_form import UnsupportedAttention
from rhythm.tap.megatron import attach
from rhythm.tap.megatron_layers import MicroBatch, decoder_layers


def run_packed(
    model: Model, tap: Any, rows: list[int], *, align: int = 1, tail: int = 0, backward: bool = False
) -> None:
    """Rows packed into one, each padded to a multiple of `align`, with a segment of padding at the end."""
    texts = [sequences()[row] for row in rows]
    padded = [torch.nn.functional.pad(text, (0, -len(text) % align)) for text in texts]
    bounds = [0, *torch.tensor([len(text) for text in padded]).cumsum(0).tolist()]
    first = bounds[:-1] if align > 1 or tail else None
    if tail:
        padded.append(torch.zeros(tail, dtype=torch.long))
        bounds.append(bounds[-1] + tail)
    micro = MicroBatch(rows, [LENS[row] for row in rows], [PROMPTS[row] for row in rows], first)
    with tap.reading(micro):
        out = model(torch.cat(padded)[None], packed_seq_params=packed_params(bounds))
        if backward:
            out.sum().backward()


@pytest.mark.parametrize("shape", [{}, {"align": 8}, {"tail": 5}, {"align": 4, "tail": 4}], ids=str)
def test_packed_rows_in_any_order(shape: dict[str, int]) -> None:
    model = Model()
    with attach(model, SIGNALS, groups=NO_GROUPS) as tap:
        for rows in ([3, 1], [4], [2, 0]):
            run_packed(model, tap, rows, **shape)
    assert_same(tap.signals(response_mask()), expected())


@pytest.mark.parametrize("left", [False, True])
def test_padded_rows(left: bool) -> None:
    model = Model()
    with attach(model, SIGNALS.model_copy(update={"grouping": "batch"}), groups=NO_GROUPS) as tap:
        for rows in ([2, 0, 4], [1, 3]):
            S = max(LENS[row] for row in rows) + 2
            lens, first = [LENS[row] for row in rows], [S - LENS[row] if left else 0 for row in rows]
            ids = torch.zeros(len(rows), S, dtype=torch.long)
            real = torch.zeros(len(rows), S, dtype=torch.bool)
            for i, row in enumerate(rows):
                ids[i, first[i] : first[i] + lens[i]] = sequences()[row]
                real[i, first[i] : first[i] + lens[i]] = True
            with tap.reading(MicroBatch(rows, lens, [PROMPTS[row] for row in rows], first if left else None)):
                model(ids, attention_mask=~real[:, None, None, :].expand(-1, 1, S, S))
    assert_same(tap.signals(response_mask()), expected(per="batch"))


@pytest.mark.parametrize(
    "changes",
    [
        {"window_size": (5, 0)},
        {"window_size": (5, 0), "window_attn_skip_freq": 2},
        {"softmax_type": "learnable"},
        {"softmax_scale": 0.9},
    ],
    ids=str,
)
def test_forms_of_attention(changes: dict[str, Any]) -> None:
    model = Model(**changes)
    with attach(model, SIGNALS, groups=NO_GROUPS) as tap:
        run_packed(model, tap, [0, 1, 2, 3, 4], align=4)
    assert_same(tap.signals(response_mask()), expected(**changes))


def test_a_layer_that_is_recomputed_is_read_once() -> None:
    model = Model(recompute=True)
    model.embedding.weight.requires_grad_(True)
    with attach(model, SIGNALS, groups=NO_GROUPS) as tap:
        run_packed(model, tap, [0, 1, 2], backward=True)
        run_packed(model, tap, [3, 4], backward=True)
    assert len(model.cores()[1].seen) == 4  # each micro-batch twice, the second time in the backward pass
    assert_same(tap.signals(response_mask()), expected())


def test_fixed_groups_and_a_given_lse_visit_only_the_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = expected()
    fixed = HeadGroups(wanted.groups.local[:1].roll(1, dims=1), wanted.groups.global_[:1].roll(1, dims=1))
    model = Model(gives_lse=True)
    asked = []

    def watched(*args: Any, **options: Any) -> Any:
        asked.append((options["span"], options["lse"] is not None))
        return attention_statistics(*args, **options)

    monkeypatch.setattr("rhythm.tap.megatron.attention_statistics", watched)
    with attach(model, SIGNALS, head_groups=fixed, lse=lambda core, output: output[1], groups=NO_GROUPS) as tap:
        run_packed(model, tap, [0, 1, 2, 3, 4])
    assert asked == [(False, True)] * 2
    signals = tap.signals(response_mask())
    assert signals.span.isnan().all()
    assert_same(signals, expected(fixed), span=False)


def test_a_model_is_as_it_was() -> None:
    model = Model()
    rows = packed_params([0, LENS[0]])
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    plain = model(sequences()[0][None], packed_seq_params=rows)
    with attach(model, SIGNALS, groups=NO_GROUPS) as tap, tap.reading(MicroBatch([0], LENS[:1], PROMPTS[:1])):
        assert torch.equal(model(sequences()[0][None], packed_seq_params=rows), plain)
    for name, module in model.named_modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert vars(module).keys() == before[name].keys()


def located(args: tuple[Any, ...], kwargs: dict[str, Any]) -> MicroBatch | None:
    """Rows found by their tokens; a forward pass with labels is not to be read."""
    if kwargs["labels"] is not None:
        return None
    bounds = kwargs["packed_seq_params"].cu_seqlens_q.tolist()
    parts = kwargs["input_ids"][0].tensor_split(bounds[1:-1])
    names = [tuple(part.tolist()) for part in parts]
    prompts = {tuple(text.tolist()): prompt for text, prompt in zip(sequences(), PROMPTS, strict=True)}
    return MicroBatch(names, [len(part) for part in parts], [prompts[name] for name in names])


def test_rows_are_found_in_passes_out_of_reach_and_rows_of_one_name_are_alike() -> None:
    model = Model()
    texts = sequences()

    def run(rows: list[int], labels: Tensor | None = None) -> None:
        bounds = [0, *torch.tensor([LENS[row] for row in rows]).cumsum(0).tolist()]
        ids = torch.cat([texts[row] for row in rows])[None]
        model(input_ids=ids, packed_seq_params=packed_params(bounds), labels=labels)

    with attach([model], SIGNALS, locate=located, groups=NO_GROUPS) as tap:
        run([3, 0])
        run([1, 2], labels=torch.zeros(1))
        run([1, 4, 0])
        run([2])
    names = [tuple(text.tolist()) for text in [*texts, texts[0]]]
    mask = torch.cat([response_mask(), response_mask()[:1]])
    signals = tap.signals(mask, names)
    assert torch.equal(signals.waad[5].nan_to_num(), signals.waad[0].nan_to_num())
    five = RhythmSignals(
        signals.waad[:5], signals.fai[:5], None, signals.span[:5],
        HeadGroups(signals.groups.local[:5], signals.groups.global_[:5]),
    )  # fmt: skip
    assert_same(five, expected())


def test_what_was_read_must_be_the_batch() -> None:
    model, texts = Model(), sequences()
    with attach(model, SIGNALS, groups=NO_GROUPS) as tap:
        run_packed(model, tap, [0, 1, 2, 3])
        with pytest.raises(ValueError, match="row 4 of response_mask was not read once in each layer"):
            tap.signals(response_mask())
        run_packed(model, tap, [4])
        other = response_mask()
        other[2, PROMPTS[2]] = False
        with pytest.raises(ValueError, match="row 2 of response_mask has another response"):
            tap.signals(other)
        with pytest.raises(ValueError, match="response_mask has 20 positions; a sequence of 30 tokens"):
            tap.signals(response_mask()[:, :20])
        none = response_mask()
        none[2] = False  # left out of the loss
        assert tap.signals(none).waad[2].isnan().all()
        run_packed(model, tap, [1])
        with pytest.raises(ValueError, match="a sequence named 1 was read"):
            tap.signals(response_mask())
        with pytest.raises(ValueError, match=r"lens\[0\] is 23"), tap.reading(MicroBatch([0], [23], [5], [1])):
            model(texts[0][None], packed_seq_params=packed_params([0, 23]))


def test_sequences_elsewhere_than_the_model_has_them() -> None:
    model = Model()
    with attach(model, SIGNALS, groups=NO_GROUPS) as tap:
        ids = torch.cat(sequences()[:2])[None]
        with tap.reading(MicroBatch([0, 1], LENS[:2], PROMPTS[:2])):
            model(ids, packed_seq_params=packed_params([0, LENS[0] + 1, LENS[0] + LENS[1]]))
    with pytest.raises(UnsupportedAttention, match="packed sequences that are not where the micro-batch has them"):
        tap.signals(response_mask()[:2])


def test_attention_of_another_form_than_its_configuration_says() -> None:
    model = Model()
    model.cores()[2].twist = 1.3
    with attach(model, SIGNALS, groups=NO_GROUPS) as tap:
        run_packed(model, tap, [0, 1, 2, 3, 4])
    with pytest.raises(UnsupportedAttention, match=r"CoreAttention, layer 2: an output of .* is not that of causal"):
        tap.signals(response_mask())


def read_one(model: Model, *, packed: Any, ids: Tensor | None = None, **arguments: Any) -> None:
    with attach(model, SIGNALS, groups=NO_GROUPS) as tap, tap.reading(MicroBatch([0], LENS[:1], PROMPTS[:1])):
        model(sequences()[0][None] if ids is None else ids, packed_seq_params=packed, **arguments)


def test_refused_by_name() -> None:
    whole = packed_params([0, LENS[0]])
    with pytest.raises(UnsupportedAttention, match=r"attention dropout of 0\.1 in train mode"):
        read_one(Model(attention_dropout=0.1), packed=whole)
    read_one(Model(attention_dropout=0.1).eval(), packed=whole)
    with pytest.raises(UnsupportedAttention, match=r"a window of \(5, 5\)"):
        read_one(Model(window_size=(5, 5)), packed=whole)
    model = Model()
    (layer, *_) = decoder_layers([model])
    q, k = torch.zeros(9, 4, 8), torch.zeros(9, 2, 8)
    with pytest.raises(UnsupportedAttention, match="packed rows without packed_seq_params, so without the lengths"):
        layer.call((q, k, k), {})
    with pytest.raises(UnsupportedAttention, match="an attention bias"):
        layer.call((q, k, k), {"attention_bias": q})
    with pytest.raises(UnsupportedAttention, match="9 keys for 1 queries"):
        layer.call((q[:1, None], k[:, None], k[:, None]), {})
    model.decoder.layers[1].self_attention.attn_mask_type = SimpleNamespace(name="no_mask")
    with pytest.raises(UnsupportedAttention, match="a mask of type no_mask"):
        read_one(model, packed=whole)
    with pytest.raises(UnsupportedAttention, match="no Megatron layers"):
        attach(torch.nn.Linear(2, 2), SIGNALS, groups=NO_GROUPS)
    with pytest.raises(ValueError, match="two layers of number 1"):
        attach([Model(), Model()], SIGNALS, groups=NO_GROUPS)
    with pytest.raises(ValueError, match="lens has length 1"):
        MicroBatch([0, 1], [3], [1, 1])


def test_order_of_micro_batches_does_not_matter() -> None:
    rows = list(range(5))
    random.Random(1).shuffle(rows)
    found = []
    for order in (rows, rows[::-1]):
        model = Model()
        with attach(model, SIGNALS, groups=NO_GROUPS) as tap:
            for row in order:
                run_packed(model, tap, [row])
        found.append(tap.signals(response_mask()))
    assert torch.equal(found[0].waad.nan_to_num(), found[1].waad.nan_to_num())
    assert torch.equal(found[0].fai.nan_to_num(), found[1].fai.nan_to_num())
