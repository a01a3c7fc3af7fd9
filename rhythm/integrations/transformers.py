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

from rhythm.integrations.short_masks import ShortMaskReader, is_short, sdpa_or_short_mask, whole_mask
from rhythm.ops import arguments
from rhythm.ops.answers import also_names, check_also
from rhythm.ops.statistics import AttentionStatistics
from rhythm.shapes import integer
from rhythm.system.extras import needs
from rhythm.tap.attention_form import AttentionCall, AttentionForm, UnsupportedAttention, attention_form
from rhythm.tap.chunks import chunked_statistics, chunked_with_statistics
from rhythm.tap.interception import Output, models_own
from rhythm.tap.padding import PaddedBatch

with needs("rhythm.integrations.transformers"):
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

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
    gradients, and where values have another head size or type than keys. Layers with a sliding window, chunks, capped
    scores or sinks are computed alike.

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
        self._masks: ShortMaskReader | None = None
        # The short masks are kept with their whole ones: an id is only good as long as its object lives.
        self._whole: dict[int, tuple[Tensor, Tensor]] = {}

    def whole(self, mask: Tensor) -> Tensor:
        """bool [B, 1, T, T] of a short mask."""
        if id(mask) not in self._whole:
            self._whole[id(mask)] = (mask, whole_mask(mask))
        return self._whole[id(mask)][1]

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
            self._masks = ShortMaskReader(
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
        qkv = layer.packed(call.query), layer.packed(call.key), layer.packed(call.value)
        out_THD, packed = chunked_with_statistics(*qkv, batch, layer.form.chunk, **self._options_of(layer))
        return batch.padded(out_THD, 0.0), _padded(packed, batch)

    def _beside(self, layer: _Layer) -> AttentionStatistics:
        """The statistics alone."""
        call, batch = layer.call, layer.batch
        qk = layer.packed(call.query), layer.packed(call.key)
        return _padded(chunked_statistics(*qk, batch, layer.form.chunk, **self._options_of(layer)), batch)

    def _options_of(self, layer: _Layer) -> dict[str, Any]:
        """Of the op, but for lengths."""
        return {"backend": self._backend, **self._options, **layer.form.arguments(layer.batch.host.longest)}


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
    """transformers' sdpa function, by whole masks."""
    if is_short(mask):
        mask = _whole(mask)
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
        elif is_short(visible):
            visible = _whole(visible)
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


def _whole(mask: Tensor) -> Tensor:
    """bool [B, 1, T, T] of a short mask, made once for the layers that share it."""
    collector = _open.get()
    return whole_mask(mask) if collector is None else collector.whole(mask)


def _mask(*sizes: Any, config: Any = None, **options: Any) -> Tensor | None:
    """sdpa's mask; a short one where the fused op will take it: [T, T] is what we avoid.

    Only under our own name: an AttentionTap reads other names' masks, which must be whole.
    """
    fused = _open.get() is not None and not torch.is_grad_enabled() and config._attn_implementation == NAME
    return sdpa_or_short_mask(*sizes, short=fused, **options)


def _tokens(call: AttentionCall) -> Tensor:
    """bool [B, T], true on tokens, as the mask tells: a token sees itself, and nothing sees padding."""
    B, _, T, _ = call.query.shape
    mask = call.mask
    if is_short(mask):
        return mask.bool()
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
