"""Estimates the memory that a rank of actor_train takes for a while: for a micro-batch, and for the optimizer's step.

The terms are those of Megatron's `local` layers in bfloat16, whose RMSNorms, attention and output head are CUDA's
kernels. `python -m benchmarks.memory` counts the tensors of every term and compares.
"""

from __future__ import annotations

from dataclasses import dataclass

from rhythm.cluster.config import ClusterConfig
from rhythm.cluster.plan.dimensions import Dimensions, Workload
from rhythm.engines.head import SLICE

FP32 = 4


@dataclass(frozen=True)
class Activations:
    """Bytes on a rank of the first pipeline stage.

    kept: what the layers of a micro-batch keep for the backward pass, of as many micro-batches as are in flight.
    gathered: Megatron's buffer for the tokens that tensor ranks have split, before a matrix; it is never freed.
    layer: in addition, while a layer's backward pass runs: gradients, and with recomputation what the layer keeps.
    head: in addition, while the output head's does: logits of a chunk, gradients of hidden states and head.
    head_gradient: the part of `head` that lives until the backward pass ends, as the embedding is the same weights.
    end: at the end of the backward pass, when the gradients of head and embedding are added.
    scores: the pass over log-probs, without gradients.
    statistics: attention statistics, until the signals are computed from them.
    update: the optimizer's step, whose intermediate result is as large as one of AdamW's moments.
    """

    kept: int
    gathered: int
    layer: int
    head: int
    head_gradient: int
    end: int
    scores: int
    statistics: int
    update: int
    tapped: bool

    @property
    def gradients(self) -> int:
        """Bytes that forward and backward passes take."""
        passes = max(self.kept + self.head, self.kept + self.head_gradient + self.layer, self.end)
        return passes + self.statistics * self.tapped

    @property
    def step(self) -> int:
        """Bytes that a gradient step takes: its passes, or the optimizer after them."""
        return max(self.gradients, self.update)

    @property
    def log_probs(self) -> int:
        """Bytes that the pass over log-probs takes."""
        return self.scores + self.statistics * (not self.tapped)


def activations(cluster: ClusterConfig, work: Workload, model: Dimensions, layers: int, parameters: int) -> Activations:
    """`layers` and `parameters`: those of the rank. All response tokens count as if prompts were empty."""
    train = cluster.train
    size, width = work.value_bytes, model.hidden_size
    whole = work.max_tokens or work.micro_batch_size * cluster.max_length
    tokens = -(-whole // train.context)  # of this rank
    head = width * model.vocabulary // train.tensor * size
    share = train.tensor if train.splits_tokens else 1
    saved = saved_per_token(model, train.tensor, size, train.context, share)
    # Gradients of the keys and values of all context parallel ranks, of either half and as their sum.
    gathered = 4 * train.context * model.key_heads * model.head_size // train.tensor * size * (train.context > 1)
    mlp = model.mlp_size * model.experts_per_token // train.tensor * size
    kept = size * width // share if train.recompute else saved
    return Activations(
        kept=layers * kept * tokens * train.pipeline,
        gathered=tokens * width * size * (share > 1),
        layer=(2 * mlp + width * size + gathered + (saved if train.recompute else 0)) * tokens,
        head=head_bytes(model, work, tokens, train.tensor) + head,
        head_gradient=head * model.tied,
        end=head * (3 if model.tied else 1),
        # In an MLP, besides its own: residual and output of the layer before, the norm's input and output.
        scores=max(
            tokens * (5 * mlp + (width + 3 * width // share) * size), logits_bytes(model, work, tokens, train.tensor)
        ),
        statistics=_statistics(cluster, work, model, layers, whole),
        update=FP32 * parameters // train.optimizer_shares,
        tapped=work.tapped,
    )


def saved_per_token(model: Dimensions, tensor: int, size: int, context: int = 1, share: int = 1) -> int:
    """Bytes per token of a rank that a layer keeps for its backward pass, with `tensor` × `context` ranks and values of
    `size` bytes.

    At full width, of one token in `share` (tensor ranks may split them): inputs and outputs of two norms. Split among
    the ranks: queries, keys and values together as they are projected, queries as their norm takes them (a copy),
    queries and keys with rotary positions, the attention's output, and of the MLP two projections, SiLU of the one, a
    copy of the other, and their product. For queries and keys the cosines and sines of their positions, on every rank.
    In fp32 a scale per norm, and the attention's log-sum-exp. Gemma 3's norms keep their inputs in fp32, queries and
    keys among them, and there are two more, whose outputs nothing keeps.

    Context parallel ranks keep the keys and values that their chunks see, 2·context + 1 for two tokens, instead of
    their own keys, and the attention's output in the order of the chunks as well.
    """
    heads = (3 + model.qk_norm) * model.query_heads + 3 * model.key_heads
    heads += (model.query_heads + 2 * context * model.key_heads) * (context > 1)
    split = heads * model.head_size + 5 * model.mlp_size * model.experts_per_token
    norms = (model.query_heads + model.key_heads) * model.qk_norm
    if model.post_norms:
        split -= model.query_heads * model.head_size
        wide = 2 * size * model.hidden_size + 4 * FP32 * model.hidden_size
        in_fp32 = norms * model.head_size // tensor + 4 // share
    else:
        wide, in_fp32 = 4 * size * model.hidden_size, 2 // share
    values = split // tensor + 4 * model.head_size
    return wide // share + size * values + FP32 * (in_fp32 + (norms + model.query_heads) // tensor)


def logits_bytes(model: Dimensions, work: Workload, tokens: int, tensor: int) -> int:
    """Bytes that log-probs take without gradients: logits of a chunk and a slice of the vocabulary and their
    exponentials, and hidden states with and without their norm, and those of the responses.
    """
    entries = min(SLICE, model.vocabulary // tensor)
    return 2 * FP32 * min(work.token_chunk, tokens) * entries + 3 * tokens * model.hidden_size * work.value_bytes


def head_bytes(model: Dimensions, work: Workload, tokens: int, tensor: int) -> int:
    """Bytes that the backward pass of the log-probs takes, apart from the gradient of the head: of a chunk and a slice
    of the vocabulary the logits and their gradients, the slice's part of the head's gradient twice in fp32; hidden
    states with and without their norm, those of the responses, and their gradients, also in fp32.
    """
    size, width = work.value_bytes, model.hidden_size
    entries = min(SLICE, model.vocabulary // tensor)
    logits = (FP32 + size) * min(work.token_chunk, tokens) * entries
    return logits + 2 * FP32 * entries * width + tokens * width * (3 * size + FP32)


def _statistics(cluster: ClusterConfig, work: Workload, model: Dimensions, layers: int, tokens: int) -> int:
    """8 bytes per token and head: in the pass over log-probs of all its rows, in gradient steps of the micro-batches in
    flight. Context parallel ranks have parts of the statistics of all tokens.
    """
    heads = min(work.sampled_layers, layers) * model.query_heads // cluster.train.tensor
    rows = -(-work.batch_size // cluster.train.data)
    return 2 * FP32 * heads * (tokens * cluster.train.pipeline if work.tapped else rows * cluster.max_length)
