"""A model and a batch → signals, by a forward pass that goes no further than the last sampled layer.

Shape suffixes: B sequences, T positions of input_ids, V vocabulary, C positions handled at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rhythm.credit.heads import HeadGroups
from rhythm.credit.signals import HeadStatistics, RhythmSignals
from rhythm.shapes import check_dense, check_shape
from rhythm.tap.attention_tap import AttentionTap
from rhythm.tap.padding import PaddedBatch
from rhythm.tap.signals_config import SignalsConfig

ENTROPY_ELEMENTS = 2**24  # fp32 probabilities held at a time: 64 MB


def observe(
    model: nn.Module,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    prompt_lens: Tensor | Sequence[int] | None = None,
    response_mask: Tensor | None = None,
    signals: SignalsConfig = SignalsConfig(),
    groups: HeadGroups | None = None,
    entropy: bool = False,
    cu_seqlens: Tensor | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> RhythmSignals:
    """WAAD (windowed average attention distance) and FAI (future attention influence) of every
    response token (paper eqs. 9 and 10, over the heads of eqs. 7 and 8).

    Runs the model without gradients or a KV cache up to the last sampled layer, in the mode (train or eval)
    it is in. Padding has no influence: each row's signals are those of the row alone, up to the model's own
    rounding. Attention that is plain and causal costs O(heads · T) memory here. See `AttentionTap` for
    other kinds, for those that are refused, and for reading the same signals off a forward pass that
    happens anyway. Waits for the device once before the forward pass, to read attention_mask, and once after it, but
    not during it.

    Args:
        model: any causal transformers model whose attention goes through transformers' attention interface.
        input_ids: [B, T] integers; the tokens of a row are its prompt, then its response.
        attention_mask: [B, T], 1 on tokens and 0 on padding, which may be on the left or right. None: no
            padding.
        prompt_lens: [B] integers, tokens of each sequence (padding not counted) that are its prompt.
        response_mask: [B, T], 1 on the response: the last tokens of each row, in one run; may be empty. Instead of
            prompt_lens.
        signals: which layers, window, horizon, quantile, grouping and backend. One call sees one batch, so
            "calibrated" groups are those of that batch.
        groups: fixed head groups, [B, n] or [1, n]; signals.quantile and signals.grouping are then not used, and span
            is not computed: NaN.
        entropy: also the entropy of the distribution each token was drawn from; runs the whole model.
        cu_seqlens: int32 or int64 [B + 1], from 0 to T: input_ids is one row [1, T] of B packed sequences, without an
            attention_mask; prompt_lens is then [B] and response_mask [1, T]. position_ids start again with each.
        inputs: more of the forward pass, such as pixel_values and image_grid_thw for images in the prompts.
            position_ids are then those that the model makes, unless they are among them.

    Returns:
        RhythmSignals at the positions of input_ids, on their device; NaN outside the responses.

    Raises:
        ValueError: an argument is not as described; the message names it.
        UnsupportedAttention (a ValueError): attention of a kind whose statistics we can't compute.
    """
    tap, output = _watched(
        model,
        input_ids,
        attention_mask,
        prompt_lens,
        response_mask,
        cu_seqlens,
        inputs,
        signals=signals,
        groups=groups,
        stop=not entropy,
    )
    return tap.signals(_entropies(_logits(model, output), tap.batch) if entropy else None)


def observe_heads(
    model: nn.Module,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    prompt_lens: Tensor | Sequence[int] | None = None,
    response_mask: Tensor | None = None,
    signals: SignalsConfig = SignalsConfig(),
    span: bool = True,
) -> HeadStatistics:
    """What `observe` aggregates, head by head: for callers who choose heads over several batches.

    Memory is 8 bytes per position and head for as long as it is kept. Arguments and errors as in `observe`;
    signals.quantile and signals.grouping are not used. Without `span` it is NaN.
    """
    tap, _ = _watched(
        model,
        input_ids,
        attention_mask,
        prompt_lens,
        response_mask,
        None,
        None,
        signals=signals,
        groups=None,
        stop=True,
        span=span,
    )
    return tap.statistics()


def response_entropy(
    model: nn.Module,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    prompt_lens: Tensor | Sequence[int] | None = None,
    response_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> Tensor:
    """[B, T] fp32, nats, of the distribution each response token was drawn from; NaN elsewhere.

    As `observe(entropy=True)` gives it, by a plain forward pass in which no attention is read, so it may be of any
    kind. Arguments and ValueErrors as in `observe`.
    """
    mask_BT, response_BT = _checked(input_ids, attention_mask, response_mask, cu_seqlens)
    if cu_seqlens is None:
        batch = PaddedBatch.from_mask(mask_BT, prompt_lens, response_BT)
    else:
        batch = PaddedBatch.from_cu_seqlens(cu_seqlens, prompt_lens, response_BT, input_ids.device)
    with torch.no_grad():
        output = _forward(model, input_ids, _inputs(batch, None if attention_mask is None else mask_BT, inputs))
        return _entropies(_logits(model, output), batch)


def _watched(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    prompt_lens: Tensor | Sequence[int] | None,
    response_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    more: Mapping[str, Any] | None,
    *,
    signals: SignalsConfig,
    groups: HeadGroups | None,
    stop: bool,
    span: bool = True,
) -> tuple[AttentionTap, object]:
    """A tap that has seen its forward pass, and the model's output, None if the pass stopped early."""
    mask_BT, response_BT = _checked(input_ids, attention_mask, response_mask, cu_seqlens)
    tap = AttentionTap(
        model,
        prompt_lens=prompt_lens,
        response_mask=response_BT,
        attention_mask=mask_BT if cu_seqlens is None else None,
        signals=signals,
        groups=groups,
        stop=stop,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.to(input_ids.device),
    )
    tap.needs_span = tap.needs_span and span
    inputs = _inputs(tap.batch, None if attention_mask is None else mask_BT, more)
    output = None
    with torch.no_grad(), tap:
        output = _forward(model, input_ids, inputs)
    return tap, output


