"""The Ray actors of a cluster run. Each process has one engine, which it builds from a spec.

Every method's result is returned as a `Reply` with the seconds it took, for the utilization metrics.
"""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import ray
import torch
from torch import Tensor
from transformers import AutoTokenizer

from rhythm.checkpoints import load_model, loading_options
from rhythm.cluster.config import PushKind
from rhythm.cluster.model_receiver import ModelReceiver
from rhythm.cluster.object_store import ObjectStoreSender
from rhythm.cluster.specs import AttnSpec, InferSpec, NotFinite, Part, Reply, TrainSpec
from rhythm.engines.batches import to_device
from rhythm.engines.interfaces import (
    LeavesGpu,
    NonFiniteError,
    Rollout,
    SamplingConfig,
    ShapeAdvantages,
    TappedTrain,
    Train,
    TrainBatch,
)
from rhythm.engines.local.attn import ObserveAttn
from rhythm.engines.local.infer import GenerateInfer
from rhythm.engines.local.train import TorchTrain
from rhythm.engines.transfer import Bucket, WeightSender, buckets, make_sender
from rhythm.engines.vllm.environment import prepare_vllm_environment
from rhythm.engines.vllm.infer import VllmInfer
from rhythm.system.ports import ReservedPort
from rhythm.tap.signals_config import SignalsConfig


class Engine(Train, TappedTrain, LeavesGpu, Protocol):
    """What both trainers are."""


class Host:
    """Base class of the cluster's Ray actors. Ray calls the methods one at a time."""

    def __init__(self, gpus: tuple[int, ...], bind_address: str | None, log: Path | None = None) -> None:
        """
        Args:
            gpus: indices of this node's GPUs that the process may see; empty: CPU only.
            bind_address: address to listen on; None: the address by which Ray knows the node.
            log: file to which stdout and stderr of the process and its children are appended; None: Ray's own files.
        """
        if log is not None:
            _write_to(log)
        # Must be set before CUDA is initialized.
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
        self._bind_address: str = bind_address or ray.util.get_node_ip_address()

    def identify(self) -> tuple[str, int]:
        """(host name, process id)."""
        return socket.gethostname(), os.getpid()

    def call(self, method: str, *arguments: Any) -> Reply:
        """Run a method of this object and time it."""
        started = time.perf_counter()
        try:
            value = getattr(self, method)(*arguments)
        except Exception:  # raised again
            traceback.print_exc()  # into the log
            raise
        return Reply(value, time.perf_counter() - started)

    def stream(self, method: str, *arguments: Any) -> Iterator[Part | Reply]:
        """Run a method that is a generator: a Part of each of its values, when it is there, and a Reply without one."""
        started = time.perf_counter()
        try:
            for value in getattr(self, method)(*arguments):
                yield Part(value)
        except Exception:  # raised again
            traceback.print_exc()  # into the log
            raise
        yield Reply(None, time.perf_counter() - started)


