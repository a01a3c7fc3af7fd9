"""A model with constructed heads, so that every number of its analysis is known beforehand.

Every layer has four heads: `boundary` looks everywhere at the first token of a chunk and back 1 elsewhere, `steady`
looks back 7, `tied` looks back 5, and `anchored` looks at all anchors so far, equally. The last token of a chunk
says nothing about what comes next; all others predict token 0 with near certainty.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from rhythm.analysis import AnalysisConfig, analyze
from rhythm.analysis.forward import Observer
from rhythm.analysis.observation import Observation, observe_response
from rhythm.analysis.results import Analysis
from rhythm.analysis.rows import heads_frame, responses_frame, tokens_frame, trials_frame
from rhythm.credit.gamma import credit_weights
from rhythm.tiny.model import build_tokenizer

LAYERS, HEADS, D = 6, 4, 64
BOUNDARY, STEADY, ANCHORED, TIED = range(HEADS)
POOL = (2, 3, 4)
PLAIN, ONSET, ANCHOR, LAST = "a", "b", "c", "\n"
CHUNK = ONSET + ANCHOR + PLAIN * 6 + LAST  # a sentence too, as it ends in a line break
PROMPT, CHUNKS = PLAIN * 20, 8
ONSETS = tuple(range(0, CHUNKS * len(CHUNK), len(CHUNK)))
ANCHORS = tuple(onset + 1 for onset in ONSETS)
OF_ALL = (8, 6, 9)  # chunks of the responses analysed together
HORIZON = (2, 8)
ROPE_THETA = 1e8  # the slowest features hardly turn
SHARP, ANCHOR_SCORE = 250.0, 36.0  # of the attention scores
CONFIG = AnalysisConfig.model_validate(
    {
        "signals": {"horizon": HORIZON, "quantile": 0.25},
        "counterfactuals": {"positions": 3, "candidates": 2, "max_new_tokens": 4},
        "table2": {"permutations": 199, "resamples": 200},
        "sampling": {"max_new_tokens": 12},
        "attenders": 3,
    }
)


def planted_model(tokenizer: Any) -> Any:
    """Features of a token, in the residual stream: 0 always, 1 onset, 2 anchor, 3 last of a chunk, 4 none of these."""
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HEADS * D,
        intermediate_size=8,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=D,
        max_position_embeddings=256,
        attention_bias=True,
        rms_norm_eps=1e-12,  # so that a feature has exactly the size computed below
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        embedding = model.get_input_embeddings().weight
        embedding[:, 0] = 1
        feature = torch.full((len(tokenizer),), 4)
        for index, text in ((1, ONSET), (2, ANCHOR), (3, LAST)):
            feature[tokenizer.convert_tokens_to_ids(text)] = index
        embedding[torch.arange(len(tokenizer)), feature] = 1
        size = (HEADS * D / 2) ** 0.5  # what the norm makes of a feature that is 1, as every token has two
        for layer in model.model.layers:
            plant(layer.self_attn, size)
        model.get_output_embeddings().weight[0, [1, 2, 4]] = 30 / size
    return model


def plant(attention: Any, size: float) -> None:
    """Keys and queries whose scores are largest at a distance, by the rotary position encoding."""
    q_bias, q, k_bias, k = (
        attention.q_proj.bias.view(HEADS, D),
        attention.q_proj.weight.view(HEADS, D, -1),
        attention.k_proj.bias.view(HEADS, D),
        attention.k_proj.weight.view(HEADS, D, -1),
    )
    for head in (BOUNDARY, STEADY, TIED):
        k_bias[head, : D // 2] = 1
    q_bias[STEADY], q_bias[TIED], q_bias[BOUNDARY] = looking_back(7), looking_back(5), looking_back(1)
    q[BOUNDARY, :, 1] = -looking_back(1) / size
    slow = slice(D // 2 - 4, D // 2)
    q_bias[ANCHORED, slow] = (ANCHOR_SCORE * D**0.5 / 4) ** 0.5
    k[ANCHORED, slow, 2] = (ANCHOR_SCORE * D**0.5 / 4) ** 0.5 / size


def looking_back(distance: int) -> Tensor:
    """The query that fits the key (1, …, 1, 0, …, 0) best at that distance."""
    angle = distance * ROPE_THETA ** (-torch.arange(0, D, 2) / D)
    return SHARP * torch.cat([angle.cos(), -angle.sin()])


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    return planted_model(tokenizer)


@pytest.fixture(scope="module")
def seen(model: Any, tokenizer: Any) -> Observation:
    observer = Observer(model, CONFIG.signals)
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in (PROMPT, CHUNK * CHUNKS)]
    return observe_response(observer, tokenizer, *ids, CONFIG, maps=True)


@pytest.fixture(scope="module")
def analysis(model: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Analysis:
    out = tmp_path_factory.mktemp("planted") / "out"
    rows = [{"prompt": PROMPT, "response": CHUNK * chunks} for chunks in OF_ALL]
    return analyze(model, tokenizer, rows, out=out, config=CONFIG)


def test_spans_of_all_heads_of_all_layers(seen: Observation) -> None:
    # At an onset t the boundary head's distances are 0 … t, else 1.
    boundary = (sum((len(PROMPT) + onset) / 2 for onset in ONSETS) + 8 * CHUNKS) / (9 * CHUNKS)
    for layer in range(LAYERS):
        span = seen.heads.span[layer]
        assert span[BOUNDARY] == pytest.approx(boundary, rel=1e-4)
        assert span[STEADY] == pytest.approx(7, rel=1e-4)
        assert span[TIED] == pytest.approx(5, rel=1e-4)


def test_local_global_and_receiver_heads(seen: Observation) -> None:
    assert seen.heads.local == tuple((layer, BOUNDARY) for layer in POOL)
    assert seen.heads.global_ == tuple((layer, ANCHORED) for layer in POOL)
    assert seen.heads.receiver == tuple((layer, ANCHORED) for layer in POOL)
    # What looks back less than four sentences gives every sentence the same nothing.
    assert seen.heads.sentences == CHUNKS
    for of_layer in seen.heads.kurtosis_sentence:
        assert [math.isnan(value) for value in of_layer] == [False, True, False, True]


def test_waad_peaks_where_chunks_begin(seen: Observation) -> None:
    for i, waad in enumerate(seen.tokens.waad):
        seen_before = len(PROMPT) + i + 1
        # An onset's attention is even: of the nearest ten at 0 … 9, of all others at the window's 10.
        assert waad == pytest.approx(10 - 55 / seen_before if i in ONSETS else 1, rel=1e-4)
    assert seen.peaks.waad == ONSETS[1:]  # the first token of a response can be no peak
    assert seen.chunks == ONSETS


def test_entropy_peaks_where_nothing_is_known(seen: Observation, tokenizer: Any) -> None:
    assert seen.peaks.entropy == ONSETS[1:]
    for i, (entropy, logprob) in enumerate(zip(seen.tokens.entropy, seen.tokens.logprob, strict=True)):
        if i in ONSETS[1:]:
            assert entropy == pytest.approx(math.log(len(tokenizer)))
            assert logprob == pytest.approx(-math.log(len(tokenizer)))
        else:
            assert entropy == pytest.approx(0, abs=1e-6)
            assert logprob == pytest.approx(-30, rel=1e-4)


def test_anchors_and_who_attends_to_them(seen: Observation) -> None:
    assert seen.peaks.fai == seen.peaks.fai_receiver == ANCHORS
    for i, fai in enumerate(seen.tokens.fai):
        if i >= 9 * CHUNKS - HORIZON[0]:
            assert math.isnan(fai)
        else:
            assert fai == pytest.approx(1 / (ANCHORS.index(i) + 1) if i in ANCHORS else 0, abs=1e-4)
    assert tuple(anchor.token for anchor in seen.anchors) == ANCHORS
    for count, anchor in enumerate(seen.anchors, start=1):
        assert len(anchor.attenders) == 3
        for attender in anchor.attenders:
            # Until the next anchor comes, it shares the attention with those before it.
            assert anchor.token < attender.token <= anchor.token + 8
            assert attender.weight == pytest.approx(1 / count, rel=1e-4)


def test_gamma_is_that_of_training(seen: Observation) -> None:
    waad, fai = torch.tensor(seen.tokens.waad), torch.tensor(seen.tokens.fai)
    assert seen.tokens.gamma == pytest.approx(credit_weights(waad, fai, strategy="coupled").tolist(), rel=1e-6)
    # Anchors have low WAAD and come right after an onset: they share with it.
    assert {seen.tokens.gamma[i] for i in ANCHORS} == {1.25}
    assert all(seen.tokens.gamma[i] >= 1.25 for i in ONSETS)


def test_maps(seen: Observation) -> None:
    assert seen.maps is not None
    columns = len(PROMPT)
    assert seen.maps.global_.cell == seen.maps.local.cell == 1
    assert seen.maps.global_.prompt_columns == columns
    for row in range(2, 9):
        assert seen.maps.global_.weights[row][columns + ANCHORS[0]] == pytest.approx(1, abs=1e-3)
        assert seen.maps.local.weights[row][columns + row - 1] == pytest.approx(1, abs=1e-3)
    assert seen.maps.local.weights[9][0] == pytest.approx(1 / (columns + 10), rel=1e-3)  # an onset looks everywhere


def test_table_2(analysis: Analysis, tokenizer: Any) -> None:
    entropy, cooccurrence, follows = analysis.table2
    tokens, chunks = 9 * sum(OF_ALL), sum(OF_ALL)
    peaks = chunks - len(OF_ALL)  # the first onset of a response is no peak
    assert (entropy.peaks, cooccurrence.peaks, follows.peaks) == (peaks, chunks, chunks)
    assert entropy.observed == pytest.approx(math.log(len(tokenizer)))
    assert entropy.random == pytest.approx(peaks / tokens * math.log(len(tokenizer)))
    assert entropy.lift == pytest.approx(tokens / peaks - 1)
    assert cooccurrence.observed == 1
    assert cooccurrence.random == pytest.approx(chunks / tokens)
    assert follows.observed == pytest.approx(peaks / chunks)
    assert follows.random == pytest.approx(2 * peaks / tokens)
    for row in analysis.table2:
        assert row.responses == 3
        # Chunks have nine tokens: one rotation in nine falls on them again.
        assert row.p_value < 0.05
        assert row.permuted < 0.5 * row.observed
        assert row.interval.low <= row.observed <= row.interval.high


def test_heads_over_all_responses(analysis: Analysis) -> None:
    heads = analysis.heads
    assert (heads.layers, heads.heads, heads.pool_layers) == (LAYERS, HEADS, POOL)
    for layer in range(LAYERS):
        assert heads.span[layer][STEADY] == pytest.approx(7, rel=1e-4)
    for name, head in (("local", BOUNDARY), ("global", ANCHORED), ("receiver", ANCHORED)):
        head_set = heads.set(name)
        assert head_set.heads == tuple((layer, head) for layer in POOL)
        assert (head_set.stability, head_set.stability_random, head_set.responses) == (1, 0.25, 3)
        assert [head_set.chosen[layer][head] for layer in POOL] == [1, 1, 1]
        assert math.isnan(head_set.chosen[0][head])
    assert (heads.overlaps[0].share, heads.overlaps[0].random, heads.overlaps[0].pooled) == (1, 0.25, 1)


def test_everything_is_written(analysis: Analysis) -> None:
    written = {path.relative_to(analysis.directory).as_posix() for path in analysis.directory.rglob("*")}
    tables = {"tokens", "heads", "responses", "table1", "table2", "counterfactuals"}
    assert {f"{name}.csv" for name in tables} | {"report.html", "results.json", "figures/heads.pdf"} <= written
    assert not any(name.endswith(".part") for name in written)
    tokens = tokens_frame(analysis)
    assert len(tokens) == 9 * sum(OF_ALL)
    onsets = tokens[tokens["waad_peak"]]
    assert (onsets["text"] == ONSET).all()
    assert len(trials_frame(analysis)) == 3 * 3 * 3 * 2  # responses, groups, positions, candidates
    assert analysis.table1 is not None
    assert (analysis.table1.top_trials, analysis.table1.bottom_trials) <= (18, 18)
    heads = heads_frame(analysis)
    assert heads["global"].sum() == 3
    assert len(heads) == LAYERS * HEADS
    responses = responses_frame(analysis).set_index("response")
    of_response = tokens.groupby("response")
    assert responses["tokens"].equals(of_response.size().rename("tokens").loc[responses.index])
    assert responses["waad_peaks"].tolist() == of_response["waad_peak"].sum().loc[responses.index].tolist()
    assert responses["fai_mean"].tolist() == pytest.approx(of_response["fai"].mean().loc[responses.index].tolist())
