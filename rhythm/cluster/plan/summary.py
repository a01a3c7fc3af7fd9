"""Describes the plan of a run as text: placement, memory per role, batch sizes, and how weights are sent."""

from __future__ import annotations

from collections.abc import Iterator

from rhythm.cluster.config import ClusterConfig, PushKind
from rhythm.cluster.plan.dimensions import Dimensions, Workload
from rhythm.cluster.plan.memory import checkpoint_bytes, gib, infer_memory, train_memory
from rhythm.cluster.plan.placement import Assignment, Slot, assign
from rhythm.cluster.plan.timeline import peak, timeline


def describe_plan(cluster: ClusterConfig, work: Workload, model: Dimensions, source: str) -> str:
    """The plan as lines of text. `source`: where the model's dimensions come from.

    Raises ValueError from `assign`.
    """
    places = assign(cluster, separate_attn=work.separate_attn)
    lines = [
        "cluster plan",
        f"  model         {_count(model.parameters)} parameters, {model.layers} layers, {model.query_heads} query "
        f"and {model.key_heads} key heads of {model.head_size} ({source})",
        *_roles(cluster, places, tapped=work.tapped),
        *_memory(cluster, work, model),
        *_batch(cluster, work),
        *_pushes(cluster, work, model),
        f"  checkpoint    {gib(checkpoint_bytes(cluster, work, model))} on disk each: weights and optimizer; one more "
        "than checkpoint.keep while one is written",
    ]
    return "\n".join(lines)


def _roles(cluster: ClusterConfig, places: Assignment, *, tapped: bool) -> Iterator[str]:
    train, infer = cluster.train, cluster.infer
    yield (
        f"  actor_train   {train.engine}, tensor {train.tensor} × pipeline {train.pipeline} × data {train.data}"
        + (f" × context {train.context}" if train.context > 1 else "")
        + f" = {train.ranks} {_plural(train.ranks, 'rank')} on {_where(places.train)}"
    )
    yield (
        f"  actor_infer   {infer.engine}, {infer.replicas} {_plural(infer.replicas, 'replica')} × tensor "
        f"{infer.tensor_parallel_size} on {_where(places.infer)}"
    )
    if places.attn:
        count = len(places.attn)
        yield f"  actor_attn    transformers, {count} {_plural(count, 'replica')} on {_where(places.attn)}"
    else:
        where = "gradient steps" if tapped else "pass over the old log-probs"
        yield f"  actor_attn    inline: statistics tapped in actor_train's {where}"
    if places.idle:
        yield f"  idle          {places.idle} GPUs"


def _memory(cluster: ClusterConfig, work: Workload, model: Dimensions) -> Iterator[str]:
    train, infer = train_memory(cluster, work, model), infer_memory(cluster, work, model)
    per = "GPU" if cluster.gpus else "process"
    yield (
        f"  memory        actor_train {gib(train.total)} per {per}: weights {gib(train.weights)}, gradients "
        f"{gib(train.gradients)}, optimizer {gib(train.optimizer)}, "
        + (f"reference {gib(train.reference)}, " if train.reference else "")
        + f"activations ~{gib(train.activations.gradients)}; log-probs ~{gib(train.activations.log_probs)}, "
        f"optimizer's step ~{gib(train.activations.update)}"
    )
    cache = f", KV cache {gib(infer.kv_cache)} = {infer.tokens:,} tokens" if infer.kv_cache else ""
    yield f"                actor_infer {gib(infer.total)}: weights {gib(infer.weights)}{cache}"
    if work.separate_attn:
        yield f"                actor_attn {gib(model.parameters * work.value_bytes)}: weights"
    if cluster.gpus and cluster.placement == "colocated":
        most = peak(cluster, work, model)
        yield (
            f"                in turns, at most {gib(most.total)} of {cluster.gpu_memory_gib:g} GiB, during "
            f"{most.call}; actor_train + actor_infer during"
        )
        moments = [f"{m.call} {gib(m.train)} + {gib(m.infer)}" for m in timeline(cluster, work, model)[:-1]]
        for i in range(0, len(moments), 3):
            yield "                " + ", ".join(moments[i : i + 3])


def _batch(cluster: ClusterConfig, work: Workload) -> Iterator[str]:
    replicas, data = cluster.infer.replicas, cluster.train.data
    steps = work.batch_size // work.mini_batch_size
    if work.max_tokens is None:
        passes = work.mini_batch_size // (data * work.micro_batch_size)
        split = f"{passes} micro-batches × {work.micro_batch_size} responses"
    else:
        split = f"as few micro-batches as {work.max_tokens:,} tokens in each allow"
    yield (
        f"  batch         {work.prompts_per_batch} prompts × {work.responses_per_prompt} = {work.batch_size} "
        f"responses; {work.prompts_per_batch // replicas} prompts per replica"
    )
    yield (
        f"                {work.batch_size} / {work.mini_batch_size} = {steps} gradient steps, each {data} data "
        f"{_plural(data, 'rank')} × {split}"
    )
    if cluster.rollout_ahead:
        yield (
            "                generated while the step before trains, with weights one version older, but for the first "
            f"and every {cluster.parity.every_steps}th (parity)"
        )
    yield (
        f"                up to {work.batch_size * cluster.max_length:,} tokens per step, {work.steps} steps, "
        f"{work.steps * steps:,} gradient steps"
    )


def _pushes(cluster: ClusterConfig, work: Workload, model: Dimensions) -> Iterator[str]:
    size = model.parameters * work.value_bytes
    readers = cluster.infer.replicas
    yield (
        f"  push          every step, actor_train → {readers} × actor_infer by {push_kind(cluster)}: {gib(size)} in "
        f"buckets of {cluster.push_bucket_mib} MiB; prefix caches reset"
    )
    if work.separate_attn:
        copies = f"{cluster.attn.replicas} × actor_attn"
        yield f"                → {copies} by {push_kind_to_models(cluster)}: {gib(size)}"


def push_kind(cluster: ClusterConfig) -> PushKind:
    """How weights are sent to actor_infer: to vLLM by shared_memory, nccl or ipc."""
    if cluster.infer.engine == "transformers":
        return push_kind_to_models(cluster)
    if cluster.gpus == 0:
        return "shared_memory"
    return "ipc" if cluster.placement == "colocated" else "nccl"


def push_kind_to_models(cluster: ClusterConfig) -> PushKind:
    """How weights are sent to transformers models: through the machine's memory, to other machines by Ray's store."""
    return "shared_memory" if cluster.nodes == 1 else "object_store"


def _where(slots: tuple[Slot, ...]) -> str:
    if not slots[0].gpus:
        return "CPUs"
    nodes: dict[int, set[int]] = {}
    for slot in slots:
        nodes.setdefault(slot.node, set()).update(slot.gpus)
    return ", ".join(f"node {node} GPUs {_ranges(sorted(gpus))}" for node, gpus in nodes.items())


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] → 0–2, 5."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 5e7 else f"{number / 1e6:.2f} M"


def _plural(count: int, noun: str) -> str:
    return noun if count == 1 else noun + "s"
