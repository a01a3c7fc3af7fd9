"""ROLL: γ on each rank's part of a batch, and advantages × γ, before its gradient steps.

    actor_train: {worker_cls: rhythm.integrations.roll.RhythmActorWorker, …}

A pass of log-probs through ROLL's Megatron strategy is read before a batch's first gradient step. What ROLL hands over
is written down in docs/trainers.md. Options: the environment variable RHYTHM_CREDIT.

Shape suffixes: B responses of this rank, T positions, padded on the right.
"""

from __future__ import annotations

from typing import Any

import torch
from roll.distributed.scheduler.decorator import Dispatch, register
from roll.pipeline.rlvr.actor_pg_worker import ActorPGWorker
from torch import Tensor

from rhythm.integrations.adapter import (
    ONE_RATIO,
    credit_of_process,
    gammas,
    require,
    shaped,
    sum_over,
    written_by_model,
)
from rhythm.integrations.megatron_rows import attach_by_tokens, response_signals
from rhythm.seeds import generator
from rhythm.tap.megatron import data_group


class RhythmActorWorker(ActorPGWorker):  # type: ignore[misc]
    """ROLL's policy-gradient worker, whose advantages are multiplied by γ before a batch's first gradient step."""

    @register(dispatch_mode=Dispatch.DP_MP_DISPATCH_FIRST, trace=True, prefetch=False, to_remote=False)  # type: ignore[untyped-decorator]
    def train_step(self, data: Any) -> Any:
        """As ROLL's. The data arrive on all ranks, with the weights loaded, where it calls the strategy's
        get_data_input.

        Raises:
            ValueError: a strategy other than Megatron's; responses with tokens that the model did not write.
            UnsupportedAttention (a ValueError): see `rhythm.tap.megatron.attach`.
        """
        inner = self.strategy.get_data_input

        def with_credit(batch: Any) -> Any:
            batch = inner(batch)
            batch.batch["advantages"] = self._shaped(batch)
            return batch

        self.strategy.get_data_input = with_credit
        try:
            return super().train_step(data)
        finally:
            del self.strategy.get_data_input  # the class's is there again

    def _shaped(self, data: Any) -> Tensor:
        """[B, T − 1]: the advantage of token t is at t − 1."""
        credit, strategy = credit_of_process(), self.strategy
        reads, kind = credit.config.reads, type(strategy).__name__
        require(hasattr(strategy.model, "get_models"), "strategy", kind, "megatron_train", "its attention is read")
        sampling = getattr(self.pipeline_config, "importance_sampling", "token")
        require(sampling == "token", "importance_sampling", sampling, "token", ONE_RATIO)
        require("entropy" not in reads, "strategy of RHYTHM_CREDIT", credit.config.strategy, "another", "ROLL's pass")
        response_BT = data.batch["response_mask"].bool().cpu()
        lens = data.batch["attention_mask"].sum(dim=-1).tolist()
        starts = [
            int(row.long().argmax()) if row.any() else length for row, length in zip(response_BT, lens, strict=True)
        ]
        masks = [row[start:n] for row, start, n in zip(response_BT, starts, lens, strict=True)]
        statistics = {}
        if "attention" in reads:
            data.meta_info["micro_batch_size"] = self.worker_config.infer_batch_size
            with attach_by_tokens(strategy.model.get_models(), credit.signals, shift=0) as tap, torch.no_grad():
                strategy.forward_step(batch=data, forward_func=self.forward_func_log_probs)
            tokens = [row[:n] for row, n in zip(data.batch["input_ids"], lens, strict=True)]
            statistics = response_signals(tap, tokens, [len(m) for m in masks], written_by_model(masks))
        advantages, group = data.batch["advantages"], data_group()
        step, rank = data.meta_info.get("global_step", 0), 0 if group is None else group.rank()
        gamma = gammas(
            credit,
            masks,
            generator=generator(self.pipeline_config.seed, "roll", step, rank),
            whole_batch=sum_over(group, advantages.device),
            **statistics,
        )
        result: Tensor = advantages.clone()
        for row, (start, n, factor) in enumerate(zip(starts, lens, gamma, strict=True)):
            result[row, start - 1 : n - 1] = shaped([advantages[row, start - 1 : n - 1]], [factor], credit)[0]
        return result
