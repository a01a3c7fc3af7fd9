"""observe() on SmolLM2-135M-Instruct, a pre-trained Llama of 30 layers, against the maps of eager attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import pytest
import torch
from transformers import AutoTokenizer

from rhythm.checkpoints import load_model
from rhythm.tap.observe import observe
from rhythm.tap.signals_config import SignalsConfig

pytestmark = pytest.mark.real

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "build" / "real-model"
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def model() -> Any:
    assert CHECKPOINT.is_dir(), f"{CHECKPOINT} is missing: make real-model"
    return load_model(CHECKPOINT, dtype=torch.float32, device="cpu").eval()


@pytest.fixture(scope="module")
def tokenizer(model: Any) -> Any:
    return AutoTokenizer.from_pretrained(CHECKPOINT)


def test_it_is_the_pretrained_model(model: Any, tokenizer: Any) -> None:
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    generated = model.generate(ids, max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(generated[0, ids.shape[1] :]) == " Paris."


@pytest.mark.parametrize(
    "signals", [SignalsConfig(), SignalsConfig(layers=(0, 14, 29), horizon=(1, None))], ids=["default", "to the end"]
)
def test_signals_equal_those_of_its_attention_maps(model: Any, tokenizer: Any, signals: SignalsConfig) -> None:
    """A long and a short row of English in one padded batch, each compared with itself alone."""
    tokens = tokenizer((ROOT / "LICENSE").read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    rows, prompt_lens = [tokens[:900], tokens[900:1200]], [130, 41]
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    mask = torch.arange(len(rows[0])) < torch.tensor([[len(row)] for row in rows])
    seen = observe(model, input_ids, attention_mask=mask, prompt_lens=prompt_lens, entropy=True, signals=signals)
    assert seen.entropy is not None
    for i, (row, prompt_len) in enumerate(zip(rows, prompt_lens, strict=True)):
        alone = models.signals_by_maps(model, row, prompt_len, signals)
        assert alone.entropy is not None
        assert seen.groups.local[i].equal(alone.groups.local[0])
        assert seen.groups.global_[i].equal(alone.groups.global_[0])
        torch.testing.assert_close(seen.span[i], alone.span[0], rtol=1e-5, atol=TOLERANCE)
        for actual, expected in ((seen.waad, alone.waad), (seen.fai, alone.fai), (seen.entropy, alone.entropy)):
            torch.testing.assert_close(
                actual[i, : len(row)], expected[0], rtol=0, atol=TOLERANCE, equal_nan=True, check_dtype=False
            )
        assert seen.waad[i, len(row) :].isnan().all()
