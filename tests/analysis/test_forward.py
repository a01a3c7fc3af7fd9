"""The pass over all layers against rhythm.observe and the reference, on several architectures."""

from __future__ import annotations

import math
from typing import Any

import models
import pytest
import torch
import transformers

from rhythm.analysis.config import AnalysisConfig
from rhythm.analysis.forward import Observer
from rhythm.analysis.observation import observe_response
from rhythm.analysis.receivers import excess_kurtosis
from rhythm.ops import reference
from rhythm.tap.attention_form import AttentionCall, UnsupportedAttention
from rhythm.tap.interception import intercept_attention, text_config
from rhythm.tap.observe import observe
from rhythm.tiny.model import build_tokenizer

SIZES = models.SIZES | models.GQA | {"vocab_size": 100, "num_hidden_layers": 6}
CONFIG = AnalysisConfig()
N, PROMPT = 80, 11
IDS = torch.randint(4, 100, (N,), generator=torch.Generator().manual_seed(0)).tolist()


def build(kind: str) -> Any:
    torch.manual_seed(0)
    window: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"] * 3, "sliding_window": 8}
    if kind == "qwen3":
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES)).eval()
    if kind == "gemma3":
        return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**SIZES, **window)).eval()
    if kind == "llama4":  # chunks in three layers of four
        rest = {"num_local_experts": 2, "intermediate_size_mlp": 32, "pad_token_id": None, "attention_chunk_size": 16}
        return transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**SIZES | rest)).eval()
    if kind == "gpt_oss":
        config = transformers.GptOssConfig(**SIZES, **window, num_local_experts=2, num_experts_per_tok=1)
        model = transformers.GptOssForCausalLM(config).eval()
    else:
        model = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SIZES, **window)).eval()
    model.set_attn_implementation("eager")  # the one that caps scores
    return model


