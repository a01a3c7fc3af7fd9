"""Which return values of a task's reward are valid, and that a fault of one reward is a score of 0."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from rhythm.tasks import Reward
from rhythm.tasks.scoring import Fault, RewardWorkerError, check_reward, score_response

NO_REWARD = Reward(0.0, correct=False, format_ok=False)


class FakeTask:
    """A task whose reward returns `answer()`."""

    def __init__(self, answer: Callable[[], Any]) -> None:
        self.answer = answer

    def reward(self, instance: str, response: str) -> Any:
        return self.answer()


def raises(error: BaseException) -> Callable[[], Any]:
    def answer() -> Any:
        raise error

    return answer


def scored(answer: Callable[[], Any], response: str = "the response") -> Reward:
    return score_response(FakeTask(answer), "instance", "the prompt", response)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("score", "value"),
    [(2, 2.0), (-0.5, -0.5), (True, 1.0), (np.float32(0.5), 0.5), (torch.tensor(0.25), 0.25), (3e38, 3e38)],
)
def test_a_finite_number_is_a_score(score: Any, value: float) -> None:
    reward = check_reward(Reward(score, correct=np.bool_(True), format_ok=0))  # type: ignore[arg-type]
    assert reward == Reward(value, correct=True, format_ok=False)
    assert isinstance(reward, Reward)
    assert (type(reward.score), type(reward.correct), type(reward.format_ok)) == (float, bool, bool)


@pytest.mark.parametrize(
    "score", [math.nan, math.inf, -math.inf, "1", None, 1j, 10**400, 1e39, torch.tensor([1.0, 2.0]), np.array([]), [1]]
)
def test_anything_else_is_a_fault(score: Any) -> None:
    fault = check_reward(Reward(score, correct=True, format_ok=True))
    assert isinstance(fault, Fault)
    assert fault.kind == "invalid"


@pytest.mark.parametrize("flag", [None, "no", 0.5, np.array([True, False])])
def test_correct_and_format_ok_are_true_or_false(flag: Any) -> None:
    for reward in (Reward(1.0, correct=flag, format_ok=True), Reward(1.0, correct=True, format_ok=flag)):
        fault = check_reward(reward)
        assert isinstance(fault, Fault)
        assert fault.kind == "invalid"


@pytest.mark.parametrize(
    ("answer", "fault", "why"),
    [
        (lambda: None, "invalid", "reward returned None"),
        (lambda: Reward(math.nan, correct=True, format_ok=True), "invalid", "score is nan"),
        (raises(KeyError("no such key")), "raised", "KeyError: 'no such key'"),
        (raises(SystemExit(3)), "raised", "SystemExit: 3"),
        (raises(RecursionError("too deep")), "raised", "RecursionError: too deep"),
    ],
)
def test_a_fault_is_a_score_of_zero_with_prompt_and_response_in_the_log(
    answer: Callable[[], Any], fault: Any, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert scored(answer, "x" * 1000) == Reward(0.0, correct=False, format_ok=False, fault=fault)
    assert why in caplog.text
    assert "prompt 'the prompt'" in caplog.text
    assert f"response '{'x' * 199}:" in caplog.text  # 200 characters of it


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RewardWorkerError("the reward worker did not start")])
def test_ctrl_c_and_a_missing_reward_worker_are_raised(error: BaseException) -> None:
    with pytest.raises(type(error)):
        scored(raises(error))
