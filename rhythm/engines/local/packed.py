"""Forward passes over rows packed into one, without padding: only attention pads them, and it alone sees rows at all.

A prompt that several rows share may be packed once. Its tokens see nothing of the responses, so that their states are
the same in every row, and gradients of all rows add up in them. Short rows' attention on a CPU gets it once as queries,
too; of longer rows causal attention computes half of the map, which needs no mask either.

Each attention call of the model is passed on for the padded rows, to the model's own attention function with the masks
that transformers makes for them, so that sliding windows and capped scores stay what they are.

Shape suffixes: B rows, W width of the longest, T packed tokens, N response tokens; H heads, D head size, C hidden size.
Of one attention call b rows, Q queries and S keys.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rhythm.engines.interfaces import Rollout
from rhythm.engines.local.short_attention import LARGEST
from rhythm.tap.attention_form import AttentionCall, UnsupportedAttention
from rhythm.tap.attention_lse import SHORT_ATTENTION
from rhythm.tap.attention_tap import AttentionTap
from rhythm.tap.interception import Output, intercept_attention, layer_kinds, text_config

_KINDS = {"full_attention", "sliding_attention"}
_CUT_MASKS = {"eager", "sdpa", SHORT_ATTENTION}
"""Implementations whose masks, where there are any, hold each pair of query and key."""
_PROBE_LENS = (7, 3, 5)


def packed_states(
    model: Any, rollout: Rollout, tap: AttentionTap | None = None, *, share_prompts: bool = False
) -> Tensor:
    """Last hidden states [N, C] at the positions that predict the response tokens, row after row; differentiable.

    `tap`: reads the attention of the padded rows. Not to be entered: a model has one interception at a time.
    `share_prompts`: the prompt of rows with the same `rollout.group` is packed once.

    Raises UnsupportedAttention for a model that `packing_refusal` refuses, where a call shows it, and ValueError if
    prompts to be shared differ.
    """
    tokens = _shared_prompts(rollout) if share_prompts else _own_tokens(rollout.attention_mask)
    hidden_TC = _hidden_states(model, rollout.input_ids, tokens, tap)
    # The token at t was sampled from the model's output at t − 1, which exists since every row has a prompt.
    return hidden_TC[tokens.token_BW[:, :-1][rollout.response_mask[:, 1:]]]


def packing_refusal(model: Any) -> str | None:
    """Why the model's rows can't be packed; None if they can: a small batch gives the same packed as padded."""
    try:
        config = text_config(model)
    except ValueError as error:
        return str(error)
    if others := sorted(set(layer_kinds(config)) - _KINDS):
        return f"{config.model_type} has layers of kind {', '.join(others)}"
    if getattr(model, "is_gradient_checkpointing", False):
        return "its activations are computed again in the backward pass, when the rows are no longer known"
    lens_B1 = torch.tensor(_PROBE_LENS, device=model.device)[:, None]
    width = max(_PROBE_LENS)
    real_BW = torch.arange(width, device=model.device) < lens_B1
    ids_BW = (2 + torch.arange(real_BW.numel(), device=model.device).view(real_BW.shape)) % config.vocab_size
    was_training = model.training
    try:
        with torch.no_grad():
            model.eval()
            padded = model.base_model(input_ids=ids_BW, attention_mask=real_BW.long(), use_cache=False)
            packed_TC = _hidden_states(model, ids_BW, _own_tokens(real_BW), None)
    except UnsupportedAttention as error:
        return str(error)
    finally:
        model.train(was_training)
    if not torch.allclose(packed_TC, padded.last_hidden_state[real_BW], rtol=1e-3, atol=1e-4):
        return f"packed rows of {type(model).__name__} see each other"
    return None


@dataclass(frozen=True)
class _PackedTokens:
    """Where the padded rows' tokens are in the packed row.

    kept_BW: bool, the positions whose tokens are packed, row after row. token_BW: int64, the packed token of each
    position; on padding one that the row's tokens don't see, as attention is causal. shared_prompt_lens: [B], if
    prompts are packed once, in the first row that has them.
    """

    kept_BW: Tensor
    token_BW: Tensor
    shared_prompt_lens: Tensor | None = None


def _own_tokens(real_BW: Tensor) -> _PackedTokens:
    """Each row's own. `real_BW`: bool, True on the tokens of right-padded rows."""
    return _PackedTokens(real_BW, (real_BW.flatten().cumsum(0) - 1).view(real_BW.shape))


