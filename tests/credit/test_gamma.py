"""γ: hand-computed cases of eqs. 13 to 18, batches, and bad input."""

from __future__ import annotations

import math
import random

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from rhythm.credit.config import CreditConfig, QuantileThreshold, ValueThreshold
from rhythm.credit.gamma import batch_credit_weights, credit_weights
from rhythm.credit.heads import HeadGroups
from rhythm.credit.signals import RhythmSignals

NAN = math.nan

# A response of 10 tokens.
#   t          0    1    2    3    4    5    6    7    8    9
#   WAAD       1    5    1    1    4    2    1    1    3    1     median of 1·6, 2, 3, 4, 5: 1
#   Δ          4    4    0    3    2    1    0    2    2    –
# T_loc: n = 9 defined, ⌈0.4·9⌉ = ⌈3.6⌉ = 4: tokens 0, 1 (Δ 4), 3 (Δ 3), and the earliest with Δ 2, 4.
# Hence τ_Δ = 2, and τ_waad = 1.
WAAD = [1.0, 5.0, 1.0, 1.0, 4.0, 2.0, 1.0, 1.0, 3.0, 1.0]
# The horizon leaves the last two undefined: n = 8, ⌈0.4·8⌉ = ⌈3.2⌉ = 4 anchors: 2, 3, 5, 6.
FAI = [0.1, 0.2, 0.9, 0.8, 0.1, 0.7, 0.6, 0.3, NAN, NAN]


def gamma(waad: list[float], fai: list[float], **options: object) -> list[float]:
    weights = credit_weights(torch.tensor(waad), torch.tensor(fai), **options)
    assert weights.dtype == torch.float32
    return weights.tolist()


def selected(weights: list[float]) -> list[int]:
    return [t for t, weight in enumerate(weights) if weight > 1]


def signals_of(waad: Tensor, fai: Tensor, entropy: Tensor | None = None) -> RhythmSignals:
    none = torch.zeros(waad.shape[0], 1, dtype=torch.bool)
    return RhythmSignals(waad, fai, entropy, none.float(), HeadGroups(none, none))


# --- By hand


def test_local_chunk() -> None:
    assert gamma(WAAD, FAI, strategy="local_chunk") == [1.5, 1.5, 1, 1.5, 1.5, 1, 1, 1, 1, 1]


def test_global_anchor() -> None:
    assert gamma(WAAD, FAI, strategy="global_anchor") == [1, 1, 1.5, 1.5, 1, 1.5, 1.5, 1, 1, 1]


def test_coupled() -> None:
    # Anchors, with k = 3:
    #   2: WAAD 1 ≤ 1; before it, inside the response, 0 and 1 with Δ 4 and 4 ≥ 2: dominated; of equals the
    #      later, intro 1.
    #   3: WAAD 1;     0, 1, 2 with Δ 4, 4, 0: dominated, intro 1 again, which counts once.
    #   5: WAAD 2 > 1: not dominated, 1 + b = 1.5.
    #   6: WAAD 1;     3, 4, 5 with Δ 3, 2, 1: dominated, intro 3, itself a dominated anchor: the terms add.
    # γ_1 = 1 + αb = 1.25; γ_2 = γ_6 = 1 + (1 − α)b = 1.25; γ_3 = 1 + (1 − α)b + αb = 1.5.
    assert gamma(WAAD, FAI, strategy="coupled") == [1, 1.25, 1.25, 1.5, 1, 1.5, 1.25, 1, 1, 1]


