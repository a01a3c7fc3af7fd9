"""Column scores against the definition, on the eager map; and the examples of the documentation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tensors import TRITON, normal
from torch import Tensor

from rhythm import column_scores
from rhythm.ops.reference import attention_weights

DOC = Path(__file__).parents[2] / "docs" / "column_scores.md"
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy, in Triton's interpreter


def defined(
    q_NHD: Tensor, k_NGD: Tensor, begin: int, end: int, horizon: tuple[int, int | None], reduce: str, per: str
) -> Tensor:
    """One sequence, from its map in fp64: every condition of the definition as a mask of its own."""
    weights, _ = attention_weights(q_NHD.double(), k_NGD.double(), q_NHD.shape[-1] ** -0.5)
    row, column = torch.meshgrid(*2 * [torch.arange(q_NHD.shape[0])], indexing="ij")
    lo, hi = horizon
    chosen = (row >= begin) & (row < end) & (row - column >= max(lo, 0))
    if hi is not None:
        chosen &= row - column <= hi
    score_HN = (weights * chosen).sum(1)
    if reduce == "mean":
        score_HN = score_HN / chosen.sum(0)  # 0 / 0 is NaN
    if per == "group":
        grouped = score_HN.unflatten(0, (k_NGD.shape[1], -1))
        score_HN = grouped.sum(1) if reduce == "sum" else grouped.mean(1)
    return score_HN


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("backend", ["cpu", "reference", TRITON])
@pytest.mark.parametrize(
    ("rows", "begin_end"),
    [(None, [(0, 9), (0, 0), (0, 40)]), ((-6, None), [(3, 9), (0, 0), (34, 40)]), ((2, -3), [(2, 6), (0, 0), (2, 37)])],
    ids=["all", "window", "inside"],
)
@pytest.mark.parametrize("horizon", [(0, None), (3, 12), (2, None)], ids=str)
def test_packed(backend: str, rows: Any, begin_end: list[tuple[int, int]], horizon: tuple[int, int | None]) -> None:
    bounds = [0, 9, 9, 49]
    q, k = normal(49, 4, 16), normal(49, 2, 16, seed=1)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    for reduce in ("sum", "mean"):
        for per in ("head", "group"):
            expected = torch.cat(
                [
                    defined(q[a:b], k[a:b], *span, horizon, reduce, per)
                    for a, b, span in zip(bounds[:-1], bounds[1:], begin_end, strict=True)
                    if b > a
                ],
                dim=1,
            )
            actual = column_scores(
                q, k, reduce=reduce, per=per, rows=rows, horizon=horizon, cu_seqlens=cu_seqlens, backend=backend
            )
            assert actual.dtype == torch.float32
            assert_close(actual, expected)


def test_a_range_for_each_sequence() -> None:
    q, k = normal(2, 30, 4, 16), normal(2, 30, 2, 16, seed=1)
    ranges = torch.tensor([[4, 11], [-20, 30]])
    actual = column_scores(q, k, rows=ranges, horizon=(1, 9), per="group")
    for b, (begin, end) in enumerate([(4, 11), (10, 30)]):
        assert_close(actual[b], defined(q[b], k[b], begin, end, (1, 9), "sum", "group"))


@pytest.mark.parametrize("given_lse", [False, True])
def test_fewer_rows_than_keys(given_lse: bool) -> None:
    """As at decoding: q has the last rows only."""
    q, k = normal(2, 33, 4, 16), normal(2, 33, 2, 16, seed=1)
    lse = None
    if given_lse:
        lse = torch.stack([attention_weights(q[b], k[b], 0.25)[1][:, -8:] for b in range(2)])
    actual = column_scores(q[:, -8:], k, lse=lse, reduce="mean")
    for b in range(2):
        assert_close(actual[b], defined(q[b], k[b], 25, 33, (0, None), "mean", "head"))
    one = column_scores(q[0, -8:], k[0], lse=None if lse is None else lse[0])
    assert_close(one, defined(q[0], k[0], 25, 33, (0, None), "sum", "head"))
    # A range cannot reach back to rows that are not there.
    assert torch.equal(column_scores(q[:, -8:], k, rows=(0, None)), column_scores(q[:, -8:], k))
    assert_close(column_scores(q[:, -8:], k, rows=(27, 31))[0], defined(q[0], k[0], 27, 31, (0, None), "sum", "head"))


def test_golden() -> None:
    """With q = 0 every row attends evenly: key s of 4 receives Σ_{t ≥ s} 1 / (t + 1)."""
    q, k = torch.zeros(4, 2, 8), normal(4, 1, 8)
    harmonic = [1 + 1 / 2 + 1 / 3 + 1 / 4, 1 / 2 + 1 / 3 + 1 / 4, 1 / 3 + 1 / 4, 1 / 4]
    torch.testing.assert_close(column_scores(q, k)[0], torch.tensor(harmonic))
    torch.testing.assert_close(column_scores(q, k, per="group")[0], 2 * torch.tensor(harmonic))
    mean = column_scores(q, k, reduce="mean", horizon=(2, None))[1]
    torch.testing.assert_close(mean, torch.tensor([(1 / 3 + 1 / 4) / 2, 1 / 4, torch.nan, torch.nan]), equal_nan=True)


def test_the_scores_of_all_keys_add_up_to_the_rows() -> None:
    q, k = normal(120, 8, 32, dtype=torch.bfloat16), normal(120, 2, 32, seed=1, dtype=torch.bfloat16)
    torch.testing.assert_close(column_scores(q, k).sum(-1), torch.full((8,), 120.0), rtol=1e-5, atol=0)
    torch.testing.assert_close(column_scores(q, k, rows=(30, 50)).sum(-1), torch.full((8,), 20.0), rtol=1e-5, atol=0)


def test_an_empty_range() -> None:
    q, k = normal(10, 2, 8), normal(10, 1, 8)
    for rows in ((10, None), (7, 3), (4, 4), (-3, -8)):
        assert torch.equal(column_scores(q, k, rows=rows), torch.zeros(2, 10))
        assert column_scores(q, k, rows=rows, reduce="mean").isnan().all()


def test_compiled() -> None:
    q, k = normal(40, 4, 16), normal(40, 2, 16, seed=1)
    compiled = torch.compile(column_scores, fullgraph=True, backend="aot_eager")
    options = {"rows": (-8, None), "per": "group", "backend": "cpu"}
    assert torch.equal(compiled(q, k, **options), column_scores(q, k, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduce": "min"}, "reduce is 'min'; allowed are sum, mean, max"),
        ({"row_weights": torch.ones(9)}, r"row_weights has shape \(9,\); it must be \(10,\) or \(4, 10\)"),
        ({"row_weights": torch.ones(2, 10)}, r"row_weights has shape \(2, 10\); it must be \(10,\) or \(4, 10\)"),
        ({"row_weights": torch.ones(10).long()}, "row_weights has dtype torch.int64; allowed are torch.float32"),
        ({"row_weights": torch.ones(10, device="meta")}, "row_weights is on meta; it must be on q's device, cpu"),
        ({"row_weights": [1.0] * 10}, "row_weights is of type list; it must be a torch.Tensor"),
        ({"per": "layer"}, "per is 'layer'; allowed are head, group"),
        ({"rows": (1, 2, 3)}, r"rows is \(1, 2, 3\); it must be \(begin, end\)"),
        ({"rows": (0.5, None)}, r"rows\[0\] is 0.5; it must be an integer"),
        ({"rows": torch.zeros(3, 2)}, r"rows has shape \(3, 2\) and dtype torch.float32; .* \[1, 2\]"),
        ({"horizon": (5, 2)}, r"horizon is \(5, 2\)"),
        ({"lse": torch.zeros(4, 9)}, r"lse has shape \(4, 9\); it must be \(4, 10\)"),
        ({"cu_seqlens": torch.tensor([0, 10])}, "cu_seqlens has dtype torch.int64"),
    ],
)
def test_bad_input(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        column_scores(normal(10, 4, 8), normal(10, 2, 8), **options)


def test_bad_lengths() -> None:
    q, k = normal(10, 4, 8), normal(7, 2, 8)
    with pytest.raises(ValueError, match="q has 10 rows and k 7; q may have fewer"):
        column_scores(q, k)
    with pytest.raises(ValueError, match="cu_seqlens goes with q and k of the same length; they have 7 and 10"):
        column_scores(q[:7], q, cu_seqlens=torch.tensor([0, 7], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"q has shape \(4, 8\)"):
        column_scores(q[0], k)


def example(section: str) -> str:
    """The python block of a section of the documentation."""
    text = DOC.read_text(encoding="utf-8").split(f"## {section}")[1]
    block = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert block is not None
    return block[1]


def test_example_h2o() -> None:
    """A key that all later tokens attend to is kept among those of a small budget, in its own group only."""
    q, k = 0.1 * normal(200, 4, 16), 0.1 * normal(200, 2, 16, seed=1)
    k[37, 1], q[:, 2:] = 4.0, 1.0
    scope = {"q": q, "k": k, "budget": 40, "recent": 20}
    exec(example("H2O"), scope)
    keep: Tensor = scope["keep"]
    assert keep.shape == (2, 200)
    assert (keep.sum(-1) == 40).all()
    assert keep[:, -20:].all()
    assert keep[1, 37]


def test_example_snapkv() -> None:
    """Keys that the last rows attend to are kept with their neighbors, those of earlier rows are not."""
    q, k = 0.1 * normal(200, 4, 16), 0.1 * normal(200, 2, 16, seed=1)
    k[60, :, 0], q[-32:, :, 0] = 20.0, 3.0
    k[100, :, 1], q[:-32, :, 1] = 20.0, 3.0
    scope = {"q_window": q[-32:], "k": k, "budget": 20}
    exec(example("SnapKV"), scope)
    keep: Tensor = scope["keep"]
    assert keep.shape == (2, 200)
    assert (keep.sum(-1) == 20 + 32).all()
    assert keep[:, 57:64].all()
    assert not keep[:, 97:104].all()


def test_example_kvzip() -> None:
    """A key that a single row of the repetition attends to strongly is kept, before those to which all do weakly."""
    q, k = 0.1 * normal(60, 4, 16), 0.1 * normal(160, 2, 16, seed=1)
    k[10:30, 0, 1], q[:, :2, 1] = 4.0, 3.0
    k[37, 1, 0], q[20, 3, 0] = 12.0, 8.0
    scope = {"q_repeat": q, "k": k, "context": 100, "budget": 10}
    exec(example("KVzip"), scope)
    keep: Tensor = scope["keep"]
    assert keep.shape == (2, 100)
    assert keep.sum() == 10
    assert keep[1, 37]
    assert keep[0, 10:30].sum() == 9
    summed = column_scores(q, k, per="group")[:, :100]
    assert (summed > summed[1, 37]).sum() == 20, "a sum would keep others before it"


def test_example_step_credit() -> None:
    """The answer, the last 15 tokens, attends to step 2; the tokens before it to step 0."""
    steps = [range(a, a + 30) for a in range(0, 150, 30)]
    q, k = 0.1 * normal(165, 4, 16), 0.1 * normal(165, 2, 16, seed=1)
    k[60:90, :, 0], q[150:, :, 0] = 10.0, 3.0
    k[0:30, :, 1], q[:150, :, 1] = 10.0, 3.0
    scope = {"q": q, "k": k, "steps": steps, "answer": range(150, 165)}
    exec(example("Step credit"), scope)
    credit: Tensor = scope["credit_S"]
    assert int(credit.argmax()) == 2
    assert 0.9 < float(credit.sum()) < 1.0
    torch.testing.assert_close(scope["received_T"].sum(), torch.tensor(1.0))


def test_example_thought_anchors() -> None:
    """Head 5 alone keeps attending to sentence 3: it is the receiver head, and the sentence its anchor."""
    sentences = [range(a, a + 12) for a in range(0, 240, 12)]
    q, k = 0.1 * normal(240, 8, 16), 0.1 * normal(240, 2, 16, seed=1)
    k[36:48, 1, 0], q[:, 5, 0] = 12.0, 4.0
    scope = {"q": q, "k": k, "sentences": sentences, "receivers": 1}
    exec(example("Thought Anchors"), scope)
    assert scope["receiver_heads"].tolist() == [5]
    assert int(scope["score_S"].nan_to_num().argmax()) == 3
    # The mean over later sentences of the mean attention between two.
    weights, _ = attention_weights(q, k, 16**-0.5)
    between = weights.unflatten(2, (20, 12)).mean(-1).unflatten(1, (20, 12)).mean(2)
    wanted = torch.stack([between[:, i + 4 :, i].mean(1) for i in range(16)], dim=1)
    torch.testing.assert_close(scope["score_HS"][:, :16], wanted)


@pytest.mark.parametrize("per", ["head", "group"])
@pytest.mark.parametrize("rows", [None, (3, -2), torch.tensor([[0, 9], [5, 24]])], ids=["all", "pair", "tensor"])
def test_compiled_without_a_graph_break(rows: Any, per: Any) -> None:
    """A cut range gives tensors whose lengths depend on its values: inside the op, no compiler sees them."""
    torch._dynamo.reset()
    q, k = normal(2, 24, 4, 8, seed=1), normal(2, 24, 2, 8, seed=2)

    def call(q: Tensor, k: Tensor) -> Tensor:
        return column_scores(q * 2, k, rows=rows, per=per, reduce="sum") + 1

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(q, k)
    expected = call(q, k)
    assert compiled.stride() == expected.stride()
    torch.testing.assert_close(compiled, expected, rtol=0, atol=0)
    assert float(expected.sum()) > 2 * 24  # scores are not all 0


def test_the_registered_op_refuses_bad_arguments() -> None:
    q, k = normal(6, 4, 8), normal(6, 2, 8)
    good = ["sum", "head", None, None, None, 0, None, None, 0.5, None, "cpu"]
    bad = {
        0: ("min", "reduce is 'min'; allowed are sum, mean, max"),
        1: ("heads", "per is 'heads'; allowed are head, group"),
        4: (torch.zeros(2, 2, dtype=torch.int64), r"rows has shape \(2, 2\)"),
        5: (-1, r"horizon is \(-1, None\)"),
        7: (torch.tensor([0, 7], dtype=torch.int32), "cu_seqlens runs from 0 to 7"),
        8: (float("nan"), "scale is nan"),
        9: (torch.zeros(4, 5), r"lse has shape \(4, 5\)"),
        10: ("gpu", "backend is 'gpu'; allowed are auto"),
    }
    op = torch.ops.rhythm.column_scores
    assert op(q, k, *good).equal(column_scores(q, k, scale=0.5, backend="cpu"))
    for place, (value, message) in bad.items():
        arguments = good.copy()
        arguments[place] = value
        with pytest.raises(ValueError, match=message):
            op(q, k, *arguments)
    with pytest.raises(ValueError, match="q may have fewer than k, not more"):
        op(q, k[:3], *good)
    with pytest.raises(ValueError, match=r"q has shape \(6, 4\)"):
        op(q[..., 0], k, *good)
