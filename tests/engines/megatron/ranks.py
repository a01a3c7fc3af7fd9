"""Runs scenarios of test_ranks.py, one for each line of stdin: {"spec": file of torch.save, "out": where results go,
"environment": variables}. Rank r leaves OUT.r, all of them write to OUT.log, and a line of stdout is the exit code.

A script, not a module of tests: every scenario's ranks are forked from this process, which has imported torch and
Megatron-core once, longer work than most scenarios, and has started no thread.
"""

from __future__ import annotations

import faulthandler
import importlib.util
import json
import os
import socket
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import multiprocessing
from torch.utils._pytree import tree_leaves

from rhythm.credit.heads import HeadGroups
from rhythm.engines import head
from rhythm.engines.interfaces import NonFiniteError, Rollout, TrainBatch
from rhythm.engines.megatron import core_attention, gradients, packing, train
from rhythm.engines.megatron import model as models
from rhythm.engines.megatron.cpu import on_cpu
from rhythm.engines.megatron.layout import ParallelConfig
from rhythm.engines.megatron.parallel import Rendezvous
from rhythm.engines.megatron.train import MegatronTrain
from rhythm.engines.megatron.weights import load_weights
from rhythm.tap.megatron import attach
from rhythm.tap.megatron_layers import MicroBatch
from rhythm.tap.signals_config import SignalsConfig


