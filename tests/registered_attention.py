"""Small models of several kinds with attn_implementation="rhythm", their batch, and what its statistics have to be."""

from __future__ import annotations

from typing import Any

import models
import torch
import transformers
from torch import Tensor

from rhythm.integrations.transformers import LayerStatistics
from rhythm.ops import reference
from rhythm.ops.answers import ALSO

SIZES = models.SIZES | models.GQA | {"num_hidden_layers": 4}
WINDOW, HORIZON = 4, (2, 9)
OPTIONS: dict[str, Any] = {"window": WINDOW, "horizon": HORIZON}
T, PROMPT_LENS = 40, [6, 3]


def config(kind: str, **changes: Any) -> Any:
    if kind == "llama":
        return transformers.LlamaConfig(**SIZES | {"num_key_value_heads": 1, "initializer_range": 0.2} | changes)
    if kind == "gemma3":
        layers = ["sliding_attention", "full_attention"] * 2
        return transformers.Gemma3TextConfig(**SIZES, layer_types=layers, sliding_window=8, **changes)
    if kind == "deepseek":  # multi-head latent attention: values of another head size, which the fused op does not take
        latent = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8}
        rest = {
            "v_head_dim": 12,
            "head_dim": 8,
            "first_k_dense_replace": 4,
            "num_key_value_heads": 4,
            "initializer_range": 0.2,
        }
        return transformers.DeepseekV3Config(**SIZES | latent | rest | changes)
    if kind == "gemma2":
        return transformers.Gemma2Config(**SIZES, **{"attn_logit_softcapping": 1.5, "sliding_window": 8} | changes)
    if kind == "gpt_oss":
        return transformers.GptOssConfig(**SIZES, sliding_window=8, num_local_experts=2, num_experts_per_tok=1)
    if kind == "llama4":  # chunks in three layers of four
        rest = {"num_local_experts": 2, "intermediate_size_mlp": 32, "pad_token_id": None, "attention_chunk_size": 7}
        return transformers.Llama4TextConfig(**SIZES | rest | changes)
    if kind == "mistral":
        return transformers.MistralConfig(**SIZES, sliding_window=9, **changes)
    return transformers.Qwen3Config(**SIZES | changes)


def made(kind: str = "qwen3", implementation: str = "rhythm", **changes: Any) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(
        config(kind, **changes), attn_implementation=implementation
    ).eval()


def batch(side: str = "right") -> tuple[Tensor, dict[str, Any]]:
    """Two rows of 40 and 31 tokens, and which arguments of the model go with them."""
    input_ids = torch.randint(0, 61, (2, T), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(input_ids)
    if side != "none":
        mask[1, slice(31, None) if side == "right" else slice(0, 9)] = 0
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    return input_ids, {"attention_mask": mask, "position_ids": positions, "use_cache": False}


def assert_statistics_of_the_maps(
    statistics: LayerStatistics, eager: Any, input_ids: Tensor, mask: Tensor, prompt_lens: list[int]
) -> None:
    """Against the eager maps, and for lse the scores, of each row alone."""
    for i, prompt_len in enumerate(prompt_lens):
        real = mask[i].bool()
        with torch.no_grad():
            maps = eager(input_ids[i : i + 1, real], output_attentions=True, use_cache=False).attentions
        for layer, got in statistics.items():
            span, waad, fai = reference.sequence_statistics(
                maps[layer][0], prompt_len=prompt_len, window=WINDOW, horizon=HORIZON
            )
            assert got.span is not None
            torch.testing.assert_close(got.span[i], span, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(got.waad[i][:, real], waad, rtol=1e-5, atol=1e-5, equal_nan=True)
            torch.testing.assert_close(got.fai[i][:, real], fai, rtol=1e-5, atol=1e-5, equal_nan=True)
            answers = {name: getattr(got, name) for name in ALSO}
            if got.entropy is not None:
                a = maps[layer][0]
                wanted = {
                    "top1": a.amax(-1),
                    "entropy": torch.special.entr(a).sum(-1),
                    "first_mass": a[..., :4].sum(-1),
                    "prompt_mass": a[..., :prompt_len].sum(-1),
                    "max_logit": a.amax(-1).log() + got.lse[i][:, real],
                }
                for name, of_row in wanted.items():
                    of_row[:, :prompt_len] = torch.nan
                    torch.testing.assert_close(
                        answers[name][i][:, real], of_row, rtol=1e-4, atol=1e-5, equal_nan=True, msg=name
                    )
            for x in (got.waad, got.fai, got.lse, *(x for x in answers.values() if x is not None)):
                assert x.dtype == torch.float32
                assert not x.requires_grad
                assert x[i][:, ~real].isnan().all()
            assert got.lse[i][:, real][:, :prompt_len].isnan().all()
            assert got.lse[i][:, real][:, prompt_len:].isfinite().all()
