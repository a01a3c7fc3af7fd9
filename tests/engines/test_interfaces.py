from __future__ import annotations

from collections.abc import Callable

import pytest
from pydantic import ValidationError

from rhythm.engines.interfaces import Rollout, SamplingConfig


def test_sampling_refuses_what_cannot_be_drawn_from() -> None:
    for values in ({"temperature": -1}, {"top_p": 0}, {"top_k": -1}, {"max_new_tokens": 0}):
        with pytest.raises(ValidationError):
            SamplingConfig.model_validate(values)


def test_response_lengths(make_rollout: Callable[..., Rollout]) -> None:
    assert make_rollout().response_lens.tolist() == [12, 3, 20, 1]
