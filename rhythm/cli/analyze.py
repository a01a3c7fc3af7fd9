"""rhythm-analyze: writes a report on a checkpoint's attention while it solves given problems."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, Field, field_validator
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from rhythm import _C
from rhythm.analysis import Analysis, AnalysisConfig, analyze, read_problems
from rhythm.analysis.extend import extend_analysis
from rhythm.analysis.grid import SensitivityConfig
from rhythm.analysis.lengths import LengthsConfig
from rhythm.analysis.results import is_complete
from rhythm.analysis.run import end_ids_of
from rhythm.checkpoints import load_model, loading_options, refusal_names
from rhythm.cli.arguments import command_parser, config_and_overrides
from rhythm.cli.config_file import ConfigError, dump_config, read_config
from rhythm.cli.config_keys import config_keys, describe
from rhythm.cli.failures import ErrorConsole, ExitCode, command, show
from rhythm.engines.interfaces import Infer
from rhythm.engines.vllm.config import VllmConfig
from rhythm.engines.vllm.infer import VllmInfer

BAD_INPUT = ExitCode.BAD_INPUT
VLLM = VllmConfig(gpu_memory_utilization=0.5)  # leaves memory for the transformers model on the same GPU
ALIASES = ("model", "prompts", "out")
FURTHER = {
    "sensitivity": "also recompute γ of these responses by a grid of other settings (keys sensitivity.…)",
    "lengths": "also measure the first responses in contexts of 256 to 8192 tokens (keys lengths.…)",
}
"""Sections that an option of their name asks for, as do any of their keys; its help."""
FORMER_OPTIONS = {
    "--engine": "engine=…",
    "--device": "device=…",
    "--dtype": "dtype=…",
    "--trust-remote-code": "trust_remote_code=true",
    "--keep-going": "keep_going=true",
    "--chat": "chat=true",
    "--temperature": "sampling.temperature=…",
    "--top-p": "sampling.top_p=…",
    "--top-k": "sampling.top_k=…",
    "--max-new-tokens": "sampling.max_new_tokens=…",
    "--responses": "responses_per_problem=…",
    "--problems-at-once": "problems_at_once=…",
    "--pool": "signals.layers=…, for example all",
    "--quantile": "signals.quantile=…",
    "--window": "signals.window=…",
    "--horizon": "signals.horizon=…, for example [2,10], or [1,null] to the end",
    "--backend": "signals.backend=…",
    "--credit": "credit.strategy=…",
    "--peak-prominence": "peaks.prominence=…",
    "--peak-distance": "peaks.distance=…",
    "--follow": "peaks.follow=…",
    "--sentence-gap": "receivers.sentence_gap=…",
    "--permutations": "table2.permutations=…",
    "--null": "table2.null=…",
    "--no-counterfactuals": "counterfactuals=null",
    "--positions": "counterfactuals.positions=…",
    "--candidates": "counterfactuals.candidates=…",
    "--continuation-tokens": "counterfactuals.max_new_tokens=…",
    "--maps": "maps=…",
    "--seed": "seed=…",
    "--vllm-memory": "vllm.gpu_memory_utilization=…",
    "--vllm-kv-cache": "vllm.kv_cache_gib=…",
}
"""Former option → the key that replaces it."""


class InputConfig(BaseModel, extra="forbid", frozen=True):
    """What rhythm-analyze reads, where it writes, and how it computes."""

    model: Path = Field(description="required: directory of a causal transformers checkpoint with its tokenizer")
    prompts: Path = Field(
        description="required: a JSONL file; each row has prompt or question (as GSM8K), and optionally response, "
        "responses, answer"
    )
    out: Path = Field(description="required: directory of the results; finished ones in it are kept")
    engine: Literal["transformers", "vllm"] = Field(
        default="transformers", description="engine that generates responses"
    )
    device: str = Field(default="auto", description="auto (CUDA if available, else cpu), cpu, cuda, cuda:1 …")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="dtype of the model's weights; auto: float32 on a CPU, else the checkpoint's own"
    )
    generation_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="dtype in which a copy of the model generates responses and counterfactuals; auto: bfloat16 on a "
        "CPU with instructions for it, else the model's own",
    )
    trust_remote_code: bool = Field(default=False, description="run Python code contained in the checkpoint")
    keep_going: bool = Field(default=False, description="skip rows that can't be analyzed and report them at the end")
    vllm: VllmConfig = Field(default=VLLM, description="settings of the engine with engine=vllm")

    @field_validator("vllm", mode="before")
    @classmethod
    def _leaves_memory_for_the_model(cls, value: object) -> object:
        """Keep this command's default gpu_memory_utilization where the section sets only other keys."""
        our_own = {"gpu_memory_utilization": VLLM.gpu_memory_utilization}
        return our_own | dict(value) if isinstance(value, Mapping) else value