def test_coupled_parameters() -> None:
    # α = 0.25, b = 1: γ_1 = 1.25; γ_2 = γ_6 = 1.75; γ_3 = 1.75 + 0.25; γ_5 = 2.
    weights = gamma(WAAD, FAI, strategy="coupled", alpha=0.25, gamma_amp=2.0)
    assert weights == [1, 1.25, 1.75, 2, 1, 2, 1.75, 1, 1, 1]
    # α = 0 leaves the anchors as they are, α = 1 hands all over.
    assert gamma(WAAD, FAI, strategy="coupled", alpha=0) == gamma(WAAD, FAI, strategy="global_anchor")
    assert gamma(WAAD, FAI, strategy="coupled", alpha=1) == [1, 1.5, 1, 1.5, 1, 1.5, 1, 1, 1, 1]
    # k = 1: 2 has 1 (Δ 4): dominated, intro 1. 3 has 2 (Δ 0), 6 has 5 (Δ 1): not dominated.
    weights = gamma(WAAD, FAI, strategy="coupled", neighborhood=1)
    assert weights == [1, 1.25, 1.25, 1.5, 1, 1.5, 1.5, 1, 1, 1]
    # k beyond the response's start changes nothing for 2 and 3; 6 now sees 0 … 5 and takes 1 (Δ 4, after 0).
    weights = gamma(WAAD, FAI, strategy="coupled", neighborhood=50)
    assert weights == [1, 1.25, 1.25, 1.25, 1, 1.5, 1.25, 1, 1, 1]


def test_an_anchor_of_its_own_standing_may_introduce_another() -> None:
    # Anchors: n = 10, ⌈4⌉ = 4: 1, 2, 8, 9. 1 and 8: WAAD 5 and 3, own standing. 2: dominated, intro 1.
    # 9: WAAD 1; 6, 7, 8 with Δ 0, 2, 2: dominated, intro 8. γ_1 = γ_8 = 1 + b + αb = 1.75.
    fai = [0.0, 0.9, 0.8, 0.1, 0.1, 0.1, 0.1, 0.1, 0.7, 0.6]
    assert gamma(WAAD, fai, strategy="coupled") == [1, 1.75, 1.25, 1, 1, 1, 1, 1, 1.75, 1.25]


def test_thresholds() -> None:
    def coupled(**options: object) -> list[float]:
        return gamma(WAAD, FAI, strategy="coupled", **options)

    default = [1, 1.25, 1.25, 1.5, 1, 1.5, 1.25, 1, 1, 1]
    assert coupled(tau_waad={"value": 1.0}, tau_delta={"value": 2.0}) == default
    assert coupled(tau_waad=ValueThreshold(value=0.99)) == gamma(WAAD, FAI, strategy="global_anchor")
    # WAAD ≤ 2 lets 5 be dominated: 2, 3, 4 with Δ 0, 3, 2: intro 3.
    assert coupled(tau_waad={"value": 2.0}) == [1, 1.25, 1.25, 1.5, 1, 1.25, 1.25, 1, 1, 1]
    # The quantile 2/3 of WAAD is at place 6 of 0 … 9 in 1·6, 2, 3, 4, 5: exactly 2.
    assert coupled(tau_waad={"quantile": 2 / 3}) == coupled(tau_waad={"value": 2.0})
    # 0.65 is at place 5.85, between 1 and 2: 1.85.
    assert coupled(tau_waad={"quantile": 0.65}) == default
    # Δ ≥ 3.5 leaves 2 and 3 (Δ 4), not 6 (Δ 3): 3 introduces nobody any more.
    above = [1, 1.25, 1.25, 1.25, 1, 1.5, 1.5, 1, 1, 1]
    assert coupled(tau_delta={"value": 3.5}) == above
    # Sorted Δ: 0 0 1 2 2 2 3 4 4. The quantile 0.75 is at place 6: exactly 3, and 3 ≥ 3; 0.8 is at 6.4: 3.4.
    assert coupled(tau_delta={"quantile": 0.75}) == default
    assert coupled(tau_delta=QuantileThreshold(quantile=0.8)) == above


def test_quantile_that_falls_on_an_entry_is_that_entry() -> None:
    values = torch.tensor([[0.1 * i for i in range(11)] + [NAN] * 4])
    for i in range(11):
        assert QuantileThreshold(quantile=i / 10).level(values).item() == values[0, i].item()
    assert QuantileThreshold(quantile=0.25).level(values).item() == pytest.approx(0.25)
    assert QuantileThreshold(quantile=0.5).level(torch.full((1, 3), NAN)).isnan().all()


