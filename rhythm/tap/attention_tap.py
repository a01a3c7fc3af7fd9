"""Statistics of the sampled layers' attention, computed while a forward pass of the model runs.

Shape suffixes: B sequences, T positions of input_ids, H query heads of a layer, G key heads, D head size, n
heads of the pool; THD and TGD are packed, with the padding left out, and BTHD and BTGD are as the model has them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from rhythm.credit.heads import HeadGroups, select_heads
from rhythm.credit.signals import HeadStatistics, RhythmSignals
from rhythm.ops import arguments
from rhythm.ops.statistics import attention_statistics
from rhythm.tap.attention_form import (
    AttentionCall,
    AttentionForm,
    DeferredChecks,
    MaskReader,
    UnsupportedAttention,
    attention_form,
)
from rhythm.tap.attention_lse import bands_pay, run_with_lse
from rhythm.tap.chunks import chunked_statistics
from rhythm.tap.interception import Output, checked_layers, format_layers, intercept_attention, text_config
from rhythm.tap.output_check import check_output
from rhythm.tap.padding import PaddedBatch, check_one_of, integers, whole_batch
from rhythm.tap.signals_config import SignalsConfig


@dataclass(frozen=True)
class _LayerStatistics:
    """Per head of one layer, fp32: span [B, H], NaN if not wanted, waad and fai [B, H, T]; NaN where undefined."""

    span: Tensor
    waad: Tensor
    fai: Tensor


class _SeenEnoughError(Exception):
    """Leaves the forward pass of a tap that stops early."""


class AttentionTap:
    """Reads WAAD (windowed average attention distance), FAI (future attention influence) and spans
    off a forward pass that happens anyway.

        with AttentionTap(model, attention_mask=mask, prompt_lens=prompt_lens) as tap:
            logits = model(input_ids, attention_mask=mask, use_cache=False).logits
        signals = tap.signals()

    The forward pass gives the same with and without the tap, bit for bit. It may run with or without
    gradients; the statistics are detached. A tap serves one forward pass: open one for each micro-batch,
    and close it before the backward pass if that recomputes activations. Entering changes the name of the
    attention implementation in model.config, leaving puts it back. A compiled model is compiled once more for
    the tap, with a graph break at each attention.

    Memory is O(heads · T), with sliding windows, chunks, capped scores and sinks too. With fixed head groups only the
    bands near the diagonal are computed where the layer's own attention gives its lse (attention_lse.py says where),
    unless they are most of the map.

    Threads: taps on different models are independent. A model has at most one open tap, whichever thread
    opened it, and should run nothing but that tap's forward pass meanwhile.

    No tapped layer waits for the device. What can be seen only in the values of tensors there (masks, and the output
    of the attention) is therefore checked in `signals`, which waits for it once; an attention_mask on the device is
    read once, on construction.

    Refused by name: biases, bidirectional attention, cross-attention, attention
    dropout in train mode, layers without attention, packed rows without cu_seqlens, masks other than the causal or
    sliding-window mask of attention_mask (the window being the one that the layer's arguments or configuration
    name), arguments of the attention function that are not known, and any attention whose output is not that of
    the map we assume (some rows are computed and compared). Only the rows of responses are read, and only they are
    checked: a prompt may hold images, whose tokens may see ahead.

    Args:
        model: any causal transformers model whose attention goes through transformers' attention interface;
            may be wrapped, as long as `.config` and `.modules()` give the model's.
        prompt_lens: [B] integers, tokens of each sequence (padding not counted) that are its prompt.
        response_mask: [B, T], 1 on the response: the last tokens of each row, in one run; may be empty. Instead of
            prompt_lens.
        attention_mask: [B, T], 1 on tokens, 0 on padding, left or right; the forward pass's own. None: no
            padding.
        signals: which layers, window, horizon, quantile, grouping and backend. A tap sees one batch, so "calibrated"
            groups are those of that batch.
        groups: fixed head groups, [B, n] or [1, n]; signals.quantile and signals.grouping are then not used, and span
            is not computed: NaN.
        stop: leave the forward pass, and the `with` block, once the last of the layers has been read.
        cu_seqlens: int32 or int64 [B + 1], from 0 to T: input_ids is one row [1, T] of B packed sequences, and its
            forward pass keeps them apart (position_ids that start again). prompt_lens is then [B] and response_mask
            [1, T]; signals are those of the sequences alone, at the positions of the row: waad and fai [1, T], span and
            groups [B, n].

    Raises:
        ValueError: an argument is not as described; the message names it.
        UnsupportedAttention (a ValueError): on construction, in the forward pass or in `signals`: attention
            of a refused kind, or that does not go through transformers' attention interface. Masks and outputs other
            than those assumed show in `signals` only, after the forward pass.
        RuntimeError: on entering: the model has an open tap, or this one has served its forward pass. In
            the forward pass: a layer ran twice.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        prompt_lens: Tensor | Sequence[int] | None = None,
        response_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        signals: SignalsConfig = SignalsConfig(),
        groups: HeadGroups | None = None,
        stop: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> None:
        check_one_of(prompt_lens, response_mask)
        if cu_seqlens is not None and attention_mask is not None:
            raise ValueError("cu_seqlens and attention_mask are both given; a packed row has no padding")
        self._config = text_config(model)
        self._options = signals
        self.layers = checked_layers(signals, self._config)
        self._checks = DeferredChecks()
        self._masks: MaskReader | None = None
        if attention_mask is None and response_mask is not None and cu_seqlens is None:
            attention_mask = torch.ones_like(response_mask)
        if cu_seqlens is not None:
            batch = PaddedBatch.from_cu_seqlens(cu_seqlens, prompt_lens, response_mask)
            self._masks = MaskReader(batch, self._checks, prompts=False)
        elif attention_mask is not None:
            batch = PaddedBatch.from_mask(attention_mask, prompt_lens, response_mask)
            self._masks = MaskReader(batch, self._checks, prompts=False)
        else:
            assert prompt_lens is not None
            # Read here, because the first of the layers should not have to.
            self._prompt_lens_B = integers(arguments.prompt_lens_tensor(prompt_lens, torch.device("cpu")))
            self._prompt_lens: list[int] = self._prompt_lens_B.tolist()
        self._groups = groups
        # Entered around the work on each layer that the tap adds to the forward pass: whoever times it sets it.
        self.watch: AbstractContextManager[object] = nullcontext()
        # Whether outputs are compared with the form that was read: whoever taps the same model again and again may have
        # it done now and then.
        self.checks_output = True
        # Whether spans are wanted: whoever chooses the head groups elsewhere, from spans of before, sets it to False.
        self.needs_span = groups is None
        self._stop = stop
        self._exit = ExitStack()
        self._reached = False
        self._statistics: dict[int, _LayerStatistics] = {}

    def __enter__(self) -> AttentionTap:
        if self._reached:
            raise RuntimeError("this tap has served its forward pass; open a new one for each")
        self._exit.enter_context(intercept_attention(self._config, self.receive))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self._exit.close()
        return isinstance(error, _SeenEnoughError)

    def signals(self, entropy: Tensor | None = None) -> RhythmSignals:
        """The signals of the forward pass, at the positions of its input_ids. Waits for the device, once.

        Args:
            entropy: [B, T] nats, of the distribution each token was drawn from, to go with them.

        Raises:
            UnsupportedAttention: as `statistics`.
        """
        statistics = self.statistics()
        groups = self._groups or select_heads(statistics.span, self._options.quantile, self._options.per)
        batch = self.batch
        signals = statistics.signals(groups, None if entropy is None else batch.in_rows(entropy, torch.nan))
        if not batch.one_row:
            return signals
        waad, fai = (batch.from_rows(x, torch.nan) for x in (signals.waad, signals.fai))
        of_row = None if signals.entropy is None else batch.from_rows(signals.entropy, torch.nan)
        return replace(signals, waad=waad, fai=fai, entropy=of_row)

    def statistics(self) -> HeadStatistics:
        """Of every head of the layers, for callers who choose heads over several batches. Waits for the device, once.

        Of packed sequences in a row each, [B, n, N of the longest].

        Raises:
            UnsupportedAttention: not all of the layers reached the tap; a mask, or the output of a layer's attention,
                is not what the statistics assume. The message names the layer.
        """
        if missing := [layer for layer in self.layers if layer not in self._statistics]:
            hint = "layers= may name others" if self._reached else "no layer did: has a forward pass run?"
            raise UnsupportedAttention(
                f"{self._config.model_type}: {format_layers(missing, self._config)} never reached transformers' "
                f"attention interface ({hint})"
            )
        self._checks.settle()
        batch = self.batch
        of_layers = [self._statistics[layer] for layer in self.layers]
        span_Bn, waad_BnT, fai_BnT = (
            torch.cat([x.to(batch.real.device) for x in parts], dim=1)
            for parts in zip(*((s.span, s.waad, s.fai) for s in of_layers), strict=True)
        )
        heads = tuple(
            (layer, head) for layer, s in zip(self.layers, of_layers, strict=True) for head in range(s.span.shape[1])
        )
        waad_BnT, fai_BnT = (batch.in_rows(x.transpose(1, 2), torch.nan).transpose(1, 2) for x in (waad_BnT, fai_BnT))
        return HeadStatistics(span_Bn, waad_BnT, fai_BnT, batch.rows.response, heads)

    @property
    def batch(self) -> PaddedBatch:
        """What attention_mask and prompt_lens describe; without an attention_mask only after the forward pass."""
        assert self._masks is not None
        return self._masks.batch

    def receive(self, call: AttentionCall) -> Output:
        """Runs a call as the model would have, and reads it if its layer is one of ours.

        Entering the tap has it called by the model; who intercepts the model's attention already calls it instead, with
        calls for the rows of attention_mask.
        """
        if (layer := self._layer_of_ours(call)) is None:
            return call.run()
        if self._masks is None:
            B, _, T, _ = call.query.shape
            batch = whole_batch(B, T, self._prompt_lens_B, self._prompt_lens, call.query.device)
            self._masks = MaskReader(batch, self._checks, prompts=False)
        form = attention_form(call, self._masks)
        batch = self._masks.on(call.query.device)
        lse_BHT = None
        # Spans take a sweep over all keys, which gives lse as well.
        if not self.needs_span and bands_pay(form, batch.host.longest, self._options.window, self._options.horizon):
            result, lse_BHT = run_with_lse(call, form, batch)
        else:
            result = call.run()
        with self._reading(call):
            if self.checks_output:
                check_output(call, form, batch, result[0], self._checks, lse=lse_BHT)
            # Without padding the kernels read the layer's own tensors.
            whole = form.chunk is None and batch.is_whole
            tensors = call.query.transpose(1, 2), call.key.transpose(1, 2)
            q, k = tensors if whole else (batch.packed(x) for x in tensors)
            lse = lse_BHT if lse_BHT is None or whole else batch.packed(lse_BHT.transpose(1, 2)).T
            self._statistics[layer] = self._layer_statistics(q, k, form, batch, lse)
        self._leave_if_done()
        return result

    def read_packed(self, call: AttentionCall, output_1THD: Tensor, token_BT: Tensor) -> None:
        """Reads a call of one row, into which the caller has packed the rows of attention_mask, if its layer is one of
        ours: for who intercepts the model's attention and has run the call. The rows need not be padded for it.

        Args:
            call: query [1, H, tokens, D], key and value alike; mask: of the padded rows.
            output_1THD: what the model gets for it.
            token_BT: int64, where in the packed row the token of each position is, which may be that of several rows;
                on padding any.

        Raises as `receive`.
        """
        if (layer := self._layer_of_ours(call)) is None:
            return
        assert self._masks is not None  # rows packed by their attention_mask
        form = attention_form(call, self._masks, in_rows=False)
        batch = self._masks.on(call.query.device)
        with self._reading(call):
            if self.checks_output:
                query, key, value = (
                    x_1HTD[0][:, token_BT].transpose(0, 1) for x_1HTD in (call.query, call.key, call.value)
                )
                padded = replace(call, query=query, key=key, value=value)
                check_output(padded, form, batch, output_1THD[0][token_BT], self._checks)
            token_N = batch.packed(token_BT)
            q_NHD, k_NGD = (x_1HTD[0].transpose(0, 1).index_select(0, token_N) for x_1HTD in (call.query, call.key))
            self._statistics[layer] = self._layer_statistics(q_NHD, k_NGD, form, batch, None)
        self._leave_if_done()

    def _layer_of_ours(self, call: AttentionCall) -> int | None:
        """The call's layer, if it is to be read. Raises RuntimeError if it was before."""
        self._reached = True
        if call.layer not in self.layers:
            return None
        if call.layer in self._statistics:
            raise RuntimeError(
                f"{call.where}: ran twice in one tap; open one for each forward pass (generate() runs many: generate "
                "before the tap, then run the whole text inside)"
            )
        return call.layer

    @contextmanager
    def _reading(self, call: AttentionCall) -> Iterator[None]:
        # Autocast around the forward pass would take the statistics to low precision as well.
        with self.watch, torch.no_grad(), torch.autocast(call.query.device.type, enabled=False):
            yield

    def _leave_if_done(self) -> None:
        if self._stop and len(self._statistics) == len(self.layers):
            raise _SeenEnoughError

    def _layer_statistics(
        self, q: Tensor, k: Tensor, form: AttentionForm, batch: PaddedBatch, lse: Tensor | None
    ) -> _LayerStatistics:
        """q and k (and lse) as the ops take them: [N, H, D] without the padding, or [B, T, H, D] if there is none."""
        whole = q.ndim == 4
        options: dict[str, Any] = {
            "window": self._options.window,
            "horizon": self._options.horizon,
            "backend": self._options.backend,
            "lse": lse,
            "span": self.needs_span,
            **form.arguments(batch.host.longest),
        }
        if whole:
            got = attention_statistics(q, k, prompt_lens=batch.prompt_lens, **options)
            waad_BHT, fai_BHT = got.waad.float(), got.fai.float()
        else:
            got = chunked_statistics(q, k, batch, form.chunk, **options)
            waad_BHT, fai_BHT = (
                batch.padded(x_HT.T.float(), torch.nan).transpose(1, 2) for x_HT in (got.waad, got.fai)
            )
        undefined_BH = waad_BHT.new_full((len(batch.lens), q.shape[-2]), torch.nan)
        return _LayerStatistics(undefined_BH if got.span is None else got.span.float(), waad_BHT, fai_BHT)
