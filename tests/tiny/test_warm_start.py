from __future__ import annotations

import io
import itertools
import logging
import math
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from rhythm.tasks import load_task
from rhythm.tiny import warm_start as module
from rhythm.tiny.model import TinyModelConfig, build_model, build_tokenizer
from rhythm.tiny.warm_start import (
    Example,
    WarmStartConfig,
    cache_key,
    collate,
    encode,
    learning_rate,
    response_loss,
    train,
)
from rhythm.tiny.warm_start import warm_start as run

MODEL = TinyModelConfig(layers=2, hidden_size=32, mlp_size=48, head_size=8)
TASK = load_task("countdown", {"train_size": 64, "test_size": 8, "numbers": 2, "max_number": 20, "format": "steps"})


def config(tmp_path: Path, **keys: Any) -> WarmStartConfig:
    base = {"steps": 12, "batch_size": 8, "warmup_steps": 2, "cache_dir": tmp_path / "cache", "model": MODEL}
    return WarmStartConfig.model_validate(base | keys)


def quiet() -> Console:
    return Console(file=io.StringIO())


def weights(directory: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = AutoModelForCausalLM.from_pretrained(directory).state_dict()
    return state


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def test_it_trains_once_and_is_then_read_from_the_cache(tmp_path: Path) -> None:
    first = run(TASK, config(tmp_path), quiet())
    stamp = (first.directory / "model.safetensors").stat().st_mtime_ns
    again = run(TASK, config(tmp_path), quiet())
    assert (first.cached, again.cached) == (False, True)
    assert (again.directory, again.loss, again.seconds) == (first.directory, first.loss, first.seconds)
    assert (first.directory / "model.safetensors").stat().st_mtime_ns == stamp
    assert [path.name for path in first.directory.parent.iterdir()] == [first.directory.name]
    assert AutoTokenizer.from_pretrained(first.directory).eos_token_id == build_tokenizer().eos_token_id


def test_the_same_configuration_gives_the_same_weights(tmp_path: Path) -> None:
    first = run(TASK, config(tmp_path), quiet())
    torch.manual_seed(99)
    second = run(TASK, config(tmp_path, cache_dir=tmp_path / "elsewhere"), quiet())
    assert second.directory.name == first.directory.name
    assert not second.cached
    assert same(weights(first.directory), weights(second.directory))
    other = run(TASK, config(tmp_path, seed=1), quiet())
    assert not same(weights(first.directory), weights(other.directory))


def test_it_learns(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    texts = [("1,2>3:", "1+2=3"), ("2,2>4:", "2*2=4")]
    model = build_model(MODEL, tokenizer)
    settings = config(tmp_path, steps=60, learning_rate=1e-2)
    losses = train(model, encode(tokenizer, texts), settings, pad=tokenizer.pad_token_id, console=quiet())
    assert len(losses) == 60
    assert losses[0] == pytest.approx(math.log(len(tokenizer)), abs=0.5)
    assert losses[-1] < 0.05
    for prompt, solution in texts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        written = model.eval().generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        assert tokenizer.decode(written) == solution + tokenizer.eos_token


def test_the_key_holds_everything_but_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [("1,2>3:", "1+2=3")]
    key = cache_key(texts, config(tmp_path))
    assert len(key) == 16
    assert cache_key(texts, config(tmp_path, cache_dir=tmp_path / "elsewhere")) == key
    others = [
        cache_key([("1,2>3:", "2+1=3")], config(tmp_path)),
        cache_key(texts * 2, config(tmp_path)),
        cache_key(texts, config(tmp_path, learning_rate=1e-3)),
        cache_key(texts, config(tmp_path, model=MODEL.model_copy(update={"layers": 3}))),
    ]
    changed = tmp_path / "changed.py"
    changed.write_text("# another version of the model's code\n")
    monkeypatch.setattr(module.tiny_model, "__file__", str(changed))
    others.append(cache_key(texts, config(tmp_path)))
    monkeypatch.setattr(torch, "__version__", "0.0")
    others.append(cache_key(texts, config(tmp_path)))
    assert len({key, *others}) == 7


def test_examples_are_bos_prompt_response_eos() -> None:
    tokenizer = build_tokenizer()
    (example,) = encode(tokenizer, [("1,2>3:", "1+2=3")])
    assert tokenizer.convert_ids_to_tokens(example.prompt) == [tokenizer.bos_token, *"1,2>3:"]
    assert tokenizer.convert_ids_to_tokens(example.response) == [*"1+2=3", tokenizer.eos_token]


def test_collate_pads_on_the_right_and_marks_the_response() -> None:
    input_ids_BT, response_mask_BT = collate([Example((1, 5), (6, 7, 2)), Example((1,), (8, 2))], pad=0)
    assert input_ids_BT.tolist() == [[1, 5, 6, 7, 2], [1, 8, 2, 0, 0]]
    assert response_mask_BT.int().tolist() == [[0, 0, 1, 1, 1], [0, 1, 1, 0, 0]]
    assert input_ids_BT.dtype == torch.int64


def test_only_response_tokens_count_and_padding_does_not_matter() -> None:
    model = build_model(MODEL, build_tokenizer())
    short, long = Example((1, 20), (21, 2)), Example((1, 30, 31, 32), (33, 34, 35, 2))
    with torch.no_grad():
        losses = [response_loss(model, *collate([example], pad=0)).item() for example in (short, long)]
        together = response_loss(model, *collate([short, long], pad=0)).item()
        logits = model(torch.tensor([[1, 20, 21]])).logits.log_softmax(-1)
    by_hand = -(logits[0, 1, 21] + logits[0, 2, 2]).item() / 2
    assert losses[0] == pytest.approx(by_hand, abs=1e-5)
    assert together == pytest.approx((2 * losses[0] + 4 * losses[1]) / 6, abs=1e-5)


def test_learning_rate_rises_and_falls(tmp_path: Path) -> None:
    settings = config(tmp_path, steps=100, warmup_steps=4, learning_rate=1.0, final_learning_rate=0.2)
    rates = [learning_rate(step, settings) for step in range(101)]
    assert rates[0] == pytest.approx(0.25)
    assert rates[1] == pytest.approx(0.5, abs=1e-3)
    assert rates[50] == pytest.approx(0.6)
    assert rates[100] == pytest.approx(0.2)
    assert max(rates) == rates[3]
    assert all(before > after for before, after in itertools.pairwise(rates[3:]))


def test_every_pass_visits_every_example(tmp_path: Path) -> None:
    examples = [Example((index,), (index,)) for index in range(10)]
    batches = module._batches(examples, config(tmp_path, batch_size=4))
    seen = [example.prompt[0] for _ in range(5) for example in next(batches)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]


def test_too_many_examples_and_a_lost_loss_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="examples is 65: the training set has 64"):
        run(TASK, config(tmp_path, examples=65), quiet())
    with pytest.raises(FloatingPointError, match=r"loss is nan at step \d+: lower learning_rate"):
        run(TASK, config(tmp_path, learning_rate=1e30, warmup_steps=0), quiet())
    assert list((tmp_path / "cache").iterdir()) == []


def test_nothing_half_written_is_ever_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_checkpoint", full_disk)
        with pytest.raises(OSError, match="no space"):
            run(TASK, config(tmp_path), quiet())
    assert list((tmp_path / "cache").iterdir()) == []
    assert not run(TASK, config(tmp_path), quiet()).cached


def test_two_runs_at_once_end_with_one_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other run publishes just before this one renames."""
    rename = os.rename

    def late(source: Path, target: Path) -> None:
        target.mkdir()
        (target / "theirs").touch()
        rename(source, target)

    monkeypatch.setattr(module.os, "rename", late)
    result = run(TASK, config(tmp_path), quiet())
    assert (result.directory / "theirs").exists()
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_second_process_waits_for_the_first_and_trains_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    train, trained = module.train, []

    def meanwhile(*arguments: object, **keys: object) -> object:
        """Another process asks for the same; a thread can stand for it, since each opens the lock's file itself."""
        trained.append(1)
        if len(trained) == 1:
            other.start()
            while "is in use by process" not in caplog.text:
                time.sleep(0.01)
        return train(*arguments, **keys)  # type: ignore[arg-type]

    results: list[module.WarmStart] = []
    other = threading.Thread(target=lambda: results.append(run(TASK, config(tmp_path), quiet())))
    monkeypatch.setattr(module, "train", meanwhile)
    with caplog.at_level(logging.INFO):
        first = run(TASK, config(tmp_path), quiet())
    other.join()
    assert not first.cached
    assert [(result.cached, result.directory) for result in results] == [(True, first.directory)]
    assert len(trained) == 1
    assert list((tmp_path / "cache").iterdir()) == [first.directory]


def test_the_bar_shows_rate_and_loss(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    run(TASK, config(tmp_path), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "12/12" in text
    assert "steps/s, loss" in text
