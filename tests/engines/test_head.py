"""Log-probs from the fp32 product of hidden states and head: exact in bfloat16, their gradients, their memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from rhythm.engines import head
from rhythm.engines.head import exact_head, exact_logits, logprobs_and_entropies, output_head
from rhythm.engines.interfaces import Rollout, SamplingConfig
from rhythm.engines.local.infer import GenerateInfer
from rhythm.engines.local.logprobs import response_logprobs

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]


def exact(hidden: Tensor, weight: Tensor, token: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """In float64, from the operands as they are."""
    log_p = (hidden.double() @ weight.double().T / temperature).log_softmax(dim=-1)
    return log_p.gather(1, token[:, None])[:, 0], -(log_p.exp() * log_p).sum(dim=-1)


def operands(rows: int = 96, width: int = 64, words: int = 3000, scale: float = 4.0) -> tuple[Tensor, Tensor, Tensor]:
    """bfloat16 hidden states and head whose logits reach 15, and tokens."""
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=random).bfloat16()
    weight = (torch.randn(words, width, generator=random) * scale / width**0.5).bfloat16()
    logits = hidden.double() @ weight.double().T
    assert 15 < logits.abs().max() < 25
    return hidden, weight, torch.distributions.Categorical(logits=logits).sample()


@pytest.fixture(params=[700, 8192])
def small_slices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "SLICE", request.param)


@pytest.mark.usefixtures("small_slices")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_bfloat16_is_exact_but_for_fp32_rounding(device: str, temperature: float) -> None:
    hidden, weight, token = (x.to(device) for x in operands())
    logprobs, entropies = exact(hidden, weight, token, temperature)
    rounded = ((hidden.float() @ weight.float().T).bfloat16().float() / temperature).log_softmax(dim=-1)
    assert (rounded.gather(1, token[:, None])[:, 0] - logprobs).abs().mean() > 0.005  # what is avoided
    actual = logprobs_and_entropies(hidden, weight, token, temperature=temperature, chunk=40)
    assert actual[0].dtype == actual[1].dtype == torch.float32
    assert (actual[0] - logprobs).abs().max() < 2e-5
    assert (actual[1] - entropies).abs().max() < 2e-5


@pytest.mark.usefixtures("small_slices")
@pytest.mark.parametrize("device", DEVICES)
def test_gradients_of_bfloat16_are_those_of_float64(device: str) -> None:
    hidden, weight, token = (x.to(device) for x in operands())
    wide = [x.double().requires_grad_() for x in (hidden, weight)]
    a, b = torch.randn(2, len(token), generator=torch.Generator().manual_seed(1)).to(device)
    logprobs, entropies = exact(*wide, token, 0.6)
    expected = torch.autograd.grad((a * logprobs + b * entropies).sum(), wide)
    narrow = [hidden.requires_grad_(), weight.requires_grad_()]
    logprobs, entropies = logprobs_and_entropies(*narrow, token, temperature=0.6, chunk=40)
    actual = torch.autograd.grad((a * logprobs + b * entropies).sum(), narrow)
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine - theirs).norm() < 4e-3 * theirs.norm()  # bfloat16's own rounding is 2e-3


@pytest.mark.parametrize("used", ["logprobs", "entropies", "both"])
@pytest.mark.parametrize("biased", [False, True])
def test_gradients_in_float64(used: str, biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "SLICE", 7)
    random = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(shape, generator=random, dtype=torch.float64, requires_grad=True) for shape in [(6, 5), (20, 5), 20]
    )
    token = torch.tensor([0, 6, 7, 13, 19, 19])

    def compute(hidden: Tensor, weight: Tensor, bias: Tensor) -> Any:
        actual = logprobs_and_entropies(
            hidden, weight, token, temperature=0.7, chunk=4, bias_V=bias if biased else 0 * bias
        )
        return {"logprobs": actual[0], "entropies": actual[1], "both": actual}[used]

    assert torch.autograd.gradcheck(compute, (hidden, weight, bias))


def test_impossible_tokens_and_no_tokens() -> None:
    hidden, weight = torch.ones(2, 3, requires_grad=True), torch.zeros(5, 3, requires_grad=True)
    bias = torch.tensor([0.0, -torch.inf, 0.0, -torch.inf, 0.0])
    logprobs, entropies = logprobs_and_entropies(
        hidden, weight, torch.tensor([0, 4]), temperature=1.0, chunk=9, bias_V=bias
    )
    log_3 = torch.full((2,), 3.0).log()
    torch.testing.assert_close(logprobs, -log_3)
    torch.testing.assert_close(entropies, log_3)
    (logprobs.sum() + entropies.sum()).backward()
    third = torch.tensor([1 - 2 / 3, 0, -2 / 3, 0, 1 - 2 / 3])
    torch.testing.assert_close(weight.grad, third[:, None].expand(5, 3))
    none = logprobs_and_entropies(hidden[:0], weight, torch.zeros(0, dtype=torch.long), temperature=1.0, chunk=9)
    assert [x.shape for x in none] == [(0,), (0,)]


def peak_bytes(run: Callable[[], None]) -> int:
    """The most that torch had allocated beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    live = highest = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            highest = max(highest, live)
    return highest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_backward_hold_less_than_one_copy_of_a_chunks_logits(dtype: torch.dtype) -> None:
    rows, width, words, chunk = 256, 16, 4 * head.SLICE, 128
    hidden = torch.randn(rows, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(words, width, dtype=dtype, requires_grad=True)
    token = torch.randint(0, words, (rows,))
    one_copy = 4 * chunk * words

    def run() -> None:
        logprobs, entropies = logprobs_and_entropies(hidden, weight, token, temperature=0.9, chunk=chunk)
        torch.autograd.backward(logprobs.sum() + entropies.sum())

    def whole() -> None:
        with torch.no_grad():
            logits = hidden[:chunk].float() @ weight.float().T
            del logits

    assert peak_bytes(whole) >= one_copy  # the measure sees a copy
    assert peak_bytes(run) < one_copy


def test_a_bfloat16_model_gives_log_probs_of_its_fp32_product(model: Any, make_rollout: Callable[..., Rollout]) -> None:
    model = model.bfloat16()
    rollout = make_rollout()
    with torch.no_grad():
        states = model.base_model(input_ids=rollout.input_ids, attention_mask=rollout.attention_mask.long())
        actual = response_logprobs(model, rollout, temperature=1.0, chunk=9)
    inside = rollout.response_mask
    hidden, token = states.last_hidden_state[:, :-1][inside[:, 1:]], rollout.input_ids[:, 1:][inside[:, 1:]]
    logprobs, entropies = exact(hidden, model.lm_head.weight.detach(), token, 1.0)
    assert (actual.logprobs[inside] - logprobs).abs().max() < 1e-5
    assert (actual.entropy[inside] - entropies).abs().max() < 1e-5


def test_autocast_rounds_operands_and_not_their_product(model: Any, make_rollout: Callable[..., Rollout]) -> None:
    rollout = make_rollout()
    with torch.autocast("cpu", torch.bfloat16):
        states = model.base_model(input_ids=rollout.input_ids, attention_mask=rollout.attention_mask.long())
        actual = response_logprobs(model, rollout, temperature=1.0, chunk=9)
    inside = rollout.response_mask
    hidden, token = states.last_hidden_state[:, :-1][inside[:, 1:]], rollout.input_ids[:, 1:][inside[:, 1:]]
    expected, _ = exact(hidden.bfloat16(), model.lm_head.weight.bfloat16(), token, 1.0)
    assert (actual.logprobs[inside] - expected).abs().max() < 1e-5
    assert actual.logprobs[inside].requires_grad


def test_generate_draws_from_and_reports_the_fp32_product(model: Any) -> None:
    model = model.bfloat16()
    states: list[Tensor] = []
    model.lm_head.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0][:, -1]))
    drawn: list[Tensor] = []
    model.lm_head.register_forward_hook(lambda _, inputs, logits: drawn.append(logits))
    # No token ends a response, so that each forward pass but that of the prompts has all rows.
    rollout = GenerateInfer(model, end_ids=(1000,), pad_id=0).generate(
        [[1, 20, 30, 40, 50], [1, 60]], 4, SamplingConfig(max_new_tokens=12), seed=5
    )
    states[0] = states[0][rollout.group]
    assert {logits.dtype for logits in drawn} == {torch.float32}
    for row, prompt_len in enumerate(rollout.prompt_lens.tolist()):
        positions = rollout.response_mask[row].nonzero()[:, 0]
        hidden = torch.stack([states[t - prompt_len][row] for t in positions.tolist()])
        expected, _ = exact(hidden, model.lm_head.weight.detach(), rollout.input_ids[row, positions], 1.0)
        assert (rollout.logprobs[row, positions] - expected).abs().max() < 1e-5


