"""What runs inside the processes of a cluster run: one engine each, built there from a description.

A method's result comes back as a `Reply` with the seconds it took, so that the driver knows who was busy.
"""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray
import torch
from torch import Tensor
from transformers import AutoTokenizer

from rhythm.checkpoints import load_model, loading_options
from rhythm.cluster.config import PushKind, TrainRole
from rhythm.cluster.object_store import ModelReceiver, ObjectStoreSender
from rhythm.credit.config import SignalsConfig
from rhythm.credit.loss import LossConfig
from rhythm.engines.batches import to_device
from rhythm.engines.interfaces import NonFiniteError, Rollout, SamplingConfig, Train, TrainBatch
from rhythm.engines.local.attn import ObserveAttn
from rhythm.engines.local.infer import GenerateInfer
from rhythm.engines.local.train import OptimizerConfig, TorchTrain
from rhythm.engines.transfer import Bucket, WeightSender, buckets, make_sender
from rhythm.engines.vllm.infer import VllmConfig, VllmInfer, prepare_environment

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Reply:
    """What a method returned, and the seconds it took."""

    value: Any
    seconds: float


@dataclass(frozen=True)
class NotFinite:
    """In place of a step's metrics: a NonFiniteError, without the batch, which the driver has."""

    what: str
    value: float


@dataclass(frozen=True)
class TrainSpec:
    """An actor_train. checkpoint: the weights it starts from, and those of the KL term's reference."""

    role: TrainRole
    checkpoint: Path
    optimizer: OptimizerConfig
    loss: LossConfig
    temperature: float
    micro_batch_size: int
    precision: Precision
    reference: bool
    bucket_bytes: int
    collective_seconds: float
    trust_remote_code: bool = False


@dataclass(frozen=True)
class InferSpec:
    """A replica of actor_infer. checkpoint: must stay, as lost replicas start from it again. vllm: None for
    transformers' generate.
    """

    vllm: VllmConfig | None
    checkpoint: Path
    max_length: int
    end_ids: tuple[int, ...]
    pad_id: int
    precision: Precision
    trust_remote_code: bool = False


@dataclass(frozen=True)
class AttnSpec:
    """A replica of actor_attn. checkpoint: must stay, as for InferSpec."""

    checkpoint: Path
    tap: SignalsConfig
    micro_batch_size: int
    precision: Precision
    trust_remote_code: bool = False


class Host:
    """A process of the cluster. Ray calls its methods one at a time."""

    def __init__(self, gpus: tuple[int, ...], bind_address: str | None, log: Path | None = None) -> None:
        """`gpus`: those of this node that the process may see; none leaves it the CPU. `bind_address`: where it
        listens; None for the address that Ray knows its node by. `log`: what the process, and those that it starts,
        write to stdout and stderr is added to this file; None leaves it to Ray.
        """
        if log is not None:
            _write_to(log)
        # Before anything asks CUDA how many GPUs there are.
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
        self._bind_address: str = bind_address or ray.util.get_node_ip_address()

    def identify(self) -> tuple[str, int]:
        """This machine's name and the process's id."""
        return socket.gethostname(), os.getpid()

    def call(self, method: str, *arguments: Any) -> Reply:
        """Run a method of this object."""
        started = time.perf_counter()
        try:
            value = getattr(self, method)(*arguments)
        except Exception:
            traceback.print_exc()  # into the log
            raise
        return Reply(value, time.perf_counter() - started)


