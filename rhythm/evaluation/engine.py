"""Opens a checkpoint: an engine that generates responses, the tokenizer and the context length."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer

from rhythm.checkpoints import checkpoint_end_tokens, load_model, loading_options, refusal_names
from rhythm.engines.interfaces import SeededInfer
from rhythm.engines.local.infer import GenerateInfer, max_positions
from rhythm.engines.vllm.infer import VllmInfer
from rhythm.evaluation.config import EvaluationConfig, MachineConfig
from rhythm.system.extras import missing

_WEIGHTS = ("*.safetensors", "*.bin")
_EDGE_BYTES = 1 << 20


@dataclass(frozen=True)
class Answerer:
    """context: longest prompt and response together, in tokens."""

    infer: SeededInfer
    tokenizer: Any
    context: int


def check_checkpoint(directory: Path) -> None:
    """Raise ValueError if there is no checkpoint."""
    if not directory.is_dir():
        raise ValueError(f"model is {directory}: no such directory")
    if not (directory / "config.json").is_file():
        raise ValueError(f"model is {directory}: no checkpoint; it must be a directory with config.json")


def fingerprint(directory: Path) -> str:
    """A hash of the checkpoint's configuration and weight files: of their sizes, and their first and last MiB."""
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    for path in sorted(path for pattern in _WEIGHTS for path in directory.glob(pattern)):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(_EDGE_BYTES))
            file.seek(max(0, size - _EDGE_BYTES))
            digest.update(file.read())
    return digest.hexdigest()


def placed(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """Device and dtype, with auto resolved. Raises ValueError for a device that this machine doesn't have."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device_found = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA answers with an assertion
        raise ValueError(f"device is {device!r}: {error}") from error
    if dtype == "auto":
        return device_found, torch.float32 if device_found.type == "cpu" else torch.bfloat16
    return device_found, getattr(torch, dtype)


@contextmanager
def open_answerer(config: EvaluationConfig, machine: MachineConfig) -> Iterator[Answerer]:
    """Context with the engine. Raises ValueError for a checkpoint or an engine that can't be used."""
    trust = machine.trust_remote_code
    device, dtype = placed(machine.device, config.dtype)
    with refusal_names("set trust_remote_code=true", config.model):
        tokenizer = AutoTokenizer.from_pretrained(config.model, **loading_options(trust))
        model_config = AutoConfig.from_pretrained(config.model, **loading_options(trust))
        ends = checkpoint_end_tokens(config.model, tokenizer, trust_remote_code=trust)
    if not ends:
        raise ValueError(f"model is {config.model}: its tokenizer has no end token; a response needs one")
    pad = ends[0] if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
    context = max_positions(model_config)
    if config.engine == "transformers":
        with refusal_names("set trust_remote_code=true", config.model):
            model = load_model(config.model, dtype=dtype, device=device, trust_remote_code=trust)
        yield Answerer(GenerateInfer(model, end_ids=ends, pad_id=pad, tokenizer=tokenizer), tokenizer, context)
        return
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(f"{missing('engine=vllm', 'vllm')}, or take engine=transformers")
    infer = VllmInfer(
        config.model,
        machine.vllm,
        max_length=context,
        end_ids=ends,
        pad_id=pad,
        dtype=dtype,
        seed=config.seed,
        trust_remote_code=trust,
        stop_strings=bool(config.sampling.stop),
    )
    try:
        yield Answerer(infer, tokenizer, context)
    finally:
        infer.close()
