r"""verl: γ from its pass of old log-probs, and advantages × γ, in its V1 trainer.

    VERL_USE_EXTERNAL_MODULES=rhythm.integrations.verl \
      python -m verl.trainer.main_ppo trainer.v1.trainer_mode=rhythm_sync …

Importing this registers a trainer, and engines for FSDP and Megatron that are verl's own but for the pass of old
log-probs of that trainer, in which they read WAAD and FAI. These come to the trainer as two more outputs of the pass.
What verl hands over is written down in docs/trainers.md. Options: the environment variable RHYTHM_CREDIT.

Shape suffixes: B responses of a micro-batch, N their tokens and those of their prompts, one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import transfer_queue
from tensordict import TensorDict
from torch import Tensor
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils import tensordict_utils
from verl.workers import engine as engines
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from rhythm.integrations.adapter import ONE_RATIO, credit_of_process, gammas, require, response_mask, shaped
from rhythm.integrations.megatron_rows import bounds, name_of
from rhythm.seeds import generator
from rhythm.tap.attention_tap import AttentionTap
from rhythm.tap.megatron import attach
from rhythm.tap.megatron_layers import MicroBatch

TRAINER_MODE = "rhythm_sync"
WANTED = "rhythm_signals"  # in a batch's extra_info: of this pass
SIGNALS = ("rhythm_waad", "rhythm_fai")  # outputs of the pass, jagged [B, n], at the tokens themselves


# An engine of a vendor goes before one of a device alone, which is verl's own.
@EngineRegistry.register(
    model_type="language_model", backend=["fsdp", "fsdp2"], device=["cuda", "npu"], vendor=["nvidia", "amd", "huawei"]
)
class RhythmFSDPEngine(FSDPEngineWithLMHead):  # type: ignore[misc]
    """verl's engine, which also reads the signals of a pass that asks for them."""

    def forward_step(self, micro_batch: TensorDict, loss_function: Any, forward_only: bool) -> Any:
        """As verl's, with SIGNALS among the outputs.

        Raises:
            ValueError: Ulysses sequence parallelism, padding of packed rows, or fused kernels that hide the attention.
            UnsupportedAttention (a ValueError): see `rhythm.AttentionTap`.
        """
        if not (forward_only and _is_wanted(micro_batch)):
            return super().forward_step(micro_batch, loss_function, forward_only)
        ranks = self.ulysses_sequence_parallel_size
        require(ranks == 1, "ulysses_sequence_parallel_size", ranks, "1", "its ranks see parts of each sequence")
        require(not self.pad_to_length, "pad_to_length", self.pad_to_length, "False", "its rows hold more than tokens")
        bounds_B1 = micro_batch["input_ids"].offsets()
        lens_B = bounds_B1.diff()
        where: dict[str, Any]
        if tensordict_utils.get_non_tensor_data(micro_batch, key="use_remove_padding", default=True):
            where = {"cu_seqlens": bounds_B1.int()}
        else:
            position_T = torch.arange(int(lens_B.max()), device=lens_B.device)
            where = {"attention_mask": (position_T < lens_B[:, None]).long()}
        prompt_lens_B = lens_B - micro_batch["responses"].offsets().diff()
        tap = AttentionTap(self.module, prompt_lens=prompt_lens_B, signals=credit_of_process().signals, **where)
        with tap:
            loss, output = super().forward_step(micro_batch, loss_function, forward_only)
        signals = tap.signals()
        for name, value_BT in zip(SIGNALS, (signals.waad, signals.fai), strict=True):
            value_N = tap.batch.packed(value_BT)
            output["model_output"][name] = torch.nested.nested_tensor_from_jagged(value_N, bounds_B1.to(value_N.device))
        return loss, output


