"""Sends weights from a trainer to vLLM and to transformers models, and checks that a push contains all weights.

Messages between processes are plain data: names, dtypes, shapes, offsets, and where a shared-memory segment is or a
GPU memory handle. `read_segment` is the receiving side of `shared_memory`; those of `nccl` and `ipc` are part of vLLM.
"""

from __future__ import annotations

import json
import mmap
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, Self

import torch
from safetensors import safe_open
from torch import Tensor

TransferKind = Literal["shared_memory", "nccl", "ipc"]
Bucket = Sequence[tuple[str, Tensor]]

TIED_HEAD = "lm_head.weight"
SEGMENT_NAME = "rhythm-weights"
"""Of the memory that a SharedMemorySender stages into, as /proc shows it."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Those in which weights are sent."""
ALIGNMENT = 64
"""Every tensor of a bucket starts at a multiple of this many bytes."""


def buckets(stream: Iterable[tuple[str, Tensor]], max_bytes: int) -> Iterator[list[tuple[str, Tensor]]]:
    """Group consecutive weights into buckets of at most `max_bytes`; a larger weight is a bucket by itself."""
    bucket: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in stream:
        if bucket and size + tensor.nbytes > max_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    if bucket:
        yield bucket


class WeightSender(ABC):
    """The sending end of a weight transfer, in the trainer.

    For each bucket of a push: call `stage`, then `transmit` and at the same time, on every engine, `receive` with what
    `stage` returned. The next `stage` overwrites the bucket, so every engine must have returned from `receive` before.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        """`dtype`: dtype in which weights are sent; None: their own. Engines convert them to the dtype they use."""
        self._dtype = dtype

    def init_info(self, replica: int = 0) -> dict[str, Any]:
        """The argument of VllmInfer.init_transfer on that replica."""
        return {}

    def connect(self) -> None:  # noqa: B027  # most kinds have nothing to do here
        """Connect to the engines, at the same time as their init_transfer. Does nothing if no connection is needed."""

    @abstractmethod
    def stage(self, bucket: Bucket) -> dict[str, Any]:
        """Prepare a bucket; returns the argument of `receive` on every engine."""

    def transmit(self) -> None:  # noqa: B027  # most kinds have nothing to do here
        """Send the staged bucket, at the same time as `receive`. Does nothing if the engines fetch it themselves."""

    def release(self) -> None:  # noqa: B027  # most kinds have nothing to do here
        """Free the staged bucket, once every engine has returned from `receive`."""

    def close(self) -> None:  # noqa: B027  # most kinds have nothing to do here
        """Release memory and connections."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _ready(self, bucket: Bucket) -> list[tuple[str, Tensor]]:
        return [(name, tensor.detach().to(self._dtype or tensor.dtype).contiguous()) for name, tensor in bucket]


class SharedMemorySender(WeightSender):
    """Sends through the machine's shared memory, from and to CPUs or GPUs: one segment, as large as the largest bucket.

    The segment has no name in a file system (memfd_create), so that nothing is left of it however this process ends.
    Receivers open it as /proc/PROCESS/fd/DESCRIPTOR: they must be on this machine, of this user, and see this process
    under its own id (one PID namespace).
    """

    _descriptor: int | None = None
    _memory: mmap.mmap

    def stage(self, bucket: Bucket) -> dict[str, Any]:
        ready = self._ready(bucket)
        offsets, size = [], 0
        for _, tensor in ready:
            offsets.append(size)
            size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        flat = torch.frombuffer(self._at_least(size), dtype=torch.uint8)
        for offset, (_, tensor) in zip(offsets, ready, strict=True):
            flat[offset : offset + tensor.nbytes].copy_(_bytes(tensor))
        return {**describe(ready), "process": os.getpid(), "descriptor": self._descriptor, "offsets": offsets}

    def close(self) -> None:
        if self._descriptor is not None:
            self._memory.close()
            os.close(self._descriptor)
            self._descriptor = None

    def _at_least(self, size: int) -> mmap.mmap:
        if self._descriptor is None or len(self._memory) < size:
            self.close()
            descriptor = os.memfd_create(SEGMENT_NAME)
            os.truncate(descriptor, max(size, 1))
            self._memory = mmap.mmap(descriptor, 0)
            self._descriptor = descriptor
        return self._memory


