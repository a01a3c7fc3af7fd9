"""Which extra of pyproject.toml brings a package: for errors that say what to install."""

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
    "tensorboard": "train",
    "yaml": "train",
    "pandas": "analyze",
    "scipy": "analyze",
    "trl": "trl",
    "megatron": "cluster",
    "psutil": "cluster",
    "ray": "cluster",
    "vllm": "cluster",
    "triton": "triton",
}
"""By the name that is imported; torch and numpy always come along."""


def command_for(extra: str) -> str:
    """What brings an extra. rhythm is on no package index, and a project of that name there would not be this one."""
    return f"pip install '.[{extra}]' in a clone of rhythm"


def missing(what: str, package: str, extra: str | None = None) -> str:
    """What a user reads where `what` needs a package that is not installed."""
    return f"{what} needs {package}, which is not installed: {command_for(extra or EXTRAS[package])}"


def package_of(error: ModuleNotFoundError) -> str | None:
    """The package of an extra whose absence the error tells of; None: it tells of something else."""
    package = (error.name or "").partition(".")[0]
    return package if package in EXTRAS else None


@contextmanager
def needs(what: str) -> Iterator[None]:
    """Imports inside that fail for want of an extra's package say so.

    Raises:
        ModuleNotFoundError: naming `what`, the package, and the command that installs it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = package_of(error)
        if package is None or str(error).startswith("rhythm"):  # one that has been told already
            raise
        raise ModuleNotFoundError(missing(what, package), name=error.name) from error


def require(what: str, *packages: str) -> None:
    """ModuleNotFoundError, as of `needs`, for the first of the packages that is not installed; imports none."""
    for package in packages:
        if find_spec(package) is None:
            raise ModuleNotFoundError(missing(what, package), name=package)
