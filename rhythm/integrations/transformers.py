"""transformers: `attn_implementation="rhythm"`, attention that also computes its statistics, inside a context manager.

    register()
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="rhythm")
    with torch.no_grad(), collect_statistics(prompt_lens=[12, 30]) as statistics:
        model(input_ids, attention_mask=attention_mask)
    statistics[0].waad  # [B, H, T] of layer 0

Shape suffixes: B sequences, T positions of input_ids, H query heads, G key heads, D head size; THD and TGD are packed,
with the padding left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from rhythm.ops import arguments
from rhythm.ops.answers import also_names, check_also
from rhythm.ops.statistics import AttentionStatistics, attention_statistics, attention_with_statistics
from rhythm.shapes import integer
from rhythm.system.extras import needs
from rhythm.tap.attention_form import AttentionCall, AttentionForm, MaskReader, UnsupportedAttention, attention_form
from rhythm.tap.interception import Output, models_own
from rhythm.tap.padding import PaddedBatch, whole_batch

with needs("rhythm.integrations.transformers"):
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import causal_mask_function, sdpa_mask

NAME = "rhythm"
# Arguments that change the output, and that transformers' sdpa function accepts and ignores.
IGNORED_BY_SDPA = {
    "attention_bias": "an attention bias",
    "block_indices": "sparse attention",
    "head_mask": "a head mask",
    "indices": "sparse attention",
}


def register() -> None:
    """Makes `attn_implementation="rhythm"` known to transformers. Calling it again changes nothing.

    Uses transformers' own registries, `AttentionInterface` and `AttentionMaskInterface`; nothing is patched. Then
    `from_pretrained(…, attn_implementation="rhythm")`, `from_config` and `model.set_attn_implementation("rhythm")`
    work for every model whose attention goes through that interface.

    Outside `collect_statistics` such a model is computed by transformers' sdpa function, bit for bit, KV caches and
    generation included; layers with capped scores or attention sinks by the model's own eager attention, O(T²) memory,
    since sdpa would silently leave both out. torch.compile breaks its graph at each attention.
    """
    # The masks first: from another thread the name should never be seen without them.
    AttentionMaskInterface.register(NAME, _mask)
    AttentionInterface.register(NAME, _attention)


class LayerStatistics(Mapping[int, AttentionStatistics]):
    """Layer index → the statistics of that layer, in the order in which the layers ran.

    Each is detached fp32 at the positions of input_ids, NaN on padding and where undefined: span [B, H]; waad, fai, lse
    and what `also` names [B, H, T].
    """

    def __init__(self) -> None:
        self._of_layer: dict[int, AttentionStatistics] = {}

    def __getitem__(self, layer: int) -> AttentionStatistics:
        if layer not in self._of_layer:
            had = f"there are those of layers {list(self._of_layer)}" if self._of_layer else "there are none at all"
            raise KeyError(f"no statistics of layer {layer}; {had}: has a model with attn_implementation={NAME!r} run?")
        return self._of_layer[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self._of_layer)

    def __len__(self) -> int:
        return len(self._of_layer)


@contextmanager
def collect_statistics(
    *,
    prompt_lens: Tensor | Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
    window: int = 10,
    horizon: tuple[int, int | None] = (10, 50),
    backend: str = "auto",
    also: Sequence[str] = (),
    first: int = 4,
    prompt_rows: bool = False,
) -> Iterator[LayerStatistics]:
    """Collects the attention statistics of one forward pass of one model with `attn_implementation="rhythm"`.

    Where a layer's attention is plain and causal and no gradient is needed, its output and statistics come from
    `attention_with_statistics`, in one sweep, O(heads · T) memory, padding left out (its output is 0). Else the output
    is that of transformers' sdpa function, differentiable, and the statistics are computed beside it, detached: with
    gradients, and where values have another head size or type than keys. Layers with a sliding window, capped scores or
    sinks are computed alike, but their mask is transformers' own, [T, T].

    Padding, left or right, is read off the model's own attention_mask. The context belongs to the thread (or task) that
    opened it. For the statistics of generated text, generate outside the context and run the whole text inside.

    Args:
        prompt_lens: [B] integers, tokens of each sequence (padding not counted) that are its prompt. None: all tokens
            are response.
        layers: indices of the layers to collect from; the others run as outside. None: all.
        window, horizon: of WAAD and FAI, tokens; as in `attention_statistics`.
        backend, also, first, prompt_rows: as in `attention_statistics`.

    Yields:
        LayerStatistics, filled while the model runs and readable afterwards.

    Raises:
        ValueError: an argument is not as described; prompt_lens that do not fit the batch, in the forward pass.
        UnsupportedAttention (a ValueError): in the forward pass: attention whose statistics would be wrong, by name;
            among them decode steps and any other use of a filled KV cache.
        RuntimeError: a context is open already; in the forward pass: a layer ran twice.
    """
    arguments.check_options(1.0, integer("window", window), arguments.pair(horizon))
    check_also(names := also_names(also), first, prompt_rows)
    if layers is not None and any(
        isinstance(layer, bool) or not isinstance(layer, int) or layer < 0 for layer in layers
    ):
        raise ValueError(f"layers is {list(layers)}; it must hold indices of layers, from 0")
    if _open.get() is not None:
        raise RuntimeError("collect_statistics is open already; contexts don't nest")
    wanted = None if layers is None else frozenset(layers)
    options = {"window": window, "horizon": horizon, "also": names, "first": first, "prompt_rows": prompt_rows}
    collector = _Collector(prompt_lens, wanted, options, backend)
    token = _open.set(collector)
    try:
        yield collector.statistics
    finally:
        _open.reset(token)


@dataclass(frozen=True)
class _Layer:
    """A call whose attention has a form we know, and the batch it runs on."""

    call: AttentionCall
    form: AttentionForm
    batch: PaddedBatch

    @property
    def fusable(self) -> bool:
        """Whether the fused op computes the same as the model's own attention would."""
        q, k, v = self.call.query, self.call.key, self.call.value
        wants_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        alike = k.shape == v.shape and q.dtype == k.dtype == v.dtype
        return alike and not wants_grad

    def packed(self, x_BHTD: Tensor) -> Tensor:
        return self.batch.packed(x_BHTD.detach().transpose(1, 2))


