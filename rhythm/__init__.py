"""Attention statistics without attention maps, and token credit for reinforcement learning from them."""

from rhythm.attention_form import UnsupportedAttention
from rhythm.column_scores import column_scores
from rhythm.credit import RhythmCredit, credit_weights
from rhythm.heads import HeadGroups, sampled_layers, select_heads
from rhythm.observe import observe
from rhythm.signals import RhythmSignals
from rhythm.statistics import AttentionStatistics, attention_statistics, attention_with_statistics
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
