"""rhythm.integrations.prime_rl on a stand-in for prime-rl's training script, model and loss, with the contract that
docs/trainers.md has: prime-rl needs CUDA.
"""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from models import tiny_model
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

import rhythm
from rhythm.credit.config import CreditConfig
from rhythm.credit.gamma import batch_credit_weights
from rhythm.integrations.adapter import credit_of_process
from rhythm.tap.signals_config import SignalsConfig

# The third sequence has no response, the fifth is not for the loss of RL; PADDING goes to the last one.
LENS, PROMPTS, PADDING = [19, 11, 9, 24, 15, 20], [6, 3, 9, 8, 5, 7], 4
REWARDS = [1.0, -0.5, 0.0, 2.0, 0.7, 1.5]
SIGNALS = {"layers": 2, "window": 4, "horizon": [2, 8], "backend": "reference"}


class FlashAttention(nn.Module):
    """prime-rl's, in the weights of a Qwen3's attention."""

    is_causal = True

    def __init__(self, own: Any) -> None:
        super().__init__()
        self.own = own

    def _compute_attention(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        parts = [
            nn.functional.scaled_dot_product_attention(
                *(x[start:end].transpose(0, 1) for x in (q, k, v)), is_causal=True, enable_gqa=True
            )
            for start, end in pairwise(cu_seqlens.tolist())
        ]
        return torch.cat(parts, dim=1).transpose(0, 1)

    def forward(
        self, hidden_states: Tensor, position_embeddings: Any, cu_seqlens: Tensor, max_seqlen: int, **_: Any
    ) -> tuple[Tensor, None]:
        own, shape = self.own, (*hidden_states.shape[:-1], -1, self.own.head_dim)
        query = own.q_norm(own.q_proj(hidden_states).view(shape)).transpose(1, 2)
        key = own.k_norm(own.k_proj(hidden_states).view(shape)).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        value = own.v_proj(hidden_states).view(shape)
        output = self._compute_attention(
            query[0].transpose(0, 1), key[0].transpose(0, 1), value[0], cu_seqlens, max_seqlen
        )
        return own.o_proj(output.reshape(1, len(output), -1)), None


def forward(
    model: Any,
    input_ids: Tensor,
    position_ids: Tensor,
    *,
    seq_lens: Tensor,
    labels: Tensor | None = None,
    seq_lens_are_pre_shard: bool = False,
) -> dict[str, Tensor]:
    cu_seqlens = nn.functional.pad(seq_lens.cumsum(0), (1, 0))
    output = model(
        input_ids=input_ids, position_ids=position_ids, cu_seqlens=cu_seqlens, max_seqlen=int(seq_lens.max())
    )
    return {"logits": output.logits}


def train(script: Any, model: Any, micro: dict[str, Any], **options: Any) -> Tensor:
    """prime-rl's step on one micro-batch. Returns the loss."""
    out = script.forward(
        model, micro["input_ids"], micro["position_ids"], labels=None, seq_lens=micro["seq_lens"], **options
    )
    logprobs = out["logits"].log_softmax(-1)[:, :-1].gather(-1, micro["input_ids"][:, 1:, None])[..., 0]
    lens = micro["sequence_lengths"]
    loss: Tensor = script.compute_loss(
        trainer_logprobs=nn.functional.pad(logprobs, (1, 0)).squeeze().split(lens),
        advantages=micro["advantages"].squeeze().split(lens),
        loss_mask=micro["loss_mask"].squeeze().split(lens),
        rl_weights=None if micro["rl_weights"] is None else micro["rl_weights"].squeeze().split(lens),
        rl_loss_fn=script.rl_loss_fn,
    )
    loss.backward()
    return loss.detach()


def compute_loss(
    trainer_logprobs: list[Tensor],
    advantages: list[Tensor],
    loss_mask: list[Tensor],
    rl_weights: list[Tensor] | None,
    rl_loss_fn: Callable[..., Tensor],
) -> Tensor:
    weights = rl_weights or [torch.ones(len(mask)) for mask in loss_mask]
    rows = zip(trainer_logprobs, advantages, loss_mask, weights, strict=True)
    return sum((rl_loss_fn(p, a, m & (w != 0)) for p, a, m, w in rows), torch.zeros(()))


@pytest.fixture
def script() -> Any:
    """The names of prime_rl.trainer.rl.train that count; its loss keeps the advantages it got."""
    made = ModuleType("prime_rl.trainer.rl.train")
    made.seen = []  # type: ignore[attr-defined]

    def rl_loss_fn(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        made.seen.append(advantages)  # type: ignore[attr-defined]
        return -(advantages * logprobs)[mask].sum()

    made.forward, made.compute_loss, made.rl_loss_fn = forward, compute_loss, rl_loss_fn  # type: ignore[attr-defined]
    made.setup_rl_loss_fn = None  # type: ignore[attr-defined]
    return made


@pytest.fixture
def adapter(script: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setitem(sys.modules, script.__name__, script)
    monkeypatch.setenv("RHYTHM_CREDIT", f"{{credit: {{strategy: coupled}}, signals: {SIGNALS}}}")
    monkeypatch.delitem(sys.modules, "rhythm.integrations.prime_rl", raising=False)
    credit_of_process.cache_clear()
    yield importlib.import_module("rhythm.integrations.prime_rl")
    credit_of_process.cache_clear()
    del sys.modules["rhythm.integrations.prime_rl"]


@pytest.fixture(scope="module")
def plain() -> Any:
    return tiny_model()


def in_prime(plain: Any, recomputes: bool = False) -> Any:
    model = copy.deepcopy(plain)
    for index, layer in enumerate(model.model.layers):
        layer.self_attn = FlashAttention(layer.self_attn)
        if recomputes:
            model.model.layers[index] = checkpoint_wrapper(layer, preserve_rng_state=False)
    return model


def micro_batch() -> dict[str, Any]:
    padded = [*LENS[:-1], LENS[-1] + PADDING]
    ids = torch.randint(4, 100, (1, sum(padded)), generator=torch.Generator().manual_seed(6))
    ids[0, sum(LENS) :] = 1
    positions = torch.cat([*(torch.arange(n) for n in LENS), torch.arange(PADDING)])
    mask, advantages, weights = (torch.zeros(1, sum(padded)) for _ in range(3))
    for start, n, prompt, reward in zip(accumulate(padded, initial=0), LENS, PROMPTS, REWARDS, strict=False):
        mask[0, start + prompt : start + n] = 1
        advantages[0, start : start + n] = reward
        weights[0, start : start + n] = reward != REWARDS[4]
    return {
        "input_ids": ids,
        "position_ids": positions[None],
        "advantages": advantages,
        "loss_mask": mask.bool(),
        "rl_weights": weights,
        "sequence_lengths": padded,
        "seq_lens": torch.tensor(padded),
    }


@pytest.mark.parametrize("recomputes", [False, True])
def test_advantages_are_those_of_observe(adapter: Any, script: Any, plain: Any, recomputes: bool) -> None:
    micro, T = micro_batch(), max(LENS)
    rows = [row[:n] for row, n in zip(micro["input_ids"][0].split(micro["sequence_lengths"]), LENS, strict=True)]
    ids = torch.stack([nn.functional.pad(row, (0, T - len(row))) for row in rows])
    real = torch.arange(T) < torch.tensor(LENS)[:, None]
    signals = rhythm.observe(
        plain, ids, attention_mask=real.long(), prompt_lens=PROMPTS, signals=SignalsConfig(**SIGNALS)
    )
    response = real & (torch.arange(T) >= torch.tensor(PROMPTS)[:, None])
    gamma = batch_credit_weights(signals, response, CreditConfig(strategy="coupled"))
    assert gamma[response].unique().numel() > 2
    gamma[4] = 1.0

    model = in_prime(plain, recomputes)
    for step in (1, 2):
        script.seen.clear()
        model.zero_grad()
        train(script, model, micro)
        assert not adapter._Pass.layers  # nothing is kept after a step, nor read when it is computed again
        for row, (got, n) in enumerate(zip(script.seen, LENS, strict=True)):
            advantage = torch.full((n,), REWARDS[row])
            expected = torch.where(advantage >= 0, advantage * gamma[row, :n], advantage)
            torch.testing.assert_close(got[:n], expected, rtol=1e-6, atol=0, msg=lambda m, s=step: f"step {s}: {m}")
    # The gradient is that of the loss with these advantages, computed without the adapter.
    other = in_prime(plain)
    before = SimpleNamespace(forward=forward, compute_loss=compute_loss, rl_loss_fn=script.rl_loss_fn)
    train(before, other, micro | {"advantages": torch.cat(script.seen)[None]})
    for mine, wanted in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, wanted.grad, rtol=1e-5, atol=1e-6)


def test_refused_by_name(adapter: Any, script: Any, plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    micro = micro_batch()
    with pytest.raises(ValueError, match=r"seq_lens_are_pre_shard is True; it must be False \(model.cp = 1\)"):
        train(script, in_prime(plain), micro, seq_lens_are_pre_shard=True)
    with pytest.raises(rhythm.UnsupportedAttention, match=r"layers \[1, 2\] is not prime-rl's FlashAttention"):
        train(script, plain, micro)
    micro["loss_mask"][0, PROMPTS[0] + 3] = False  # what a tool wrote
    with pytest.raises(ValueError, match="the loss mask of response 0 leaves out 1 of its 13 tokens"):
        train(script, in_prime(plain), micro)
    with pytest.raises(ValueError, match="type is 'ref_kl'; it must be default or ipo"):
        adapter.loss(None, type="ref_kl")
    monkeypatch.setenv("RHYTHM_CREDIT", "credit: {strategy: entropy}")
    credit_of_process.cache_clear()
    with pytest.raises(ValueError, match="strategy of RHYTHM_CREDIT is 'entropy'"):
        train(script, in_prime(plain), micro)


def test_the_loss_is_one_of_prime_rls(adapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    configs, losses = ModuleType("prime_rl.configs.trainer"), ModuleType("prime_rl.trainer.rl.loss")
    for name in ("DefaultLossConfig", "IPOLossConfig"):
        setattr(configs, name, lambda _name=name, **options: (_name, options))
    losses.setup_rl_loss_fn = lambda config: lambda inputs: (config, inputs)  # type: ignore[attr-defined]
    for module in (configs, losses):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    assert adapter.loss("inputs") == (("DefaultLossConfig", {}), "inputs")
    assert adapter.loss("inputs", type="ipo", ipo_threshold=0.2) == (
        ("IPOLossConfig", {"ipo_threshold": 0.2}),
        "inputs",
    )
    adapter._Pass.installed = False
    with pytest.raises(ValueError, match=r"forward and compute_loss of prime_rl.trainer.rl.train were not found"):
        adapter.loss("inputs")
