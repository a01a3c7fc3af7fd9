"""Implements Train on Megatron-core: one object per rank; all ranks get the same calls and return the same results.

Shape suffixes: B responses, P positions of the padded batch, T tokens of a micro-batch, N response tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from rhythm.credit.heads import HeadGroups
from rhythm.credit.loss import BatchTotals, LossConfig, policy_loss
from rhythm.credit.signals import RhythmSignals
from rhythm.engines.batches import rows_with_gradient, take_rows, to_device, trim
from rhythm.engines.head import logprobs_and_entropies
from rhythm.engines.interfaces import (
    LogProbs,
    NonFiniteError,
    Rollout,
    ShapeAdvantages,
    StepMetrics,
    TappedStep,
    TrainBatch,
)
from rhythm.engines.local.step_reader import check_grouping
from rhythm.engines.local.train import OptimizerConfig
from rhythm.engines.megatron import checkpoint as checkpoints
from rhythm.engines.megatron.context import joined
from rhythm.engines.megatron.cpu import on_cpu
from rhythm.engines.megatron.gradients import add_up_gradients, summed_at_the_end, with_summed_gradients
from rhythm.engines.megatron.layout import ParallelConfig
from rhythm.engines.megatron.model import PolicyModel, build_model, has_experts, read_config
from rhythm.engines.megatron.packing import Packed, pack
from rhythm.engines.megatron.parallel import Rendezvous, join, leave
from rhythm.engines.megatron.step_reader import StepReader
from rhythm.engines.megatron.weights import gather_weights, load_weights
from rhythm.engines.micro_batches import deal_rows, split_rows
from rhythm.engines.offload import Offloaded, empty_cache
from rhythm.engines.watch import DeviceWatch
from rhythm.tap.megatron import attach
from rhythm.tap.signals_config import SignalsConfig

Reading = Callable[[Packed], AbstractContextManager[None]]
"""Makes the context in which the forward pass of a micro-batch is read."""


class MegatronTrain:
    """One rank of a Train engine. Each rank gets the whole batch, processes its part, and returns the complete result
    in CPU tensors. With `precision` bfloat16 on CUDA the optimizer keeps weights in float32.
    """

    def __init__(
        self,
        checkpoint: Path,
        rendezvous: Rendezvous,
        parallel: ParallelConfig,
        *,
        optimizer: OptimizerConfig,
        loss: LossConfig,
        temperature: float,
        micro_batch_size: int,
        max_tokens: int | None = None,
        precision: torch.dtype = torch.float32,
        with_reference: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        """`checkpoint`: a transformers checkpoint in safetensors, not needed afterwards. `max_tokens`: tokens of a
        micro-batch at most, instead of micro_batch_size rows. `with_reference`: keep a frozen copy for the KL term.
        `trust_remote_code`: run code in the checkpoint for its config and tokenizer.

        Raises ValueError for a model that isn't supported, or a layout that doesn't fit the number of ranks.
        """
        self.config = read_config(checkpoint, trust_remote_code=trust_remote_code)
        self._companions = checkpoints.read_companions(checkpoint, trust_remote_code=trust_remote_code)
        if has_experts(self.config) and parallel.tensor > 1 and not parallel.sequence_parallel:
            raise ValueError(
                f"sequence_parallel is false: must be true for a model with experts and tensor {parallel.tensor}"
            )
        self._token_split = parallel.tensor if parallel.splits_tokens else 1
        self._groups = join(rendezvous, parallel)
        self._optimizer_config = optimizer
        self._loss = loss
        self._temperature = temperature
        self._micro_batch_size, self._max_tokens = micro_batch_size, max_tokens
        self._gradient_steps = 0
        self._offloaded: Offloaded | None = None
        self.statistics_seconds = 0.0
        """Seconds that the last `log_probs` spent on attention statistics, on the slowest rank."""
        with on_cpu():
            model = build_model(self.config, self._groups, parallel, precision)
            load_weights(model, checkpoint, self.config, self._groups)
            overlap = parallel.overlap_gradients and not has_experts(self.config)
            self._model = with_summed_gradients(model, parallel, overlap=overlap)
            # No overrides: weight decay on every parameter, as in the single-process engine.
            self._optimizer = megatron_optimizer.get_megatron_optimizer(
                _optimizer_config(optimizer, precision, parallel), [self._model], config_overrides={}
            )
        self._reference = self._frozen(checkpoint, parallel, precision) if with_reference else None

    def log_probs(
        self, rollout: Rollout, tap: SignalsConfig | None = None, groups: HeadGroups | None = None
    ) -> tuple[LogProbs, RhythmSignals | None]:
        """See rhythm.engines.interfaces.Train."""
        if tap is None:
            self.statistics_seconds = 0.0
            return self._log_probs(self._model.module, rollout), None
        watch = DeviceWatch(self._groups.device)
        with attach(self._model.module, tap, head_groups=groups, groups=self._groups) as reader:
            reader.watch = watch
            log_probs = self._log_probs(self._model.module, rollout, lambda packed: reader.reading(packed.micro))
        self.statistics_seconds = self._groups.largest(watch.seconds)
        signals = reader.signals(rollout.response_mask, all_reduce=self._groups.all_reduce_sum)
        return log_probs, replace(signals, entropy=log_probs.entropy)

    def reference_log_probs(self, rollout: Rollout) -> Tensor:
        """See rhythm.engines.interfaces.Train. Raises RuntimeError if there is no reference model."""
        if self._reference is None:
            raise RuntimeError("this engine was built without a reference model")
        return self._log_probs(self._reference, rollout).logprobs

    def step(self, batch: TrainBatch) -> StepMetrics:
        """See rhythm.engines.interfaces.Train. Raises NonFiniteError on every rank."""
        return self._step(batch, None)

    def tapped_step(self, batch: TrainBatch, tap: SignalsConfig | None, shape: ShapeAdvantages) -> TappedStep:
        """See rhythm.engines.interfaces.TappedTrain. `shape` is called on the ranks of the last stage, and must give
        each of them the same. Raises NonFiniteError on every rank.
        """
        check_grouping(tap)
        with nullcontext() if tap is None else attach(self._model.module, tap, groups=self._groups) as inner:
            reader = StepReader(inner, shape, batch.rollout, self._groups)
            metrics = self._step(batch, reader)
        log_probs, signals, self.statistics_seconds = reader.joined()
        return TappedStep(metrics, log_probs, signals)

    def _step(self, batch: TrainBatch, reader: StepReader | None) -> StepMetrics:
        self._come_back()
        self._model.zero_grad_buffer()
        self._optimizer.zero_grad()
        totals = BatchTotals.of(batch.rollout.response_mask)
        # The reader wants the log-probs and signals of the others, too.
        rows = batch if reader is not None else take_rows(batch, rows_with_gradient(batch, self._loss).nonzero()[:, 0])
        sums = torch.zeros(5, dtype=torch.float64)

        def part(packed: Packed, hidden_ND: Tensor) -> Tensor:
            loss, parts = self._loss_part(packed, hidden_ND, rows, totals, reader)
            sums.add_(parts)
            return loss

        self._model.train()
        self._run(self._model, rows.rollout, part, backward=True, reading=None if reader is None else reader.reading)
        sums = self._groups.all_reduce_sum(sums if self._groups.is_output_rank else 0 * sums)
        loss = float(sums[0])
        grad_norm = self._clipped_gradients() if math.isfinite(loss) else math.nan
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self._model.zero_grad_buffer()
            what, value = ("gradient norm", grad_norm) if math.isfinite(loss) else ("loss", loss)
            raise NonFiniteError(what, value, batch)
        lr = self._optimizer_config.learning_rate(self._gradient_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        with on_cpu():
            self._optimizer.step_with_ready_grads()
        self._gradient_steps += 1
        return StepMetrics.of(
            sums,
            token_share=int(rows.rollout.response_mask.sum()) / max(totals.tokens, 1),
            grad_norm=grad_norm,
            lr=lr,
            has_reference=batch.reference_logprobs is not None,
        )

    def weights_stream(self) -> Iterator[tuple[str, Tensor]]:
        """(name in a transformers checkpoint, complete tensor on this rank's device), gathered one parameter at a time.

        A collective: all ranks must iterate together, to the end.
        """
        return gather_weights(self._model.module, self.config, self._groups)

    def weights(self) -> dict[str, Tensor]:
        """See rhythm.engines.interfaces.Train. Returns copies of all weights, on every rank."""
        return {name: tensor.detach().clone() for name, tensor in self.weights_stream()}

    def save(self, directory: Path) -> None:
        """Write a transformers checkpoint, and a distributed checkpoint in its folder `megatron`."""
        self._come_back()
        writes = self._groups.rank == 0
        checkpoints.write_weights(directory, self.weights_stream(), self._companions, write=writes)
        with on_cpu():
            checkpoints.save_state(
                directory / checkpoints.DISTRIBUTED, self._model, self._optimizer, self._gradient_steps
            )

    def load(self, directory: Path) -> None:
        """Restore the state that `save` wrote with any layout; with the same layout, bit for bit."""
        self._come_back()
        with on_cpu():
            folder = directory / checkpoints.DISTRIBUTED
            self._gradient_steps = checkpoints.load_state(folder, self._model, self._optimizer)

    def leave_gpu(self, *, offload: bool) -> None:
        """See rhythm.engines.interfaces.LeavesGpu. Weights stay, since a push comes next."""
        if offload and self._offloaded is None:
            self._model.offload_grad_buffers(synchronize=False, empty_cache=False)
            self._offloaded = Offloaded(*_optimizer_tensors(self._optimizer))
        empty_cache()

    def _come_back(self) -> None:
        if self._offloaded is not None:
            self._model.restore_grad_buffers(synchronize=False)
            self._offloaded.restore()
            self._offloaded = None

    def close(self) -> None:
        """Leave the process groups."""
        leave()

    def _frozen(self, checkpoint: Path, parallel: ParallelConfig, precision: torch.dtype) -> PolicyModel:
        with on_cpu():
            model = build_model(self.config, self._groups, parallel, precision)
            load_weights(model, checkpoint, self.config, self._groups)
        model.requires_grad_(False)
        return model

    @torch.no_grad()
    def _log_probs(self, model: PolicyModel, rollout: Rollout, reading: Reading | None = None) -> LogProbs:
        scores_2BP = torch.zeros(2, *rollout.input_ids.shape)

        def keep(packed: Packed, hidden_ND: Tensor) -> Tensor:
            scores = self._scores(model, packed, hidden_ND)
            if self._groups.is_output_rank:
                both = torch.stack([scores.logprobs, scores.entropy])
                scores_2BP[:, packed.rows, : packed.width] = torch.where(packed.target, both, 0.0).cpu()
            return hidden_ND.new_zeros(())

        model.eval()
        self._run(model, rollout, keep, reading=reading)
        logprobs_BP, entropy_BP = self._groups.all_reduce_sum(scores_2BP)
        outside_BP = ~rollout.response_mask
        return LogProbs(logprobs_BP.masked_fill(outside_BP, torch.nan), entropy_BP.masked_fill(outside_BP, torch.nan))

    def _run(
        self,
        model: Any,
        rollout: Rollout,
        finish: Callable[[Packed, Tensor], Tensor],
        *,
        backward: bool = False,
        reading: Reading | None = None,
    ) -> None:
        """Run Megatron's schedule over this rank's micro-batches. On the last stage `finish` gets the hidden states and
        returns the loss.
        """
        data = self._groups.data
        lens_B = rollout.lens
        dealt = deal_rows(lens_B, data.size())
        rows = dealt[data.rank()]
        micro_batches = [rows[part] for part in split_rows(lens_B[rows], self._micro_batch_size, self._max_tokens)]
        if not micro_batches:
            if backward:
                add_up_gradients([model])
            return

        def forward(items: Iterator[Packed], model: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
            packed = next(items)
            with nullcontext() if reading is None else reading(packed):
                hidden = model(
                    packed.input_ids[None],
                    packed.position_ids[None],
                    attention_mask=None,
                    packed_seq_params=packed.sequences,
                )

            def loss(hidden_T1D: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
                # Megatron expects a divisor, which isn't used: the micro-batches' losses add up to the step's loss.
                none = torch.zeros((), dtype=torch.int, device=hidden_T1D.device)
                return finish(packed, hidden_T1D[:, 0]), none, {}

            return hidden, loss

        at_the_end = backward and min(map(len, dealt)) == 0
        with on_cpu(), summed_at_the_end(model) if at_the_end else nullcontext() if backward else torch.no_grad():
            get_forward_backward_func()(
                forward_step_func=forward,
                data_iterator=(
                    pack(
                        rollout,
                        rows,
                        self._groups.device,
                        fused_rope=self._model.config.apply_rope_fusion,
                        context=self._groups.context,
                        multiple=self._token_split,
                    )
                    for rows in micro_batches
                ),
                model=[model],
                num_microbatches=len(micro_batches),
                seq_length=1,  # not used: lengths vary and are sent with the tensors
                micro_batch_size=1,
                forward_only=not backward,
            )

    def _scores(self, model: PolicyModel, packed: Packed, hidden_TD: Tensor) -> LogProbs:
        """Log-probs and entropies of a micro-batch's response tokens, [b, width]; differentiable in this rank's own."""
        logprob_N, entropy_N = logprobs_and_entropies(
            hidden_TD[packed.predicts],
            model.head_weight(),
            packed.tokens,
            temperature=self._temperature,
            chunk=self._optimizer_config.token_chunk,
            group=self._groups.tensor,
        )
        none_bW = torch.zeros(packed.target.shape, device=packed.target.device)
        both_2bW = torch.stack([none_bW.masked_scatter(packed.own, x_N) for x_N in (logprob_N, entropy_N)])
        if packed.sequences.context is not None:
            both_2bW = joined(both_2bW, packed.sequences.context.group)
        logprobs_bW, entropy_bW = both_2bW.masked_fill(~packed.target, torch.nan)
        return LogProbs(logprobs=logprobs_bW, entropy=entropy_bW)

    def _loss_part(
        self, packed: Packed, hidden_TD: Tensor, batch: TrainBatch, totals: BatchTotals, reader: StepReader | None
    ) -> tuple[Tensor, Tensor]:
        """A micro-batch's part of the step's loss, and of the step's numbers, `LossOutput.parts`."""
        now = self._scores(self._model.module, packed, hidden_TD)
        micro = to_device(trim(take_rows(batch, packed.rows), packed.width), packed.target.device)
        old_bW = now.logprobs.detach() if micro.old_logprobs is None else micro.old_logprobs
        if reader is not None:
            micro = reader.shaped(packed, replace(micro, old_logprobs=old_bW), now)
        out = policy_loss(
            now.logprobs,
            old_bW,
            micro.advantages,
            packed.target,
            self._loss,
            totals=totals,
            ref_logprobs_BT=micro.reference_logprobs,
            entropy_BT=now.entropy if self._loss.entropy_coef else None,
        )
        return out.loss, out.parts()

    def _clipped_gradients(self) -> float:
        """Clip the gradients to max_grad_norm; returns the norm before clipping."""
        with on_cpu():
            self._optimizer.prepare_grads()
            norm = float(self._optimizer.get_grad_norm())
            largest = self._optimizer_config.max_grad_norm
            if math.isfinite(norm) and math.isfinite(largest):
                clip_grad_by_total_norm_fp32(self._optimizer.get_parameters(), largest, norm)
        return norm


def _optimizer_tensors(optimizer: Any) -> tuple[list[Any], list[Tensor]]:
    """(torch's optimizers within Megatron's, their fp32 master weights; none where they are the model's own)."""
    parts = optimizer.chained_optimizers
    masters = [
        parameter
        for part in parts
        if part.config.bf16
        for group in part.optimizer.param_groups
        for parameter in group["params"]
    ]
    return [part.optimizer for part in parts], masters


def _optimizer_config(config: OptimizerConfig, precision: torch.dtype, parallel: ParallelConfig) -> Any:
    return megatron_optimizer.OptimizerConfig(
        optimizer="adam",
        decoupled_weight_decay=True,
        lr=config.lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.betas[0],
        adam_beta2=config.betas[1],
        adam_eps=config.eps,
        bf16=precision == torch.bfloat16,
        params_dtype=precision,
        use_distributed_optimizer=parallel.distributed_optimizer,
        clip_grad=0.0,  # this engine clips itself, after checking the norm
    )
