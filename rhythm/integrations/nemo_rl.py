"""NeMo-RL: γ from a pass of its DTensor policy, and advantages × γ, around its advantage estimator.

    python -m rhythm.integrations.nemo_rl examples/run_grpo.py --config examples/configs/grpo_math_1B.yaml

runs NeMo-RL's own script with two of its names replaced: the policy, whose workers add WAAD and FAI to the log-probs
they return, and the maker of the advantage estimator. What NeMo-RL hands over is written down in docs/trainers.md.
Options: the environment variable RHYTHM_CREDIT.

Shape suffixes: B responses, S positions, padded on the right.
"""

from __future__ import annotations

import runpy
import sys
from typing import Any

import torch
from torch import Tensor

from rhythm.integrations.adapter import credit_of_process, gammas, read_rows, require, shaped
from rhythm.seeds import generator

SIGNALS = ("rhythm_waad", "rhythm_fai")
WORKER = "rhythm.integrations.nemo_rl.RhythmWorker"


class _Pass:
    """The signals of the last pass of the policy, in the driver; {} where none were read."""

    signals: dict[str, Tensor]
    count = 0


_Pass.signals = {}


def worker_class(base: Any) -> Any:
    """NeMo-RL's worker with the signals among what its pass of log-probs returns."""

    class Worker(base):  # type: ignore[misc]
        reads = True

        def get_logprobs(self, data: Any, micro_batch_size: int | None = None) -> Any:
            """As NeMo-RL's, with SIGNALS [B, S] beside "logprobs".

            Raises:
                ValueError: tensor or context parallelism, whose ranks see parts of the heads or of each sequence.
                UnsupportedAttention (a ValueError): see `rhythm.observe`.
            """
            output = super().get_logprobs(data=data, micro_batch_size=micro_batch_size)
            credit = credit_of_process()
            if not self.reads or "attention" not in credit.config.reads:
                return output
            sizes = {name: self.cfg["dtensor_cfg"][f"{name}_parallel_size"] for name in ("tensor", "context")}
            require(set(sizes.values()) == {1}, "dtensor_cfg", sizes, "1 in both", "ranks see parts of the attention")
            ids_BS, lens_B = data["input_ids"].to(self.model.device), data["input_lengths"].to(self.model.device)
            mask_BS = torch.arange(ids_BS.shape[1], device=ids_BS.device) < lens_B[:, None]
            counted_BS = data["token_mask"].to(ids_BS.device).bool() & mask_BS
            prompt_lens_B = torch.where(counted_BS.any(dim=1), counted_BS.long().argmax(dim=1), lens_B)
            rows = micro_batch_size or self.cfg["logprob_batch_size"]
            with torch.autocast(ids_BS.device.type, dtype=self.dtype, enabled=self.autocast_enabled):
                signals, _ = read_rows(credit, self.model, ids_BS, mask_BS, prompt_lens_B, rows, sharded=self.model)
            assert signals is not None
            for name, value_BS in zip(SIGNALS, (signals.waad, signals.fai), strict=True):
                output[name] = value_BS.cpu()
            return output

        def get_reference_policy_logprobs(self, *args: Any, **options: Any) -> Any:
            """As NeMo-RL's, which calls get_logprobs with the reference's weights: these are not read."""
            self.reads = False
            try:
                return super().get_reference_policy_logprobs(*args, **options)
            finally:
                self.reads = True

    return Worker


def policy_class(base: Any) -> Any:
    """NeMo-RL's policy with our workers, which keeps what they have read for the estimator."""

    class RhythmPolicy(base):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options, worker_extension_cls_fqn=WORKER)

        def get_logprobs(self, data: Any, timer: Any = None) -> Any:
            output = super().get_logprobs(data, timer=timer)
            _Pass.signals = {name: output.pop(name) for name in SIGNALS if name in output}
            return output

    return RhythmPolicy


class RhythmEstimator:
    """An advantage estimator of NeMo-RL's, whose advantages are multiplied by γ."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def compute_advantage(self, prompt_ids: Tensor, rewards: Tensor, mask: Tensor, **options: Any) -> Tensor:
        """[B, S]: the advantage of token t is at t, as its log-prob is.

        Args:
            mask: [B, S], 1 on response tokens that count.

        Raises:
            ValueError: no pass of log-probs has run; responses with tokens that the model did not write.
        """
        advantages: Tensor = self.inner.compute_advantage(prompt_ids=prompt_ids, rewards=rewards, mask=mask, **options)
        credit = credit_of_process()
        reads = credit.config.reads
        require(
            "entropy" not in reads, "strategy of RHYTHM_CREDIT", credit.config.strategy, "another", "NeMo-RL's pass"
        )
        signals, _Pass.signals, _Pass.count = _Pass.signals, {}, _Pass.count + 1
        if "attention" in reads and not signals:
            raise ValueError(
                "no pass of log-probs has run before the advantages: loss_fn.force_on_policy_ratio must be false"
            )
        places = [row.nonzero().flatten() for row in mask.cpu()]
        parts = [slice(int(found[0]), int(found[-1]) + 1) if len(found) else slice(0, 0) for found in places]

        def of_responses(x_BS: Tensor) -> list[Tensor]:
            return [row[part] for row, part in zip(x_BS, parts, strict=True)]

        statistics: dict[str, Any] = {name.removeprefix("rhythm_"): of_responses(x) for name, x in signals.items()}
        gamma = gammas(credit, of_responses(mask), generator=generator(0, "nemo_rl", _Pass.count), **statistics)
        result = advantages.clone()
        for row, part, new in zip(result, parts, shaped(of_responses(advantages), gamma, credit), strict=True):
            row[part] = new
        return result


def install(grpo: Any) -> None:
    """Replaces two names of the module nemo_rl.algorithms.grpo."""
    grpo.Policy = policy_class(grpo.Policy)
    create = grpo._create_advantage_estimator

    def created(master_config: Any) -> RhythmEstimator:
        sequence = getattr(master_config.loss_fn, "sequence_level_importance_ratios", False)
        require(not sequence, "loss_fn.sequence_level_importance_ratios", sequence, "False", "a ratio per response")
        return RhythmEstimator(create(master_config))

    grpo._create_advantage_estimator = created


def __getattr__(name: str) -> Any:
    """RhythmWorker is made where it is asked for: only NeMo-RL's workers have what it needs to be imported."""
    if name != "RhythmWorker":
        raise AttributeError(name)
    import ray
    from nemo_rl.models.policy.utils import get_runtime_env_for_policy_worker
    from nemo_rl.models.policy.workers.dtensor_policy_worker_v2 import DTensorPolicyWorkerV2Impl

    return ray.remote(runtime_env=get_runtime_env_for_policy_worker("dtensor_policy_worker_v2"))(
        worker_class(DTensorPolicyWorkerV2Impl)
    )


def main() -> None:
    """Runs a script of NeMo-RL's: its path, then its arguments."""
    from nemo_rl.algorithms import grpo
    from nemo_rl.distributed import ray_actor_environment_registry as registry

    environments = registry.ACTOR_ENVIRONMENT_REGISTRY
    own = "nemo_rl.models.policy.workers.dtensor_policy_worker_v2.DTensorPolicyWorkerV2"
    environments[WORKER] = environments[own]
    install(grpo)
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
