"""Which attention a layer computes, read off the call that computes it; anything else is refused by name.

The statistics are those of softmax(scale · q·kᵀ) over the keys up to the query, perhaps within a sliding
window or a chunk, perhaps with capped scores or with sinks. `attention_form` finds these in the call's mask and
arguments. What arguments don't tell (a bias inside the module, a kernel that ignores an argument) is caught by
`rhythm.tap.output_check`, which compares some rows of the attention with what the model got.

Shape suffixes: B sequences, T positions, H query heads, G key heads, V value heads, D head size, E value head size,
R rows of a mask at a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_mask

from rhythm.tap.padding import PaddedBatch

UNDERSTOOD = {"dropout", "scaling", "sliding_window", "softcap", "s_aux", "is_causal"}
HARMLESS = {  # arguments that don't touch the scores
    "cache_position",
    "deterministic",
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_ids",
    "return_dict",
    "use_cache",
}
REFUSED = {
    "attention_bias": "an attention bias",
    "block_indices": "sparse attention",
    "cache": "a paged KV cache",
    "cu_seq_lens_k": "sequences packed into one row",
    "cu_seq_lens_q": "sequences packed into one row",
    "head_mask": "a head mask",
    "indices": "sparse attention",
    "position_bias": "a position bias",
    "seq_idx": "sequences packed into one row",
}
OF_PACKED_ROWS = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}  # if the batch is one
REFUSED_ATTRIBUTES = {  # of the attention module: they change the map without showing in the arguments
    "is_cross_attention": "cross-attention",
    "reorder_and_upcast_attn": "reordered, upcast attention",
}
MASK_ROWS = 1024  # rows of a [T, T] mask compared at a time


class UnsupportedAttention(ValueError):  # noqa: N818 (named like FileNotFound…: by what is wrong)
    """Attention of a kind whose statistics can't be computed; the message names model, layer and feature."""


@dataclass(frozen=True)
class AttentionCall:
    """One call of an attention function through transformers' attention interface.

    Attributes:
        where: model type and layer, for messages.
        layer: index of the layer, None if it has none.
        implementation: name of the attention implementation the model uses ("sdpa", "eager", …).
        function: that implementation.
        module: the attention layer.
        query: [B, H, T, D]; like key, after projection, norm and position embedding.
        key: [B, G, T, D].
        value: [B, V, T, E].
        mask: None, a 4D mask (bool, or float to be added to the scores), flash attention's 2D padding mask, or
            flex attention's BlockMask.
        options: keyword arguments of the call.
    """

    where: str
    layer: int | None
    implementation: str
    function: Callable[..., tuple[Tensor, Tensor | None]]
    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: object
    options: Mapping[str, Any]

    def run(self) -> tuple[Tensor, Tensor | None]:
        """What the model would have got: output [B, T, H, E], and the map if the implementation gives one."""
        return self.function(self.module, self.query, self.key, self.value, self.mask, **self.options)

    def effective_option(self, name: str) -> Any:
        """The argument; None where the implementation has no such argument (sdpa has no softcap)."""
        return self.options.get(name) if name in inspect.signature(self.function).parameters else None

    def refusal(self, feature: str) -> UnsupportedAttention:
        return UnsupportedAttention(f"{self.where}: {feature}; statistics of such attention can't be computed")


@dataclass(frozen=True)
class AttentionForm:
    """Softmax over s ≤ t of score = scale·q_t·k_s, or of softcap·tanh(score / softcap) if there is a softcap.

    With a window, keys at a distance t − s ≥ window are hidden; with a chunk, keys of the sequence's earlier chunks of
    that many tokens (chunks.py). sinks [H]: one more logit in each row's denominator.
    """

    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None = None
    chunk: int | None = None

    def __str__(self) -> str:
        chunk = "" if self.chunk is None else f", chunk={self.chunk}"
        sinks = "" if self.sinks is None else ", sinks"
        return f"scale={self.scale}, window={self.window}, softcap={self.softcap}{chunk}{sinks}"

    def arguments(self, longest: int) -> dict[str, Any]:
        """Of the ops, for sequences of at most `longest` tokens: a window that hides nothing is none. The ops have no
        chunks: sequences are cut at them.
        """
        return {
            "scale": self.scale,
            "sliding_window": None if self.window is None or self.window >= longest else self.window,
            "softcap": self.softcap,
            "sinks": None if self.sinks is None else self.sinks.detach(),
        }


