"""What the adapters for trainers share: options, which rows are responses, γ, and advantages × γ.

Shape suffixes: B responses, T positions.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.utils.rnn import pad_sequence

from rhythm.credit.advantages import token_advantages
from rhythm.credit.config import CreditConfig
from rhythm.credit.gamma import batch_credit_weights
from rhythm.credit.heads import HeadGroups
from rhythm.credit.signals import RhythmSignals
from rhythm.system.extras import needs
from rhythm.tap.attention_tap import AttentionTap
from rhythm.tap.observe import response_entropy
from rhythm.tap.rhythm_credit import RhythmCredit
from rhythm.tap.signals_config import SignalsConfig

ONE_RATIO = "one ratio for a whole response gives all its tokens the same advantage"


@cache
def credit_of_process() -> RhythmCredit:
    """The options in the environment variable RHYTHM_CREDIT, one object per process: YAML, or the path of a YAML file,
    with the sections `credit` and `signals` of a training run's configuration. Unset: the defaults of both.

    Raises:
        ValueError: a section or an option that there isn't, or options that go with no trainer's loop.
    """
    given = os.environ.get("RHYTHM_CREDIT", "")
    text = Path(given).read_text(encoding="utf-8") if given.endswith((".yaml", ".yml")) else given
    with needs("RHYTHM_CREDIT"):
        import yaml
    sections = yaml.safe_load(text) or {}
    if not isinstance(sections, Mapping) or (unknown := set(sections) - {"credit", "signals"}):
        what = sorted(unknown) if isinstance(sections, Mapping) else sections
        raise ValueError(f"RHYTHM_CREDIT holds {what!r}; it must be YAML with the sections credit and signals")
    credit = RhythmCredit(
        CreditConfig(**(sections.get("credit") or {})), signals=SignalsConfig(**(sections.get("signals") or {}))
    )
    if credit.signals.grouping != "sequence":
        raise ValueError(
            f"RHYTHM_CREDIT: grouping is {credit.signals.grouping!r}; it must be 'sequence' in a trainer of another "
            "project, whose ranks see parts of a batch and would each choose heads of their own"
        )
    return credit


def written_by_model(loss_masks: Sequence[Tensor]) -> list[bool]:
    """Whether each response counts at all.

    Args:
        loss_masks: [R] per response, 1 on tokens that the loss counts.

    Raises:
        ValueError: some of a response's tokens count and others don't, as with tools and several turns.
    """
    for row, mask in enumerate(loss_masks):
        if bool(mask.any()) and not bool(mask.all()):
            raise ValueError(
                f"the loss mask of response {row} leaves out {int((mask == 0).sum())} of its {len(mask)} tokens; token "
                "credit is for responses that the model wrote in one piece, without tools or further turns"
            )
    return [bool(mask.any()) for mask in loss_masks]


def response_mask(lens: Sequence[int], response_lens: Sequence[int], counts: Sequence[bool]) -> Tensor:
    """bool [B, T of the longest], true on the last tokens of each sequence, those of its response, if it counts."""
    lens_B1, of_response_B1 = (torch.tensor(list(x))[:, None] for x in (lens, response_lens))
    position_T = torch.arange(max(lens))
    inside_BT = (position_T >= lens_B1 - of_response_B1) & (position_T < lens_B1)
    return inside_BT & torch.tensor(list(counts))[:, None]


def gammas(
    credit: RhythmCredit,
    loss_masks: Sequence[Tensor],
    *,
    waad: Sequence[Tensor] | None = None,
    fai: Sequence[Tensor] | None = None,
    entropy: Sequence[Tensor] | None = None,
    generator: torch.Generator | None = None,
    whole_batch: Callable[[Tensor], Tensor] = lambda x: x,
) -> list[Tensor]:
    """γ of each response, fp32 [R] on the CPU.

    Args:
        loss_masks: [R] per response, 1 on tokens that the loss counts: all of them or none.
        waad, fai, entropy: [R] per response, of its tokens, as far as the strategy reads them.
        generator, whole_batch: as in `batch_credit_weights`.

    Raises:
        ValueError: what the strategy reads is missing; a loss mask that leaves out some tokens of a response.
    """
    lens = [len(mask) for mask in loss_masks]
    mask_BR = response_mask(lens, lens, written_by_model(loss_masks))
    signals = None
    if waad is not None and fai is not None:
        nothing = torch.empty(len(lens), 0)
        none_chosen = HeadGroups(nothing.bool(), nothing.bool())
        signals = RhythmSignals(_padded(waad), _padded(fai), None, nothing, none_chosen)
    gamma_BR = batch_credit_weights(
        signals,
        mask_BR,
        credit.config,
        generator,
        entropy=None if entropy is None else _padded(entropy),
        whole_batch=whole_batch,
    )
    return [gamma_R[:length] for gamma_R, length in zip(gamma_BR, lens, strict=True)]


def shaped(advantages: Sequence[Tensor], gamma: Sequence[Tensor], credit: RhythmCredit) -> list[Tensor]:
    """Advantages × γ where `apply_to` says so, [R] per response, of the advantages' type and device."""
    return [
        token_advantages(old[None], new.to(old.device)[None], torch.ones_like(old)[None], credit.config.apply_to)[0].to(
            old.dtype
        )
        for old, new in zip(advantages, gamma, strict=True)
    ]


