from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from rhythm.engines.local.weights import take_over


def test_weights_are_copied_and_converted(model: Any) -> None:
    half = copy.deepcopy(model).to(torch.bfloat16)
    with torch.no_grad():
        model.model.norm.weight.fill_(3.0)
    assert take_over(half, model.state_dict(), 4, 1) == 4
    assert half.model.norm.weight.dtype == torch.bfloat16
    assert (half.model.norm.weight == 3).all()
    with torch.no_grad():
        model.model.norm.weight.fill_(5.0)
    assert (half.model.norm.weight == 3).all()


def test_own_tensors_are_left_alone(model: Any) -> None:
    versions = {name: tensor._version for name, tensor in model.state_dict().items()}
    assert take_over(model, model.state_dict(), 0, 0) == 0
    assert {name: tensor._version for name, tensor in model.state_dict().items()} == versions


def test_what_is_refused(model: Any) -> None:
    weights = model.state_dict()
    with pytest.raises(ValueError, match=r"version is 1: must not fall below the 2"):
        take_over(model, weights, 1, 2)
    with pytest.raises(ValueError, match=r"names differ .*model\.norm\.weight"):
        take_over(model, {k: v for k, v in weights.items() if k != "model.norm.weight"}, 1, 0)
    with pytest.raises(ValueError, match=r"model\.norm\.weight has shape \(3,\)"):
        take_over(model, weights | {"model.norm.weight": torch.zeros(3)}, 1, 0)
