"""Implements Infer by transformers' generate on left-padded prompts; log-probs are recorded while it samples.

Shape suffixes: B responses, P positions of the padded prompts, G generated positions, T positions of the
rollout, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from rhythm.engines.batches import concatenate
from rhythm.engines.head import exact_head
from rhythm.engines.interfaces import Rollout, SamplingConfig
from rhythm.engines.local.linear import use_onednn
from rhythm.engines.local.weights import load_weights


class GenerateInfer:
    """Generates responses by transformers' generate, in the model's dtype; logits are computed in fp32, like the
    trainer's.

    The model may be the trainer's own; then `update_weights` has nothing to copy. Each call seeds torch's global
    generators in a fork, so a rollout depends only on weights, prompts and seed, and other random numbers are not
    affected.
    """

    def __init__(self, model: Any, *, end_ids: Sequence[int], pad_id: int, max_length: int | None = None) -> None:
        """`model`: a causal transformers model; `end_ids`: tokens that end a response; `max_length`: longest prompt and
        response together, in tokens; None: the model's number of positions.
        """
        if not end_ids:
            raise ValueError("end_ids is empty: a response must be able to end")
        use_onednn(model)
        self._model = model
        self._end_ids = list(end_ids)
        self._pad_id = pad_id
        self._max_length = max_length or max_positions(model.config)
        self._version = 0
        self._recorder: _LogProbRecorder | None = None

    @property
    def sampled(self) -> int:
        """Tokens generated so far in each response of the current batch, for progress displays; 0 between batches."""
        recorder = self._recorder
        return 0 if recorder is None else recorder.calls

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        sampling: SamplingConfig,
        seed: int,
        done: Callable[[Rollout], None] | None = None,
    ) -> Rollout:
        """Sample `n` responses per prompt, on the model's device.

        A response has at most the tokens that its prompt leaves within max_length.

        Raises ValueError for no prompts, an empty prompt, one that leaves no token, or n < 1.
        """
        if n < 1:
            raise ValueError(f"n is {n}: must be at least 1")
        self._check_prompts(prompts)
        rows = [prompt for prompt in prompts for _ in range(n)]
        chunks = [rows[i : i + sampling.rows_at_once] for i in range(0, len(rows), sampling.rows_at_once)]
        device = self._model.device
        group_B = torch.arange(len(prompts), device=device).repeat_interleave(n)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            parts: list[Rollout] = []
            for chunk in chunks:
                at = sum(len(part.group) for part in parts)
                parts.append(replace(self._sample(chunk, sampling), group=group_B[at : at + len(chunk)]))
                if done is not None:
                    done(parts[-1])
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

    @torch.no_grad()
    def _sample(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingConfig, seeds: Sequence[int] | None = None
    ) -> Rollout:
        """One response to each prompt; `seeds`: of every row, in place of torch's global generators."""
        model = self._model
        width = max(map(len, prompts))
        ids_BP = torch.tensor([[self._pad_id] * (width - len(p)) + list(p) for p in prompts], device=model.device)
        prompt_lens_B = torch.tensor([len(p) for p in prompts], device=model.device)
        mask_BP = torch.arange(width, device=model.device) >= width - prompt_lens_B[:, None]
        room_B = (self._max_length - prompt_lens_B).clamp(max=sampling.max_new_tokens)
        recorder = self._recorder = _LogProbRecorder(sampling.temperature or 1.0)
        own_draws = seeds is not None and sampling.temperature > 0
        processors: list[LogitsProcessor] = [recorder]
        if seeds is not None and own_draws:
            processors.append(_SeededDraws(sampling, seeds, model.device))
        was_training = model.training
        model.eval()
        with _own_generation_config(model), exact_head(model):
            sequences = model.generate(
                input_ids=ids_BP,
                attention_mask=mask_BP.long(),
                generation_config=self._generation_config(
                    sampling, int(room_B.max()), draw=sampling.temperature > 0 and not own_draws
                ),
                logits_processor=LogitsProcessorList(processors),
            )
        model.train(was_training)
        self._recorder = None
        return _right_padded(
            sequences,
            recorder.logprobs(sequences[:, width:]),
            prompt_lens_B,
            room_B,
            width,
            self._end_ids,
            self._pad_id,
        )

    def _check_prompts(self, prompts: Sequence[Sequence[int]]) -> None:
        if not prompts or not all(prompts):
            raise ValueError("prompts: must contain at least one prompt, and none may be empty")
        if (longest := max(map(len, prompts))) >= self._max_length:
            raise ValueError(f"prompts: the longest has {longest} tokens, which leaves none of {self._max_length}")

    def _generation_config(self, sampling: SamplingConfig, max_new_tokens: int, *, draw: bool) -> GenerationConfig:
        """`draw`: transformers does; else it takes the likeliest token of what the processors leave."""
        drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        return GenerationConfig(
            do_sample=draw,
            max_new_tokens=max_new_tokens,
            eos_token_id=self._end_ids,
            pad_token_id=self._pad_id,
            **(drawn if draw else {}),
        )