class _Collector:
    """The open context: its options, and what it has got so far."""

    def __init__(
        self,
        prompt_lens: Tensor | Sequence[int] | None,
        layers: frozenset[int] | None,
        options: dict[str, Any],
        backend: str,
    ) -> None:
        self.statistics = LayerStatistics()
        self._prompt_lens, self._layers, self._options, self._backend = prompt_lens, layers, options, backend
        self._masks: MaskReader | None = None

    def wants(self, layer: int | None) -> bool:
        return self._layers is None or layer in self._layers

    def receive(self, call: AttentionCall) -> Output:
        """Runs a call and keeps its statistics."""
        if call.layer is None:
            raise call.refusal(f"a {type(call.module).__name__} without layer_idx")
        if call.key.shape[2] != call.query.shape[2]:
            sizes = f"{call.key.shape[2]} keys for {call.query.shape[2]} queries"
            raise call.refusal(f"{sizes}: a decode step or another use of a KV cache, or cross-attention")
        if call.layer in self.statistics:
            raise RuntimeError(f"{call.where}: ran twice in one collect_statistics; open one for each forward pass")
        if self._masks is None:
            real_BT = _tokens(call)
            nothing = torch.zeros(len(real_BT), dtype=torch.int64)
            self._masks = _Masks(
                PaddedBatch.from_mask(real_BT, nothing if self._prompt_lens is None else self._prompt_lens)
            )
        form = attention_form(call, self._masks)
        layer = _Layer(call, form, self._masks.on(call.query.device))
        own = None if layer.fusable else call.run()[0]
        # Autocast around the forward pass would take the statistics to low precision as well.
        with torch.autocast(call.query.device.type, enabled=False):
            output, statistics = self._fused(layer) if own is None else (own, self._beside(layer))
        self.statistics._of_layer[call.layer] = statistics
        return output, None

    def _fused(self, layer: _Layer) -> tuple[Tensor, AttentionStatistics]:
        """(output [B, T, H, D], statistics) in one sweep."""
        call, batch = layer.call, layer.batch
        out_THD, packed = attention_with_statistics(
            layer.packed(call.query),
            layer.packed(call.key),
            layer.packed(call.value),
            cu_seqlens=batch.cu_seqlens,
            prompt_lens=batch.prompt_lens,
            backend=self._backend,
            **self._options,
            **layer.form.arguments(batch.host.longest),
        )
        return batch.padded(out_THD, 0.0), _padded(packed, batch)

    def _beside(self, layer: _Layer) -> AttentionStatistics:
        """The statistics alone."""
        call, form, batch = layer.call, layer.form, layer.batch
        q_THD, k_TGD = layer.packed(call.query), layer.packed(call.key)
        packed = attention_statistics(
            q_THD,
            k_TGD,
            cu_seqlens=batch.cu_seqlens,
            prompt_lens=batch.prompt_lens,
            backend=self._backend,
            **self._options,
            **form.arguments(batch.host.longest),
        )
        return _padded(packed, batch)


_open: ContextVar[_Collector | None] = ContextVar("rhythm_collect_statistics", default=None)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's own lack of types; which context is open is not for a compiled graph to know
def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: object,
    softcap: float | None = None, s_aux: Tensor | None = None, **options: Any,
) -> Output:  # fmt: skip
    """The attention function that transformers finds under our name."""
    layer = getattr(module, "layer_idx", None)
    config = getattr(module, "config", None)
    call = AttentionCall(
        where=f"{getattr(config, 'model_type', type(module).__name__)}, layer {layer}",
        layer=layer,
        implementation="sdpa",
        function=sdpa_attention_forward,
        module=module,
        query=query,
        key=key,
        value=value,
        mask=attention_mask,
        options=options | {"softcap": softcap, "s_aux": s_aux},
    )
    for name, feature in IGNORED_BY_SDPA.items():
        if options.get(name) is not None:
            raise UnsupportedAttention(
                f"{call.where}: {feature} ({name}), which attn_implementation={NAME!r} does not compute; the model's "
                "'eager' attention does"
            )
    if softcap is not None or s_aux is not None:  # sdpa ignores both, and the model's eager attention does not
        own = models_own(module, "eager")
        if own is None:
            raise UnsupportedAttention(f"{call.where}: found no eager attention in the model's own file")
        call = replace(call, function=_masked_for_eager(own))
    else:
        call = replace(call, function=_sdpa)
    collector = _open.get()
    return call.run() if collector is None or not collector.wants(layer) else collector.receive(call)


