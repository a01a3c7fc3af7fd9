"""Attention statistics without attention maps, and token credit for reinforcement learning from them."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from rhythm.column_scores import column_scores
from rhythm.heads import HeadGroups, sampled_layers, select_heads
from rhythm.signals import RhythmSignals
from rhythm.statistics import AttentionStatistics, attention_statistics, attention_with_statistics

if TYPE_CHECKING:
    from rhythm.attention_form import UnsupportedAttention
    from rhythm.credit import RhythmCredit, credit_weights
    from rhythm.observe import observe
    from rhythm.tap import AttentionTap

__all__ = [
    "AttentionStatistics",
    "AttentionTap",
    "HeadGroups",
    "RhythmCredit",
    "RhythmSignals",
    "UnsupportedAttention",
    "attention_statistics",
    "attention_with_statistics",
    "column_scores",
    "credit_weights",
    "observe",
    "sampled_layers",
    "select_heads",
]

# Loaded when first asked for, because what they need is more than torch: the ops run without it.
_LAZY = {
    "AttentionTap": "rhythm.tap",
    "RhythmCredit": "rhythm.credit",
    "UnsupportedAttention": "rhythm.attention_form",
    "credit_weights": "rhythm.credit",
    "observe": "rhythm.observe",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_LAZY[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps `rhythm.observe` the function: an import of the module of that name would set the module in its place."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _LAZY and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
