"""Dynamic sampling, the overlong penalty and mask: by hand, and through whole runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rhythm.engines.interfaces import Rollout, SamplingConfig
from rhythm.engines.local.train import TorchTrain
from rhythm.tasks import Reward
from rhythm.trainer.config import TrainConfig
from rhythm.trainer.drawing import draw, replace_groups, tied_groups
from rhythm.trainer.loop import run
from rhythm.trainer.rollout import ScoredRollout

pytestmark = pytest.mark.usefixtures("without_curves")

Configure = Callable[..., TrainConfig]
TIMES = ("seconds_", "tokens_per_second", "attention_share")


@pytest.fixture(autouse=True)
def _one_thread() -> object:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rollout(prompts: Sequence[int], n: int, width: int) -> Rollout:
    """`n` rows for each prompt: the prompt's id, then the row's place in its group repeated; longer with the id."""
    ids = torch.zeros(len(prompts) * n, width, dtype=torch.long)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row in range(len(ids)):
        prompt, length = prompts[row // n], 2 + prompts[row // n] % (width - 2)
        ids[row, :length] = row % n
        ids[row, 0] = prompt
        mask[row, :length] = True
    response = mask.clone()
    response[:, 0] = False
    return Rollout(
        input_ids=ids,
        attention_mask=mask,
        response_mask=response,
        prompt_lens=torch.ones(len(ids), dtype=torch.long),
        group=torch.arange(len(prompts)).repeat_interleave(n),
        logprobs=torch.zeros(ids.shape),
        finished=torch.ones(len(ids), dtype=torch.bool),
    )


def scored(prompts: Sequence[int], n: int = 2, width: int = 8) -> ScoredRollout:
    made = rollout(prompts, n, width)
    names = [f"{prompts[row // n]}.{row % n}" for row in range(len(prompts) * n)]
    rewards = [Reward(float(row), correct=True, format_ok=True) for row in range(len(names))]
    return ScoredRollout(rollout=made, prompts=names, responses=names, rewards=rewards)


def test_tied_groups_by_hand() -> None:
    rewards = torch.tensor([0.5, 0.5, 1.0, 0.0, 0.0, 0.0])
    assert tied_groups(rewards, torch.tensor([0, 0, 1, 1, 2, 2])).tolist() == [0, 2]
    assert tied_groups(rewards, torch.tensor([3, 1, 1, 3, 7, 7])).tolist() == [7]
    assert tied_groups(rewards[:1], torch.tensor([4])).tolist() == [4]


def test_groups_are_replaced_in_their_places() -> None:
    before = scored([10, 11, 12, 13])  # rows of 6, 7, 2, 3 tokens
    result = replace_groups(before, torch.tensor([1, 3]), scored([21, 20], width=6), pad_id=0)  # of 3 and 2 tokens
    assert result.rollout.group.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert result.rollout.input_ids[:, 0].tolist() == [10, 10, 21, 21, 12, 12, 20, 20]
    assert result.rollout.input_ids[:, 1].tolist() == [0, 1] * 4
    assert result.rollout.lens.tolist() == [6, 6, 3, 3, 2, 2, 2, 2]
    assert result.rollout.input_ids.shape == (8, 6)  # no wider than the longest row that is left
    assert result.prompts == result.responses == ["10.0", "10.1", "21.0", "21.1", "12.0", "12.1", "20.0", "20.1"]
    assert [reward.score for reward in result.rewards] == [0, 1, 0, 1, 4, 5, 2, 3]


class FakeTask:
    """Prompts are numbers; a response is right if its place in the group is 1 and the prompt is not a multiple of 3."""

    train = tuple(range(1, 40))
    test = ()

    def prompt(self, instance: int) -> str:
        return str(instance)

    def reward(self, instance: int, response: str) -> Reward:
        right = response.endswith("1") and instance % 3 != 0
        return Reward(float(right), correct=right, format_ok=True)


class FakeTokenizer:
    pad_token_id = None

    def encode(self, text: str) -> list[int]:
        return [int(text)]

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids))


class FakeInfer:
    def __init__(self) -> None:
        self.calls: list[tuple[list[int], int]] = []

    def generate(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: SamplingConfig, seed: int, done: object
    ) -> Rollout:
        self.calls.append(([ids[0] for ids in prompts], seed))
        return rollout([ids[0] for ids in prompts], n, width=9)


def drawn(config: TrainConfig, step: int = 1, **options: Any) -> tuple[Any, list[tuple[list[int], int]]]:
    infer = FakeInfer()
    return draw(infer, FakeTask(), FakeTokenizer(), config, step=step, **options), infer.calls


def test_groups_without_variance_are_drawn_again(small_config: Configure) -> None:
    sizes = ("batch.prompts_per_batch=12", "batch.responses_per_prompt=2", "seed=3")
    plain, (first,) = drawn(small_config(*sizes))
    ties = [place for place, prompt in enumerate(first[0]) if prompt % 3 == 0]
    assert len(ties) >= 3
    assert plain.metrics["extra_rounds"] == 0
    assert plain.metrics["drawn_zero_variance_share"] == len(ties) / 12

    result, calls = drawn(small_config(*sizes, "batch.extra_rounds=9"))
    assert calls[0] == first
    # Each round asks for as many prompts as still tie, with a seed of its own, until none does.
    still = [sum(prompt % 3 == 0 for prompt in prompts) for prompts, _ in calls]
    assert [len(prompts) for prompts, _ in calls] == [12, *still[:-1]]
    assert still[-1] == 0
    assert len(calls) > 2
    assert len({seed for _, seed in calls}) == len(calls)
    prompts = result.scored.rollout.input_ids[::2, 0].tolist()
    assert all(prompt % 3 for prompt in prompts)
    assert [prompt for place, prompt in enumerate(prompts) if place not in ties] == [p for p in first[0] if p % 3]
    assert result.metrics["extra_rounds"] == len(calls) - 1
    assert result.metrics["drawn_groups"] == 12 + sum(still)
    assert result.metrics["drawn_zero_variance_share"] == sum(still) / (12 + sum(still))
    assert result.metrics["drawn_accuracy"] == 12 / (2 * (12 + sum(still)))
    assert result.rewards.tolist() == [0, 1] * 12

    # Bounded: what still ties after one round stays. Other steps ask for other prompts, the same step for the same.
    bounded, some = drawn(small_config(*sizes, "batch.extra_rounds=1"))
    assert some == calls[:2]
    assert bounded.metrics["drawn_zero_variance_share"] == (still[0] + still[1]) / (12 + still[0])
    assert len(bounded.rewards) == 24
    assert drawn(small_config(*sizes, "batch.extra_rounds=1"), step=2)[1][1][0] != calls[1][0]
    assert len(drawn(small_config(*sizes, "batch.extra_rounds=9"), stop_asked=lambda: True)[1]) == 1


def test_the_penalty_is_part_of_the_reward(small_config: Configure) -> None:
    """Responses of 1 to 8 tokens; with L_max 8 and L_cache 4, beyond 4 tokens each costs a quarter."""
    sizes = ("batch.prompts_per_batch=12", "batch.responses_per_prompt=2")
    penalty = ("overlong.penalty_tokens=4", "overlong.max_tokens=8")
    plain, shaped = drawn(small_config(*sizes))[0], drawn(small_config(*sizes, *penalty))[0]
    lens = plain.scored.rollout.response_lens
    expected = -(lens - 4).clamp(min=0) / 4
    assert expected.min() < 0
    torch.testing.assert_close(shaped.rewards - plain.rewards, expected.float())
    assert shaped.metrics["overlong_penalty"] == pytest.approx(float(expected.mean()))
    assert plain.metrics["overlong_penalty"] == 0
    # Without a length of its own it is that of sampling: 12 in this configuration, too long for any of these.
    far = drawn(small_config(*sizes, "overlong.penalty_tokens=4"))[0]
    assert torch.equal(far.rewards, plain.rewards)


def test_responses_cut_off_are_out_of_the_loss(
    small_config: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their rewards count in their groups; tokens and rows of the others alone are averaged over."""
    honest, seen = TorchTrain.step, []

    def step(self: TorchTrain, batch: Any) -> Any:
        seen.append(batch)
        return honest(self, batch)

    monkeypatch.setattr(TorchTrain, "step", step)
    options = (f"runs_dir={tmp_path}", "steps=1", "sampling.max_new_tokens=6", "evaluation.samples=0")
    run(small_config(*options, "name=all"))
    summary = run(small_config(*options, "name=masked", "overlong.mask=true"))
    cut = 0
    for whole, masked in zip(seen[:2], seen[2:], strict=True):
        assert torch.equal(whole.advantages, masked.advantages)
        finished = whole.rollout.finished
        cut += int((~finished).sum())
        assert not masked.rollout.response_mask[~finished].any()
        assert torch.equal(masked.rollout.response_mask[finished], whole.rollout.response_mask[finished])
    assert 0 < cut < 16
    record = json.loads((summary.run_dir / "metrics.jsonl").read_text().splitlines()[1])
    assert record["overlong_masked"] == cut / 16


