"""prime-rl: γ from its training forward passes, and advantages × γ, before each loss.

    [trainer.loss]
    type = "custom"
    import_path = "rhythm.integrations.prime_rl.loss"

Importing this replaces two names of prime-rl's training script, its forward pass, which keeps what the sampled layers'
attention gets, and its loss, before which WAAD, FAI and γ are made of that. What prime-rl hands over is written down in
docs/trainers.md. Options: the environment variable RHYTHM_CREDIT.

Shape suffixes: N tokens of a micro-batch, packed into one row; H query heads, G key heads, D head size.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rhythm.integrations.adapter import credit_of_process, gammas, in_rows, require, shaped
from rhythm.seeds import generator
from rhythm.tap.attention_form import AttentionCall, UnsupportedAttention
from rhythm.tap.attention_tap import AttentionTap
from rhythm.tap.interception import checked_layers, text_config

ATTENTION = re.compile(r"(?:^|\.)layers\.(\d+)\.(?:_checkpoint_wrapped_module\.)?self_attn$")
TRAINER = "prime_rl.trainer.rl.train"


class _Pass:
    """The forward pass whose loss is to come; one per process, as the model is."""

    model: nn.Module | None = None
    opened = False  # activations are computed again in the backward pass, which is not read
    layers: dict[int, tuple[nn.Module, tuple[Tensor, ...]]]  # queries [N, H, D], keys and values [N, G, D], outputs
    count = 0
    installed = False


def reading(forward: Callable[..., Any]) -> Callable[..., Any]:
    """prime-rl's forward pass, of which the attention of the sampled layers is kept until the loss."""

    def forward_that_is_read(model: nn.Module, *args: Any, **options: Any) -> Any:
        credit = credit_of_process()
        sharded = options.get("seq_lens_are_pre_shard", False)
        require(not sharded, "seq_lens_are_pre_shard", sharded, "False (model.cp = 1)", "ranks see parts of sequences")
        require(
            "entropy" not in credit.config.reads, "strategy of RHYTHM_CREDIT", credit.config.strategy, "another",
            "prime-rl's loss is not given the entropies"
        )  # fmt: skip
        if "attention" not in credit.config.reads:
            return forward(model, *args, **options)
        if _Pass.model is not model:
            _attach(model, checked_layers(credit.signals, text_config(model)))
        _Pass.model, _Pass.layers, _Pass.opened = model, {}, True
        try:
            return forward(model, *args, **options)
        finally:
            _Pass.opened = False

    return forward_that_is_read


def _attach(model: nn.Module, layers: Sequence[int]) -> None:
    """Has the attention of these layers kept in the passes that are read, by an attribute of each module.

    Raises:
        UnsupportedAttention: one of them is not prime-rl's own, as in the models that it takes from transformers.
    """
    named = ((ATTENTION.search(name), module) for name, module in model.named_modules())
    found = {int(match[1]): module for match, module in named if match and hasattr(module, "_compute_attention")}
    if lacking := [layer for layer in layers if layer not in found]:
        raise UnsupportedAttention(
            f"{type(model).__name__}: the attention of layers {lacking} is not prime-rl's FlashAttention; "
            'model.impl must be "custom", for a model that has it'
        )
    for layer in layers:
        found[layer]._compute_attention = _kept(layer, found[layer])


def _kept(layer: int, module: nn.Module) -> Any:
    compute: Any = module._compute_attention

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def compute_attention(q: Tensor, k: Tensor, v: Tensor, *lengths: Any) -> Tensor:
        output: Tensor = compute(q, k, v, *lengths)
        if _Pass.opened:
            _Pass.layers[layer] = module, tuple(x.detach() for x in (q, k, v, output))
        return output

    return compute_attention


