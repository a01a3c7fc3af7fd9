"""Prompts with images: only the text of responses is read, whatever the prompt is made of. Against the maps of each
row alone under eager attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from models import SIZES, signals_by_maps
from torch import Tensor
from torch.testing import assert_close

from rhythm import AttentionTap, SignalsConfig, UnsupportedAttention, observe
from rhythm.credit.gamma import batch_credit_weights
from rhythm.tap.observe import response_entropy
from rhythm.tap.rhythm_credit import RhythmCredit

IMAGE, START, IMAGE_TOKENS = 60, 59, 4
LENS, PROMPTS = [26, 19], [12, 9]
SIGNALS = SignalsConfig(layers=(1, 2), window=4, horizon=(2, 8), backend="reference")
TEXT = SIZES | {"num_hidden_layers": 3, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 0}


def gemma3() -> Any:
    """The tokens of an image see each other, whichever comes first."""
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    text = TEXT | {"head_dim": 16, "layer_types": kinds, "sliding_window": 8}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, image_token_index=IMAGE, mm_tokens_per_image=IMAGE_TOKENS
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def qwen2_5_vl() -> Any:
    """Images have positions in two dimensions, which the model makes itself."""
    text = TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, vision_start_token_id=START
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def images_of(build: Callable[[], Any]) -> dict[str, Tensor]:
    """Of one row: an image each, of IMAGE_TOKENS tokens."""
    if build is gemma3:
        return {"pixel_values": torch.randn(1, 3, 28, 28)}
    return {"pixel_values": torch.randn(16, 3 * 2 * 14 * 14), "image_grid_thw": torch.tensor([[1, 4, 4]])}


def rows_of(build: Callable[[], Any]) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """(ids [n], inputs of that row alone)."""
    rows = []
    for n, prompt in zip(LENS, PROMPTS, strict=True):
        ids = torch.randint(1, START, (n,))
        ids[prompt - IMAGE_TOKENS - 3] = START
        ids[prompt - IMAGE_TOKENS - 2 : prompt - 2] = IMAGE
        kinds = "token_type_ids" if build is gemma3 else "mm_token_type_ids"
        rows.append((ids, images_of(build) | {kinds: (ids == IMAGE).int()[None]}))
    return rows


@pytest.fixture(params=[gemma3, qwen2_5_vl], ids=["gemma3", "qwen2.5-vl"])
def case(request: pytest.FixtureRequest) -> tuple[Any, list[tuple[Tensor, dict[str, Tensor]]]]:
    torch.manual_seed(0)
    model = request.param().eval()
    return model, rows_of(request.param)


def padded(rows: list[tuple[Tensor, dict[str, Tensor]]]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """ids and mask [B, T], padded on the left, and the inputs of all rows."""
    T = max(LENS)
    ids = torch.stack([torch.nn.functional.pad(row, (T - len(row), 0)) for row, _ in rows])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(row), (T - len(row), 0)) for row, _ in rows])
    inputs = {}
    for name in rows[0][1]:
        parts = [more[name] for _, more in rows]
        if "token_type_ids" in name:
            parts = [torch.nn.functional.pad(x, (T - x.shape[1], 0)) for x in parts]
        inputs[name] = torch.cat(parts)
    return ids, mask, inputs


def test_signals_are_those_of_the_maps(case: Any) -> None:
    model, rows = case
    ids, mask, inputs = padded(rows)
    where: dict[str, Any] = {"attention_mask": mask, "prompt_lens": PROMPTS}
    got = observe(model, ids, **where, signals=SIGNALS, entropy=True, inputs=inputs)
    with AttentionTap(model, **where, signals=SIGNALS) as tap:
        model(ids, attention_mask=mask, use_cache=False, **inputs)
    entropy = response_entropy(model, ids, **where, inputs=inputs)
    credit = RhythmCredit(strategy="coupled", signals=SIGNALS)
    response = mask.bool() & (mask.cumsum(1) > torch.tensor(PROMPTS)[:, None])
    gamma = credit(model, ids, mask, response, inputs=inputs)
    assert gamma[response].unique().numel() > 2
    blind = observe(model, ids, **where, signals=SIGNALS)
    for row, ((ids_n, more), n, prompt) in enumerate(zip(rows, LENS, PROMPTS, strict=True)):
        expected = signals_by_maps(model, ids_n, prompt, SIGNALS, **more)
        for name, tolerance in (("waad", 1e-4), ("fai", 1e-5), ("entropy", 1e-4)):
            wanted = getattr(expected, name)[0].float()
            assert_close(getattr(got, name)[row, -n:], wanted, rtol=0, atol=tolerance, equal_nan=True)
        assert_close(entropy[row, -n:], expected.entropy[0].float(), rtol=0, atol=1e-4, equal_nan=True)
        assert (blind.waad[row, -n:] - expected.waad[0]).nan_to_num().abs().max() > 0.01  # the images count
    for name in ("waad", "fai"):
        assert_close(getattr(tap.signals(), name), getattr(got, name), rtol=0, atol=1e-6, equal_nan=True)
    assert_close(gamma, batch_credit_weights(got, response, credit.config), rtol=0, atol=0)


def test_an_image_in_a_response_is_refused() -> None:
    torch.manual_seed(0)
    model, (row, *_) = gemma3().eval(), rows_of(gemma3)
    ids, inputs = row[0][None], row[1]
    observe(model, ids, prompt_lens=[PROMPTS[0]], signals=SIGNALS, inputs=inputs)
    with pytest.raises(UnsupportedAttention, match="bidirectional attention"):
        observe(model, ids, prompt_lens=[4], signals=SIGNALS, inputs=inputs)
