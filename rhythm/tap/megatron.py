"""Reads a Megatron model's signals off forward passes that happen anyway, on every rank for its heads and layers.

    with attach(model, SignalsConfig()) as tap:
        with tap.reading(MicroBatch(rows=[2, 0], lens=[9, 12], prompt_lens=[4, 5])):
            model(input_ids, position_ids, None, packed_seq_params=packed)
        ...
        signals = tap.signals(response_mask)

Shape suffixes: B responses, P positions of the batch, n heads of the pool, h heads of one layer on this rank, N tokens
of a micro-batch one after the other, T positions of a row on this rank, t of all its rows, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor, distributed, nn
from torch.utils.hooks import RemovableHandle

from rhythm.credit.heads import HeadGroups, select_heads
from rhythm.credit.signals import RhythmSignals
from rhythm.ops.statistics import attention_statistics
from rhythm.system.extras import needs
from rhythm.tap.attention_form import AttentionCall, DeferredChecks, UnsupportedAttention
from rhythm.tap.context_parallel import Shard
from rhythm.tap.megatron_layers import Layer, MicroBatch, check_bounds, decoder_layers, output_BTHE
from rhythm.tap.megatron_reads import Read, combine
from rhythm.tap.output_check import check_output
from rhythm.tap.padding import PaddedBatch
from rhythm.tap.signals_config import SignalsConfig

Locate = Callable[[tuple[Any, ...], dict[str, Any]], MicroBatch | None]


class ModelGroups(Protocol):
    """The process groups that a model is split over; None where it is not."""

    @property
    def tensor(self) -> distributed.ProcessGroup | None:
        """Ranks that split the heads of a layer."""

    @property
    def pipeline(self) -> distributed.ProcessGroup | None:
        """Ranks that split the layers."""

    @property
    def context(self) -> distributed.ProcessGroup | None:
        """Ranks that split each sequence. An object without this attribute has none."""


@dataclass(frozen=True)
class _Groups:
    tensor: distributed.ProcessGroup | None
    pipeline: distributed.ProcessGroup | None
    context: distributed.ProcessGroup | None


class MegatronTap:
    """Reads the forward passes of a batch, as `attach` says. The statistics of this rank's sampled layers stay in
    memory: 8 bytes per token and head, also with context parallelism, where they are parts of those of the sequences.

    Attributes:
        layers: the sampled ones, of the whole model.
        depth: how many layers the whole model has.
        query_heads: of each, over all tensor ranks.
        watch: entered around the work on each layer that the tap adds to a forward pass.
    """

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        signals: SignalsConfig,
        head_groups: HeadGroups | None,
        locate: Locate | None,
        lse: Callable[[nn.Module, Any], Tensor | None] | None,
        groups: ModelGroups,
    ) -> None:
        found = decoder_layers(chunks)
        config = _config(chunks, found)
        self.layers = signals.layers_of(config.num_layers)
        self.depth: int = config.num_layers
        self.query_heads: int = config.num_attention_heads
        self.watch: AbstractContextManager[object] = nullcontext()
        self._signals, self._head_groups, self._lse, self._groups = signals, head_groups, lse, groups
        self._context = _context_group(found, groups)
        self._device = next((p.device for chunk in chunks for p in chunk.parameters()), torch.device("cpu"))
        self._micro: MicroBatch | None = None
        self._batch: PaddedBatch | None = None
        self._shard: Shard | None = None
        self._seen: set[int] = set()
        self._reads: list[Read] = []
        self._checks = DeferredChecks()
        self._hooks: list[RemovableHandle] = []
        for layer in found:
            if layer.index in self.layers:
                hook = partial(self._attended, layer)
                self._hooks.append(layer.core.register_forward_hook(hook, with_kwargs=True))
        if locate is not None:
            for chunk in chunks:
                self._hooks.append(chunk.register_forward_pre_hook(partial(self._located, locate), with_kwargs=True))
                self._hooks.append(chunk.register_forward_hook(self._left, always_call=True))

    def __enter__(self) -> MegatronTap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def detach(self) -> None:
        """Removes the hooks: the model is as it was. What was read stays readable."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @contextmanager
    def reading(self, micro: MicroBatch) -> Iterator[None]:
        """Read the forward pass of this micro-batch. Layers that run outside are not read, nor is one read twice: with
        recomputation they run again in the backward pass.
        """
        self._enter(micro)
        try:
            yield
        finally:
            self._enter(None)

    @property
    def pool(self) -> tuple[tuple[int, int], ...]:
        """(layer, head) of every head that is read, over all ranks."""
        return tuple((layer, head) for layer in self.layers for head in range(self.query_heads))

    def signals(
        self,
        response_mask: Tensor,
        rows: Sequence[Hashable] | None = None,
        all_reduce: Callable[[Tensor], Tensor] | None = None,
    ) -> RhythmSignals:
        """Signals of what was read, on the CPU. A collective of the ranks that the model is split over, which all get
        the same.

        Args:
            response_mask: bool [B, P], true on the responses, the position of a token being its place in its sequence.
            rows: what `MicroBatch.rows` calls each row of the batch, [B]; None: 0 to B − 1. Rows of one name are alike.
            all_reduce: sums a tensor over more ranks, which have read other rows of the same batch, and returns it on
                the CPU.

        Raises:
            ValueError: on every rank: a row that was not read, or whose response is another.
            UnsupportedAttention: on every rank: attention that is not what the statistics assume.
        """
        all_reduce = all_reduce or self._over_model
        self.check(all_reduce)
        return self.combined(self._reads, response_mask, all_reduce, rows)

    def check(self, all_reduce: Callable[[Tensor], Tensor]) -> None:
        """Raises UnsupportedAttention on all of the ranks if one of them has read attention that is not what the
        statistics assume.
        """
        refusal = None
        try:
            self._checks.settle()
        except UnsupportedAttention as error:
            refusal = error
        refused = all_reduce(torch.tensor([float(refusal is not None)]))
        if refusal is not None:
            raise refusal
        if refused > 0:
            raise UnsupportedAttention("another rank of the model refused its attention, and says why")

    def take_reads(self) -> list[Read]:
        """The reads so far, by layer in each micro-batch; they are forgotten here."""
        reads, self._reads = self._reads, []
        return reads

    def places(self, layer: int, h: int) -> Tensor:
        """Indices in the pool of this rank's h heads of a layer, [h]."""
        tensor = self._groups.tensor
        size, rank = (1, 0) if tensor is None else (tensor.size(), tensor.rank())
        first = (self.layers.index(layer) * size + rank) * h
        return torch.arange(first, first + h)

    def combined(
        self,
        reads: Sequence[Read],
        response_mask_BP: Tensor,
        all_reduce: Callable[[Tensor], Tensor],
        rows: Sequence[Hashable] | None = None,
    ) -> RhythmSignals:
        """Signals of the rows that the reads of all ranks are of, on the CPU. `all_reduce`: sums over these ranks."""
        return combine(reads, response_mask_BP, rows, self.pool, self._chosen, all_reduce)

    def _enter(self, micro: MicroBatch | None) -> None:
        self._micro, self._batch, self._shard, self._seen = micro, None, None, set()

    def _located(self, locate: Locate, chunk: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._enter(locate(args, kwargs))

    def _left(self, *_: object) -> None:
        self._enter(None)

    @torch.no_grad()
    def _attended(
        self, layer: Layer, core: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """The hook after a core_attention's forward."""
        micro = self._micro
        if micro is None or layer.index in self._seen:
            return
        self._seen.add(layer.index)
        call, packed = layer.call(args, kwargs)
        # Autocast around the forward pass would take the statistics to low precision as well.
        with self.watch, torch.autocast(call.query.device.type, enabled=False):
            if self._batch is None:
                self._batch = self._placed(layer, call, packed, micro)
            batch, form = self._batch, layer.form(call)
            lse = None if self._lse is None else self._lse(core, output)
            options = {
                "window": self._signals.window,
                "horizon": self._signals.horizon,
                "backend": self._signals.backend,
                "span": lse is None or self._head_groups is None,
                **form.arguments(batch.host.longest),
            }
            heads, output_BTHD = self.places(layer.index, call.query.shape[1]), output_BTHE(output, call)
            if self._context is not None and self._shard is not None:
                call = self._shard.seen(call, self._context)
                if self._shard.has_rows:
                    rows = self._shard.row_places
                    check_output(call, form, self._shard.pieces, output_BTHD.flatten(0, 1)[None], self._checks, rows)
                q_tHD, k_KGD = (x[0].transpose(0, 1) for x in (call.query, call.key))
                parts = self._shard.statistics(q_tHD, k_KGD, lse_Ht=lse, **options)
                self._reads.append(Read(micro, heads, *parts, parts=self._shard.size))
                return
            check_output(call, form, batch, output_BTHD, self._checks)
            q_BTHD, k_BTGD = call.query.transpose(1, 2), call.key.transpose(1, 2)
            statistics = attention_statistics(
                _tokens(q_BTHD, batch),
                _tokens(k_BTGD, batch),
                cu_seqlens=batch.cu_seqlens,
                prompt_lens=batch.prompt_lens,
                lse=lse,
                **options,
            )
        self._reads.append(Read(micro, heads, statistics.span, statistics.waad, statistics.fai))

    def _placed(self, layer: Layer, call: AttentionCall, packed: Any, micro: MicroBatch) -> PaddedBatch:
        """Where the tokens of the whole sequences are; of them this rank may have a shard."""
        positions = call.query.shape[2]
        ranks = 1 if self._context is None else self._context.size()
        batch = micro.placed(positions * ranks, packed is not None, call.query.device)
        if packed is not None:
            self._checks.refuse_if(*check_bounds(layer, packed, batch))
        if self._context is not None:
            self._shard = layer.shard(packed, batch, self._context, positions)
        return batch

    def _chosen(self, span_Bn: Tensor) -> HeadGroups:
        """The head groups per response, [B, n]."""
        if self._head_groups is not None:
            fixed = self._head_groups
            return HeadGroups(*(group.cpu().expand(span_Bn.shape) for group in (fixed.local, fixed.global_)))
        return select_heads(span_Bn, self._signals.quantile, self._signals.per)

    def _over_model(self, x: Tensor) -> Tensor:
        """Summed over the ranks that the model is split over."""
        total = x.to(self._device, copy=True)
        for group in (self._groups.tensor, self._groups.pipeline, self._context):
            if group is not None:
                distributed.all_reduce(total, group=group)
        return total.cpu()


def attach(
    model: nn.Module | Sequence[nn.Module],
    signals: SignalsConfig = SignalsConfig(),
    *,
    head_groups: HeadGroups | None = None,
    locate: Locate | None = None,
    lse: Callable[[nn.Module, Any], Tensor | None] | None = None,
    groups: ModelGroups | None = None,
) -> MegatronTap:
    """Hooks the sampled layers' core_attention of a Megatron model, whatever class it has, and reads queries and keys
    after norm and RoPE off its arguments.

    No module is replaced and no weight copied; the forward pass gives the same, bit for bit. The first, middle and last
    row of a layer's responses are computed and compared with what core_attention gave, as `AttentionTap` does. Works
    with tensor, pipeline, data and context parallelism, padded and packed rows, micro-batches in any order, and
    recomputation. Each rank reads its heads of its layers; `MegatronTap.signals` brings them together. Context parallel
    ranks gather the keys of each sampled layer, and the values for the comparison, and read their own queries.

    Args:
        model: the chunks of the model on this rank, wrapped or not: what Megatron's schedules take.
        signals: which layers, window, horizon, quantile, grouping and backend; "calibrated" groups are those of the
            batch.
        head_groups: fixed ones, [B, n] or [1, n].
        locate: which sequences a forward pass of a chunk runs, from its arguments (args, kwargs); None: not to be read.
            For trainers whose loop is out of reach; without it, open `MegatronTap.reading` around each forward pass.
        lse: log Σ exp(score) of a core_attention and its output, fp32 [h, N] over the tokens one after the other, where
            it gives one; with context parallelism [h, t], over this rank's positions, padding included. With
            head_groups, only the bands near the diagonal are then visited, and span is NaN.
        groups: None: those of Megatron's parallel_state, if it is initialized.

    Raises:
        UnsupportedAttention: context parallelism without its group; in the forward pass, or in `signals`: attention
            that is not causal, or not of the form that its configuration says, dropout, a bias, packed rows without
            lengths, context parallel rows that can't be cut into two chunks per rank.
        ValueError: two layers of one number; signals.layers that the model doesn't have; in the forward pass, sequences
            that do not fit its rows.
    """
    chunks = [model] if isinstance(model, nn.Module) else list(model)
    return MegatronTap(chunks, signals, head_groups, locate, lse, model_groups() if groups is None else groups)


def model_groups() -> ModelGroups:
    """Megatron's tensor, pipeline and context parallel groups; none if Megatron is not initialized."""
    with needs("rhythm.tap.megatron"):
        from megatron.core import parallel_state
    if not parallel_state.is_initialized():
        return _Groups(None, None, None)
    return _Groups(
        parallel_state.get_tensor_model_parallel_group(),
        parallel_state.get_pipeline_model_parallel_group(),
        parallel_state.get_context_parallel_group(),
    )


def data_group() -> distributed.ProcessGroup | None:
    """Megatron's data parallel group; None if Megatron is not initialized."""
    with needs("rhythm.tap.megatron"):
        from megatron.core import parallel_state
    return parallel_state.get_data_parallel_group() if parallel_state.is_initialized() else None


def _context_group(found: Sequence[Layer], groups: ModelGroups) -> distributed.ProcessGroup | None:
    """The ranks that split each sequence; None if it is not split. UnsupportedAttention without their group."""
    group: distributed.ProcessGroup | None = getattr(groups, "context", None)
    size = 1 if group is None else group.size()
    for layer in found:
        if layer.context_ranks != size:
            raise layer.refusal(f"context parallelism, whose {layer.context_ranks} ranks are a group of {size} here")
    return group if size > 1 else None


def _config(chunks: Sequence[nn.Module], found: Sequence[Layer]) -> Any:
    """The TransformerConfig. A stage may have none of the layers."""
    if found:
        return found[0].config
    for chunk in chunks:
        for module in chunk.modules():
            if hasattr(config := getattr(module, "config", None), "num_attention_heads"):
                return config
    raise UnsupportedAttention("model has no Megatron layers (decoder.layers.N.self_attention.core_attention)")


def _tokens(x_BTX: Tensor, batch: PaddedBatch) -> Tensor:
    """[N, …]; without padding a view."""
    return x_BTX.flatten(0, 1) if batch.has_no_padding else batch.packed(x_BTX)
