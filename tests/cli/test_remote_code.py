"""A checkpoint with its own Python code: the code runs only if the key allows it, whatever stdin answers."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from rhythm.cli import analyze, train
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


@dataclass(frozen=True)
class Done:
    code: int
    err: str


class Yes(io.StringIO):
    """A stdin that answers yes, however often it is asked."""

    def readline(self, *_: int) -> str:
        return "y\n"


Command = Callable[..., Done]


@pytest.fixture
def in_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Command]:
    """in_this_process(main, *arguments): a command's exit code and stderr. What checkpoints contain is loaded anew."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", Yes())
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr("sys.path", [*sys.path])  # transformers adds that folder

    def run(main: Callable[[list[str]], int], *arguments: str) -> Done:
        forget()
        capsys.readouterr()
        return Done(main([*arguments]), capsys.readouterr().err)

    def forget() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
            del sys.modules[name]

    yield run
    forget()


def in_a_process(module: str, *arguments: str, cwd: Path) -> Done:
    command = [sys.executable, "-m", f"rhythm.cli.{module}", *arguments]
    environment = {"HF_HOME": str(cwd / "hf"), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HOME": str(cwd)}
    done = subprocess.run(
        command, cwd=cwd, env=environment, input="y\n" * 20, capture_output=True, text=True, timeout=240, check=False
    )
    return Done(done.returncode, done.stderr)


def training(checkpoint: Path, *overrides: str) -> tuple[str, ...]:
    """Arguments of a run beside the checkpoint, whose configuration this writes."""
    (checkpoint.parent / "run.yaml").write_text(
        "name: run\nruns_dir: runs\nsteps: 1\ntensorboard: false\nsampling: {max_new_tokens: 4}\n"
        "task: {options: {format: steps, numbers: 2, max_number: 9, train_size: 20, test_size: 2}}\n"
        "batch: {prompts_per_batch: 2, responses_per_prompt: 2, mini_batch_size: 4, micro_batch_size: 4}\n"
        "evaluation: {samples: 0}\n"
    )
    return ("run.yaml", f"model.path={checkpoint}", *overrides)


def analysis(checkpoint: Path, *options: str) -> tuple[str, ...]:
    """Arguments of an analysis of a file beside the checkpoint, which this writes."""
    (checkpoint.parent / "prompts.jsonl").write_text('{"prompt": "1,2,3>6:", "response": "1+2=3,3+3=6"}\n')
    quick = ("prompts=prompts.jsonl", "out=out", "counterfactuals=null", "table2.permutations=9")
    return (f"model={checkpoint}", *quick, *options)


def test_training_runs_it_only_where_the_key_is_on(
    checkpoint: Path, mark: Path, tmp_path: Path, in_this_process: Command
) -> None:
    refused = in_a_process("train", *training(checkpoint), cwd=tmp_path)
    assert not mark.exists()
    assert refused.code == 2, refused.err
    # The first process on a machine that imports matplotlib may say that it looks for fonts.
    (line,) = (line for line in refused.err.splitlines() if line.strip() and not line.startswith("Matplotlib is"))
    assert line.startswith(f"rhythm-train: {checkpoint} needs Python code that it contains")
    assert "model.trust_remote_code=true" in line
    assert not (tmp_path / "runs").exists()

    done = in_this_process(train.main, *training(checkpoint, "model.trust_remote_code=true"))
    assert done.code == 0, done.err
    assert mark.read_text() == "executed"
    mark.unlink()
    # The run's own checkpoint is one with code, too.
    resumed = ("steps=2", "--resume")
    refused = in_this_process(train.main, *training(checkpoint, "model.trust_remote_code=false", *resumed))
    assert refused.code == 2, refused.err
    assert not mark.exists()
    done = in_this_process(train.main, *training(checkpoint, "model.trust_remote_code=true", *resumed))
    assert done.code == 0, done.err
    assert mark.read_text() == "executed"
    assert len((tmp_path / "runs" / "run" / "metrics.jsonl").read_text().splitlines()) == 3


def test_analysis_runs_it_only_where_the_key_is_on(checkpoint: Path, mark: Path, in_this_process: Command) -> None:
    refused = in_this_process(analyze.main, *analysis(checkpoint))
    assert not mark.exists()
    assert refused.code == 2, refused.err
    line = refused.err.strip()
    assert line.startswith(f"rhythm-analyze: {checkpoint} needs Python code that it contains")
    assert "set trust_remote_code=true" in line
    assert "\n" not in line

    done = in_this_process(analyze.main, *analysis(checkpoint, "trust_remote_code=true"))
    assert done.code == 0, done.err
    assert mark.read_text() == "executed"
