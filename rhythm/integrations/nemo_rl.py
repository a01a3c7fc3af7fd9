"""NeMo-RL: γ from a pass of its policy, and advantages × γ, around its advantage estimator.

    python -m rhythm.integrations.nemo_rl examples/run_grpo.py --config examples/configs/grpo_math_1B.yaml

runs NeMo-RL's own script with two of its names replaced: the policy, whose workers add WAAD and FAI to the log-probs
they return, and the function that makes the advantage estimator. What NeMo-RL hands over is written down in
docs/trainers.md. Options: the environment variable RHYTHM_CREDIT.

Shape suffixes: B responses, S positions, padded on the right.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rhythm.credit.signals import RhythmSignals
from rhythm.integrations.adapter import credit_of_process, gammas, read_rows, require, response_mask, shaped
from rhythm.integrations.megatron_rows import bounds
from rhythm.seeds import generator
from rhythm.tap.megatron import attach
from rhythm.tap.megatron_layers import MicroBatch

SIGNALS = ("rhythm_waad", "rhythm_fai")
WORKERS = {  # ours → the name in NeMo-RL's registry of the class that it extends
    "rhythm.integrations.nemo_rl.RhythmWorker": "dtensor_policy_worker_v2.DTensorPolicyWorkerV2",
    "rhythm.integrations.nemo_rl.RhythmMegatronWorker": "megatron_policy_worker.MegatronPolicyWorker",
}


class _Pass:
    """The signals of the last pass of the policy, in the driver; {} where none were read."""

    signals: dict[str, Tensor]
    count = 0


_Pass.signals = {}


def worker_class(base: Any, read: Callable[..., tuple[Any, RhythmSignals]]) -> Any:
    """NeMo-RL's worker with the signals among what its pass of log-probs returns.

    Args:
        read: makes the pass and reads it, (worker, data, micro_batch_size, the pass) → (its output, signals):
            `dtensor_pass` or `megatron_pass`.
    """

    class Worker(base):  # type: ignore[misc]
        reads = True

        def get_logprobs(self, data: Any, micro_batch_size: int | None = None, **options: Any) -> Any:
            """As NeMo-RL's, with SIGNALS [B, S] beside "logprobs".

            Raises:
                ValueError: parallelism whose ranks see parts of the attention, by name.
                UnsupportedAttention (a ValueError): see `rhythm.observe` and `rhythm.tap.megatron.attach`.
            """

            def log_probs() -> Any:
                return super(Worker, self).get_logprobs(data=data, micro_batch_size=micro_batch_size, **options)

            if not self.reads or "attention" not in credit_of_process().config.reads:
                return log_probs()
            output, signals = read(self, data, micro_batch_size, log_probs)
            for name, value_BP in zip(SIGNALS, (signals.waad, signals.fai), strict=True):
                behind = data["input_ids"].shape[1] - value_BP.shape[1]
                output[name] = torch.nn.functional.pad(value_BP.cpu(), (0, behind), value=torch.nan)
            return output

        def get_reference_policy_logprobs(self, *args: Any, **options: Any) -> Any:
            """As NeMo-RL's, which calls get_logprobs with the reference's weights: these are not read."""
            self.reads = False
            try:
                return super().get_reference_policy_logprobs(*args, **options)
            finally:
                self.reads = True

    return Worker


def dtensor_pass(worker: Any, data: Any, micro_batch_size: int | None, log_probs: Callable[[], Any]) -> Any:
    """The pass of log-probs, and signals by one more pass of a DTensor policy."""
    output, credit = log_probs(), credit_of_process()
    sizes = {name: worker.cfg["dtensor_cfg"][f"{name}_parallel_size"] for name in ("tensor", "context")}
    require(set(sizes.values()) == {1}, "dtensor_cfg", sizes, "1 in both", "ranks see parts of the attention")
    ids_BS = data["input_ids"].to(worker.model.device)
    lens_B, prompt_lens_B = (x.to(ids_BS.device) for x in _lens(data))
    mask_BS = torch.arange(ids_BS.shape[1], device=ids_BS.device) < lens_B[:, None]
    rows = micro_batch_size or worker.cfg["logprob_batch_size"]
    with torch.autocast(ids_BS.device.type, dtype=worker.dtype, enabled=worker.autocast_enabled):
        signals, _ = read_rows(credit, worker.model, ids_BS, mask_BS, prompt_lens_B, rows, sharded=worker.model)
    return output, signals


def megatron_pass(worker: Any, data: Any, micro_batch_size: int | None, log_probs: Callable[[], Any]) -> Any:
    """The pass of log-probs of a Megatron policy, and signals read off it. A collective of the ranks of the model."""
    ranks, packs = worker.cfg["megatron_cfg"]["context_parallel_size"], worker.cfg["sequence_packing"]["enabled"]
    require(ranks == 1, "megatron_cfg.context_parallel_size", ranks, "1", "its ranks see parts of each sequence")
    require(packs, "sequence_packing.enabled", packs, "True", "padded rows don't say where their tokens end")
    chunks = [worker.model] if isinstance(worker.model, nn.Module) else list(worker.model)
    require(len(chunks) == 1, "virtual pipeline stages", len(chunks), "1", "rows are counted as they pass")
    lens, prompt_lens = (x.tolist() for x in _lens(data))
    ids_BS, seen = data["input_ids"].cpu(), 0

    def located(_: tuple[Any, ...], kwargs: dict[str, Any]) -> MicroBatch:
        """NeMo-RL packs the rows in their order."""
        nonlocal seen
        first, ids_T = bounds(kwargs)[:-1], kwargs["input_ids"][0].cpu()
        rows, seen = range(seen, seen + len(first)), seen + len(first)
        for row, start in zip(rows, first, strict=True):
            if row >= len(lens) or not ids_T[start : start + lens[row]].equal(ids_BS[row, : lens[row]]):
                raise ValueError(f"the pass of log-probs packs other tokens than those of row {row} of its batch")
        return MicroBatch(rows, [lens[row] for row in rows], [prompt_lens[row] for row in rows], first)

    with attach(chunks, credit_of_process().signals, locate=located) as tap:
        output = log_probs()
    response_lens = [n - prompt for n, prompt in zip(lens, prompt_lens, strict=True)]
    return output, tap.signals(response_mask(lens, response_lens, [True] * len(lens)))


def _lens(data: Any) -> tuple[Tensor, Tensor]:
    """(tokens, tokens of the prompt) of each row, [B]; all are the prompt's in a row where none counts."""
    lens_B = data["input_lengths"]
    position_S = torch.arange(data["input_ids"].shape[1], device=lens_B.device)
    counted_BS = data["token_mask"].to(lens_B.device).bool() & (position_S < lens_B[:, None])
    return lens_B, torch.where(counted_BS.any(dim=1), counted_BS.long().argmax(dim=1), lens_B)


