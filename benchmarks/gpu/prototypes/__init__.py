"""Prototypes of row sweeps, to be timed on a GPU against rhythm's own kernels; none has been timed yet.

Each computes span and lse of one causal sequence (some the output too); its file explains how. docs/experiments.md has
their instruction counts and predicted times, to be compared with times on a GPU before one replaces a kernel.
Nothing here imports Triton before a prototype is made.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import torch

from benchmarks.implementations import Maker, Outputs
from benchmarks.shapes import Inputs


@dataclass(frozen=True)
class Prototype:
    """One way to compute span and lse, for bf16 on sm_90.

    Attributes:
        make: inputs → a callable that computes everything anew: span [1, Hq] and lse [Hq, T], both fp32, and the
            output out [T, Hq, D] where `values`. A call does not wait for the device and copies nothing from the
            host, so a CUDA graph can hold it. Raises ValueError on inputs that the prototype does not take.
        absent: why it can't run here; None: it can.
        interprets: whether Triton's interpreter can run it (TRITON_INTERPRET=1); Gluon has none.
        values: whether it computes the output, too, as a whole attention forward does.
    """

    name: str
    make: Maker
    absent: Callable[[], str | None]
    interprets: bool
    values: bool = False


def prototypes() -> tuple[Prototype, ...]:
    """All prototypes: sweeps without the output first, starting with the control (online softmax)."""
    plain = {"absent": _no_triton, "interprets": True}
    gluon = {"absent": _no_gluon, "interprets": False}
    return (
        Prototype("triton_online", _maker("online"), **plain),
        Prototype("triton_fixed", _maker("fixed"), **plain),
        Prototype("triton_lanes", _maker("lanes"), **plain),
        Prototype("gluon_4x64_ss", _maker("gluon_row", keys=128, q_in_registers=False), **gluon),
        Prototype("gluon_4x64_rs", _maker("gluon_row", keys=64, q_in_registers=True), **gluon),
        Prototype("triton_fixed_values", _maker("fixed_values"), **plain, values=True),
        Prototype("gluon_values", _maker("gluon_values"), **gluon, values=True),
    )


def _maker(module: str, **settings: int | bool) -> Maker:
    """The maker `make` of a module of this package, which is imported when it is called."""

    def make(inputs: Inputs) -> Callable[[], Outputs]:
        run: Callable[..., Outputs] = import_module(f"{__name__}.{module}").run
        import_module(f"{__name__}.operands").check(inputs)
        return partial(run, inputs, **settings)

    return make


def _no_triton() -> str | None:
    if find_spec("triton") is None:
        return "the package triton is not installed"
    return None if os.environ.get("TRITON_INTERPRET") == "1" else _no_hopper()


def _no_gluon() -> str | None:
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "Triton's interpreter does not run Gluon"
    if (reason := _no_hopper()) is not None:
        return reason
    try:
        import_module(f"{__name__}.gluon_shim")
    except (ImportError, AttributeError) as error:
        import triton

        return f"Triton {triton.__version__} has another Gluon than 3.6 to 3.9: {error}"
    return None


def _no_hopper() -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    return None if major == 9 else f"needs compute capability 9 (Hopper), this is {major}.{minor}"
