from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from rhythm.engines.batches import concatenate
from rhythm.engines.interfaces import Rollout, SamplingConfig
from rhythm.engines.local.infer import GenerateInfer
from rhythm.engines.stopping import StopStrings, cut_at_stop, response_texts
from rhythm.tiny.model import build_tokenizer

PROMPTS = [[1, 20, 30, 40, 50], [1, 60], [1, 7, 8, 9]]
END, PAD = 2, 0


def engine(model: Any, end_ids: tuple[int, ...] = (END,)) -> GenerateInfer:
    return GenerateInfer(model, end_ids=end_ids, pad_id=PAD)


def naive_logprobs(model: Any, rollout: Rollout, temperature: float) -> torch.Tensor:
    """[B, T] row by row, without padding, from the logits as they are; 0 outside the response."""
    expected = torch.zeros(rollout.input_ids.shape)
    for row, length in enumerate(rollout.attention_mask.sum(dim=1).tolist()):
        ids = rollout.input_ids[row, :length]
        with torch.no_grad():
            log_softmax = (model(ids[None]).logits[0] / temperature).log_softmax(dim=-1)
        for t in range(int(rollout.prompt_lens[row]), length):
            expected[row, t] = log_softmax[t - 1, ids[t]]
    return expected


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_are_those_of_the_sampled_tokens(model: Any, temperature: float) -> None:
    sampling = SamplingConfig(temperature=temperature, max_new_tokens=9)
    rollout = engine(model).generate(PROMPTS, 3, sampling, seed=5)
    expected = naive_logprobs(model, rollout, temperature)
    torch.testing.assert_close(rollout.logprobs, expected, rtol=1e-4, atol=1e-5)
    assert (rollout.logprobs[rollout.response_mask] < 0).all()


@pytest.mark.parametrize("fails", [False, True])
def test_every_module_keeps_its_mode(model: Any, fails: bool) -> None:
    model.train()
    model.lm_head.eval()  # as a frozen part may be
    modes = {name: module.training for name, module in model.named_modules()}
    seen: list[bool] = []

    def look(*_: Any) -> None:
        seen.append(any(module.training for module in model.modules()))
        if fails:
            raise torch.OutOfMemoryError("out of memory")

    model.register_forward_pre_hook(look)
    with pytest.raises(torch.OutOfMemoryError) if fails else nullcontext():
        engine(model).generate(PROMPTS, 1, SamplingConfig(max_new_tokens=2), seed=0)
    assert set(seen) == {False}
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_log_probs_do_not_know_of_top_k(model: Any) -> None:
    rollout = engine(model).generate(PROMPTS, 2, SamplingConfig(top_k=3, max_new_tokens=6), seed=1)
    torch.testing.assert_close(rollout.logprobs, naive_logprobs(model, rollout, 1.0), rtol=1e-4, atol=1e-5)


