"""rhythm-analyze: a checkpoint and problems in, a report on its attention out."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from rhythm.analysis import Analysis, AnalysisConfig, analyze
from rhythm.analysis.run import end_ids_of
from rhythm.checkpoints import load_model, loading_options, refusal_names
from rhythm.cli.failures import EXIT_CODES, ErrorConsole, ExitCode, command, show
from rhythm.credit.config import HORIZONS
from rhythm.engines.interfaces import Infer
from rhythm.engines.vllm.infer import VllmConfig, VllmInfer
from rhythm.ops.backends import NAMES as BACKENDS

BAD_INPUT = ExitCode.BAD_INPUT
TO_THE_END = (1, None)  # FAI as in the paper's analysis, appendix A.1


@command("rhythm-analyze", {ValueError: BAD_INPUT, RuntimeError: BAD_INPUT})
def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code, as `ExitCode` says."""
    arguments = _parser().parse_args(argv)
    console = ErrorConsole()
    transformers_logging.set_verbosity_error()
    try:
        analysis = _analyze(arguments, console)
    except (ValueError, RuntimeError, OSError, KeyboardInterrupt) as error:
        if kept := _kept(arguments.out):
            error.add_note(kept)
        raise
    for failure in analysis.failures:
        print(f"rhythm-analyze: left out: {failure}", file=sys.stderr)
    show(str(analysis.directory / "report.html"))
    return ExitCode.DONE


def _analyze(arguments: argparse.Namespace, console: Console) -> Analysis:
    config = _config(arguments)
    with refusal_names("give --trust-remote-code", arguments.model):
        model, tokenizer = load(arguments.model, arguments.device, arguments.dtype, arguments.trust_remote_code)
    infer = _vllm(arguments, model, tokenizer) if arguments.engine == "vllm" else None
    try:
        return analyze(
            model,
            tokenizer,
            arguments.prompts,
            out=arguments.out,
            config=config,
            infer=infer,
            model_name=str(arguments.model),
            keep_going=arguments.keep_going,
            console=console,
        )
    finally:
        if isinstance(infer, VllmInfer):
            infer.close()


