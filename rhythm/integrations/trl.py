"""TRL: GRPOTrainer with token credit, which turns advantages [B] into advantages × γ [B, C].

    trainer = RhythmGRPOTrainer(model, reward, args, dataset, credit=RhythmCredit(strategy="coupled"))
    trainer.train()

Shape suffixes: B responses, P positions of the prompts (padded on the left), C of the completions (padded on the
right), T = P + C.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rhythm.credit.advantages import token_advantages
from rhythm.credit.config import CreditConfig
from rhythm.credit.gamma import batch_credit_weights
from rhythm.credit.signals import RhythmSignals
from rhythm.engines.eval_mode import evaluating
from rhythm.integrations.adapter import ONE_RATIO, read_rows
from rhythm.system.extras import needs
from rhythm.tap.rhythm_credit import RhythmCredit

with needs("rhythm.integrations.trl"):
    from trl import GRPOConfig, GRPOTrainer  # type: ignore[attr-defined]  # exported lazily

IMAGE_INPUTS = (  # of the model's, in what TRL makes of a batch
    "pixel_values",
    "image_grid_thw",
    "pixel_attention_mask",
    "spatial_shapes",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)


class RhythmGRPOTrainer(GRPOTrainer):
    """GRPOTrainer that multiplies advantages by γ, token by token (eq. 12).

    A forward pass of the policy, without gradients and no further than the last sampled layer (to its end where FSDP or
    ZeRO-3 shards parameters), gives the signals of each generated batch, `per_device_train_batch_size` (or `…_eval_…`)
    rows at a time, or all at once if there are images in the prompts; γ is computed from them once and used by all
    optimizer steps on that batch. Everything else is TRL's; with `credit=None` the results are TRL's, bit for bit.

    Logged beside TRL's metrics, over the completion tokens of all processes: rhythm/gamma_mean, rhythm/bonus_mass (the
    mean of γ − 1), rhythm/amplified_fraction (tokens with γ > 1) and, where the strategy reads attention,
    rhythm/waad_mean (tokens). The batch of mass="matched" and of random_like is the generated one of all processes.

    Args:
        model, reward_funcs, args, *rest, **options: as in GRPOTrainer.
        credit: how γ is made, RhythmCredit or just its CreditConfig. None: plain GRPO.

    Raises:
        ValueError: on construction: a credit of another type; `importance_sampling_level="sequence"`, whose gradient
            gives all tokens of a response the same advantage; the strategy "entropy" at a temperature other than 1.
            In training: tools or environments, whose responses the model did not write alone.
        UnsupportedAttention (a ValueError): in training: see `observe`.
    """

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        *rest: Any,
        credit: RhythmCredit | CreditConfig | None = None,
        **options: Any,
    ) -> None:
        self.credit = RhythmCredit(credit) if isinstance(credit, CreditConfig) else credit
        if self.credit is not None:
            _check_credit(self.credit, args)
        super().__init__(model, reward_funcs, args, *rest, **options)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        if self.credit is not None:
            output["advantages"] = self._token_advantages(self.credit, output)
        return output

    def _token_advantages(self, credit: RhythmCredit, output: dict[str, Any]) -> Tensor:
        """[B, C] fp32: advantages × γ on completion tokens, 0 on padding."""
        if output.get("tool_mask") is not None:
            raise ValueError(
                "the batch holds tool_mask (tools or an environment: responses with tokens that the model did not "
                "write); credit must be None with these"
            )
        images = {name: output[name] for name in IMAGE_INPUTS if output.get(name) is not None}
        completion_BC = output["completion_mask"].bool()
        input_ids_BT = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
        response_BT = torch.cat([torch.zeros_like(output["prompt_mask"]).bool(), completion_BC], dim=1)
        mask_BT = torch.cat([output["prompt_mask"].bool(), completion_BC], dim=1)
        signals, entropy_BT = self._read(credit, input_ids_BT, mask_BT, output["prompt_mask"].sum(dim=1), images)
        gamma_BT = batch_credit_weights(
            signals,
            response_BT,
            credit.config,
            credit.generator,
            entropy=entropy_BT,
            whole_batch=lambda x: self.accelerator.reduce(x, reduction="sum"),
        )
        self._log_credit(gamma_BT[response_BT], None if signals is None else signals.waad[response_BT])
        gamma_BC = gamma_BT[:, -completion_BC.shape[1] :]
        return token_advantages(output["advantages"], gamma_BC, completion_BC, credit.config.apply_to)

    def _read(
        self, credit: RhythmCredit, input_ids_BT: Tensor, mask_BT: Tensor, prompt_lens_B: Tensor, images: dict[str, Any]
    ) -> tuple[RhythmSignals | None, Tensor | None]:
        """What the strategy reads of the whole batch, as in RhythmCredit.read; by passes over micro-batches of it."""
        args = self.args
        rows = args.per_device_train_batch_size if self.model.training else args.per_device_eval_batch_size
        if credit.groups is None and credit.signals.per == "batch":  # the spans of all rows choose the heads
            rows = len(input_ids_BT)
        model = self.accelerator.unwrap_model(self.model)
        sharded = self.model if _is_sharded(self) else None
        with evaluating(model), self.accelerator.autocast():
            return read_rows(credit, model, input_ids_BT, mask_BT, prompt_lens_B, rows, sharded, images)

    def _log_credit(self, gamma_t: Tensor, waad_t: Tensor | None) -> None:
        """Means over the completion tokens of all processes, in TRL's own record of metrics. `waad_t`: None where the
        strategy reads no attention.
        """
        mode = "train" if self.model.training else "eval"
        sums = {"gamma_mean": gamma_t.sum(), "amplified_fraction": (gamma_t > 1).sum()}
        if waad_t is not None:
            sums["waad_mean"] = waad_t.sum()
        local = torch.stack([*sums.values(), gamma_t.new_tensor(len(gamma_t))])
        *totals, count = self.accelerator.reduce(local, reduction="sum").tolist()
        for name, value in zip(sums, totals, strict=True):
            self._metrics[mode][f"rhythm/{name}"].append(value / count if count else math.nan)
        self._metrics[mode]["rhythm/bonus_mass"].append(self._metrics[mode]["rhythm/gamma_mean"][-1] - 1)


def _check_credit(credit: RhythmCredit, args: GRPOConfig | None) -> None:
    """What can be refused before a model is loaded; `args` None: TRL's defaults, which are fine."""
    if not isinstance(credit, RhythmCredit):
        raise ValueError(f"credit is a {type(credit).__name__}; it must be a RhythmCredit, a CreditConfig or None")
    if args is None:
        return
    if args.importance_sampling_level != "token":
        raise ValueError(
            f"importance_sampling_level is {args.importance_sampling_level!r}; it must be 'token' for token credit: "
            + ONE_RATIO
        )
    if "entropy" in credit.config.reads and args.temperature != 1:
        raise ValueError(
            f"temperature is {args.temperature}; it must be 1 for the strategy 'entropy', which is of the distribution "
            "that tokens were drawn from"
        )


def _is_sharded(trainer: GRPOTrainer) -> bool:
    """Whether FSDP or ZeRO-3 gathers parameters as the wrapped module runs, which a pass must then do to its end."""
    zero3 = trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3
    return bool(trainer.is_fsdp_enabled or zero3)