def _sdpa(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Output:
    """transformers' sdpa function, which takes no mask of padding alone."""
    if mask is not None and mask.ndim == 2:
        mask = _causal(query, key) & mask[:, None, None]
    output: Output = sdpa_attention_forward(module, query, key, value, mask, **options)
    return output


def _masked_for_eager(function: Callable[..., Output]) -> Callable[..., Output]:
    """The model's eager attention, which wants a mask in any case and adds it to the scores, as sdpa's masks are."""

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
        softcap: float | None = None, s_aux: Tensor | None = None, **options: Any,
    ) -> Output:  # fmt: skip
        visible = mask
        if visible is None:
            causal = options.get("is_causal")
            causal = getattr(module, "is_causal", True) if causal is None else causal
            visible = _causal(query, key) if causal else torch.ones_like(_causal(query, key))
        elif visible.ndim == 2:
            visible = _causal(query, key) & visible[:, None, None]
        if visible.dtype == torch.bool:
            least = torch.finfo(query.dtype).min
            visible = torch.zeros_like(visible, dtype=query.dtype).masked_fill(~visible, least)
        given = {"softcap": softcap, "s_aux": s_aux}
        rest = {name: value for name, value in given.items() if value is not None}
        return function(module, query, key, value, visible, **rest, **options)

    return attention


def _causal(query: Tensor, key: Tensor) -> Tensor:
    """bool [1, 1, T, S], bottom right: queries are the last tokens."""
    rows, keys = query.shape[2], key.shape[2]
    return torch.ones((1, 1, rows, keys), dtype=torch.bool, device=query.device).tril(keys - rows)


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    mask_function: object = causal_mask_function,
    attention_mask: Tensor | None = None,
    config: Any = None,
    **options: Any,
) -> Tensor | None:
    """sdpa's mask; but the padding alone, bool [B, T], where the fused op will take it: [T, T] is what we avoid.

    Only under our own name: an AttentionTap reads other names' masks, which must be whole.
    """
    plain = mask_function is causal_mask_function and q_length == kv_length
    fused = _open.get() is not None and not torch.is_grad_enabled() and config._attn_implementation == NAME
    # A model that asks for a mask in any case wants to change it.
    if plain and fused and attention_mask is not None and options.get("allow_is_causal_skip", True):
        return None if attention_mask.all() else attention_mask.bool()
    full: Tensor | None = sdpa_mask(
        batch_size, q_length, kv_length, q_offset, mask_function=mask_function, attention_mask=attention_mask, **options
    )
    return full


class _Masks(MaskReader):
    """A MaskReader that also knows the padding masks that `_mask` gives."""

    def window(self, call: AttentionCall) -> int | None:
        mask = call.mask
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            return super().window(call)
        if (id(mask), None, None) not in self._windows:
            if not mask.equal(self.on(mask.device).real):
                raise call.refusal("a padding mask other than that of the layers before")
            self._windows[id(mask), None, None] = (mask, None)
        # Read as if there were no padding: what is left is whether the layer is causal.
        B, T = mask.shape
        everything = whole_batch(B, T, torch.zeros(B, dtype=torch.int64), [0] * B, mask.device)
        return MaskReader(everything).window(replace(call, mask=None))


def _tokens(call: AttentionCall) -> Tensor:
    """bool [B, T], true on tokens, as the mask tells: a token sees itself, and nothing sees padding."""
    B, _, T, _ = call.query.shape
    mask = call.mask
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask
    if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[-2:] == (T, T):
        itself_BT = mask[:, 0].diagonal(dim1=-2, dim2=-1).expand(B, T)
        return itself_BT == 0 if mask.is_floating_point() else itself_BT.bool()
    return torch.ones((B, T), dtype=torch.bool, device=call.query.device)


def _padded(packed: AttentionStatistics, batch: PaddedBatch) -> AttentionStatistics:
    """fp32, all but span [B, H, T], NaN on padding, of packed [H, T] ones."""
    given = {field.name: getattr(packed, field.name) for field in fields(packed)}
    of_tokens = {
        name: batch.padded(x_HT.float().T, torch.nan).transpose(1, 2)
        for name, x_HT in given.items()
        if name != "span" and x_HT is not None
    }
    assert packed.span is not None
    return AttentionStatistics(packed.span.float(), **of_tokens)
