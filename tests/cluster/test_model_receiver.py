"""Weights into a transformers model through the machine's memory; tests/cluster/test_engines.py sends them by Ray."""

from __future__ import annotations

import models
import pytest
import torch
from torch import Tensor

from rhythm.cluster.model_receiver import ModelReceiver
from rhythm.engines.transfer import SharedMemorySender, buckets

pytestmark = pytest.mark.cluster


def send(weights: dict[str, Tensor], receiver: ModelReceiver, version: int) -> None:
    with SharedMemorySender(torch.bfloat16) as sender:
        receiver.init_transfer("shared_memory", sender.init_info())
        receiver.start_push()
        for bucket in buckets(weights.items(), 10_000):
            receiver.receive(sender.stage(bucket))
        receiver.finish_push(version)


def test_a_model_in_bfloat16_gets_the_weights_rounded() -> None:
    torch.manual_seed(0)
    sent = models.tiny_model()
    with torch.no_grad():
        for parameter in sent.parameters():
            parameter += torch.randn_like(parameter)
    receiving = models.tiny_model().to(torch.bfloat16)
    send(sent.state_dict(), ModelReceiver(receiving), 1)
    expected = sent.to(torch.bfloat16).state_dict()
    assert all(tensor.equal(expected[name]) for name, tensor in receiving.state_dict().items())


def test_what_is_missing_or_unknown_is_named() -> None:
    model = models.tiny_model()
    receiver, weights = ModelReceiver(model), dict(model.state_dict())
    left = "model.norm.weight"
    with pytest.raises(ValueError, match=f"weights: 1 are missing from the push, among them \\['{left}'\\]"):
        send({name: tensor for name, tensor in weights.items() if name != left}, receiver, 1)
    with pytest.raises(ValueError, match=r"weights: other has shape \[2\], the model's None"):
        send({"other": torch.ones(2)}, receiver, 1)
    with pytest.raises(ValueError, match="kind is 'ipc': must be shared_memory or object_store for a transformers mod"):
        receiver.init_transfer("ipc", {})
