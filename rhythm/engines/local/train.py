"""Implements Train with plain torch: AdamW on float32 weights, rhythm.credit's policy loss, gradient accumulation."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from rhythm.credit.heads import HeadGroups
from rhythm.credit.loss import BatchTotals, LossConfig, policy_loss
from rhythm.credit.signals import HeadStatistics, RhythmSignals
from rhythm.engines.batches import micro_batches, rows_with_gradient, take_rows, trim
from rhythm.engines.head import output_head
from rhythm.engines.interfaces import (
    LogProbs,
    NonFiniteError,
    Rollout,
    ShapeAdvantages,
    StepMetrics,
    TappedStep,
    TrainBatch,
)
from rhythm.engines.local.attn import SignalRows, autocast
from rhythm.engines.local.linear import use_onednn
from rhythm.engines.local.logprobs import check_output_head, padded_states, response_logprobs
from rhythm.engines.local.norms import use_fast_norms
from rhythm.engines.local.packed import packed_states, packing_refusal
from rhythm.engines.local.short_attention import short_attention
from rhythm.engines.local.step_reader import StepReader
from rhythm.engines.local.weights import load_weights
from rhythm.engines.offload import Offloaded, empty_cache
from rhythm.engines.watch import DeviceWatch
from rhythm.tap.attention_tap import AttentionTap
from rhythm.tap.signals_config import SignalsConfig

log = logging.getLogger(__name__)

_OPTIMIZER_FILE = "optimizer.pt"
CHECKED_EVERY = 16
"""Of so many taps one compares the attention's outputs with the form that was read, the first among them: an output of
another form is a matter of the model, not of a batch.
"""


class OptimizerConfig(BaseModel, extra="forbid", frozen=True):
    """AdamW and its learning rate."""

    lr: float = Field(default=1e-6, gt=0, allow_inf_nan=False, description="learning rate after the warm-up")
    warmup_steps: int = Field(
        default=0, ge=0, description="gradient steps over which the learning rate rises linearly; then it is constant"
    )
    betas: tuple[float, float] = Field(default=(0.9, 0.999), description="decay rates of AdamW's two moments")
    eps: float = Field(default=1e-8, gt=0, allow_inf_nan=False, description="added to AdamW's denominator")
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False, description="decoupled weight decay")
    max_grad_norm: float = Field(
        default=1.0,
        gt=0,
        description="gradients with a larger norm are scaled down to it; .inf: no limit",
    )
    token_chunk: int = Field(default=1024, ge=1, description="tokens whose logits are in memory at once")

    def learning_rate(self, gradient_step: int) -> float:
        """Learning rate of gradient step 0, 1, …: rises linearly to `lr` at step warmup_steps, then constant."""
        return self.lr * min(1.0, (gradient_step + 1) / (self.warmup_steps + 1))


class TorchTrain:
    """A causal transformers model in float32 and its optimizer, on one device.

    Rows are sorted by length before they are split into micro-batches, and each micro-batch is trimmed to its longest
    row. With `max_tokens` or `share_prompts` the rows of a micro-batch are packed into one, with the latter a prompt of
    several rows once; where a model's rows can't be packed, they are padded and the padding counts.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        optimizer: OptimizerConfig,
        loss: LossConfig,
        temperature: float,
        micro_batch_size: int,
        log_prob_micro_batch_size: int | None = None,
        max_tokens: int | None = None,
        share_prompts: bool = False,
        precision: torch.dtype = torch.float32,
        reference: Any | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        """`log_prob_micro_batch_size`: rows of a micro-batch in passes without gradients; None: micro_batch_size.
        `max_tokens`: tokens of a micro-batch at most, instead of these numbers of rows. `share_prompts`: rows of a
        prompt come together in micro-batches. `reference`: a frozen model for the KL term. `precision`: dtype of
        autocast; float32 for none. `gradient_checkpointing`: keep only the layers' inputs for the backward pass, which
        computes the rest again; rows are then padded.

        Raises ValueError if the model's logits aren't the product of its last hidden state and its output embedding, or
        the output embedding is not a plain linear layer.
        """
        check_output_head(model)
        output_head(model)
        use_onednn(model)
        use_fast_norms(model)
        if gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self._model = model
        self._tokenizer = tokenizer
        self._config = optimizer
        self._loss = loss
        self._temperature = temperature
        self._micro_batch_size, self._max_tokens = micro_batch_size, max_tokens
        self._log_prob_micro_batch_size = log_prob_micro_batch_size or micro_batch_size
        self._packs = (max_tokens is not None or share_prompts) and _packs(model)
        self._share_prompts = share_prompts and self._packs
        self._precision = precision
        self._reference = reference
        if reference is not None:
            use_onednn(reference)
            use_fast_norms(reference)
        self._gradient_steps = self._taps = 0
        self.statistics_seconds = 0.0
        self._offloaded: Offloaded | None = None
        self._optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=optimizer.lr,
            betas=optimizer.betas,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            fused=True,
        )

    @torch.no_grad()
    def log_probs(
        self, rollout: Rollout, tap: SignalsConfig | None = None, groups: HeadGroups | None = None
    ) -> tuple[LogProbs, RhythmSignals | None]:
        """See rhythm.engines.interfaces.Train."""
        self._model.eval()
        self.statistics_seconds = 0.0
        if tap is None:
            return self._log_probs(self._model, rollout), None
        watch = DeviceWatch(self._model.device)
        rows = SignalRows(rollout, tap, groups)
        log_probs = self._log_probs(self._model, rollout, tap, rows, watch)
        with watch:
            signals = rows.joined()
        self.statistics_seconds = watch.seconds
        return log_probs, replace(signals, entropy=log_probs.entropy)

    @torch.no_grad()
    def reference_log_probs(self, rollout: Rollout) -> Tensor:
        """See rhythm.engines.interfaces.Train. Raises RuntimeError if there is no reference model."""
        if self._reference is None:
            raise RuntimeError("this engine was built without a reference model")
        return self._log_probs(self._reference, rollout).logprobs

    def step(self, batch: TrainBatch) -> StepMetrics:
        """See rhythm.engines.interfaces.Train."""
        return self._step(batch, None)

    def tapped_step(self, batch: TrainBatch, tap: SignalsConfig | None, shape: ShapeAdvantages) -> TappedStep:
        """See rhythm.engines.interfaces.TappedTrain."""
        reader = StepReader(batch.rollout, tap, shape, DeviceWatch(self._model.device))
        metrics = self._step(batch, reader)
        self.statistics_seconds = reader.watch.seconds
        return TappedStep(metrics, reader.log_probs, reader.signals())

    def leave_gpu(self, *, offload: bool) -> None:
        """See rhythm.engines.interfaces.LeavesGpu. Gradients are freed in any case."""
        self._optimizer.zero_grad(set_to_none=True)
        if offload and self._offloaded is None:
            self._offloaded = Offloaded([self._optimizer])
        empty_cache()

    def _come_back(self) -> None:
        if self._offloaded is not None:
            self._offloaded.restore()
            self._offloaded = None

    def _step(self, batch: TrainBatch, reader: StepReader | None) -> StepMetrics:
        self._come_back()
        self._model.train()
        self._optimizer.zero_grad(set_to_none=True)
        totals = BatchTotals.of(batch.rollout.response_mask)
        sums = torch.zeros(5, dtype=torch.float64)
        learns_B = rows_with_gradient(batch, self._loss)
        for index, width in self._micro_batches(batch.rollout, self._micro_batch_size, learns_B):
            sums += self._accumulate(trim(take_rows(batch, index), width), totals, batch, index, reader)
        grad_norm = float(torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._config.max_grad_norm))
        if not math.isfinite(grad_norm):
            self._optimizer.zero_grad(set_to_none=True)
            raise NonFiniteError("gradient norm", grad_norm, batch)
        lr = self._config.learning_rate(self._gradient_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._gradient_steps += 1
        return StepMetrics.of(
            sums,
            token_share=int(batch.rollout.response_mask[learns_B].sum()) / max(totals.tokens, 1),
            grad_norm=grad_norm,
            lr=lr,
            has_reference=batch.reference_logprobs is not None,
        )

    def weights(self) -> dict[str, Tensor]:
        """See rhythm.engines.interfaces.Train."""
        state: dict[str, Tensor] = self._model.state_dict()
        return state

    def weights_stream(self) -> Iterator[tuple[str, Tensor]]:
        """See rhythm.engines.interfaces.Train."""
        return iter(self.weights().items())

    def save(self, directory: Path) -> None:
        """Write a transformers checkpoint (safetensors, configuration, tokenizer) and optimizer.pt."""
        self._come_back()
        self._model.save_pretrained(directory)
        self._tokenizer.save_pretrained(directory)
        state = {"optimizer": self._optimizer.state_dict(), "gradient_steps": self._gradient_steps}
        torch.save(state, directory / _OPTIMIZER_FILE)

    def load(self, directory: Path) -> None:
        """Restore the state that `save` wrote, bit for bit."""
        self._come_back()
        # Copied into memory allocated by torch: a mapped file may be aligned differently, which can change the order of
        # sums. Loaded with the model's own class, so that no code in the checkpoint is used.
        saved = type(self._model).from_pretrained(directory, dtype=torch.float32, local_files_only=True)
        load_weights(self._model, saved.state_dict(), 0, 0)
        state = torch.load(directory / _OPTIMIZER_FILE, map_location="cpu", weights_only=True)
        self._optimizer.load_state_dict(state["optimizer"])
        self._gradient_steps = state["gradient_steps"]

    def _accumulate(
        self, micro: TrainBatch, totals: BatchTotals, batch: TrainBatch, index: Tensor, reader: StepReader | None
    ) -> Tensor:
        """Add a micro-batch's part to the gradients; returns its part of the step's numbers, `LossOutput.parts`.

        `index`: the micro-batch's rows in `batch`. `reader`: reads its signals and makes its advantages.
        """
        with autocast(self._model, self._precision):
            now, statistics = self._forward(
                self._model,
                micro.rollout,
                None if reader is None else reader.tap,
                None if reader is None else reader.watch,
            )
        old_BT = now.logprobs.detach() if micro.old_logprobs is None else micro.old_logprobs
        if reader is not None:
            micro = reader.shaped(index, replace(micro, old_logprobs=old_BT), now, statistics)
        out = policy_loss(
            now.logprobs,
            old_BT,
            micro.advantages,
            micro.rollout.response_mask,
            self._loss,
            totals=totals,
            ref_logprobs_BT=micro.reference_logprobs,
            entropy_BT=now.entropy if self._loss.entropy_coef else None,
        )
        loss = float(out.loss.detach())
        if not math.isfinite(loss):
            self._optimizer.zero_grad(set_to_none=True)
            raise NonFiniteError("loss", loss, batch)
        torch.autograd.backward(out.loss)
        return out.parts()

    def _log_probs(
        self,
        model: Any,
        rollout: Rollout,
        tap: SignalsConfig | None = None,
        signals: SignalRows | None = None,
        watch: DeviceWatch | None = None,
    ) -> LogProbs:
        """Log-probs of all rows, a micro-batch at a time. With `tap`, their statistics are added to `signals`, timed by
        `watch`.
        """
        logprobs_BT = torch.full(rollout.input_ids.shape, torch.nan, device=rollout.input_ids.device)
        entropy_BT = torch.full_like(logprobs_BT, torch.nan)
        parts = list(self._micro_batches(rollout, self._log_prob_micro_batch_size))
        for i, (index, width) in enumerate(parts):
            micro = trim(take_rows(rollout, index), width)
            with autocast(model, self._precision):
                needs_span = signals is None or signals.needs_span(i, len(parts))
                part, statistics = self._forward(model, micro, tap, watch, needs_span=needs_span)
                if signals is not None and statistics is not None:
                    with watch or nullcontext():
                        signals.put(index, statistics)
            logprobs_BT[index, :width] = part.logprobs
            entropy_BT[index, :width] = part.entropy
        return LogProbs(logprobs_BT, entropy_BT)

    def _forward(
        self,
        model: Any,
        rollout: Rollout,
        tap: SignalsConfig | None,
        watch: DeviceWatch | None,
        *,
        needs_span: bool = True,
    ) -> tuple[LogProbs, HeadStatistics | None]:
        """One forward pass; with `tap` also the statistics of its attention, timed by `watch`."""

        open_tap = None
        if tap is not None:
            open_tap = AttentionTap(
                model, attention_mask=rollout.attention_mask, prompt_lens=rollout.prompt_lens, signals=tap
            )
            open_tap.watch = watch or nullcontext()
            open_tap.needs_span = needs_span
            open_tap.checks_output = self._taps % CHECKED_EVERY == 0
            self._taps += 1
        with short_attention(model), nullcontext() if open_tap is None or self._packs else open_tap:
            log_probs = response_logprobs(
                model,
                rollout,
                temperature=self._temperature,
                chunk=self._config.token_chunk,
                states=partial(packed_states, tap=open_tap, share_prompts=self._share_prompts)
                if self._packs
                else padded_states,
            )
        if open_tap is None:
            return log_probs, None
        with open_tap.watch:
            return log_probs, open_tap.statistics()

    def _micro_batches(self, rollout: Rollout, rows: int, of_B: Tensor | None = None) -> Iterator[tuple[Tensor, int]]:
        """As `micro_batches`, of the rows `of_B` alone."""
        index_n = (torch.ones_like(rollout.finished) if of_B is None else of_B).nonzero()[:, 0]
        parts = micro_batches(
            take_rows(rollout, index_n),
            rows,
            self._max_tokens,
            padded=not self._packs,
            by_prompt=self._share_prompts,
        )
        for part_m, width in parts:
            yield index_n[part_m], width


def _packs(model: Any) -> bool:
    """Whether the model's rows can be packed; the log says why not."""
    if refusal := packing_refusal(model):
        log.warning(
            "batch: rows are padded, and the padding counts in max_tokens, because they can't be packed: %s", refusal
        )
    return refusal is None
