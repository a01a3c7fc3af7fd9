"""Checks an attention output against the form of attention that was read off its call.

What a call's arguments don't show (a sink or a bias inside the module, a kernel that ignores an argument) shows here:
some rows of the attention are computed and compared with what the model got.

Shape suffixes: B sequences, T positions, H query heads, G key heads, V value heads, R query heads of one of these,
C positions at a time, D head size, E value head size, P probed rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rhythm.tap.attention_form import AttentionCall, AttentionForm, DeferredChecks, ImmediateChecks
from rhythm.tap.padding import PaddedBatch

CHECKED_ELEMENTS = 2**22  # of keys or of values that check_output holds in fp32 at a time: 16 MB
CHECKED_SEQUENCES = 16  # of a batch, evenly spread: what the form lacks is a matter of the layer, not of a sequence
# Largest error of a probed row relative to Σ_s A[t, s]·|v_s|, for arithmetic in full fp32 and for any other.
PRECISE, COARSE = 1e-3, 0.1


def check_output(
    call: AttentionCall,
    form: AttentionForm,
    batch: PaddedBatch,
    output: Tensor,
    checks: DeferredChecks | None = None,
    rows: Tensor | None = None,
    lse: Tensor | None = None,
) -> None:
    """Computes the first, middle and last row of up to CHECKED_SEQUENCES responses in this form and compares with the
    model's; of a sequence without a response, the last.

    Args:
        batch: on the call's device.
        output: [B, T, H, E], of `call.run()`.
        checks: what collects the outcome. None: it is read at once, which waits for the device.
        rows: int64 [T], where query and output have the rows of the T positions of the keys, for a packed row with
            fewer rows than keys. None: at the same positions.
        lse: [B, H, T], of the same rows as output, compared too; None: there is none.

    Raises:
        UnsupportedAttention: they differ by more than rounding; from the checks, where there are some.
    """
    B, H, queries, _ = call.query.shape
    T = call.key.shape[2]
    batch = batch.to(call.query.device)
    if output.shape[:3] != (B, queries, H):
        raise call.refusal(f"an attention output of shape {list(output.shape)}, not [{B}, {queries}, {H}, …]")
    query, key, value, real_BT, first, lens = call.query, call.key, call.value, batch.real, batch.first, batch.lens
    prompts, position_BT = batch.prompt_lens, batch.positions
    if len(lens) > CHECKED_SEQUENCES:
        some = torch.linspace(0, len(lens) - 1, CHECKED_SEQUENCES, device=lens.device).round().long()
        first, lens, prompts = first[some], lens[some], prompts[some]
        if not batch.one_row:
            query, key, value, output = (x[some] for x in (query, key, value, output))
            lse = None if lse is None else lse[some]
            real_BT, position_BT = real_BT[some], position_BT[some]
    B = len(query)  # rows that are looked at, with P probes in each: three of each sequence
    begin = torch.minimum(prompts, lens - 1)
    row_B1 = torch.arange(B, device=output.device)[:, None]
    step_BP = torch.stack([begin, (begin + lens) // 2, lens - 1], dim=1)
    probed_BP = (first[:, None] + step_BP.clamp(min=0)).clamp(max=T - 1).view(B, -1)

    at_BP = probed_BP if rows is None else rows[probed_BP]

    # Eager attention rounds its scores to the model's type, so the probe does too.
    dtype = call.query.dtype if call.implementation == "eager" else torch.float32
    query_BPHD = query.transpose(1, 2)[row_B1, at_BP].to(dtype)
    query_BPGRD = _grouped(query_BPHD, key.shape[1])
    score_BPHT = torch.cat(
        [
            (torch.einsum("bpgrd,bgtd->bpgrt", query_BPGRD, key_BGCD.to(dtype)) * form.scale).flatten(2, 3).float()
            for key_BGCD in _some_at_a_time(key)
        ],
        dim=-1,
    )
    if form.softcap is not None:
        score_BPHT = form.softcap * torch.tanh(score_BPHT / form.softcap)
    distance_BPT = probed_BP[:, :, None] - torch.arange(T, device=output.device)
    visible_BPT = (distance_BPT >= 0) & real_BT[:, None, :]
    if batch.one_row:
        visible_BPT &= distance_BPT <= (probed_BP - first.repeat_interleave(3))[..., None]
    if form.window is not None:
        visible_BPT &= distance_BPT < form.window
    if form.chunk is not None:
        chunk_BT = position_BT // form.chunk
        visible_BPT &= chunk_BT.gather(1, probed_BP)[:, :, None] == chunk_BT[:, None]
    score_BPHT = score_BPHT.masked_fill(~visible_BPT[:, :, None], -torch.inf)
    if form.sinks is not None:
        sink_BPH1 = form.sinks.float()[:, None].expand(*score_BPHT.shape[:-1], 1)
        score_BPHT = torch.cat([score_BPHT, sink_BPH1], dim=-1)
    checks = checks or ImmediateChecks()
    if lse is not None:
        _check_lse(call, form, lse.transpose(1, 2)[row_B1, at_BP], score_BPHT.logsumexp(dim=-1), output, checks)
    weight_BPHT = score_BPHT.softmax(dim=-1)[..., :T]

    ours_BPHE = size_BPHE = torch.zeros((), device=output.device)
    start = 0
    for value_BVCE in _some_at_a_time(value):
        value_BVCE = value_BVCE.float()
        end = start + value_BVCE.shape[2]
        weight_BPVRC = _grouped(weight_BPHT[..., start:end], value.shape[1])
        ours_BPHE = ours_BPHE + torch.einsum("bpvrc,bvce->bpvre", weight_BPVRC, value_BVCE).flatten(2, 3)
        size_BPHE = size_BPHE + torch.einsum("bpvrc,bvce->bpvre", weight_BPVRC, value_BVCE.abs()).flatten(2, 3)
        start = end
    # Of each sequence and head: over its three rows.
    E = output.shape[-1]
    error = (output[row_B1, at_BP].float() - ours_BPHE).view(B, -1, 3, H, E).norm(dim=(2, 4))
    size = size_BPHE.view(B, -1, 3, H, E).norm(dim=(2, 4))
    # A NaN of ours comes from NaN in the inputs or an empty sequence; a NaN of the model's alone disagrees.
    agrees = (error <= _tolerance(call, output) * size) | size.isnan()
    checks.refuse_if(
        ~agrees.all(),
        call.refusal(
            f"an output of {call.implementation!r} attention that is not that of causal attention with {form}"
        ),
    )


def _check_lse(
    call: AttentionCall, form: AttentionForm, lse_BPH: Tensor, ours_BPH: Tensor, output: Tensor, checks: DeferredChecks
) -> None:
    """Refuses an lse whose error would change weights by more than the output's may be off."""
    error_BPH = (lse_BPH.float() - ours_BPH).abs()
    agrees = (error_BPH <= _tolerance(call, output) * ours_BPH.abs().clamp(min=1)) | ~ours_BPH.isfinite()
    checks.refuse_if(
        ~agrees.all(), call.refusal(f"an lse of {call.implementation!r} attention that is not that of {form}")
    )


def _some_at_a_time(x_BGTX: Tensor) -> tuple[Tensor, ...]:
    """[B, G, C, X] views of up to CHECKED_ELEMENTS elements: a copy of all keys or values would be as large as they."""
    B, G, _, X = x_BGTX.shape
    return torch.split(x_BGTX, max(1, CHECKED_ELEMENTS // max(1, B * G * X)), dim=2)


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
