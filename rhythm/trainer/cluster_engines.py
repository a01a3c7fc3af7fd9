"""Builds the engines of a cluster run from its configuration, which is checked before anything is started.

`plan` and `check_cluster` need neither Ray nor vLLM nor Megatron; `open_cluster` needs the engines that the
configuration names.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rhythm.cluster.config import ClusterConfig
from rhythm.cluster.environment import prepare_ray_environment
from rhythm.cluster.plan.checks import check, check_weights
from rhythm.cluster.plan.dimensions import KNOWN, Dimensions, Workload, read_dimensions
from rhythm.cluster.plan.summary import describe_plan, push_kind, push_kind_to_models
from rhythm.engines.interfaces import LogProbs, Rollout
from rhythm.engines.parity import ParityConfig, compare, must_agree
from rhythm.system.extras import missing
from rhythm.tiny.model import TinyModelConfig
from rhythm.trainer.config import TrainConfig
from rhythm.trainer.metrics import Record
from rhythm.trainer.run_dir import LOGS
from rhythm.trainer.step import Engines

if TYPE_CHECKING:
    from rhythm.cluster.roles import Role
    from rhythm.cluster.session import Session


def model_dimensions(config: TrainConfig, *, known: bool = False) -> tuple[Dimensions, str]:
    """The model's dimensions, and a description of where they come from.

    With `known`, model.path may be a directory that doesn't exist if its name is that of a model in KNOWN.

    Raises ValueError naming model.path.
    """
    path = config.model.path
    if path is None:
        return _tiny(config.warm_start.model), "the tiny model"
    if path.is_dir() or not known:
        return read_dimensions(path), f"config.json in {path}"
    name = path.name.lower().removesuffix("-base")
    if name not in KNOWN:
        raise ValueError(f"model.path is {path}: no such directory, and its name is not one of {', '.join(KNOWN)}")
    return KNOWN[name], f"known by name: there is no directory {path}"


def workload(config: TrainConfig, model: Dimensions) -> Workload:
    """The run settings used by the cluster's checks and plan. Raises ValueError for layers that the model lacks."""
    reads = config.signals.source != "separate" and "attention" in config.credit.reads
    return Workload(
        prompts_per_batch=config.batch.prompts_per_batch,
        responses_per_prompt=config.batch.responses_per_prompt,
        mini_batch_size=config.batch.mini_batch_size,
        micro_batch_size=config.batch.micro_batch_size,
        max_tokens=config.batch.max_tokens,
        max_new_tokens=config.sampling.max_new_tokens,
        token_chunk=config.optimizer.token_chunk,
        value_bytes=getattr(torch, config.model.precision).itemsize,
        steps=config.steps,
        reference=config.loss.kl_coef > 0,
        separate_attn=config.signals.source == "separate",
        tapped=config.signals.source == "training",
        sampled_layers=len(config.signals.layers_of(model.layers)) if reads else 0,
    )


def plan(config: TrainConfig, cluster: ClusterConfig) -> str:
    """The plan of a run. Raises ValueError naming the keys that would not work."""
    model, source = model_dimensions(config, known=True)
    check(cluster, workload(config, model), model)
    return describe_plan(cluster, workload(config, model), model, source)


def check_cluster(config: TrainConfig, cluster: ClusterConfig) -> None:
    """Raise ValueError, naming the keys, for settings that would not work on this machine."""
    wanted = {"cluster": "ray"}
    if cluster.infer.engine == "vllm":
        wanted["cluster.infer.engine"] = "vllm"
    if cluster.train.engine == "megatron":
        wanted["cluster.train.engine"] = "megatron"
    for key, module in wanted.items():
        if importlib.util.find_spec(module) is None:
            raise ValueError(missing(key, module, "cluster"))
    if config.model.path is not None:
        check_weights(config.model.path)
    model, _ = model_dimensions(config)
    check(cluster, workload(config, model), model)
    if cluster.ray_address is None and torch.cuda.device_count() < cluster.gpus:
        raise ValueError(f"cluster.gpus is {cluster.gpus}: this machine has {torch.cuda.device_count()}")


@contextmanager
def open_cluster(
    config: TrainConfig, cluster: ClusterConfig
) -> Iterator[Callable[[tuple[int, ...], int, Path, int], Engines]]:
    """Start Ray until the block is left; yields a function that builds engines on it and may be called repeatedly.

    build(end_ids, pad_id, checkpoint, restarts) stops the previous engines and builds new ones with that checkpoint's
    weights. Replicas lost later start from that checkpoint again, so it must not be deleted. `restarts`: how often the
    training ranks have been restarted so far.
    """
    prepare_ray_environment(cluster)
    from rhythm.cluster.session import Session

    with Session(cluster, separate_attn=config.signals.source == "separate") as session:
        yield partial(_build, config, session)


