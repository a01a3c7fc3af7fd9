"""Maps packages to the extras of pyproject.toml that install them, for errors that say what to install."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

EXTRAS = {
    "huggingface_hub": "models",
    "pydantic": "models",
    "safetensors": "models",
    "tokenizers": "models",
    "transformers": "models",
    "jinja2": "train",
    "matplotlib": "train",
    "rich": "train",
    "scipy": "train",
    "tensorboard": "train",
    "wandb": "wandb",
    "yaml": "train",
    "pandas": "analyze",
    "datasets": "tasks",
    "math_verify": "tasks",
    "pyarrow": "tasks",
    "reasoning_gym": "tasks",
    "trl": "trl",
    "kvpress": "kvpress",
    "megatron": "cluster",
    "psutil": "cluster",
    "ray": "cluster",
    "vllm": "cluster",
    "triton": "triton",
}
"""Import name → extra. torch and numpy are always installed."""


def command_for(extra: str) -> str:
    """The command that installs an extra. rhythm is not on a package index; a project of that name there is another."""
    return f"pip install '.[{extra}]' in a clone of rhythm"


def missing(what: str, package: str, extra: str | None = None) -> str:
    """The error message if `what` needs a package that is not installed."""
    return f"{what} needs {package}, which is not installed: {command_for(extra or EXTRAS[package])}"


def package_of(error: ModuleNotFoundError) -> str | None:
    """The missing package, if an extra installs it; None for any other module."""
    package = (error.name or "").partition(".")[0]
    return package if package in EXTRAS else None


@contextmanager
def needs(what: str) -> Iterator[None]:
    """Context in which a failed import of an extra's package gets a helpful message.

    Raises:
        ModuleNotFoundError: naming `what`, the package, and the command that installs it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = package_of(error)
        if package is None or str(error).startswith("rhythm"):  # raised by an inner `needs`
            raise
        raise ModuleNotFoundError(missing(what, package), name=error.name) from error


def require(what: str, *packages: str) -> None:
    """Raise ModuleNotFoundError, like `needs`, for the first package that is not installed. Imports nothing."""
    for package in packages:
        if find_spec(package) is None:
            raise ModuleNotFoundError(missing(what, package), name=package)
