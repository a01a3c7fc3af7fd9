from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from rhythm.engines.interfaces import Rollout, SamplingConfig, TapConfig


def test_horizons_by_name() -> None:
    assert TapConfig.model_validate({"horizon": "paper"}).horizon == (10, 50)
    assert TapConfig.model_validate({"horizon": "revised"}).horizon == (10, 100)
    assert TapConfig.model_validate({"horizon": [3, None]}).horizon == (3, None)
    assert TapConfig().horizon == (10, 50)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"horizon": "newest"}, "one of"),
        ({"horizon": [5, 4]}, "0 <= low <= high"),
        ({"horizon": [-1, 4]}, "0 <= low <= high"),
        ({"backend": "cuda"}, "must be one of auto, cpu"),
        ({"quantile": 0.6}, "less than or equal to 0.5"),
        ({"windows": 3}, "Extra inputs"),
    ],
)
def test_what_a_tap_refuses(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TapConfig.model_validate(values)


def test_sampling_refuses_what_cannot_be_drawn_from() -> None:
    for values in ({"temperature": -1}, {"top_p": 0}, {"top_k": -1}, {"max_new_tokens": 0}):
        with pytest.raises(ValidationError):
            SamplingConfig.model_validate(values)


def test_response_lengths(make_rollout: Callable[..., Rollout]) -> None:
    assert make_rollout().response_lens.tolist() == [12, 3, 20, 1]
