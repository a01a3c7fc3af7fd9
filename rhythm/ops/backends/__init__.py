"""The backends of the ops, in the order in which "auto" tries them, and the choice among them."""

from __future__ import annotations

import logging
from functools import cache

import torch

from rhythm.ops.arguments import Request, checked
from rhythm.ops.backends.base import Backend
from rhythm.ops.backends.cpu import CpuBackend
from rhythm.ops.backends.reference import ReferenceBackend
from rhythm.ops.backends.triton import TritonBackend
from rhythm.ops.plugins import named

logger = logging.getLogger("rhythm")

BACKENDS: dict[str, Backend] = {"cpu": CpuBackend(), "triton": TritonBackend(), "reference": ReferenceBackend()}
NAMES = ("auto", *BACKENDS)


def availability() -> dict[str, str | None]:
    """Each backend's name with None where it can run on this machine, else the reason why not."""
    return {name: backend.unavailable() for name, backend in BACKENDS.items()}


def choose(name: str, request: Request) -> Backend:
    """The backend called `name`, or for "auto" the first that takes the request.

    Raises:
        ValueError: the name is unknown, or the named backend can't take the request.
        RuntimeError: the named backend is not available on this machine; no backend takes the request.
    """
    if name != "auto":
        return named("backend", name, BACKENDS, request, allowed=NAMES)
    passed_over = ""
    dtype, device = request.q.dtype, request.q.device
    for candidate, backend in BACKENDS.items():
        reason = backend.unavailable() or backend.refuses(request) or backend.only_by_name()
        if reason is None:
            _log_choice(candidate, dtype, device, passed_over)
            return backend
        passed_over += f"; not {candidate}: {reason}"
    raise RuntimeError(f"no backend takes {dtype} tensors on {device}{passed_over}")


def check_backend(name: str, device: torch.device) -> None:
    """Raises as `choose` does where the backend can't take fp32 tensors on the device."""
    one = torch.empty((1, 1, 1), device=device)
    choose(name, checked(one, one, None, None, None, 1.0, 1, 0, None))


@cache
def _log_choice(name: str, dtype: torch.dtype, device: torch.device, passed_over: str) -> None:
    """Cached, so that each choice is logged once."""
    logger.info("backend auto: %s for %s tensors on %s%s", name, dtype, device, passed_over)