def test_layout_of_a_rollout(model: Any) -> None:
    """With a third of the vocabulary ending a response, some end early and some don't."""
    ends = tuple(range(2, 100, 12))
    rollout = engine(model, ends).generate(PROMPTS, 8, SamplingConfig(max_new_tokens=6), seed=3)
    assert rollout.group.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    assert set(rollout.finished.tolist()) == {True, False}
    for row in range(24):
        prompt = PROMPTS[row // 8]
        ids, mask = rollout.input_ids[row], rollout.response_mask[row]
        response = ids[mask].tolist()
        assert rollout.prompt_lens[row] == len(prompt)
        assert ids[: len(prompt)].tolist() == prompt
        assert ids[len(prompt) : len(prompt) + len(response)].tolist() == response
        assert rollout.attention_mask[row].tolist() == [t < len(prompt) + len(response) for t in range(len(ids))]
        assert (ids[len(prompt) + len(response) :] == PAD).all()
        assert not any(token in ends for token in response[:-1])
        assert bool(rollout.finished[row]) == (response[-1] in ends)
        assert len(response) <= 6
        assert rollout.finished[row] or len(response) == 6
    assert rollout.input_ids.shape[1] == int(rollout.attention_mask.sum(dim=1).max())
    assert (rollout.logprobs[~rollout.response_mask] == 0).all()


def test_padding_and_company_do_not_change_a_response(model: Any) -> None:
    greedy = SamplingConfig(temperature=0, max_new_tokens=8)
    together = engine(model).generate(PROMPTS, 1, greedy, seed=0)
    for row, prompt in enumerate(PROMPTS):
        alone = engine(model).generate([prompt], 1, greedy, seed=0)
        assert together.input_ids[row][together.attention_mask[row]].tolist() == alone.input_ids[0].tolist()


def test_chunks_of_rows_are_joined_in_order(model: Any) -> None:
    greedy = SamplingConfig(temperature=0, max_new_tokens=8)
    whole = engine(model, (2, 30, 31, 32, 33)).generate(PROMPTS, 2, greedy, seed=0)
    parts = engine(model, (2, 30, 31, 32, 33)).generate(
        PROMPTS, 2, greedy.model_copy(update={"rows_at_once": 2}), seed=0
    )
    for name in ("input_ids", "attention_mask", "response_mask", "prompt_lens", "group", "finished"):
        assert getattr(whole, name).equal(getattr(parts, name)), name
    torch.testing.assert_close(whole.logprobs, parts.logprobs, rtol=1e-4, atol=1e-5)


def test_a_rollout_is_a_function_of_its_seed(model: Any) -> None:
    sampling = SamplingConfig(max_new_tokens=12)
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first = engine(model).generate(PROMPTS, 2, sampling, seed=8)
    assert torch.get_rng_state().equal(before)
    torch.manual_seed(12)
    again = engine(model).generate(PROMPTS, 2, sampling, seed=8)
    other = engine(model).generate(PROMPTS, 2, sampling, seed=9)
    assert first.input_ids.equal(again.input_ids)
    assert first.logprobs.equal(again.logprobs)
    assert first.input_ids.shape != other.input_ids.shape or not first.input_ids.equal(other.input_ids)
    assert not first.input_ids[0].equal(first.input_ids[1])  # two responses to one prompt


def test_the_checkpoints_own_sampling_defaults_have_no_say(model: Any) -> None:
    sampling = SamplingConfig(max_new_tokens=12)
    expected = engine(model).generate(PROMPTS, 2, sampling, seed=8)
    own = GenerationConfig(top_k=1, repetition_penalty=1.7, no_repeat_ngram_size=1, do_sample=True, eos_token_id=3)
    model.generation_config = own
    actual = engine(model).generate(PROMPTS, 2, sampling, seed=8)
    assert actual.input_ids.equal(expected.input_ids)
    assert model.generation_config is own


def test_top_k_of_one_is_greedy(model: Any) -> None:
    greedy = engine(model).generate(PROMPTS, 1, SamplingConfig(temperature=0, max_new_tokens=8), seed=0)
    top = engine(model).generate(PROMPTS, 1, SamplingConfig(top_k=1, max_new_tokens=8), seed=4)
    assert top.input_ids.equal(greedy.input_ids)


def test_new_weights_are_used_and_versions_do_not_fall(model: Any) -> None:
    infer = engine(model)
    trained = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.mul_(-1.5)
    greedy = SamplingConfig(temperature=0, max_new_tokens=8)
    infer.update_weights(trained.state_dict(), version=3)
    assert infer.generate(PROMPTS, 1, greedy, 0).input_ids.equal(
        engine(trained).generate(PROMPTS, 1, greedy, 0).input_ids
    )
    with pytest.raises(ValueError, match="version is 2: must not be lower than 3"):
        infer.update_weights(trained.state_dict(), version=2)


@pytest.mark.parametrize(
    ("prompts", "n", "message"),
    [([], 1, "prompts"), ([[1], []], 1, "prompts"), ([[1]], 0, "n is 0")],
)
def test_bad_arguments(model: Any, prompts: list[list[int]], n: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine(model).generate(prompts, n, SamplingConfig(), seed=0)


def test_a_response_must_be_able_to_end(model: Any) -> None:
    with pytest.raises(ValueError, match="end_ids is empty"):
        engine(model, ())


def test_a_seeded_row_does_not_depend_on_its_company(model: Any) -> None:
    sampling = SamplingConfig(max_new_tokens=8)
    together = engine(model).generate_each([*PROMPTS, PROMPTS[0]], sampling, [5, 6, 7, 8])
    assert together.group.tolist() == [0, 1, 2, 3]
    for row, (prompt, seed) in enumerate(zip([*PROMPTS, PROMPTS[0]], [5, 6, 7, 8], strict=True)):
        alone = engine(model).generate_each([prompt], sampling, [seed])
        assert together.input_ids[row][together.attention_mask[row]].tolist() == alone.input_ids[0].tolist()
        longer = engine(model).generate_each([prompt], SamplingConfig(max_new_tokens=12), [seed])
        assert longer.input_ids[0].tolist()[: alone.input_ids.shape[1]] == alone.input_ids[0].tolist()
    first, last = (together.input_ids[row][together.attention_mask[row]].tolist() for row in (0, 3))
    assert first != last  # the same prompt by another seed
    torch.testing.assert_close(together.logprobs, naive_logprobs(model, together, 1.0), rtol=1e-4, atol=1e-5)


def test_seeded_draws_have_the_distribution_asked_for(model: Any) -> None:
    """Of 4,000 first tokens: each probability within five standard errors, and nothing outside top-k or top-p."""
    logits = model(torch.tensor([PROMPTS[1]])).logits[0, -1].detach()
    count = 4000
    for sampling in (
        SamplingConfig(temperature=0.5, max_new_tokens=1, rows_at_once=count),
        SamplingConfig(temperature=0.5, top_k=3, max_new_tokens=1, rows_at_once=count),
        SamplingConfig(temperature=0.5, top_p=0.6, max_new_tokens=1, rows_at_once=count),
    ):
        expected = (logits / sampling.temperature).softmax(dim=-1)
        ranked = expected.sort(descending=True)
        keep = torch.ones(len(expected), dtype=torch.bool)
        if sampling.top_k:
            keep = expected >= ranked.values[sampling.top_k - 1]
        if sampling.top_p < 1:
            within = int((ranked.values.cumsum(0) < sampling.top_p).sum()) + 1
            keep = torch.zeros(len(expected), dtype=torch.bool).index_fill(0, ranked.indices[:within], True)
        expected = expected * keep / expected[keep].sum()
        rollout = engine(model).generate_each([PROMPTS[1]] * count, sampling, range(count))
        actual = torch.bincount(rollout.input_ids[:, len(PROMPTS[1])], minlength=len(expected)) / count
        assert actual[~keep].sum() == 0
        assert ((actual - expected).abs() <= 5 * (expected * (1 - expected) / count).sqrt() + 1e-9).all()


def test_seeds_change_nothing_at_temperature_0(model: Any) -> None:
    greedy = SamplingConfig(temperature=0, max_new_tokens=8)
    assert torch.equal(
        engine(model).generate_each(PROMPTS, greedy, [1, 2, 3]).input_ids,
        engine(model).generate(PROMPTS, 1, greedy, seed=9).input_ids,
    )


def test_parts_are_handed_over_as_they_are_generated(model: Any) -> None:
    """In order, with their groups, as in the whole."""
    parts: list[Rollout] = []
    sampling = SamplingConfig(max_new_tokens=6, rows_at_once=4)
    whole = engine(model).generate(PROMPTS, 3, sampling, 8, parts.append)
    alone = engine(model).generate(PROMPTS, 3, sampling, 8)
    assert [len(part.group) for part in parts] == [4, 4, 1]
    joined = concatenate(parts, 0)
    for name in ("input_ids", "response_mask", "group", "logprobs"):
        assert getattr(joined, name).equal(getattr(whole, name))
        assert getattr(alone, name).equal(getattr(whole, name))


@pytest.mark.parametrize("rows_at_once", [256, 4])
def test_responses_of_a_prompt_are_handed_over_once_the_last_has_ended(model: Any, rows_at_once: int) -> None:
    """In the order in which prompts end, also across parts, each as in the whole."""
    ends = tuple(range(2, 100, 12))
    by_prompt = GenerateInfer(model, end_ids=ends, pad_id=PAD, by_prompt=True)
    parts: list[Rollout] = []
    sampled: list[int] = []

    def done(part: Rollout) -> None:
        parts.append(part)
        sampled.append(by_prompt.sampled)

    sampling = SamplingConfig(max_new_tokens=30, rows_at_once=rows_at_once)
    whole = by_prompt.generate(PROMPTS, 3, sampling, 8, done)
    alone = engine(model, ends).generate(PROMPTS, 3, sampling, 8)
    for name in ("input_ids", "response_mask", "group", "logprobs", "finished"):
        assert getattr(alone, name).equal(getattr(whole, name)), name
    assert sorted(part.group.tolist() for part in parts) == [[0] * 3, [1] * 3, [2] * 3]
    for part, position in zip(parts, sampled, strict=True):
        rows = whole.group == part.group[0]
        width = part.input_ids.shape[1]
        for name in ("input_ids", "attention_mask", "response_mask", "logprobs"):
            assert getattr(part, name).equal(getattr(whole, name)[rows, :width]), name
        for name in ("prompt_lens", "finished", "lens"):
            assert getattr(part, name).equal(getattr(whole, name)[rows]), name
        if rows_at_once == 256:
            assert position == int((part.lens - part.prompt_lens).max()), "at its last token"
    if rows_at_once == 256:
        assert sampled == sorted(sampled)
        assert sampled[0] < sampled[-1]


def test_what_is_done_with_a_response_changes_no_other(model: Any) -> None:
    """Not even with the model itself, whose logits are its own meanwhile, or torch's generator."""
    model.to(torch.bfloat16)
    ends, sampling = tuple(range(2, 100, 12)), SamplingConfig(max_new_tokens=30)
    undisturbed = engine(model, ends).generate(PROMPTS, 1, sampling, 8)
    probe = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        expected = model.eval()(probe).logits
    dtypes: list[torch.dtype] = []

    def done(part: Rollout) -> None:
        torch.rand(7)
        logits = model(probe).logits
        dtypes.append(logits.dtype)
        assert logits.equal(expected)

    rollout = GenerateInfer(model, end_ids=ends, pad_id=PAD, by_prompt=True).generate(PROMPTS, 1, sampling, 8, done)
    assert dtypes == [torch.bfloat16] * len(PROMPTS)
    assert rollout.input_ids.equal(undisturbed.input_ids)
    assert rollout.logprobs.equal(undisturbed.logprobs)


@pytest.mark.parametrize("seeded", [False, True])
def test_a_stop_string_ends_generation(model: Any, tokenizer: Any, seeded: bool) -> None:
    """What is left is what remains of the whole responses when they are cut; nothing is generated behind the last."""
    passes: list[int] = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    rows = [prompt for prompt in PROMPTS for _ in range(3)]
    stopping = GenerateInfer(model, end_ids=[tokenizer.eos_token_id], pad_id=PAD, tokenizer=tokenizer)

    def generated(stop: tuple[str, ...]) -> tuple[Rollout, int]:
        passes.clear()
        sampling = SamplingConfig(max_new_tokens=60, stop=stop)
        if seeded:
            rollout = stopping.generate_each(rows, sampling, range(9))
        else:
            rollout = stopping.generate(PROMPTS, 3, sampling, seed=5)
        return rollout, len(passes)

    whole, _ = generated(())
    texts = response_texts(whole, tokenizer)
    for stop in ((texts[0][9:11], texts[4][20]), tuple({text[2] for text in texts})):
        stopped, forward = generated(stop)
        expected = cut_at_stop(whole, tokenizer, stop)
        longest = int(expected.response_lens.max())
        assert stopped.response_lens.tolist() == expected.response_lens.tolist()
        assert stopped.finished.tolist() == expected.finished.tolist()
        assert response_texts(stopped, tokenizer) == response_texts(expected, tokenizer)
        torch.testing.assert_close(stopped.logprobs, expected.logprobs[:, : stopped.logprobs.shape[1]])
        assert forward <= longest + 1
    assert longest <= 8


def test_a_stop_string_of_many_tokens_is_seen_when_it_is_complete() -> None:
    tokenizer = build_tokenizer(260, ["x"])  # a token per byte
    ids = tokenizer("a é, 日本 and 日本語 b", add_special_tokens=False).input_ids
    stop = StopStrings(tokenizer, ("日本語", "never"))
    reached = [bool(stop.reached(torch.tensor([ids[:count]]))) for count in range(1, len(ids) + 1)]
    text = [tokenizer.decode(ids[:count]) for count in range(1, len(ids) + 1)]
    assert reached.index(True) == next(at for at, so_far in enumerate(text) if "日本語" in so_far)
