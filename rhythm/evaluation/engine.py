"""Reads a checkpoint: its tokenizer and context length, then an engine with its weights that generates responses."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
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
class Checkpoint:
    """A checkpoint without its weights.

    end_ids: tokens that end a response; pad_id: padding; context: longest prompt and response together, in tokens.
    """

    tokenizer: Any
    end_ids: tuple[int, ...]
    pad_id: int
    context: int


class _CodeRefusedError(ValueError):
    """The checkpoint needs code of its own, which trust_remote_code doesn't allow."""


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


def read_checkpoint(config: EvaluationConfig, machine: MachineConfig) -> Checkpoint:
    """What of a checkpoint is needed before its weights. Loads no weights and writes nothing.

    Raises ValueError for a checkpoint whose configuration or tokenizer can't be used, and for a device or an engine
    that isn't there.
    """
    check_checkpoint(config.model)
    placed(machine.device, config.dtype)
    if config.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise ValueError(f"{missing('engine=vllm', 'vllm')}, or take engine=transformers")
    trust = machine.trust_remote_code
    try:
        with _refused(config):
            tokenizer = AutoTokenizer.from_pretrained(config.model, **loading_options(trust))
            model_config = AutoConfig.from_pretrained(config.model, **loading_options(trust))
            ends = checkpoint_end_tokens(config.model, tokenizer, trust_remote_code=trust)
    except _CodeRefusedError:
        raise
    except (OSError, ValueError) as error:
        raise ValueError(f"model is {config.model}: {str(error).strip().splitlines()[0]}") from error
    if not ends:
        raise ValueError(f"model is {config.model}: its tokenizer has no end token; a response needs one")
    pad = ends[0] if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
    return Checkpoint(tokenizer, ends, pad, max_positions(model_config))


@contextmanager
def open_infer(config: EvaluationConfig, machine: MachineConfig, checkpoint: Checkpoint) -> Iterator[SeededInfer]:
    """Context with the engine and the weights. Raises ValueError for an engine that can't be used."""
    trust = machine.trust_remote_code
    device, dtype = placed(machine.device, config.dtype)
    tokenizer, ends, pad = checkpoint.tokenizer, checkpoint.end_ids, checkpoint.pad_id
    if config.engine == "transformers":
        with _refused(config):
            model = load_model(config.model, dtype=dtype, device=device, trust_remote_code=trust)
        yield GenerateInfer(model, end_ids=ends, pad_id=pad, tokenizer=tokenizer)
        return
    infer = VllmInfer(
        config.model,
        machine.vllm,
        max_length=checkpoint.context,
        end_ids=ends,
        pad_id=pad,
        dtype=dtype,
        seed=config.seed,
        trust_remote_code=trust,
        stop_strings=bool(config.sampling.stop),
    )
    try:
        yield infer
    finally:
        infer.close()


def _refused(config: EvaluationConfig) -> AbstractContextManager[None]:
    """Turns the refusal to run the checkpoint's code into a ValueError that names trust_remote_code."""
    return refusal_names("set trust_remote_code=true", config.model, _CodeRefusedError)
