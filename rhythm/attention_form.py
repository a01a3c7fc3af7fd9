"""Which attention a layer computes, read off the call that computes it; anything else is refused by name.

The statistics are those of softmax(scale · q·kᵀ) over the keys up to the query, perhaps within a sliding
window, perhaps with capped scores. `attention_form` finds these in the call's mask and arguments. What
arguments don't tell (a sink or a bias inside the module, a kernel that ignores an argument) is caught by
`check_output`, which computes some rows of the attention itself and compares them with what the model got.

Shape suffixes: B sequences, T positions, H query heads, G key heads, V value heads, R query heads of one of
these, D head size, E value head size, P probed rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rhythm.padding import PaddedBatch

UNDERSTOOD = {"dropout", "scaling", "sliding_window", "softcap", "is_causal"}
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
    "s_aux": "attention sinks",
    "seq_idx": "sequences packed into one row",
}
REFUSED_ATTRIBUTES = {  # of the attention module: they change the map without showing in the arguments
    "is_cross_attention": "cross-attention",
    "reorder_and_upcast_attn": "reordered, upcast attention",
    "sinks": "attention sinks",
}
MASK_ROWS = 1024  # rows of a [T, T] mask compared at a time
# Largest error of a probed row relative to Σ_s A[t, s]·|v_s|, for arithmetic in full fp32 and for any other.
PRECISE, COARSE = 1e-3, 0.1


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
        mask: None, a 4D mask (bool, or float to be added to the scores), or flash attention's 2D padding
            mask.
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

    def heeded(self, name: str) -> Any:
        """The argument; None where the implementation has no such argument (sdpa has no softcap)."""
        return self.options.get(name) if name in inspect.signature(self.function).parameters else None

    def refusal(self, feature: str) -> UnsupportedAttention:
        return UnsupportedAttention(f"{self.where}: {feature}; statistics of such attention can't be computed")


@dataclass(frozen=True)
class AttentionForm:
    """Softmax over s ≤ t of score = scale·q_t·k_s, or of softcap·tanh(score / softcap) if there is a softcap.

    With a window, keys at a distance t − s ≥ window are hidden.
    """

    scale: float
    window: int | None
    softcap: float | None


class MaskReader:
    """Finds which keys the queries of a padded batch see. A mask shared by several layers is read once."""

    def __init__(self, batch: PaddedBatch) -> None:
        self.batch = batch
        # The mask is kept with its window: an id is only good as long as its object lives.
        self._windows: dict[int, tuple[Tensor, int | None]] = {}

    def window(self, call: AttentionCall) -> int | None:
        """The sliding window of causal attention among the batch's own tokens; None without one.

        Raises:
            UnsupportedAttention: tokens see anything else.
        """
        mask = call.mask
        if isinstance(mask, Tensor) and mask.ndim == 4:
            if id(mask) not in self._windows:
                self._windows[id(mask)] = (mask, _window_of_mask(call, mask, self.batch.to(mask.device)))
            return self._windows[id(mask)][1]
        batch = self.batch.to(call.query.device)
        if isinstance(mask, Tensor) and mask.ndim == 2 and "flash" in call.implementation:
            if mask.shape != batch.real.shape or (mask.bool() != batch.real).any():
                raise call.refusal("a padding mask other than the attention_mask given")
        elif mask is not None:
            kind = f"{mask.ndim}D tensor" if isinstance(mask, Tensor) else type(mask).__name__
            raise call.refusal(f"a mask of unknown kind ({kind}) for {call.implementation!r} attention")
        elif (batch.first > 0).any():
            raise call.refusal("no mask on the padding that the attention_mask given has before tokens")
        if batch.real.shape[1] > 1 and not _causal_without_mask(call):
            raise call.refusal("bidirectional attention")
        window = call.heeded("sliding_window")
        return None if window is None else int(window)


def attention_form(call: AttentionCall, masks: MaskReader) -> AttentionForm:
    """The form of the attention that the call computes among the tokens of the batch.

    Raises:
        UnsupportedAttention: it has no such form, or an argument may change the scores in a way unknown here.
    """
    for name, feature in REFUSED_ATTRIBUTES.items():
        value = getattr(call.module, name, None)
        if isinstance(value, Tensor) or value:
            raise call.refusal(f"{feature} ({name})")
    for name, value in call.options.items():
        if value is not None and name not in UNDERSTOOD | HARMLESS:
            feature = REFUSED.get(name, "an argument that may change the scores")
            raise call.refusal(f"{feature} ({name})")
    if call.options.get("dropout"):
        raise call.refusal("attention dropout, active in train mode")

    B, T = masks.batch.real.shape
    if call.query.ndim != 4 or call.query.shape[0] != B or call.query.shape[2] != T:
        raise call.refusal(f"queries of shape {list(call.query.shape)} for {B} sequences of {T} positions")
    if call.key.shape[0] != B or call.key.shape[2] != T:
        raise call.refusal(f"{call.key.shape[2]} keys for {T} queries: cross-attention, or a KV cache in use")

    scale = call.options.get("scaling")
    if scale is None:
        scale = call.query.shape[-1] ** -0.5
    if not isinstance(scale, int | float):
        raise call.refusal(f"a softmax scale that is not one number but a {type(scale).__name__}")
    return AttentionForm(float(scale), masks.window(call), call.heeded("softcap"))


def _causal_without_mask(call: AttentionCall) -> bool:
    if call.implementation == "eager":
        return False
    causal = call.options.get("is_causal")
    return bool(getattr(call.module, "is_causal", True) if causal is None else causal)


def _window_of_mask(call: AttentionCall, mask: Tensor, batch: PaddedBatch) -> int | None:
    """The window of a 4D mask, which must be the causal mask of the batch, perhaps with a sliding window."""
    B, T = batch.real.shape
    if mask.shape[-2:] != (T, T):
        raise call.refusal(f"a mask of shape {list(mask.shape)} for {T} positions")
    if mask.is_floating_point():
        hidden = mask <= torch.finfo(mask.dtype).min / 2
        mask = mask == 0
        if not (mask | hidden).all():
            raise call.refusal("a position bias (in the mask)")
    elif mask.dtype != torch.bool:
        raise call.refusal(f"a 4D mask of dtype {mask.dtype}")

    # The last token sees the whole sequence, or as much of it as the window lets it.
    last_B = batch.first + batch.lens - 1
    seen_BH = mask.expand(B, -1, T, T)[torch.arange(B, device=mask.device), :, last_B].sum(dim=-1)
    cut_short = seen_BH[seen_BH < batch.lens[:, None]]
    window = max(1, int(cut_short.max())) if len(cut_short) else None

    position_T = torch.arange(T, device=mask.device)
    for start in range(0, T, MASK_ROWS):
        rows = slice(start, start + MASK_ROWS)
        distance_RT = position_T[rows, None] - position_T
        visible_RT = distance_RT >= 0
        if window is not None:
            visible_RT &= distance_RT < window
        key_B11T, query_B1R1 = batch.real[:, None, None, :], batch.real[:, None, rows, None]
        seen_BHRT = mask[:, :, rows] & query_B1R1
        if (seen_BHRT & key_B11T & (distance_RT < 0)).any():
            raise call.refusal("bidirectional attention")
        if (seen_BHRT != (visible_RT & key_B11T & query_B1R1)).any():
            raise call.refusal("a mask other than the causal or sliding-window mask of the attention_mask given")
    return window


def check_output(call: AttentionCall, form: AttentionForm, batch: PaddedBatch, output: Tensor) -> None:
    """Computes the first, middle and last row of each sequence in this form and compares with the model's.

    Args:
        output: [B, T, H, E], of `call.run()`.

    Raises:
        UnsupportedAttention: they differ by more than rounding.
    """
    B, H, T, _ = call.query.shape
    batch = batch.to(call.query.device)
    if output.shape[:3] != (B, T, H):
        raise call.refusal(f"an attention output of shape {list(output.shape)}, not [{B}, {T}, {H}, …]")
    row_B1 = torch.arange(B, device=output.device)[:, None]
    step_BP = torch.stack([torch.zeros_like(batch.lens), batch.lens // 2, batch.lens - 1], dim=1)
    probed_BP = batch.first[:, None] + step_BP.clamp(min=0)

    # Eager attention rounds its scores to the model's type, so the probe does too.
    dtype = call.query.dtype if call.implementation == "eager" else torch.float32
    query_BPHD = call.query.transpose(1, 2)[row_B1, probed_BP].to(dtype)
    score_BPGRT = torch.einsum("bpgrd,bgtd->bpgrt", _grouped(query_BPHD, call.key.shape[1]), call.key.to(dtype))
    score_BPHT = (score_BPGRT * form.scale).flatten(2, 3).float()
    if form.softcap is not None:
        score_BPHT = form.softcap * torch.tanh(score_BPHT / form.softcap)
    distance_BPT = probed_BP[:, :, None] - torch.arange(T, device=output.device)
    visible_BPT = (distance_BPT >= 0) & batch.real[:, None, :]
    if form.window is not None:
        visible_BPT &= distance_BPT < form.window
    weight_BPHT = score_BPHT.masked_fill(~visible_BPT[:, :, None], -torch.inf).softmax(dim=-1)

    weight_BPVRT, value_BVTE = _grouped(weight_BPHT, call.value.shape[1]), call.value.float()
    ours_BPHE = torch.einsum("bpvrt,bvte->bpvre", weight_BPVRT, value_BVTE).flatten(2, 3)
    size_BPHE = torch.einsum("bpvrt,bvte->bpvre", weight_BPVRT, value_BVTE.abs()).flatten(2, 3)
    error_BH = (output[row_B1, probed_BP].float() - ours_BPHE).norm(dim=(1, 3))
    size_BH = size_BPHE.norm(dim=(1, 3))
    # A NaN of ours comes from NaN in the inputs or an empty sequence; a NaN of the model's alone disagrees.
    if not ((error_BH <= _tolerance(call, output) * size_BH) | size_BH.isnan()).all():
        raise call.refusal(
            f"an output of {call.implementation!r} attention that is not that of causal attention with {form}"
        )


def _grouped(x_BPHX: Tensor, groups: int) -> Tensor:
    """[B, P, H, X] → [B, P, groups, H / groups, X]."""
    B, P, H, X = x_BPHX.shape
    return x_BPHX.reshape(B, P, groups, H // groups, X)


def _tolerance(call: AttentionCall, output: Tensor) -> float:
    full = torch.float32, torch.float64
    precise = call.query.dtype in full and output.dtype in full and "flash" not in call.implementation
    if call.query.device.type == "cuda":
        precise = precise and torch.get_float32_matmul_precision() == "highest"
    return PRECISE if precise else COARSE
