from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer

from rhythm.credit.heads import sampled_layers
from rhythm.tasks import load_task
from rhythm.tiny.model import BOS, CHARACTERS, EOS, PAD, TinyModelConfig, build_model, build_tokenizer, save_checkpoint

SMALL = TinyModelConfig(layers=2, hidden_size=32, mlp_size=48, head_size=8)


def test_about_a_million_parameters_and_a_pool_of_heads() -> None:
    model = build_model(TinyModelConfig(), build_tokenizer())
    assert 0.7e6 < model.num_parameters() < 1.3e6
    assert model.lm_head.weight is model.model.embed_tokens.weight
    config = model.config
    assert config.num_attention_heads > config.num_key_value_heads > 1
    assert len(sampled_layers(config.num_hidden_layers)) * config.num_attention_heads >= 10


def test_every_character_is_a_token_and_comes_back() -> None:
    tokenizer = build_tokenizer()
    assert len(tokenizer) == 4 + 96
    ids = tokenizer(CHARACTERS, add_special_tokens=False).input_ids
    assert len(set(ids)) == len(ids) == len(CHARACTERS)
    assert tokenizer.decode(ids) == CHARACTERS
    text = "  1,2 . <answer>(1 + 2)</answer> 's\n\n x"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert (
        tokenizer("1", add_special_tokens=False).input_ids * 3 == tokenizer("111", add_special_tokens=False).input_ids
    )


def test_special_tokens() -> None:
    tokenizer = build_tokenizer()
    ids = tokenizer("25,3>88:").input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.convert_ids_to_tokens(ids) == [BOS, *"25,3>88:"]
    assert tokenizer.decode([tokenizer.bos_token_id, ids[1], tokenizer.eos_token_id]) == f"{BOS}2{EOS}"
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 4
    assert tokenizer("é", add_special_tokens=False).input_ids == [tokenizer.unk_token_id]
    padded = tokenizer(["1", "123"], padding=True).input_ids
    assert tokenizer.convert_ids_to_tokens(padded[0]) == [PAD, PAD, BOS, "1"]


@pytest.mark.parametrize("format", ["answer", "steps"])
def test_countdowns_text_has_no_unknown_characters(format: str) -> None:
    tokenizer = build_tokenizer()
    task = load_task("countdown", {"train_size": 20, "test_size": 1, "format": format})
    for instance in task.train:
        text = task.prompt(instance) + task.solution(instance)
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_the_same_seed_gives_the_same_model_and_leaves_the_random_state() -> None:
    tokenizer = build_tokenizer()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, again = (build_model(SMALL, tokenizer).state_dict() for _ in range(2))
    assert torch.equal(torch.rand(3), expected)
    other = build_model(SMALL.model_copy(update={"seed": 1}), tokenizer).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_the_checkpoint_is_an_ordinary_one(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    model = build_model(SMALL, tokenizer)
    save_checkpoint(model, tokenizer, tmp_path)
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= {
        file.name for file in tmp_path.iterdir()
    }
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded).__name__ == "Qwen3ForCausalLM"
    assert loaded.dtype == torch.float32
    reader = AutoTokenizer.from_pretrained(tmp_path)
    assert (reader.pad_token, reader.bos_token, reader.eos_token) == (PAD, BOS, EOS)
    assert reader.padding_side == "left"
    text = "Make 3 from 1, 2:\n<think>"
    ids = reader(text, return_tensors="pt").input_ids
    assert ids.tolist()[0] == tokenizer(text).input_ids
    assert reader.decode(ids[0], skip_special_tokens=True) == text
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, model.eval()(ids).logits)
        written = loaded.generate(ids, max_new_tokens=4, do_sample=False)
    assert ids.shape[1] < written.shape[1] <= ids.shape[1] + 4


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"query_heads": 4, "key_heads": 3}, "query_heads is 4: must be a multiple of key_heads=3"),
        ({"head_size": 15}, "head_size is 15: must be even"),
        ({"width": 64}, "width"),
    ],
)
def test_bad_shapes_are_named(keys: dict[str, int], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TinyModelConfig.model_validate(keys)


def test_a_learned_vocabulary_writes_any_text_and_makes_words_of_its_own() -> None:
    texts = ["the apples and the pears: 12 apples"] * 20
    tokenizer = build_tokenizer(300, texts)
    assert len(tokenizer) <= 300
    assert tokenizer.get_vocab() == build_tokenizer(300, texts).get_vocab()
    for text in (texts[0], "été — 東京 <|x|>\n\t\\boxed{1}"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
    assert len(tokenizer(" apples", add_special_tokens=False).input_ids) == 1
    assert len(tokenizer("1234", add_special_tokens=False).input_ids) == 4
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id


def test_a_learned_vocabulary_sets_the_size_of_the_embedding(tmp_path: Path) -> None:
    config = TinyModelConfig(layers=1, vocabulary=300)
    tokenizer = build_tokenizer(config.vocabulary, ["few words"])
    model = build_model(config, tokenizer)
    assert model.get_input_embeddings().weight.shape == (300, config.hidden_size)
    save_checkpoint(model, tokenizer, tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("few words").input_ids == tokenizer("few words").input_ids
    with pytest.raises(ValidationError, match="greater than or equal to 260"):
        TinyModelConfig(vocabulary=259)
