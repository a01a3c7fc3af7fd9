"""RMSNorm in fewer passes: the same numbers and gradients, where it applies and nowhere else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from rhythm.engines.local.norms import use_fast_norms


def norms(channels: int, epsilon: float = 1e-6) -> tuple[Any, Any]:
    """transformers' and ours, with the same weights."""
    torch.manual_seed(0)
    plain = Qwen3RMSNorm(channels, epsilon)
    torch.nn.init.normal_(plain.weight)
    fast = copy.deepcopy(plain)
    use_fast_norms(fast)
    assert type(fast) is not Qwen3RMSNorm
    assert isinstance(fast, Qwen3RMSNorm)
    assert list(fast.state_dict()) == ["weight"]
    return plain, fast


@pytest.mark.parametrize("epsilon", [1e-6, 0.3])
@pytest.mark.parametrize("shape", [(1, 1), (63, 5), (2, 7, 3, 32)])
def test_results_and_gradients(shape: tuple[int, ...], epsilon: float) -> None:
    plain, fast = norms(shape[-1], epsilon)
    x, along = torch.randn(shape, requires_grad=True), torch.randn(shape)
    expected, actual = plain(x), fast(x)
    assert type(actual.grad_fn).__name__ == "_RmsNormBackward"
    torch.testing.assert_close(actual, expected)
    wanted = torch.autograd.grad(expected, [x, plain.weight], along)
    for one, other in zip(torch.autograd.grad(actual, [x, fast.weight], along), wanted, strict=True):
        # Of one channel the gradient is a difference of nearly equal terms.
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * max(1.0, float(other.abs().max())))
    with torch.no_grad():
        torch.testing.assert_close(fast(x), expected)
        assert fast(x[:0]).shape == (0, *shape[1:])


def test_of_views_and_frozen_weights() -> None:
    plain, fast = norms(6)
    x = torch.randn(6, 4, 5, requires_grad=True)
    fast.weight.requires_grad_(False)
    (actual,) = torch.autograd.grad(fast(x.transpose(0, 2)).square().sum(), x)
    (expected,) = torch.autograd.grad(plain(x.transpose(0, 2)).square().sum(), x)
    torch.testing.assert_close(actual, expected)


def test_other_dtypes_and_autocast_are_the_models_own() -> None:
    plain, fast = norms(8)
    x = torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert fast(x).equal(plain(x))
    assert fast(x.bfloat16()).equal(plain(x.bfloat16()))
    assert fast.double()(x.double()).equal(plain.double()(x.double()))


class ShiftedRMSNorm(Qwen3RMSNorm):  # type: ignore[misc]  # transformers is untyped here
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) + 0.01  # type: ignore[no-any-return]


class GatedRMSNorm(Qwen3RMSNorm):  # type: ignore[misc]
    def forward(self, hidden_states: Tensor, gate: Tensor) -> Tensor:
        return super().forward(hidden_states) * gate  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [Gemma2RMSNorm, ShiftedRMSNorm, GatedRMSNorm, torch.nn.LayerNorm, torch.nn.RMSNorm])
def test_others_stay(kind: type[torch.nn.Module]) -> None:
    """A weight that counts from 1, a result that is another, an argument more, another norm, an epsilon by dtype."""
    module = kind(8)
    before = copy.deepcopy(module.state_dict())
    use_fast_norms(module)
    assert type(module) is kind
    assert all(before[name].equal(tensor) for name, tensor in module.state_dict().items())


def test_of_a_model(model: Any) -> None:
    ids = torch.arange(4, 34).reshape(2, 15)
    expected = model(input_ids=ids).logits
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(2):  # engines that share a model both ask
        use_fast_norms(model)
    kinds = [type(module).__name__ for module in model.modules() if isinstance(module, Qwen3RMSNorm)]
    assert kinds == ["FastQwen3RMSNorm"] * (4 * model.config.num_hidden_layers + 1)
    copied = copy.deepcopy(model)
    for one in (model, copied):
        torch.testing.assert_close(one(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert all(before[name].equal(tensor) for name, tensor in one.state_dict().items())
