"""Which method a run or an evaluation is, by its recorded configuration, the paper's names and what differs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from rhythm.reports.evaluations import holds_an_evaluation, load_evaluation
from rhythm.reports.run import Run, load_run

BASELINE = "GRPO"
NAMES = {
    "none": BASELINE,
    "random": "+ random credit",
    "entropy": "+ high-entropy credit",
    "global_anchor": "+ global-anchor credit",
    "local_chunk": "+ local-chunk credit",
    "coupled": "+ coupled rhythm credit",
}
"""Strategies in the order and by the names of the paper's Tables 3 and 4; another one goes by its own."""
SHORT = {"global_anchor": "Global", "local_chunk": "Local", "coupled": "Coupled", "entropy": "Entropy"}
"""Of Table 5."""
USUAL_FRACTION = 0.4
NO_OTHER_METHOD = (
    "name", "runs_dir", "seed", "tensorboard", "wandb", "profile_steps", "checkpoint.", "cluster.", "reward.",
    "warm_start.cache_dir", "model.device", "model.gradient_checkpointing", "batch.micro_batch_size",
    "batch.log_prob_micro_batch_size", "batch.max_tokens", "batch.share_prompts", "optimizer.token_chunk",
    "sampling.rows_at_once", "signals.backend", "evaluation.samples", "evaluation.rhythm_responses",
    "evaluated.sampling.rows_at_once",
)  # fmt: skip
"""Keys and sections, by how they begin, that say only where and how a run was computed and what else it wrote: they
make no other method and no other block.
"""
OF_THE_METHOD = ("cluster.rollout_ahead", "cluster.parity.every_steps", "cluster.max_length")
"""Of these sections, the keys that do."""
_UNLESS_SAID = {"cluster.rollout_ahead": 0}  # of a run without a cluster, too
_WHICH_CHECKPOINT = ("model", "engine", "dtype")


@dataclass(frozen=True)
class MethodRun:
    """A run, or an evaluation of a checkpoint, and what it is.

    config: dotted key → value, empty where the run recorded none. method: its label in tables. block: what differs
    from other runs beside the credit and the seed, such as the model; only runs of one block are compared. ablation:
    the label in Table 5, which tells the selection, too. seed: None where it is not recorded. evaluated: of an
    evaluation, its settings.
    """

    run: Run
    directory: Path
    config: Mapping[str, Any]
    seed: int | None
    method: str = ""
    block: str = ""
    ablation: str = ""
    usual: bool = True
    rank: tuple[int, ...] = field(default=())
    evaluated: Mapping[str, Any] | None = None


def load_runs(directories: Sequence[Path], labels: Mapping[str, str]) -> list[MethodRun]:
    """The runs with their methods, ordered by block, method and seed.

    Args:
        labels: names of methods, by the run's directory name or path, in place of the name read off the configuration.

    Raises ValueError: a directory without metrics, a config.yaml that can't be read, a label for none of the runs, two
    runs of one method with the same seed.
    """
    loaded = [_load(Path(directory)) for directory in directories]
    unknown = sorted(set(labels) - {name for run in loaded for name in (run.run.name, str(run.directory))})
    if unknown:
        raise ValueError(f"labels.{unknown[0]} names none of the runs: {', '.join(run.run.name for run in loaded)}")
    configs = [run.config for run in loaded if run.config]
    differing, fraction = _differing(configs), _usual_fraction(configs)
    named = [_named(run, differing, fraction, labels) for run in loaded]
    seen: dict[tuple[str, str, str, int | None], MethodRun] = {}
    for run in named:
        key = (run.block, run.method, run.ablation, run.seed)
        if key in seen:
            raise ValueError(
                f"{seen[key].directory} and {run.directory} are both {run.method}, seed {run.seed}: give one of them a "
                f"label of its own, labels='{{{run.run.name}: …}}'"
            )
        seen[key] = run
    return sorted(named, key=lambda run: (run.block, run.rank, run.method, -1 if run.seed is None else run.seed))


