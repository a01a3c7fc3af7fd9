"""A checkpoint's own code runs only if `model.trust_remote_code` allows it; no process asks on stdin."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rhythm.cluster.config import ClusterConfig, TrainRole
from rhythm.credit.loss import LossConfig
from rhythm.engines.local.train import OptimizerConfig
from rhythm.tap.signals_config import SignalsConfig
from rhythm.tiny.model import TinyModelConfig, build_model, build_tokenizer, save_checkpoint
from rhythm.trainer.cluster_engines import open_cluster
from rhythm.trainer.config import TrainConfig

pytestmark = pytest.mark.cluster

SOURCE = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

Path({ran!r}).touch()

class OddConfig(Qwen3Config):
    model_type = "odd"

class OddModel(Qwen3ForCausalLM):
    config_class = OddConfig

class OddTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a model, configuration and tokenizer of its own; the code leaves a file `ran`. Who is asked says yes."""
    monkeypatch.setattr("builtins.input", lambda _: "y")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    directory = tmp_path / "odd"
    tokenizer = build_tokenizer()
    tiny = TinyModelConfig(layers=2, hidden_size=32, mlp_size=32)
    save_checkpoint(build_model(tiny, tokenizer), tokenizer, directory)
    (directory / f"code_{tmp_path.name}.py").write_text(SOURCE.format(ran=str(tmp_path / "ran")))
    module = f"code_{tmp_path.name}"
    for name, added in (
        (
            "config.json",
            {
                "model_type": "odd",
                "auto_map": {"AutoConfig": f"{module}.OddConfig", "AutoModelForCausalLM": f"{module}.OddModel"},
            },
        ),
        (
            "tokenizer_config.json",
            {"tokenizer_class": "OddTokenizer", "auto_map": {"AutoTokenizer": [None, f"{module}.OddTokenizer"]}},
        ),
    ):
        path = directory / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **added}))
    return directory


def train_spec(checkpoint: Path, trusted: bool) -> Any:
    from rhythm.cluster.specs import TrainSpec

    return TrainSpec(
        role=TrainRole(engine="torch"),
        checkpoint=checkpoint,
        optimizer=OptimizerConfig(),
        loss=LossConfig(),
        temperature=1.0,
        micro_batch_size=2,
        precision="float32",
        reference=False,
        bucket_bytes=1 << 20,
        collective_seconds=60,
        trust_remote_code=trusted,
    )


def load_model(checkpoint: Path, trusted: bool) -> None:
    from rhythm.cluster.hosts import _load_model
    from rhythm.cluster.specs import AttnSpec

    _load_model(AttnSpec(checkpoint, SignalsConfig(), 2, "float32", trusted), torch.float32)


def load_torch_trainer(checkpoint: Path, trusted: bool) -> None:
    from rhythm.cluster.hosts import _torch_train

    _torch_train(train_spec(checkpoint, trusted), 0, "", 0)


def load_companions(checkpoint: Path, trusted: bool) -> None:
    from rhythm.engines.megatron.checkpoint import read_companions

    read_companions(checkpoint, trust_remote_code=trusted)


def load_config(checkpoint: Path, trusted: bool) -> None:
    from rhythm.engines.megatron.model import read_config

    try:
        read_config(checkpoint, trust_remote_code=trusted)
    except ValueError as error:
        if "model_type is 'odd'" not in str(error):
            raise


@pytest.mark.parametrize("load", [load_model, load_torch_trainer, load_companions, load_config])
def test_a_checkpoints_code_runs_only_where_it_is_trusted(
    load: Callable[[Path, bool], None], checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="trust_remote_code"):
        load(checkpoint, False)
    assert not (tmp_path / "ran").exists()
    load(checkpoint, True)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("trusted", [False, True])
def test_the_key_reaches_every_role(trusted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    specs: list[Any] = []

    class Role:
        def __init__(self, session: Any, spec: Any, rates: Any, **_: Any) -> None:
            specs.append(spec)

        def leave_gpu(self) -> None:
            pass

    class FakeSession:
        def __init__(self, config: ClusterConfig, *, separate_attn: bool) -> None:
            self.config = config

        def __enter__(self) -> FakeSession:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def stop_all(self) -> None:
            pass

        def begin(self, *roles: str) -> None:
            pass

        def places(self, role: str) -> int:
            return 1

    for name in ("ClusterTrain", "ClusterInfer", "ClusterAttn"):
        monkeypatch.setattr(f"rhythm.cluster.engines.{name}", Role)
    monkeypatch.setattr("rhythm.cluster.weight_sync.ClusterWeightSync.__init__", lambda *_, **__: None)
    monkeypatch.setattr("rhythm.cluster.session.Session", FakeSession)
    cluster = ClusterConfig.model_validate({"gpus": 0, "infer": {"kv_cache_gib": 0.1}})
    config = TrainConfig.model_validate(
        {"name": "x", "signals": {"source": "separate"}, "model": {"trust_remote_code": trusted}}
    )
    with open_cluster(config, cluster) as build:
        build((2,), 0, tmp_path, 0)
    assert sorted(type(spec).__name__ for spec in specs) == ["AttnSpec", "InferSpec", "TrainSpec"]
    assert [spec.trust_remote_code for spec in specs] == [trusted] * 3
