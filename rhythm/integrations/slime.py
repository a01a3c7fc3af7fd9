"""slime: γ from its log-prob pass, and advantages × γ, by two functions that its arguments name.

    --custom-megatron-before-log-prob-hook-path rhythm.integrations.slime.before_log_probs
    --rollout-data-postprocess-path rhythm.integrations.slime.shape_advantages

What slime hands to them is written down in docs/trainers.md. Options: the environment variable RHYTHM_CREDIT.

Shape suffixes: B samples of this data rank, T tokens of the longest one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from rhythm.integrations.adapter import (
    ONE_RATIO,
    credit_of_process,
    gammas,
    require,
    shaped,
    sum_over,
    written_by_model,
)
from rhythm.integrations.megatron_rows import attach_by_tokens, response_signals
from rhythm.seeds import generator
from rhythm.tap.megatron import MegatronTap, data_group


class _Open:
    """The tap of the log-prob pass that runs, or has run; one per process, as the model is."""

    tap: MegatronTap | None = None


def before_log_probs(args: Any, model: Sequence[nn.Module], store_prefix: str) -> None:
    """slime calls this before each pass of log-probs: of the actor ("" as prefix), the reference or a teacher.

    Raises:
        ValueError: arguments of slime that token credit doesn't go with, by name.
    """
    _close()
    if store_prefix or getattr(model[0], "role", "actor") != "actor":
        return
    credit = credit_of_process()
    estimator, ranks = args.advantage_estimator, args.context_parallel_size
    require(estimator != "gspo", "advantage_estimator", estimator, "one with a ratio per token", ONE_RATIO)
    require(ranks == 1, "context_parallel_size", ranks, "1", "its ranks see parts of each sequence")
    layout = getattr(args, "qkv_format", "thd")
    require(layout == "thd", "qkv_format", layout, "thd", "padded rows don't say where their tokens end")
    if "entropy" in credit.config.reads:
        kept = getattr(args, "use_rollout_entropy", False)
        require(kept, "use_rollout_entropy", kept, "set", "the strategy reads the entropies of the log-prob pass")
    if "attention" in credit.config.reads:
        # The loss mask stands at the position before each token.
        _Open.tap = attach_by_tokens(model, credit.signals, shift=1)


def shape_advantages(args: Any, rollout_id: int, rollout_data: dict[str, Any]) -> None:
    """slime calls this on every rank, after it has computed (and perhaps whitened) the advantages of the rank's samples
    on the last stage: they are multiplied by γ, in place.

    Raises:
        ValueError: no log-prob pass has run; samples with tokens that the model did not write.
        UnsupportedAttention (a ValueError): see `rhythm.tap.megatron.attach`.
    """
    credit, tap = credit_of_process(), _Open.tap
    _close()
    if "attention" in credit.config.reads and tap is None:
        raise ValueError(
            "no pass of log-probs has run before the advantages: slime skips it where it takes those of the rollout or "
            "of the loss; set --get-mismatch-metrics, and --custom-megatron-before-log-prob-hook-path "
            "rhythm.integrations.slime.before_log_probs"
        )
    masks = rollout_data["loss_masks"]
    counts = written_by_model(masks)
    statistics: dict[str, Sequence[Tensor]] = {}
    if tap is not None:
        statistics |= response_signals(tap, rollout_data["tokens"], rollout_data["response_lengths"], counts)
    if "advantages" not in rollout_data:  # not the last stage
        return
    if "entropy" in credit.config.reads:
        statistics["entropy"] = rollout_data["entropy"]
    advantages, group = rollout_data["advantages"], data_group()
    gamma = gammas(
        credit,
        masks,
        generator=generator(args.seed, "slime", rollout_id, 0 if group is None else group.rank()),
        whole_batch=sum_over(group, advantages[0].device),
        **statistics,
    )
    rollout_data["advantages"] = shaped(advantages, gamma, credit)


def _close() -> None:
    if _Open.tap is not None:
        _Open.tap.detach()
    _Open.tap = None
