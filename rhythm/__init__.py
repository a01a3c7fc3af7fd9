"""Attention statistics without attention maps, and token-level credit for reinforcement learning from them.

WAAD is the windowed average attention distance of a token, FAI its future attention influence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rhythm.credit.heads import HeadGroups, sampled_layers, select_heads
from rhythm.credit.signals import RhythmSignals
from rhythm.ops.bands import attention_bands
from rhythm.ops.column_scores import column_scores
from rhythm.ops.statistics import AttentionStatistics, attention_statistics, attention_with_statistics
from rhythm.system.lazy import lazy

if TYPE_CHECKING:
    from rhythm.credit.gamma import credit_weights
    from rhythm.system.version import __version__ as __version__
    from rhythm.tap.attention_form import UnsupportedAttention
    from rhythm.tap.attention_tap import AttentionTap
    from rhythm.tap.observe import observe
    from rhythm.tap.rhythm_credit import RhythmCredit
    from rhythm.tap.signals_config import SignalsConfig

__all__ = [
    "AttentionStatistics",
    "AttentionTap",
    "HeadGroups",
    "RhythmCredit",
    "RhythmSignals",
    "SignalsConfig",
    "UnsupportedAttention",
    "attention_bands",
    "attention_statistics",
    "attention_with_statistics",
    "column_scores",
    "credit_weights",
    "observe",
    "sampled_layers",
    "select_heads",
]

__getattr__, __dir__ = lazy(
    __name__,
    globals(),
    {
        "AttentionTap": "rhythm.tap.attention_tap",
        "RhythmCredit": "rhythm.tap.rhythm_credit",
        "SignalsConfig": "rhythm.tap.signals_config",
        "UnsupportedAttention": "rhythm.tap.attention_form",
        "__version__": "rhythm.system.version",
        "credit_weights": "rhythm.credit.gamma",
        "observe": "rhythm.tap.observe",
    },
)
