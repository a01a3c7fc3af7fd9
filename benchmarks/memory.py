"""python -m benchmarks.memory: the memory of Megatron's passes and steps beside what the plan says.

Builds the Megatron engine in bfloat16 on a CPU, with and without recomputation, runs the pass over log-probs and
gradient steps, and counts the bytes of the tensors that are alive, each storage once. Three operations are made to keep
and allocate what CUDA's kernels do (benchmarks/as_on_cuda.py), and torch's AdamW works on all tensors at once, as it
does on CUDA. Not counted: what Gloo copies (NCCL sums in place). Prints a markdown table; exits with 1 if a number of
the plan is off by more than 15 %.
"""

from __future__ import annotations

import argparse
import socket
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks import ROOT
from benchmarks.as_on_cuda import as_on_cuda
from benchmarks.live_memory import LiveMemory, storage_bytes
from benchmarks.record import commit, machine, record_path, software, write_record
from rhythm.cluster.config import ClusterConfig
from rhythm.cluster.plan.dimensions import Dimensions, Workload
from rhythm.cluster.plan.memory import TrainMemory, train_memory
from rhythm.credit.heads import sampled_layers
from rhythm.credit.loss import LossConfig
from rhythm.engines.interfaces import Rollout, TrainBatch
from rhythm.engines.local.train import OptimizerConfig
from rhythm.engines.megatron.layout import ParallelConfig
from rhythm.engines.megatron.parallel import Rendezvous
from rhythm.engines.megatron.train import MegatronTrain
from rhythm.tap.megatron import attach
from rhythm.tap.signals_config import SignalsConfig
from rhythm.tiny.model import build_tokenizer

MODELS = {
    # Qwen3-4B with an eighth of its width, heads of half the size, and a sixth of its layers.
    "qwen3-4b/8": Dimensions(6, 320, 1216, 8, 2, 64, 18_992, 4096, tied=True),
    # Qwen3-8B, likewise: the head has its own weights.
    "qwen3-8b/8": Dimensions(6, 512, 1536, 8, 2, 64, 18_992, 4096, tied=False),
    "tiny": Dimensions(3, 64, 192, 4, 2, 16, 2000, 4096, tied=True),
}
TOLERANCE = 0.15


@dataclass(frozen=True)
class Row:
    """Bytes of a part: counted, and as planned."""

    part: str
    counted: int
    planned: int

    @property
    def off(self) -> float:
        """The plan's error as a share of what was counted."""
        return self.planned / self.counted - 1

    @property
    def agrees(self) -> bool:
        return abs(self.off) <= TOLERANCE


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["qwen3-4b/8", "qwen3-8b/8"])
    parser.add_argument("--rows", type=int, default=2, help="sequences of a micro-batch")
    parser.add_argument("--tokens", type=int, default=1024, help="of each sequence, the first of which is its prompt")
    parser.add_argument("--chunk", type=int, default=256, help="optimizer.token_chunk")
    parser.add_argument("--record", action="store_true", help="write a record")
    options = parser.parse_args(arguments)
    if torch.cuda.is_available():
        parser.error("this counts on a CPU: hide the GPUs with CUDA_VISIBLE_DEVICES=")
    torch.set_num_threads(1)
    where = {"machine": machine(), "software": software(), "commit": commit()}
    print(f"{options.rows} rows of {options.tokens} tokens, token_chunk {options.chunk}, bfloat16\n")
    print("| model | part | counted, MB | planned, MB | plan off by |")
    print("|---|---|---|---|---|")
    found: dict[str, list[Row]] = {}
    for name in options.models:
        for recompute in (False, True):
            label = name + (", recompute" if recompute else "")
            sizes = options.rows, options.tokens, options.chunk
            found[label] = measure(MODELS[name], *sizes, recompute=recompute)
            for row in found[label]:
                print(f"| {label} | {row.part} | {row.counted / 1e6:.2f} | {row.planned / 1e6:.2f} | {row.off:+.1%} |")
    if options.record:
        path = record_path("cpu", where["machine"]).with_name("memory.json")
        shown = {label: [asdict(row) for row in rows] for label, rows in found.items()}
        write_record(path, {**where, **vars(options), "parts": shown})
        print(f"\n{path.relative_to(ROOT)}")
    return verdict(row for rows in found.values() for row in rows)


