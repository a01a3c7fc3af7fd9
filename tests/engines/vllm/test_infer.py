"""A real vLLM against transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rhythm.engines.batches import assemble
from rhythm.engines.interfaces import Rollout, SamplingConfig
from rhythm.engines.parity import ParityError, compare, must_agree
from rhythm.engines.stopping import cut_at_stop, response_texts
from rhythm.engines.vllm.infer import VllmInfer
from rhythm.seeds import derive_seed

TOLERANCE = 2e-5
"""Nats: both compute in fp32."""
SAMPLING = SamplingConfig(temperature=0.7, top_p=0.9, top_k=20, max_new_tokens=24)
PROMPTS = [[5, 6, 7, 8], [9, 10, 11, 12, 13, 14], [20], list(range(4, 94)) * 2]


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint()


@pytest.fixture(scope="module")
def engine(start: Callable[..., VllmInfer], checkpoint: Path) -> VllmInfer:
    """Tied embeddings, prefix caching. Tests leave the checkpoint's own weights in it."""
    return start(checkpoint, stop_strings=True, enable_prefix_caching=True)


@pytest.fixture
def model(load: Callable[[Path], Any], checkpoint: Path) -> Any:
    return load(checkpoint)


@pytest.fixture
def other(load: Callable[[Path], Any], make_checkpoint: Callable[..., Path]) -> Any:
    return load(make_checkpoint(seed=1))


def assert_equal(actual_BT: Tensor, expected_BT: Tensor, rollout: Rollout) -> None:
    assert compare(actual_BT, expected_BT, rollout.response_mask).max < TOLERANCE


def test_logprobs_are_those_of_the_sampling_temperature_before_top_p_and_top_k(
    engine: VllmInfer, model: Any, logprobs: Callable[..., Tensor]
) -> None:
    rollout = engine.generate(PROMPTS, 3, SAMPLING, seed=1)
    assert_equal(rollout.logprobs, logprobs(model, rollout, temperature=0.7), rollout)
    assert compare(rollout.logprobs, logprobs(model, rollout), rollout.response_mask).max > 0.1
    assert rollout.logprobs[~rollout.response_mask].eq(0).all()