def _load(directory: Path) -> MethodRun:
    evaluated = None
    if holds_an_evaluation(directory):
        evaluation = load_evaluation(directory)
        run, evaluated = evaluation.run, evaluation.settings
    else:
        run = load_run(directory)
    config: dict[str, Any] = {}
    if run.config is not None:
        try:
            values = yaml.safe_load(run.config)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ValueError(f"{directory / 'config.yaml'} is not YAML: {str(error).splitlines()[0]}") from error
        if isinstance(values, Mapping):
            config = dict(flat(values))
    seed = config.get("seed")
    if config and evaluated is not None:
        how = {key: value for key, value in evaluated.items() if key not in _WHICH_CHECKPOINT}
        config |= {f"evaluated.{key}": value for key, value in flat(how)}
    return MethodRun(run, directory, config, seed if isinstance(seed, int) else None, evaluated=evaluated)


def _named(run: MethodRun, differing: set[str], usual_fraction: float, labels: Mapping[str, str]) -> MethodRun:
    label = labels.get(run.run.name) or labels.get(str(run.directory))
    config = run.config
    strategy = config.get("credit.strategy")
    if strategy is None:
        name = label or run.run.name
        return replace(run, method=name, ablation=name, rank=(len(NAMES) + 1,))
    block = ", ".join(
        f"{key}={_value(config, key)}"
        for key in sorted(differing)
        if not key.startswith("credit.") and _decides(config, key)
    )
    select, fraction = config.get("credit.select", "top"), config.get("credit.top_fraction", USUAL_FRACTION)
    usual = label is not None or strategy == "none" or (select == "top" and fraction == usual_fraction)
    name = NAMES.get(strategy, f"+ {strategy} credit")
    ablation = name
    if strategy not in ("none", "random"):
        ablation = f"{SHORT.get(strategy, strategy)} ({select.capitalize()}-{100 * fraction:.4g}%)"
    elif strategy == "random" and not usual:
        ablation = f"Random ({100 * fraction:.4g}%)"
    others = []
    if strategy != "none":  # γ is 1 whatever the other keys say
        told = {"credit.strategy", "credit.select", "credit.top_fraction"}
        others = [f"{key.removeprefix('credit.')}={config.get(key)}" for key in sorted(differing - told)
                  if key.startswith("credit.") and key in config]  # fmt: skip
    tail = f", {', '.join(others)}" if others else ""
    method = label or (name if usual else ablation) + tail
    order = list(NAMES).index(strategy) if strategy in NAMES else len(NAMES)
    rank = (order, 0 if select == "top" else 1, round(1000 * fraction))
    return replace(run, method=method, block=block, ablation=label or ablation + tail, usual=usual, rank=rank)


def _usual_fraction(configs: Sequence[Mapping[str, Any]]) -> float:
    """The paper's 0.4 where a run has it, else the commonest."""
    fractions = [
        c["credit.top_fraction"] for c in configs if c.get("credit.strategy") != "none" and "credit.top_fraction" in c
    ]
    return max(
        fractions, key=lambda fraction: (fraction == USUAL_FRACTION, fractions.count(fraction)), default=USUAL_FRACTION
    )


def _differing(configs: Sequence[Mapping[str, Any]]) -> set[str]:
    """Keys in which the runs differ, but for where and by which seed they ran."""
    keys = set()
    for key in {key for config in configs for key in config}:
        if key.startswith(NO_OTHER_METHOD) and key not in OF_THE_METHOD:
            continue
        if len({repr(_value(config, key)) for config in configs if _decides(config, key)}) > 1:
            keys.add(key)
    return keys


def _decides(config: Mapping[str, Any], key: str) -> bool:
    """Whether the key changes anything there: `none` has no γ to differ in; what a run evaluated while it trained is
    not what rhythm-eval made of its checkpoint; only a cluster has a max_length; and only where rollouts are drawn
    ahead does it matter which of them are not, as they are compared for parity.
    """
    if key.startswith("credit."):
        return config.get("credit.strategy") != "none"
    if key.startswith("evaluation."):
        return "evaluated.tasks" not in config
    if key == "cluster.parity.every_steps":
        return bool(config.get("cluster.rollout_ahead"))
    return key != "cluster.max_length" or key in config


def _value(config: Mapping[str, Any], key: str) -> Any:
    return config.get(key, _UNLESS_SAID.get(key))


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values; an empty section is a value."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
