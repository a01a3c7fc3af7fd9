"""From signals to γ, the factor on each token's advantage (eqs. 13 to 18).

All is computed for a batch of responses at once; outside a response it is NaN, and NaN is never selected.

Shape suffixes: B responses, T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from rhythm.credit.config import MEDIAN, CreditConfig, Select, Threshold
from rhythm.credit.signals import RhythmSignals
from rhythm.credit.strategies import STRATEGIES, StrategyInputs
from rhythm.shapes import check_dense, check_shape, integer


def credit_weights(
    waad: Tensor,
    fai: Tensor,
    *,
    strategy: str,
    entropy: Tensor | None = None,
    q: float = 0.4,
    gamma_amp: float = 1.5,
    alpha: float = 0.5,
    neighborhood: int = 3,
    tau_waad: Threshold | Mapping[str, float] = MEDIAN,
    tau_delta: Threshold | Mapping[str, float] | None = None,
    select: Select = "top",
    generator: torch.Generator | None = None,
) -> Tensor:
    """γ of one response.

    Args:
        waad, fai: [n] signals of the response's tokens; NaN where undefined.
        q: CreditConfig's top_fraction.
        strategy … select: see CreditConfig.
        entropy: [n] nats; needed by the strategy "entropy".
        generator: for the strategy "random"; torch's default one if None.

    Returns:
        γ [n], fp32, detached.

    Raises:
        ValueError: a shape that is not [n]; an option outside its range; entropy missing.
    """
    if not isinstance(q, int | float) or not 0 < q <= 1:
        raise ValueError(f"q is {q!r}; it must be above 0 and at most 1")
    config = CreditConfig.model_validate(
        {
            "strategy": strategy,
            "top_fraction": q,
            "gamma_amp": gamma_amp,
            "alpha": alpha,
            "neighborhood": integer("neighborhood", neighborhood, 1),
            "tau_waad": tau_waad,
            "tau_delta": tau_delta,
            "select": select,
        }
    )
    for name, x in (("waad", waad), ("fai", fai), ("entropy", waad if entropy is None else entropy)):
        check_dense(name, x)
    shape = check_shape("waad", waad, ("T",))
    check_shape("fai", fai, shape)
    if entropy is not None:
        check_shape("entropy", entropy, shape)
        entropy = entropy[None]
    mask_1n = torch.ones((1, *shape), dtype=torch.bool, device=waad.device)
    return _gamma((waad[None], fai[None]), entropy, mask_1n, config, generator)[0]


def batch_credit_weights(
    signals: RhythmSignals | None,
    response_mask_BT: Tensor,
    config: CreditConfig,
    generator: torch.Generator | None = None,
    *,
    entropy: Tensor | None = None,
    whole_batch: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """γ of a batch of responses, each exactly as `credit_weights` gives it alone.

    Neither padding nor the other rows matter, but for the two options that are of the batch: mass="matched" scales
    γ − 1 so that its mean over all response tokens is (gamma_amp − 1)·top_fraction (where nothing at all is selected,
    γ stays 1; strategy "none" has γ = 1 + (gamma_amp − 1)·top_fraction everywhere), and random_like, see
    `rhythm.credit.random_like`. The strategy "random" draws one number per response token in reading order, so on one
    generator a batch draws what its rows, one after the other, would draw.

    Args:
        signals: [B, T] each; what they hold outside the responses is ignored. May be None for a strategy that
            reads no attention (config.reads).
        response_mask_BT: [B, T], true on response tokens: one contiguous run per row, anywhere in it; an empty
            one is fine.
        config: strategy and options.
        generator: for the strategy "random"; torch's default one if None.
        entropy: [B, T] nats, instead of signals.entropy.
        whole_batch: adds up a tensor over the processes that share the batch, where these rows are but a part of it;
            called alike in all of them.

    Returns:
        γ [B, T], fp32, detached; 1 outside the responses.

    Raises:
        ValueError: a shape that is not [B, T]; signals or entropy missing though the strategy reads them.
    """
    shape = check_shape("response_mask", response_mask_BT, ("B", "T"))
    attention: tuple[Tensor, ...] = ()
    if signals is not None:
        check_shape("signals.waad", signals.waad, shape)
        check_shape("signals.fai", signals.fai, shape)
        attention = (signals.waad, signals.fai)
        if signals.entropy is not None:
            check_shape("signals.entropy", signals.entropy, shape)
            entropy = signals.entropy if entropy is None else entropy
    if entropy is not None:
        check_shape("entropy", entropy, shape)
    return _gamma(attention, entropy, response_mask_BT.bool(), config, generator, whole_batch)


@torch.no_grad()
def _gamma(
    attention: tuple[Tensor, ...],
    entropy_BT: Tensor | None,
    response_BT: Tensor,
    config: CreditConfig,
    generator: torch.Generator | None,
    whole_batch: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """γ [B, T]; attention is (WAAD, FAI) or empty, the other arguments are those of batch_credit_weights."""
    reader = config.random_like or config.strategy
    if "attention" in config.reads and not attention:
        raise ValueError(f'signals is None; the strategy "{reader}" needs them')
    if "entropy" in config.reads and entropy_BT is None:
        raise ValueError(f'entropy is None; the strategy "{reader}" needs it')
    if response_BT.numel() == 0:
        return torch.ones(response_BT.shape, dtype=torch.float32, device=response_BT.device)
    inputs = StrategyInputs(
        response=response_BT,
        attention=tuple(_inside(x_BT, response_BT) for x_BT in attention),
        entropy=None if entropy_BT is None else _inside(entropy_BT, response_BT),
        generator=generator,
        whole_batch=whole_batch,
    )
    bonus_BT = STRATEGIES[config.strategy].bonus(inputs, config)
    if config.mass == "matched":
        bonus_BT = bonus_BT * _matching_factor(bonus_BT[response_BT], config.top_fraction, whole_batch)
    gamma_BT = 1 + (config.gamma_amp - 1) * bonus_BT
    if config.mean_preserving:
        sum_B1 = torch.where(response_BT, gamma_BT, 0.0).double().sum(dim=-1, keepdim=True)
        mean_B1 = sum_B1 / response_BT.sum(dim=-1, keepdim=True).clamp(min=1)
        gamma_BT = torch.where(response_BT, (gamma_BT / mean_B1).float(), 1.0)
    return gamma_BT


def _matching_factor(bonus_N: Tensor, share: float, whole_batch: Callable[[Tensor], Tensor]) -> Tensor:
    """What makes the mean bonus of all response tokens of the batch `share`; 1 where there is no bonus."""
    # In fp64: the sum's last bits depend on how the batch is cut, and are gone in the fp32 of γ.
    bonus, tokens = whole_batch(torch.stack([bonus_N.double().sum(), bonus_N.new_tensor(len(bonus_N)).double()]))
    return torch.where(bonus > 0, share * tokens / bonus, 1.0)


def _inside(x_BT: Tensor, response_BT: Tensor) -> Tensor:
    """fp32, NaN outside the responses."""
    return x_BT.float().masked_fill(~response_BT, torch.nan)
