"""The assignment of processes to GPUs, against hand-made ones."""

from __future__ import annotations

from typing import Any

import pytest

from rhythm.cluster.config import ClusterConfig
from rhythm.cluster.plan.placement import Slot, assign

NETWORK = {"ray_address": "10.0.0.1:6379", "bind_address": "10.0.0.1"}


def cluster(**section: Any) -> ClusterConfig:
    return ClusterConfig.model_validate(section)


def test_colocated_replicas_stand_on_the_trainers_gpus() -> None:
    assignment = assign(
        cluster(gpus=4, train={"tensor": 2, "data": 2}, infer={"replicas": 2, "tensor_parallel_size": 2}),
        separate_attn=False,
    )
    assert assignment.train == (Slot(0, (0,)), Slot(0, (1,)), Slot(0, (2,)), Slot(0, (3,)))
    assert assignment.infer == (Slot(0, (0, 1)), Slot(0, (2, 3)))
    assert assignment.attn == ()
    assert assignment.idle == 0


def test_separate_roles_stand_one_after_the_other_over_the_nodes() -> None:
    assignment = assign(
        cluster(
            placement="separate", nodes=2, gpus=8, train={"tensor": 2, "pipeline": 2}, infer={"replicas": 3}, **NETWORK
        ),
        separate_attn=True,
    )
    assert [slot.node for slot in assignment.train] == [0, 0, 0, 0]
    assert assignment.infer == (Slot(1, (0,)), Slot(1, (1,)), Slot(1, (2,)))
    assert assignment.attn == (Slot(1, (3,)),)
    assert assignment.idle == 0


def test_without_gpus_everything_is_on_cpus() -> None:
    assignment = assign(
        cluster(gpus=0, train={"tensor": 2}, infer={"replicas": 2, "kv_cache_gib": 1}, attn={"replicas": 2}),
        separate_attn=True,
    )
    assert assignment.train == assignment.infer == assignment.attn == (Slot(0, ()),) * 2


def test_what_nobody_uses_is_counted() -> None:
    assert assign(cluster(placement="separate", gpus=8, infer={"replicas": 4}), separate_attn=False).idle == 3


@pytest.mark.parametrize(
    ("section", "separate_attn", "message"),
    [
        ({"gpus": 4, "train": {"tensor": 8}}, False, r"cluster\.gpus is 4: too few, 8 are needed: the max of train 8"),
        ({"gpus": 4, "train": {"tensor": 4}}, True, r"cluster\.gpus is 4: too few, 5 are needed.*attn 1"),
        (
            {"gpus": 4, "placement": "separate", "train": {"data": 2}, "infer": {"replicas": 3}},
            False,
            r"cluster\.gpus is 4: too few, 5 are needed: the sum of train",
        ),
        (
            {"gpus": 8, "train": {"data": 4}, "infer": {"replicas": 8}},
            False,
            r"cluster\.train\.tensor × pipeline × data is 1 × 1 × 4 = 4: with placement colocated .* the 8 GPUs",
        ),
        (
            {"gpus": 8, "train": {"tensor": 2, "context": 3}},
            False,
            r"cluster\.train\.tensor × pipeline × data × context is 2 × 1 × 1 × 3 = 6: must divide",
        ),
        ({"gpus": 8, "train": {"data": 3}}, False, r"cluster\.train\.tensor × pipeline × data is .* = 3: must divide"),
        (
            {"gpus": 8, "nodes": 2, "train": {"data": 8}, "infer": {"tensor_parallel_size": 8}, **NETWORK},
            False,
            r"cluster\.infer\.tensor_parallel_size is 8: a group would span nodes of 4 GPUs",
        ),
        (
            {"gpus": 8, "nodes": 2, "train": {"tensor": 8}, **NETWORK},
            False,
            r"cluster\.train\.tensor is 8: a group would span nodes of 4 GPUs",
        ),
    ],
)
def test_too_few_gpus_name_the_keys(section: dict[str, Any], separate_attn: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        assign(cluster(**section), separate_attn=separate_attn)