class DeferredChecks:
    """Which checks of tensors' values failed, kept on the device until `settle` reads all of them at once."""

    def __init__(self) -> None:
        self._pending: list[tuple[Tensor, UnsupportedAttention]] = []

    def refuse_if(self, wrong: Tensor, refusal: UnsupportedAttention) -> None:
        """wrong: bool, one element."""
        self._pending.append((wrong, refusal))

    def settle(self) -> None:
        """Waits for the device, once. Raises the first refusal whose check failed, and again when called again."""
        if not self._pending:
            return
        device = self._pending[0][0].device
        failed = torch.stack([wrong.to(device) for wrong, _ in self._pending]).tolist()
        for is_wrong, (_, refusal) in zip(failed, self._pending, strict=True):
            if is_wrong:
                raise refusal
        self._pending = []


class ImmediateChecks(DeferredChecks):
    """Reads the outcome of each check where it is made, waiting for the device each time."""

    def refuse_if(self, wrong: Tensor, refusal: UnsupportedAttention) -> None:
        super().refuse_if(wrong, refusal)
        self.settle()


class MaskReader:
    """Finds which keys the queries of a padded batch see. A mask shared by several layers is read once.

    Args:
        checks: what collects the checks of masks' values. None: each is read at once, and so are the windows of 4D
            masks. Else nothing here waits for the device: the window of a 4D mask is the one that the layer's
            arguments or configuration name, and that the mask has no other is one of the checks.
        prompts: whether the tokens of prompts must see what those of responses do. Not where only rows of responses
            are read: the images in a prompt may see themselves whole.
    """

    def __init__(self, batch: PaddedBatch, checks: DeferredChecks | None = None, *, prompts: bool = True) -> None:
        self.batch = batch
        self._checks = checks
        self._prompts = prompts
        self._elsewhere: dict[torch.device, PaddedBatch] = {}
        # The mask is kept with its window: an id is only good as long as its object lives.
        self._windows: dict[tuple[int, int | None, int | None], tuple[object, int | None]] = {}

    def on(self, device: torch.device) -> PaddedBatch:
        """The batch on a device, copied there once."""
        if device not in self._elsewhere:
            self._elsewhere[device] = self.batch.to(device)
        return self._elsewhere[device]

    def window(self, call: AttentionCall) -> int | None:
        """The sliding window of causal attention among the batch's own tokens; None without one.

        Raises:
            UnsupportedAttention: tokens see anything else; from the checks, where there are some.
        """
        mask = call.mask
        if (isinstance(mask, Tensor) and mask.ndim == 4) or isinstance(mask, BlockMask):
            named, chunk = None if self._checks is None else _named_window(call), self.chunk(call)
            if (id(mask), named, chunk) not in self._windows:
                dense = self._dense(call, mask) if isinstance(mask, BlockMask) else mask
                self._windows[id(mask), named, chunk] = (mask, self._window_of_mask(call, dense, named, chunk))
            return self._windows[id(mask), named, chunk][1]
        if isinstance(mask, Tensor) and mask.ndim == 2 and "flash" in call.implementation:
            batch, refusal = self.on(mask.device), call.refusal("a padding mask other than the attention_mask given")
            if mask.shape != batch.real.shape:
                raise refusal
            if (id(mask), None, None) not in self._windows:
                self._windows[id(mask), None, None] = (mask, None)
                (self._checks or ImmediateChecks()).refuse_if((mask.bool() != batch.real).any(), refusal)
        elif mask is not None:
            kind = f"{mask.ndim}D tensor" if isinstance(mask, Tensor) else type(mask).__name__
            raise call.refusal(f"a mask of unknown kind ({kind}) for {call.implementation!r} attention")
        elif self.batch.one_row:
            if "flash" not in call.implementation and self.batch.host.longest < self.batch.real.shape[1]:
                raise call.refusal("no mask that keeps the sequences of cu_seqlens apart (position_ids start again)")
        elif self.batch.host.starts_late:
            raise call.refusal("no mask on the padding that the attention_mask given has before tokens")
        if self.batch.real.shape[1] > 1 and not _causal_without_mask(call):
            raise call.refusal("bidirectional attention")
        window = call.effective_option("sliding_window")
        return None if window is None else int(window)

    def chunk(self, call: AttentionCall) -> int | None:
        """Tokens of the chunks that the layer's configuration names; None where no sequence has two of them. That the
        mask has them is one of the checks in `window`.
        """
        config = getattr(call.module, "config", None)
        kinds, chunk = getattr(config, "layer_types", None), getattr(config, "attention_chunk_size", None)
        if kinds is None or call.layer is None or kinds[call.layer] != "chunked_attention" or not chunk:
            return None
        masked = isinstance(call.mask, BlockMask) or (isinstance(call.mask, Tensor) and call.mask.ndim == 4)
        return int(chunk) if masked and chunk < self.batch.host.longest else None

    def _dense(self, call: AttentionCall, mask: BlockMask) -> Tensor:
        """A BlockMask as the bool [B, 1, T, T] mask it describes, T² bytes per sequence while it is checked."""
        batches, heads, queries, keys = mask.shape
        B, T = self.batch.real.shape
        if heads != 1 or batches not in (1, B) or (queries, keys) != (T, T):
            raise call.refusal(f"a BlockMask of shape {list(mask.shape)} for {B} sequences of {T} positions")
        return create_mask(mask.mask_mod, batches, 1, T, T, device=str(call.query.device))

    def _window_of_mask(self, call: AttentionCall, mask: Tensor, named: int | None, chunk: int | None) -> int | None:
        """The window of a 4D mask, which must be the causal mask of the batch, perhaps with a sliding window, or that
        of its chunks.
        """
        batch = self.on(mask.device)
        T = batch.real.shape[1]
        if mask.shape[-2:] != (T, T):
            raise call.refusal(f"a mask of shape {list(mask.shape)} for {T} positions")
        if not mask.is_floating_point() and mask.dtype != torch.bool:
            raise call.refusal(f"a 4D mask of dtype {mask.dtype}")
        visible = mask == 0 if mask.is_floating_point() else mask
        if chunk is not None:
            window = None
        elif self._checks is None:
            window = _window_seen(visible, batch)
        else:
            window = named if named is not None and named < batch.host.longest else None
        rows_BT = batch.real if self._prompts else batch.response
        _check_mask(call, mask, visible, batch, rows_BT, window, chunk, self._checks or ImmediateChecks())
        return window