def load(directory: Path, device: str, dtype: str, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """Model and tokenizer of a transformers checkpoint. Raises ValueError for what is none, or not causal, or needs
    code of its own without `trust_remote_code`.
    """
    if not (directory / "config.json").is_file():
        raise ValueError(f"--model {directory}: no such checkpoint; it must be a directory with config.json")
    loading = loading_options(trust_remote_code)
    config = AutoConfig.from_pretrained(directory, **loading)
    if config.is_encoder_decoder:
        raise ValueError(f"--model {directory}: {config.model_type} is an encoder-decoder; the model must be causal")
    own_code = getattr(config, "auto_map", None) or {}
    if type(config) not in AutoModelForCausalLM._model_mapping and "AutoModelForCausalLM" not in own_code:
        raise ValueError(f"--model {directory}: {config.model_type} has no causal language model")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "auto"
    model = load_model(
        directory,
        dtype="auto" if dtype == "auto" else getattr(torch, dtype),
        device=device,
        trust_remote_code=trust_remote_code,
    )
    return model, AutoTokenizer.from_pretrained(directory, **loading)


def _vllm(arguments: argparse.Namespace, model: Any, tokenizer: Any) -> Infer:
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(
            "--engine vllm: vLLM is not installed; pip install '.[cluster]' in a clone of rhythm, or take transformers"
        )
    ends = end_ids_of(model, tokenizer)
    return VllmInfer(
        arguments.model,
        VllmConfig(gpu_memory_utilization=arguments.vllm_memory, kv_cache_gib=arguments.vllm_kv_cache),
        max_length=model.config.get_text_config().max_position_embeddings,
        end_ids=ends,
        pad_id=ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        dtype=model.dtype,
    )


def _config(arguments: argparse.Namespace) -> AnalysisConfig:
    """Raises ValueError naming the options that are out of range."""
    signals = {"window": arguments.window, "horizon": arguments.horizon, "quantile": arguments.quantile}
    try:
        return AnalysisConfig.model_validate(
            {
                "sampling": {
                    "temperature": arguments.temperature,
                    "top_p": arguments.top_p,
                    "top_k": arguments.top_k,
                    "max_new_tokens": arguments.max_new_tokens,
                },
                "responses_per_problem": arguments.responses,
                "problems_at_once": arguments.problems_at_once,
                "signals": {**signals, "backend": arguments.backend, "layers": arguments.layers},
                "credit": {"strategy": arguments.credit},
                "peaks": {
                    "prominence": arguments.peak_prominence,
                    "distance": arguments.peak_distance,
                    "follow": arguments.follow,
                },
                "receivers": {"sentence_gap": arguments.sentence_gap},
                "table2": {"permutations": arguments.permutations, "null": arguments.null},
                "counterfactuals": None
                if arguments.no_counterfactuals
                else {
                    "positions": arguments.positions,
                    "candidates": arguments.candidates,
                    "max_new_tokens": arguments.continuation_tokens,
                },
                "chat": arguments.chat,
                "maps": arguments.maps,
                "seed": arguments.seed,
            }
        )
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}, got {each['input']!r}" for each in error.errors()]
        raise ValueError("; ".join(lines)) from error


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults behind the options, and the exit codes a line each."""


def _parser() -> argparse.ArgumentParser:
    defaults = AnalysisConfig()
    assert defaults.counterfactuals is not None
    parser = argparse.ArgumentParser(
        prog="rhythm-analyze",
        description="Generate (or take) responses, observe each in one forward pass, and write OUT/report.html, "
        "results.json, CSV files and figures. The same command again goes on where it stopped.",
        formatter_class=_HelpFormatter,
        epilog=EXIT_CODES,
    )
    need = parser.add_argument_group("needed")
    need.add_argument("--model", type=Path, required=True, metavar="DIR", help="a causal transformers checkpoint")
    need.add_argument(
        "--prompts",
        type=Path,
        required=True,
        metavar="FILE",
        help="JSONL; a row has prompt, or question (GSM8K), and perhaps response, responses, answer",
    )
    need.add_argument("--out", type=Path, required=True, metavar="DIR", help="where results go; finished ones stay")
    add = parser.add_argument
    add("--engine", choices=("transformers", "vllm"), default="transformers", help="generates responses")
    add("--device", default="auto", help="auto: CUDA where there is one")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="auto: float32 on a CPU")
    add("--trust-remote-code", action="store_true", help="run Python code that the checkpoint brings along")
    add("--keep-going", action="store_true", help="leave out rows that can't be analysed, and say which")
    add("--chat", action="store_true", help="put prompts into the tokenizer's chat template")
    sampling = defaults.sampling
    add("--temperature", type=float, default=sampling.temperature, help="0 takes the likeliest token")
    add("--top-p", type=float, default=sampling.top_p, help="sample within this probability mass")
    add("--top-k", type=int, default=sampling.top_k, help="sample among this many tokens; 0: all")
    add("--max-new-tokens", type=int, default=sampling.max_new_tokens, help="longest response")
    add("--responses", type=int, default=defaults.responses_per_problem, help="generated to each problem")
    add("--problems-at-once", type=int, default=defaults.problems_at_once, help="generated together")
    add("--layers", type=_layers, default=None, help="whose heads are sorted: how many to sample (5), I,J,… or all")
    add("--quantile", type=float, default=defaults.signals.quantile, help="share of local, and of global heads")
    add("--window", type=int, default=defaults.signals.window, help="W of WAAD, tokens")
    add(
        "--horizon",
        type=_horizon,
        default="10,50",
        metavar="LO,HI",
        help=f"of FAI, tokens; LO, is to the end; or {', '.join(HORIZONS)}, or end (1,)",
    )
    add("--backend", choices=sorted(BACKENDS), default=defaults.signals.backend, help="of the statistics")
    add("--credit", default=defaults.credit.strategy, help="strategy of γ, as in training")
    add("--peak-prominence", type=float, default=defaults.peaks.prominence, help="in standard deviations of the curve")
    add("--peak-distance", type=int, default=defaults.peaks.distance, help="least distance of peaks, tokens")
    add("--follow", type=int, default=defaults.peaks.follow, help="tokens by which an FAI peak may follow a WAAD peak")
    add("--sentence-gap", type=int, default=defaults.receivers.sentence_gap, help="least distance of sentences")
    add("--permutations", type=int, default=defaults.table2.permutations, help="of peaks, for Table 2")
    add("--null", choices=("rotate", "shuffle"), default=defaults.table2.null, help="how peaks are permuted")
    add("--no-counterfactuals", action="store_true", help="leave Table 1 out")
    trials = defaults.counterfactuals
    add("--positions", type=int, default=trials.positions, help="of highest, and of lowest FAI, for Table 1")
    add("--candidates", type=int, default=trials.candidates, help="replacements at each position")
    add("--continuation-tokens", type=int, default=trials.max_new_tokens, help="longest continuation")
    add("--maps", type=int, default=defaults.maps, help="first responses that get attention maps")
    add("--seed", type=int, default=defaults.seed, help="of sampling and permutations")
    add("--vllm-memory", type=float, default=0.5, help="share of the GPU that vLLM takes; the model needs the rest")
    add("--vllm-kv-cache", type=float, default=None, metavar="GIB", help="size of vLLM's KV cache; needed on CPUs")
    return parser


def _layers(text: str) -> object:
    """A count, indices with commas, or the word "all"."""
    return yaml.safe_load(f"[{text}]" if "," in text else text)


def _horizon(text: str) -> object:
    """A name, or "LO,HI", or "LO,". Raises ValueError for anything else."""
    if text in HORIZONS:
        return text
    if text == "end":
        return TO_THE_END
    low, comma, high = text.partition(",")
    if not comma:
        raise argparse.ArgumentTypeError(f"{text!r} is neither LO,HI nor LO, nor one of {', '.join(HORIZONS)}, end")
    try:
        return int(low), int(high) if high.strip() else None
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} does not hold whole numbers") from error


def _kept(directory: Path) -> str:
    """What is finished stays: a line that says so, or nothing."""
    if count := sum(1 for _ in (directory / "responses").glob("*.json")):
        kept = "1 finished response stays" if count == 1 else f"{count} finished responses stay"
        return f"rhythm-analyze: {kept} in {directory}"
    return ""


if __name__ == "__main__":
    sys.exit(main())
