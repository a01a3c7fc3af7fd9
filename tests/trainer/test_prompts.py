"""How prompts become tokens, which fit, and where a response stops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rhythm.cli.train import main
from rhythm.engines.interfaces import Rollout, SamplingConfig
from rhythm.engines.local.infer import GenerateInfer
from rhythm.engines.stopping import cut_at_stop, tokens_to_stop
from rhythm.tasks import load_task
from rhythm.tasks.prompts import ChatPrompt, PromptConfig, PromptLimit, encode_prompt
from rhythm.tiny.model import TinyModelConfig, build_model, build_tokenizer, save_checkpoint
from rhythm.trainer.prompts import fit_held_out, fit_prompts

pytestmark = pytest.mark.usefixtures("without_curves")

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[>]{% endif %}"
)
SHAPE = TinyModelConfig(
    layers=2, hidden_size=32, mlp_size=32, query_heads=2, key_heads=1, head_size=16, max_positions=40
)


def config(tmp_path: Path, *more: str) -> list[str]:
    """A run of one step of a small model."""
    (tmp_path / "run.yaml").write_text("steps: 1\ntensorboard: false\n")
    shape = "{layers: 2, hidden_size: 32, mlp_size: 32, query_heads: 2, key_heads: 1, head_size: 16, vocabulary: 400}"
    return [
        str(tmp_path / "run.yaml"),
        f"runs_dir={tmp_path / 'runs'}",
        f"warm_start.cache_dir={tmp_path / 'cache'}",
        f"warm_start.model={shape}",
        "warm_start.steps=2",
        "warm_start.batch_size=4",
        "batch={prompts_per_batch: 2, responses_per_prompt: 2, mini_batch_size: 4, micro_batch_size: 4}",
        "sampling.max_new_tokens=8",
        "signals.horizon=[1,4]",
        "evaluation.samples=1",
        *more,
    ]


def lines(tmp_path: Path, rows: list[dict[str, Any]]) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_prompts_as_tokens() -> None:
    tokenizer = build_tokenizer()
    plain = PromptConfig(system="Be brief.", template="Q: {prompt}").ask("a {b}")
    assert plain == "Be brief.\nQ: a {b}"
    assert not isinstance(plain, ChatPrompt)
    assert encode_prompt(tokenizer, plain) == (plain, tokenizer.encode(plain))
    chat = PromptConfig(system="Be brief.", template="Q: {prompt}", chat=True).ask("a {b}")
    with pytest.raises(ValueError, match="chat is true: the model's tokenizer has no chat template"):
        encode_prompt(tokenizer, chat)
    tokenizer.chat_template = TEMPLATE
    text = "[system]Be brief.[user]Q: a {b}[>]"
    assert encode_prompt(tokenizer, chat) == (text, tokenizer.encode(text, add_special_tokens=False))


def test_prompts_too_long_are_counted_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": "x" * n, "answer": str(n)} for n in range(1, 11)]
    options = {"path": str(lines(tmp_path, rows)), "held_out": 0.2}
    task, tokenizer = load_task("jsonl", options), build_tokenizer()
    # A token in front, so seven characters.
    fitted, _ = fit_prompts(task, tokenizer, PromptLimit(8, "sampling.max_prompt_tokens is 8"))
    assert sorted(len(item.question) for item in (*fitted.train, *fitted.test)) == [1, 2, 3, 4, 5, 6, 7]
    train_left_out = len(task.train) - len(fitted.train)
    assert f"{train_left_out} of 8 training prompts have more than 8 tokens, up to 11: left out" in caplog.text
    assert "left out (sampling.max_prompt_tokens is 8)" in caplog.text
    assert fit_prompts(task, tokenizer, PromptLimit(11, "")) == (task, 11)
    with pytest.raises(ValueError, match=r"^it is: no training prompt has at most 1 tokens; the shortest has 2$"):
        fit_prompts(task, tokenizer, PromptLimit(1, "it is"))


def test_of_a_task_that_is_only_evaluated_only_the_problems_are_looked_at(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": "x" * n, "answer": str(n)} for n in range(1, 11)]
    task = load_task("jsonl", {"path": str(lines(tmp_path, rows)), "held_out": 0.5})
    tokenizer, lens = build_tokenizer(), [len(item.question) for item in task.test]
    longest = sorted(lens[:3])[1]  # two of the first three prompts have so many characters, or fewer
    fitted = fit_held_out(task, tokenizer, PromptLimit(longest + 1, "it is"), title="few", problems=3)
    assert [len(item.question) for item in fitted.test] == [n for n in lens[:3] if n <= longest]
    assert f"few: 1 of 3 held-out prompts have more than {longest + 1} tokens" in caplog.text
    assert fit_held_out(task, tokenizer, PromptLimit(11, "it is"), title="all", problems=None) is task
    with pytest.raises(ValueError, match="it is: no held-out prompt has at most 1 tokens"):
        fit_held_out(task, tokenizer, PromptLimit(1, "it is"), title="none", problems=None)


def test_the_limit_of_prompts_names_what_sets_it() -> None:
    assert PromptLimit.of(40, "the model's context", None) == PromptLimit(39, "the model's context is 40")
    assert PromptLimit.of(40, "cluster.max_length", 40) == PromptLimit(39, "cluster.max_length is 40")
    assert PromptLimit.of(40, "the model's context", 39) == PromptLimit(39, "sampling.max_prompt_tokens is 39")


def test_a_budget_below_the_longest_row_is_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "x" * n, "answer": str(n)} for n in range(1, 11)]
    arguments = config(
        tmp_path,
        "task.name=jsonl",
        f"task.options={{path: {lines(tmp_path, rows)}, held_out: 0.2}}",
        "warm_start.model.vocabulary=null",
    )
    assert main([*arguments, "batch.max_tokens=18"]) == 2
    assert "batch.max_tokens is 18: must be at least 19, the tokens of the longest prompt and response, 11 + 8" in (
        " ".join(capsys.readouterr().err.split())
    )
    assert not (tmp_path / "runs" / "run" / "config.yaml").exists()
    assert not (tmp_path / "cache").exists()
    assert main([*arguments, "batch.max_tokens=19"]) == 0


def test_a_long_prompt_gets_what_the_context_leaves_and_a_short_one_all() -> None:
    tokenizer = build_tokenizer()
    model = build_model(SHAPE, tokenizer)
    infer = GenerateInfer(model, end_ids=[tokenizer.unk_token_id], pad_id=tokenizer.pad_token_id)
    prompts = [[5] * 37, [6] * 4]
    rollout = infer.generate(prompts, 2, SamplingConfig(max_new_tokens=12), seed=0)
    assert rollout.response_lens.tolist() == [3, 3, 12, 12]
    assert rollout.lens.max() <= SHAPE.max_positions
    assert not rollout.finished.any()
    alone = infer.generate(prompts[:1], 2, SamplingConfig(max_new_tokens=12, temperature=0), seed=0)
    both = infer.generate(prompts, 2, SamplingConfig(max_new_tokens=12, temperature=0), seed=0)
    assert torch.equal(both.input_ids[:2, :40], alone.input_ids[:, :40])
    with pytest.raises(ValueError, match="the longest has 40 tokens, which leaves none of 40"):
        infer.generate([[5] * 40], 1, SamplingConfig(), seed=0)


def test_a_response_ends_with_the_first_stop_string() -> None:
    tokenizer = build_tokenizer()
    texts = ["7\nQ: 8\nQ: 9", "7 and 8", "a</answer>b"]
    rows = [
        tokenizer.encode("p", add_special_tokens=False) + tokenizer.encode(t, add_special_tokens=False) for t in texts
    ]
    width = max(map(len, rows))
    lens = torch.tensor([len(row) for row in rows])
    inside = torch.arange(width) < lens[:, None]
    rollout = Rollout(
        input_ids=torch.tensor([row + [0] * (width - len(row)) for row in rows]),
        attention_mask=inside,
        response_mask=inside & (torch.arange(width) >= 1),
        prompt_lens=torch.ones(3, dtype=torch.int64),
        group=torch.arange(3),
        logprobs=torch.where(inside, -1.0, 0.0),
        finished=torch.tensor([False, False, False]),
    )
    assert cut_at_stop(rollout, tokenizer, ()) is rollout
    cut = cut_at_stop(rollout, tokenizer, ("</answer>", "\nQ:"))
    left = [tokenizer.decode(ids[mask]) for ids, mask in zip(cut.input_ids, cut.response_mask, strict=True)]
    assert left == ["7\nQ:", "7 and 8", "a</answer>"]
    assert cut.finished.tolist() == [True, False, True]
    assert cut.lens.tolist() == [5, 8, 11]
    assert (cut.logprobs != 0).sum(dim=1).tolist() == [5, 8, 11]
    assert tokens_to_stop(tokenizer, [], ("x",)) is None
    with pytest.raises(ValueError, match="holds an empty string"):
        SamplingConfig(stop=("",))


def checkpoint(tmp_path: Path, template: str | None) -> Path:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    save_checkpoint(build_model(SHAPE, tokenizer), tokenizer, tmp_path / "model")
    return tmp_path / "model"


def test_a_run_asks_through_the_chat_template_with_stop_strings(tmp_path: Path) -> None:
    path = lines(tmp_path, [{"prompt": f"{n}?", "answer": str(n)} for n in range(8)])
    model = checkpoint(tmp_path, TEMPLATE)
    options = f"task.options={{path: {path}, held_out: 0.5, chat: true}}"
    assert main(config(tmp_path, f"model.path={model}", "task.name=jsonl", options, "sampling.stop=[a, b]")) == 0
    sample = next((tmp_path / "runs/run/samples").glob("*1.jsonl")).read_text()
    assert json.loads(sample.splitlines()[0])["prompt"].startswith("[user]")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["task.options.chat=true"], "the tiny model has no chat template; give model.path"),
        (
            ["task.options.chat=true", "model.path=MODEL"],
            "task.options.chat is true: the model's tokenizer has no chat template; leave it out",
        ),
        (["task.options.held_out=1.0"], "all instances are held out, so there is nothing to train on"),
        (
            ["task.options.answer=truth"],
            r"rows.jsonl, line 1: has no column truth (answer); its columns are prompt, answer",
        ),
        (["task.options.path=/none.jsonl"], "path is /none.jsonl: No such file"),
        (["task.options.promt=x"], "did you mean task.options.prompt?"),
        (
            ["sampling.max_prompt_tokens=1", "model.path=MODEL"],
            "sampling.max_prompt_tokens is 1: no training prompt has at most 1 tokens; the shortest has 3",
        ),
        (
            ["sampling.max_prompt_tokens=1", "warm_start.model.vocabulary=null"],
            "sampling.max_prompt_tokens is 1: no training prompt has at most 1 tokens; the shortest has 3",
        ),
        (["warm_start.model.max_positions=2"], "warm_start.model.max_positions is 2: no training prompt has at most 1"),
        (
            ["evaluation.tasks=[{name: countdown, label: game, options: {chat: true}}]", "model.path=MODEL"],
            "evaluation.tasks, game: options.chat is true: the model's tokenizer has no chat template; leave it out",
        ),
        (
            ["evaluation.tasks=[{name: countdown, label: game, options: {chat: true}}]"],
            "evaluation.tasks, game: options.chat is true: the tiny model has no chat template; give model.path",
        ),
        (
            ["evaluation.tasks=[countdown]", "sampling.max_prompt_tokens=4", "model.path=MODEL"],
            "evaluation.tasks, countdown: sampling.max_prompt_tokens is 4: no held-out prompt has at most 4 tokens",
        ),
        (
            ["evaluation.tasks=[countdown]", "sampling.max_prompt_tokens=4"],
            "evaluation.tasks, countdown: sampling.max_prompt_tokens is 4: no held-out prompt has at most 4 tokens",
        ),
        (["task.name=reasoning_gym:countdown", "task.options={}"], "evaluates a response as Python code"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_refused_before_anything_starts(
    more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = lines(tmp_path, [{"prompt": f"{n}?", "answer": str(n)} for n in range(8)])
    model = checkpoint(tmp_path, None)
    given = ["task.name=jsonl", f"task.options={{path: {path}, held_out: 0.5}}", *more]
    assert main(config(tmp_path, *(item.replace("MODEL", str(model)) for item in given))) == 2
    error = capsys.readouterr().err
    assert message in " ".join(error.split())
    assert "Traceback" not in error
    assert not (tmp_path / "runs" / "run" / "config.yaml").exists()
    assert not (tmp_path / "cache").exists()


def test_a_tokenizer_without_an_end_token_is_refused_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = checkpoint(tmp_path, None)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        said = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps({key: said[key] for key in said if not key.startswith("eos_token")}))
    assert main(config(tmp_path, f"model.path={model}")) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert f"model.path: the tokenizer of {model} has no end token; a response needs one" in error
    assert not (tmp_path / "runs").exists()
