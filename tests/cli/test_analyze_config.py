"""rhythm-analyze's configuration: one set of typed keys, from YAML, key=value and three short options."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from rhythm.analysis import AnalysisConfig
from rhythm.analysis.grid import SensitivityConfig
from rhythm.analysis.lengths import LengthsConfig
from rhythm.cli import analyze as command
from rhythm.cli.config_keys import config_keys
from rhythm.tap.signals_config import SignalsConfig
from rhythm.tiny.model import TinyModelConfig, build_model, build_tokenizer, save_checkpoint

NEEDED = ["model=m", "prompts=p", "out=o"]
FORMER = [
    ("--engine vllm", "engine=vllm", "engine", "vllm"),
    ("--device cpu", "device=cpu", "device", "cpu"),
    ("--dtype float16", "dtype=float16", "dtype", "float16"),
    ("--trust-remote-code", "trust_remote_code=true", "trust_remote_code", True),
    ("--keep-going", "keep_going=true", "keep_going", True),
    ("--chat", "chat=true", "chat", True),
    ("--temperature 0", "sampling.temperature=0", "sampling.temperature", 0.0),
    ("--top-p 0.9", "sampling.top_p=0.9", "sampling.top_p", 0.9),
    ("--top-k 5", "sampling.top_k=5", "sampling.top_k", 5),
    ("--max-new-tokens 9", "sampling.max_new_tokens=9", "sampling.max_new_tokens", 9),
    ("--responses 2", "responses_per_problem=2", "responses_per_problem", 2),
    ("--problems-at-once 3", "problems_at_once=3", "problems_at_once", 3),
    ("--pool all", "signals.layers=all", "signals.layers", "all"),
    ("--quantile 0.2", "signals.quantile=0.2", "signals.quantile", 0.2),
    ("--window 7", "signals.window=7", "signals.window", 7),
    ("--horizon 2,10", "signals.horizon=[2,10]", "signals.horizon", [2, 10]),
    ("--horizon end", "signals.horizon=[1,null]", "signals.horizon", [1, None]),
    ("--horizon revised", "signals.horizon=revised", "signals.horizon", [10, 100]),
    ("--backend reference", "signals.backend=reference", "signals.backend", "reference"),
    ("--credit random", "credit.strategy=random", "credit.strategy", "random"),
    ("--peak-prominence 0.5", "peaks.prominence=0.5", "peaks.prominence", 0.5),
    ("--peak-distance 4", "peaks.distance=4", "peaks.distance", 4),
    ("--follow 2", "peaks.follow=2", "peaks.follow", 2),
    ("--sentence-gap 6", "receivers.sentence_gap=6", "receivers.sentence_gap", 6),
    ("--permutations 19", "table2.permutations=19", "table2.permutations", 19),
    ("--null shuffle", "table2.null=shuffle", "table2.null", "shuffle"),
    ("--no-counterfactuals", "counterfactuals=null", "counterfactuals", None),
    ("--positions 1", "counterfactuals.positions=1", "counterfactuals.positions", 1),
    ("--candidates 2", "counterfactuals.candidates=2", "counterfactuals.candidates", 2),
    ("--continuation-tokens 8", "counterfactuals.max_new_tokens=8", "counterfactuals.max_new_tokens", 8),
    ("--maps 0", "maps=0", "maps", 0),
    ("--seed 4", "seed=4", "seed", 4),
    ("--vllm-memory=0.3", "vllm.gpu_memory_utilization=0.3", "vllm.gpu_memory_utilization", 0.3),
    ("--vllm-kv-cache 1", "vllm.kv_cache_gib=1", "vllm.kv_cache_gib", 1.0),
]


def config(*words: str) -> command.CommandConfig:
    return command._config(command._parser().parse_intermixed_args([*NEEDED, *words]))


def test_the_papers_preset_is_under_what_is_set(tmp_path: Path) -> None:
    paper = config("preset=paper")
    assert (paper.signals.layers, paper.signals.horizon, paper.signals.window) == ("all", (1, None), 10)
    assert (paper.sampling.temperature, paper.figure, paper.maps) == (0, "shortest_correct", 70)
    own = config("preset=paper", "signals.layers=3", "sampling.max_new_tokens=9", "maps=1")
    assert (own.signals.layers, own.signals.horizon, own.maps) == (3, (1, None), 1)
    assert (own.sampling.temperature, own.sampling.max_new_tokens) == (0, 9)
    file = tmp_path / "resolved.yaml"
    file.write_text(command.dump_config(own), encoding="utf-8")
    assert command._config(command._parser().parse_intermixed_args([str(file)])) == own
    assert AnalysisConfig(preset="paper").signals.layers == "all"
    assert AnalysisConfig(preset="paper", signals=SignalsConfig(window=5)).signals == SignalsConfig(window=5)
    assert (config().preset, config().signals.layers, config().sampling.temperature) == (None, None, 0.7)


def differences(one: object, other: object, name: str = "") -> dict[str, object]:
    """Dotted names of what differs, and the first one's values."""
    if isinstance(one, dict) and isinstance(other, dict):
        differing = {}
        for key in one:
            differing |= differences(one[key], other[key], f"{name}.{key}" if name else key)
        return differing
    return {} if one == other else {name: one}


