"""The three roles of a cluster with the one-machine engines in them, and how the trainer and the pushes are started."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM

from rhythm.credit.loss import LossConfig
from rhythm.engines.interfaces import Rollout, SamplingConfig, TrainBatch
from rhythm.engines.local.infer import GenerateInfer
from rhythm.engines.local.train import OptimizerConfig
from rhythm.tap.signals_config import SignalsConfig

if TYPE_CHECKING:  # they import Ray, whose environment has to be prepared first
    from rhythm.cluster.engines import ClusterAttn, ClusterInfer, ClusterTrain
    from rhythm.cluster.session import Session
    from rhythm.cluster.utilization import Rates
    from rhythm.cluster.weight_sync import ClusterWeightSync

TAP = SignalsConfig(horizon=(1, 6), grouping="batch")
SAMPLING = SamplingConfig(max_new_tokens=10)
PROMPTS = [[1, 10, 20], [1, 30], [1, 40, 41, 42], [1, 50, 51]]


@dataclass
class Cluster:
    """The roles, what pushes between them, the checkpoint they started from, and its tokens."""

    session: Session
    rates: Rates
    train: ClusterTrain
    infer: ClusterInfer
    attn: ClusterAttn
    weight_sync: ClusterWeightSync
    checkpoint: Path
    end_ids: tuple[int, ...]
    pad_id: int

    def push(self) -> int:
        """The trainer's weights to every replica, as the next version, which is returned."""
        version = max(self.infer.version, self.attn.version) + 1
        self.weight_sync.sync(version)
        return version

    def model(self) -> Any:
        """The trainer's weights as of now, in this process."""
        model = AutoModelForCausalLM.from_pretrained(self.checkpoint, dtype=torch.float32)
        model.load_state_dict(self.train.weights())
        return model

    def local_infer(self) -> GenerateInfer:
        return GenerateInfer(self.model(), end_ids=self.end_ids, pad_id=self.pad_id)

    def batch(self, rollout: Rollout) -> TrainBatch:
        actual, _ = self.train.log_probs(rollout)
        advantages = torch.linspace(-1, 1, len(rollout.lens))[:, None].expand(rollout.input_ids.shape)
        return TrainBatch(rollout, actual.logprobs, advantages * rollout.response_mask)


def start_train(session: Session, rates: Rates, checkpoint: Path) -> ClusterTrain:
    from rhythm.cluster.engines import ClusterTrain
    from rhythm.cluster.specs import TrainSpec

    spec = TrainSpec(
        role=session.config.train,
        checkpoint=checkpoint,
        optimizer=OptimizerConfig(lr=1e-2),
        loss=LossConfig(),
        temperature=1.0,
        micro_batch_size=4,
        precision="float32",
        reference=False,
        bucket_bytes=20_000,  # many buckets
        collective_seconds=60,
    )
    return ClusterTrain(session, spec, rates)


def start_weight_sync(train: ClusterTrain, infer: ClusterInfer, attn: ClusterAttn, rates: Rates) -> ClusterWeightSync:
    from rhythm.cluster.weight_sync import ClusterWeightSync, WeightReceiver

    receivers = [WeightReceiver("shared_memory", infer), WeightReceiver("object_store", attn)]
    return ClusterWeightSync(train, receivers, rates=rates, gpus_of_replica=1, seconds=600)
