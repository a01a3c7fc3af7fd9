"""What a task's reward may answer in the run's own process, and what a fault of one reward comes to."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from rhythm.tasks import Reward
from rhythm.tasks.judging import Fault, JudgeError, checked, judge

NO_REWARD = Reward(0.0, correct=False, format_ok=False)


class Judge:
    """A task whose rewards are `answer`'s."""

    def __init__(self, answer: Callable[[], Any]) -> None:
        self.answer = answer

    def reward(self, instance: str, response: str) -> Any:
        return self.answer()


def raises(error: BaseException) -> Callable[[], Any]:
    def answer() -> Any:
        raise error

    return answer


def judged(answer: Callable[[], Any], response: str = "the response") -> Reward:
    return judge(Judge(answer), "instance", "the prompt", response)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("score", "value"),
    [(2, 2.0), (-0.5, -0.5), (True, 1.0), (np.float32(0.5), 0.5), (torch.tensor(0.25), 0.25), (3e38, 3e38)],
)
def test_a_finite_number_is_a_score(score: Any, value: float) -> None:
    found = checked(Reward(score, correct=np.bool_(True), format_ok=0))  # type: ignore[arg-type]
    assert found == Reward(value, correct=True, format_ok=False)
    assert isinstance(found, Reward)
    assert (type(found.score), type(found.correct), type(found.format_ok)) == (float, bool, bool)


@pytest.mark.parametrize(
    "score", [math.nan, math.inf, -math.inf, "1", None, 1j, 10**400, 1e39, torch.tensor([1.0, 2.0]), np.array([]), [1]]
)
def test_anything_else_is_none(score: Any) -> None:
    found = checked(Reward(score, correct=True, format_ok=True))
    assert isinstance(found, Fault)
    assert found.kind == "invalid"


@pytest.mark.parametrize("flag", [None, "no", 0.5, np.array([True, False])])
def test_correct_and_format_ok_are_true_or_false(flag: Any) -> None:
    for reward in (Reward(1.0, correct=flag, format_ok=True), Reward(1.0, correct=True, format_ok=flag)):
        found = checked(reward)
        assert isinstance(found, Fault)
        assert found.kind == "invalid"


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
    assert judged(answer, "x" * 1000) == Reward(0.0, correct=False, format_ok=False, fault=fault)
    assert why in caplog.text
    assert "prompt 'the prompt'" in caplog.text
    assert f"response '{'x' * 199}:" in caplog.text  # 200 characters of it


@pytest.mark.parametrize("error", [KeyboardInterrupt(), JudgeError("the judge did not come up")])
def test_ctrl_c_and_a_missing_judge_pass(error: BaseException) -> None:
    with pytest.raises(type(error)):
        judged(raises(error))
