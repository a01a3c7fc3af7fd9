"""Refused arguments of the ops: every message names the argument, its value and what is allowed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from rhythm import column_scores, credit_weights, sampled_layers, select_heads
from rhythm.ops.statistics import attention_statistics, attention_with_statistics

Q, K = torch.zeros(6, 4, 8), torch.zeros(6, 2, 8)
INT = torch.int32
W = torch.tensor([3.0, 1.0, 4.0, 1.5, 9.0, 2.5])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": Q[0]}, r"q has shape \(4, 8\); allowed are"),
        ({"q": Q.to(torch.int32)}, "q has dtype torch.int32; allowed are"),
        ({"k": K[:5]}, "q has 6 rows and k 5; q may have fewer than k, not more"),
        ({"k": K[:, :, :7]}, r"k has shape \(6, 2, 7\)"),
        ({"k": K.repeat(1, 2, 1)[:, :3]}, "q has 4 heads and k has 3"),
        ({"k": K[:, :0]}, "q has 4 heads and k has 0"),
        ({"k": K.half()}, "k has dtype torch.float16; it must be q's, torch.float32"),
        ({"k": K.to("meta")}, "k is on meta; it must be on q's device, cpu"),
        ({"q": torch.zeros(6, 4, 257), "k": torch.zeros(6, 2, 257)}, "head size 257; allowed are 1 to 256"),
        ({"cu_seqlens": torch.tensor([0, 6])}, "cu_seqlens has dtype torch.int64; it must be torch.int32"),
        ({"cu_seqlens": torch.tensor([[0, 6]], dtype=INT)}, r"cu_seqlens has shape \(1, 2\)"),
        (
            {"cu_seqlens": torch.tensor([0, 5], dtype=INT)},
            "cu_seqlens runs from 0 to 5; it must cover 0 to T = 6",
        ),
        ({"cu_seqlens": torch.tensor([1, 6], dtype=INT)}, "cu_seqlens runs from 1 to 6"),
        ({"cu_seqlens": torch.tensor([0, 4, 3, 6], dtype=INT)}, "cu_seqlens falls from 4 to 3 at entry 2"),
        (
            {"q": Q[None], "k": K[None], "cu_seqlens": torch.tensor([0, 6], dtype=INT)},
            "cu_seqlens goes with packed q",
        ),
        ({"prompt_lens": [7]}, r"prompt_lens\[0\] is 7; its sequence allows 0 to 6"),
        ({"prompt_lens": [-1]}, r"prompt_lens\[0\] is -1"),
        ({"prompt_lens": [1, 2]}, r"prompt_lens has shape \(2,\); it must be \(1,\)"),
        ({"prompt_lens": torch.tensor([1.0])}, "prompt_lens has dtype torch.float32"),
        ({"window": 0}, "window is 0; it must be an integer of at least 1"),
        ({"window": 1.5}, "window is 1.5; it must be an integer$"),
        ({"window": True}, "window is True; it must be an integer$"),
        ({"window": 2**63}, "window is 9223372036854775808; it must be an integer of at most 9223372036854775807"),
        ({"horizon": (5, 4)}, r"horizon is \(5, 4\); it must be \(lo, hi\) with 0 <= lo <= hi"),
        ({"horizon": (-1, 4)}, r"horizon is \(-1, 4\)"),
        ({"horizon": (1, 2, 3)}, r"horizon is \(1, 2, 3\); it must be a pair"),
        ({"horizon": (10.5, 50)}, r"horizon is \(10.5, 50\); it must be \(lo, hi\), integers, or hi None"),
        ({"horizon": (10, 50.0)}, r"horizon is \(10, 50.0\); it must be \(lo, hi\), integers, or hi None"),
        ({"horizon": (True, 50)}, r"horizon is \(True, 50\); it must be \(lo, hi\), integers"),
        ({"horizon": (None, 5)}, r"horizon is \(None, 5\); it must be \(lo, hi\), integers"),
        ({"horizon": (0, 10**30)}, r"horizon is \(0, 10+\); it must be \(lo, hi\) with hi <= 9223372036854775807"),
        ({"horizon": 5}, "horizon is 5; it must be a pair"),
        ({"horizon": None}, "horizon is None; it must be a pair"),
        ({"scale": "1"}, "scale is '1'; it must be finite, a number"),
        ({"scale": True}, "scale is True; it must be finite, a number"),
        ({"scale": 10**400}, "scale is 10+; it must be finite, a number"),
        ({"prompt_lens": [None]}, r"prompt_lens\[0\] is None; it must be an integer$"),
        ({"prompt_lens": [1.5]}, r"prompt_lens\[0\] is 1.5; it must be an integer$"),
        ({"prompt_lens": [True]}, r"prompt_lens\[0\] is True; it must be an integer$"),
        ({"prompt_lens": [2**63]}, r"prompt_lens\[0\] is 9223372036854775808; .* at most 9223372036854775807"),
        ({"prompt_lens": "a"}, "prompt_lens is 'a'; it must be int32 or int64"),
        ({"prompt_lens": 5}, "prompt_lens is 5; it must be int32 or int64"),
        ({"prompt_lens": torch.tensor([1]).to_sparse()}, "prompt_lens has layout torch.sparse_coo"),
        ({"cu_seqlens": [0, 6]}, "cu_seqlens is of type list; it must be a torch.Tensor"),
        ({"q": None}, "q is of type NoneType; it must be a torch.Tensor"),
        ({"q": Q.numpy()}, "q is of type ndarray; it must be a torch.Tensor"),
        ({"q": Q.to_sparse()}, "q has layout torch.sparse_coo; it must be torch.strided"),
        ({"q": Q.to_mkldnn()}, "q has layout torch._mkldnn; it must be torch.strided"),
        ({"q": torch.nested.nested_tensor([Q, Q], layout=torch.jagged)}, "q is a nested tensor"),
        ({"k": None}, "k is of type NoneType; it must be a torch.Tensor"),
        ({"q": torch.empty(2**33, 0, 1, 1), "k": torch.empty(2**33, 0, 1, 1)}, "8589934592 sequences; allowed are"),
        ({"backend": None}, "backend is None; allowed are auto, cpu, triton, reference"),
        ({"backend": ["cpu"]}, r"backend is \['cpu'\]; allowed are auto"),
        ({"lse": [0.0]}, "lse is of type list; it must be a torch.Tensor"),
        ({"lse": torch.zeros(4, 6), "span_rows": 1.5}, "span_rows is 1.5; it must be an integer$"),
        ({"lse": torch.zeros(4, 6), "span_rows": True}, "span_rows is True; it must be an integer$"),
        ({"lse": torch.zeros(4, 6), "span_rows": 0}, "span_rows is 0; it must be an integer of at least 1"),
        ({"scale": math.nan}, "scale is nan; it must be finite"),
        ({"lse": torch.zeros(4, 5)}, r"lse has shape \(4, 5\); it must be \(4, 6\)"),
        ({"lse": torch.zeros(4, 6, dtype=torch.float16)}, "lse has dtype torch.float16"),
        ({"backend": "cuda"}, "backend is 'cuda'; allowed are auto, cpu, triton, reference"),
        (
            {"q": Q.double(), "k": K.double(), "backend": "cpu"},
            "backend 'cpu' can't run: q has dtype torch.float64",
        ),
    ],
)
def test_bad_input_is_named(change: dict, message: str) -> None:
    call = {"q": Q, "k": K} | change
    with pytest.raises(ValueError, match=message):
        attention_statistics(**call)
    if "lse" not in change:
        with pytest.raises(ValueError, match=message):
            attention_with_statistics(v=call["k"], **call)


def test_bad_values_are_named() -> None:
    with pytest.raises(ValueError, match=r"v has shape \(6, 1, 8\); it must be k's, \(6, 2, 8\)"):
        attention_with_statistics(Q, K, K[:, :1])
    with pytest.raises(ValueError, match="v has dtype"):
        attention_with_statistics(Q, K, K.half())
    with pytest.raises(ValueError, match=r"v is of type NoneType; it must be a torch\.Tensor"):
        attention_with_statistics(Q, K, None)
    with pytest.raises(ValueError, match="attention is None; allowed are fused, flash_attn"):
        attention_with_statistics(Q, K, K, attention=None)
    with pytest.raises(ValueError, match=r"span_rows is 2\.5; it must be an integer$"):
        attention_with_statistics(Q, K, K, attention="sdpa_flash", span_rows=2.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": None}, "q is of type NoneType"),
        ({"k": [1.0]}, "k is of type list"),
        ({"lse": 1.0}, "lse is of type float"),
        ({"cu_seqlens": [0, 6]}, "cu_seqlens is of type list"),
        ({"reduce": None}, "reduce is None; allowed are sum, mean"),
        ({"per": ["head"]}, r"per is \['head'\]; allowed are head, group"),
        ({"rows": 5}, r"rows is 5; it must be \(begin, end\)"),
        ({"rows": (True, None)}, r"rows\[0\] is True; it must be an integer"),
        ({"rows": (0, 10**30)}, r"rows\[1\] is 10+; it must be an integer of at most"),
        ({"horizon": (0, 2.5)}, r"horizon is \(0, 2.5\); it must be \(lo, hi\), integers"),
        ({"scale": "x"}, "scale is 'x'"),
        ({"backend": 3}, "backend is 3; allowed are auto"),
    ],
)
def test_column_scores_names_bad_input(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        column_scores(**({"q": Q, "k": K} | change))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sampled_layers(36.0), "num_layers is 36.0; it must be an integer of at least 1"),
        (lambda: sampled_layers(True), "num_layers is True; it must be an integer of at least 1"),
        (lambda: sampled_layers(36, 2.5), "count is 2.5; it must be an integer of at least 1"),
        (lambda: select_heads([[1.0]]), "span is of type list; it must be a torch.Tensor"),
        (lambda: select_heads(torch.ones(1, 4), quantile="a"), "quantile is 'a'; it must be above 0"),
        (
            lambda: credit_weights(W, W, strategy="coupled", neighborhood=True),
            "neighborhood is True; it must be an",
        ),
        (lambda: credit_weights(W, W, strategy="coupled", neighborhood=2.0), "neighborhood is 2.0; it must be an int"),
        (lambda: credit_weights(None, W, strategy="coupled"), "waad is of type NoneType; it must be a torch.Tensor"),
    ],
)
def test_what_follows_the_ops_names_bad_input(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_integers_of_any_kind_are_integers() -> None:
    q, k = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in ((6, 4, 8), (6, 2, 8)))
    expected = attention_statistics(q, k, window=3, horizon=(1, 2), prompt_lens=[2])
    numpy = {"window": np.int64(3), "horizon": (np.int32(1), np.uint8(2)), "prompt_lens": np.array([2])}
    for options in (numpy, {"window": 3, "horizon": [1, 2], "prompt_lens": [torch.tensor(2)]}):
        actual = attention_statistics(q, k, **options)
        torch.testing.assert_close(actual.waad, expected.waad, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(actual.fai, expected.fai, rtol=0, atol=0, equal_nan=True)
    rows = column_scores(q, k, rows=(np.int64(1), np.int64(-1)), horizon=(np.int64(0), 2**63 - 1))
    assert rows.equal(column_scores(q, k, rows=(1, -1)))
    assert sampled_layers(np.int64(36), np.int64(5)) == [12, 15, 18, 21, 24]
    far = credit_weights(W, W, strategy="coupled", neighborhood=2**62)
    assert far.equal(credit_weights(W, W, strategy="coupled", neighborhood=6))


def test_a_given_lse_is_detached() -> None:
    q, k = Q + 0.5, K + 0.5
    lse = attention_statistics(q, k).lse.requires_grad_()
    bands = attention_statistics(q, k, lse=lse, span=False)
    assert not bands.waad.requires_grad
    assert not column_scores(q, k, lse=lse).requires_grad
