"""γ of a batch straight from a model: `observe`, then `batch_credit_weights`.

Shape suffixes: B responses, T positions of input_ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rhythm.credit.config import CreditConfig
from rhythm.credit.gamma import batch_credit_weights
from rhythm.credit.heads import HeadGroups
from rhythm.credit.signals import RhythmSignals
from rhythm.shapes import check_shape
from rhythm.tap.observe import observe, response_entropy
from rhythm.tap.padding import PaddedBatch
from rhythm.tap.signals_config import SignalsConfig


class RhythmCredit:
    """Token credit γ of a batch, by a forward pass of its own: `observe`, then `batch_credit_weights`.

    A strategy that reads no attention costs less: "entropy" a plain forward pass, "none" and "random" no pass at all.
    The batch of mass="matched" and of random_like is that of one call.

        credit = RhythmCredit(strategy="coupled", alpha=0.25)
        gamma_BT = credit(model, input_ids, attention_mask, response_mask)

    Args:
        config: strategy and options; or these by name, as in CreditConfig.
        signals: which layers, window, horizon, quantile, grouping and backend; as in `observe`. With
            grouping="calibrated" the groups of the first batch are kept for all later ones.
        groups: fixed head groups, as in `observe`.
        generator: for the strategy "random"; torch's default one if None.

    Raises:
        ValueError: both a config and options of one; an option unknown or outside its range.
    """

    def __init__(
        self,
        config: CreditConfig | None = None,
        *,
        signals: SignalsConfig = SignalsConfig(),
        groups: HeadGroups | None = None,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> None:
        if misplaced := [name for name in options if name in SignalsConfig.model_fields]:
            raise ValueError(f"{misplaced[0]} is an option of signals: SignalsConfig({misplaced[0]}=…)")
        if config is not None and options:
            raise ValueError(f"config is given, and so are {', '.join(options)}; it must be one or the other")
        self.config = CreditConfig(**options) if config is None else config
        self.signals = signals
        self.groups = groups
        self.generator = generator

    def read(
        self,
        model: nn.Module,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        prompt_lens: Tensor | Sequence[int] | None = None,
        response_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        inputs: Mapping[str, Any] | None = None,
    ) -> tuple[RhythmSignals | None, Tensor | None]:
        """(signals, entropy [B, T]) as far as the strategy reads them: a forward pass that `observe` watches, a plain
        one for the entropy alone, or none. Arguments as in `observe`.
        """
        where: dict[str, Any] = {
            "attention_mask": attention_mask,
            "prompt_lens": prompt_lens,
            "response_mask": response_mask,
            "cu_seqlens": cu_seqlens,
            "inputs": inputs,
        }
        if "attention" in self.config.reads:
            signals = self.observe(model, input_ids, **where)
            return signals, signals.entropy
        if "entropy" in self.config.reads:
            return None, response_entropy(model, input_ids, **where)
        return None, None

    def observe(
        self,
        model: nn.Module,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        prompt_lens: Tensor | Sequence[int] | None = None,
        response_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        inputs: Mapping[str, Any] | None = None,
    ) -> RhythmSignals:
        """`observe` with the options of this object; calibrates the groups if that is still to be done."""
        signals = observe(
            model,
            input_ids,
            attention_mask=attention_mask,
            prompt_lens=prompt_lens,
            response_mask=response_mask,
            signals=self.signals,
            groups=self.groups,
            entropy="entropy" in self.config.reads,
            cu_seqlens=cu_seqlens,
            inputs=inputs,
        )
        if self.groups is None and self.signals.grouping == "calibrated":
            self.groups = HeadGroups(local=signals.groups.local[:1], global_=signals.groups.global_[:1])
        return signals

    def __call__(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        response_mask: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        inputs: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """γ of every token.

        Args:
            model: as in `observe`.
            input_ids: [B, T] integers.
            attention_mask: [B, T], 1 on tokens and 0 on padding, left or right. None: no padding.
            response_mask: [B, T], 1 on the response: the last tokens of each row, in one run; may be empty.
            cu_seqlens: int32 or int64 [B + 1], as in `observe`, for one row [1, T] of packed sequences;
                attention_mask is then None, and γ [1, T].
            inputs: more of the forward pass, such as pixel_values, as in `observe`.

        Returns:
            γ [B, T], fp32, detached; 1 outside the responses.

        Raises:
            ValueError: an argument is not as described; the message names it.
            UnsupportedAttention (a ValueError): see `observe`.
        """
        shape = check_shape("input_ids", input_ids, ("B", "T"))
        mask_BT = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        check_shape("attention_mask", mask_BT, shape)
        check_shape("response_mask", response_mask, shape)
        where: dict[str, Any] = {"response_mask": response_mask, "cu_seqlens": cu_seqlens, "inputs": inputs}
        signals, entropy_BT = self.read(model, input_ids, attention_mask=attention_mask, **where)
        if cu_seqlens is not None:
            batch = PaddedBatch.from_cu_seqlens(cu_seqlens, None, response_mask, input_ids.device)
            if signals is not None:
                waad, fai = (batch.in_rows(x, torch.nan) for x in (signals.waad, signals.fai))
                signals = replace(signals, waad=waad, fai=fai, entropy=None)
            entropy_BN = None if entropy_BT is None else batch.in_rows(entropy_BT, torch.nan)
            gamma_BN = batch_credit_weights(
                signals, batch.rows.response, self.config, self.generator, entropy=entropy_BN
            )
            return batch.from_rows(gamma_BN, 1.0)
        if not self.config.reads:
            PaddedBatch.from_mask(mask_BT, response_mask_BT=response_mask)  # checked by the pass, where there is one
        return batch_credit_weights(signals, response_mask.bool(), self.config, self.generator, entropy=entropy_BT)