def verdict(rows: Iterable[Row]) -> int:
    """The exit code: 1 if the plan is off somewhere; then says where on stderr."""
    wrong = [row for row in rows if not row.agrees]
    for row in wrong:
        print(f"off by more than {TOLERANCE:.0%}: {row}", file=sys.stderr)
    return 1 if wrong else 0


def measure(model: Dimensions, rows: int, tokens: int, chunk: int, *, recompute: bool) -> list[Row]:
    """Every part of a run with one rank. Once per process and layout: Megatron's groups are the process's."""
    plan = planned(model, rows, tokens, chunk, recompute=recompute)
    brief = plan.activations
    with tempfile.TemporaryDirectory() as scratch, LiveMemory() as memory, as_on_cuda(memory):
        with memory.paused():
            _save_random_model(Path(scratch), model)
        nothing = memory.live
        engine = _engine(Path(scratch), rows, chunk, recompute=recompute)
        try:
            rollout = _rollout(rows, tokens)
            engine.log_probs(rollout)  # what is made once, such as the positions' cosines, doesn't count
            memory.peak = resting = memory.live
            log_probs, _ = engine.log_probs(rollout)
            scores = memory.peak - resting
            batch = TrainBatch(rollout, log_probs.logprobs, torch.ones(rows, tokens))
            engine.step(batch)  # AdamW's moments are allocated in the first step
            resident = memory.live - nothing
            counts = _Counts.of(engine, memory, batch)
            statistics = _statistics(engine, rollout)
            weights = storage_bytes(engine._model.parameters())
            gradients = storage_bytes(buffer.grad_data for buffer in engine._model.buffers)
        finally:
            engine.close()
    return [
        Row("weights", weights, plan.weights),
        Row("gradients", gradients, plan.gradients),
        Row("optimizer", resident - weights - gradients, plan.optimizer),
        Row("kept by all layers", counts.kept, brief.kept),
        Row("backward pass of a layer", counts.layer, brief.layer),
        Row("backward pass of the head", counts.head, brief.head),
        Row("end of the backward pass", counts.end, brief.end),
        Row("passes of a gradient step, peak", counts.gradients, brief.gradients),
        Row("optimizer's step, peak", counts.update, brief.update),
        Row("pass over log-probs, peak", scores, brief.scores),
        Row("attention statistics", statistics, brief.statistics),
    ]


def planned(model: Dimensions, rows: int, tokens: int, chunk: int, *, recompute: bool) -> TrainMemory:
    """The plan of a run whose only step is one micro-batch."""
    cluster = ClusterConfig.model_validate({"gpus": 1, "max_length": tokens, "train": {"recompute": recompute}})
    work = Workload(
        prompts_per_batch=rows,
        responses_per_prompt=1,
        mini_batch_size=rows,
        micro_batch_size=rows,
        max_new_tokens=tokens - 1,
        token_chunk=chunk,
        value_bytes=2,
        steps=1,
        reference=False,
        separate_attn=False,
        sampled_layers=len(sampled_layers(model.layers)),
    )
    return train_memory(cluster, work, model)