def test_bottom() -> None:
    # Bottom of Δ, 4 of 9: 2, 6 (Δ 0), 5 (Δ 1) and the earliest of Δ 2, 4.
    assert selected(gamma(WAAD, FAI, strategy="local_chunk", select="bottom")) == [2, 4, 5, 6]
    # Bottom of FAI, 4 of 8: 0, 4 (0.1), 1 (0.2), 7 (0.3).
    assert selected(gamma(WAAD, FAI, strategy="global_anchor", select="bottom")) == [0, 1, 4, 7]
    # Coupled: these as anchors. 0 has nothing before it; 1 and 4 have WAAD 5 and 4; 7 (WAAD 1) has 4, 5, 6
    # with Δ 2, 1, 0, and 2 ≥ τ_Δ = 2, still that of the top 40%: dominated, intro 4.
    weights = gamma(WAAD, FAI, strategy="coupled", select="bottom")
    assert weights == [1.5, 1.5, 1, 1, 1.75, 1, 1, 1.25, 1, 1]


def test_entropy() -> None:
    # ⌈0.4·5⌉ = 2: the 0.9 and the earlier of the two 0.5.
    entropy = torch.tensor([0.5, 0.1, 0.9, 0.5, NAN])
    # 4 are defined: ⌈1.6⌉ = 2.
    ones = torch.ones(5)
    assert credit_weights(ones, ones, strategy="entropy", entropy=entropy).tolist() == [1.5, 1, 1.5, 1, 1]
    weights = credit_weights(ones, ones, strategy="entropy", entropy=entropy, select="bottom")
    assert weights.tolist() == [1.5, 1.5, 1, 1, 1]
    with pytest.raises(ValueError, match="entropy is None"):
        credit_weights(ones, ones, strategy="entropy")


def test_none() -> None:
    assert gamma(WAAD, FAI, strategy="none") == [1.0] * 10


@pytest.mark.parametrize(
    ("q", "n", "count"),
    [
        (0.4, 5, 2),
        (0.4, 10, 4),
        (0.1, 30, 3),  # the float 0.1 is a little more than a tenth: taken at its word, ⌈0.1·30⌉ is 4
        (0.3, 50, 15),  # in fp32, 0.3 · 50 is 15.000001
        (0.07, 100, 7),  # 0.07 · 100 is 7.000000000000001
        (0.14, 50, 7),  # 0.14 · 50 is 7.000000000000001
        (0.1 + 0.2, 10, 3),  # 0.30000000000000004
        (1 / 3, 3, 1),
        (2 / 3, 3, 2),
        (0.4, 1, 1),
        (0.01, 7, 1),
        (0.41, 10, 5),
        (1.0, 7, 7),
    ],
)
def test_number_selected(q: float, n: int, count: int) -> None:
    fai = torch.arange(n, dtype=torch.float32)
    weights = credit_weights(torch.ones(n), fai, strategy="global_anchor", q=q)
    assert selected(weights.tolist()) == list(range(n - count, n))
    scattered = credit_weights(torch.ones(n), fai, strategy="random", q=q)
    assert (scattered > 1).sum() == count


def test_ties_go_to_the_earlier_even_in_long_responses() -> None:
    n = 1000
    weights = credit_weights(torch.ones(n), torch.ones(n), strategy="global_anchor")
    assert selected(weights.tolist()) == list(range(400))


def test_shortest_responses() -> None:
    for strategy in ("none", "random", "local_chunk", "global_anchor", "coupled"):
        assert gamma([], [], strategy=strategy) == []
    # One token: no Δ. As an anchor it is not dominated, having nothing before it.
    assert gamma([2.0], [NAN], strategy="local_chunk") == [1]
    assert gamma([2.0], [NAN], strategy="coupled") == [1]
    assert gamma([2.0], [0.5], strategy="coupled") == [1.5]
    assert gamma([2.0], [0.5], strategy="coupled", tau_delta={"quantile": 0.0}) == [1.5]
    assert gamma([2.0], [0.5], strategy="random") == [1.5]
    # Two tokens, fewer than k: Δ_0 = 2 = τ_Δ; anchor 1 (⌈0.8⌉ = 1), WAAD 1 ≤ median 2: dominated by 0.
    assert gamma([3.0, 1.0], [0.1, 0.2], strategy="local_chunk") == [1.5, 1]
    assert gamma([3.0, 1.0], [0.1, 0.2], strategy="coupled") == [1.25, 1.25]
    # The anchor that comes first has nothing before it.
    assert gamma([1.0, 3.0], [0.2, 0.1], strategy="coupled") == [1.5, 1]


