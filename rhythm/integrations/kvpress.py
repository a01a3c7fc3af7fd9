"""kvpress: a press that scores keys by the exact attention they receive (H2O), without attention maps.

    pipe = pipeline("kv-press-text-generation", model=path)
    pipe(context, question=question, press=H2OPress(compression_ratio=0.5))["answer"]

kvpress's own ObservedAttentionPress reads the maps of eager attention, O(heads · T²) memory per layer; this one takes
any attention implementation and O(heads · T). It needs torch and kvpress alone, so it runs with the version of
transformers that kvpress requires.

Shape suffixes: B sequences, T tokens, H query heads, G key heads, D head size.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rhythm.ops.column_scores import REDUCE, column_scores
from rhythm.system.extras import needs

with needs("rhythm.integrations.kvpress"):
    from kvpress import ScorerPress
    from kvpress.utils import get_prerope_query_states


@dataclass
class H2OPress(ScorerPress):  # type: ignore[misc]  # kvpress has no types
    """Keeps the keys with the largest accumulated attention (H2O, arXiv 2306.14048), per key head.

    Attributes:
        compression_ratio: the fraction of keys to remove, in [0, 1).
        recent: this many of the last keys stay in any case.
        reduce: "sum" of the attention a key receives, as in H2O; "mean" over the rows after it, as in kvpress's
            ObservedAttentionPress; "max".
        backend: as in `column_scores`.

    Raises:
        ValueError: a field is not as described; in the forward pass: a batch with padding, whose rows would count.
    """

    compression_ratio: float = 0.0
    recent: int = 0
    reduce: str = "sum"
    backend: str = "auto"

    def __post_init__(self) -> None:
        if not 0 <= self.compression_ratio < 1:
            raise ValueError(f"compression_ratio is {self.compression_ratio!r}; it must be in [0, 1)")
        if isinstance(self.recent, bool) or not isinstance(self.recent, int) or self.recent < 0:
            raise ValueError(f"recent is {self.recent!r}; it must be an integer of at least 0")
        if self.reduce not in REDUCE:
            raise ValueError(f"reduce is {self.reduce!r}; allowed are {', '.join(REDUCE)}")

    def score(
        self,
        module: nn.Module,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        attentions: Tensor | None,
        kwargs: dict[str, Any],
    ) -> Tensor:
        """fp32 [B, G, T]; hidden_states [B, T, hidden size], keys [B, G, T, D] with positions, attentions not read."""
        # Models whose layers all have the same window (Mistral, Phi 3) leave it in the configuration.
        window = getattr(module, "sliding_window", getattr(module.config, "sliding_window", None))
        _check_padding(kwargs.get("attention_mask"), window)
        cos, sin = kwargs["position_embeddings"]
        query_BHTD = get_prerope_query_states(module, hidden_states)
        # The model's own function, since models rotate differently; it rotates two tensors alike.
        query_BHTD, _ = sys.modules[type(module).__module__].apply_rotary_pos_emb(query_BHTD, query_BHTD, cos, sin)
        score_BGT = column_scores(
            query_BHTD.transpose(1, 2),
            keys.transpose(1, 2).to(query_BHTD.dtype),
            reduce=self.reduce,  # type: ignore[arg-type]  # checked above
            per="group",
            scale=float(module.scaling),  # type: ignore[arg-type]  # a number
            softcap=getattr(module, "attn_logit_softcapping", None),
            sliding_window=window,
            backend=self.backend,
        )
        if self.recent:
            score_BGT[..., -self.recent :] = torch.inf
        return score_BGT


def _check_padding(mask: object, window: int | None) -> None:
    """The last row sees every key within its window unless some are padding."""
    if not isinstance(mask, Tensor):
        return
    last = mask if mask.ndim == 2 else mask[..., -1, :]
    last = last if window is None else last[..., -window:]
    visible = last == 0 if last.is_floating_point() else last.bool()
    if not bool(visible.all()):
        raise ValueError(
            f"attention_mask of shape {tuple(mask.shape)} hides keys from the last row; H2OPress takes batches without "
            "padding, as kvpress's pipeline makes them"
        )