class CommandConfig(AnalysisConfig, InputConfig, extra="forbid", frozen=True):
    """The configuration of rhythm-analyze."""

    sensitivity: SensitivityConfig | None = Field(default=None, description="how γ depends on its settings; null: no")
    lengths: LengthsConfig | None = Field(default=None, description="other lengths of the context; null: none")

    @property
    def analysis(self) -> AnalysisConfig:
        """The settings that determine the results; they must not change when a directory is continued."""
        return AnalysisConfig(**{name: getattr(self, name) for name in AnalysisConfig.model_fields})


@command("rhythm-analyze", {ValueError: BAD_INPUT, RuntimeError: BAD_INPUT})
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns an `ExitCode`."""
    argv = sys.argv[1:] if argv is None else argv
    _refuse_former_options(argv)
    arguments = _parser().parse_intermixed_args(argv)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if arguments.help:
        show(_help(arguments))
        return ExitCode.DONE
    config = _config(arguments)
    if arguments.dry_run:
        show(_dry_run(config))
        return ExitCode.DONE
    try:
        analysis = _analyze(config, ErrorConsole())
    except (ValueError, RuntimeError, OSError, KeyboardInterrupt) as error:
        if kept := _kept(config.out):
            error.add_note(f"rhythm-analyze: {kept}")
        raise
    for failure in analysis.failures:
        print(f"rhythm-analyze: left out: {failure}", file=sys.stderr)
    show(str(analysis.directory / "report.html"))
    return ExitCode.DONE


def _analyze(config: CommandConfig, console: Console) -> Analysis:
    with refusal_names("set trust_remote_code=true", config.model):
        model, tokenizer = load(config.model, config.device, config.dtype, config.trust_remote_code)
    infer = _vllm(config, model, tokenizer) if config.engine == "vllm" else None
    try:
        analysis = analyze(
            model,
            tokenizer,
            config.prompts,
            out=config.out,
            config=config.analysis,
            infer=infer,
            generation_dtype=_generation_dtype(config.generation_dtype, model.device.type),
            model_name=str(config.model),
            keep_going=config.keep_going,
            console=console,
        )
    finally:
        if isinstance(infer, VllmInfer):
            infer.close()
    extend_analysis(model, tokenizer, analysis, sensitivity=config.sensitivity, lengths=config.lengths, console=console)
    return analysis


def load(directory: Path, device: str, dtype: str, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """Model and tokenizer of a transformers checkpoint. Raises ValueError if the directory is not a checkpoint, the
    model is not causal, or it needs code of its own and `trust_remote_code` is false.
    """
    _check_checkpoint(directory, trust_remote_code)
    device, dtype = _placed(device, dtype)
    loading = loading_options(trust_remote_code)
    model = load_model(
        directory,
        dtype="auto" if dtype == "auto" else getattr(torch, dtype),
        device=device,
        trust_remote_code=trust_remote_code,
    )
    return model, AutoTokenizer.from_pretrained(directory, **loading)


def _check_checkpoint(directory: Path, trust_remote_code: bool) -> Any:
    """Its configuration, without its weights. Raises ValueError as `load` does."""
    if not (directory / "config.json").is_file():
        raise ValueError(f"model is {directory}: no such checkpoint; it must be a directory with config.json")
    config = AutoConfig.from_pretrained(directory, **loading_options(trust_remote_code))
    if config.is_encoder_decoder:
        raise ValueError(f"model is {directory}: {config.model_type} is an encoder-decoder; the model must be causal")
    own_code = getattr(config, "auto_map", None) or {}
    if type(config) not in AutoModelForCausalLM._model_mapping and "AutoModelForCausalLM" not in own_code:
        raise ValueError(f"model is {directory}: {config.model_type} has no causal language model")
    return config


def _placed(device: str, dtype: str) -> tuple[str, str]:
    """Device and dtype with auto resolved; dtype stays auto where the checkpoint's own is to be used."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return device, "float32" if dtype == "auto" and device == "cpu" else dtype


def _generation_dtype(asked: str, device: str) -> torch.dtype | None:
    """None: the model's own."""
    if asked != "auto":
        dtype: torch.dtype = getattr(torch, asked)
        return dtype
    return torch.bfloat16 if device == "cpu" and "avx512_bf16" in _C.available_isas() else None


def _vllm(config: CommandConfig, model: Any, tokenizer: Any) -> Infer:
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(
            "engine is vllm: vLLM is not installed; pip install '.[cluster]' in a clone of rhythm, or use transformers"
        )
    ends = end_ids_of(model, tokenizer)
    return VllmInfer(
        config.model,
        config.vllm,
        max_length=model.config.get_text_config().max_position_embeddings,
        end_ids=ends,
        pad_id=ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        dtype=model.dtype,
        trust_remote_code=config.trust_remote_code,
    )