@pytest.mark.parametrize(("options", "override", "key", "value"), FORMER)
def test_every_former_option_has_a_key_and_names_it(
    options: str, override: str, key: str, value: object, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = differences(config(override).model_dump(mode="json"), config().model_dump(mode="json"))
    assert changed == {key: value}
    assert command.main([*NEEDED, *options.split()]) == command.BAD_INPUT
    name = options.split()[0].partition("=")[0]
    assert f"rhythm-analyze: {name} is now {override.partition('=')[0]}=" in capsys.readouterr().err


def test_no_former_option_is_left_out() -> None:
    assert set(command.FORMER_OPTIONS) == {options.split()[0].partition("=")[0] for options, *_ in FORMER}


def test_defaults_are_those_of_the_analysis() -> None:
    assert config().analysis == AnalysisConfig()
    assert type(config().analysis) is AnalysisConfig


def test_a_section_keeps_the_defaults_of_its_other_keys() -> None:
    sampling = AnalysisConfig.model_validate({"sampling": {"top_k": 3}}).sampling
    assert (sampling.temperature, sampling.top_k) == (0.7, 3)
    vllm = config("vllm.kv_cache_gib=2").vllm
    assert (vllm.gpu_memory_utilization, vllm.kv_cache_gib) == (0.5, 2.0)


def test_short_options_and_their_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A short option's value is taken literally, and overrides the file's; options may come between the words."""
    file = tmp_path / "a=b.yaml"
    file.write_text("model: other\nprompts: p\nseed: 2\n", encoding="utf-8")
    words = [str(file), "--model", "2024", "maps=1", "--out", "a: b", "seed=3"]
    config = command._config(command._parser().parse_intermixed_args(words))
    assert (config.model, config.prompts, config.out) == (Path("2024"), Path("p"), Path("a: b"))
    assert (config.maps, config.seed) == (1, 3)
    assert command.main([*NEEDED, "--out", "x"]) == command.BAD_INPUT
    assert "out is given twice: --out x is short for out=…" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("model=m out=o", "prompts: is required: prompts=… (path)"),
        ("model=m prompts=p out=o temperature=0", "temperature: unknown key; did you mean sampling.temperature?"),
        ("model=m prompts=p out=o signals.windw=3", "signals.windw: unknown key; did you mean signals.window?"),
        ("model=m prompts=p out=o sampling.temperature=-1", "sampling.temperature is -1: input should be greater"),
        ("model=m prompts=p out=o maps=true", "maps is True: must be int"),
        ("model=m prompts=p out=o signals.horizon=2", "signals.horizon is 2: input should be a valid tuple"),
        ("model=m prompts=p out=o signals.horizon=[2,x]", "signals.horizon: must be [int, int | null]"),
        ("model=m prompts=p out=o signals.horizon=far", "must be [low, high] or one of ['paper', 'revised']"),
        ("model=m prompts=p out=o signals.grouping=batch", "signals: grouping must be sequence"),
        ("model=m prompts=p out=o credit.strategy=x", "credit.strategy: must be one of none, random, entropy"),
        ("model=m prompts=p out=o seed", "'seed': an override is written key=value"),
        ("none.yaml model=m", "cannot read none.yaml"),
    ],
)
def test_a_bad_value_is_one_message_that_names_the_key(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(words.split()) == command.BAD_INPUT
    shown = capsys.readouterr()
    assert shown.err.startswith("rhythm-analyze: ")
    assert message in shown.err
    assert shown.out == ""


def test_an_unknown_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main([*NEEDED, "--windo", "3"])
    assert "unrecognized arguments: --windo" in capsys.readouterr().err


def test_help_lists_every_key_with_its_default_and_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--help"]) == 0
    shown = capsys.readouterr().out
    keys = list(config_keys(config()))
    assert len(keys) > 50
    for key in keys:
        assert f"  {key.path}  {key.kind} = " in shown, key
        assert key.meaning, key
    for line in (
        "  model  path = …",
        "  sampling.temperature  float = 0.7",
        "  table2.null  rotate | shuffle = rotate",
        "  vllm.gpu_memory_utilization  float = 0.5",
    ):
        assert line in shown.splitlines()
    assert max(map(len, shown.splitlines())) < 200


def test_help_shows_a_files_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "short.yaml"
    file.write_text("signals: {window: 7}\n", encoding="utf-8")
    assert command.main([str(file), "out=here", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"  signals.window  int = 7", "  out  path = here", "  prompts  path = …"} <= set(lines)


def test_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = build_tokenizer()
    shape = TinyModelConfig(layers=3, hidden_size=16, mlp_size=16, query_heads=2, key_heads=1, head_size=8)
    save_checkpoint(build_model(shape, tokenizer), tokenizer, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()  # it reads no weights
    file, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    rows = [{"prompt": "1>"}, {"prompt": "2>", "responses": ["1=1", "2=2"]}, {"prompt": "3>"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = [f"model={tmp_path / 'model'}", f"prompts={file}", f"out={out}", "responses_per_problem=3", "--dry-run"]
    words += ["device=cpu", "generation_dtype=float16"]
    assert command.main(words) == 0
    shown = capsys.readouterr().out
    resolved = yaml.safe_load(shown)
    assert resolved == command._config(command._parser().parse_intermixed_args(words)).model_dump(mode="json")
    assert resolved["responses_per_problem"] == 3
    assert "# model: qwen3 on cpu, dtype float32; generates in float16\n" in shown
    assert "# problems: 3; responses: 2 given, 2 × 3 = 6 generated\n" in shown
    assert f"# out: nothing finished yet in {out}\n" in shown
    assert not out.exists()
    again = tmp_path / "again.yaml"
    again.write_text(shown, encoding="utf-8")
    assert command.main([str(again), "--dry-run"]) == 0
    assert capsys.readouterr().out == shown

    with file.open("a") as lines:
        lines.write("{}\n")
    assert command.main(words) == command.BAD_INPUT
    assert "row 4: has no text" in capsys.readouterr().err
    assert command.main([*words, "keep_going=true"]) == 0
    assert "6 generated; left out: 1\n" in capsys.readouterr().out
    assert command.main([*words, "model=nowhere"]) == command.BAD_INPUT
    assert "model is nowhere: no such checkpoint" in capsys.readouterr().err


def test_sensitivity_and_lengths_are_asked_for_by_option_or_by_its_keys(tmp_path: Path) -> None:
    assert config().sensitivity is None
    assert config("--sensitivity").sensitivity == config("sensitivity={}").sensitivity == SensitivityConfig()
    one = SensitivityConfig(changes=1)
    for words in (["sensitivity.changes=1"], ["--sensitivity", "sensitivity.changes=1"]):
        assert config(*words).sensitivity == one
    file = tmp_path / "own.yaml"
    file.write_text("model: m\nprompts: p\nout: o\nsensitivity:\n  changes: 1\n  window: [3]\n", encoding="utf-8")
    given = command._config(command._parser().parse_intermixed_args([str(file), "--sensitivity"]))
    assert given.sensitivity == SensitivityConfig(changes=1, window=(3,))
    assert config("--lengths", "lengths.responses=2").lengths == LengthsConfig(responses=2)
    assert given.analysis == AnalysisConfig()  # a directory may be continued with or without it