def attention_form(call: AttentionCall, masks: MaskReader, *, in_rows: bool = True) -> AttentionForm:
    """The form of the attention that the call computes among the tokens of the batch.

    Args:
        in_rows: whether query and key are at the positions of the batch, [B, H, T, D]; else only the mask is.

    Raises:
        UnsupportedAttention: it has no such form, or an argument may change the scores in a way unknown here.
    """
    for name, feature in REFUSED_ATTRIBUTES.items():
        value = getattr(call.module, name, None)
        if isinstance(value, Tensor) or value:
            raise call.refusal(f"{feature} ({name})")
    for name, value in call.options.items():
        known = UNDERSTOOD | HARMLESS | (OF_PACKED_ROWS if masks.batch.one_row else set())
        if value is not None and name not in known:
            feature = REFUSED.get(name, "an argument that may change the scores")
            raise call.refusal(f"{feature} ({name})")
    if call.options.get("dropout"):
        raise call.refusal("attention dropout, active in train mode")

    if in_rows:
        _check_positions(call, masks.batch)
    scale = call.options.get("scaling")
    if scale is None:
        scale = call.query.shape[-1] ** -0.5
    if not isinstance(scale, int | float):
        raise call.refusal(f"a softmax scale that is not one number but a {type(scale).__name__}")
    window, softcap = masks.window(call), call.effective_option("softcap")
    return AttentionForm(float(scale), window, softcap, _sinks(call), masks.chunk(call))


def _check_positions(call: AttentionCall, batch: PaddedBatch) -> None:
    B, T = batch.real.shape
    if call.query.ndim != 4 or call.query.shape[0] != B or call.query.shape[2] != T:
        raise call.refusal(f"queries of shape {list(call.query.shape)} for {B} sequences of {T} positions")
    if call.key.shape[0] != B or call.key.shape[2] != T:
        raise call.refusal(f"{call.key.shape[2]} keys for {T} queries: cross-attention, or a KV cache in use")


