"""How γ depends on its settings: recomputed for a grid of them from the kept statistics of single heads.

γ is computed as in training (`rhythm.credit`), but without `mass` and `mean_preserving`, which change how much credit
there is and not where it goes.

Shape suffixes: R responses, B of them at a time, T positions (padding on the right), n heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rhythm.analysis.config import AnalysisConfig
from rhythm.analysis.grid import SensitivityConfig, Setting, own_values, text_of
from rhythm.analysis.kept_heads import HeadKeeper, KeptHeads
from rhythm.analysis.response import Number
from rhythm.analysis.results import Analysis
from rhythm.credit.config import CreditConfig
from rhythm.credit.gamma import batch_credit_weights
from rhythm.credit.heads import HeadGroups, select_heads
from rhythm.credit.signals import HeadStatistics, RhythmSignals
from rhythm.tap.signals_config import SignalsConfig

TOKENS_AT_ONCE = 2**13  # of a batch, with its padding
THIRDS = 3


@dataclass(frozen=True)
class SettingResult:
    """γ by one setting, compared with γ by the analysis' own; means over the responses where they are defined.

    Attributes:
        changed: key → value as text, of the settings that differ from the analysis' own; empty: these themselves.
        jaccard: |A ∩ B| / |A ∪ B| of the tokens with γ > 1 by this setting and by the analysis' own.
        chosen: fraction of the tokens with γ > 1.
        mass: mean of γ − 1 over the tokens.
        moved: fraction of the credit that is on other tokens: with γ − 1 of either setting divided by its sum, half the
            sum of the absolute differences.
        position: mean place of the credit in the response, 0 at its beginning and 1 at its end.
        first, middle, last: fraction of the credit in each third of the response.
    """

    changed: dict[str, str]
    jaccard: Number
    chosen: Number
    mass: Number
    moved: Number
    position: Number
    first: Number
    middle: Number
    last: Number


@dataclass(frozen=True)
class Sensitivity:
    """The results for a grid of settings.

    Attributes:
        names: of the responses.
        own: key → the analysis' own value, as text.
        values: key → the other values.
        settings: the analysis' own, then those with one change, two, …
    """

    names: tuple[str, ...]
    own: dict[str, str]
    values: dict[str, tuple[str, ...]]
    settings: tuple[SettingResult, ...]


def measure_sensitivity(
    model: Any,
    tokenizer: Any,
    analysis: Analysis,
    config: SensitivityConfig,
    progress: Callable[[str], object] = lambda doing: None,
) -> Sensitivity:
    """γ of the responses of an analysis for every setting of the grid.

    Args:
        progress: called with what is being done.

    Raises ValueError where γ of the analysis reads no attention, and as `HeadKeeper` does.
    """
    own = AnalysisConfig.model_validate(analysis.settings)
    if "attention" not in own.credit.reads:
        raise ValueError(f"credit.strategy is {own.credit.strategy!r}, which reads no attention: nothing to compare")
    settings = list(config.settings(own.credit, own.signals))
    depth = analysis.heads.layers
    readable = [layer for layer in range(depth) if not all(map(math.isnan, analysis.heads.span[layer]))]
    wanted = list(dict.fromkeys(setting.signals for setting in settings))
    keeper = HeadKeeper(
        model,
        tokenizer,
        analysis,
        layers=[layer for signals in wanted for layer in signals.layers_of(depth, readable)],
        windows=list(dict.fromkeys(signals.window for signals in wanted)),
        horizons=list(dict.fromkeys(signals.horizon for signals in wanted)),
    )
    kept: list[KeptHeads] = []
    for number, response in enumerate(analysis.responses()):
        progress(f"heads of response {response.name}, {number + 1} of {len(analysis.names)}")
        kept.append(keeper.heads(response))
    progress(f"γ by {len(settings):,} settings")
    results = compare(kept, settings, lambda signals: signals.layers_of(depth, readable))
    texts = {key: text_of(value) for key, value in own_values(own.credit, own.signals).items()}
    others = {key: tuple(map(text_of, values)) for key, values in config.others(own.credit, own.signals).items()}
    return Sensitivity(analysis.names, texts, others, tuple(results))


def compare(
    kept: Sequence[KeptHeads], settings: Sequence[Setting], layers_of: Callable[[SignalsConfig], list[int]]
) -> list[SettingResult]:
    """γ by each of `settings`, compared with the first. layers_of: the layers that a setting of the signals reads."""
    sums = _Sums(len(settings))
    places: dict[SignalsConfig, list[int]] = {}
    for i, setting in enumerate(settings):
        places.setdefault(setting.signals, []).append(i)
    pools = _Pools(kept, layers_of)
    for batch in _batches(kept, pools):
        own_BT: Tensor | None = None
        for signals_config, members in places.items():
            signals = batch.signals(signals_config)
            for i in members:
                bonus_BT = batch_credit_weights(signals, batch.mask_BT, _bare(settings[i].credit)) - 1
                own_BT = bonus_BT if own_BT is None else own_BT
                sums.add(i, batch.measures(bonus_BT, own_BT))
    return [SettingResult(s.changed, *row) for s, row in zip(settings, sums.means(), strict=True)]


@cache
def _bare(credit: CreditConfig) -> CreditConfig:
    return credit.model_copy(update={"mass": "as_is", "mean_preserving": False})


class _Sums:
    """Sums of measures over responses, and the number of those where they are defined."""

    def __init__(self, settings: int) -> None:
        measures = len(SettingResult.__dataclass_fields__) - 1
        self._sum, self._count = np.zeros((2, settings, measures))

    def add(self, setting: int, measures: Tensor) -> None:
        """measures: [number, B], NaN where undefined."""
        self._sum[setting] += measures.nansum(dim=1).numpy()
        self._count[setting] += (~measures.isnan()).sum(dim=1).numpy()

    def means(self) -> list[list[float]]:
        with np.errstate(invalid="ignore"):
            rows: list[list[float]] = (self._sum / self._count).tolist()
        return rows


class _Pools:
    """The pool of heads, and its groups for all responses, by the settings of the signals."""

    def __init__(self, kept: Sequence[KeptHeads], layers_of: Callable[[SignalsConfig], list[int]]) -> None:
        self._layers_n, self._layers_of = kept[0].layers, layers_of
        self._span_Rn = torch.stack([each.span for each in kept])
        self._groups: dict[tuple[Any, ...], HeadGroups] = {}

    def places(self, signals: SignalsConfig) -> Tensor:
        """Of the pool's heads among those kept, int64."""
        return torch.isin(self._layers_n, torch.tensor(self._layers_of(signals))).nonzero()[:, 0]

    def of(self, signals: SignalsConfig, rows: Sequence[int]) -> tuple[Tensor, HeadGroups]:
        """(spans, groups) [B, n] of these responses."""
        span_Rn = self._span_Rn[:, self.places(signals)]
        key = signals.layers, signals.quantile, signals.per
        if key not in self._groups:
            self._groups[key] = select_heads(span_Rn, signals.quantile, signals.per)
        groups = self._groups[key]
        return span_Rn[rows], HeadGroups(groups.local[rows], groups.global_[rows])


