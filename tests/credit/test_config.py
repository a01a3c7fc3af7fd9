"""SignalsConfig means the same in Python and in YAML, and refuses values that fit no model."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError

import rhythm
from rhythm import SignalsConfig
from rhythm.analysis.config import AnalysisConfig
from rhythm.cli.config_file import load_config
from rhythm.cli.config_keys import config_keys
from rhythm.credit import CreditConfig, batch_credit_weights
from rhythm.credit.strategies import STRATEGIES, Strategy, StrategyInputs
from rhythm.ops import backends
from rhythm.trainer.config import TrainConfig


@pytest.mark.parametrize(
    ("written", "in_python", "expected"),
    [
        ("horizon: paper", {"horizon": "paper"}, (10, 50)),
        ("horizon: revised", {"horizon": "revised"}, (10, 100)),
        ("horizon: [3, null]", {"horizon": (3, None)}, (3, None)),
        ("horizon: [2, 8]", {"horizon": [2, 8]}, (2, 8)),
        ("layers: null", {"layers": None}, None),
        ("layers: 3", {"layers": np.int64(3)}, 3),
        ("layers: [1, 4]", {"layers": range(1, 6, 3)}, (1, 4)),
        ("layers: all", {"layers": "all"}, "all"),
    ],
)
def test_the_same_in_python_and_yaml(tmp_path: Any, written: str, in_python: dict[str, Any], expected: object) -> None:
    (name, _), *_ = in_python.items()
    config = SignalsConfig(**in_python)
    assert getattr(config, name) == expected
    file = tmp_path / "run.yaml"
    file.write_text(f"signals: {{{written}}}")
    of_file = load_config(file).signals
    assert getattr(of_file, name) == expected
    # What a run writes into its config.yaml gives the same again.
    dumped = yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))
    assert SignalsConfig.model_validate(dumped) == config


def test_layers_of_a_model() -> None:
    assert SignalsConfig().layers_of(36) == [12, 15, 18, 21, 24] == SignalsConfig(layers=5).layers_of(36)
    assert SignalsConfig(layers=2).layers_of(36) == rhythm.sampled_layers(36, 2)
    assert SignalsConfig(layers=[0, 35]).layers_of(36, [1, 3]) == [0, 35]
    assert SignalsConfig(layers="all").layers_of(4) == [0, 1, 2, 3]
    assert SignalsConfig(layers="all").layers_of(4, [1, 3]) == [1, 3]
    with pytest.raises(ValueError, match=re.escape("layers is [2, 36]; the model has layers 0 to 35")):
        SignalsConfig(layers=[2, 36]).layers_of(36)


def test_backends_are_those_of_the_ops() -> None:
    assert [SignalsConfig(backend=name).backend for name in backends.NAMES] == list(backends.NAMES)
    assert SignalsConfig.model_json_schema()["properties"]["backend"]["enum"] == list(backends.NAMES)
    (key,) = [key for key in config_keys(SignalsConfig()) if key.path == "backend"]
    assert key.kind == " | ".join(backends.NAMES)


def test_a_backend_is_an_entry_of_one_table(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValidationError, match="must be one of auto, cpu, triton, reference, got 'mine'"):
        SignalsConfig(backend="mine")
    monkeypatch.setattr(backends, "NAMES", (*backends.NAMES, "mine"))
    assert SignalsConfig(backend="mine").backend == "mine"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"horizon": "newest"}, "must be [low, high] or one of ['paper', 'revised'], got 'newest'"),
        ({"horizon": [5, 4]}, "0 <= low <= high"),
        ({"horizon": [-1, 4]}, "0 <= low <= high"),
        ({"horizon": 5}, "horizon"),
        ({"horizon": [True, 4]}, "must hold whole numbers, got [True, 4]"),
        ({"window": 0}, "greater than or equal to 1"),
        ({"window": True}, "must hold whole numbers, got True"),
        ({"backend": "cuda"}, "must be one of auto, cpu, triton, reference, got 'cuda'"),
        ({"backend": "refrence"}, "got 'refrence'; did you mean reference?"),
        ({"backend": None}, "valid string"),
        ({"quantile": 0.6}, "less than or equal to 0.5"),
        ({"grouping": "row"}, "'sequence', 'batch' or 'calibrated'"),
        ({"layers": []}, "layers is []; it must be how many to sample"),
        ({"layers": [3, 2]}, "layers is [3, 2]; it must be"),
        ({"layers": [2, 2]}, "layers is [2, 2]; it must be"),
        ({"layers": [-1, 2]}, "layers is [-1, 2]; it must be"),
        ({"layers": [1.5]}, "layers is [1.5]; it must be"),
        ({"layers": 0}, "layers is 0; it must be"),
        ({"layers": True}, "layers is True; it must be"),
        ({"layers": "some"}, "layers is 'some'; it must be"),
        ({"windows": 3}, "Extra inputs"),
    ],
)
def test_what_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(message)):
        SignalsConfig.model_validate(values)


def test_old_names_are_refused_with_the_new_ones() -> None:
    with pytest.raises(ValidationError, match="q is now top_fraction"):
        CreditConfig.model_validate({"q": 0.3})
    with pytest.raises(ValidationError, match=r"attn is now signals\.source; credit\.q is now credit\.top_fraction"):
        TrainConfig.model_validate({"attn": "separate", "credit": {"q": 0.3}})
    with pytest.raises(ValidationError, match=r"pool is now signals\.layers"):
        AnalysisConfig.model_validate({"pool": "all"})
    with pytest.raises(ValueError, match=re.escape("q is 1.5; it must be above 0 and at most 1")):
        rhythm.credit_weights(torch.ones(3), torch.ones(3), strategy="global_anchor", q=1.5)


def test_a_strategy_is_an_entry_of_one_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def first(inputs: StrategyInputs, config: CreditConfig) -> torch.Tensor:
        return (inputs.response & (inputs.response.cumsum(dim=-1) == 1)).float()

    with pytest.raises(
        ValidationError, match="must be one of none, random, entropy, local_chunk, global_anchor, coupled"
    ):
        CreditConfig(strategy="first")
    monkeypatch.setitem(STRATEGIES, "first", Strategy(first, frozenset(), "the first token"))
    config = CreditConfig(strategy="first", gamma_amp=3)
    assert config.reads == frozenset()
    mask = torch.tensor([[0, 1, 1], [1, 1, 0]])
    assert batch_credit_weights(None, mask, config).tolist() == [[1, 3, 1], [3, 1, 1]]
    nan = torch.full((2,), torch.nan)
    assert rhythm.credit_weights(nan, nan, strategy="first", gamma_amp=2).tolist() == [2, 1]


def test_what_a_strategy_reads_must_be_there() -> None:
    mask = torch.ones(1, 4)
    for name in ("local_chunk", "global_anchor", "coupled"):
        assert CreditConfig(strategy=name).reads == {"attention"}
        with pytest.raises(ValueError, match=f'signals is None; the strategy "{name}" needs them'):
            batch_credit_weights(None, mask, CreditConfig(strategy=name))
    with pytest.raises(ValueError, match='entropy is None; the strategy "entropy" needs it'):
        batch_credit_weights(None, mask, CreditConfig(strategy="entropy"))
    entropy = torch.tensor([[0.1, 2.0, 0.3, 1.0]])
    config = CreditConfig(strategy="entropy", top_fraction=0.5)
    assert batch_credit_weights(None, mask, config, entropy=entropy).tolist() == [[1, 1.5, 1, 1.5]]
    assert batch_credit_weights(None, mask, CreditConfig(strategy="none")).tolist() == [[1] * 4]
