"""rhythm-eval: a checkpoint and tasks in; pass@1, avg@n and pass@k with intervals, and every response, out."""

from __future__ import annotations

import argparse
import io
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from transformers.utils import logging as transformers_logging

from rhythm.cli.arguments import command_parser, config_and_overrides
from rhythm.cli.config_file import ConfigError, dump_config, read_config
from rhythm.cli.config_keys import config_keys, describe
from rhythm.cli.failures import ErrorConsole, ExitCode, command, show
from rhythm.evaluation.config import EvaluationConfig, MachineConfig
from rhythm.evaluation.engine import placed, read_checkpoint
from rhythm.evaluation.page import table
from rhythm.evaluation.run import (
    REPORT,
    RESPONSES,
    RESULTS,
    Evaluation,
    ask_tasks,
    default_directory,
    evaluate_checkpoint,
)

ALIASES = ("model", "out")


class CommandConfig(MachineConfig, EvaluationConfig, extra="forbid", frozen=True):
    """All that rhythm-eval can be told."""

    @property
    def evaluation(self) -> EvaluationConfig:
        """What decides the results."""
        return EvaluationConfig(**{name: getattr(self, name) for name in EvaluationConfig.model_fields})

    @property
    def machine(self) -> MachineConfig:
        """Where they are computed and written."""
        return MachineConfig(**{name: getattr(self, name) for name in MachineConfig.model_fields})


@command("rhythm-eval", {ValueError: ExitCode.BAD_INPUT})
def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code, as `ExitCode` says."""
    arguments = _parser().parse_intermixed_args(argv)
    sys.path.append(str(Path.cwd()))  # for a task of one's own; last, so that nothing there shadows an installed module
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if arguments.help:
        show(_help(arguments))
        return ExitCode.DONE
    config = _config(arguments)
    if arguments.dry_run:
        show(_dry_run(config))
        return ExitCode.DONE
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    directory = config.out or default_directory(config.model)
    try:
        evaluation = evaluate_checkpoint(config.evaluation, config.machine, ErrorConsole())
    except (ValueError, OSError, KeyboardInterrupt) as error:
        if any((directory / RESPONSES).glob("*.jsonl")):
            error.add_note(f"rhythm-eval: finished responses stay in {directory}; the same command goes on from there")
        raise
    show(_shown(evaluation))
    return ExitCode.DONE


def _config(arguments: argparse.Namespace) -> CommandConfig:
    """Raises ConfigError naming the keys at fault."""
    path, overrides = config_and_overrides(arguments.words)
    given = {name: value for name in ALIASES if (value := getattr(arguments, name)) is not None}
    if twice := [name for name in given if any(override.startswith(f"{name}=") for override in overrides)]:
        raise ConfigError(f"{twice[0]} is given twice: --{twice[0]} {given[twice[0]]} is short for {twice[0]}=…")
    return read_config(CommandConfig, path, overrides, given=given, like=DEFAULTS)


DEFAULTS = CommandConfig.model_construct(model=Path("…"), tasks=())


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "rhythm-eval",
        "[CONFIG] --model DIR tasks='[NAME, …]' [key=value …] [--dry-run]",
        "Generate and score responses to the tasks' test problems; write pass@1, avg@n and pass@k with 95% intervals\n"
        "(results.json, report.html) and every response (responses/*.jsonl). The same command again goes on where it\n"
        "stopped.",
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="CONFIG key=value",
        help="a YAML file, which may be left out; overrides, for example samples=16 sampling.temperature=0.6",
    )
    for name in ALIASES:
        parser.add_argument(f"--{name}", metavar="DIR", help=f"short for {name}=DIR")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved configuration, and what there is to do"
    )
    parser.add_argument("-h", "--help", action="store_true", help="print this, with every key and its default")
    return parser


def _help(arguments: argparse.Namespace) -> str:
    """With a configuration: its values as defaults."""
    path, _ = config_and_overrides(arguments.words)
    config = DEFAULTS if path is None else _config(arguments)
    source = "defaults" if path is None else f"values of {path}"
    return (
        f"{_parser().format_help()}\nkeys of the configuration, their types and {source}:\n"
        f"{describe(list(config_keys(config)))}"
    )


def _dry_run(config: CommandConfig) -> str:
    """YAML, what follows from it in comments. Loads no weights and writes nothing."""
    _, asked = ask_tasks(config.evaluation, read_checkpoint(config.evaluation, config.machine))
    device, dtype = placed(config.device, config.dtype)
    lines = [f"# model: on {device}, dtype {str(dtype).removeprefix('torch.')}, engine {config.engine}"]
    for item in asked:
        plan, problems = item.plan, item.responses // item.plan.samples
        metrics = ", ".join([f"avg@{plan.samples}", *(f"pass@{k}" for k in plan.ks)])
        lines.append(f"# {plan.title}: {problems} problems × {plan.samples} = {item.responses} responses; {metrics}")
    out = config.out or default_directory(config.model)
    kept = sum(path.read_bytes().count(b"\n") for path in (out / RESPONSES).glob("*.jsonl"))
    lines.append(f"# out: {out}" + (f", which has {kept} responses already" if kept else ""))
    return dump_config(config) + "# derived\n" + "\n".join(lines)


def _shown(evaluation: Evaluation) -> str:
    """The table, and where everything is."""
    console = Console(file=io.StringIO(), width=100)
    console.print(table(evaluation.scores))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    lines = [line.rstrip() for line in text.splitlines()]
    return "\n".join([*lines, *(str(evaluation.directory / name) for name in (RESULTS, REPORT))])


if __name__ == "__main__":
    sys.exit(main())
