"""γ of a batch straight from a model: `observe`, then `batch_credit_weights`.

Shape suffixes: B responses, T positions of input_ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rhythm.credit.gamma import CreditConfig, batch_credit_weights
from rhythm.credit.heads import HeadGroups
from rhythm.shapes import check_shape
from rhythm.tap.observe import observe
from rhythm.tap.padding import padded_batch


class RhythmCredit:
    """Token credit γ of a batch, by a forward pass of its own: `observe`, then `batch_credit_weights`.

        credit = RhythmCredit(strategy="coupled", alpha=0.25)
        gamma_BT = credit(model, input_ids, attention_mask, response_mask)

    Args:
        config: strategy and options; or these by name, as in CreditConfig.
        generator: for the strategy "random"; torch's default one if None.
        layers … backend: as in `observe`, which the attribute `observe` calls with them.

    Raises:
        ValueError: both a config and options of one; an option unknown or outside its range.
    """

    def __init__(
        self,
        config: CreditConfig | None = None,
        *,
        generator: torch.Generator | None = None,
        layers: Sequence[int] | None = None,
        window: int = 10,
        horizon: tuple[int, int | None] = (10, 50),
        quantile: float = 0.3,
        grouping: Literal["sequence", "batch"] = "sequence",
        groups: HeadGroups | None = None,
        backend: str = "auto",
        **options: Any,
    ) -> None:
        if config is not None and options:
            raise ValueError(f"config is given, and so are {', '.join(options)}; it must be one or the other")
        self.config = CreditConfig(**options) if config is None else config
        self.generator = generator
        self.grouping = grouping
        self.observe = partial(
            observe,
            layers=layers,
            window=window,
            horizon=horizon,
            quantile=quantile,
            grouping=grouping,
            groups=groups,
            entropy=self.config.strategy == "entropy",
            backend=backend,
        )

    def __call__(
        self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, response_mask: Tensor
    ) -> Tensor:
        """γ of every token.

        Args:
            model: as in `observe`.
            input_ids: [B, T] integers.
            attention_mask: [B, T], 1 on tokens and 0 on padding, left or right. None: no padding.
            response_mask: [B, T], 1 on the response: the last tokens of each row, in one run; may be empty.

        Returns:
            γ [B, T], fp32, detached; 1 outside the responses.

        Raises:
            ValueError: an argument is not as described; the message names it.
            UnsupportedAttention (a ValueError): see `observe`.
        """
        shape = check_shape("input_ids", input_ids, (None, None))
        mask_BT = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        check_shape("attention_mask", mask_BT, shape)
        check_shape("response_mask", response_mask, shape)
        response_BT = response_mask.bool()
        prompt_lens_B = (mask_BT.bool() & ~response_BT).sum(dim=-1)
        if not padded_batch(mask_BT, prompt_lens_B).response.equal(response_BT):
            raise ValueError("response_mask must mark the last tokens of each row, in one run, and no padding")
        signals = self.observe(model, input_ids, attention_mask=attention_mask, prompt_lens=prompt_lens_B)
        return batch_credit_weights(signals, response_BT, self.config, self.generator)