def test_a_step_whose_responses_are_all_cut_off_changes_nothing(small_config: Configure, tmp_path: Path) -> None:
    options = (f"runs_dir={tmp_path}", "steps=1", "sampling.max_new_tokens=1", "evaluation.samples=0")
    summary = run(small_config(*options, "overlong.mask=true"))
    record = json.loads((summary.run_dir / "metrics.jsonl").read_text().splitlines()[1])
    assert (record["overlong_masked"], record["loss"], record["grad_norm"]) == (1, 0, 0)


def test_a_resumed_run_with_all_of_it_is_exact(small_config: Configure, tmp_path: Path) -> None:
    options = (
        f"runs_dir={tmp_path}", "evaluation.samples=0", "sampling.max_new_tokens=6", "batch.extra_rounds=2",
        "overlong.mask=true", "overlong.penalty_tokens=3", "loss.objective=cispo", "loss.clip_low=1",
        "correction.mode=sequence_mask",
        "credit.strategy=random", "credit.random_like=coupled", "credit.mass=matched",
    )  # fmt: skip
    whole = run(small_config(*options, "name=whole", "steps=4")).run_dir
    run(small_config(*options, "name=parts", "steps=2"))
    parts = run(small_config(*options, "name=parts", "steps=4"), resume=True).run_dir
    rows = [
        [
            {key: value for key, value in json.loads(line).items() if not key.startswith(TIMES)}
            for line in (path / "metrics.jsonl").read_text().splitlines()
        ]
        for path in (whole, parts)
    ]
    # The run of two steps evaluated after its last one, as this one does anyway.
    assert rows[0] == rows[1]
    assert sum(row.get("extra_rounds", 0) for row in rows[0]) > 0
    assert all(row["bonus_mass"] == pytest.approx(0.2, rel=1e-5) for row in rows[0][1:])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch.extra_rounds=-1", "batch.extra_rounds"),
        ("overlong.penalty_tokens=13", r"overlong.penalty_tokens is 13: must be at most 12, the longest response"),
        ("loss.dual_clip=1.1", "dual_clip is 1.1: must be above 1"),
        ("credit.mass=equal", "credit.mass"),
        ("correction.mode=token", "correction.mode"),
    ],
)
def test_what_is_refused_before_a_run(small_config: Configure, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_config(override)
