"""Implements Infer by the model's own forward passes with a cache; log-probs are recorded while it samples.

Shape suffixes: B responses, G generated positions, T positions of the rollout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rhythm.engines.batches import concatenate
from rhythm.engines.eval_mode import evaluating
from rhythm.engines.head import exact_head, own_head
from rhythm.engines.interfaces import Rollout, SamplingConfig
from rhythm.engines.local.decoding import Decoded, decode
from rhythm.engines.local.draws import draw_for
from rhythm.engines.local.linear import use_onednn
from rhythm.engines.local.norms import use_fast_norms
from rhythm.engines.local.weights import load_weights
from rhythm.engines.stopping import StopStrings


class GenerateInfer:
    """Generates responses in the model's dtype; logits are computed in fp32, like the trainer's. Sampling defaults of
    the checkpoint (top-k 20, a repetition penalty …) don't apply.

    The model may be the trainer's own; then `update_weights` has nothing to copy. Each call seeds torch's global
    generators in a fork, so a rollout depends only on weights, prompts and seed, and other random numbers are not
    affected.
    """

    def __init__(
        self,
        model: Any,
        *,
        end_ids: Sequence[int],
        pad_id: int,
        max_length: int | None = None,
        tokenizer: Any = None,
        by_prompt: bool = False,
    ) -> None:
        """`model`: a causal transformers model; `end_ids`: tokens that end a response; `max_length`: longest prompt and
        response together, in tokens; None: the model's number of positions. `tokenizer`: stops generation at
        `sampling.stop`; without it responses go on behind these strings. `by_prompt`: `generate` hands over the
        responses to each prompt once the last of them has ended, not those of a whole part (`sampling.rows_at_once`).
        """
        if not end_ids:
            raise ValueError("end_ids is empty: a response must be able to end")
        use_onednn(model)
        use_fast_norms(model)
        self._model = model
        self._end_ids = list(end_ids)
        self._pad_id = pad_id
        self._max_length = max_length or max_positions(model.config)
        self._tokenizer = tokenizer
        self._by_prompt = by_prompt
        self._version = 0
        self._sampled = 0

    @property
    def sampled(self) -> int:
        """Tokens generated so far in each response of the current batch, for progress displays; 0 between batches."""
        return self._sampled

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        sampling: SamplingConfig,
        seed: int,
        done: Callable[[Rollout], None] | None = None,
    ) -> Rollout:
        """Sample `n` responses per prompt, on the model's device.

        A response has at most the tokens that its prompt leaves within max_length. `done` may use the model and
        torch's global generators: the other responses stay what they are.

        Raises ValueError for no prompts, an empty prompt, one that leaves no token, or n < 1.
        """
        if n < 1:
            raise ValueError(f"n is {n}: must be at least 1")
        self._check_prompts(prompts)
        rows = [prompt for prompt in prompts for _ in range(n)]
        chunks = [rows[i : i + sampling.rows_at_once] for i in range(0, len(rows), sampling.rows_at_once)]
        device = self._model.device
        devices = [device] if device.type == "cuda" else []
        group_B = torch.arange(len(prompts), device=device).repeat_interleave(n)

        def hand_over(part: Rollout) -> None:
            with torch.random.fork_rng(devices), own_head(self._model):
                if done is not None:
                    done(part)

        prompted = _ByPrompt(n, hand_over, self._pad_id) if self._by_prompt and done is not None else None
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            parts: list[Rollout] = []
            for chunk in chunks:
                at = sum(len(part.group) for part in parts)
                ended = None if prompted is None else partial(prompted.ended, at)
                parts.append(replace(self._sample(chunk, sampling, ended=ended), group=group_B[at : at + len(chunk)]))
                if prompted is None:
                    hand_over(parts[-1])
        return concatenate(parts, self._pad_id)

    def generate_each(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingConfig, seeds: Sequence[int]
    ) -> Rollout:
        """See `rhythm.engines.interfaces.SeededInfer`."""
        self._check_prompts(prompts)
        at_once = sampling.rows_at_once
        parts = [
            self._sample(prompts[i : i + at_once], sampling, seeds[i : i + at_once])
            for i in range(0, len(prompts), at_once)
        ]
        return replace(concatenate(parts, self._pad_id), group=torch.arange(len(prompts), device=self._model.device))

    def update_weights(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Copy weights that the model doesn't share already. Raises ValueError if `version` is lower than before."""
        self._version = load_weights(self._model, weights, version, self._version)

    def _sample(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        seeds: Sequence[int] | None = None,
        ended: Callable[[int, Rollout], None] | None = None,
    ) -> Rollout:
        """One response to each prompt; `seeds`: of every row, in place of torch's global generators. `ended`: called
        with each row once it has ended, its number and a rollout of it alone.
        """
        model = self._model
        prompt_lens_B = torch.tensor([len(p) for p in prompts], device=model.device)

        def hand_over(row: int, decoded: Decoded) -> None:
            if ended is not None:
                ended(row, _rollout([prompts[row]], prompt_lens_B[row, None], decoded, self._pad_id))

        stops = StopStrings(self._tokenizer, sampling.stop) if sampling.stop and self._tokenizer is not None else None
        with evaluating(model), exact_head(model):
            decoded = decode(
                model,
                prompts,
                (self._max_length - prompt_lens_B).clamp(max=sampling.max_new_tokens),
                draw_for(sampling, len(prompts), model.device, seeds),
                temperature=sampling.temperature or 1.0,
                end_ids=self._end_ids,
                pad_id=self._pad_id,
                stops=stops,
                progress=self._progress,
                ended=None if ended is None else hand_over,
            )
        self._progress(0)
        return _rollout(prompts, prompt_lens_B, decoded, self._pad_id)

    def _progress(self, sampled: int) -> None:
        self._sampled = sampled

    def _check_prompts(self, prompts: Sequence[Sequence[int]]) -> None:
        if not prompts or not all(prompts):
            raise ValueError("prompts: must contain at least one prompt, and none may be empty")
        if (longest := max(map(len, prompts))) >= self._max_length:
            raise ValueError(f"prompts: the longest has {longest} tokens, which leaves none of {self._max_length}")