def _refuse_former_options(argv: Sequence[str]) -> None:
    """Raise ConfigError for a former option, naming the key that replaces it."""
    for word in argv:
        option = word.partition("=")[0]
        if option in FORMER_OPTIONS:
            raise ConfigError(f"{option} is now {FORMER_OPTIONS[option]}")


def _config(arguments: argparse.Namespace, *, placeholders: bool = False) -> CommandConfig:
    """The configuration of a command line. Raises ConfigError naming the wrong keys."""
    path, overrides = config_and_overrides(arguments.words)
    given = {name: value for name in ALIASES if (value := getattr(arguments, name)) is not None}
    if twice := [name for name in given if any(override.startswith(f"{name}=") for override in overrides)]:
        raise ConfigError(f"{twice[0]} is given twice: --{twice[0]} {given[twice[0]]} is short for {twice[0]}=…")
    wanted = [name for name in FURTHER if getattr(arguments, name)]
    return read_config(CommandConfig, path, overrides, given=given, wanted=wanted, placeholders=placeholders)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "rhythm-analyze",
        "[CONFIG] model=DIR prompts=FILE out=DIR [key=value …] [--dry-run]",
        "Generate responses (or read them from the file), observe each in one forward pass, and write report.html,\n"
        "results.json, CSV files and figures into out. The same command again continues where it stopped.",
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="CONFIG key=value",
        help="an optional YAML file, and overrides, for example sampling.temperature=0",
    )
    for name, metavar in zip(ALIASES, ("DIR", "FILE", "DIR"), strict=True):
        parser.add_argument(f"--{name}", metavar=metavar, help=f"short for {name}={metavar}")
    for name, meaning in FURTHER.items():
        parser.add_argument(f"--{name}", action="store_true", help=meaning)
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved configuration and the work to do, then exit"
    )
    parser.add_argument("-h", "--help", action="store_true", help="print this, with every key and its default")
    return parser


def _help(arguments: argparse.Namespace) -> str:
    """The text of --help; a given configuration and overrides replace the defaults it shows."""
    config = _config(arguments, placeholders=True)
    path, _ = config_and_overrides(arguments.words)
    source = "defaults" if path is None else f"values of {path}"
    return (
        f"{_parser().format_help()}\nkeys of the configuration, their types and {source} (… is required; "
        f"counterfactuals=null leaves out Table 1):\n{describe(list(config_keys(config)))}"
    )


def _dry_run(config: CommandConfig) -> str:
    """The configuration as YAML, with derived values in comments. Reads no weights and no pipe; writes nothing."""
    with refusal_names("set trust_remote_code=true", config.model):
        model = _check_checkpoint(config.model, config.trust_remote_code)
    device, dtype = _placed(config.device, config.dtype)
    generates = str(_generation_dtype(config.generation_dtype, device) or dtype).removeprefix("torch.")
    return (
        f"{dump_config(config)}"
        "# derived\n"
        f"# model: {model.model_type} on {device}, dtype {dtype}; generates in {generates}\n"
        f"# problems: {_problems(config)}\n"
        f"{_settings(config)}"
        f"# out: {_kept(config.out) or f'nothing finished yet in {config.out}'}"
    )


def _problems(config: CommandConfig) -> str:
    """The numbers of problems and responses. Raises ValueError for an invalid row, unless keep_going is set."""
    if config.prompts.exists() and not config.prompts.is_file() and not config.prompts.is_dir():
        return "unknown: prompts is a pipe, which can be read only once"
    failures: list[str] = []
    on_error = (lambda error: failures.append(str(error))) if config.keep_going else None
    given = [len(problem.responses) for problem in read_problems(config.prompts, on_error)]
    generated = given.count(0)
    left_out = f"; left out: {len(failures)}" if failures else ""
    return (
        f"{len(given)}; responses: {sum(given)} given, {generated} × {config.responses_per_problem}"
        f" = {generated * config.responses_per_problem} generated{left_out}"
    )


def _settings(config: CommandConfig) -> str:
    """A line with the number of settings that --sensitivity compares; empty without it."""
    if config.sensitivity is None:
        return ""
    return f"# sensitivity: {sum(1 for _ in config.sensitivity.settings(config.credit, config.signals)):,} settings\n"


def _kept(directory: Path) -> str:
    """A line that says how many finished responses are kept, and how many that lack counterfactuals; empty if there are
    none.
    """
    complete = [is_complete(path) for path in (directory / "responses").glob("*.json")]
    kept = []
    if count := sum(complete):
        kept.append("1 finished response is kept" if count == 1 else f"{count} finished responses are kept")
    if count := len(complete) - sum(complete):
        kept.append(f"{count} without {'its' if count == 1 else 'their'} counterfactuals yet")
    return f"{', '.join(kept)} in {directory}" if kept else ""


if __name__ == "__main__":
    sys.exit(main())