def shaping(compute_loss: Callable[..., Any]) -> Callable[..., Any]:
    """prime-rl's loss of a micro-batch, with advantages × γ."""

    def loss_with_credit(
        *, advantages: Sequence[Tensor], loss_mask: Sequence[Tensor], rl_weights: Any = None, **inputs: Any
    ) -> Any:
        """Args: advantages, loss_mask, rl_weights: [n] per sequence, at the tokens themselves.

        Raises:
            ValueError: sequences with tokens that the model did not write between those that count.
            UnsupportedAttention (a ValueError): see `rhythm.AttentionTap`.
        """
        counted = (
            loss_mask if rl_weights is None else [m & (w != 0) for m, w in zip(loss_mask, rl_weights, strict=True)]
        )
        starts = accumulate(map(len, counted), initial=0)
        responses = [
            _Response(row, start, int(places[0]), int(places[-1]) + 1)
            for row, (start, mask) in enumerate(zip(starts, counted, strict=False))
            if len(places := mask.nonzero().flatten())
        ]
        advantages = list(advantages)
        if responses:
            masks = [counted[r.row][r.begin : r.end] for r in responses]
            for response, gamma in zip(responses, _gamma(responses, masks), strict=True):
                row, part = advantages[response.row].clone(), slice(response.begin, response.end)
                row[part] = shaped([row[part]], [gamma], credit_of_process())[0]
                advantages[response.row] = row
        return compute_loss(advantages=advantages, loss_mask=loss_mask, rl_weights=rl_weights, **inputs)

    return loss_with_credit


class _Response(NamedTuple):
    """Of a sequence that begins at token `start` of the micro-batch: its tokens from the first that counts to the last.
    What comes after is left out: padding, which prime-rl appends to the last sequence.
    """

    row: int
    start: int
    begin: int
    end: int


def _gamma(responses: Sequence[_Response], masks: Sequence[Tensor]) -> list[Tensor]:
    credit = credit_of_process()
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    _Pass.count += 1
    statistics: dict[str, Any] = {}
    if "attention" in credit.config.reads:
        for name, value_BT in _signals(responses).items():
            statistics[name] = [row_T[r.begin : r.end] for r, row_T in zip(responses, value_BT, strict=True)]
    return gammas(credit, masks, generator=generator(0, "prime_rl", rank, _Pass.count), **statistics)


def _signals(responses: Sequence[_Response]) -> dict[str, Tensor]:
    """WAAD and FAI of the sequences that have these responses, from the attention that was kept."""
    assert _Pass.model is not None
    kept = torch.cat([torch.arange(r.start, r.start + r.end) for r in responses])
    tap = AttentionTap(
        _Pass.model,
        cu_seqlens=torch.tensor([0, *accumulate(r.end for r in responses)]),
        prompt_lens=[r.begin for r in responses],
        signals=credit_of_process().signals,
    )
    for layer, (module, tensors) in _Pass.layers.items():
        query, key, value, output = (x[kept.to(x.device)][None] for x in tensors)
        tap.receive(
            AttentionCall(
                where=f"prime-rl's {type(module).__name__}, layer {layer}",
                layer=layer,
                implementation="flash",
                function=lambda *_, sliding_window=None, given=output: (given, None),
                module=module,
                query=query.transpose(1, 2),
                key=key.transpose(1, 2),
                value=value.transpose(1, 2),
                mask=None,
                options={"sliding_window": getattr(module, "sliding_window", None)},
            )
        )
    _Pass.layers = {}
    return in_rows(tap)


def loss(inputs: Any, type: str = "default", **options: Any) -> Any:
    """prime-rl's own loss of a sequence: what would stand in its `[trainer.loss]`, the type "default" or "ipo" and its
    options, goes to `kwargs` there.

    Raises:
        ValueError: another type; a training script that is not prime-rl's, or has other names.
    """
    require(type in ("default", "ipo"), "type", type, "default or ipo", "of these losses the advantages are multiplied")
    if not _Pass.installed:
        raise ValueError(f"forward and compute_loss of {TRAINER} were not found, neither there nor in __main__")
    from prime_rl.configs.trainer import DefaultLossConfig, IPOLossConfig
    from prime_rl.trainer.rl.loss import setup_rl_loss_fn

    config = {"default": DefaultLossConfig, "ipo": IPOLossConfig}[type]
    return setup_rl_loss_fn(config(**options))(inputs)


def install(trainer: Any) -> None:
    """Replaces two names of prime-rl's training script."""
    trainer.forward, trainer.compute_loss = reading(trainer.forward), shaping(trainer.compute_loss)
    _Pass.installed = True


for _name in ("__main__", TRAINER):  # as torchrun -m runs it, or its entry point
    _module = sys.modules.get(_name)
    if all(hasattr(_module, name) for name in ("forward", "compute_loss", "setup_rl_loss_fn")):
        install(_module)