def policy_class(base: Any) -> Any:
    """NeMo-RL's policy with our workers, which keeps what they have read for the estimator."""

    class RhythmPolicy(base):  # type: ignore[misc]
        def __init__(self, cluster: Any, config: Any, *args: Any, **options: Any) -> None:
            of_dtensor, of_megatron = WORKERS
            uses_megatron = (config.get("megatron_cfg") or {}).get("enabled", False)
            worker = of_megatron if uses_megatron else of_dtensor
            super().__init__(cluster, config, *args, **options, worker_extension_cls_fqn=worker)

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
    """The workers are made where they are asked for: only NeMo-RL's have what they need to be imported."""
    if name not in ("RhythmWorker", "RhythmMegatronWorker"):
        raise AttributeError(name)
    import ray
    from nemo_rl.models.policy.utils import get_runtime_env_for_policy_worker

    made: Any
    if name == "RhythmWorker":
        from nemo_rl.models.policy.workers.dtensor_policy_worker_v2 import DTensorPolicyWorkerV2Impl

        kind, made = "dtensor_policy_worker_v2", worker_class(DTensorPolicyWorkerV2Impl, dtensor_pass)
    else:
        from nemo_rl.models.policy.workers.megatron_policy_worker import MegatronPolicyWorkerImpl

        kind, made = "megatron_policy_worker", worker_class(MegatronPolicyWorkerImpl, megatron_pass)
    return ray.remote(runtime_env=get_runtime_env_for_policy_worker(kind))(made)


def main() -> None:
    """Runs a script of NeMo-RL's: its path, then its arguments."""
    from nemo_rl.algorithms import grpo
    from nemo_rl.distributed import ray_actor_environment_registry as registry

    environments = registry.ACTOR_ENVIRONMENT_REGISTRY
    for worker, extended in WORKERS.items():
        environments[worker] = environments[f"nemo_rl.models.policy.workers.{extended}"]
    install(grpo)
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
