"""python -m benchmarks.cluster_step: what attention statistics cost in a training step of the cluster.

Runs `rhythm-train configs/countdown_cluster_cpu.yaml` (vLLM, Megatron-core, Ray) on a model with random weights, whose
responses reach the length limit, once for each source of γ: none; inline, in Megatron's old-log-prob pass; separate, an
extra pass on actor_attn; eager, the same pass with whole T × T maps, as the authors compute them. All passes stop after
the last sampled layer, while the authors' pass runs through the whole model. The first step is a warm-up; the numbers
are medians over the others. Writes a record and prints a markdown table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks import ROOT
from benchmarks.record import commit, machine, record_path, software, write_record
from rhythm.tiny.model import build_tokenizer

WAYS: dict[str, list[str]] = {
    "none": ["credit.strategy=none"],
    "inline": ["signals.source=inline"],
    "separate": ["signals.source=separate"],
    "eager": ["signals.source=separate", "signals.backend=reference"],
}
VOCABULARY = 4096  # so large that sampling an end token is rare
PROMPTS, RESPONSES = 2, 4


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cluster_step", description=__doc__)
    parser.add_argument("--tokens", type=int, default=1200, help="longest response")
    parser.add_argument("--steps", type=int, default=3, help="training steps, the first of which is not counted")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = Path(scratch) / "model"
        _random_model(checkpoint, max_positions=options.tokens + 64)
        medians = {way: _run(way, checkpoint, Path(scratch), options.tokens, options.steps) for way in options.ways}
    where = machine()
    path = record_path("cpu", where).with_name("cluster_step.json")
    write_record(
        path,
        {
            "machine": where,
            "software": software(),
            "commit": commit(),
            "tokens": options.tokens,
            "responses": PROMPTS * RESPONSES,
            "ways": medians,
        },
    )
    print("| γ from | statistics, s per step | share of the step | step, s | rollout, s | tokens |")
    print("|---|---|---|---|---|---|")
    for way, numbers in medians.items():
        spent = numbers["attention_share"] * numbers["seconds_total"]
        print(
            f"| {way} | {spent:.2f} | {numbers['attention_share']:.1%} | {numbers['seconds_total']:.1f} "
            f"| {numbers['seconds_rollout']:.1f} | {numbers['response_tokens']:.0f} |"
        )
    print(f"\n{path.relative_to(ROOT)}")
    return 0


def _random_model(directory: Path, max_positions: int) -> None:
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=9,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=max_positions,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    Qwen3ForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _run(way: str, checkpoint: Path, scratch: Path, tokens: int, steps: int) -> Mapping[str, float]:
    overrides: dict[str, Any] = {
        "name": way,
        "runs_dir": scratch,
        "steps": steps,
        "tensorboard": "false",
        "model.path": checkpoint,
        "batch.prompts_per_batch": PROMPTS,
        "batch.responses_per_prompt": RESPONSES,
        "batch.mini_batch_size": PROMPTS * RESPONSES,
        "batch.micro_batch_size": 2,
        "sampling.max_new_tokens": tokens,
        "signals.horizon": "paper",
        "evaluation.every_steps": steps + 1,
        "evaluation.samples": 0,
        "evaluation.instances": 1,
        "checkpoint.every_steps": steps + 1,
        "cluster.max_length": tokens + 64,
        "cluster.train.tensor": 1,
        "cluster.infer.kv_cache_gib": 0.5,
    }
    command = [sys.executable, "-m", "rhythm.cli.train", str(ROOT / "configs" / "countdown_cluster_cpu.yaml")]
    command += [f"{key}={value}" for key, value in overrides.items()] + WAYS[way]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the run with γ from {way} failed, see above: {' '.join(command)}")
    lines = (scratch / way / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    counted = [row for row in map(json.loads, lines) if row["step"] > 1]
    names = [name for name, value in counted[-1].items() if isinstance(value, int | float) and name != "step"]
    return {name: statistics.median(row[name] for row in counted if row.get(name) is not None) for name in names}


if __name__ == "__main__":
    sys.exit(main())