def serve() -> None:
    """A process for each scenario, so that none sees what another has left."""
    for line in sys.stdin:
        request = json.loads(line)
        process = os.fork()
        if not process:
            code = 1
            try:
                _in_environment(request["environment"], f"{request['out']}.log")
                run(request["spec"], request["out"])
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _in_environment(variables: dict[str, str], log: str) -> None:
    os.environ.clear()
    os.environ.update(variables)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def run(spec_path: str, out_path: str) -> None:
    """Fork the ranks of the layout and wait for them."""
    spec = torch.load(spec_path, weights_only=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = spec["parallel"].ranks
    multiprocessing.start_processes(_rank, (spec, out_path, port), nprocs=ranks, start_method="fork")


def _rank(rank: int, spec: dict[str, Any], out_path: str, port: int) -> None:
    faulthandler.enable()
    torch.set_num_threads(1)
    parallel: ParallelConfig = spec["parallel"]
    if "bucket_size" in spec:  # of gradients: else all of them are in one
        gradients.DistributedDataParallelConfig = partial(
            gradients.DistributedDataParallelConfig, bucket_size=spec["bucket_size"]
        )
    try:
        engine = MegatronTrain(
            spec["checkpoint"],
            Rendezvous(rank, parallel.ranks, "127.0.0.1", port, timeout=300),
            parallel,
            micro_batch_size=2,
            with_reference=True,
            **spec["options"],
        )
        results = SCENARIOS[spec["scenario"]](engine, spec, rank)
    except BaseException:
        traceback.print_exc()
        raise
    torch.save(results, f"{out_path}.{rank}")
    engine.close()


def _everything(engine: MegatronTrain, spec: dict[str, Any], rank: int) -> dict[str, Any]:
    rollout: Rollout = spec["rollout"]
    tap = SignalsConfig(backend="reference", layers=3)
    widest = _watch_logits(engine)
    results: dict[str, Any] = {"weights_at_start": engine.weights()}
    results["log_probs"], results["signals"] = engine.log_probs(rollout, tap)
    results["statistics_seconds"] = engine.statistics_seconds
    results["batch_signals"] = engine.log_probs(rollout, tap.model_copy(update={"grouping": "batch"}))[1]
    groups = results["signals"].groups
    fixed = HeadGroups(groups.local[:1].roll(1, dims=1), groups.global_[:1].roll(1, dims=1))
    results["fixed_signals"] = engine.log_probs(rollout, tap, fixed)[1]
    results["one_row"] = engine.log_probs(_first_row(rollout))[0]
    results["statistics_seconds_without_tap"] = engine.statistics_seconds
    results["steps"] = [engine.step(batch) for batch in spec["batches"][:1]]
    results["gradient_bytes"] = [_gradient_bytes(engine)]
    results["log_probs_there"] = engine.log_probs(rollout)[0]
    engine.leave_gpu(offload=True)  # which changes no number of what follows
    results["log_probs_away"] = engine.log_probs(rollout)[0]
    results["gradient_bytes"].append(_gradient_bytes(engine))
    results["steps"] += [engine.step(batch) for batch in spec["batches"][1:-1]]
    results["gradient_bytes"].append(_gradient_bytes(engine))
    results["weights"] = engine.weights()
    results["reference"] = engine.reference_log_probs(rollout)
    results["refused"] = _refuses_infinity(engine, spec["batches"][0])
    results["weights_after_refusal"] = engine.weights()
    directory = Path(spec["save_to"])
    directory.mkdir(exist_ok=True)
    engine.leave_gpu(offload=True)
    with _watch_gathering() as results["gathered_by_saving"]:
        engine.save(directory)
    results["left_by_saving"] = [process.cmdline() for process in psutil.Process().children()]
    engine.step(spec["batches"][-1])
    results["last_weights"] = engine.weights()
    engine.leave_gpu(offload=True)
    engine.load(directory)
    engine.step(spec["batches"][-1])
    results["last_weights_again"] = engine.weights()
    for name in spec["load_from"]:
        engine.load(Path(name))
        engine.step(spec["batches"][-1])
        results[f"loaded {name}"] = engine.weights()
    results["widest_logits"] = max(widest)
    return results


def _gradient_bytes(engine: MegatronTrain) -> int:
    return sum(buffer.grad_data.untyped_storage().nbytes() for buffer in engine._model.buffers)


def _scores(engine: MegatronTrain, spec: dict[str, Any], rank: int) -> dict[str, Any]:
    results: dict[str, Any] = {"weights_at_start": engine.weights()}
    results["log_probs"], results["signals"] = engine.log_probs(spec["rollout"], spec.get("tap"))
    results["steps"] = [engine.step(batch) for batch in spec["batches"]]
    results["weights"] = engine.weights()
    return results


def _overlapped(engine: MegatronTrain, spec: dict[str, Any], rank: int) -> dict[str, Any]:
    """`_scores`, and how many sums of gradients were started in the passes of each step, and in all."""
    started: list[int] = []
    groups, config = engine._model.bucket_groups, engine._model.config
    ends, passes = config.finalize_model_grads_func, []

    def counted(start: Any, *args: Any, **options: Any) -> None:
        started.append(0)
        start(*args, **options)

    def end(*args: Any, **options: Any) -> None:
        passes.append(len(started))
        ends(*args, **options)
        passes[-1] = (passes[-1], len(started))
        started.clear()

    for group in groups:
        group.start_grad_sync = partial(counted, group.start_grad_sync)
    config.finalize_model_grads_func = train.add_up_gradients = end
    return _scores(engine, spec, rank) | {"buckets": len(groups), "started": passes}


def _hidden(engine: MegatronTrain, spec: dict[str, Any], rank: int) -> dict[str, Any]:
    """What the log-probs were made of: hidden states, tokens and what came out, of each micro-batch; and the head."""
    seen = []

    def watched(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, token_N: torch.Tensor, **options: Any) -> Any:
        results = head.logprobs_and_entropies(hidden_ND, weight_VD, token_N, **options)
        seen.append((hidden_ND, token_N, *results))
        return results

    train.logprobs_and_entropies = watched
    engine.log_probs(spec["rollout"])
    return {"seen": seen, "head": engine.weights()["model.embed_tokens.weight"]}


def _packed(engine: MegatronTrain, spec: dict[str, Any], rank: int) -> dict[str, Any]:
    """`_scores`, and the tokens of this rank's micro-batches in the last gradient step."""
    results = _scores(engine, spec, rank)
    tokens: list[int] = []
    inner = train.pack

    def counted(*args: Any, **options: Any) -> Any:
        packed = inner(*args, **options)
        tokens.append(len(packed.input_ids))
        return packed

    train.pack = counted
    engine.step(spec["batches"][-1])
    return results | {"tokens": tokens}


def _saved_at_start(engine: MegatronTrain, spec: dict[str, Any], rank: int) -> dict[str, Any]:
    """Weights before and after the engine was saved, after a step, and after it was loaded and took the step again."""
    directory = Path(spec["save_to"])
    directory.mkdir(exist_ok=True)
    results = {"weights_at_start": engine.weights()}
    engine.save(directory)
    results["weights_saved"] = engine.weights()
    for name in ("weights", "weights_again"):
        engine.step(spec["batches"][0])
        results[name] = engine.weights()
        engine.load(directory)
    return results


def _resumed(engine: MegatronTrain, spec: dict[str, Any], rank: int) -> dict[str, Any]:
    engine.load(Path(spec["load_from"]))
    engine.step(spec["batches"][-1])
    return {"last_weights": engine.weights()}


def _tapped(engine: MegatronTrain, spec: dict[str, Any], rank: int) -> dict[str, Any]:
    """A gradient step that reads its own signals, and one that reads none."""
    batch: TrainBatch = spec["batch"]
    coupled, entropy = spec["shapes"]
    results: dict[str, Any] = {"taken": engine.tapped_step(batch, spec["tap"], coupled)}
    results["seconds"] = engine.statistics_seconds
    results["weights"] = engine.weights()
    results["without"] = engine.tapped_step(batch, None, entropy)
    try:
        engine.tapped_step(batch, spec["tap"].model_copy(update={"grouping": "batch"}), coupled)
    except ValueError as error:
        results["refused"] = str(error)
    return results


def _attached(engine: MegatronTrain, spec: dict[str, Any], rank: int) -> dict[str, Any]:
    """The signals of a model with Megatron's own DotProductAttention, on padded rows in another order."""
    rollout: Rollout = spec["rollout"]
    inner = models._layer_spec

    def with_its_attention(*args: Any) -> Any:
        made = inner(*args)
        made.submodules.self_attention.submodules.core_attention = DotProductAttention
        return made

    models._layer_spec = with_its_attention
    with on_cpu():
        model = models.build_model(engine.config, engine._groups, spec["parallel"], torch.float32)
        load_weights(model, spec["checkpoint"], engine.config, engine._groups)
    model.eval()
    lens = rollout.lens

    def forward(items: Any, model: Any) -> Any:
        rows = next(items)
        width = int(lens[rows].max())
        width += width % spec["parallel"].tensor
        hidden_keys = torch.ones(1, 1, width, width, dtype=torch.bool).triu(1)
        micro = MicroBatch(rows, lens[rows].tolist(), rollout.prompt_lens[rows].tolist())
        ids = torch.nn.functional.pad(rollout.input_ids, (0, 1))[rows, :width]
        with tap.reading(micro):
            hidden = model(ids, torch.arange(width)[None], attention_mask=hidden_keys)
        return hidden, lambda output: (output.sum(), {})

    micro_batches = [[6, 0], [3], [1, 5, 2], [4]]
    with attach(model, SignalsConfig(backend="reference", layers=3)) as tap, on_cpu(), torch.no_grad():
        get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter(micro_batches),
            model=[model],
            num_microbatches=len(micro_batches),
            seq_length=1,
            micro_batch_size=1,
            forward_only=True,
        )
    cores = {type(layer.self_attention.core_attention).__name__ for layer in model.decoder.layers}
    return {"signals": tap.signals(rollout.response_mask), "cores": cores}


