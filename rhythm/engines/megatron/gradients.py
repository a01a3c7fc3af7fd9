"""Sums gradients over ranks: those of data parallel ranks while the backward pass still runs, bucket by bucket."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from torch import Tensor

from rhythm.engines.megatron.layout import ParallelConfig
from rhythm.engines.megatron.model import PolicyModel


def with_summed_gradients(model: PolicyModel, parallel: ParallelConfig, *, overlap: bool) -> Any:
    """The model in Megatron's DistributedDataParallel, whose schedules call `add_up_gradients`.

    `overlap`: start summing a bucket of gradients as soon as the last micro-batch's backward pass has computed them.
    All ranks must then compute every gradient in every micro-batch, as buckets are started in the order of the
    backward pass: experts without tokens would have none.
    """
    summed = DistributedDataParallel(
        config=model.config,
        ddp_config=DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=parallel.distributed_optimizer,
            overlap_grad_reduce=overlap,
        ),
        module=model,
    )
    model.config.finalize_model_grads_func = add_up_gradients
    model.config.no_sync_func = summed.no_sync if overlap else None
    return summed


def add_up_gradients(model: list[Any], num_tokens: Tensor | None = None, **_: Any) -> None:
    """Sum the gradients over data and context parallel ranks, copies of a tied embedding, and norms: every rank has a
    part of the loss.
    """
    for chunk in model:
        for bucket in chunk.bucket_groups if chunk.ddp_config.overlap_grad_reduce else ():
            if bucket.grad_reduce_handle is None and not bucket.is_first_batch:  # Megatron starts those of the first
                bucket.start_grad_sync()
    finalize_model_grads(model, None)


@contextmanager
def summed_at_the_end(model: Any) -> Iterator[None]:
    """Passes of a step in which some data ranks have no rows, hence no backward pass to start sums in: all ranks start
    them after their passes, in one order.
    """
    kept, model.config.no_sync_func = model.config.no_sync_func, None
    try:
        with model.no_sync():
            yield
    finally:
        model.config.no_sync_func = kept
