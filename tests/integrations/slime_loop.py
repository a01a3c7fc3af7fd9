"""One rollout's work of a slime actor, as its source has it at the commit that docs/trainers.md names, on the tiny
model: packed micro-batches in an order of their own, passes of the reference and of the actor, advantages, training.
Run on each rank by tests/engines/megatron/ranks.py.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch.nn.functional import pad

from rhythm.engines.interfaces import Rollout
from rhythm.engines.megatron.cpu import on_cpu
from rhythm.engines.megatron.packing import PackedRows
from rhythm.integrations import slime

MULTIPLE = 16  # --data-pad-size-multiplier


def get_batch(data: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    """The forward pass's arguments: the samples one after the other, padded at the end, and their loss masks shifted to
    the positions whose logits predict the tokens.
    """
    tokens = [data["tokens"][row] for row in rows]
    bounds = [0, *torch.tensor([len(t) for t in tokens]).cumsum(0).tolist()]
    masks = [
        pad(data["loss_masks"][row], (data["total_lengths"][row] - data["response_lengths"][row] - 1, 1))
        for row in rows
    ]
    ids, mask = torch.cat(tokens), torch.cat(masks)
    if missing := -len(ids) % MULTIPLE:
        ids, mask = pad(ids, (0, missing)), pad(mask, (0, missing))
        bounds.append(bounds[-1] + missing)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    longest = int(cu_seqlens.diff().max())
    # slime's are Megatron's PackedSeqParams; those of the model that runs here are a kind of them.
    packed = PackedRows("thd", cu_seqlens, cu_seqlens, max_seqlen_q=longest, max_seqlen_kv=longest)
    return {
        "input_ids": ids[None],
        "position_ids": None,
        "attention_mask": None,
        "labels": None,
        "packed_seq_params": packed,
        "loss_mask": mask[None],
    }


def forward_only(model: Any, data: dict[str, Any], micro_batches: list[list[int]]) -> None:
    def forward_step(items: Any, model: Any) -> Any:
        return model(**get_batch(data, next(items))), lambda output: (output.sum(), {})

    with on_cpu(), torch.no_grad():
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(micro_batches),
            model=[model],
            num_microbatches=len(micro_batches),
            seq_length=1,
            micro_batch_size=1,
            forward_only=True,
        )


def samples(rollout: Rollout, rows: list[int], masked: int | None) -> dict[str, Any]:
    """A data rank's part of the rollout; `masked`: a row that the loss leaves out."""
    lens = rollout.lens.tolist()
    responses = [lens[row] - int(rollout.prompt_lens[row]) for row in rows]
    return {
        "tokens": [rollout.input_ids[row, : lens[row]] for row in rows],
        "total_lengths": [lens[row] for row in rows],
        "response_lengths": responses,
        "loss_masks": [torch.full((r,), int(row != masked)) for row, r in zip(rows, responses, strict=True)],
    }


def advantages_of(rows: list[int], responses: list[int]) -> list[torch.Tensor]:
    """Positive and negative ones, one value a response, as GRPO's."""
    return [torch.full((r,), 1.5 - row % 3) for row, r in zip(rows, responses, strict=True)]


def run(engine: Any, spec: dict[str, Any], rank: int) -> dict[str, Any]:
    """The advantages of this rank's samples by row, and what is left of the hooks."""
    rollout: Rollout = spec["rollout"]
    data_rank, data_ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    rows = list(range(data_rank, len(rollout.lens), data_ranks))
    data = samples(rollout, rows, spec["masked"])
    args = SimpleNamespace(seed=7, advantage_estimator="grpo", context_parallel_size=1, qkv_format="thd")
    model = engine._model.module
    model.eval()
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(2)).tolist()
    micro_batches = [order[:2], order[2:3], order[3:]] if len(order) > 3 else [[i] for i in order]
    slime.before_log_probs(args, [model], "ref_")
    forward_only(engine._reference, data, micro_batches)
    slime.before_log_probs(args, [model], "")
    forward_only(model, data, micro_batches)
    plain = advantages_of(rows, data["response_lengths"])
    last = parallel_state.is_pipeline_last_stage()
    if last:
        data["advantages"] = plain
    slime.shape_advantages(args, 0, data)
    forward_only(model, data, micro_batches)  # that of the training step
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    try:
        slime.shape_advantages(args, 1, data)
        refused = ""
    except ValueError as error:
        refused = str(error)
    return {
        "advantages": dict(zip(rows, data["advantages"], strict=True)) if last else {},
        "plain": dict(zip(rows, plain, strict=True)),
        "hooks": hooks,
        "refused": refused,
    }
