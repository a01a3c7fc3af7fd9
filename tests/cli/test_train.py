"""rhythm-train's command line: help, the dry run, and one clear message per mistake."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import yaml

from rhythm.cli.train import main
from rhythm.tasks import TASKS, task_class
from rhythm.trainer.config import TrainConfig
from rhythm.trainer.loop import RunSummary


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(f"name: it\nruns_dir: {tmp_path}\nbatch: {{prompts_per_batch: 6, responses_per_prompt: 4, "
                    "mini_batch_size: 8, micro_batch_size: 2}\nsteps: 5\n")  # fmt: skip
    return path


def keys_of(model: type, prefix: str = "") -> set[str]:
    keys = set()
    for name, field in model.model_fields.items():
        kind = field.annotation
        keys |= keys_of(kind, f"{prefix}{name}.") if hasattr(kind, "model_fields") else {prefix + name}
    return keys


def test_help_lists_every_key_with_its_default_and_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for key in keys_of(TrainConfig) - {"task.options"}:
        assert key in shown, key
    assert "amplif" in shown
    line = next(line for line in shown.splitlines() if line.strip().startswith("credit.top_fraction"))
    assert "0.4" in line


@pytest.mark.parametrize(
    ("overrides", "shown", "absent"),
    [
        ([], {"max_number": 8, "train_size": 20000}, ["grader"]),
        (["task.options.train_size=9"], {"max_number": 8, "train_size": 9}, ["grader"]),
        (["task.name=countdown"], {"max_number": 8}, ["grader"]),
        (["task.name=gsm8k"], {"path": "openai/gsm8k", "grader": "numeric", "seed": 0}, ["max_number"]),
        (["task.name=jsonl"], {"path": "…", "grader": "math", "held_out": None}, ["max_number"]),
        (["task.options.path=a.jsonl", "task.name=jsonl"], {"path": "a.jsonl", "held_out": None}, ["max_number"]),
        (["task.name=jsonl", "task.options.held_out=0.5"], {"path": "…", "held_out": 0.5}, ["max_number"]),
        (["task={name: jsonl, options: {seed: 3}}"], {"path": "…", "seed": 3}, ["max_number"]),
        (["task.name=reasoning_gym:chain_sum"], {"train_size": 10000, "parameters": {}}, ["max_number"]),
    ],
)
def test_help_has_the_options_of_the_task_that_is_named(
    overrides: list[str],
    shown: dict[str, object],
    absent: list[str],
    config: Path,
    capsys: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
) -> None:
    """Though the file has options of Countdown, and no run could begin with these."""
    config.write_text(config.read_text(encoding="utf-8") + "task: {options: {max_number: 8}}\n", encoding="utf-8")
    assert main([str(config), *overrides, "--help"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines() if line.startswith("  task.options.")]
    values = {line.split()[0].removeprefix("task.options."): line.partition(" = ")[2] for line in lines}
    assert {key: yaml.safe_load(values[key]) for key in shown} == shown
    assert not values.keys() & set(absent)
    assert not [warning for warning in recwarn if "serializ" in str(warning.message)]


def test_help_needs_no_file_for_the_options_of_a_task(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["task.name=jsonl", "seed=7", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "  task.options.path  str = …\n" in shown
    assert "  seed  int = 7\n" in shown


def test_help_has_options_given_together_that_no_run_takes(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(config), "task.options.numbers=[4, 3]", "--help"]) == 0
    assert "= [4, 3]\n" in capsys.readouterr().out
    assert main([str(config), "task.options.numbers=[4, 3]", "--dry-run"]) == 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task.name=jsonl", "task.options.max_number=8"], "max_number belongs to task countdown"),
        (["task.name=jsonl", "task.options.gradr=math"], "did you mean task.options.grader?"),
        (["task.name=jsonl", "task.options.held_out=2"], "task.options.held_out is 2"),
        (["task.name=gsm9k"], "did you mean 'gsm8k'?"),
        (["task.name=no.such:Task"], "task.name"),
        (["task.name=3"], "task.name"),
        (["task.options=3"], "task.options"),
        (["task=3"], "task"),
        (["task.options.max_number=true"], "task.options.max_number is True"),
        (["optimizer.lr=-1"], "optimizer.lr"),
        (["steps"], "steps"),
    ],
)
def test_help_refuses_a_bad_value(
    overrides: list[str], message: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(config), *overrides, "--help"]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown


def test_help_of_every_configuration_and_task(capsys: pytest.CaptureFixture[str]) -> None:
    """The command of docs/tasks.md."""
    first, *others = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
    every = [(first, name) for name in (*TASKS, "reasoning_gym:gsm_symbolic")]
    for path, name in [*every, *((path, "jsonl") for path in others)]:
        assert main([str(path), f"task.name={name}", "--help"]) == 0, (path, name)
        shown = capsys.readouterr().out
        for option in task_class(name).config_class.model_fields:
            assert f"  task.options.{option}  " in shown


def test_dry_run_prints_the_resolved_configuration_and_batch_sizes(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(config), "optimizer.lr=5e-4", "signals.horizon=[2,9]", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    resolved = yaml.safe_load(shown)
    assert resolved["optimizer"]["lr"] == 5e-4
    assert resolved["signals"]["horizon"] == [2, 9]
    assert resolved["credit"]["gamma_amp"] == 1.5
    assert "6 prompts × 4 responses = 24 responses" in shown
    assert "24 / 8 = 3" in shown
    assert "8 / 2 = 4" in shown
    assert "5 × 3 = 15" in shown
    assert list(config.parent.iterdir()) == [config]  # nothing was started


def test_dry_run_with_a_budget_of_tokens(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """micro_batch_size, which would not divide, is not used then."""
    assert main([str(config), "batch.max_tokens=4096", "batch.micro_batch_size=3", "--dry-run"]) == 0
    assert "passes per gradient step: as few as 4,096 tokens in each allow" in capsys.readouterr().out


def test_options_may_stand_between_the_overrides(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(config), "seed=3", "--dry-run", "steps=7"]) == 0
    resolved = yaml.safe_load(capsys.readouterr().out)
    assert (resolved["seed"], resolved["steps"]) == (3, 7)


def test_the_default_batch_is_the_papers() -> None:
    batch = TrainConfig().batch
    assert (batch.batch_size, batch.mini_batch_size, batch.gradient_steps) == (512, 32, 16)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimiser.lr=1", "optimizer"),
        ("optimizer.lrr=1", "optimizer.lr"),
        ("credit.gama_amp=2", "credit.gamma_amp"),
        ("task.options.max_numbr=9", "task.options.max_number"),
        ("optimizer.lr=-1", "optimizer.lr"),
        ("steps=many", "steps"),
        ("credit.strategy=coupeld", "credit.strategy"),
        ("batch.mini_batch_size=7", "mini_batch_size is 7: must divide the batch"),
        ("batch.micro_batch_size=3", "micro_batch_size is 3: must divide mini_batch_size"),
        ("signals.source=both", "signals.source"),
        ("attn=separate", "attn is now signals.source"),
        ("cluster.deadlines.reward=3", "cluster.deadlines.reward is now reward.seconds"),
        ("credit.q=0.3", "credit.q is now credit.top_fraction"),
        ("signals.layers=[3,2]", "signals.layers: layers is [3, 2]; it must be how many to sample"),
        ("task.name=no.such:Task", "task.name"),
        ("steps", "steps"),
        ("name=../elsewhere", "name"),
        ("signals.horizon=[5,2]", "horizon"),
        ("model.path=/no/such/checkpoint", "/no/such/checkpoint"),
    ],
)
def test_a_bad_value_is_one_message_that_names_the_key(
    override: str, message: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(config), override]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown
    assert list(config.parent.iterdir()) == [config]


def test_unreadable_configurations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err
    (tmp_path / "bad.yaml").write_text("a: [1\n")
    assert main([str(tmp_path / "bad.yaml")]) == 2
    assert "not valid YAML" in capsys.readouterr().err
    (tmp_path / "list.yaml").write_text("- 1\n")
    assert main([str(tmp_path / "list.yaml")]) == 2
    assert "must hold keys and values" in capsys.readouterr().err
    for none in ([], ["steps=3"]):
        assert main(none) == 2
        assert "no configuration given" in capsys.readouterr().err


def test_a_task_that_cannot_be_built_leaves_nothing(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(config), "task.options={format: steps, numbers: 2, max_number: 4}"]) == 2
    assert "different instances were found" in capsys.readouterr().err
    assert list(config.parent.iterdir()) == [config]


@pytest.mark.parametrize(
    ("override", "line", "control"),
    [
        ("credit.alpha=0.2", "coupled", "credit.strategy=none"),
        ("credit.strategy=none", "none", None),
        (
            "credit={strategy: random, random_like: coupled}",
            "random",
            "credit.strategy=none credit.random_like=null",
        ),
    ],
)
def test_the_summary_does_not_call_the_lift_that_of_gamma(
    config: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    override: str,
    line: str,
    control: str | None,
) -> None:
    def run(config: TrainConfig, **options: object) -> RunSummary:
        return RunSummary(config.run_dir, 5, 0.191, 0.326, 0.33, 4, None, config.run_dir / "report.html")

    monkeypatch.setattr("rhythm.cli.train.run", run)
    assert main([str(config), override]) == 0
    shown = capsys.readouterr().out
    assert f"lift                    +13.5 points by training with credit.strategy={line}\n" in shown
    said = [line for line in shown.splitlines() if line.startswith("without γ")]
    assert len(said) == (control is not None)
    if control is not None:
        command = said[0].partition("the control: rhythm-train ")[2]
        assert command == f"{config} {shlex.quote(override)} name=it-control {control}"
        assert main([*shlex.split(command), "--dry-run"]) == 0
        resolved = yaml.safe_load(capsys.readouterr().out)
        assert (resolved["name"], resolved["credit"]["strategy"]) == ("it-control", "none")
