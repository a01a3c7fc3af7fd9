"""Counted FLOPs and bytes, against counting one by one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from benchmarks import shapes
from benchmarks.registry import REGISTRY, select
from benchmarks.shapes import HORIZON, WINDOW, Shape, make_inputs


@pytest.mark.parametrize("shape", [Shape(7), Shape(90), Shape(90, prompt=20), Shape(60, prompt=59)])
def test_pairs_are_those_counted_one_by_one(shape: Shape) -> None:
    pairs = [(t, s) for t in range(shape.prompt, shape.tokens) for s in range(t + 1)]
    near = [t - s for t, s in pairs if t - s < WINDOW or HORIZON[0] <= t - s <= HORIZON[1]]
    assert shape.causal_pairs == len(pairs)
    assert shape.band_pairs == len(near)


def test_counts_by_hand() -> None:
    """T=4, Hq=2, Hkv=1, D=8: 10 causal pairs of 2 heads, 2·8 FLOPs each for the scores and as many for the output."""
    shape = Shape(4, query_heads=2, key_heads=1, head_size=8)
    flops = {name: benchmark.flops(shape) for name, benchmark in REGISTRY.items()}
    assert flops["eager"] == flops["blocked_128"] == flops["statistics"] == flops["bands"] == 10 * 2 * 16
    assert flops["sdpa"] == flops["with_output"] == 2 * 10 * 2 * 16
    # bf16: q 4·2·8·2 = 128 and k 64 bytes; waad, fai and lse 3·2·4·4 = 96; v 64 and out 128.
    bytes_moved = {name: benchmark.bytes(shape, torch.bfloat16) for name, benchmark in REGISTRY.items()}
    assert bytes_moved["statistics"] == 128 + 64 + 96
    assert bytes_moved["sdpa"] == 128 + 64 + 64 + 128
    assert bytes_moved["with_output"] == 128 + 64 + 64 + 128 + 96


def test_inputs_repeat() -> None:
    first, second = (make_inputs(Shape(9), torch.bfloat16) for _ in range(2))
    assert torch.equal(first.q, second.q)
    assert first.q.shape == (9, 8, 128)
    assert first.k.shape == first.v.shape == (9, 2, 128)
    assert first.q.dtype == torch.bfloat16


def test_inputs_on_the_cpu_are_those_of_earlier_records() -> None:
    inputs = make_inputs(Shape(9, query_heads=2, key_heads=1, head_size=4), torch.float32)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn((9, heads, 4), generator=generator) for heads in (2, 1, 1))
    assert torch.equal(inputs.q, 2 * q)
    assert torch.equal(inputs.k, k)
    assert torch.equal(inputs.v, v)
    assert inputs.q[0, 0].tolist() == pytest.approx([-2.2516797, -2.3047204, -0.5011572, -0.8677576])


def test_inputs_are_drawn_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device has no memory to copy from the host to: q, k and v are drawn there, or not at all.

    Only the module sees the replacements: a first operation on that device imports modules of torch's that use the real
    ones.
    """
    drawn, randn, generator = [], torch.randn, torch.Generator

    def noting(*size: object, **options: object) -> torch.Tensor:
        drawn.append(options.pop("device", "cpu"))
        options.pop("generator")
        return randn(*size, device=drawn[-1], **options)

    def noting_generator(device: str = "cpu") -> torch.Generator:
        drawn.append(device)
        return generator()

    names = {**vars(torch), "randn": noting, "Generator": noting_generator}
    monkeypatch.setattr(shapes, "torch", SimpleNamespace(**names))
    inputs = make_inputs(Shape(9), torch.bfloat16, "meta")
    assert drawn == 4 * ["meta"]
    assert inputs.q.device.type == "meta"


def test_lse_is_that_of_every_row() -> None:
    inputs = make_inputs(Shape(300, prompt=5, query_heads=2, key_heads=1, head_size=16), torch.float32)
    for head, row in ((0, 5), (1, 255), (0, 256), (1, 299)):  # both sides of a block's edge
        scores = inputs.k[: row + 1, 0].double() @ inputs.q[row, head].double() / 4
        assert inputs.lse[head, row].item() == pytest.approx(scores.logsumexp(0).item(), rel=1e-5)
    assert inputs.lse[:, :5].isnan().all()


def test_select_keeps_the_order_and_names_the_unknown() -> None:
    assert [benchmark.name for benchmark in select(["bands", "eager"])] == ["eager", "bands"]
    assert [benchmark.name for benchmark in select(None)] == list(REGISTRY)
    with pytest.raises(ValueError, match="--ops names 'flash'; allowed are eager, "):
        select(["flash"])
