"""The cluster section: what it refuses, and how messages name its keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from rhythm.cli.config_file import ConfigError, load_config
from rhythm.cluster.config import ClusterConfig, InferRole
from rhythm.engines.megatron.layout import ParallelConfig
from rhythm.engines.vllm.config import VllmConfig

CPU = {"gpus": 0, "infer": {"kv_cache_gib": 1}}
AHEAD = {"placement": "separate", "rollout_ahead": 1, "parity": {"every_steps": 4}}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"nodes": 3}, r"gpus is 8: must divide among nodes=3"),
        ({"nodes": 2, "gpus": 0}, r"nodes is 2: must be 1 without GPUs"),
        ({"nodes": 2}, r"nodes is 2: ray_address must name the head"),
        ({"nodes": 2, "ray_address": "10.0.0.1:6379"}, r"bind_address is 127\.0\.0\.1: other nodes can't reach it"),
        ({"bind_address": "head"}, r"must be an IP address, got 'head'"),
        (
            {"bind_address": "127.0.0.2"},
            r"bind_address is 127\.0\.0\.2: the only loopback address that Ray supports is 127",
        ),
        ({"gpus": 0}, r"infer\.kv_cache_gib is not set"),
        ({**CPU, "train": {"engine": "torch", "tensor": 2}}, r"engine is torch, with 2 ranks"),
        (
            {**CPU, "train": {"engine": "torch", "context": 2}},
            r"engine is torch, with 2 ranks: tensor, .* context must",
        ),
        ({**CPU, "rollout_ahead": 1}, "rollout_ahead is 1: must be 0 with placement colocated, where vLLM sleeps"),
        ({**CPU, **AHEAD, "parity": {}}, r"parity\.every_steps is 1: must be more with rollout_ahead = 1"),
        ({**CPU, **AHEAD, "rollout_ahead": 2}, r"rollout_ahead\n.*should be 0 or 1"),
    ],
)
def test_what_does_not_go_together_is_refused(section: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClusterConfig.model_validate(section)


def test_what_is_generated_ahead(config: Path) -> None:
    """Not the first step's rollout, not one that is compared for parity, and none after the last step."""
    ahead = ["steps=9", "cluster.placement=separate", "cluster.rollout_ahead=1", "cluster.parity.every_steps=4"]
    run = load_config(config, [*ahead, "correction.mode=token_truncate"])
    assert [step for step in range(12) if run.draws_ahead(step)] == [2, 3, 5, 6, 7, 9]
    with pytest.raises(
        ConfigError, match=r"correction\.mode is 'none': must be another with cluster\.rollout_ahead = 1"
    ):
        load_config(config, ahead)
    for synchronous in (["cluster.gpus=8"], []):
        assert not any(load_config(config, synchronous).draws_ahead(step) for step in range(12))


def test_listens_on_loopback_unless_told_otherwise() -> None:
    assert ClusterConfig().bind_address == "127.0.0.1"
    assert ClusterConfig().on_loopback
    assert not ClusterConfig(bind_address="10.0.0.1").on_loopback


def test_the_knobs_of_an_engine_are_the_engines_own() -> None:
    role = InferRole(kv_cache_gib=0.5, max_num_seqs=7, replicas=3)
    assert role.vllm == VllmConfig(kv_cache_gib=0.5, max_num_seqs=7)
    assert InferRole(engine="transformers").vllm is None
    train = ClusterConfig.model_validate({"train": {"tensor": 2, "pipeline": 3, "data": 4, "recompute": True}}).train
    assert train.parallel == ParallelConfig(tensor=2, pipeline=3, data=4, recompute=True)
    assert train.ranks == 24


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("name: it\n")
    return path


def test_keys_are_set_and_misspelt_like_any_other(config: Path) -> None:
    assert load_config(config).cluster is None
    cluster = load_config(config, ["cluster.gpus=4", "cluster.train.tensor=2"]).cluster
    assert cluster is not None
    assert (cluster.gpus, cluster.train.tensor, cluster.infer.replicas) == (4, 2, 1)
    with pytest.raises(ConfigError, match=r"cluster\.train\.tensr: unknown key; did you mean cluster\.train\.tensor\?"):
        load_config(config, ["cluster.train.tensr=2"])
    with pytest.raises(ConfigError, match=r"cluster\.train\.tensor is 0: input should be greater than or equal to 1"):
        load_config(config, ["cluster.train.tensor=0"])


def test_a_section_written_as_null_can_be_filled(config: Path) -> None:
    config.write_text("name: it\ncluster: null\n")
    cluster = load_config(config, ["cluster.gpus=4"]).cluster
    assert cluster is not None
    assert cluster.gpus == 4
