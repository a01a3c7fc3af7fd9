"""SamplingConfig in vLLM's terms, and whether a response of vLLM's ended by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rhythm.engines.interfaces import SamplingConfig


def drawing(sampling: SamplingConfig, end_ids: Sequence[int]) -> dict[str, Any]:
    """vLLM's sampling parameters, without the temperature, by which the logits are divided already."""
    greedy = sampling.temperature == 0
    return {
        "temperature": 0.0 if greedy else 1.0,
        "top_p": 1.0 if greedy else sampling.top_p,
        "top_k": 0 if greedy else sampling.top_k,
        "stop_token_ids": list(end_ids),
        "stop": list(sampling.stop),
    }


def request_params(options: Mapping[str, Any]) -> Any:
    """vLLM's SamplingParams of one request: `options`, the drawn tokens' log-probs, and one output at the end."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        **options,
        logprobs=0,
        flat_logprobs=True,
        detokenize=bool(options.get("stop")),
        include_stop_str_in_output=True,
        ignore_eos=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def ended(response: Any, end_ids: Sequence[int]) -> bool:
    """Whether vLLM's response ended by itself: by an end token or a stop string."""
    return response.token_ids[-1] in end_ids or isinstance(response.stop_reason, str)