def _without_values(engine: MegatronTrain, spec: dict[str, Any], rank: int) -> dict[str, Any]:
    """Passes over packed rows on the device "meta", also with a tap, and with cu_seqlens there."""
    meta, rollout = torch.device("meta"), spec["rollout"]
    # On a GPU torch's varlen attention, which takes the bounds on the device; elsewhere they are read on the host.
    core_attention.packed_attention = lambda q_THD, *_: torch.empty_like(q_THD)
    torch.autocast = lambda *_, **__: nullcontext()  # which there is none of on that device
    model = engine._model.module.to(meta)
    model.rotary_pos_emb.inv_freq = model.rotary_pos_emb.inv_freq.to(meta)
    packed = packing.pack(rollout, torch.tensor([2, 0, 1]), meta)

    def passed() -> list[int]:
        ids, positions = packed.input_ids[None], packed.position_ids[None]
        return [*model(ids, positions, attention_mask=None, packed_seq_params=packed.sequences).shape]

    results: dict[str, Any] = {"tokens": int(rollout.lens[:3].sum()), "shape": passed()}
    with attach(model, SignalsConfig(layers=3), groups=engine._groups) as tap, tap.reading(packed.micro):
        results["tapped"] = passed()
    packed.sequences.cu_seqlens_q = packed.sequences.bounds
    try:
        passed()
    except (RuntimeError, NotImplementedError) as error:
        results["refused"] = str(error)
    return results


def _called(engine: MegatronTrain, spec: dict[str, Any], rank: int) -> dict[str, Any]:
    """A function of another file."""
    found = importlib.util.spec_from_file_location("called", spec["file"])
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    results: dict[str, Any] = module.run(engine, spec, rank)
    return results


SCENARIOS = {
    "called": _called,
    "without_values": _without_values,
    "attached": _attached,
    "everything": _everything,
    "scores": _scores,
    "hidden": _hidden,
    "overlapped": _overlapped,
    "packed": _packed,
    "resumed": _resumed,
    "saved_at_start": _saved_at_start,
    "tapped": _tapped,
}


def _first_row(rollout: Rollout) -> Rollout:
    return Rollout(**{name: value[:1] for name, value in vars(rollout).items()})


def _refuses_infinity(engine: MegatronTrain, batch: TrainBatch) -> tuple[str, bool]:
    broken = torch.where(batch.rollout.response_mask, torch.inf, 0.0)
    try:
        engine.step(TrainBatch(batch.rollout, batch.old_logprobs, broken, batch.reference_logprobs))
    except NonFiniteError as error:
        return error.what, error.batch.rollout is batch.rollout
    return "nothing", False


@contextmanager
def _watch_gathering() -> Iterator[list[int]]:
    """The numbers of values of the optimizer's whole state that this rank gets."""
    counts: list[int] = []
    gather = DistributedOptimizer.get_parameter_state_dp_zero

    def counted(*args: Any, **options: Any) -> Any:
        state = gather(*args, **options)
        tensors = [x for x in tree_leaves(state) if isinstance(x, torch.Tensor)]
        counts.append(sum(x.numel() for x in tensors))
        return state

    DistributedOptimizer.get_parameter_state_dp_zero = counted
    try:
        yield counts
    finally:
        DistributedOptimizer.get_parameter_state_dp_zero = gather


def _watch_logits(engine: MegatronTrain) -> list[int]:
    """Tokens that had logits at once, at each call from here on."""
    counts = [0]
    inner = head._scaled_logits

    def counted(operand_nD: torch.Tensor, *rest: Any) -> torch.Tensor:
        counts.append(len(operand_nD))
        return inner(operand_nD, *rest)

    head._scaled_logits = counted
    return counts


if __name__ == "__main__":
    serve()
