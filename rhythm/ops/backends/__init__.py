"""The backends of the ops, and the choice among them.

A backend is a module with `unavailable()` and `refuses(device, dtype)`, which say why it can't run on this machine or
take such tensors (None: it can), `run(q, k, v, layout, *, scale, window, horizon, lse_HT, span) -> Outputs`, and
`sampled_span(q, k, lse_HT, layout, *, scale, count) -> span_BH`.
"""

from __future__ import annotations

import logging
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from rhythm.ops.backends import cpu, reference, triton

logger = logging.getLogger("rhythm")

BACKENDS: dict[str, ModuleType] = {"cpu": cpu, "triton": triton, "reference": reference}
NAMES = ("auto", *BACKENDS)


def availability() -> dict[str, str | None]:
    """Each backend's name with None where it can run on this machine, else the reason why not."""
    return {name: module.unavailable() for name, module in BACKENDS.items()}


def choose(name: str, q: Tensor) -> ModuleType:
    """The backend called `name`, or for "auto" the first that takes q.

    Raises:
        ValueError: the name is unknown, or the named backend can't take q.
        RuntimeError: the named backend is not available on this machine.
    """
    if name == "auto":
        return _automatic(q.device, q.dtype)
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}; allowed are {', '.join(NAMES)}")
    module = BACKENDS[name]
    if (reason := module.unavailable()) is not None:
        raise RuntimeError(f"backend {name!r} is not available: {reason}")
    if (reason := module.refuses(q.device, q.dtype)) is not None:
        raise ValueError(f"backend {name!r} can't take q: {reason}")
    return module


@cache
def _automatic(device: torch.device, dtype: torch.dtype) -> ModuleType:
    """Cached, so that the choice for a device and type is said once."""
    passed_over: list[str] = []
    for name, module in BACKENDS.items():
        reason = module.unavailable() or module.refuses(device, dtype)
        if module is triton and triton.interpreted():
            reason = "its interpreter is for tests"
        if reason is None:
            logger.info("backend auto: %s for %s tensors on %s%s", name, dtype, device, "".join(passed_over))
            return module
        passed_over.append(f"; not {name}: {reason}")
    raise RuntimeError(f"no backend takes {dtype} tensors on {device}{''.join(passed_over)}")