@pytest.mark.parametrize("kind", ["qwen3", "gemma3", "gemma2", "gpt_oss", "llama4"])
def test_signals_are_those_of_observe(kind: str) -> None:
    model = build(kind)
    seen = observe_response(
        Observer(model, CONFIG.signals), build_tokenizer(), IDS[:PROMPT], IDS[PROMPT:], CONFIG, maps=False
    )
    expected = observe(model, torch.tensor([IDS]), prompt_lens=[PROMPT], entropy=True)
    assert expected.entropy is not None
    for name in ("waad", "fai", "entropy"):
        of_response = getattr(expected, name)[0, PROMPT:].tolist()
        assert getattr(seen.tokens, name) == pytest.approx(of_response, rel=1e-5, abs=1e-7, nan_ok=True)
    pool = [(layer, head) for layer in (2, 3, 4) for head in range(4)]
    for chosen, mask in (
        (seen.heads.local, expected.groups.local),
        (seen.heads.global_, expected.groups.global_),
    ):
        assert chosen == tuple(pool[i] for i in mask[0].nonzero()[:, 0].tolist())
    spans = [seen.heads.span[layer][head] for layer, head in pool]
    assert spans == pytest.approx(expected.span[0].tolist(), rel=1e-6)
    with torch.no_grad():
        log_softmax = model(torch.tensor([IDS])).logits[0].float().log_softmax(dim=-1)
    logprob = [float(log_softmax[t - 1, IDS[t]]) for t in range(PROMPT, N)]
    assert seen.tokens.logprob == pytest.approx(logprob, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("kind", ["qwen3", "gemma3", "gemma2", "gpt_oss", "llama4"])
def test_spans_and_kurtosis_of_every_layer(kind: str) -> None:
    model = build(kind)
    seen = Observer(model, CONFIG.signals).observe(IDS, PROMPT, [0] * (N - PROMPT))
    calls: list[AttentionCall] = []

    def kept(call: AttentionCall) -> Any:
        calls.append(call)
        return call.run()

    with torch.no_grad(), intercept_attention(text_config(model), kept):
        model(torch.tensor([IDS]))
    assert sorted(seen.layers) == list(range(6))
    for call in calls:
        assert call.layer is not None
        sliding = kind not in ("qwen3", "llama4") and call.layer % 2 == 0
        chunk = 16 if kind == "llama4" and call.layer % 4 != 3 else N
        weights = torch.zeros(call.query.shape[1], N, N)
        for start in range(0, N, chunk):
            inside = slice(start, start + chunk)
            weights[:, inside, inside], _ = reference.attention_weights(
                call.query[0, :, inside].transpose(0, 1),
                call.key[0, :, inside].transpose(0, 1),
                call.options["scaling"],
                sliding_window=8 if sliding else None,
                softcap=50.0 if kind == "gemma2" else None,
                sinks_H=call.options.get("s_aux"),
            )
        span, _, received = reference.sequence_statistics(
            weights, prompt_len=PROMPT, window=10, horizon=(CONFIG.signals.horizon[0], None)
        )
        layer = seen.layers[call.layer]
        torch.testing.assert_close(layer.span, span)
        kurtosis = excess_kurtosis(received[:, PROMPT:]).float()
        torch.testing.assert_close(layer.kurtosis, kurtosis, rtol=1e-3, atol=1e-4, equal_nan=True)
        assert layer.kurtosis_sentence.isnan().all()  # of a single sentence
        rows = weights[:, PROMPT:]
        torch.testing.assert_close(layer.entropy, torch.special.entr(rows).sum(-1).mean(-1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.sink_mass, rows[..., :4].sum(-1).mean(-1), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(layer.prompt_mass, rows[..., :PROMPT].sum(-1).mean(-1), rtol=1e-4, atol=1e-6)
        assert (layer.attention is None) == (call.layer not in (2, 3, 4))


def test_the_logits_are_made_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("qwen3")
    observer = Observer(model, CONFIG.signals)
    whole = observer.observe(IDS, PROMPT, [0] * (N - PROMPT))
    sizes: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda *of_call: sizes.append(of_call[2].shape[0]))
    monkeypatch.setattr("rhythm.analysis.forward.LOGIT_ELEMENTS", 700)
    parts = observer.observe(IDS, PROMPT, [0] * (N - PROMPT))
    assert sizes == [7] * 9 + [6]
    torch.testing.assert_close(parts.entropy, whole.entropy)
    torch.testing.assert_close(parts.logprob, whole.logprob)


def test_all_layers_may_be_the_pool() -> None:
    model = build("qwen3")
    config = CONFIG.model_copy(update={"signals": CONFIG.signals.model_copy(update={"layers": "all"})})
    observer = Observer(model, config.signals)
    seen = observe_response(observer, build_tokenizer(), IDS[:PROMPT], IDS[PROMPT:], config, maps=True)
    heads = sorted((span, (layer, head)) for layer, row in enumerate(seen.heads.span) for head, span in enumerate(row))
    assert seen.heads.local == tuple(sorted(head for _, head in heads[:7]))  # 24 · 0.3, rounded
    assert seen.heads.global_ == tuple(sorted(head for _, head in heads[-7:]))


def test_models_that_cannot_be_analysed() -> None:
    few = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES | {"num_hidden_layers": 2}))
    with pytest.raises(
        ValueError, match="model: qwen3 has 2 layers; the heads come from the middle third of at least 3"
    ):
        Observer(few, CONFIG.signals)
    assert Observer(few, CONFIG.signals.model_copy(update={"layers": "all"})).pool == [0, 1]
    with pytest.raises(UnsupportedAttention, match="t5: an encoder-decoder; the model must be causal"):
        Observer(
            transformers.T5ForConditionalGeneration(transformers.T5Config(d_model=16, num_layers=1)), CONFIG.signals
        )
    bert = transformers.BertLMHeadModel(
        transformers.BertConfig(hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=3)
    ).eval()
    with pytest.raises(UnsupportedAttention, match="bert, layer 0: bidirectional attention"):
        Observer(bert, CONFIG.signals).observe([5, 6, 7, 8], 2, [0, 0])


def test_empty_parts_are_refused() -> None:
    observer = Observer(build("qwen3"), CONFIG.signals)
    for prompt, response, name in (([], IDS, "prompt"), (IDS, [], "response")):
        with pytest.raises(ValueError, match=f"the {name} has no tokens"):
            observe_response(observer, build_tokenizer(), prompt, response, CONFIG, maps=False)


def test_a_short_response_is_undefined_where_it_must_be() -> None:
    observer = Observer(build("qwen3"), CONFIG.signals)
    seen = observe_response(observer, build_tokenizer(), IDS[:PROMPT], IDS[PROMPT : PROMPT + 1], CONFIG, maps=True)
    assert math.isnan(seen.tokens.fai[0])
    assert math.isfinite(seen.tokens.waad[0])
    assert seen.heads.receiver == ()
    assert math.isnan(seen.tokens.fai_receiver[0])
    assert seen.peaks.waad == seen.peaks.fai == seen.anchors == ()
    assert seen.chunks == (0,)