def _shared_prompts(rollout: Rollout) -> _PackedTokens:
    """The prompt of the first row of each group, and every response.

    Raises ValueError if prompts of a group differ.
    """
    same_BB = rollout.group[:, None] == rollout.group
    first_B = same_BB.int().argmax(dim=1)  # the first of equals
    is_first_B = first_B == torch.arange(len(first_B), device=first_B.device)
    # By length: the mask leaves out responses that the loss doesn't count.
    prompt_BW = torch.arange(rollout.input_ids.shape[1], device=first_B.device) < rollout.prompt_lens[:, None]
    if (prompt_BW != prompt_BW[first_B]).any() or (rollout.input_ids != rollout.input_ids[first_B])[prompt_BW].any():
        raise ValueError("rollout.group: rows of the same group have different prompts")
    own = _own_tokens(rollout.attention_mask & (~prompt_BW | is_first_B[:, None]))
    token_BW = torch.where(prompt_BW, own.token_BW[first_B], own.token_BW)
    return replace(own, token_BW=token_BW, shared_prompt_lens=rollout.prompt_lens)


def _hidden_states(model: Any, ids_BW: Tensor, tokens: _PackedTokens, tap: AttentionTap | None) -> Tensor:
    """Last hidden states [T, C] of the packed tokens."""
    kept_BW = tokens.kept_BW
    position_BW = torch.arange(kept_BW.shape[1], device=kept_BW.device).expand_as(kept_BW)
    rows = _PaddedAttention(model, tokens, tap)
    with intercept_attention(text_config(model), rows.receive, masks=False):
        output = model.base_model(
            input_ids=ids_BW[kept_BW][None], position_ids=position_BW[kept_BW][None], use_cache=False
        )
    hidden_1TC: Tensor = output.last_hidden_state
    return hidden_1TC[0]


@dataclass(frozen=True)
class _Rows:
    """Queries and keys of one attention call.

    query_bQ, key_bS: int64, packed tokens. position_bQ: where the queries are in their rows; None: at the beginning,
    like the keys.
    """

    query_bQ: Tensor
    key_bS: Tensor
    position_bQ: Tensor | None = None

    def mask(self, mask: Any) -> Any:
        """Of these queries and keys. `mask`: of whole rows, the same in each, or None for causal attention."""
        queries, keys = self.query_bQ.shape[1], self.key_bS.shape[1]
        if self.position_bQ is None:
            return mask if mask is None else mask[:1, :, :queries, :keys]
        if mask is None:
            return (torch.arange(keys, device=self.key_bS.device) <= self.position_bQ[..., None])[:, None]
        return mask[0, 0, :, :keys][self.position_bQ][:, None]

    def padded(self, call: AttentionCall, mask: Any, *, heads_first: bool) -> AttentionCall:
        """The call with these rows. query [1, H, T, D] → [b, H, Q, D], key and value [1, H, T, D] → [b, H, S, D].

        `heads_first`: contiguous, as batched products need them; else in memory [b, Q, H, D], as a tap reads them.
        """
        taken = _taken_by_heads if heads_first else _taken
        return replace(
            call,
            query=taken(call.query, self.query_bQ),
            key=taken(call.key, self.key_bS),
            value=taken(call.value, self.key_bS),
            mask=mask,
        )


def _taken(x_1HTD: Tensor, token_bt: Tensor) -> Tensor:
    """[1, H, T, D] → [b, H, t, D], in memory [b, t, H, D]."""
    x_PHD = x_1HTD[0].transpose(0, 1).index_select(0, token_bt.flatten())
    return x_PHD.view(*token_bt.shape, *x_PHD.shape[1:]).transpose(1, 2)


def _taken_by_heads(x_1HTD: Tensor, token_bt: Tensor) -> Tensor:
    """[1, H, T, D] → [b, H, t, D], contiguous."""
    heads = x_1HTD.shape[1]
    x_RD = x_1HTD[0].transpose(0, 1).flatten(0, 1)  # all heads of a token, then those of the next, as in memory
    row_bHt = token_bt[:, None] * heads + torch.arange(heads, device=token_bt.device)[:, None]
    return x_RD.index_select(0, row_bHt.flatten()).view(*row_bHt.shape, -1)


def _whole_rows(tokens: _PackedTokens) -> tuple[list[_Rows], Tensor]:
    """Every row with all of its tokens as queries; and the places [T] of the packed tokens in the call's output."""
    return [_Rows(tokens.token_BW, tokens.token_BW)], tokens.kept_BW.flatten().nonzero()[:, 0]


