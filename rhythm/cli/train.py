"""rhythm-train: trains a policy as a configuration file and overrides say."""

from __future__ import annotations

import argparse
import logging
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler
from transformers.utils import logging as transformers_logging

from rhythm.cli.arguments import command_parser, config_and_overrides
from rhythm.cli.config_file import ConfigError, dump_config, load_config, load_for_help
from rhythm.cli.config_keys import config_keys, describe
from rhythm.cli.failures import SIGNALLED, ErrorConsole, ExitCode, command, show
from rhythm.engines.parity import ParityError
from rhythm.trainer.checkpoint import DamagedCheckpointError
from rhythm.trainer.cluster_engines import plan
from rhythm.trainer.config import BatchConfig, TrainConfig
from rhythm.trainer.loop import NonFiniteRunError, RunSummary, run
from rhythm.trainer.run_dir import CHECKPOINTS, CONFIG, RunDirectoryError
from rhythm.trainer.setup import SetupError

_FAILURES: dict[type[Exception], ExitCode] = {
    ConfigError: ExitCode.BAD_INPUT,
    SetupError: ExitCode.BAD_INPUT,
    RunDirectoryError: ExitCode.BAD_INPUT,
    DamagedCheckpointError: ExitCode.BAD_INPUT,
    NonFiniteRunError: ExitCode.NOT_FINITE,
    FloatingPointError: ExitCode.NOT_FINITE,  # of the warm start
    ParityError: ExitCode.NO_PARITY,
}


@command("rhythm-train", _FAILURES)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns an `ExitCode`, or 128 + the signal that stopped the run."""
    arguments = _parser().parse_intermixed_args(argv)
    path, overrides = config_and_overrides(arguments.words)
    sys.path.append(str(Path.cwd()))  # to find the user's own task; last, so that it shadows no installed module
    if arguments.help:
        show(_help(path, overrides))
        return ExitCode.DONE
    if path is None:
        raise ConfigError("no configuration given: rhythm-train CONFIG, or rhythm-train --help")
    config = load_config(path, overrides)
    if arguments.dry_run:
        show(_dry_run(config))
        return ExitCode.DONE
    return _train(config, _control(config, path, overrides), resume=arguments.resume)


def _train(config: TrainConfig, control: str, *, resume: bool) -> int:
    console = ErrorConsole()
    _log_to(console)
    try:
        summary = run(config, resume=resume, console=console)
    except KeyboardInterrupt as error:
        error.add_note("training had not begun, so there is nothing to save")
        raise
    except OSError as error:
        if (config.run_dir / CONFIG).is_file():
            saved = max(
                (path.name for path in config.run_dir.glob(f"{CHECKPOINTS}/step_*")), default="no checkpoint yet"
            )
            error.add_note(f"finished files are kept ({saved}); solve the problem, then continue with --resume")
        raise
    show(_summary(summary, config, control))
    return ExitCode.DONE if summary.stopped_by is None else SIGNALLED + summary.stopped_by


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "rhythm-train",
        "CONFIG [key=value …] [--resume] [--dry-run]",
        "Train a policy with GRPO, with token-level credit from attention statistics.",
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="CONFIG key=value",
        help="a YAML file, and overrides, for example optimizer.lr=1e-5",
    )
    parser.add_argument("--resume", action="store_true", help="continue the run in its directory, or start it there")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the configuration, batch sizes and a cluster's plan, then exit",
    )
    parser.add_argument("-h", "--help", action="store_true", help="print this, with every key and its default")
    return parser


def _help(path: Path | None, overrides: Sequence[str]) -> str:
    """The text of --help; configuration and overrides replace the defaults it shows, and say whose options."""
    config = load_for_help(path, overrides)
    source = "defaults" if path is None else f"values of {path}"
    keys = describe(list(config_keys(config)))
    return f"{_parser().format_help()}\nkeys of the configuration, their types and {source}:\n{keys}"


def _dry_run(config: TrainConfig) -> str:
    """The configuration as YAML, with derived values and the cluster's plan in comments."""
    batch = config.batch
    return (
        f"{dump_config(config)}"
        "# derived\n"
        f"# batch size: {batch.prompts_per_batch} prompts × {batch.responses_per_prompt} responses"
        f" = {batch.batch_size} responses\n"
        f"# gradient steps per batch: {batch.batch_size} / {batch.mini_batch_size} = {batch.gradient_steps}\n"
        f"# passes per gradient step: {_passes(batch)}\n"
        f"# gradient steps of the run: {config.steps} × {batch.gradient_steps}"
        f" = {config.steps * batch.gradient_steps}\n"
        f"# run directory: {config.run_dir}"
        f"{_plan(config)}"
    )


def _passes(batch: BatchConfig) -> str:
    if batch.max_tokens is not None:
        return f"as few as {batch.max_tokens:,} tokens in each allow"
    return f"{batch.mini_batch_size} / {batch.micro_batch_size} = {batch.micro_batches}"


def _plan(config: TrainConfig) -> str:
    """The cluster's plan as comments; empty without a cluster."""
    if config.cluster is None:
        return ""
    try:
        lines = plan(config, config.cluster).splitlines()
    except ValueError as error:
        raise SetupError(str(error)) from error
    return "".join(f"\n# {line}" for line in lines)


def _control(config: TrainConfig, path: Path, overrides: Sequence[str]) -> str:
    """The command that trains the same without γ, at the same seed and mass; empty where this run is that."""
    if config.credit.strategy == "none":
        return ""
    others = ["credit.random_like=null"] if config.credit.random_like is not None else []
    words = [str(path), *overrides, f"name={config.name}-control", "credit.strategy=none", *others]
    return shlex.join(["rhythm-train", *words])


def _summary(summary: RunSummary, config: TrainConfig, control: str) -> str:
    """`control` stands beside the lift, which is that of all of training and says nothing about γ."""
    lines = []
    if summary.stopped_by is not None:
        lines.append(
            f"stopped by {summary.stopped_by.name} after step {summary.step}; saved in "
            f"{summary.run_dir / 'checkpoints'}; continue with --resume"
        )
    lines.append(f"accuracy at the start   {_percent(summary.start_accuracy)}")
    if not math.isnan(summary.final_accuracy):
        lift = 100 * (summary.final_accuracy - summary.start_accuracy)
        lines.append(f"accuracy after step {summary.step:<4}{_percent(summary.final_accuracy)}")
        lines.append(
            f"lift                    {lift:+.1f} points by training with credit.strategy={config.credit.strategy}"
        )
        if control:
            lines.append(f"without γ               not measured by this run; the control: {control}")
    lines.append(f"best accuracy           {_percent(summary.best_accuracy)} after step {summary.best_step}")
    lines.append(f"report                  {summary.report}")
    return "\n".join(lines)


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _log_to(console: Console) -> None:
    if console.is_terminal:
        handler: logging.Handler = RichHandler(console=console, show_path=False, log_time_format="[%X]")
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler], force=True)
    transformers_logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
