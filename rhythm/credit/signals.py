"""From per-head statistics to the two signals per token: WAAD over the local heads, FAI over the global ones.

Shape suffixes: B sequences, n heads of the pool, T positions of input_ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rhythm.credit.heads import HeadGroups
from rhythm.shapes import check_shape


@dataclass(frozen=True, repr=False)
class RhythmSignals:
    """Token signals of a batch, at the positions of input_ids, detached; NaN wherever undefined.

    Attributes:
        waad: [B, T] fp32, tokens (eq. 9): how far each token looks back, clipped at the window; mean over
            local heads.
        fai: [B, T] fp32 (eq. 10): attention each token gets from the horizon ahead of it; mean over global
            heads. Also NaN where the horizon holds no response row, as for the last H_lo tokens.
        entropy: [B, T] fp32, nats, of the distribution each token was drawn from; None if it was not asked
            for.
        span: [B, n] fp32, tokens (eq. 7): mean distance each head looks back; NaN for a sequence without
            response rows, and where fixed groups made it needless.
        groups: the heads averaged over.
        heads: (layer, head of that layer) of each of the n columns of span and groups; empty if not known.
    """

    waad: Tensor
    fai: Tensor
    entropy: Tensor | None
    span: Tensor
    groups: HeadGroups
    heads: tuple[tuple[int, int], ...] = ()

    @property
    def layers(self) -> list[int]:
        """Indices of the layers whose heads are the columns, in their order."""
        return list(dict.fromkeys(layer for layer, _ in self.heads))

    def __repr__(self) -> str:
        B, T = self.waad.shape
        names = "waad, fai" if self.entropy is None else "waad, fai, entropy"
        where = f" of layers {self.layers}" if self.heads else ""
        return f"RhythmSignals({names} [{B}, {T}]; {self.span.shape[1]} heads{where})"

    @classmethod
    def cat(cls, parts: Sequence[RhythmSignals]) -> RhythmSignals:
        """All rows of `parts`, in order; head groups that a part's rows share are repeated for each of them.

        Raises ValueError without parts, and where they differ in T, in n, or in whether they have an entropy.
        """
        shapes = {(part.waad.shape[1], part.span.shape[1], part.entropy is None) for part in parts}
        if len(shapes) != 1:
            kinds = [f"T={T}, n={n}, entropy={'no' if none else 'yes'}" for T, n, none in sorted(shapes)]
            raise ValueError(
                f"parts: must be at least one, alike in T, n and entropy, got {'; '.join(kinds) or 'none'}"
            )
        entropies = [part.entropy for part in parts if part.entropy is not None]
        return cls(
            waad=torch.cat([part.waad for part in parts]),
            fai=torch.cat([part.fai for part in parts]),
            entropy=torch.cat(entropies) if entropies else None,
            span=torch.cat([part.span for part in parts]),
            groups=HeadGroups(
                local=torch.cat([part.groups.local.expand(part.span.shape) for part in parts]),
                global_=torch.cat([part.groups.global_.expand(part.span.shape) for part in parts]),
            ),
            heads=parts[0].heads,
        )


@dataclass(frozen=True)
class HeadStatistics:
    """What a forward pass says of each head of the pool, before heads are chosen; fp32, NaN where undefined.

    Attributes:
        span: [B, n], tokens.
        waad, fai: [B, n, T].
        response: bool [B, T], true on response tokens.
        heads: (layer, head of that layer) of each of the n columns.
    """

    span: Tensor
    waad: Tensor
    fai: Tensor
    response: Tensor
    heads: tuple[tuple[int, int], ...]

    def signals(self, groups: HeadGroups, entropy: Tensor | None = None) -> RhythmSignals:
        """See `aggregate`."""
        return aggregate(self.waad, self.fai, self.span, groups, self.response, entropy, self.heads)


def aggregate(
    waad_BnT: Tensor,
    fai_BnT: Tensor,
    span_Bn: Tensor,
    groups: HeadGroups,
    response_mask_BT: Tensor,
    entropy_BT: Tensor | None = None,
    heads: tuple[tuple[int, int], ...] = (),
) -> RhythmSignals:
    """Averages the per-head statistics over each sequence's local and global heads (eq. 8).

    The statistics are linear in the attention map, so this equals the statistics of the averaged maps. A head
    outside the group has no say, whatever its value; an undefined value of a head inside it leaves the mean
    undefined there.

    Args:
        waad_BnT, fai_BnT: [B, n, T] floating point, per head of the pool.
        span_Bn: [B, n].
        groups: of [B, n], or [1, n] for groups held fixed.
        response_mask_BT: [B, T], true on response tokens.
        entropy_BT: [B, T] nats.
        heads: (layer, head of that layer) of each head of the pool; empty if not known.

    Raises:
        ValueError: shapes that do not go together.
    """
    B, n, T = check_shape("waad", waad_BnT, ("B", "n", "T"))
    check_shape("fai", fai_BnT, (B, n, T))
    check_shape("span", span_Bn, (B, n))
    check_shape("response_mask", response_mask_BT, (B, T))
    for name, group in (("groups.local", groups.local), ("groups.global_", groups.global_)):
        check_shape(name, group, (1 if group.shape[:1] == (1,) else B, n))
    if heads and len(heads) != n:
        raise ValueError(f"heads has length {len(heads)}; it must be empty or have one entry per column of span, {n}")
    response_BT = response_mask_BT.bool()
    entropy = None
    if entropy_BT is not None:
        check_shape("entropy", entropy_BT, (B, T))
        entropy = entropy_BT.detach().float().masked_fill(~response_BT, torch.nan)
    return RhythmSignals(
        waad=_group_mean(waad_BnT, groups.local).masked_fill(~response_BT, torch.nan),
        fai=_group_mean(fai_BnT, groups.global_).masked_fill(~response_BT, torch.nan),
        entropy=entropy,
        span=span_Bn.detach().float(),
        groups=groups,
        heads=heads,
    )


def _group_mean(value_BnT: Tensor, group_Bn: Tensor) -> Tensor:
    """[B, T] mean over the heads of the group; NaN for an empty group."""
    # where, not a product with the mask: a NaN of a head outside the group stays outside.
    chosen_BnT = torch.where(group_Bn[..., None], value_BnT.detach().float(), 0.0)
    # Halves are added to halves, since elementwise additions round alike in any layout. The last bit of
    # torch's sum depends on how far the batch is padded, and γ selects tokens by comparing these values.
    while (n := chosen_BnT.shape[1]) > 1:
        half = n // 2
        pairs_BnT = chosen_BnT[:, :half] + chosen_BnT[:, half : 2 * half]
        chosen_BnT = torch.cat((pairs_BnT, chosen_BnT[:, 2 * half :]), dim=1)
    return chosen_BnT.sum(dim=1) / group_Bn.sum(dim=-1, keepdim=True)
