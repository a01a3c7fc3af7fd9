"""Builds a Qwen3 with about a million parameters and a character tokenizer, for runs on a laptop.

Each character is a token, so the model can be trained on any task in printable ASCII; with `vocabulary` the tokens are
those of a byte-level BPE trained on the task's texts, which can encode any text. Model and tokenizer are saved as an
ordinary transformers checkpoint, which `AutoModelForCausalLM` and `AutoTokenizer` load.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from pydantic import BaseModel, Field, model_validator
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

PAD, BOS, EOS, UNKNOWN = "<|pad|>", "<|bos|>", "<|eos|>", "<|unknown|>"
CHARACTERS = "\n" + "".join(map(chr, range(ord(" "), ord("~") + 1)))
"""The newline and the 95 printable characters of ASCII."""
SPECIALS = (PAD, BOS, EOS, UNKNOWN)
SMALLEST_VOCABULARY = 256 + len(SPECIALS)
"""Of the byte-level tokenizer: every byte, so that nothing is unknown, and the special tokens."""


class TinyModelConfig(BaseModel, extra="forbid", frozen=True):
    """The shape of the tiny Qwen3; 0.9M parameters by default."""

    layers: int = Field(default=6, ge=1, description="decoder layers")
    hidden_size: int = Field(default=128, ge=1, description="width of the residual stream")
    mlp_size: int = Field(default=256, ge=1, description="width of the gated MLP")
    query_heads: int = Field(default=4, ge=1, description="query heads per layer")
    key_heads: int = Field(default=2, ge=1, description="key heads per layer; must divide query_heads")
    head_size: int = Field(default=32, ge=2, description="size of a head")
    max_positions: int = Field(default=1024, ge=1, description="longest sequence, in tokens")
    rope_theta: float = Field(default=10_000.0, gt=0, description="base of the rotary position encoding")
    vocabulary: int | None = Field(
        default=None,
        ge=SMALLEST_VOCABULARY,
        le=65_536,
        description="tokens of a byte-level BPE learned from the warm start's texts; null: a token per ASCII character",
    )
    seed: int = Field(default=0, ge=0, description="seed of the initial weights")

    @property
    def vocabulary_size(self) -> int:
        """Rows of the embedding."""
        return self.vocabulary or len(SPECIALS) + len(CHARACTERS)

    @model_validator(mode="after")
    def _check_heads(self) -> TinyModelConfig:
        if self.query_heads % self.key_heads:
            raise ValueError(f"query_heads is {self.query_heads}: must be a multiple of key_heads={self.key_heads}")
        if self.head_size % 2:
            raise ValueError(f"head_size is {self.head_size}: must be even, for the rotary position encoding")
        return self


def build_tokenizer(vocabulary: int | None = None, texts: Iterable[str] = ()) -> PreTrainedTokenizerFast:
    """One token per character of CHARACTERS, `<|unknown|>` for others; with `vocabulary`, a byte-level BPE of at most
    so many tokens, trained on `texts`, in which every digit is a token. `<|bos|>` is put first unless
    `add_special_tokens=False`.
    """
    tokenizer = _characters() if vocabulary is None else _byte_pairs(texts, vocabulary)
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bos)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _characters() -> Tokenizer:
    vocabulary = {token: index for index, token in enumerate([*SPECIALS, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def _byte_pairs(texts: Iterable[str], size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    # Numbers of any length are then read and written by the same ten tokens.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def build_model(config: TinyModelConfig, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A newly initialized model, equal for equal configurations; torch's random state is not changed."""
    qwen = Qwen3Config(
        vocab_size=config.vocabulary_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.mlp_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.query_heads,
        num_key_value_heads=config.key_heads,
        head_dim=config.head_size,
        max_position_embeddings=config.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return Qwen3ForCausalLM(qwen)


def save_checkpoint(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write configuration, weights (safetensors) and tokenizer for transformers' `from_pretrained`."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