def _prompts_and_responses(tokens: _PackedTokens, prompt_lens_B: Tensor) -> tuple[list[_Rows], Tensor]:
    """The prompts, each once, and the responses with the keys of their whole rows; and the places [T] of the packed
    tokens in both outputs, the prompts' first.
    """
    kept_BW, token_BW = tokens.kept_BW, tokens.token_BW
    first_b = kept_BW[:, 0].nonzero()[:, 0]
    longest = int(prompt_lens_B.max())
    prompt_bS = token_BW[first_b, :longest]
    row_T, at_T = kept_BW.nonzero(as_tuple=True)
    behind_T = at_T - prompt_lens_B[row_T]
    responses = max(int(behind_T.max()) + 1, 1)
    position_BQ = prompt_lens_B[:, None] + torch.arange(responses, device=prompt_lens_B.device)
    position_BQ = position_BQ.clamp(max=token_BW.shape[1] - 1)
    rows = [_Rows(prompt_bS, prompt_bS), _Rows(token_BW.gather(1, position_BQ), token_BW, position_BQ)]
    number_B = torch.zeros_like(prompt_lens_B)
    number_B[first_b] = torch.arange(len(first_b), device=first_b.device)
    of_prompt_T = number_B[row_T] * longest + at_T
    of_response_T = prompt_bS.numel() + row_T * responses + behind_T
    return rows, torch.where(behind_T < 0, of_prompt_T, of_response_T)


class _PaddedAttention:
    """Pads what a packed forward pass passes to attention, and packs what comes back."""

    def __init__(self, model: Any, tokens: _PackedTokens, tap: AttentionTap | None) -> None:
        self._config = text_config(model)
        self._kinds = layer_kinds(self._config)
        self._tap = tap
        self._token_BW = tokens.token_BW
        self._whole = self._parts = _whole_rows(tokens)
        prompt_lens_B = tokens.shared_prompt_lens
        if prompt_lens_B is not None and prompt_lens_B.device.type == "cpu":
            (_, responses), _ = split = _prompts_and_responses(tokens, prompt_lens_B)
            if responses.query_bQ.shape[1] * responses.key_bS.shape[1] <= LARGEST:
                self._parts = split
        masks = _masks(self._config, tokens.kept_BW.shape, model.dtype, model.device)
        self._masks = masks if isinstance(masks, dict) else dict.fromkeys(_KINDS, masks)
        self._masks_of_parts: dict[str, list[Any]] = {}

    def receive(self, call: AttentionCall) -> Output:
        """Run the call on padded rows. query [1, H, T, D] … → [1, T, H, D]."""
        if call.mask is not None or call.layer is None or (kind := self._kinds[call.layer]) not in _KINDS:
            raise call.refusal("an attention mask of the model's own, with rows packed into one")
        # Positions of the packed row: they would have flash attention look for rows in it.
        call = replace(call, options={name: value for name, value in call.options.items() if name != "position_ids"})
        tap = self._tap if self._tap is not None and call.layer in self._tap.layers else None
        parts, place_T = self._parts
        if len(parts) == 1 or call.implementation not in _CUT_MASKS:
            (rows,), place_T = self._whole
            padded = rows.padded(call, self._masks[kind], heads_first=False)
            output_bQHD, _ = padded.run() if tap is None else tap.receive(padded)
            return output_bQHD.flatten(0, 1).index_select(0, place_T)[None], None
        if kind not in self._masks_of_parts:
            self._masks_of_parts[kind] = [rows.mask(self._masks[kind]) for rows in parts]
        masks = self._masks_of_parts[kind]
        outputs = [rows.padded(call, mask, heads_first=True).run() for rows, mask in zip(parts, masks, strict=True)]
        output_THD = torch.cat([output.flatten(0, 1) for output, _ in outputs]).index_select(0, place_T)
        if tap is not None:
            tap.read_packed(replace(call, mask=self._masks[kind]), output_THD[None], self._token_BW)
        return output_THD[None], None


def _masks(config: Any, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Any:
    """The masks of right-padded rows [B, W], by kind of layer or one for all, as the model itself would make them."""
    from transformers.masking_utils import create_masks_for_generate

    embeddings = torch.empty(*shape, 0, dtype=dtype, device=device)
    # Causal attention needs no mask on padding that comes after the tokens.
    return create_masks_for_generate(config, embeddings, attention_mask=None, past_key_values=None)
