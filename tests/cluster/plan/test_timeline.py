"""What a GPU holds while trainer and vLLM take turns."""

from __future__ import annotations

import pytest
from paper_workload import WORK

from rhythm.cluster.config import ClusterConfig
from rhythm.cluster.plan.dimensions import KNOWN
from rhythm.cluster.plan.memory import infer_memory, train_memory
from rhythm.cluster.plan.timeline import STEP, Moment, peak, replay, timeline, turn_faults

MODEL = KNOWN["qwen3-4b"]


def cluster(**train: object) -> ClusterConfig:
    section = {"train": {"data": 8, **train}, "infer": {"replicas": 8, "gpu_memory_utilization": 0.5}}
    return ClusterConfig.model_validate({**section, "push_bucket_mib": 1024})


@pytest.mark.parametrize("offload", [False, True])
def test_moments_of_a_step_by_hand(offload: bool) -> None:
    config = cluster(offload=offload)
    train, vllm = train_memory(config, WORK, MODEL), infer_memory(config, WORK, MODEL)
    away = train.weights + train.reference + (0 if offload else train.gradients + train.optimizer)
    everything = train.resident + train.activations.step
    bucket = 2 * (1 << 30)  # larger than the embedding, 0.78 GB
    assert timeline(config, WORK, MODEL) == [
        Moment("generate", away, vllm.weights + vllm.kv_cache),
        Moment("sleep", away, 0),
        Moment("log_probs", away + train.activations.log_probs, 0),
        Moment("step", everything, 0),
        Moment("leave_gpu", away, 0),
        Moment("start_push", away, vllm.weights),
        Moment("stage", away + bucket, vllm.weights),
        Moment("end_push", away, vllm.weights),
        Moment("wake", away, vllm.weights + vllm.kv_cache),
        Moment("generate", away, vllm.weights + vllm.kv_cache),
    ]


@pytest.mark.parametrize("forgotten", ["sleep", "leave_gpu"])
def test_a_turn_that_is_not_given_up_does_not_fit(forgotten: str) -> None:
    """The faults that this plan is there for: a cache that is not given back, or a push that wakes everything."""
    config = replace_memory(cluster(), gib=70)
    assert not turn_faults(config, WORK, MODEL)
    calls = [call for call in STEP if call != forgotten]
    assert max(moment.total for moment in replay(calls, config, WORK, MODEL)) > 70 * 2**30


def test_the_fault_names_the_moment_and_the_keys() -> None:
    config = replace_memory(cluster(), gib=60)
    most = peak(config, WORK, MODEL)
    assert most.call == "generate"
    [fault] = turn_faults(config, WORK, MODEL)
    assert "during generate actor_train keeps 28.1 GiB" in fault
    assert "cluster.infer.gpu_memory_utilization is 0.66" in fault
    assert fault.endswith("together more than 60 GiB; lower it, or turn on cluster.train.offload")
    assert not turn_faults(replace_memory(cluster(offload=True), gib=60), WORK, MODEL)


def replace_memory(config: ClusterConfig, *, gib: float) -> ClusterConfig:
    """A GPU of another size on which vLLM takes as much."""
    share = config.infer.gpu_memory_utilization * config.gpu_memory_gib / gib
    infer = config.infer.model_copy(update={"gpu_memory_utilization": share})
    return config.model_copy(update={"gpu_memory_gib": gib, "infer": infer})