class _Batch:
    """Responses of similar length."""

    def __init__(self, kept: Sequence[KeptHeads], rows: list[int], pools: _Pools) -> None:
        self._rows, self._pools = rows, pools
        self._kept = [kept[row] for row in rows]
        lens_B = torch.tensor([_length(each) for each in self._kept])
        self._lens_B1 = lens_B[:, None]
        position_T = torch.arange(int(lens_B.max()))
        self.mask_BT = position_T < self._lens_B1
        self._place_BT = (position_T + 0.5) / self._lens_B1
        third_BT = (THIRDS * self._place_BT).long().clamp(max=THIRDS - 1)
        self._third_BT3 = torch.nn.functional.one_hot(third_BT, THIRDS).float()
        self._padded: dict[tuple[str, Any], Tensor] = {}

    def signals(self, config: SignalsConfig) -> RhythmSignals:
        span_Bn, groups = self._pools.of(config, self._rows)
        places = self._pools.places(config)
        waad_BnT, fai_BnT = self._all_heads("waad", config.window), self._all_heads("fai", config.horizon)
        statistics = HeadStatistics(span_Bn, waad_BnT[:, places], fai_BnT[:, places], self.mask_BT, ())
        return statistics.signals(groups)

    def measures(self, bonus_BT: Tensor, own_BT: Tensor) -> Tensor:
        """[number, B], in the order of SettingResult's fields; NaN where undefined."""
        chosen_BT, own_chosen_BT = bonus_BT > 0, own_BT > 0
        both_B = (chosen_BT & own_chosen_BT).sum(dim=1)
        either_B = (chosen_BT | own_chosen_BT).sum(dim=1)
        share_BT, own_share_BT = (x / x.sum(dim=1, keepdim=True) for x in (bonus_BT, own_BT))
        return torch.stack(
            [
                both_B / either_B,
                chosen_BT.sum(dim=1) / self._lens_B1[:, 0],
                bonus_BT.sum(dim=1) / self._lens_B1[:, 0],
                (share_BT - own_share_BT).abs().sum(dim=1) / 2,
                (share_BT * self._place_BT).sum(dim=1),
                *torch.einsum("bt,btk->kb", share_BT, self._third_BT3),
            ]
        )

    def _all_heads(self, name: str, option: Any) -> Tensor:
        """[B, n, T] of all kept heads."""
        if (name, option) not in self._padded:
            rows = [getattr(each, name)[option].T for each in self._kept]
            padded_BTn = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            self._padded[name, option] = padded_BTn.transpose(1, 2)
        return self._padded[name, option]


def _length(kept: KeptHeads) -> int:
    return next(iter(kept.waad.values())).shape[1]


def _batches(kept: Sequence[KeptHeads], pools: _Pools) -> Iterator[_Batch]:
    """All responses, the shortest first."""
    rows: list[int] = []
    for row in sorted(range(len(kept)), key=lambda row: _length(kept[row])):
        if rows and (len(rows) + 1) * _length(kept[row]) > TOKENS_AT_ONCE:
            yield _Batch(kept, rows, pools)
            rows = []
        rows.append(row)
    yield _Batch(kept, rows, pools)