def _checked(
    input_ids: Tensor, attention_mask: Tensor | None, response_mask: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """attention_mask, of ones if there is none, and response_mask, both [B, T] where the ids are."""
    check_dense("input_ids", input_ids)
    B, T = check_shape("input_ids", input_ids, ("B", "T"))
    if B == 0 or T == 0:
        raise ValueError(f"input_ids has shape [{B}, {T}]; it must hold at least one token")
    if input_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"input_ids has dtype {input_ids.dtype}; allowed are torch.int32 and torch.int64")
    for name, mask in (("attention_mask", attention_mask), ("response_mask", response_mask)):
        if mask is not None:
            check_dense(name, mask)
            check_shape(name, mask, (B, T))
    if cu_seqlens is not None:
        check_dense("cu_seqlens", cu_seqlens)
        if attention_mask is not None:
            raise ValueError("cu_seqlens and attention_mask are both given; a packed row has no padding")
        if B != 1 or cu_seqlens.ndim != 1 or len(cu_seqlens) < 2 or int(cu_seqlens[-1]) != T:
            ends = f" ends at {int(cu_seqlens[-1])}" if cu_seqlens.ndim == 1 and len(cu_seqlens) else ""
            raise ValueError(
                f"cu_seqlens of shape {list(cu_seqlens.shape)}{ends} for input_ids of shape [{B}, {T}]; it must be "
                "[sequences + 1] and end at T of one row [1, T]"
            )
    mask_BT = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.device)
    return mask_BT, None if response_mask is None else response_mask.to(input_ids.device)


def _inputs(batch: PaddedBatch, mask_BT: Tensor | None, more: Mapping[str, Any] | None) -> dict[str, Any]:
    """Of the forward pass, beside input_ids."""
    inputs: dict[str, Any] = {"attention_mask": None if mask_BT is None else mask_BT.long(), "use_cache": False}
    if batch.host.starts_late and not more:
        inputs["position_ids"] = batch.positions
    return inputs | dict(more or {})


def _forward(model: nn.Module, input_ids: Tensor, inputs: dict[str, Any]) -> object:
    """The model's output. Token ids are read only if it fails: reading them first would wait for the device."""
    try:
        return model(input_ids, **inputs)
    except IndexError as error:
        _check_ids(model, input_ids, error)
        raise


def _logits(model: nn.Module, output: object) -> Tensor:
    logits_BTV = getattr(output, "logits", None)
    if not isinstance(logits_BTV, Tensor):
        raise ValueError(f"entropy is True, but {type(model).__name__} gives no logits; it needs a language-model head")
    return logits_BTV


def _check_ids(model: nn.Module, input_ids_BT: Tensor, error: IndexError) -> None:
    """ValueError from `error` if the model has no embedding of some token id."""
    getter = getattr(model, "get_input_embeddings", None)
    embedding = getter() if callable(getter) else None
    if not isinstance(embedding, nn.Embedding):
        return
    lowest, highest = (int(x) for x in input_ids_BT.aminmax())
    if lowest < 0 or highest >= embedding.num_embeddings:
        bad = lowest if lowest < 0 else highest
        allowed = f"the model's vocabulary allows 0 to {embedding.num_embeddings - 1}"
        raise ValueError(f"input_ids holds {bad}; {allowed}") from error


def _entropies(logits_BTV: Tensor, batch: PaddedBatch) -> Tensor:
    """[B, T] fp32, nats, of the distribution each response token was drawn from: the logits before it.

    NaN outside the responses, and for a response token without a token before it.
    """
    batch = batch.to(logits_BTV.device)
    entropy_BT = torch.full(batch.real.shape, torch.nan, device=logits_BTV.device)
    row, position = batch.drawn_places
    size = max(1, ENTROPY_ELEMENTS // logits_BTV.shape[-1])
    for row_C, position_C in zip(torch.split(row, size), torch.split(position, size), strict=True):
        probs_CV = logits_BTV[row_C, position_C - 1].float().softmax(dim=-1)
        entropy_BT[row_C, position_C] = torch.special.entr(probs_CV).sum(dim=-1)
    return entropy_BT