def test_undefined_is_never_selected() -> None:
    nothing = [NAN] * 6
    for strategy in ("local_chunk", "global_anchor", "coupled"):
        assert gamma(nothing, nothing, strategy=strategy, q=1.0) == [1] * 6
    # A NaN in WAAD takes Δ with it on both sides: defined are Δ_0 = 3, Δ_3 = 1, Δ_4 = 5; ⌈1.2⌉ = 2.
    waad = [1.0, 4.0, NAN, 2.0, 3.0, 8.0]
    assert gamma(waad, nothing, strategy="local_chunk") == [1.5, 1, 1, 1, 1.5, 1]
    # q = 1 selects all that is defined and nothing more.
    assert gamma(waad, nothing, strategy="local_chunk", q=1.0) == [1.5, 1, 1, 1.5, 1.5, 1]
    # An anchor of unknown WAAD is not dominated; the anchor after it has Δ_0 = 3 among the three before it.
    # Median of 1, 2, 3, 4, 8 is 3, τ_Δ = 3 (T_loc = {0, 4}); anchors 2 and 3 of 5 defined.
    fai = [0.1, 0.1, 0.9, 0.8, 0.1, NAN]
    assert gamma(waad, fai, strategy="coupled") == [1.25, 1, 1.5, 1.25, 1, 1]


def test_gamma_is_detached() -> None:
    waad, fai = torch.tensor(WAAD, requires_grad=True), torch.tensor(FAI, requires_grad=True)
    assert not credit_weights(waad, fai, strategy="coupled").requires_grad


# --- Batches


