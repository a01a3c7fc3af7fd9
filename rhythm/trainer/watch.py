"""Measures during training whether the signals still have the properties that the method assumes.

Shape suffixes: B responses, T positions, n heads of the pool.
"""

from __future__ import annotations

import unicodedata
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rhythm.credit.config import CreditConfig
from rhythm.credit.gamma import batch_credit_weights
from rhythm.credit.heads import HeadGroups, shared_heads, turnover
from rhythm.credit.peaks import PeaksConfig, coupling, find_peaks, rotated_lift, within_reach
from rhythm.credit.signals import RhythmSignals
from rhythm.credit.strategies import STRATEGIES
from rhythm.tap.signals_config import SignalsConfig
from rhythm.trainer.metrics import Record, Stopwatch
from rhythm.trainer.rollout import ScoredRollout
from rhythm.trainer.step import Engines, credit_tokens


def watch_rhythm(
    engines: Engines,
    tokenizer: Any,
    scored: ScoredRollout,
    tap: SignalsConfig,
    credit: CreditConfig,
    *,
    groups: HeadGroups | None,
    before: HeadGroups | None,
) -> tuple[Record, HeadGroups]:
    """The metrics of these responses, and the head groups that all of them choose together, from one forward pass.

    rhythm_entropy_lift and rhythm_follow_lift: Table 2's couplings (the entropy at peaks of WAAD; peaks of FAI at a
    peak of WAAD or a token after it), as the excess over the same peaks rotated within their responses.
    rhythm_anchor_digits and rhythm_anchor_punctuation: shares of the anchors, the tokens that global_anchor selects,
    that have a digit or are punctuation and symbols alone; rhythm_token_…: the same of all response tokens.
    rhythm_mass_…: mean γ − 1 that each strategy would add as it is. rhythm_turnover_…: Jaccard distance of the head
    groups to `before`, NaN without.

    Args:
        groups: calibrated head groups, None where there are none.
        before: the head groups of the last call, one row.
    """
    rollout = scored.rollout
    quiet = CreditConfig(strategy="none")
    credited = credit_tokens(
        engines,
        rollout,
        tap,
        quiet,
        groups=groups,
        generator=torch.Generator(),
        watch=Stopwatch(),
        always_signals=True,
    )
    signals, mask_BT = credited.signals, rollout.response_mask
    if signals is None:
        raise RuntimeError("the engines gave no signals although they were asked for")
    entropy_BT = credited.log_probs.entropy
    now = shared_heads(signals.span.cpu(), tap.quantile)
    changed = turnover(before, now) if before is not None else (float("nan"),) * 2
    anchor_BT = _bonus("global_anchor", signals, entropy_BT, mask_BT, credit) > 0
    record = {
        **_lifts(signals, entropy_BT, mask_BT),
        **_kinds(rollout.input_ids, anchor_BT, mask_BT, tokenizer),
        **{
            f"rhythm_mass_{name}": (credit.gamma_amp - 1)
            * float(_bonus(name, signals, entropy_BT, mask_BT, credit)[mask_BT].double().mean())
            for name in STRATEGIES
            if name != "none"
        },
        "rhythm_turnover_local": changed[0],
        "rhythm_turnover_global": changed[1],
    }
    return record, now


def _bonus(name: str, signals: RhythmSignals, entropy_BT: Tensor, mask_BT: Tensor, credit: CreditConfig) -> Tensor:
    """[B, T] γ − 1 of a strategy as it is, in units of gamma_amp − 1."""
    as_is = {"mass": "as_is", "mean_preserving": False, "random_like": None}
    config = credit.model_copy(update={"strategy": name, "gamma_amp": 2.0, **as_is})
    generator = torch.Generator().manual_seed(0)
    return batch_credit_weights(signals, mask_BT, config, generator, entropy=entropy_BT) - 1


def _lifts(signals: RhythmSignals, entropy_BT: Tensor, mask_BT: Tensor) -> Record:
    config, at_waad, after_waad = PeaksConfig(), [], []
    for row in range(len(mask_BT)):
        waad, fai, entropy = (
            tuple(x_BT[row][mask_BT[row]].tolist()) for x_BT in (signals.waad, signals.fai, entropy_BT)
        )
        peaks = find_peaks(waad, config)
        reach = within_reach(peaks, len(waad), config.follow)
        at_waad.append(coupling(np.asarray(entropy), waad, peaks))
        after_waad.append(coupling(reach, fai, find_peaks(fai, config)))
    return {"rhythm_entropy_lift": rotated_lift(at_waad), "rhythm_follow_lift": rotated_lift(after_waad)}


def _kinds(ids_BT: Tensor, anchor_BT: Tensor, mask_BT: Tensor, tokenizer: Any) -> Record:
    texts = {token: tokenizer.decode([token]) for token in torch.unique(ids_BT[mask_BT]).tolist()}
    kinds = {
        "digits": {token for token, text in texts.items() if any(c.isdigit() for c in text)},
        "punctuation": {token for token, text in texts.items() if _is_punctuation(text)},
    }
    record = {}
    for who, where_BT in (("anchor", anchor_BT & mask_BT), ("token", mask_BT)):
        tokens = ids_BT[where_BT].tolist()
        for kind, of_kind in kinds.items():
            share = sum(token in of_kind for token in tokens) / len(tokens) if tokens else float("nan")
            record[f"rhythm_{who}_{kind}"] = share
    return record


def _is_punctuation(text: str) -> bool:
    """Whether all of it, spaces around it apart, is punctuation or symbols, and there is any."""
    bare = text.strip()
    return bool(bare) and all(unicodedata.category(c)[0] in "PS" for c in bare)