class _ByPrompt:
    """Hands over the responses to each prompt, in their order, once the last of them has ended."""

    def __init__(self, n: int, done: Callable[[Rollout], None], pad_id: int) -> None:
        """`n`: responses per prompt; `done`: called with them."""
        self._n, self._done, self._pad_id = n, done, pad_id
        self._waiting: dict[int, dict[int, Rollout]] = {}  # prompt → its responses so far

    def ended(self, start: int, row: int, alone: Rollout) -> None:
        """`row`: of the part whose first row is `start`; `alone`: a rollout of this row."""
        index, sample = divmod(start + row, self._n)
        of_prompt = self._waiting.setdefault(index, {})
        of_prompt[sample] = replace(alone, group=torch.full_like(alone.group, index))
        if len(of_prompt) == self._n:
            del self._waiting[index]
            self._done(concatenate([of_prompt[i] for i in range(self._n)], self._pad_id))


def max_positions(config: Any) -> int:
    """Longest sequence of a transformers model, in tokens; 2^31 where its configuration says nothing."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or 2**31)


def _rollout(prompts: Sequence[Sequence[int]], prompt_lens_B: Tensor, decoded: Decoded, pad_id: int) -> Rollout:
    """Prompts and responses as right-padded rows."""
    device = prompt_lens_B.device
    response_lens_B = decoded.lens
    lens_B = prompt_lens_B + response_lens_B
    t = torch.arange(int(lens_B.max()), device=device)
    attention_mask = t < lens_B[:, None]
    response_mask = attention_mask & (t >= prompt_lens_B[:, None])
    input_ids = torch.tensor([[*p, *[pad_id] * (len(t) - len(p))] for p in prompts], device=device)
    logprobs = torch.zeros(input_ids.shape, device=device)
    generated_BG = torch.arange(decoded.tokens.shape[1], device=device) < response_lens_B[:, None]
    # Row by row both masks have as many positions, in the same order.
    input_ids[response_mask] = decoded.tokens[generated_BG]
    logprobs[response_mask] = decoded.logprobs[generated_BG]
    return Rollout(
        input_ids=input_ids,
        attention_mask=attention_mask,
        response_mask=response_mask,
        prompt_lens=prompt_lens_B,
        group=torch.zeros_like(prompt_lens_B),
        logprobs=logprobs,
        finished=decoded.finished,
    )
