"""rhythm-analyze from its command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from rhythm.analysis import AnalysisConfig, stages
from rhythm.cli import analyze as command
from rhythm.tiny.model import TinyModelConfig, build_model, build_tokenizer, save_checkpoint

SHAPE = {"hidden_size": 32, "mlp_size": 32, "query_heads": 4, "key_heads": 2, "head_size": 8, "max_positions": 128}
QUICK = """
table2: {permutations: 19}
counterfactuals: {positions: 1, candidates: 1}
signals: {horizon: [2, 6]}
sampling: {max_new_tokens: 14}
"""


def checkpoint(directory: Path, layers: int = 3) -> str:
    tokenizer = build_tokenizer()
    save_checkpoint(build_model(TinyModelConfig(layers=layers, **SHAPE), tokenizer), tokenizer, directory)
    return str(directory)


def prompts(directory: Path, *rows: dict[str, str]) -> str:
    file = directory / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def run(model: str, prompts: str, out: Path, *options: str) -> int:
    quick = out.parent / "quick.yaml"
    quick.write_text(QUICK, encoding="utf-8")
    return command.main([str(quick), f"model={model}", f"prompts={prompts}", f"out={out}", *options])


def test_a_report_and_its_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    model, file = checkpoint(tmp_path / "model"), prompts(tmp_path, {"prompt": "1,2,3>6:"}, {"question": "1+1?"})
    transformers.utils.logging.enable_progress_bar()
    assert run(model, file, out) == 0
    shown = capsys.readouterr()
    assert shown.out.split() == [str(out / "report.html")]
    assert "Loading weights" not in shown.err, "transformers' own bar, which draws over lines in a log"
    assert (out / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    settings = json.loads((out / "settings.json").read_text())
    assert settings["signals"]["horizon"] == [2, 6]
    assert settings["counterfactuals"]["positions"] == 1
    assert settings["sampling"]["temperature"] == 0.7, "the section sets another key alone"
    assert set(settings) == {"version", "weights", "model", "generation_dtype", *AnalysisConfig.model_fields}
    assert json.loads((out / "results.json").read_text())["names"] == ["00001-0", "00002-0"]
    before = (out / "report.html").read_bytes()
    assert run(model, file, out) == 0
    assert (out / "report.html").read_bytes() == before
    assert run(model, file, out, "signals.window=7", "seed=3") == command.BAD_INPUT
    errors = capsys.readouterr().err
    assert "which holds an analysis with another seed, signals.window; use another directory" in errors
    assert f"2 finished responses are kept in {out}" in errors
    # What decides no result may change from one call to the next.
    assert run(model, file, out, "device=cpu", "keep_going=true") == 0


def test_what_can_not_go_on_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = checkpoint(tmp_path / "model")
    good = prompts(tmp_path, {"prompt": "1,2,3>6:"})

    def refused(*arguments: str, out: str = "out") -> str:
        assert run(*arguments[:2], tmp_path / out, *arguments[2:]) == command.BAD_INPUT
        return capsys.readouterr().err

    assert "nowhere: no such checkpoint" in refused("nowhere", good)
    assert "none.jsonl: no such file" in refused(model, "none.jsonl")
    assert "has 2 layers" in refused(checkpoint(tmp_path / "shallow", layers=2), good)
    t5 = tmp_path / "t5"
    transformers.T5Config(d_model=16).save_pretrained(t5)
    assert "t5 is an encoder-decoder; the model must be causal" in refused(str(t5), good)
    bert = tmp_path / "bert"
    bert_config = transformers.BertConfig(
        vocab_size=100, hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=3
    )
    transformers.BertLMHeadModel(bert_config).save_pretrained(bert)
    build_tokenizer().save_pretrained(bert)
    assert "bidirectional attention" in refused(str(bert), good)
    assert "device" in refused(model, good, "device=tpu9")
    assert not (tmp_path / "out").exists()


def test_bad_rows_and_what_is_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = checkpoint(tmp_path / "model")
    file = prompts(tmp_path, {"prompt": "1,2,3>6:"}, {"prompt": "1>1:", "response": "1=1," * 40})
    options = ["problems_at_once=1"]
    assert run(model, file, tmp_path / "out", *options) == command.BAD_INPUT
    errors = capsys.readouterr().err
    assert "rhythm-analyze: row 2: the prompt and response 1 have 165 tokens together" in errors
    assert f"1 finished response is kept in {tmp_path / 'out'}" in errors
    assert run(model, file, tmp_path / "out", *options, "keep_going=true") == 0
    assert "left out: row 2:" in capsys.readouterr().err


def test_what_lacks_counterfactuals_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And results that are there already are shown, by the command that was interrupted and by --dry-run."""
    out = tmp_path / "out"
    model = checkpoint(tmp_path / "model")
    file = prompts(tmp_path, *({"prompt": prompt} for prompt in ("1,2,3>6:", "4,5>9:", "1>1:")))
    groups: list[int] = []
    compute = stages.counterfactuals

    def until_the_second(*arguments: Any, **options: Any) -> Any:
        groups.append(1)
        if len(groups) == 2:
            raise OSError(28, "No space left on device")
        return compute(*arguments, **options)

    monkeypatch.setattr(stages, "counterfactuals", until_the_second)
    assert run(model, file, out, "counterfactuals.responses_at_once=1") != 0
    kept = f"1 finished response is kept, 2 without their counterfactuals yet in {out}"
    errors = capsys.readouterr().err
    assert f"rhythm-analyze: {kept}" in errors
    assert f"rhythm-analyze: {out / 'report.html'} shows 1 of 3 responses, and more as they come" in errors
    assert run(model, file, out, "counterfactuals.responses_at_once=1", "--dry-run") == 0
    assert f"# out: {kept}" in capsys.readouterr().out


def test_vllm_is_asked_for_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    file = prompts(tmp_path, {"prompt": "1,2,3>6:"})
    assert run(checkpoint(tmp_path / "model"), file, tmp_path / "out", "engine=vllm") == command.BAD_INPUT
    assert "vLLM is not installed" in capsys.readouterr().err


@pytest.mark.cluster
@pytest.mark.slow
def test_vllm_generates_what_transformers_would(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    shape = TinyModelConfig(layers=3, hidden_size=64, mlp_size=64, query_heads=4, key_heads=2, head_size=32)
    save_checkpoint(build_model(shape, tokenizer), tokenizer, tmp_path / "model")
    file = prompts(tmp_path, {"prompt": "1,2,3>6:"}, {"prompt": "4,5>9:"})
    greedy = "sampling.temperature=0"
    assert run(str(tmp_path / "model"), file, tmp_path / "transformers", greedy) == 0
    assert run(str(tmp_path / "model"), file, tmp_path / "vllm", greedy, "engine=vllm", "vllm.kv_cache_gib=0.0625") == 0
    texts = [
        [
            json.loads(path.read_text())["tokens"]["texts"]
            for path in sorted((tmp_path / engine / "responses").iterdir())
        ]
        for engine in ("transformers", "vllm")
    ]
    assert texts[0] == texts[1]
    assert len(texts[0]) == 2
    assert all(texts[0])