def _write_to(log: Path) -> None:
    """Stdout and stderr, also those of libraries in C and of processes started from here."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab", buffering=0) as file:
        file.write(f"--- process {os.getpid()} on {socket.gethostname()}, {time.strftime('%F %T')}\n".encode())
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


class TrainHost(Host):
    """One rank of actor_train."""

    _engine: Train
    _device: torch.device  # where the engine wants its batches; Megatron's moves them itself
    _senders: dict[str, WeightSender]
    _stream: Iterator[list[tuple[str, Tensor]]]

    def free_endpoint(self) -> tuple[str, int]:
        """This machine's address and a free port; asked of rank 0."""
        with socket.socket() as listener:
            listener.bind((self._bind_address, 0))
            return self._bind_address, int(listener.getsockname()[1])

    def build(self, spec: TrainSpec, rank: int, address: str, port: int) -> None:
        """Load the model; with Megatron, all ranks at the same time, which meet at address:port."""
        self._spec, self._rank, self._senders = spec, rank, {}
        self._engine, self._device = _BUILD_TRAIN[spec.role.engine](spec, rank, address, port)

    def log_probs(self, rollout: Rollout, tap: SignalsConfig | None, groups: Any) -> Any:
        """As Train's, and its statistics_seconds."""
        found, signals = self._engine.log_probs(to_device(rollout, self._device), tap, groups)
        on_cpu = None if signals is None else to_device(signals, "cpu")
        return self._answer((to_device(found, "cpu"), on_cpu, self._engine.statistics_seconds))

    def reference_log_probs(self, rollout: Rollout) -> Any:
        """As Train's."""
        return self._answer(self._engine.reference_log_probs(to_device(rollout, self._device)).cpu())

    def step(self, batch: TrainBatch) -> Any:
        """As Train's; NotFinite instead of NonFiniteError."""
        try:
            return self._answer(self._engine.step(to_device(batch, self._device)))
        except NonFiniteError as error:
            return NotFinite(error.what, error.value)

    def weights(self) -> Any:
        """As Train's, on the CPU."""
        return self._answer({name: tensor.cpu() for name, tensor in self._engine.weights().items()})

    def save(self, directory: Path) -> None:
        """As Train's."""
        self._engine.save(directory)

    def load(self, directory: Path) -> None:
        """As Train's."""
        self._engine.load(directory)

    def open_sender(self, kind: PushKind, replicas: int, tensor_parallel_size: int) -> list[dict[str, Any]]:
        """Replace the sender of this kind by one to `replicas` receivers; returns what each of them must know."""
        if (old := self._senders.pop(kind, None)) is not None:
            old.close()
        sender = self._make_sender(kind, replicas, tensor_parallel_size)
        self._senders[kind] = sender
        return [sender.init_info(replica) for replica in range(replicas)]

    def connect(self, kind: str) -> None:
        """Connect to the receivers; runs at the same time as their init_transfer."""
        self._senders[kind].connect()

    def begin_push(self) -> None:
        """Start to stream the weights. From here to the end of the stream, all ranks do the same."""
        self._stream = buckets(self._engine.weights_stream(), self._spec.bucket_bytes)

    def stage(self, kinds: tuple[str, ...]) -> dict[str, dict[str, Any]] | None:
        """Make the next bucket ready for the receivers of `kinds`; None at the end."""
        bucket: Bucket | None = next(self._stream, None)
        if bucket is None:
            return None
        return {kind: self._senders[kind].stage(bucket) for kind in kinds if kind in self._senders}

    def transmit(self, kinds: tuple[str, ...]) -> None:
        """Send the bucket; runs at the same time as `receive`."""
        for kind in kinds:
            self._senders[kind].transmit()

    def close(self) -> None:
        """Give back what outlives the process."""
        for sender in self._senders.values():
            sender.close()

    def _answer(self, value: Any) -> Any:
        """Every rank has the same results; rank 0 hands them over."""
        return value if self._rank == 0 else None

    def _make_sender(self, kind: PushKind, replicas: int, tensor_parallel_size: int) -> WeightSender:
        if kind == "object_store":
            return ObjectStoreSender()
        return make_sender(
            kind,
            address=self._bind_address,
            replicas=replicas,
            tensor_parallel_size=tensor_parallel_size,
            dtype=getattr(torch, self._spec.precision),
        )


class InferHost(Host):
    """A replica of actor_infer."""

    _engine: Any
    _asleep = False

    def build(self, spec: InferSpec) -> None:
        """Load the engine."""
        dtype = getattr(torch, spec.precision)
        if spec.vllm is None:
            self._engine = _GenerateReplica(_load_model(spec, dtype), spec)
            return
        prepare_environment(self._bind_address)
        self._engine = VllmInfer(
            spec.checkpoint,
            spec.vllm,
            max_length=spec.max_length,
            end_ids=spec.end_ids,
            pad_id=spec.pad_id,
            dtype=dtype,
            trust_remote_code=spec.trust_remote_code,
        )

    def generate(self, prompts: list[list[int]], n: int, sampling: SamplingConfig, seed: int) -> Rollout:
        """As Infer's, on the CPU."""
        rollout: Rollout = self._engine.generate(prompts, n, sampling, seed)
        return to_device(rollout, "cpu")

    def init_transfer(self, kind: str, info: Mapping[str, Any]) -> None:
        """How weights will come."""
        with self._awake():
            self._engine.init_transfer(kind, info)

    def start_push(self) -> None:
        """Weights follow; until all are there the engine stays awake."""
        self._push = ExitStack()
        self._push.enter_context(self._awake())
        self._engine.start_push()

    def receive(self, info: Mapping[str, Any]) -> None:
        """One bucket."""
        self._engine.receive(info)

    def finish_push(self, version: int) -> None:
        """That was all."""
        self._engine.finish_push(version)
        self._push.close()

    def sleep(self) -> None:
        """Give the GPU's memory back until `wake`. Nothing where it sleeps already."""
        if not self._asleep:
            self._engine.sleep()
        self._asleep = True

    def wake(self) -> None:
        """Undo `sleep`. Nothing where it is awake, as after a restart."""
        if self._asleep:
            self._engine.wake()
        self._asleep = False

    def close(self) -> None:
        """Stop what the engine started."""
        self._engine.close()

    @contextmanager
    def _awake(self) -> Iterator[None]:
        """Wake the engine if it sleeps, and let it sleep on afterwards."""
        slept = self._asleep
        self.wake()
        yield
        if slept:
            self.sleep()