def padded_batch(lengths: list[int], T: int, seed: int) -> tuple[dict[str, Tensor], Tensor, list[slice]]:
    """Fine-grained signals of responses that start anywhere, NaN outside them."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    mask, places = torch.zeros(len(lengths), T, dtype=torch.bool), []
    for row, n in enumerate(lengths):
        start = rng.randint(0, T - n)
        places.append(slice(start, start + n))
        mask[row, places[-1]] = True
    tensors = {
        name: torch.rand(mask.shape, generator=generator).masked_fill(~mask, NAN) for name in ("waad", "fai", "entropy")
    }
    return tensors, mask, places


@pytest.mark.parametrize("strategy", ["none", "random", "entropy", "local_chunk", "global_anchor", "coupled"])
def test_a_batch_is_its_responses_one_by_one(strategy: str) -> None:
    tensors, mask, places = padded_batch([17, 0, 1, 40, 2, 33], 40, seed=3)
    together = batch_credit_weights(
        signals_of(**tensors), mask, CreditConfig(strategy=strategy), torch.Generator().manual_seed(7)
    )
    assert together.dtype == torch.float32
    assert (together[~mask] == 1).all()
    generator = torch.Generator().manual_seed(7)
    for row, place in enumerate(places):
        signals = {name: tensor[row, place] for name, tensor in tensors.items()}
        alone = credit_weights(**signals, strategy=strategy, generator=generator)
        assert torch.equal(together[row, place], alone)
    assert bool((together > 1).any()) == (strategy != "none")


def test_random_depends_on_the_seed_alone() -> None:
    tensors, mask, _ = padded_batch([30, 12], 30, seed=0)

    def draw(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return batch_credit_weights(signals_of(**tensors), mask, CreditConfig(strategy="random"), generator)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert (draw(1) > 1).sum(dim=-1).tolist() == [12, 5]  # ⌈0.4·30⌉, ⌈0.4·12⌉ = ⌈4.8⌉
    # Over many draws each position is as likely as any other: 0.4 ± 5 standard errors.
    share = torch.stack([draw(seed)[0] > 1 for seed in range(400)]).float().mean(dim=0)
    assert (share - 0.4).abs().max() < 5 * math.sqrt(0.4 * 0.6 / 400)


def test_random_ignores_the_signals() -> None:
    options = {"strategy": "random", "gamma_amp": 3.0}
    bottom = gamma(WAAD, FAI, **options, select="bottom", generator=torch.Generator().manual_seed(1))
    undefined = gamma([NAN] * 10, [NAN] * 10, **options, generator=torch.Generator().manual_seed(1))
    assert bottom == undefined
    assert sorted(bottom) == [1] * 6 + [3] * 4


def test_empty_batches() -> None:
    for shape in ((0, 5), (3, 0)):
        mask = torch.zeros(shape, dtype=torch.bool)
        weights = batch_credit_weights(signals_of(torch.zeros(shape), torch.zeros(shape)), mask, CreditConfig())
        assert weights.shape == shape
        assert weights.dtype == torch.float32


# --- Bad input


def test_defaults_are_the_papers() -> None:
    config = CreditConfig()
    assert (config.strategy, config.top_fraction, config.gamma_amp) == ("coupled", 0.4, 1.5)
    assert (config.alpha, config.neighborhood, config.select) == (0.5, 3, "top")
    assert config.tau_waad == QuantileThreshold(quantile=0.5)
    assert config.tau_delta is None
    assert config.apply_to == "nonnegative"
    assert all(field.description for field in CreditConfig.model_fields.values())


def test_config_reads_back_what_it_writes() -> None:
    config = CreditConfig(tau_waad={"value": 2.5}, tau_delta={"quantile": 0.9})
    written = config.model_dump()
    assert written["tau_waad"] == {"value": 2.5}
    assert CreditConfig.model_validate(written) == config


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("strategy", "local"),
        ("q", 0.0),
        ("q", 1.1),
        ("q", NAN),
        ("gamma_amp", 0.5),
        ("gamma_amp", math.inf),
        ("alpha", -0.1),
        ("alpha", 1.1),
        ("neighborhood", 0),
        ("tau_waad", {"quantile": 1.5}),
        ("tau_waad", {"quantile": 0.5, "value": 1.0}),
        ("tau_waad", {}),
        ("tau_waad", None),
        ("tau_delta", {"value": NAN}),
        ("tau_delta", {"level": 1.0}),
        ("select", "middle"),
        ("apply_to", "negative"),
        ("gama_amp", 1.5),
    ],
)
def test_config_refuses(field: str, value: object) -> None:
    with pytest.raises(ValidationError, match=field):
        CreditConfig.model_validate({field: value})
    if field not in ("apply_to", "gama_amp"):
        with pytest.raises(ValueError, match=field):
            gamma(WAAD, FAI, **{"strategy": "coupled", field: value})


def test_shapes_are_checked() -> None:
    one = torch.ones(4)
    with pytest.raises(ValueError, match=r"waad has shape \[1, 4\]"):
        credit_weights(one[None], one, strategy="coupled")
    with pytest.raises(ValueError, match=r"fai has shape \[3\]; it must be \[4\]"):
        credit_weights(one, one[:3], strategy="coupled")
    with pytest.raises(ValueError, match=r"entropy has shape \[3\]"):
        credit_weights(one, one, entropy=one[:3], strategy="coupled")
    batch = torch.ones(2, 4)
    mask = batch.bool()
    for name, signals in {
        "signals.waad": signals_of(batch[:, :3], batch),
        "signals.fai": signals_of(batch, batch[:1]),
        "signals.entropy": signals_of(batch, batch, one),
    }.items():
        with pytest.raises(ValueError, match=f"{name} has shape"):
            batch_credit_weights(signals, mask, CreditConfig())
    with pytest.raises(ValueError, match="response_mask has shape"):
        batch_credit_weights(signals_of(batch, batch), mask[0], CreditConfig())
    with pytest.raises(ValueError, match="entropy is None"):
        batch_credit_weights(signals_of(batch, batch), mask, CreditConfig(strategy="entropy"))