def test_generation_in_bfloat16_converts_the_head_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model.bfloat16()
    converted: list[tuple[int, ...]] = []
    operand = head._operand

    def counted(x: Tensor, dtype: torch.dtype) -> Tensor:
        result = operand(x, dtype)
        if result is not x:
            converted.append(tuple(x.shape))
        return result

    monkeypatch.setattr(head, "_operand", counted)
    GenerateInfer(model, end_ids=(1000,), pad_id=0).generate([[1, 20]], 3, SamplingConfig(max_new_tokens=9), seed=5)
    weight, *states = converted
    assert weight == tuple(model.lm_head.weight.shape)
    assert [shape[0] for shape in states] == [1] + 8 * [3]


def test_the_exact_head_is_left_alone_in_float32(model: Any) -> None:
    with exact_head(model):
        assert "forward" not in vars(model.lm_head)
    model.bfloat16()
    hidden = torch.randn(2, 3, 32).bfloat16()
    with exact_head(model):
        logits = model.lm_head(hidden)
    assert logits.dtype == torch.float32
    expected = hidden.double() @ model.lm_head.weight.double().T
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits, exact_logits(hidden, model.lm_head.weight))
    assert model.lm_head(hidden).dtype == torch.bfloat16


def test_a_head_that_is_no_linear_layer_is_refused(model: Any) -> None:
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match="its output embedding is a Sequential"):
        output_head(model)
