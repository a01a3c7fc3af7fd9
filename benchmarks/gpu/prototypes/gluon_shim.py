"""The parts of Gluon, Triton's low-level dialect, that the prototypes use, under one name for all Triton versions.

Importing raises ImportError or AttributeError if Triton has no compatible Gluon.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# (descriptor, [row, column], barrier, shared memory): Triton 3.9 calls it async_load, 3.6 has only the other name.
load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


def tiles(x: Tensor, rows: int) -> TensorDescriptor:
    """A descriptor of x [T, H, D] as [T, H·D], for tiles of `rows` tokens of one head; beyond T it reads 0."""
    x_TX = x.view(x.shape[0], -1)
    block = [rows, x.shape[-1]]
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)
    return TensorDescriptor(x_TX, list(x_TX.shape), list(x_TX.stride()), block, layout)