def _build(
    config: TrainConfig, session: Session, end_ids: tuple[int, ...], pad_id: int, checkpoint: Path, restarts: int
) -> Engines:
    from rhythm.cluster.engines import ClusterAttn, ClusterInfer, ClusterInferAhead, ClusterTrain
    from rhythm.cluster.roles import Role
    from rhythm.cluster.specs import AttnSpec, InferSpec, TrainSpec
    from rhythm.cluster.utilization import Rates
    from rhythm.cluster.weight_sync import ClusterWeightSync, WeightReceiver

    cluster, checkpoint, trust = session.config, checkpoint.resolve(), config.model.trust_remote_code
    session.stop_all()
    session.logs = (config.run_dir / LOGS).resolve()
    rates = Rates({role: session.places(role) for role in (Role.TRAIN, Role.INFER)})
    rates.restarts[Role.TRAIN] = restarts
    batch, precision = config.batch, config.model.precision
    train_spec = TrainSpec(
        role=cluster.train,
        checkpoint=checkpoint,
        optimizer=config.optimizer,
        loss=config.loss,
        temperature=config.sampling.temperature,
        micro_batch_size=batch.micro_batch_size,
        max_tokens=batch.max_tokens,
        log_prob_micro_batch_size=batch.log_prob_micro_batch_size,
        share_prompts=batch.share_prompts,
        gradient_checkpointing=config.model.gradient_checkpointing,
        precision=precision,
        reference=config.loss.kl_coef > 0,
        bucket_bytes=cluster.push_bucket_mib << 20,
        collective_seconds=max(cluster.deadlines.step, cluster.deadlines.log_probs),
        trust_remote_code=trust,
    )
    infer_spec = InferSpec(
        cluster.infer.vllm,
        checkpoint,
        cluster.max_length,
        end_ids,
        pad_id,
        precision,
        trust,
        stop_strings=bool(config.sampling.stop),
    )
    attn_spec = AttnSpec(checkpoint, config.signals, batch.micro_batch_size, precision, trust, batch.max_tokens)
    takes_turns = cluster.placement == "colocated"
    starts: dict[Role, Callable[[], Any]] = {
        Role.TRAIN: lambda: ClusterTrain(session, train_spec, rates),
        Role.INFER: lambda: ClusterInfer(session, infer_spec, rates, takes_turns=takes_turns),
    }
    if config.signals.source == "separate":
        rates.processes[Role.ATTN] = session.places(Role.ATTN)
        starts[Role.ATTN] = lambda: ClusterAttn(session, attn_spec, rates)
    session.begin(*starts)
    # vLLM measures how much of a GPU is free, so there it comes after the trainer on the same one.
    engines = _started(starts, session, at_once=not (takes_turns and cluster.gpus))
    train, infer, attn = engines[Role.TRAIN], engines[Role.INFER], engines.get(Role.ATTN)
    train.before_work = infer.leave_gpu
    receivers = [WeightReceiver(push_kind(cluster), infer)]
    if attn is not None:
        receivers.append(WeightReceiver(push_kind_to_models(cluster), attn))
    weight_sync = ClusterWeightSync(
        train,
        receivers,
        rates=rates,
        gpus_of_replica=cluster.infer.tensor_parallel_size,
        seconds=cluster.deadlines.push,
    )
    return Engines(
        infer=infer,
        train=train,
        attn=attn,
        weight_sync=weight_sync,
        tapped=train if config.signals.source == "training" else None,
        check=ParityCheck(cluster.parity),
        meter=rates,
        ahead=ClusterInferAhead(infer) if cluster.rollout_ahead else None,
    )


def _started(starts: Mapping[Role, Callable[[], Any]], session: Session, *, at_once: bool) -> dict[Role, Any]:
    """What `starts` return, by role; at once, in a thread each, or one after another. The first exception kills the
    processes of all, and is raised once the others have ended, too.
    """
    if not at_once:
        return {role: start() for role, start in starts.items()}
    with ThreadPoolExecutor(len(starts), thread_name_prefix="starting") as threads:
        futures = {role: threads.submit(start) for role, start in starts.items()}
        try:
            for future in as_completed(futures.values()):
                future.result()
        except BaseException:
            session.stop_all()
            raise
    return {role: future.result() for role, future in futures.items()}


class ParityCheck:
    """Compares the log-probs of actor_infer and actor_train on the first rollout that it is given, then every
    `every_steps` steps.
    """

    def __init__(self, config: ParityConfig) -> None:
        self._config = config
        self._checked = False

    def __call__(self, rollout: Rollout, log_probs: LogProbs, step: int) -> Record:
        """parity_mean and parity_max in nats; empty where no check is due. Raises ParityError."""
        if self._checked and step % self._config.every_steps:
            return {}
        self._checked = True
        parity = compare(rollout.logprobs, log_probs.logprobs, rollout.response_mask)
        must_agree(parity, self._config.threshold)
        return {"parity_mean": parity.mean, "parity_max": parity.max}


def _tiny(model: TinyModelConfig) -> Dimensions:
    return Dimensions(
        layers=model.layers,
        hidden_size=model.hidden_size,
        mlp_size=model.mlp_size,
        query_heads=model.query_heads,
        key_heads=model.key_heads,
        head_size=model.head_size,
        vocabulary=model.vocabulary_size,
        max_positions=model.max_positions,
        tied=True,
    )