def max_positions(config: Any) -> int:
    """Longest sequence of a transformers model, in tokens; 2^31 where its configuration says nothing."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or 2**31)


class _LogProbRecorder(LogitsProcessor):  # type: ignore[misc]  # transformers is untyped here
    """Records the log-probs of the sampled tokens, keeping the logits of only one step at a time.

    It is called with the logits before the token is sampled. So it takes each token from the next call's input_ids, and
    the last one from the finished sequences.
    """

    def __init__(self, temperature: float) -> None:
        self._temperature = temperature
        self._log_softmax_BV: Tensor | None = None
        self._picked: list[Tensor] = []
        self.calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        self._pick(input_ids[:, -1])
        self._log_softmax_BV = torch.log_softmax(scores.float() / self._temperature, dim=-1)
        return scores

    def logprobs(self, response_BG: Tensor) -> Tensor:
        """Log-probs of the sampled tokens, fp32 [B, G]."""
        if len(self._picked) < response_BG.shape[1]:  # generate may have run one step too many and dropped its token
            self._pick(response_BG[:, -1])
        return torch.stack(self._picked[: response_BG.shape[1]], dim=1)

    def _pick(self, token_B: Tensor) -> None:
        if self._log_softmax_BV is not None:
            self._picked.append(self._log_softmax_BV.gather(1, token_B[:, None])[:, 0])


class _SeededDraws(LogitsProcessor):  # type: ignore[misc]  # transformers is untyped here
    """Draws each row's token by a generator of that row alone, and leaves that one token its logit.

    The token is the first whose cumulative probability, after temperature, top-k and top-p, exceeds a uniform number:
    one number per row and position, so a row's tokens do not depend on the rows beside it.
    """

    def __init__(self, sampling: SamplingConfig, seeds: Sequence[int], device: torch.device) -> None:
        self._warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
        if sampling.top_k:
            self._warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self._warpers.append(TopPLogitsWarper(sampling.top_p))
        rows = [
            torch.rand(sampling.max_new_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            for seed in seeds
        ]
        self._uniform_GB = torch.stack(rows, dim=1).to(device)
        self._position = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        cumulative_BV = torch.softmax(self._warpers(input_ids, scores.float()), dim=-1).double().cumsum(dim=-1)
        place = min(self._position, len(self._uniform_GB) - 1)  # generate may run a step ahead of the end
        self._position += 1
        # A share of the sum that was reached, which rounding keeps from being 1.
        level_B1 = self._uniform_GB[place, :, None] * cumulative_BV[:, -1:]
        token_B1 = torch.searchsorted(cumulative_BV, level_B1, right=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, token_B1, 0.0)


@contextmanager
def _own_generation_config(model: Any) -> Iterator[None]:
    """Ignore the checkpoint's sampling defaults (top-k 20, a repetition penalty …), so that only ours apply."""
    kept, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = kept


def _right_padded(
    sequences: Tensor,
    logprobs_BG: Tensor,
    prompt_lens_B: Tensor,
    room_B: Tensor,
    width: int,
    end_ids: list[int],
    pad_id: int,
) -> Rollout:
    """Convert left-padded prompts with responses to a right-padded Rollout, no response longer than its room."""
    response_BG = sequences[:, width:]
    within_BG = torch.arange(response_BG.shape[1], device=sequences.device) < room_B[:, None]
    ends_BG = torch.isin(response_BG, torch.tensor(end_ids, device=sequences.device)) & within_BG
    finished_B = ends_BG.any(dim=1)
    generated = response_BG.shape[1]
    response_lens_B = torch.where(finished_B, ends_BG.int().argmax(dim=1) + 1, room_B.clamp(max=generated))

    lens_B = prompt_lens_B + response_lens_B
    t = torch.arange(int(lens_B.max()), device=sequences.device)
    attention_mask = t < lens_B[:, None]
    response_mask = attention_mask & (t >= prompt_lens_B[:, None])
    source_BT = (t + width - prompt_lens_B[:, None]).clamp(max=sequences.shape[1] - 1)
    input_ids = torch.where(attention_mask, sequences.gather(1, source_BT), pad_id)
    picked_BT = logprobs_BG.gather(1, (source_BT - width).clamp(min=0))
    return Rollout(
        input_ids=input_ids,
        attention_mask=attention_mask,
        response_mask=response_mask,
        prompt_lens=prompt_lens_B,
        group=torch.zeros_like(prompt_lens_B),
        logprobs=torch.where(response_mask, picked_BT, 0.0),
        finished=finished_B,
    )