def _sinks(call: AttentionCall) -> Tensor | None:
    """The sinks that the implementation heeds; eager attention takes them from the module itself."""
    sinks = call.effective_option("s_aux")
    if sinks is None and call.implementation == "eager":
        sinks = getattr(call.module, "sinks", None)
    if sinks is not None and (not isinstance(sinks, Tensor) or sinks.shape != call.query.shape[1:2]):
        raise call.refusal(f"attention sinks other than one per head, [{call.query.shape[1]}]")
    return sinks


def _causal_without_mask(call: AttentionCall) -> bool:
    if call.implementation == "eager":
        return False
    causal = call.options.get("is_causal")
    return bool(getattr(call.module, "is_causal", True) if causal is None else causal)


def _named_window(call: AttentionCall) -> int | None:
    """The sliding window that the layer's arguments name, or its configuration where they have no such argument."""
    if "sliding_window" in call.options:
        window = call.options["sliding_window"]
    else:
        config = getattr(call.module, "config", None)
        kinds = getattr(config, "layer_types", None)
        slides = kinds is None or call.layer is None or "sliding" in kinds[call.layer]
        window = getattr(config, "sliding_window", None) if slides else None
    return int(window) if window else None  # some configurations say 0 for none


def _window_seen(visible: Tensor, batch: PaddedBatch) -> int | None:
    """The window by which the mask cuts the longest sequences short. Waits for the device."""
    B, T = batch.real.shape
    # The last token sees the whole sequence, or as much of it as the window lets it.
    last_B = batch.first + batch.lens - 1
    seen_BH = visible.expand(B, -1, T, T)[torch.arange(B, device=visible.device), :, last_B].sum(dim=-1)
    cut_short = seen_BH[seen_BH < batch.lens[:, None]]
    return max(1, int(cut_short.max())) if len(cut_short) else None


def _check_mask(
    call: AttentionCall,
    mask: Tensor,
    visible: Tensor,
    batch: PaddedBatch,
    rows_BT: Tensor,
    window: int | None,
    chunk: int | None,
    checks: DeferredChecks,
) -> None:
    """Refuses a mask other than the causal one of the batch, with the window or the chunks if there are some, in these
    rows.
    """
    if mask.is_floating_point():
        hidden = mask <= torch.finfo(mask.dtype).min / 2
        checks.refuse_if(~(visible | hidden).all(), call.refusal("a position bias (in the mask)"))
    T = batch.real.shape[1]
    position_T = torch.arange(T, device=mask.device)
    ahead, other = torch.zeros((2,), dtype=torch.bool, device=mask.device)
    for start in range(0, T, MASK_ROWS):
        rows = slice(start, start + MASK_ROWS)
        distance_RT = position_T[rows, None] - position_T
        visible_RT = distance_RT >= 0
        if window is not None:
            visible_RT &= distance_RT < window
        if batch.one_row:
            visible_RT &= batch.sequence[rows, None] == batch.sequence
        if chunk is not None:
            chunk_BT = batch.positions // chunk
            visible_RT = visible_RT & (chunk_BT[:, None, rows, None] == chunk_BT[:, None, None])
        key_B11T, query_B1R1 = batch.real[:, None, None, :], rows_BT[:, None, rows, None]
        seen_BHRT = visible[:, :, rows] & query_B1R1
        ahead = ahead | (seen_BHRT & key_B11T & (distance_RT < 0)).any()
        other = other | (seen_BHRT != (visible_RT & key_B11T & query_B1R1)).any()
    checks.refuse_if(ahead, call.refusal("bidirectional attention"))
    unlike = "a mask other than the causal or sliding-window mask of the attention_mask given"
    if batch.one_row:
        checks.refuse_if(other, call.refusal(unlike.replace("attention_mask", "cu_seqlens")))
        return
    # Told apart only to be named: tokens that see themselves, but not each other, belong to two texts.
    after_B1T = batch.real[:, None, 1:] & batch.real[:, None, :-1]
    itself_BHT = visible.diagonal(0, -2, -1)
    begins_BHT = itself_BHT[..., 1:] & itself_BHT[..., :-1] & ~visible.diagonal(-1, -2, -1)
    checks.refuse_if(
        other & (begins_BHT & after_B1T).any() if window != 1 else torch.zeros_like(other),
        call.refusal(
            "packed rows, or chunks (position_ids or the mask start again within a row; give each text its own row, or "
            "cu_seqlens)"
        ),
    )
    checks.refuse_if(other, call.refusal(unlike))
