"""Summarizes heads over all responses: means, sets, their stability, and the overlap of receiver and global heads."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from rhythm.analysis.bootstrap import bootstrap, ratio
from rhythm.analysis.response import Head, HeadMap, ResponseHeads
from rhythm.analysis.results import Heads, Overlap, SetSummary

SetName = Literal["local", "global", "receiver", "receiver_sentence"]
FIELDS: dict[SetName, str] = {
    "local": "local",
    "global": "global_",
    "receiver": "receiver",
    "receiver_sentence": "receiver_sentence",
}


MEANS = ("span", "kurtosis", "kurtosis_sentence", "entropy", "sink_mass", "prompt_mass")
"""Fields of ResponseHeads, and of Heads as means over the responses."""


@dataclass
class _Sharing:
    """Computes how much the sets of different problems have in common, with the memory of one head map.

    Over ordered pairs (A, B) of sets of different problems, Σ |A∩B| / |A| is Σ_h w_h·m_h minus the same sum within each
    problem, where m_h is the number of sets that contain head h, and w_h the sum of their 1 / |A|.
    """

    chosen: np.ndarray
    weight: np.ndarray
    within: float = 0.0
    within_pairs: int = 0
    sets: int = 0
    sizes: int = 0
    problem: int | None = None
    of_problem: list[list[Head]] = field(default_factory=list)

    def add(self, problem: int, heads: tuple[Head, ...]) -> None:
        if not heads:
            return
        if problem != self.problem:
            self.close()
            self.problem = problem
        self.of_problem.append(list(heads))
        self.sets += 1
        self.sizes += len(heads)
        for head in heads:
            self.chosen[head] += 1
            self.weight[head] += 1 / len(heads)

    def close(self) -> None:
        for one in self.of_problem:
            self.within += sum(len(set(one) & set(other)) / len(one) for other in self.of_problem)
        self.within_pairs += len(self.of_problem) ** 2
        self.of_problem = []

    def size(self) -> float:
        """Mean number of heads per set; 0 without sets."""
        return self.sizes / self.sets if self.sets else 0.0

    def share(self) -> float:
        """Mean |A∩B| / |A|; NaN if all sets are of one problem."""
        self.close()
        pairs = self.sets**2 - self.within_pairs
        return float(((self.chosen * self.weight).sum() - self.within) / pairs) if pairs else math.nan


def summarize_heads(
    responses: Iterable[tuple[int, ResponseHeads]],
    *,
    pool_layers: tuple[int, ...],
    resamples: int,
    seed: int,
) -> Heads:
    """Means, sets and stability over (problem, heads) pairs; responses of one problem must be adjacent.

    The size of the sets chosen by the means is the mean size of the responses' sets, rounded.

    Raises:
        ValueError: no responses.
    """
    means: dict[str, _Mean] = {}
    sharing: dict[SetName, _Sharing] = {}
    overlaps: dict[SetName, list[tuple[float, float]]] = {"receiver": [], "receiver_sentence": []}
    for problem, heads in responses:
        shape = np.shape(heads.span)
        for name in MEANS:
            given = getattr(heads, name)
            values = np.array(given, dtype=float) if given else np.full(shape, math.nan)
            means.setdefault(name, _Mean(np.zeros_like(values), np.zeros_like(values))).add(values)
        for set_name, attribute in FIELDS.items():
            sharing.setdefault(set_name, _Sharing(np.zeros(shape), np.zeros(shape))).add(
                problem, getattr(heads, attribute)
            )
        for set_name, shares in overlaps.items():
            chosen = getattr(heads, FIELDS[set_name])
            if chosen:
                shares.append((len(set(chosen) & set(heads.global_)) / len(chosen), 1.0))
    if not means:
        raise ValueError("responses is empty; there must be at least one")
    layers, count = shape
    pool = np.zeros(shape, dtype=bool)
    pool[list(pool_layers)] = True
    span, kurtosis, kurtosis_sentence = (means[name].value() for name in ("span", "kurtosis", "kurtosis_sentence"))
    orders: dict[SetName, np.ndarray] = {
        "local": span,
        "global": -span,
        "receiver": -kurtosis,
        "receiver_sentence": -kurtosis_sentence,
    }
    pooled = {name: _smallest(values, pool, round(sharing[name].size())) for name, values in orders.items()}
    rng = np.random.default_rng([seed, 3])
    random = sharing["global"].size() / float(pool.sum())
    names: tuple[Literal["receiver", "receiver_sentence"], ...] = ("receiver", "receiver_sentence")
    return Heads(
        layers=layers,
        heads=count,
        pool_layers=pool_layers,
        span=_map(span),
        kurtosis=_map(kurtosis),
        kurtosis_sentence=_map(kurtosis_sentence),
        sets=tuple(_summary(name, pooled[name], sharing[name], pool) for name in FIELDS),
        overlaps=tuple(_overlap(name, pooled, overlaps[name], random, resamples, rng) for name in names),
        **{name: _map(means[name].value()) for name in MEANS[3:]},
    )


@dataclass
class _Mean:
    total: np.ndarray
    count: np.ndarray

    def add(self, values: np.ndarray) -> None:
        defined = np.isfinite(values)
        self.total += np.where(defined, values, 0.0)
        self.count += defined

    def value(self) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            return np.asarray(self.total / self.count)


def _smallest(values: np.ndarray, pool: np.ndarray, count: int) -> tuple[Head, ...]:
    """The heads of the pool with the smallest defined values, as (layer, head), ascending."""
    layers, heads = np.nonzero(pool & np.isfinite(values))
    order = np.argsort(values[layers, heads], kind="stable")[:count]
    return tuple(sorted((int(layers[i]), int(heads[i])) for i in order))


def _summary(name: SetName, heads: tuple[Head, ...], sharing: _Sharing, pool: np.ndarray) -> SetSummary:
    share = sharing.share()
    with np.errstate(invalid="ignore"):
        chosen = np.where(pool, sharing.chosen / sharing.sets if sharing.sets else math.nan, math.nan)
    return SetSummary(
        name=name,
        heads=heads,
        chosen=_map(chosen),
        stability=share,
        stability_random=sharing.size() / float(pool.sum()) if sharing.sets else math.nan,
        responses=sharing.sets,
    )


def _overlap(
    name: Literal["receiver", "receiver_sentence"],
    pooled: dict[SetName, tuple[Head, ...]],
    shares: list[tuple[float, float]],
    random: float,
    resamples: int,
    rng: np.random.Generator,
) -> Overlap:
    sums = np.array(shares, dtype=float).reshape(-1, 2)
    both = set(pooled[name]) & set(pooled["global"])
    return Overlap(
        name=name,
        share=float(sums[:, 0].mean()) if len(sums) else math.nan,
        interval=bootstrap(sums, ratio(0, 1), resamples, rng),
        random=random,
        pooled=len(both) / len(pooled[name]) if pooled[name] else math.nan,
    )


def _map(values: np.ndarray) -> HeadMap:
    return tuple(tuple(float(f"{value:.7g}") for value in row) for row in values.tolist())
