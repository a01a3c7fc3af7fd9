"""Signals from several replicas, without their processes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cluster_case import TAP

from rhythm.credit.heads import HeadGroups, select_heads
from rhythm.credit.signals import RhythmSignals

pytestmark = pytest.mark.cluster


def test_spans_are_those_of_the_pass_that_chose_the_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """With head groups given, replicas have spans of some responses alone."""
    span_Bn = torch.tensor([[1.0, 2.0, 3.0], [2.0, 1.0, 3.0]])
    from rhythm.cluster.engines import ClusterAttn

    passes: list[HeadGroups | None] = []

    def signals(_: Any, rollout: Any, groups: HeadGroups | None) -> RhythmSignals:
        passes.append(groups)
        chosen = groups or select_heads(span_Bn)
        span = span_Bn if groups is None else torch.full_like(span_Bn, torch.nan)
        return RhythmSignals(torch.zeros(2, 4), torch.zeros(2, 4), None, span, chosen)

    monkeypatch.setattr(ClusterAttn, "_signals", signals)
    attn: Any = ClusterAttn.__new__(ClusterAttn)
    attn._spec = SimpleNamespace(tap=TAP)
    attn._rates = SimpleNamespace(processed=lambda *_: None, statistics=0.0)
    found = attn.signals(SimpleNamespace(lens=torch.tensor([4, 4])))
    assert [groups is None for groups in passes] == [True, False]
    assert found.span.equal(span_Bn)
    assert found.groups is passes[1]
