from __future__ import annotations

import math
from dataclasses import fields

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from rhythm.credit.loss import BatchTotals, LossConfig, LossOutput, policy_loss

NAN = math.nan

# Two responses, of 3 tokens and of 1, in rows of 4.
MASK = torch.tensor([[0, 1, 1, 1], [1, 0, 0, 0]]).bool()
# r     –    1.5   1.1   0.5  |  0.5
# A     –    1     1     1    | −2
# r·A        1.5   1.1   0.5  | −1
# clip·A     1.2   1.1   0.8  | −1.6
# min        1.2   1.1   0.5  | −1.6     clipped off: the first and the last
RATIO = torch.tensor([[1.0, 1.5, 1.1, 0.5], [0.5, 1.0, 1.0, 1.0]])
OLD = torch.tensor([[-3.0, -0.7, -1.0, -2.0], [-0.9, -5.0, -5.0, -5.0]])
ADVANTAGES = torch.tensor([[9.0, 1.0, 1.0, 1.0], [-2.0, 9.0, 9.0, 9.0]])


def run(config: LossConfig | None = None, **options: object) -> tuple[LossOutput, Tensor]:
    """The loss of the case above, and its gradient with respect to the log-probs."""
    logprobs = (OLD + RATIO.log()).requires_grad_()
    output = policy_loss(logprobs, OLD, ADVANTAGES, MASK, config, **options)
    output.loss.backward()
    assert logprobs.grad is not None
    return output, logprobs.grad


def close(actual: Tensor | None, expected: float | list[list[float]]) -> None:
    assert actual is not None
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_loss_per_sequence() -> None:
    # −(½·(1.2 + 1.1 + 0.5)/3 + ½·(−1.6)/1) = −(0.4666667 − 0.8).
    output, gradient = run()
    close(output.loss, 0.3333333)
    # d(r·A)/d logp = r·A where the clip doesn't bite: −1.1/6 and −0.5/6.
    close(gradient, [[0, 0, -0.1833333, -0.0833333], [0, 0, 0, 0]])


def test_loss_per_token() -> None:
    # −(1.2 + 1.1 + 0.5 − 1.6)/4
    output, gradient = run(LossConfig(normalization="token"))
    close(output.loss, -0.3)
    close(gradient, [[0, 0, -1.1 / 4, -0.5 / 4], [0, 0, 0, 0]])


def test_loss_of_dr_grpo() -> None:
    # −1.2/(2 responses · 8 tokens)
    output, gradient = run(LossConfig(normalization="dr_grpo", max_tokens=8))
    close(output.loss, -1.2 / 16)
    close(gradient, [[0, 0, -1.1 / 16, -0.5 / 16], [0, 0, 0, 0]])


def test_measures_do_not_depend_on_the_normalization() -> None:
    for config in (
        LossConfig(),
        LossConfig(normalization="token"),
        LossConfig(normalization="dr_grpo", max_tokens=8),
    ):
        output, _ = run(config)
        close(output.clip_share, 2 / 4)
        close(output.ratio_mean, (1.5 + 1.1 + 0.5 + 0.5) / 4)
        # r − 1 − log r: 0.5 − 0.4054651, 0.1 − 0.0953102, twice −0.5 + 0.6931472.
        close(output.approx_kl, (0.0945349 + 0.0046898 + 2 * 0.1931472) / 4)
        assert output.entropy is None
        assert output.reference_kl is None
        assert all(
            not value.requires_grad for name, value in vars(output).items() if name != "loss" and value is not None
        )


def test_asymmetric_clip() -> None:
    # 1 + 0.6 lets 1.5 through, 1 − 0.6 lets 0.5 · (−2) = −1 through.
    output, gradient = run(LossConfig(clip_low=0.6, clip_high=0.6))
    close(output.loss, -((1.5 + 1.1 + 0.5) / 6 - 1 / 2))
    close(output.clip_share, 0.0)
    close(gradient, [[0, -0.25, -1.1 / 6, -0.5 / 6], [0.5, 0, 0, 0]])
    # Only above: the last is still clipped at 0.8.
    output, _ = run(LossConfig(clip_high=0.6))
    close(output.loss, -((1.5 + 1.1 + 0.5) / 6 - 1.6 / 2))
    close(output.clip_share, 1 / 4)
    # Only below.
    output, _ = run(LossConfig(clip_low=0.6))
    close(output.loss, -((1.2 + 1.1 + 0.5) / 6 - 1 / 2))


