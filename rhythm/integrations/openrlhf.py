"""OpenRLHF: γ from its pass of log-probs, and advantages × γ, after it has computed and normalized them.

    python -m rhythm.integrations.openrlhf --actor.model_name_or_path … (as for openrlhf.cli.train_ppo_ray)

runs OpenRLHF's own script with its Ray classes of policy and trainer replaced: the policy's workers read WAAD and FAI
off each pass of log-probs, and the trainer fetches them. What OpenRLHF hands over is written down in docs/trainers.md.
Options: the environment variable RHYTHM_CREDIT.

Shape suffixes: B responses of a micro-batch, T positions, padded on the right, A = T − 1 actions, that of token t at
t − 1.
"""

from __future__ import annotations

import runpy
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from rhythm.integrations.adapter import ONE_RATIO, credit_of_process, gammas, in_rows, require, shaped
from rhythm.seeds import generator
from rhythm.tap.attention_tap import AttentionTap


def policy_class(base: Any) -> Any:
    """OpenRLHF's worker of the policy, which reads the signals of each pass of log-probs."""

    class RhythmPolicy(base):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.rhythm_signals: list[dict[str, Tensor]] = []

        def forward(
            self, sequences: Tensor, action_mask: Tensor, attention_mask: Tensor, *args: Any, **options: Any
        ) -> Any:
            """As OpenRLHF's. Raises UnsupportedAttention (a ValueError): see `rhythm.AttentionTap`."""
            credit = credit_of_process()
            if "attention" not in credit.config.reads:
                return super().forward(sequences, action_mask, attention_mask, *args, **options)
            lens_B, acts_BA = attention_mask.sum(dim=-1), action_mask.bool()
            prompt_lens_B = torch.where(acts_BA.any(dim=-1), acts_BA.long().argmax(dim=-1) + 1, lens_B)
            where: dict[str, Any] = (
                {"cu_seqlens": torch.nn.functional.pad(lens_B.cumsum(0), (1, 0))}
                if self.actor.packing_samples
                else {"attention_mask": attention_mask}
            )
            model = self.strategy._unwrap_model(self.actor)
            tap = AttentionTap(model, prompt_lens=prompt_lens_B, signals=credit.signals, **where)
            with tap:
                log_probs = super().forward(sequences, action_mask, attention_mask, *args, **options)
            self.rhythm_signals.append({name: value_BT[:, 1:] for name, value_BT in in_rows(tap).items()})
            return log_probs

        def take_rhythm_signals(self) -> list[dict[str, Tensor]]:
            """WAAD and FAI [B, A] of each pass since the last call, in their order."""
            taken, self.rhythm_signals = self.rhythm_signals, []
            return taken

    return RhythmPolicy


class ExperienceMaker:
    """OpenRLHF's maker of experiences, whose advantages are multiplied by γ."""

    def __init__(self, inner: Any) -> None:
        """Raises ValueError for arguments of OpenRLHF that token credit doesn't go with, by name."""
        ds, loss = inner.args.ds, inner.args.actor.policy_loss_type
        require(loss != "gspo", "actor.policy_loss_type", loss, "ppo", ONE_RATIO)
        for name in ("ring_attn_size", "tensor_parallel_size"):
            ranks = getattr(ds, name)
            require(ranks == 1, f"ds.{name}", ranks, "1", "its ranks see parts of the attention")
        config = credit_of_process().config
        require(
            "entropy" not in config.reads, "strategy of RHYTHM_CREDIT", config.strategy, "another", "OpenRLHF's pass"
        )
        self.inner, self.count = inner, 0

    def make_experience_batch(self, rollout_samples: Any) -> list[Any]:
        """As OpenRLHF's. Raises ValueError for responses with tokens that the model did not write."""
        experiences: list[Any] = self.inner.make_experience_batch(rollout_samples)
        self.count += 1
        credit = credit_of_process()
        places = [(index, row, part) for index, x in enumerate(experiences) for row, part in enumerate(_responses(x))]
        statistics: dict[str, Any] = {}
        if "attention" in credit.config.reads:
            taken = self._signals()
            for name in ("waad", "fai"):
                statistics[name] = [taken[index][name][row, part] for index, row, part in places]
        masks = [experiences[index].action_mask[row, part] for index, row, part in places]
        seed = generator(self.inner.args.train.seed, "openrlhf", self.count)
        for (index, row, part), gamma in zip(places, gammas(credit, masks, generator=seed, **statistics), strict=True):
            advantages_A = experiences[index].advantages[row]
            advantages_A[part] = shaped([advantages_A[part]], [gamma], credit)[0]
        return experiences

    def _signals(self) -> list[dict[str, Tensor]]:
        """Of each experience: passes are dealt to the workers in runs, the first ones to the first worker."""
        import ray

        return list(chain(*ray.get(self.inner.actor_model_group.async_run_method(method_name="take_rhythm_signals"))))


def _responses(experience: Any) -> list[slice]:
    """Of each row, its actions from the first that counts to the end of the sequence."""
    ends = (experience.attention_mask.sum(dim=-1) - 1).tolist()
    return [
        slice(int(row.long().argmax()) if row.any() else end, end)
        for row, end in zip(experience.action_mask, ends, strict=True)
    ]


def trainer_class(base: Any) -> Any:
    """OpenRLHF's trainer, synchronous or not, with our maker of experiences."""

    class RhythmTrainer(base):  # type: ignore[misc]
        experience_maker: Any

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.experience_maker = ExperienceMaker(self.experience_maker)

    return RhythmTrainer


def install(ppo_actor: Any, ppo_trainer: Any, ppo_trainer_async: Any) -> None:
    """Replaces Ray classes in the modules of OpenRLHF's trainers: PolicyModelActor, PPOTrainer and TrainingActor."""
    import ray

    for module, name, made, options in (
        (ppo_actor, "PolicyModelActor", policy_class, {"num_gpus": 1}),
        (ppo_trainer, "PPOTrainer", trainer_class, {}),
        (ppo_trainer_async, "TrainingActor", trainer_class, {}),
    ):
        plain = getattr(module, name).__ray_metadata__.modified_class.__ray_actor_class__
        setattr(module, name, ray.remote(**options)(made(plain)) if options else ray.remote(made(plain)))


def main() -> None:
    """Runs OpenRLHF's script with its arguments."""
    from openrlhf.trainer import ppo_trainer, ppo_trainer_async
    from openrlhf.trainer.ray import ppo_actor

    install(ppo_actor, ppo_trainer, ppo_trainer_async)
    runpy.run_module("openrlhf.cli.train_ppo_ray", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
