"""H2OPress: scores against eager maps, and kvpress's own pipeline where kvpress and its transformers are installed."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import models
import pytest
import torch
import transformers
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
REAL_MODEL = ROOT / "build" / "real-model"
INSTALLED = find_spec("kvpress") is not None
SIZES = models.SIZES | models.GQA | {"num_hidden_layers": 3, "initializer_range": 0.3}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES),
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=9),
}


def _query(module: nn.Module, hidden_states: Tensor) -> Tensor:
    """What kvpress.utils.get_prerope_query_states gives, for the models of this file."""
    query = module.q_proj(hidden_states).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
    return module.q_norm(query) if hasattr(module, "q_norm") else query


@pytest.fixture
def press() -> Iterator[Any]:
    """H2OPress, on a stand-in for kvpress where that is not installed."""
    if not INSTALLED:

        @dataclass
        class ScorerPress:
            compression_ratio: float = 0.0

        package, utils = ModuleType("kvpress"), ModuleType("kvpress.utils")
        package.ScorerPress, utils.get_prerope_query_states = ScorerPress, _query  # type: ignore[attr-defined]
        sys.modules |= {"kvpress": package, "kvpress.utils": utils}
    from rhythm.integrations.kvpress import H2OPress

    yield H2OPress
    if not INSTALLED:
        for name in ("kvpress", "kvpress.utils", "rhythm.integrations.kvpress"):
            del sys.modules[name]


def scores_and_maps(press: Any, kind: str, input_ids: Tensor, **inputs: Any) -> list[tuple[Tensor, Tensor]]:
    """(score [B, G, T], map [B, H, T, T]) of each layer; score as the hook of kvpress calls it."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind](), attn_implementation="sdpa").eval()
    got: list[Tensor] = []

    def hook(module: Any, _: Any, kwargs: dict[str, Any], output: Any) -> None:
        keys = kwargs["past_key_values"].layers[module.layer_idx].keys
        got.append(press.score(module, kwargs["hidden_states"], keys, keys, output[1], kwargs))

    handles = [layer.self_attn.register_forward_hook(hook, with_kwargs=True) for layer in model.model.layers]
    with torch.no_grad():
        model(input_ids, past_key_values=transformers.DynamicCache(), **inputs)
    for handle in handles:
        handle.remove()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(input_ids, output_attentions=True, use_cache=False).attentions
    return list(zip(got, maps, strict=True))


@pytest.mark.parametrize("kind", CONFIGS)
def test_scores_are_those_of_the_eager_maps(press: Any, kind: str) -> None:
    input_ids = torch.randint(0, 61, (2, 30), generator=torch.Generator().manual_seed(3))
    rows = torch.arange(30, 0, -1)
    for reduce, of_map in (
        ("sum", lambda a: a.sum(-2).unflatten(1, (2, -1)).sum(2)),
        ("mean", lambda a: (a.sum(-2) / rows).unflatten(1, (2, -1)).mean(2)),
        ("max", lambda a: a.amax(-2).unflatten(1, (2, -1)).amax(2)),
    ):
        for score, weights in scores_and_maps(press(reduce=reduce), kind, input_ids):
            torch.testing.assert_close(score, of_map(weights), rtol=1e-4, atol=1e-5)
    (score, _), *_ = scores_and_maps(press(recent=4), kind, input_ids)
    assert score.isinf().sum(-1).eq(4).all()
    assert score[..., -4:].isinf().all()


def test_padding_is_refused(press: Any) -> None:
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, :3] = 0
    with pytest.raises(ValueError, match=r"attention_mask of shape .* hides keys from the last row; H2OPress takes"):
        scores_and_maps(press(), "llama", torch.zeros(2, 12, dtype=torch.int64), attention_mask=mask)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compression_ratio": 1.0}, "compression_ratio is 1.0; it must be in [0, 1)"),
        ({"recent": -1}, "recent is -1; it must be an integer of at least 0"),
        ({"reduce": "median"}, "reduce is 'median'; allowed are sum, mean, max"),
    ],
)
def test_bad_fields_are_named(press: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        press(**options)


@pytest.mark.skipif(INSTALLED, reason="kvpress is installed")
def test_a_missing_kvpress_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "rhythm.integrations.kvpress", raising=False)
    with pytest.raises(ModuleNotFoundError) as missing:
        importlib.import_module("rhythm.integrations.kvpress")
    assert str(missing.value) == (
        "rhythm.integrations.kvpress needs kvpress, which is not installed: "
        "pip install '.[kvpress]' in a clone of rhythm"
    )


@pytest.mark.real
@pytest.mark.skipif(not INSTALLED, reason="needs kvpress, and the transformers that it requires")
def test_kvpress_own_pipeline() -> None:
    """The example of docs/integrations.md on SmolLM2; and the keys and answers of kvpress's own press on eager maps."""
    from kvpress import ObservedAttentionPress

    from rhythm.integrations import kvpress as integration

    text = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
    block = re.search(r"^## kvpress\n.*?^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert block is not None
    context = "The lighthouse of Anholt is red. " + "The sea was calm and the boats stayed in the harbor. " * 12
    question = "What color is the lighthouse of Anholt?"
    names = {"path": str(REAL_MODEL), "context": context, "question": question}
    exec(block[1], names)
    assert len(names["answer"].split()) > 3

    # The same pipeline without eager attention and with it.
    ours, observed = integration.H2OPress(0.5, reduce="mean"), ObservedAttentionPress(0.5)
    eager = transformers.pipeline(
        "kv-press-text-generation", model=str(REAL_MODEL), model_kwargs={"attn_implementation": "eager"}
    )
    assert names["pipe"].model.config._attn_implementation != "eager"
    asked = {"question": question, "max_new_tokens": 24}
    assert names["pipe"](context, press=ours, **asked) == eager(context, press=observed, **asked)

    input_ids = eager.tokenizer(context, return_tensors="pt").input_ids
    kept: list[list[Tensor]] = []
    for model, press in ((names["pipe"].model, ours), (eager.model, observed)):
        cache = transformers.DynamicCache()
        with torch.no_grad(), press(model):
            model(input_ids, past_key_values=cache)
        kept.append([layer.keys.sort(dim=2).values for layer in cache.layers])
    for one, other in zip(*kept, strict=True):
        assert one.shape[2] == input_ids.shape[1] // 2
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