def megatron_engine_class(base: Any) -> Any:
    """verl's Megatron engine, which also reads the signals of a pass that asks for them."""

    class RhythmMegatronEngine(base):  # type: ignore[misc]
        rhythm_reads = False
        rhythm_micro: MicroBatch  # what the next forward pass of a chunk runs

        def forward_backward_batch(self, data: TensorDict, loss_function: Any, forward_only: bool = False) -> Any:
            """As verl's, with SIGNALS among the outputs. They are collectives of the tensor and pipeline ranks.

            Raises:
                ValueError: context parallelism, or padded rows.
                UnsupportedAttention (a ValueError): see `rhythm.tap.megatron.attach`.
            """
            if not (forward_only and _is_wanted(data)):
                return super().forward_backward_batch(data, loss_function, forward_only)
            ranks, packs = self.engine_config.context_parallel_size, self.engine_config.use_remove_padding
            require(ranks == 1, "context_parallel_size", ranks, "1", "its ranks see parts of each sequence")
            require(packs, "use_remove_padding", packs, "True", "padded rows don't say where their tokens end")
            with attach(self.module, credit_of_process().signals, locate=self._located) as tap:
                self.rhythm_reads = True
                try:
                    output = super().forward_backward_batch(data, loss_function, forward_only)
                finally:
                    self.rhythm_reads = False
            batch = _micro_batch(data)
            response_lens = [n - prompt for n, prompt in zip(batch.lens, batch.prompt_lens, strict=True)]
            signals = tap.signals(response_mask(batch.lens, response_lens, [True] * len(batch.lens)), batch.rows)
            if "model_output" in output:  # of the last stage
                device = data["input_ids"].device
                for name, value_BT in zip(SIGNALS, (signals.waad, signals.fai), strict=True):
                    rows = [row_T[:n].to(device) for row_T, n in zip(value_BT, batch.lens, strict=True)]
                    output["model_output"][name] = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
            return output

        def forward_step(self, batch_iter: Iterator[TensorDict], model: Any, **options: Any) -> Any:
            """As verl's."""
            batch = next(batch_iter)
            if self.rhythm_reads:
                self.rhythm_micro = _micro_batch(batch)
            return super().forward_step(iter([batch]), model, **options)

        def _located(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> MicroBatch:
            return replace(self.rhythm_micro, first=bounds(kwargs)[:-1])

    return RhythmMegatronEngine


def _micro_batch(data: TensorDict) -> MicroBatch:
    """The rows of a batch, named by their tokens: verl orders and cuts it as it likes."""
    lens = data["input_ids"].offsets().diff().tolist()
    response_lens = data["responses"].offsets().diff().tolist()
    prompt_lens = [n - of_response for n, of_response in zip(lens, response_lens, strict=True)]
    return MicroBatch([name_of(row) for row in data["input_ids"].unbind()], lens, prompt_lens)


def _is_wanted(data: TensorDict) -> bool:
    return bool(tensordict_utils.get_non_tensor_data(data, key=WANTED, default=False))


if getattr(engines, "MegatronEngineWithLMHead", None) is not None:  # None where Megatron is not installed
    EngineRegistry.register(model_type="language_model", backend="megatron", device="cuda", vendor=["nvidia", "amd"])(
        megatron_engine_class(engines.MegatronEngineWithLMHead)
    )


@register_trainer(TRAINER_MODE)
class RhythmTrainer(PPOTrainerSync):  # type: ignore[misc]
    """verl's synchronous trainer, whose advantages are multiplied by γ after its own estimator and normalization."""

    def __init__(self, config: Any) -> None:
        """Raises ValueError for configurations that token credit doesn't go with, by name."""
        actor = config.actor_rollout_ref.actor
        mode = actor.policy_loss.get("loss_mode", "vanilla")
        of_tokens = "gspo" not in mode and mode != "geo_mean"
        require(of_tokens, "actor.policy_loss.loss_mode", mode, "one with a ratio per token", ONE_RATIO)
        require(
            actor.strategy in ("fsdp", "fsdp2", "megatron"), "actor.strategy", actor.strategy,
            "fsdp, fsdp2 or megatron", "of verl's engines these are read"
        )  # fmt: skip
        correction = config.algorithm.get("rollout_correction", None)
        bypass = bool(correction and correction.get("bypass_mode", False))
        require(not bypass, "rollout_correction.bypass_mode", bypass, "False", "it leaves out the pass that is read")
        super().__init__(config)

    def _build_replay_buffer(self) -> Any:
        self.trainer_mode = "sync"  # verl chooses the buffer, and more, by this name
        return super()._build_replay_buffer()

    def _compute_old_log_prob(self, batch: Any, metrics: dict[str, Any]) -> Any:
        batch.extra_info[WANTED] = "attention" in credit_of_process().config.reads
        try:
            return super()._compute_old_log_prob(batch, metrics)
        finally:
            batch.extra_info[WANTED] = False

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        batch = super()._compute_advantage(batch, metrics)
        reads = credit_of_process().config.reads
        fields = ["response_mask", "advantages"]
        fields += SIGNALS if "attention" in reads else ()
        fields += ["entropy"] if "entropy" in reads else []
        data = transfer_queue.kv_batch_get(batch.keys, batch.partition_id, select_fields=fields)
        gamma, advantages = shaped_advantages(data, self.global_steps, int(self.config.data.get("seed", None) or 0))
        metrics["rhythm/gamma_mean"] = float(torch.cat(gamma).mean())
        nested = torch.nested.as_nested_tensor(advantages, layout=torch.jagged)
        output = TensorDict({"advantages": nested}, batch_size=len(batch))
        return transfer_queue.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=output)


def shaped_advantages(data: Any, step: int, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """(γ, advantages × γ), [R] per response.

    Args:
        data: jagged tensors of a batch: response_mask, advantages and, where the strategy reads it, entropy [B, R];
            SIGNALS [B, n], at the tokens of prompt and response.
    """
    credit = credit_of_process()
    masks = list(data["response_mask"].unbind())
    statistics: dict[str, Any] = {}
    for name, field in (("waad", SIGNALS[0]), ("fai", SIGNALS[1]), ("entropy", "entropy")):
        if field in data.keys():  # noqa: SIM118 (a TensorDict's)
            # Those of the response are the last ones.
            statistics[name] = [x[len(x) - len(m) :] for x, m in zip(data[field].unbind(), masks, strict=True)]
    gamma = gammas(credit, masks, generator=generator(seed, "verl", step), **statistics)
    return gamma, shaped(data["advantages"].unbind(), gamma, credit)
