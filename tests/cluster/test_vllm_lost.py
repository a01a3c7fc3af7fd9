"""A vLLM engine on two workers, one of which is killed in the middle of a rollout."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import psutil
import pytest
import torch

from rhythm.cluster.config import ClusterConfig
from rhythm.cluster.roles import Role
from rhythm.credit.loss import LossConfig
from rhythm.engines.interfaces import Rollout, SamplingConfig, TrainBatch
from rhythm.engines.local.train import OptimizerConfig
from rhythm.tiny.model import TinyModelConfig, build_model, build_tokenizer, save_checkpoint

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(1800)]

TEMPERATURE = 0.7
PROMPTS = [[1, 10, 20], [1, 30], [1, 40, 41, 42], [1, 50, 51]]
LONG_PROMPT = [1] + [10] * 590
"""It leaves room for nine tokens. Six of it fit into a forward pass; on a CPU vLLM can't split the prompt of a seeded
response.
"""


def workers_of(replica: int) -> list[psutil.Process]:
    """The tensor parallel workers, in the order of their ranks."""
    named = {process.cmdline()[0]: process for process in psutil.Process(replica).children() if process.cmdline()}
    return [process for name, process in sorted(named.items()) if "Worker" in name]


def test_it_is_started_again_with_the_weights_of_the_version_and_its_part_redone(
    tmp_path: Path,
    cpu_seconds: Callable[[int], float],
    lost_midway: Callable[..., AbstractContextManager[None]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """And a worker that can't hear that its engine has ended is gone with it."""
    from rhythm.cluster.engines import ClusterInfer, ClusterTrain
    from rhythm.cluster.session import Session
    from rhythm.cluster.specs import InferSpec, TrainSpec
    from rhythm.cluster.utilization import Rates
    from rhythm.cluster.weight_sync import ClusterWeightSync, WeightReceiver

    tokenizer = build_tokenizer()
    tiny = TinyModelConfig(layers=4, hidden_size=32, mlp_size=48, query_heads=2, key_heads=1, head_size=32)
    save_checkpoint(build_model(tiny, tokenizer), tokenizer, tmp_path)
    config = ClusterConfig.model_validate(
        {
            "gpus": 0,
            "max_length": 600,
            "infer": {"kv_cache_gib": 0.0625, "tensor_parallel_size": 2},
            "train": {"engine": "torch"},
        }
    )
    with Session(config, separate_attn=False) as session:
        rates = Rates({Role.TRAIN: 1, Role.INFER: 1})
        spec = TrainSpec(
            role=config.train,
            checkpoint=tmp_path,
            optimizer=OptimizerConfig(lr=1e-2),
            loss=LossConfig(),
            temperature=TEMPERATURE,
            micro_batch_size=8,
            precision="float32",
            reference=False,
            bucket_bytes=1 << 20,
            collective_seconds=60,
        )
        train = ClusterTrain(session, spec, rates)
        told = InferSpec(config.infer.vllm, tmp_path, 600, (tokenizer.eos_token_id,), tokenizer.pad_token_id, "float32")
        infer = ClusterInfer(session, told, rates, takes_turns=False)
        weight_sync = ClusterWeightSync(
            train, [WeightReceiver("shared_memory", infer)], rates=rates, gpus_of_replica=1, seconds=600
        )

        rollout = infer.generate(PROMPTS, 4, SamplingConfig(temperature=TEMPERATURE, max_new_tokens=10), seed=1)
        advantages = torch.linspace(-1, 1, 16)[:, None] * rollout.response_mask
        train.step(TrainBatch(rollout, train.log_probs(rollout)[0].logprobs, advantages))
        weight_sync.sync(1)

        long = SamplingConfig(temperature=TEMPERATURE, max_new_tokens=250)
        replica = infer.workers[0].pid
        assert replica is not None
        lost = workers_of(replica)[1].pid
        spent = cpu_seconds(lost)
        first: list[Rollout] = []
        handed: list[Rollout] = []
        honest = infer.generate([*PROMPTS, LONG_PROMPT], 6, long, seed=2, done=first.append)
        assert first[0].group.unique().tolist() == [4], "handed over as soon as it is there"
        with lost_midway(lost, signal.SIGKILL, cpu_seconds(lost) - spent):
            generated = infer.generate([*PROMPTS, LONG_PROMPT], 6, long, seed=2, done=handed.append)

        assert rates.restarts == {Role.INFER: 1}
        assert "actor_infer[0] lost its engine: vLLM's worker processes ended: VllmWorker-" in caplog.text
        assert infer.workers[0].pid != replica
        groups = [part.group.tolist() for part in handed]
        assert sorted(groups) == [[prompt] * 6 for prompt in range(5)], "each once, though its replica answered twice"
        assert torch.equal(generated.input_ids, honest.input_ids)
        mask = generated.response_mask
        assert torch.allclose(generated.logprobs, honest.logprobs, atol=1e-6)
        assert (generated.logprobs - train.log_probs(generated)[0].logprobs)[mask].abs().max() < 1e-4

        left = workers_of(infer.workers[0].pid)
        left[0].suspend()
    assert len(left) == 2
    assert not psutil.wait_procs(left, timeout=120)[1]
