"""Loads transformers checkpoints and their end tokens. Python code contained in a checkpoint runs only if a setting
allows it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig


@contextmanager
def refusal_names(setting: str, checkpoint: Path, kind: type[ValueError] = ValueError) -> Iterator[None]:
    """Context for loading with transformers and trust_remote_code=False: if the checkpoint needs code of its own,
    raises `kind` with one line that says which `setting` allows it. Other errors propagate.
    """
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise kind(
            f"{checkpoint} needs Python code that it contains, which is not run: {setting} if you trust it"
        ) from error


def loading_options(trust_remote_code: bool) -> dict[str, bool]:
    """Arguments for every `from_pretrained`. Without them, transformers would ask for trust_remote_code on stdin."""
    return {"local_files_only": True, "trust_remote_code": trust_remote_code}


def load_model(
    checkpoint: Path,
    *,
    dtype: torch.dtype | Literal["auto"],
    device: torch.device | str,
    trust_remote_code: bool = False,
) -> Any:
    """The causal model of a checkpoint on `device`; `dtype` "auto" is the dtype it was saved in.

    Parameters are copied into memory allocated by torch: tensors mapped from a file may be aligned differently, which
    can change the order of sums.
    """
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, **loading_options(trust_remote_code))
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model.to(device)


def end_tokens(tokenizer: Any, configured: int | Sequence[int] | None) -> tuple[int, ...]:
    """Ids of the tokens that end a response, ascending: the tokenizer's end token and the `configured` ones.

    Empty if there is neither.
    """
    listed = configured if isinstance(configured, Sequence) else [configured]
    return tuple(sorted({i for i in [*listed, tokenizer.eos_token_id] if i is not None}))


def model_end_tokens(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """`end_tokens` of the tokenizer and the model's generation config."""
    return end_tokens(tokenizer, getattr(getattr(model, "generation_config", None), "eos_token_id", None))


def checkpoint_end_tokens(checkpoint: Path, tokenizer: Any, *, trust_remote_code: bool = False) -> tuple[int, ...]:
    """`end_tokens` of the tokenizer and the checkpoint's generation config, or its model config if it has none."""
    if (checkpoint / "generation_config.json").is_file():
        config = GenerationConfig.from_pretrained(checkpoint, local_files_only=True)
    else:
        config = AutoConfig.from_pretrained(checkpoint, **loading_options(trust_remote_code))
    return end_tokens(tokenizer, config.eos_token_id)