def _write_to(log: Path) -> None:
    """Append stdout and stderr to the file, including those of C libraries and child processes."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab", buffering=0) as file:
        file.write(f"--- process {os.getpid()} on {socket.gethostname()}, {time.strftime('%F %T')}\n".encode())
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


class TrainHost(Host):
    """One rank of actor_train."""

    _engine: Engine
    _device: torch.device  # device for the batches; Megatron's engine moves them itself
    _senders: dict[str, WeightSender]
    _stream: Iterator[list[tuple[str, Tensor]]]
    _port: ReservedPort | None = None

    def free_endpoint(self) -> tuple[str, int]:
        """This machine's address and a port, for the rendezvous; reserved until `build`. Called on rank 0."""
        self._port = ReservedPort(self._bind_address)
        return self._bind_address, self._port.number

    def build(self, spec: TrainSpec, rank: int, address: str, port: int) -> None:
        """Load the model. With Megatron, all ranks must build at the same time; they rendezvous at address:port."""
        self._spec, self._rank, self._senders = spec, rank, {}
        self._engine, self._device = _BUILD_TRAIN[spec.role.engine](spec, rank, address, port)
        if self._port is not None:
            self._port.close()

    def log_probs(self, rollout: Rollout, tap: SignalsConfig | None, groups: Any) -> Any:
        """(log-probs, signals, statistics_seconds) of the Train engine."""
        log_probs, signals = self._engine.log_probs(to_device(rollout, self._device), tap, groups)
        on_cpu = None if signals is None else to_device(signals, "cpu")
        return self._answer((to_device(log_probs, "cpu"), on_cpu, self._engine.statistics_seconds))

    def reference_log_probs(self, rollout: Rollout) -> Any:
        """See rhythm.engines.interfaces.Train."""
        return self._answer(self._engine.reference_log_probs(to_device(rollout, self._device)).cpu())

    def step(self, batch: TrainBatch) -> Any:
        """See rhythm.engines.interfaces.Train. Returns NotFinite where Train raises NonFiniteError."""
        try:
            return self._answer(self._engine.step(to_device(batch, self._device)))
        except NonFiniteError as error:
            return NotFinite(error.what, error.value)

    def tapped_step(self, batch: TrainBatch, tap: SignalsConfig | None, shape: ShapeAdvantages) -> Any:
        """(TappedStep, statistics_seconds) of the engine, on the CPU. Returns NotFinite where it raises
        NonFiniteError.
        """
        try:
            taken = self._engine.tapped_step(to_device(batch, self._device), tap, shape)
        except NonFiniteError as error:
            return NotFinite(error.what, error.value)
        return self._answer((to_device(taken, "cpu"), self._engine.statistics_seconds))

    def weights(self) -> Any:
        """The weights of the Train engine, on the CPU."""
        return self._answer({name: tensor.cpu() for name, tensor in self._engine.weights().items()})

    def save(self, directory: Path) -> None:
        """See rhythm.engines.interfaces.Train."""
        self._engine.save(directory)

    def load(self, directory: Path) -> None:
        """See rhythm.engines.interfaces.Train."""
        self._engine.load(directory)

    def open_sender(self, kind: PushKind, replicas: int, tensor_parallel_size: int) -> list[dict[str, Any]]:
        """Replace the sender of this kind with one for `replicas` receivers; returns the init info of each receiver."""
        if (old := self._senders.pop(kind, None)) is not None:
            old.close()
        sender = self._make_sender(kind, replicas, tensor_parallel_size)
        self._senders[kind] = sender
        return [sender.init_info(replica) for replica in range(replicas)]

    def connect(self, kind: str) -> None:
        """Connect to the receivers. Must run at the same time as their init_transfer."""
        self._senders[kind].connect()

    def leave_gpu(self) -> None:
        """Give back memory that torch has cached and, with cluster.train.offload, what only a gradient step needs."""
        self._engine.leave_gpu(offload=self._spec.role.offload)

    def begin_push(self) -> None:
        """Start streaming the weights. Until the stream ends, all ranks must make the same calls."""
        self._stream = buckets(self._engine.weights_stream(), self._spec.bucket_bytes)

    def stage(self, kinds: tuple[str, ...]) -> dict[str, dict[str, Any]] | None:
        """Prepare the next bucket for the receivers of `kinds`; None at the end of the stream."""
        bucket: Bucket | None = next(self._stream, None)
        if bucket is None:
            return None
        return {kind: self._senders[kind].stage(bucket) for kind in kinds if kind in self._senders}

    def transmit(self, kinds: tuple[str, ...]) -> None:
        """Send the staged bucket. Must run at the same time as the receivers' `receive`."""
        for kind in kinds:
            self._senders[kind].transmit()

    def end_push(self) -> None:
        """Give back the memory of the last bucket, once the receivers have it."""
        for sender in self._senders.values():
            sender.release()
        self._engine.leave_gpu(offload=False)

    def close(self) -> None:
        """Release shared memory and connections that would outlive the process."""
        for sender in self._senders.values():
            sender.close()

    def _answer(self, value: Any) -> Any:
        """The value on rank 0, else None: all ranks have the same result, so only one needs to be sent."""
        return value if self._rank == 0 else None

    def _make_sender(self, kind: PushKind, replicas: int, tensor_parallel_size: int) -> WeightSender:
        dtype = getattr(torch, self._spec.precision)
        if kind == "object_store":
            return ObjectStoreSender(dtype)
        return make_sender(
            kind,
            address=self._bind_address,
            replicas=replicas,
            tensor_parallel_size=tensor_parallel_size,
            dtype=dtype,
        )


class InferHost(Host):
    """A replica of actor_infer."""

    _engine: Any

    def build(self, spec: InferSpec) -> None:
        """Load the engine."""
        dtype = getattr(torch, spec.precision)
        if spec.vllm is None:
            self._engine = _GenerateReplica(_load_model(spec, dtype), spec)
            return
        prepare_vllm_environment(self._bind_address)
        self._engine = VllmInfer(
            spec.checkpoint,
            spec.vllm,
            max_length=spec.max_length,
            end_ids=spec.end_ids,
            pad_id=spec.pad_id,
            dtype=dtype,
            trust_remote_code=spec.trust_remote_code,
            stop_strings=spec.stop_strings,
        )

    def generate(self, prompts: list[list[int]], n: int, sampling: SamplingConfig, seed: int) -> Iterator[Rollout]:
        """The rollout of the Infer engine in parts, each of whole prompts, on the CPU."""
        for part in self._engine.parts(prompts, n, sampling, seed):
            yield to_device(part, "cpu")

    def init_transfer(self, kind: str, info: Mapping[str, Any]) -> None:
        """Prepare to receive weights by this kind of transfer."""
        self._engine.init_transfer(kind, info)

    def start_push(self) -> None:
        """Begin a weight sync; an engine that sleeps gets memory for weights alone."""
        self._engine.start_push()

    def receive(self, info: Mapping[str, Any]) -> None:
        """Receive one bucket of weights."""
        self._engine.receive(info)

    def finish_push(self, version: int) -> None:
        """End the weight sync; the engine now has the weights of `version`."""
        self._engine.finish_push(version)

    def sleep(self) -> None:
        """Free GPU memory, the weights' too. Does nothing if the engine sleeps already."""
        self._engine.sleep()

    def wake(self) -> None:
        """After a push: get ready to generate. Does nothing if the engine is, as after a restart."""
        self._engine.wake()

    def close(self) -> None:
        """Stop the processes that the engine started."""
        self._engine.close()


