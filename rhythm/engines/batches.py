"""Selects rows and micro-batches of dataclasses whose tensors all have the responses on axis 0."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from rhythm.credit.loss import LossConfig
from rhythm.engines.interfaces import Rollout, TrainBatch
from rhythm.engines.micro_batches import split_rows

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

D = TypeVar("D", bound="DataclassInstance")


def take_rows(items: D, index_n: Tensor) -> D:
    """The rows `index_n`, in that order."""
    return _map_tensors(items, lambda x: x[index_n.to(x.device)])


def trim(items: D, width: int) -> D:
    """The first `width` positions of every [B, T] tensor; the rest must be padding."""
    return _map_tensors(items, lambda x: x[:, :width] if x.ndim == 2 else x)


def to_device(items: D, device: torch.device | str) -> D:
    """The same dataclass with its tensors on `device`."""
    return _map_tensors(items, lambda x: x.to(device))


def concatenate(parts: Sequence[Rollout], pad_id: int) -> Rollout:
    """The rows of all parts, padded to the longest."""
    width = max(part.input_ids.shape[1] for part in parts)

    def joined(name: str, padding: float | None = None) -> Tensor:
        tensors: list[Tensor] = [getattr(part, name) for part in parts]
        if padding is not None:
            tensors = [torch.nn.functional.pad(x, (0, width - x.shape[1]), value=padding) for x in tensors]
        return torch.cat(tensors)

    return Rollout(
        input_ids=joined("input_ids", pad_id),
        attention_mask=joined("attention_mask", False),
        response_mask=joined("response_mask", False),
        prompt_lens=joined("prompt_lens"),
        group=joined("group"),
        logprobs=joined("logprobs", 0.0),
        finished=joined("finished"),
    )


def assemble(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    logprobs: Sequence[Sequence[float]],
    *,
    group: Sequence[int],
    finished: Sequence[bool],
    pad_id: int,
) -> Rollout:
    """Build a right-padded Rollout from lists, one entry per response."""
    rows = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
    prompt_lens_B = torch.tensor([len(prompt) for prompt in prompts])
    lens_B = torch.tensor([len(row) for row in rows])
    t = torch.arange(int(lens_B.max()))
    input_ids_BT = torch.full((len(rows), len(t)), pad_id)
    logprobs_BT = torch.zeros(len(rows), len(t))
    for b, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        input_ids_BT[b, : len(row)] = torch.tensor(row)
        logprobs_BT[b, len(prompt) : len(row)] = torch.tensor(logprobs[b])
    attention_mask = t < lens_B[:, None]
    return Rollout(
        input_ids=input_ids_BT,
        attention_mask=attention_mask,
        response_mask=attention_mask & (t >= prompt_lens_B[:, None]),
        prompt_lens=prompt_lens_B,
        group=torch.tensor(list(group)),
        logprobs=logprobs_BT,
        finished=torch.tensor(list(finished)),
    )


def rows_with_gradient(batch: TrainBatch, loss: LossConfig) -> Tensor:
    """bool [B]: the rows from which the loss has a gradient. Those whose advantages are all 0, as where all responses
    to a prompt had the same reward, have none, unless `loss` adds an entropy term. With a reference all rows count, as
    the KL divergence to it is a mean over all of them.

    One row at least, so that there are gradients of 0, by which optimizers go on, and not no gradients.
    """
    if batch.reference_logprobs is not None or loss.entropy_coef:
        return torch.ones_like(batch.rollout.finished)
    learns_B = ((batch.advantages != 0) & batch.rollout.response_mask).any(dim=1)
    if not learns_B.any():
        learns_B[batch.rollout.lens.argmin()] = True
    return learns_B


def micro_batches(
    rollout: Rollout, size: int, max_tokens: int | None = None, *, padded: bool = True, by_prompt: bool = False
) -> Iterator[tuple[Tensor, int]]:
    """(row indices, width) per micro-batch, as `split_rows` plans them. `size`: rows of each at most; `by_prompt`:
    rows of a prompt come together.
    """
    lens_B, group_B = rollout.lens, rollout.group if by_prompt else None
    for index_n in split_rows(lens_B, size, max_tokens, padded=padded, group_B=group_B):
        yield index_n, int(lens_B[index_n].max())


def _map_tensors(items: D, function: Callable[[Tensor], Tensor]) -> D:
    def mapped(value: Any) -> Any:
        if isinstance(value, Tensor):
            return function(value)
        return _map_tensors(value, function) if is_dataclass(value) and not isinstance(value, type) else value

    return replace(items, **{field.name: mapped(getattr(items, field.name)) for field in fields(items)})