def _padded(values: Sequence[Tensor]) -> Tensor:
    """fp32 [B, R of the longest] on the CPU, NaN behind the end."""
    return pad_sequence([x.detach().float().cpu() for x in values], batch_first=True, padding_value=torch.nan)


def read_rows(
    credit: RhythmCredit,
    model: nn.Module,
    input_ids_BT: Tensor,
    mask_BT: Tensor,
    prompt_lens_B: Tensor,
    rows: int,
    sharded: nn.Module | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> tuple[RhythmSignals | None, Tensor | None]:
    """What the strategy reads of a transformers model, as `RhythmCredit.read`, by passes over `rows` rows at a time.

    Args:
        sharded: the module to call in place of the model that it wraps, where parameters are gathered by the hooks of
            FSDP or ZeRO-3: a pass then runs to its end, and all ranks must make as many.
        inputs: more of the forward pass, as in `observe`, of all rows: with images there is one pass for all of them.
    """
    if inputs:
        rows = len(input_ids_BT)
    parts = [
        credit.read(model, input_ids, attention_mask=mask, prompt_lens=prompt_lens, inputs=inputs)
        if sharded is None
        else _whole_pass(credit, model, sharded, input_ids, mask, prompt_lens, inputs or {})
        for input_ids, mask, prompt_lens in zip(
            *(torch.split(x, rows) for x in (input_ids_BT, mask_BT, prompt_lens_B)), strict=True
        )
    ]
    signals = [part for part, _ in parts if part is not None]
    entropies = [entropy for _, entropy in parts if entropy is not None]
    return RhythmSignals.cat(signals) if signals else None, torch.cat(entropies) if entropies else None


@torch.no_grad()
def _whole_pass(
    credit: RhythmCredit,
    model: nn.Module,
    sharded: nn.Module,
    input_ids: Tensor,
    mask: Tensor,
    prompt_lens: Tensor,
    inputs: Mapping[str, Any],
) -> tuple[RhythmSignals | None, Tensor | None]:
    where: dict[str, Any] = {"attention_mask": mask, "prompt_lens": prompt_lens}
    reads = credit.config.reads
    if "entropy" in reads:
        entropy = response_entropy(sharded, input_ids, **where, inputs=inputs)
        if "attention" not in reads:
            return None, entropy
        raise ValueError("a strategy that reads both attention and entropy is not supported on sharded parameters")
    if not reads:
        return None, None
    tap = AttentionTap(model, signals=credit.signals, groups=credit.groups, **where)
    with tap:
        positions = {} if inputs else {"position_ids": tap.batch.positions}
        sharded(input_ids, attention_mask=mask.long(), use_cache=False, **positions, **inputs)
    return tap.signals(), None


def in_rows(tap: AttentionTap) -> dict[str, Tensor]:
    """WAAD and FAI of a pass that a tap has read, "waad" and "fai" [B, T] on the CPU; [B, n of the longest] of packed
    sequences.
    """
    signals = tap.signals()
    named = (("waad", signals.waad), ("fai", signals.fai))
    return {name: tap.batch.in_rows(value, torch.nan).cpu() for name, value in named}


def sum_over(group: distributed.ProcessGroup | None, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Adds up a tensor over a group's ranks, for `batch_credit_weights`; None: as it is."""

    def summed(x: Tensor) -> Tensor:
        if group is None:
            return x
        total = x.to(device, copy=True)
        distributed.all_reduce(total, group=group)
        return total.to(x.device)

    return summed


def require(fits: bool, name: str, value: object, allowed: str, why: str) -> None:
    """Raises ValueError, naming an option of the trainer, unless it fits."""
    if not fits:
        raise ValueError(f"{name} is {value!r}; it must be {allowed} for token credit: {why}")