def test_clip_is_one_sided() -> None:
    # A > 0 with a ratio far below, A < 0 with one far above: never clipped.
    logprobs = torch.tensor([[0.1, 3.0]]).log().requires_grad_()
    mask = torch.ones(1, 2, dtype=torch.bool)
    output = policy_loss(logprobs, torch.zeros(1, 2), torch.tensor([[1.0, -1.0]]), mask)
    close(output.loss, -(0.1 - 3.0) / 2)
    close(output.clip_share, 0.0)
    output.loss.backward()
    assert logprobs.grad is not None
    close(logprobs.grad, [[-0.05, 1.5]])


def test_dual_clip() -> None:
    """Dual-clip PPO, Ye et al. (2020): with Ã < 0, max(min(r·Ã, clip(r)·Ã), c·Ã), for any r > c; Ã ≥ 0 is unchanged."""
    # r    5     2.9   5 (Ã > 0)   0.5
    # Ã   −2    −2     1          −1
    # r·Ã −10   −5.8   5          −0.5
    # min −10   −5.8   1.2        −0.8      (clip: 1.2 of Ã > 0, 0.8 of Ã < 0)
    # max −6    −5.8   1.2        −0.8      (c = 3)
    ratio = torch.tensor([[5.0, 2.9, 5.0, 0.5]])
    advantages = torch.tensor([[-2.0, -2.0, 1.0, -1.0]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    logprobs = ratio.log().requires_grad_()
    output = policy_loss(logprobs, torch.zeros(1, 4), advantages, mask, LossConfig(dual_clip=3))
    close(output.loss, -(-6 - 5.8 + 1.2 - 0.8) / 4)
    output.loss.backward()
    assert logprobs.grad is not None
    close(logprobs.grad, [[0, 5.8 / 4, 0, 0]])
    close(output.dual_clip_share, 1 / 4)
    close(output.clip_share, 2 / 4)
    close(output.parts().float(), [output.loss.item(), 0.5, 0.25, output.approx_kl.item(), 0])
    without = policy_loss(ratio.log(), torch.zeros(1, 4), advantages, mask)
    close(without.loss, -(-10 - 5.8 + 1.2 - 0.8) / 4)
    close(without.dual_clip_share, 0.0)


def test_cispo() -> None:
    """MiniMax-M1: sg(clip(r, 1 − ε_low, 1 + ε_high))·Ã·log π; every token has a gradient."""
    # clip_low 1 is none, clip_high 0.2: weights 1.2, 1.1, 0.5 | 0.5; times Ã: 1.2, 1.1, 0.5 | −1.
    output, gradient = run(LossConfig(objective="cispo", clip_low=1, normalization="token"))
    now = OLD + RATIO.log()
    close(output.loss, (-(1.2 * now[0, 1] + 1.1 * now[0, 2] + 0.5 * now[0, 3] - 1.0 * now[1, 0]) / 4).item())
    close(gradient, [[0, -1.2 / 4, -1.1 / 4, -0.5 / 4], [1 / 4, 0, 0, 0]])
    close(output.clip_share, 1 / 4)
    close(output.dual_clip_share, 0.0)
    # With a lower end as well, 0.8: weights 1.2, 1.1, 0.8 | 0.8.
    _, gradient = run(LossConfig(objective="cispo", normalization="token"))
    close(gradient, [[0, -1.2 / 4, -1.1 / 4, -0.8 / 4], [1.6 / 4, 0, 0, 0]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dual_clip": 1.0}, "dual_clip"),
        ({"dual_clip": 1.2}, r"dual_clip is 1\.2: must be above 1 \+ clip_high = 1\.2"),
        ({"dual_clip": 3, "objective": "cispo"}, "dual_clip is 3, which needs objective clip, not cispo"),
        ({"objective": "ppo"}, "objective"),
    ],
)
def test_objectives_that_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        LossConfig.model_validate(options)


def test_on_policy_gradient_is_the_policy_gradient() -> None:
    # r = 1: the loss is −mean A, its gradient −A/(|o|·B).
    logprobs = OLD.clone().requires_grad_()
    output = policy_loss(logprobs, OLD, ADVANTAGES, MASK)
    output.loss.backward()
    assert logprobs.grad is not None
    close(output.loss, -(1 - 2) / 2)
    close(logprobs.grad, [[0, -1 / 6, -1 / 6, -1 / 6], [1.0, 0, 0, 0]])
    close(output.approx_kl, 0.0)
    close(output.ratio_mean, 1.0)


def test_kl_to_the_reference() -> None:
    # ρ = reference/new: 2, 1, 1 | ½, so ρ − 1 − log ρ is
    # 1 − 0.6931472 = 0.3068528, 0, 0 | −½ + 0.6931472 = 0.1931472.
    rho = torch.tensor([[7.0, 2.0, 1.0, 1.0], [0.5, 7.0, 7.0, 7.0]])
    reference = OLD + RATIO.log() + rho.log()
    plain, plain_gradient = run(ref_logprobs_BT=reference)
    close(plain.loss, 0.3333333)
    close(plain.reference_kl, (0.3068528 + 0.1931472) / 4)
    output, gradient = run(LossConfig(kl_coef=0.1), ref_logprobs_BT=reference)
    close(output.loss, 0.3333333 + 0.1 * (0.3068528 / 6 + 0.1931472 / 2))
    close(output.reference_kl, (0.3068528 + 0.1931472) / 4)
    # d(ρ − 1 − log ρ)/d logp = 1 − ρ.
    close(gradient - plain_gradient, [[0, 0.1 * -1 / 6, 0, 0], [0.1 * 0.5 / 2, 0, 0, 0]])


def test_entropy_bonus() -> None:
    entropy = torch.tensor([[NAN, 1.0, 2.0, 3.0], [4.0, NAN, NAN, NAN]]).requires_grad_()
    output, _ = run(entropy_BT=entropy)
    close(output.loss, 0.3333333)
    close(output.entropy, 10 / 4)
    output, _ = run(LossConfig(entropy_coef=0.01), entropy_BT=entropy)
    close(output.loss, 0.3333333 - 0.01 * (6 / 6 + 4 / 2))
    close(output.entropy, 10 / 4)
    assert entropy.grad is not None
    close(entropy.grad, [[0, -0.01 / 6, -0.01 / 6, -0.01 / 6], [-0.01 / 2, 0, 0, 0]])


CONFIGS = [
    LossConfig(normalization=normalization, max_tokens=9, kl_coef=0.1, entropy_coef=0.01, clip_high=0.28)
    for normalization in ("sequence", "token", "dr_grpo")
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.normalization)
@pytest.mark.parametrize("sizes", [[3, 3, 3], [1, 7, 1], [8, 1]])
def test_micro_batches_add_up(config: LossConfig, sizes: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (9, 12)
    old, reference, noise, advantages = torch.randn(4, *shape, generator=generator)
    lengths = torch.tensor([12, 1, 5, 0, 7, 3, 12, 2, 9])  # one row without response tokens
    mask = torch.arange(12) < lengths[:, None]
    parameters = torch.randn(12, generator=generator).requires_grad_()

    def part(rows: slice, totals: BatchTotals | None) -> LossOutput:
        logprobs = old[rows] + 0.3 * noise[rows] * parameters
        entropy = noise[rows] ** 2 * parameters
        return policy_loss(
            logprobs,
            old[rows],
            advantages[rows],
            mask[rows],
            config,
            totals=totals,
            ref_logprobs_BT=reference[rows],
            entropy_BT=entropy,
        )

    whole = part(slice(None), None)
    (gradient,) = torch.autograd.grad(whole.loss, parameters)
    totals, start, outputs = BatchTotals.of(mask), 0, []
    assert totals == BatchTotals(sequences=8, tokens=51)
    for size in sizes:
        outputs.append(part(slice(start, start + size), totals))
        outputs[-1].loss.backward()
        start += size
    torch.testing.assert_close(parameters.grad, gradient, rtol=1e-5, atol=1e-6)
    for field in fields(LossOutput):
        added = torch.stack([getattr(output, field.name) for output in outputs]).sum()
        torch.testing.assert_close(added, getattr(whole, field.name), rtol=1e-5, atol=1e-6)
    assert 0 < whole.clip_share < 1


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.normalization)
@pytest.mark.parametrize("poison", [NAN, math.inf, -math.inf])
def test_what_stands_outside_the_responses_does_not_matter(config: LossConfig, poison: float) -> None:
    reference, entropy = OLD - 0.1, OLD.abs()

    def losses(fill: float) -> tuple[LossOutput, Tensor]:
        filled = [x.masked_fill(~MASK, fill) for x in (OLD + RATIO.log(), OLD, ADVANTAGES, reference, entropy)]
        logprobs = filled[0].requires_grad_()
        output = policy_loss(logprobs, *filled[1:3], MASK, config, ref_logprobs_BT=filled[3], entropy_BT=filled[4])
        output.loss.backward()
        assert logprobs.grad is not None
        return output, logprobs.grad

    (clean, clean_gradient), (poisoned, poisoned_gradient) = losses(0.0), losses(poison)
    for field in fields(LossOutput):
        assert torch.equal(getattr(clean, field.name), getattr(poisoned, field.name))
    assert clean.loss.isfinite()
    assert torch.equal(clean_gradient, poisoned_gradient)
    assert (poisoned_gradient[~MASK] == 0).all()


def test_nan_inside_a_response_shows() -> None:
    old = OLD.clone()
    old[0, 2] = NAN
    assert policy_loss(OLD, old, ADVANTAGES, MASK).loss.isnan()


def test_extreme_ratios_keep_gradients_finite() -> None:
    logprobs = torch.tensor([[0.0, -300.0, 0.0]]).requires_grad_()
    old = torch.tensor([[-300.0, 0.0, -300.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    output = policy_loss(
        logprobs,
        old,
        torch.tensor([[1.0, 1.0, -1.0]]),
        mask,
        LossConfig(kl_coef=0.1),
        ref_logprobs_BT=old,
    )
    output.loss.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.isfinite().all()
    for field in fields(LossOutput):
        value = getattr(output, field.name)
        assert value is None or value.isfinite()


def test_a_micro_batch_without_responses_adds_nothing() -> None:
    logprobs = OLD.clone().requires_grad_()
    output = policy_loss(logprobs, OLD, ADVANTAGES, torch.zeros_like(MASK))
    output.loss.backward()
    assert output.loss.item() == output.ratio_mean.item() == 0.0
    assert logprobs.grad is not None
    assert (logprobs.grad == 0).all()


def test_low_precision_log_probs_are_summed_in_fp32() -> None:
    output = policy_loss(OLD.bfloat16(), OLD.double(), ADVANTAGES.double(), MASK.int())
    assert output.loss.dtype == torch.float32


def test_defaults() -> None:
    config = LossConfig()
    assert (config.clip_low, config.clip_high, config.normalization) == (0.2, 0.2, "sequence")
    assert (config.kl_coef, config.entropy_coef) == (0.0, 0.0)
    assert all(field.description for field in LossConfig.model_fields.values())


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"clip_low": 0.0}, "clip_low"),
        ({"clip_low": 1.1}, "clip_low"),
        ({"clip_high": -0.2}, "clip_high"),
        ({"normalization": "mean"}, "normalization"),
        ({"normalization": "dr_grpo"}, "needs max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"kl_coef": -1.0}, "kl_coef"),
        ({"entropy_coef": NAN}, "entropy_coef"),
        ({"clip": 0.2}, "clip"),
    ],
)
def test_config_refuses(values: dict[str, object], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        LossConfig.model_validate(values)


def test_refuses() -> None:
    with pytest.raises(ValueError, match=r"ref_logprobs is None; kl_coef = 0\.1"):
        run(LossConfig(kl_coef=0.1))
    with pytest.raises(ValueError, match=r"entropy is None; entropy_coef = 0\.1"):
        run(LossConfig(entropy_coef=0.1))
    short = OLD[:, :3]
    for arguments, named in (
        ((short, OLD, ADVANTAGES, MASK), "logprobs"),
        ((OLD, short, ADVANTAGES, MASK), "old_logprobs"),
        ((OLD, OLD, ADVANTAGES[:1], MASK), "advantages"),
        ((OLD, OLD, ADVANTAGES, MASK[0]), "response_mask"),
    ):
        with pytest.raises(ValueError, match=f"^{named} has shape"):
            policy_loss(*arguments)
    with pytest.raises(ValueError, match="ref_logprobs has shape"):
        run(ref_logprobs_BT=short)
    with pytest.raises(ValueError, match="entropy has shape"):
        run(entropy_BT=short)