class AttnHost(Host):
    """A replica of actor_attn."""

    def build(self, spec: AttnSpec) -> None:
        """Load the model."""
        model = _load_model(spec, torch.float32)
        self._receiver = ModelReceiver(model)
        self._device = model.device
        self._engine = ObserveAttn(
            model,
            # Groups that responses share are chosen over all replicas, by the driver.
            spec.tap.model_copy(update={"grouping": "sequence"}),
            micro_batch_size=spec.micro_batch_size,
            precision=getattr(torch, spec.precision),
        )

    def signals(self, rollout: Rollout, groups: Any) -> Any:
        """As Attn's, on the CPU."""
        return to_device(self._engine.signals(to_device(rollout, self._device), groups), "cpu")

    def init_transfer(self, kind: str, info: Mapping[str, Any]) -> None:
        """Weights come through Ray's object store: nothing to prepare."""

    def start_push(self) -> None:
        """Weights follow."""
        self._receiver.start_push()

    def receive(self, info: Mapping[str, Any]) -> None:
        """One bucket."""
        self._receiver.receive(info)

    def finish_push(self, version: int) -> None:
        """That was all."""
        self._receiver.finish_push(version)

    def close(self) -> None:
        """Nothing outlives the process."""


class _GenerateReplica(GenerateInfer):
    """transformers' generate, with weights pushed in pieces."""

    def __init__(self, model: Any, spec: InferSpec) -> None:
        super().__init__(model, end_ids=spec.end_ids, pad_id=spec.pad_id)
        self._receiver = ModelReceiver(model)
        self.start_push = self._receiver.start_push
        self.receive = self._receiver.receive
        self.finish_push = self._receiver.finish_push

    def init_transfer(self, kind: str, info: Mapping[str, Any]) -> None:
        """Weights come through Ray's object store: nothing to prepare."""

    def sleep(self) -> None:
        """Stays as it is."""

    def wake(self) -> None:
        """It never slept."""

    def close(self) -> None:
        """Nothing outlives the process."""


def _load_model(spec: TrainSpec | InferSpec | AttnSpec, dtype: torch.dtype) -> Any:
    """The checkpoint's model, on this process's GPU if it has one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_model(spec.checkpoint, dtype=dtype, device=device, trust_remote_code=spec.trust_remote_code)


def _torch_train(spec: TrainSpec, rank: int, address: str, port: int) -> tuple[Train, torch.device]:
    """One rank, which meets nobody."""
    model = _load_model(spec, torch.float32)
    engine = TorchTrain(
        model,
        AutoTokenizer.from_pretrained(spec.checkpoint, **loading_options(spec.trust_remote_code)),
        optimizer=spec.optimizer,
        loss=spec.loss,
        temperature=spec.temperature,
        micro_batch_size=spec.micro_batch_size,
        precision=getattr(torch, spec.precision),
        reference=_load_model(spec, torch.float32) if spec.reference else None,
    )
    return engine, model.device


def _megatron_train(spec: TrainSpec, rank: int, address: str, port: int) -> tuple[Train, torch.device]:
    from rhythm.engines.megatron.parallel import Rendezvous
    from rhythm.engines.megatron.train import MegatronTrain

    rendezvous = Rendezvous(rank, spec.role.ranks, address, port, spec.collective_seconds)
    engine = MegatronTrain(
        spec.checkpoint,
        rendezvous,
        spec.role.parallel,
        optimizer=spec.optimizer,
        loss=spec.loss,
        temperature=spec.temperature,
        micro_batch_size=spec.micro_batch_size,
        precision=getattr(torch, spec.precision),
        with_reference=spec.reference,
        trust_remote_code=spec.trust_remote_code,
    )
    return engine, torch.device("cpu")


_BUILD_TRAIN: dict[str, Callable[[TrainSpec, int, str, int], tuple[Train, torch.device]]] = {
    "torch": _torch_train,
    "megatron": _megatron_train,
}
"""By TrainRole.engine: (spec, rank, address, port) → the engine, and the device it wants its batches on."""