def test_a_seeded_row_does_not_depend_on_its_company(engine: VllmInfer) -> None:
    prompts, seeds = [PROMPTS[0], PROMPTS[1], PROMPTS[0]], [5, 6, 7]
    together = engine.generate_each(prompts, SAMPLING, seeds)
    assert together.group.tolist() == [0, 1, 2]
    rows = [together.input_ids[row][: together.lens[row]].tolist() for row in range(3)]
    assert rows == [
        engine.generate_each([prompt], SAMPLING, [seed]).input_ids[0].tolist()
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    assert rows[0] != rows[2]  # the same prompt by another seed


def test_rows_are_prompt_response_padding(engine: VllmInfer, tokenizer: Any) -> None:
    rollout = engine.generate(PROMPTS, 3, SamplingConfig(max_new_tokens=100), seed=1)
    assert rollout.group.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert rollout.input_ids.shape[1] == rollout.lens.max()
    assert rollout.finished.any()
    assert rollout.finished.logical_not().any()
    for b, length in enumerate(rollout.lens.tolist()):
        prompt = PROMPTS[b // 3]
        row = rollout.input_ids[b].tolist()
        response = row[len(prompt) : length]
        assert row[: len(prompt)] == prompt
        assert set(row[length:]) <= {tokenizer.pad_token_id}
        assert tokenizer.eos_token_id not in response[:-1]
        assert (response[-1] == tokenizer.eos_token_id) == rollout.finished[b]
        assert rollout.finished[b] or len(response) == 100
        assert rollout.response_mask[b].nonzero()[:, 0].tolist() == list(range(len(prompt), length))


def test_a_rollout_is_a_function_of_the_seed(engine: VllmInfer) -> None:
    first, again, another = (engine.generate(PROMPTS, 2, SAMPLING, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.input_ids, again.input_ids)
    assert torch.equal(first.logprobs, again.logprobs)
    assert not torch.equal(first.input_ids, another.input_ids)
    assert not torch.equal(first.input_ids[0], first.input_ids[1])


def test_the_responses_of_a_prompt_are_handed_over_while_others_are_generated(engine: VllmInfer) -> None:
    """The second prompt leaves room for two tokens, the others for hundreds."""
    prompts = [[5, 6, 7, 8], [*range(4, 94)] * 3 + [4] * 48, [20]]
    parts: list[Rollout] = []
    busy: list[bool] = []

    def done(part: Rollout) -> None:
        parts.append(part)
        busy.append(engine._llm.llm_engine.has_unfinished_requests())

    rollout = engine.generate(prompts, 4, SamplingConfig(max_new_tokens=300), seed=1, done=done)
    groups = [part.group.tolist() for part in parts]
    assert groups[0] == [1] * 4
    assert sorted(groups) == [[0] * 4, [1] * 4, [2] * 4]
    assert busy == [True, True, False]
    assert rollout.group.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    for part in parts:
        first = 4 * int(part.group[0])
        rows = slice(first, first + 4)
        assert torch.equal(part.lens, rollout.lens[rows])
        assert torch.equal(part.logprobs, rollout.logprobs[rows, : part.logprobs.shape[1]])


def test_an_engine_goes_on_after_a_caller_that_gave_up(engine: VllmInfer) -> None:
    expected = engine.generate(PROMPTS, 2, SAMPLING, seed=1)

    def give_up(part: Rollout) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        engine.generate(PROMPTS, 2, SAMPLING, seed=3, done=give_up)
    assert torch.equal(engine.generate(PROMPTS, 2, SAMPLING, seed=1).input_ids, expected.input_ids)


def test_a_stop_string_ends_generation(engine: VllmInfer, tokenizer: Any) -> None:
    """Generated is what remains of the whole responses when they are cut behind the first of two strings."""
    sampling = SamplingConfig(max_new_tokens=60)
    whole = engine.generate(PROMPTS, 3, sampling, seed=1)
    texts = response_texts(whole, tokenizer)
    stop = (texts[0][9:11], texts[4][20])
    assert not all(any(string in text for string in stop) for text in texts)
    stopped = engine.generate(PROMPTS, 3, sampling.model_copy(update={"stop": stop}), seed=1)
    expected = cut_at_stop(whole, tokenizer, stop)
    assert stopped.response_lens.sum() < whole.response_lens.sum()
    assert stopped.response_lens.tolist() == expected.response_lens.tolist()
    assert stopped.finished.tolist() == expected.finished.tolist()
    assert response_texts(stopped, tokenizer) == response_texts(expected, tokenizer)
    assert response_texts(stopped, tokenizer)[0].endswith(stop)


def test_every_response_has_a_seed_of_its_own() -> None:
    seeds = {derive_seed(seed, prompt, sample) for seed in range(3) for prompt in range(12) for sample in range(12)}
    assert len(seeds) == 3 * 12 * 12
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_temperature_0_takes_the_likeliest(engine: VllmInfer, model: Any, logprobs: Callable[..., Tensor]) -> None:
    rollout = engine.generate(PROMPTS, 1, SamplingConfig(temperature=0, top_p=0.1, max_new_tokens=12), seed=0)
    assert_equal(rollout.logprobs, logprobs(model, rollout), rollout)
    with torch.no_grad():
        likeliest = model(rollout.input_ids, attention_mask=rollout.attention_mask.long()).logits.argmax(-1)
    assert torch.equal(likeliest[:, :-1][rollout.response_mask[:, 1:]], rollout.input_ids[rollout.response_mask])


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_score_of_given_tokens(
    engine: VllmInfer,
    model: Any,
    make_rollout: Callable[..., Rollout],
    logprobs: Callable[..., Tensor],
    temperature: float,
) -> None:
    rollout = make_rollout(prompt_lens=(4, 7, 300, 5), response_lens=(12, 3, 20, 1))
    scored = engine.score(rollout, temperature)
    expected = logprobs(model, rollout, temperature)
    assert_equal(scored, expected, rollout)
    assert torch.equal(scored.isnan(), expected.isnan())


def test_a_push_replaces_every_weight_and_what_was_cached(
    engine: VllmInfer, model: Any, other: Any, logprobs: Callable[..., Tensor]
) -> None:
    before = engine.generate(PROMPTS, 2, SAMPLING, seed=1)
    engine.update_weights(other.state_dict(), version=3)
    assert engine.version == 3
    after = engine.generate(PROMPTS, 2, SAMPLING, seed=1)
    assert_equal(after.logprobs, logprobs(other, after, temperature=0.7), after)
    assert_equal(engine.score(before), logprobs(other, before), before)
    with pytest.raises(ParityError):
        must_agree(compare(engine.score(before), logprobs(model, before), before.response_mask), threshold=0.1)
    engine.update_weights(model.state_dict(), version=3)
    again = engine.generate(PROMPTS, 2, SAMPLING, seed=1)
    assert torch.equal(again.input_ids, before.input_ids)
    assert torch.equal(again.logprobs, before.logprobs)


@pytest.mark.skipif(torch.cuda.is_available(), reason="only CPUs keep packed copies")
def test_parity_catches_a_tied_head_left_behind(
    engine: VllmInfer,
    model: Any,
    other: Any,
    make_rollout: Callable[..., Rollout],
    logprobs: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rollout = make_rollout()
    without_head = dict(other.named_parameters())  # as a checkpoint has it: the head is the embedding
    assert "lm_head.weight" not in without_head

    def parity() -> Any:
        return compare(engine.score(rollout), logprobs(other, rollout), rollout.response_mask)

    with monkeypatch.context() as broken:
        broken.setattr("rhythm.engines.vllm.worker.WorkerExtension.repack_heads", lambda self: None)
        engine.update_weights(without_head, version=4)
    with pytest.raises(ParityError, match=r"differ by \d\.\d+ nats"):
        must_agree(parity(), threshold=0.1)
    engine.update_weights(without_head, version=4)
    must_agree(parity(), threshold=TOLERANCE)
    engine.update_weights(model.state_dict(), version=4)


def test_bad_calls_leave_the_engine_serving(engine: VllmInfer, model: Any) -> None:
    with pytest.raises(ValueError, match="version is -1: must not be lower than"):
        engine.update_weights(model.state_dict(), version=-1)
    with pytest.raises(ValueError, match="n is 0"):
        engine.generate([[5]], 0, SAMPLING, seed=0)
    with pytest.raises(ValueError, match="none may be empty"):
        engine.generate([[5], []], 1, SAMPLING, seed=0)
    with pytest.raises(ValueError, match="the longest has 320 tokens, which leaves none of 320"):
        engine.generate([[5] * 320], 1, SAMPLING, seed=0)
    long_and_short = engine.generate([[5] * 317, [5]], 1, SAMPLING, seed=0)
    assert long_and_short.response_lens[0] <= 3  # what the context has left
    assert long_and_short.lens.max() <= 320
    with pytest.raises(RuntimeError, match="is serving: this needs it receiving"):
        engine.finish_push(9)


def test_asleep_it_has_no_weights_until_a_push(engine: VllmInfer, model: Any) -> None:
    engine.update_weights(model.state_dict(), version=9)
    before = engine.generate([[5], [6, 7]], 2, SAMPLING, seed=0)
    engine.sleep()
    engine.sleep()
    for refused in (engine.wake, lambda: engine.generate([[5]], 1, SAMPLING, seed=0)):
        with pytest.raises(RuntimeError, match="is asleep: this needs it serving"):
            refused()
    engine.update_weights(model.state_dict(), version=9)
    with pytest.raises(RuntimeError, match="is loaded: this needs it serving"):  # without a KV cache
        engine.generate([[5]], 1, SAMPLING, seed=0)
    engine.wake()
    engine.wake()
    after = engine.generate([[5], [6, 7]], 2, SAMPLING, seed=0)
    assert torch.equal(before.input_ids, after.input_ids)
    assert torch.equal(before.logprobs, after.logprobs)
    engine.sleep()
    engine.update_weights(model.state_dict(), version=9)
    engine.sleep()  # again, before the KV cache was there
    engine.update_weights(model.state_dict(), version=9)
    engine.wake()


def test_untied_head_and_a_push_that_fails(
    start: Callable[..., VllmInfer],
    load: Callable[[Path], Any],
    make_checkpoint: Callable[..., Path],
    make_rollout: Callable[..., Rollout],
    logprobs: Callable[..., Tensor],
) -> None:
    engine, rollout = start(make_checkpoint(tied=False)), make_rollout()
    other = load(make_checkpoint(tied=False, seed=1))
    engine.update_weights(other.state_dict(), version=1)
    assert_equal(engine.score(rollout), logprobs(other, rollout), rollout)
    incomplete = {name: tensor for name, tensor in other.state_dict().items() if name != "lm_head.weight"}
    with pytest.raises(ValueError, match=r"1 are missing from the push, among them \['lm_head.weight'\]"):
        engine.update_weights(incomplete, version=2)
    assert engine.version == 1
    with pytest.raises(RuntimeError, match="is lost: this needs it serving"):
        engine.score(rollout)


def test_assembled_by_hand() -> None:
    rollout = assemble(
        [[5, 6], [7]], [[8], [9, 2, 1]], [[-0.5], [-1.0, -2.0, -3.0]], group=[0, 1], finished=[False, True], pad_id=0
    )
    assert rollout.input_ids.tolist() == [[5, 6, 8, 0], [7, 9, 2, 1]]
    assert rollout.attention_mask.int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert rollout.response_mask.int().tolist() == [[0, 0, 1, 0], [0, 1, 1, 1]]
    assert rollout.logprobs.tolist() == [[0.0, 0.0, -0.5, 0.0], [0.0, -1.0, -2.0, -3.0]]
    assert rollout.prompt_lens.tolist() == [2, 1]
    assert rollout.finished.tolist() == [False, True]


def test_stop_strings_need_the_tokenizer(start: Callable[..., VllmInfer], checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"sampling.stop is \['a'\]: must be empty without stop_strings=True"):
        start(checkpoint).generate(PROMPTS, 1, SamplingConfig(stop=("a",)), seed=0)


def test_no_engine_without_an_end_or_weights(tmp_path: Path, start: Callable[..., VllmInfer]) -> None:
    with pytest.raises(ValueError, match="it has no safetensors files"):
        start(tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's KV cache takes what gpu_memory_utilization leaves")
def test_a_cpu_has_to_be_told_the_size_of_its_kv_cache(start: Callable[..., VllmInfer], checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="kv_cache_gib is not set"):
        start(checkpoint, kv_cache_gib=None)