def read_segment(info: Mapping[str, Any], device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Copies of the tensors that a SharedMemorySender staged: the next bucket overwrites the memory.

    Raises ValueError for a segment, dtype or offset that it never uses.
    """
    with _open_segment(info["process"], info["descriptor"]) as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # frombuffer needs writable memory
    flat = torch.frombuffer(memory, dtype=torch.uint8)
    for name, dtype_name, shape, offset in zip(
        info["names"], info["dtype_names"], info["shapes"], info["offsets"], strict=True
    ):
        if dtype_name not in DTYPES:
            raise ValueError(f"{name} is {dtype_name}: must be one of {', '.join(DTYPES)}")
        dtype = DTYPES[dtype_name]
        size = torch.Size(shape).numel() * dtype.itemsize
        if not 0 <= offset <= len(flat) - size:
            raise ValueError(f"{name} is at bytes {offset} to {offset + size} of a segment of {len(flat)} bytes")
        yield name, flat[offset : offset + size].view(dtype).view(shape).to(device, copy=True)


def _open_segment(process: int, descriptor: int) -> BinaryIO:
    """Open a segment of a SharedMemorySender for reading. Raises ValueError where there is none."""
    path = f"/proc/{int(process)}/fd/{int(descriptor)}"
    try:
        target = os.readlink(path)
        if target == f"/memfd:{SEGMENT_NAME} (deleted)":
            return open(path, "rb")
    except OSError as error:
        target = f"{error.strerror}"
    raise ValueError(
        f"{path} is no segment of weights ({target}): the sender must be a living process of this machine, user and "
        "PID namespace"
    )


class IpcSender(WeightSender):
    """Lets the engine's workers read this process's memory on the same GPU.

    A worker can open only memory of its own GPU. So with several GPUs every rank of the trainer stages the same bucket,
    and the engines receive the `merged` infos.
    """

    _staged: Tensor | None = None

    def init_info(self, replica: int = 0) -> dict[str, Any]:
        return {"packed": True}

    def stage(self, bucket: Bucket) -> dict[str, Any]:
        from torch.multiprocessing.reductions import reduce_tensor

        # vLLM stores tensors without gaps: sorting them by element size keeps each one aligned.
        ready = sorted(self._ready(bucket), key=lambda item: -item[1].itemsize)
        # A new buffer for every bucket: torch frees an exported buffer only after it was opened exactly once.
        self._staged = torch.cat([_bytes(tensor).to("cuda") for _, tensor in ready])
        torch.cuda.current_stream().synchronize()
        torch.cuda.ipc_collect()  # type: ignore[no-untyped-call]
        _, arguments = reduce_tensor(self._staged)  # type: ignore[no-untyped-call]
        uuid = str(torch.cuda.get_device_properties(self._staged.device).uuid)
        return {
            **describe(ready),
            "tensor_sizes": [tensor.nbytes for _, tensor in ready],
            "ipc_handles": {uuid: ipc_plain(arguments)},
        }

    def release(self) -> None:
        self._staged = None
        torch.cuda.ipc_collect()  # type: ignore[no-untyped-call]

    def close(self) -> None:
        self.release()


def make_sender(
    kind: TransferKind,
    *,
    address: str = "127.0.0.1",
    replicas: int = 1,
    tensor_parallel_size: int = 1,
    dtype: torch.dtype | None = None,
) -> WeightSender:
    """The sender for `replicas` engines with `tensor_parallel_size` workers each."""
    if kind == "shared_memory":
        return SharedMemorySender(dtype)
    if kind == "ipc":
        return IpcSender(dtype)
    if kind == "nccl":
        from rhythm.engines.vllm.nccl import NcclSender

        return NcclSender(address=address, replicas=replicas, tensor_parallel_size=tensor_parallel_size, dtype=dtype)
    raise ValueError(f"kind is {kind!r}: must be shared_memory, nccl or ipc")


def ipc_plain(arguments: Iterable[Any]) -> list[int | bytes]:
    """The numbers and handles among torch's arguments for opening another process's tensor; classes are left out."""
    return [argument for argument in arguments if isinstance(argument, int | bytes)]


def merged(infos: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Combine what several ranks staged of the same bucket into one info, with each GPU's handle under its id."""
    handles = {uuid: handle for info in infos for uuid, handle in info.get("ipc_handles", {}).items()}
    return {**infos[0], **({"ipc_handles": handles} if handles else {})}


@dataclass
class PushManifest:
    """Names and shapes of the weights that an engine must receive in a push, and the names received so far."""

    shapes: Mapping[str, tuple[int, ...]]
    received: set[str] = field(default_factory=set)

    @classmethod
    def of_checkpoint(cls, directory: Path) -> PushManifest:
        """Read names and shapes from the headers of a checkpoint's safetensors. Raises ValueError if there are none.

        A head tied to the embedding need not be sent.
        """
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise ValueError(f"checkpoint is {directory}: it has no safetensors files")
        shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            with safe_open(file, framework="pt") as tensors:
                shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        if json.loads((directory / "config.json").read_text()).get("tie_word_embeddings", False):
            shapes.pop(TIED_HEAD, None)
        return cls(shapes)

    def fresh(self) -> PushManifest:
        """A manifest for the next push, with nothing received."""
        return PushManifest(self.shapes)

    def enter(self, names: Sequence[str], shapes: Sequence[Sequence[int]]) -> None:
        """Record a bucket as received. Raises ValueError for an unknown or repeated name, and for a wrong shape."""
        for name, shape in zip(names, shapes, strict=True):
            if name not in self.shapes:
                if name == TIED_HEAD:
                    continue
                raise ValueError(f"weights: the engine's model has no {name}")
            if name in self.received:
                raise ValueError(f"weights: {name} was sent twice in one push")
            if tuple(shape) != self.shapes[name]:
                raise ValueError(f"weights: {name} has shape {tuple(shape)}, the engine's {self.shapes[name]}")
            self.received.add(name)

    def must_be_complete(self) -> None:
        """Raise ValueError if weights are missing, since the engine would silently keep the old ones."""
        missing = sorted(self.shapes.keys() - self.received)
        if missing:
            raise ValueError(f"weights: {len(missing)} are missing from the push, among them {missing[:5]}")


def describe(ready: Bucket) -> dict[str, Any]:
    """Names, dtypes and shapes of a bucket, as plain data."""
    return {
        "names": [name for name, _ in ready],
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in ready],
        "shapes": [list(tensor.shape) for _, tensor in ready],
    }


def _bytes(tensor: Tensor) -> Tensor:
    """The tensor's memory as uint8 [nbytes]."""
    return tensor.view(-1).view(torch.uint8)