class AttnHost(Host):
    """A replica of actor_attn."""

    def build(self, spec: AttnSpec) -> None:
        """Load the model."""
        precision = getattr(torch, spec.precision)
        model = _load_model(spec, precision)
        receiver = ModelReceiver(model)
        self.init_transfer, self.start_push = receiver.init_transfer, receiver.start_push
        self.receive, self.finish_push = receiver.receive, receiver.finish_push
        self._device = model.device
        self._engine = ObserveAttn(
            model,
            # Head groups shared by the batch are chosen by the driver, over all replicas.
            spec.tap.model_copy(update={"grouping": "sequence"}),
            micro_batch_size=spec.micro_batch_size,
            max_tokens=spec.max_tokens,
            precision=precision,
        )

    def signals(self, rollout: Rollout, groups: Any) -> Any:
        """The signals of the Attn engine, on the CPU."""
        return to_device(self._engine.signals(to_device(rollout, self._device), groups), "cpu")

    def close(self) -> None:
        """Does nothing: nothing outlives the process."""


class _GenerateReplica(GenerateInfer):
    """transformers' generate as a replica that receives weights in buckets."""

    def __init__(self, model: Any, spec: InferSpec) -> None:
        tokenizer = None
        if spec.stop_strings:
            tokenizer = AutoTokenizer.from_pretrained(spec.checkpoint, **loading_options(spec.trust_remote_code))
        super().__init__(
            model, end_ids=spec.end_ids, pad_id=spec.pad_id, max_length=spec.max_length, tokenizer=tokenizer
        )
        receiver = ModelReceiver(model)
        self.init_transfer = receiver.init_transfer
        self.start_push = receiver.start_push
        self.receive = receiver.receive
        self.finish_push = receiver.finish_push

    def parts(self, prompts: Sequence[Sequence[int]], n: int, sampling: SamplingConfig, seed: int) -> Iterator[Rollout]:
        """The rollout, all of it at once."""
        yield self.generate(prompts, n, sampling, seed)

    def sleep(self) -> None:
        """Does nothing: it holds no memory that it could free."""

    def wake(self) -> None:
        """Does nothing, like `sleep`."""

    def close(self) -> None:
        """Does nothing: nothing outlives the process."""


def _load_model(spec: TrainSpec | InferSpec | AttnSpec, dtype: torch.dtype) -> Any:
    """The checkpoint's model, on this process's GPU if it has one, else on the CPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_model(spec.checkpoint, dtype=dtype, device=device, trust_remote_code=spec.trust_remote_code)


def _torch_train(spec: TrainSpec, rank: int, address: str, port: int) -> tuple[Engine, torch.device]:
    """The single-process engine, which needs no rendezvous."""
    model = _load_model(spec, torch.float32)
    engine = TorchTrain(
        model,
        AutoTokenizer.from_pretrained(spec.checkpoint, **loading_options(spec.trust_remote_code)),
        optimizer=spec.optimizer,
        loss=spec.loss,
        temperature=spec.temperature,
        micro_batch_size=spec.micro_batch_size,
        max_tokens=spec.max_tokens,
        log_prob_micro_batch_size=spec.log_prob_micro_batch_size,
        share_prompts=spec.share_prompts,
        precision=getattr(torch, spec.precision),
        reference=_load_model(spec, torch.float32) if spec.reference else None,
        gradient_checkpointing=spec.gradient_checkpointing,
    )
    return engine, model.device


def _megatron_train(spec: TrainSpec, rank: int, address: str, port: int) -> tuple[Engine, torch.device]:
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
        max_tokens=spec.max_tokens,
        precision=getattr(torch, spec.precision),
        with_reference=spec.reference,
        trust_remote_code=spec.trust_remote_code,
    )
    return engine, torch.device("cpu")


_BUILD_TRAIN: dict[str, Callable[[TrainSpec, int, str, int], tuple[Engine, torch.device]]] = {
    "torch": _torch_train,
    "megatron": _megatron_train,
}
"""TrainRole.engine → function of (spec, rank, address, port) that returns the engine and the device for its batches."""
