"""Linear layers by oneDNN: the same numbers and gradients, where it applies and nowhere else."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rhythm.engines.local import linear
from rhythm.engines.local.linear import OneDnnLinear, onednn_is_faster, use_onednn

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor where oneDNN is faster."""
    monkeypatch.setattr(linear, "onednn_is_faster", lambda: True)


@needs_onednn
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 5), (63, 5), (4, 31, 5)])
def test_results_and_gradients(anywhere: None, shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(5, 7, bias=bias)
    fast = nn.Sequential(copy.deepcopy(plain))
    use_onednn(fast)
    assert type(fast[0]) is OneDnnLinear
    assert list(fast.state_dict()) == [f"0.{name}" for name in plain.state_dict()]
    x, y = torch.randn(shape, requires_grad=True), torch.randn(*shape[:-1], 7)
    expected, actual = plain(x), fast(x)
    torch.testing.assert_close(actual, expected)
    assert type(actual.grad_fn).__name__ == "_LinearBackward", "oneDNN's product ran"
    wanted = torch.autograd.grad(expected, [x, *plain.parameters()], y)
    got = torch.autograd.grad(actual, [x, *fast.parameters()], y)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), expected)
        assert fast(x[:0]).shape == (0, *expected.shape[1:])


@needs_onednn
def test_gradients_of_what_is_frozen_are_not_made(anywhere: None) -> None:
    fast = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    use_onednn(fast)
    fast[0].requires_grad_(False)
    fast(torch.randn(4, 3)).sum().backward()
    assert fast[0].weight.grad is None
    assert fast[1].weight.grad is not None


@needs_onednn
def test_other_dtypes_and_autocast_are_torchs(anywhere: None) -> None:
    plain = nn.Linear(5, 7)
    fast = nn.Sequential(copy.deepcopy(plain))
    use_onednn(fast)
    x = torch.randn(3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert fast(x).dtype == torch.bfloat16
        assert fast(x).equal(plain(x))
    assert fast.double()(x.double()).equal(plain.double()(x.double()))


@needs_onednn
def test_of_a_model_all_but_the_output_embedding(model: Any, anywhere: None) -> None:
    ids = torch.arange(4, 34).reshape(2, 15)
    expected = model(input_ids=ids).logits
    use_onednn(model)
    kinds = {name.rpartition(".")[2]: type(module) for name, module in model.named_modules() if hasattr(module, "bias")}
    assert kinds.pop("lm_head") is nn.Linear
    assert set(kinds.values()) == {OneDnnLinear}
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_where_it_applies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On AMD's processors with AVX-512 alone."""
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr(linear, "_CPUINFO", cpuinfo)

    def applies() -> bool:
        onednn_is_faster.cache_clear()
        return onednn_is_faster()

    try:
        assert not applies(), "no such file"
        for vendor, flags, expected in (
            ("AuthenticAMD", "avx2 avx512f avx512dq", True),
            ("AuthenticAMD", "avx2 fma", False),
            ("GenuineIntel", "avx2 avx512f avx512dq", False),
        ):
            cpuinfo.write_text(f"vendor_id\t: {vendor}\nflags\t\t: fpu {flags} \n")
            assert applies() is expected
        cpuinfo.write_text("vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx512f avx512dq\n")
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
        assert not applies()
    finally:
        onednn_is_faster.cache_clear()


def test_elsewhere_nothing_changes(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "onednn_is_faster", lambda: False)
    use_onednn(model)
    assert not any(isinstance(module, OneDnnLinear) for module in model.modules())
