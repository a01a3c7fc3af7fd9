"""Runs one forward pass over a prompt and response, and reads all layers' heads and the tokens' distributions.

Shape suffixes: N positions of prompt and response, M of the response, H query heads, G key heads, D head size, L
layers, S sentences, V vocabulary, C tokens at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rhythm.analysis.attention import ObservedAttention
from rhythm.analysis.receivers import excess_kurtosis, received_between_sentences
from rhythm.engines.local.logprobs import check_output_head
from rhythm.tap.attention_form import AttentionCall, AttentionForm, MaskReader, UnsupportedAttention, attention_form
from rhythm.tap.chunks import chunked_statistics
from rhythm.tap.interception import (
    ATTENTION_LAYERS,
    Output,
    format_layers,
    intercept_attention,
    layer_kinds,
    text_config,
)
from rhythm.tap.output_check import check_output
from rhythm.tap.padding import PaddedBatch
from rhythm.tap.signals_config import SignalsConfig

LOGIT_ELEMENTS = 2**24  # fp32 logits held at a time: 64 MB
LEAST_LAYERS = 3
SINK_KEYS = 4  # first tokens of the sequence, those of sink_mass


@dataclass(frozen=True)
class LayerHeads:
    """The heads of one layer on one response, fp32 on the CPU.

    Attributes:
        span, kurtosis, kurtosis_sentence, entropy, sink_mass, prompt_mass: [H].
        waad, fai: [H, M]; None outside the pool.
        attention: computes attention weights on demand; None outside the pool.
    """

    span: Tensor
    kurtosis: Tensor
    kurtosis_sentence: Tensor
    entropy: Tensor
    sink_mass: Tensor
    prompt_mass: Tensor
    waad: Tensor | None
    fai: Tensor | None
    attention: ObservedAttention | None


@dataclass(frozen=True)
class Pass:
    """The results of one forward pass. layers: by index; entropy, logprob: of the response's tokens, nats, fp32 [M]."""

    layers: dict[int, LayerHeads]
    entropy: Tensor
    logprob: Tensor


