"""A checkpoint with its own Python code: the code runs only if the key allows it, whatever stdin answers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rhythm.tiny.model import TinyModelConfig, build_model, build_tokenizer, save_checkpoint

CONFIGURATION = """
from pathlib import Path
from transformers import Qwen3Config
Path({mark!r}).write_text("executed")

class OwnConfig(Qwen3Config):
    model_type = "own"
"""
MODELING = """
from transformers import Qwen3ForCausalLM
from .configuration_own import OwnConfig

class OwnModel(Qwen3ForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "executed"


@pytest.fixture
def checkpoint(tmp_path: Path, mark: Path) -> Path:
    directory = tmp_path / "own"
    shape = TinyModelConfig(layers=3, hidden_size=32, mlp_size=32, query_heads=4, key_heads=2, head_size=8)
    tokenizer = build_tokenizer()
    save_checkpoint(build_model(shape, tokenizer), tokenizer, directory)
    (directory / "configuration_own.py").write_text(CONFIGURATION.format(mark=str(mark)))
    (directory / "modeling_own.py").write_text(MODELING)
    config = json.loads((directory / "config.json").read_text())
    config["model_type"], config["architectures"] = "own", ["OwnModel"]
    config["auto_map"] = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnModel",
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def with_yes_on_stdin(module: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"rhythm.cli.{module}", *arguments]
    environment = {"HF_HOME": str(cwd / "hf"), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HOME": str(cwd)}
    return subprocess.run(
        command, cwd=cwd, env=environment, input="y\n" * 20, capture_output=True, text=True, timeout=240, check=False
    )


def train(checkpoint: Path, *overrides: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    (cwd / "run.yaml").write_text(
        "name: run\nruns_dir: runs\nsteps: 1\ntensorboard: false\nsampling: {max_new_tokens: 4}\n"
        "task: {options: {format: steps, numbers: 2, max_number: 9, train_size: 20, test_size: 2}}\n"
        "batch: {prompts_per_batch: 2, responses_per_prompt: 2, mini_batch_size: 4, micro_batch_size: 4}\n"
        "evaluation: {samples: 0}\n"
    )
    return with_yes_on_stdin("train", "run.yaml", f"model.path={checkpoint}", *overrides, cwd=cwd)


def analyze(checkpoint: Path, *options: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    (cwd / "prompts.jsonl").write_text('{"prompt": "1,2,3>6:", "response": "1+2=3,3+3=6"}\n')
    quick = ("prompts=prompts.jsonl", "out=out", "counterfactuals=null", "table2.permutations=9")
    return with_yes_on_stdin("analyze", f"model={checkpoint}", *quick, *options, cwd=cwd)


def test_training_runs_it_only_where_the_key_is_on(checkpoint: Path, mark: Path, tmp_path: Path) -> None:
    refused = train(checkpoint, cwd=tmp_path)
    assert not mark.exists()
    assert refused.returncode == 2, refused.stderr
    line = refused.stderr.strip()
    assert line.startswith(f"rhythm-train: {checkpoint} needs Python code that it contains")
    assert "model.trust_remote_code=true" in line
    assert "\n" not in line
    assert not (tmp_path / "runs").exists()

    done = train(checkpoint, "model.trust_remote_code=true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert mark.read_text() == "executed"
    mark.unlink()
    # The run's own checkpoint is one with code, too.
    refused = train(checkpoint, "steps=2", "model.trust_remote_code=false", "--resume", cwd=tmp_path)
    assert refused.returncode == 2, refused.stderr
    assert not mark.exists()
    done = train(checkpoint, "steps=2", "model.trust_remote_code=true", "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "runs" / "run" / "metrics.jsonl").read_text().splitlines()) == 3


def test_analysis_runs_it_only_where_the_key_is_on(checkpoint: Path, mark: Path, tmp_path: Path) -> None:
    refused = analyze(checkpoint, cwd=tmp_path)
    assert not mark.exists()
    assert refused.returncode == 2, refused.stderr
    line = refused.stderr.strip()
    assert line.startswith(f"rhythm-analyze: {checkpoint} needs Python code that it contains")
    assert "set trust_remote_code=true" in line
    assert "\n" not in line

    done = analyze(checkpoint, "trust_remote_code=true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert mark.read_text() == "executed"