@dataclass
class _Counts:
    """Bytes of one gradient step; see rhythm.cluster.plan.activations.Activations."""

    kept: int = 0
    head: int = 0
    layer: int = 0
    end: int = 0
    gradients: int = 0
    update: int = 0

    @staticmethod
    def of(engine: MegatronTrain, memory: LiveMemory, batch: TrainBatch) -> _Counts:
        """Run a step, and note at its moments what is live, and what was since the moment before."""
        counts, model = _Counts(), engine._model.module
        rest, start, peaks = memory.live, 0, {}
        tied_gradient = storage_bytes([model.head_weight()[:0].new_empty(model.head_weight().shape)])
        tied_gradient *= model.share_embeddings_and_output_weights

        def ends(moment: str) -> None:
            peaks[moment], memory.peak = memory.peak, memory.live

        def embedded(_: Any, args: Any, hidden: Tensor) -> None:
            nonlocal start
            start = memory.live - storage_bytes([hidden])
            hidden.register_hook(lambda _: ends("layer"))

        def decoded(_: Any, args: tuple[Tensor, ...]) -> None:
            counts.kept = memory.live - start - storage_bytes(args[:1])
            args[0].register_hook(lambda _: ends("head"))
            ends("layers' forward pass")

        add_up, update = model.config.finalize_model_grads_func, engine._optimizer.step_with_ready_grads

        def finalize(*args: Any, **kwargs: Any) -> None:
            ends("end")
            with memory.paused():
                add_up(*args, **kwargs)

        def step() -> None:
            memory.peak = before = memory.live
            update()
            counts.update = memory.peak - before

        hooks = [model.embedding.register_forward_hook(embedded)]
        hooks.append(model.decoder.final_layernorm.register_forward_pre_hook(decoded))
        model.config.finalize_model_grads_func, engine._optimizer.step_with_ready_grads = finalize, step
        for part in engine._optimizer.chained_optimizers:
            for group in part.optimizer.param_groups:
                group["foreach"] = True
        memory.peak = memory.live
        engine.step(batch)
        for hook in hooks:
            hook.remove()
        counts.head = peaks["head"] - start - counts.kept
        counts.layer = peaks["layer"] - start - counts.kept - tied_gradient
        counts.end = peaks["end"] - start
        counts.gradients = max(peaks.values()) - rest
        return counts


def _statistics(engine: MegatronTrain, rollout: Rollout) -> int:
    """Bytes of the statistics of a pass, kept until the signals are computed."""
    with attach(engine._model.module, SignalsConfig(), groups=engine._groups) as tap:
        engine._log_probs(engine._model.module, rollout, lambda packed: tap.reading(packed.micro))
        reads = tap.take_reads()
    return storage_bytes(x for read in reads for x in (read.waad, read.fai) if x is not None)


def _engine(checkpoint: Path, rows: int, chunk: int, *, recompute: bool) -> MegatronTrain:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    return MegatronTrain(
        checkpoint,
        Rendezvous(0, 1, "127.0.0.1", port),
        ParallelConfig(recompute=recompute),
        optimizer=OptimizerConfig(token_chunk=chunk),
        loss=LossConfig(),
        temperature=1.0,
        micro_batch_size=rows,
        precision=torch.bfloat16,
    )


def _rollout(rows: int, tokens: int) -> Rollout:
    inside = torch.ones(rows, tokens, dtype=torch.bool)
    return Rollout(
        input_ids=torch.randint(4, 100, (rows, tokens), generator=torch.Generator().manual_seed(0)),
        attention_mask=inside,
        response_mask=torch.arange(tokens).expand(rows, tokens) > 0,
        prompt_lens=torch.ones(rows, dtype=torch.long),
        group=torch.arange(rows),
        logprobs=torch.zeros(rows, tokens),
        finished=torch.ones(rows, dtype=torch.bool),
    )


def _save_random_model(directory: Path, model: Dimensions) -> None:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=model.vocabulary,
        hidden_size=model.hidden_size,
        intermediate_size=model.mlp_size,
        num_hidden_layers=model.layers,
        num_attention_heads=model.query_heads,
        num_key_value_heads=model.key_heads,
        head_dim=model.head_size,
        max_position_embeddings=model.max_positions,
        tie_word_embeddings=model.tied,
    )
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    build_tokenizer().save_pretrained(directory)


if __name__ == "__main__":
    sys.exit(main())