class Observer:
    """Reads all layers' attention statistics in forward passes of a model.

    Args:
        model: a causal transformers model that `AttentionTap` supports.
        signals: window, horizon, backend, and the layers whose heads form the pool.
        sentence_gap: smallest distance, in sentences, at which attention between sentences counts.

    Raises:
        ValueError: too few layers.
        UnsupportedAttention (a ValueError): a model, or a layer of the pool, whose attention can't be read.
    """

    def __init__(self, model: Any, signals: SignalsConfig, *, sentence_gap: int = 4) -> None:
        self.config = text_config(model)
        count = self.config.num_hidden_layers
        if count < LEAST_LAYERS and (signals.layers is None or isinstance(signals.layers, int)):
            raise ValueError(
                f"model: {self.config.model_type} has {count} layers; the heads come from the middle third of at least "
                f"{LEAST_LAYERS} (or from all, with signals.layers=all)"
            )
        kinds = layer_kinds(self.config)
        readable = [layer for layer in range(count) if kinds[layer] in ATTENTION_LAYERS]
        self.pool = signals.layers_of(count, readable)
        if unread := [layer for layer in self.pool if layer not in readable]:
            raise UnsupportedAttention(
                f"{self.config.model_type}: can't read the attention of {format_layers(unread, self.config)}"
            )
        self._model, self._signals, self._gap = model, signals, sentence_gap
        self._head_is_plain = _has_plain_head(model)

    @torch.no_grad()
    def observe(self, input_ids_N: Sequence[int], prompt_len: int, sentence_M: Sequence[int]) -> Pass:
        """Run one forward pass. It needs O(N · heads) memory in addition to the model's, and keeps the pool's queries
        and keys.

        Args:
            input_ids_N: prompt and response, each with at least one token.
            sentence_M: the sentence of each response token.
        """
        device = self._model.device
        ids_1N = torch.tensor([list(input_ids_N)], device=device)
        masks = MaskReader(PaddedBatch.from_mask(torch.ones_like(ids_1N), [prompt_len]))
        sentences = torch.tensor(list(sentence_M), device=device)
        layers: dict[int, LayerHeads] = {}

        def receive(call: AttentionCall) -> Output:
            if call.layer is None or call.layer in layers:
                raise UnsupportedAttention(f"{call.where}: attention that no layer, or one twice, asks for")
            form = attention_form(call, masks)
            result = call.run()
            with torch.autocast(device.type, enabled=False):
                check_output(call, form, masks.on(call.query.device), result[0])
                layers[call.layer] = self._layer(call, form, masks.on(call.query.device), sentences)
            return result

        with intercept_attention(self.config, receive):
            logits_of = self._logits(ids_1N)
        if missing := [layer for layer in self.pool if layer not in layers]:
            raise UnsupportedAttention(
                f"{self.config.model_type}: {format_layers(missing, self.config)} never reached transformers' "
                "attention interface"
            )
        entropy_M, logprob_M = _distributions(logits_of, ids_1N[0], prompt_len, self.config.vocab_size)
        return Pass(layers, entropy_M.cpu(), logprob_M.cpu())

    def _layer(self, call: AttentionCall, form: AttentionForm, batch: PaddedBatch, sentence_M: Tensor) -> LayerHeads:
        query_NHD, key_NGD = call.query[0].transpose(0, 1), call.key[0].transpose(0, 1)
        (lo, _), (prompt_len,) = self._signals.horizon, batch.host.prompt_lens
        of_form = form.arguments(query_NHD.shape[0])
        statistics = partial(
            chunked_statistics,
            query_NHD,
            key_NGD,
            batch,
            form.chunk,
            window=self._signals.window,
            backend=self._signals.backend,
            **of_form,
        )
        also = ("entropy", "first_mass", "prompt_mass")
        got = statistics(horizon=self._signals.horizon, also=also, first=SINK_KEYS)
        assert got.span is not None
        assert got.entropy is not None
        assert got.first_mass is not None
        assert got.prompt_mass is not None
        span_H, waad_HN, fai_HN, lse_HN = got.span[0], got.waad, got.fai, got.lse
        received_HN = statistics(horizon=(lo, None), lse=lse_HN, span=False).fai
        attention = ObservedAttention(
            query=query_NHD,
            key=key_NGD,
            lse=lse_HN,
            **of_form,
            chunk=form.chunk,
            prompt_len=prompt_len,
        )
        between_HS = received_between_sentences(attention, sentence_M, self._gap)
        in_pool = call.layer in self.pool
        return LayerHeads(
            span=span_H.float().cpu(),
            kurtosis=excess_kurtosis(received_HN[:, prompt_len:]).float().cpu(),
            kurtosis_sentence=excess_kurtosis(between_HS).float().cpu(),
            entropy=got.entropy[:, prompt_len:].mean(dim=1).float().cpu(),
            sink_mass=got.first_mass[:, prompt_len:].mean(dim=1).float().cpu(),
            prompt_mass=got.prompt_mass[:, prompt_len:].mean(dim=1).float().cpu(),
            waad=waad_HN[:, prompt_len:].float().cpu() if in_pool else None,
            fai=fai_HN[:, prompt_len:].float().cpu() if in_pool else None,
            attention=attention if in_pool else None,
        )

    def _logits(self, ids_1N: Tensor) -> Callable[[slice], Tensor]:
        """Run the model; returns a function from positions to their logits [C, V]."""
        if self._head_is_plain:
            hidden_ND = self._model.base_model(input_ids=ids_1N, use_cache=False).last_hidden_state[0]
            head = self._model.get_output_embeddings()
            return lambda positions: head(hidden_ND[positions])
        logits_NV: Tensor = self._model(input_ids=ids_1N, use_cache=False).logits[0]
        return lambda positions: logits_NV[positions]


def _distributions(
    logits_of: Callable[[slice], Tensor], ids_N: Tensor, prompt_len: int, vocabulary: int
) -> tuple[Tensor, Tensor]:
    """(entropy, logprob) of the response's tokens, fp32 [M], at temperature 1."""
    entropies, logprobs = [], []
    size = max(1, LOGIT_ELEMENTS // vocabulary)
    for start in range(prompt_len, len(ids_N), size):
        stop = min(len(ids_N), start + size)
        # The token at t was sampled from the model's output at t − 1.
        log_softmax_CV = logits_of(slice(start - 1, stop - 1)).float().log_softmax(dim=-1)
        entropies.append(torch.special.entr(log_softmax_CV.exp()).sum(dim=-1))
        logprobs.append(log_softmax_CV.gather(1, ids_N[start:stop, None])[:, 0])
    return torch.cat(entropies), torch.cat(logprobs)


def _has_plain_head(model: Any) -> bool:
    """Whether the logits are the product of last hidden state and output embedding; if not, all are computed at
    once.
    """
    try:
        check_output_head(model)
    except ValueError:
        return False
    return True
