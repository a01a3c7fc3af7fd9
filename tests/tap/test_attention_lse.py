"""The lse of the model's own attention: where it is used, that nothing else changes, and that a wrong one shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from registered_attention import T, batch, made
from tensors import assert_same
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rhythm.credit.heads import HeadGroups
from rhythm.ops.arguments import Request
from rhythm.ops.backends.cpu import CpuBackend
from rhythm.tap import attention_tap
from rhythm.tap.attention_form import AttentionCall, AttentionForm, UnsupportedAttention
from rhythm.tap.attention_lse import bands_pay, run_with_lse
from rhythm.tap.attention_tap import AttentionTap
from rhythm.tap.observe import observe
from rhythm.tap.padding import PaddedBatch
from rhythm.tap.signals_config import SignalsConfig

PROMPTS = [6, 3]
EVERY = SignalsConfig(layers="all", window=3, horizon=(1, 4))
SWEEP, BANDS = "sweep", "bands"


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the C++ kernels ran, in order: sweeps over all keys, or the bands alone."""
    kinds: list[str] = []
    run = CpuBackend.run

    def noted(self: CpuBackend, request: Request) -> Any:
        kinds.append(SWEEP if request.span or request.lse_HT is None else BANDS)
        return run(self, request)

    monkeypatch.setattr(CpuBackend, "run", noted)
    return kinds


def fixed(heads: int) -> HeadGroups:
    local = (torch.arange(heads) < heads // 3)[None]
    return HeadGroups(local, ~local)


def tapped(model: Any, inputs: dict[str, Any], *, span: bool, **options: Any) -> tuple[Any, Tensor]:
    """(statistics, logits) of a tapped forward pass."""
    where = {"attention_mask": inputs["attention_mask"]} if "attention_mask" in inputs else {}
    with AttentionTap(model, prompt_lens=PROMPTS, **where, **({"signals": EVERY} | options)) as tap:
        tap.needs_span = span
        logits = model(**inputs, use_cache=False).logits
    return tap.statistics(), logits


def inputs_of(padding: str) -> dict[str, Any]:
    if padding == "none":
        return {"input_ids": batch()[0]}
    input_ids, more = batch(padding)
    return {"input_ids": input_ids, **{name: x for name, x in more.items() if isinstance(x, Tensor)}}


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3", "mistral", "llama4"])
def test_bands_by_the_models_lse_are_those_of_a_sweep(
    kind: str, dtype: torch.dtype, padding: str, ran: list[str]
) -> None:
    """Grouped heads, norms, windows and chunks. The output stays the same bit for bit, and so do the gradients."""
    chunks = {"attention_chunk_size": 16} if kind == "llama4" else {}
    model, inputs = made(kind, "sdpa", **chunks).to(dtype), inputs_of(padding)
    layers = model.config.num_hidden_layers
    bare = model(**inputs, use_cache=False).logits
    swept, _ = tapped(model, inputs, span=True)
    assert ran == [SWEEP] * layers
    ran.clear()
    banded, logits = tapped(model, inputs, span=False)
    assert ran == [BANDS] * layers
    assert banded.span.isnan().all()
    # bf16: torch's kernel rounds exponentials to about 7e-5.
    tolerance = 1e-5 if dtype == torch.float32 else 2e-4
    for name, scale in (("waad", EVERY.window), ("fai", 1.0)):
        expected = getattr(swept, name)
        assert expected.isfinite().any()
        assert_same(getattr(banded, name), expected, atol=scale * tolerance)
    assert logits.equal(bare)
    response = banded.response
    gradients = []
    for output in (logits, bare):
        model.zero_grad()
        (output.float()[response] ** 2).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(a.equal(b) for a, b in zip(*gradients, strict=True))
    assert gradients[0]


def test_packed_rows_and_inference_mode(ran: list[str]) -> None:
    model, (input_ids, _) = made("qwen3", "sdpa"), batch()
    row, bounds = input_ids[:, : T - 7].reshape(1, -1), torch.tensor([0, T - 7, 2 * T - 14])
    options: dict[str, Any] = {"prompt_lens": PROMPTS, "signals": EVERY, "cu_seqlens": bounds}
    swept = observe(model, row, **options)
    ran.clear()
    groups = HeadGroups(swept.groups.local, swept.groups.global_)
    with torch.inference_mode():
        bare = model(input_ids, use_cache=False).logits
        banded, logits = tapped(model, {"input_ids": input_ids}, span=False)
    assert ran == [BANDS] * 4
    assert logits.equal(bare)
    assert_same(banded.waad, tapped(model, {"input_ids": input_ids}, span=True)[0].waad, atol=1e-5)
    ran.clear()
    packed = observe(model, row, **options, groups=groups)
    assert ran == [BANDS] * 4
    for name in ("waad", "fai"):
        assert_same(getattr(packed, name), getattr(swept, name), atol=1e-5)
    assert packed.span.isnan().all()


@pytest.mark.parametrize(
    ("kind", "implementation"),
    [("llama", "eager"), ("gpt_oss", "eager"), ("gemma2", "eager"), ("llama", "flex_attention")],
)
def test_a_sweep_where_attention_gives_no_lse(kind: str, implementation: str, ran: list[str]) -> None:
    """Maps, sinks, capped scores, and flex attention, which gives none on the CPU."""
    model, inputs = made(kind, implementation), inputs_of("right")
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # compiling flex attention takes a minute
        swept, bare = tapped(model, inputs, span=True)
        ran.clear()
        banded, logits = tapped(model, inputs, span=False)
    assert ran == [SWEEP] * 4
    assert logits.equal(bare)
    assert_same(banded.waad, swept.waad)
    assert_same(banded.fai, swept.fai)
    assert banded.span.isnan().all()


def test_the_math_kernel_gives_no_lse(ran: list[str]) -> None:
    model, inputs = made("llama", "sdpa"), inputs_of("none")
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        swept, bare = tapped(model, inputs, span=True)
        ran.clear()
        banded, logits = tapped(model, inputs, span=False)
    assert ran == [SWEEP] * 4
    assert logits.equal(bare)
    assert_same(banded.waad, swept.waad)


def test_autocast_has_the_kernel_round_q_and_k(ran: list[str]) -> None:
    """RoPE takes them back to fp32; torch's kernel then takes them in bf16, the statistics as they are."""
    model, inputs = made("llama", "sdpa"), inputs_of("none")
    with torch.autocast("cpu", torch.bfloat16):
        swept, _ = tapped(model, inputs, span=True)
        ran.clear()
        banded, _ = tapped(model, inputs, span=False)
    assert ran == [SWEEP] * 4
    assert_same(banded.waad, swept.waad)


def one_call(function: Callable[..., Any], implementation: str, dtype: torch.dtype = torch.float32) -> AttentionCall:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 9, 8, generator=generator).to(dtype) for _ in range(3))
    return AttentionCall(
        where="test", layer=0, implementation=implementation, function=function, module=nn.Module(), query=q, key=k,
        value=v, mask=None, options={"scaling": 0.3},
    )  # fmt: skip


def lse_of(call: AttentionCall) -> Tensor:
    score = (call.query.double() @ call.key.double().transpose(2, 3)) * call.options["scaling"]
    return score.masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf).logsumexp(dim=-1).float()


FORM = AttentionForm(scale=0.3, window=None, softcap=None)
WHOLE = PaddedBatch.from_mask(torch.ones(2, 9), [2, 1])
PADDED = PaddedBatch.from_mask((torch.arange(9) < torch.tensor([[9], [7]])).long(), [2, 1])


def test_flex_attentions_lse_is_used_where_it_is_fp32_and_without_sinks() -> None:
    def flex(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
        """As on a GPU: lse in the type of the values."""
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling)[0], lse_of(call).to(value.dtype)

    call = one_call(flex, "flex_attention")
    result, lse = run_with_lse(call, FORM, WHOLE)
    assert lse is not None
    assert lse.equal(lse_of(call))
    assert result[0].equal(call.run()[0])
    assert run_with_lse(call, AttentionForm(0.3, None, None, sinks=torch.zeros(4)), WHOLE)[1] is None
    call = one_call(flex, "flex_attention", torch.bfloat16)
    assert run_with_lse(call, FORM, WHOLE)[1] is None


@pytest.fixture
def flash_attn() -> Iterator[None]:
    """Stands in for flash_attn's two ops: same names, first arguments and results."""
    library = torch.library.Library("flash_attn", "FRAGMENT")
    more = "float dropout_p, float softmax_scale, bool causal) -> (Tensor, Tensor, Tensor, Tensor)"
    library.define(f"_flash_attn_forward(Tensor q, Tensor k, Tensor v, {more}")
    library.define(f"_flash_attn_varlen_forward(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, {more}")

    def dense(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float, causal: bool) -> Any:
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *heads_first, is_causal=causal, scale=softmax_scale
        )
        return out.transpose(1, 2).contiguous(), lse.contiguous(), q.new_empty(0), q.new_empty(2)

    def varlen(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, *rest: Any) -> Any:
        parts = [
            dense(*(x[None, start:end] for x in (q, k, v)), *rest)
            for start, end in zip(bounds.tolist(), bounds.tolist()[1:], strict=False)
        ]
        out, lse = torch.cat([p[0][0] for p in parts]), torch.cat([p[1][0] for p in parts], dim=1)
        return out, lse, q.new_empty(0), q.new_empty(2)

    library.impl("_flash_attn_forward", dense, "CPU")
    library.impl("_flash_attn_varlen_forward", varlen, "CPU")
    yield
    library._destroy()


def test_flash_attns_lse_of_a_stand_in(flash_attn: None) -> None:
    def dense(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
        tokens_first = (x.transpose(1, 2) for x in (query, key, value))
        return torch.ops.flash_attn._flash_attn_forward(*tokens_first, 0.0, scaling, True)[0], None

    def varlen(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
        packed = (PADDED.packed(x.transpose(1, 2)) for x in (query, key, value))
        out = torch.ops.flash_attn._flash_attn_varlen_forward(*packed, PADDED.cu_seqlens, 0.0, scaling, True)[0]
        return PADDED.padded(out, 0.0), None

    for function, padded in ((dense, WHOLE), (varlen, PADDED)):
        call = one_call(function, "flash_attention_2")
        (output, _), lse = run_with_lse(call, FORM, padded)
        assert lse is not None
        assert output.equal(call.run()[0])
        tokens = padded.real[:, None].expand(-1, 4, -1)
        torch.testing.assert_close(lse[tokens], lse_of(call)[tokens], rtol=0, atol=1e-5)
        assert lse[~tokens].isnan().all()
    # Not the rows of this batch.
    assert run_with_lse(one_call(varlen, "flash_attention_2"), FORM, WHOLE)[1] is None


def test_a_function_that_runs_two_kernels_or_is_not_known_is_left_alone() -> None:
    def twice(*args: Any, **options: Any) -> Any:
        sdpa_attention_forward(*args, **options)
        return sdpa_attention_forward(*args, **options)

    assert run_with_lse(one_call(sdpa_attention_forward, "sdpa"), FORM, WHOLE)[1] is not None
    assert run_with_lse(one_call(twice, "sdpa"), FORM, WHOLE)[1] is None
    assert run_with_lse(one_call(sdpa_attention_forward, "unknown"), FORM, WHOLE)[1] is None


@pytest.mark.parametrize("row", ["first", "last"])
def test_a_wrong_lse_is_refused(row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the rows that are computed for comparison; the output is right."""
    model, inputs = made("llama", "sdpa"), inputs_of("right")

    def off(*args: Any) -> Any:
        result, lse = run_with_lse(*args)
        assert lse is not None
        lse = lse.clone()
        lse[1, 2, PROMPTS[1] if row == "first" else 30] += 0.02
        return result, lse

    monkeypatch.setattr(attention_tap, "run_with_lse", off)
    with pytest.raises(
        UnsupportedAttention, match="llama, layer 0: an lse of 'sdpa' attention that is not that of scale"
    ):
        tapped(model, inputs, span=False)


def test_compiled_functions_are_not_watched(ran: list[str]) -> None:
    """torch runs what it has compiled uncompiled while kernels are watched: the output could be another's."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, example: Any) -> Any:
        def run(*args: Any) -> Any:
            graphs.append(graph)
            return graph(*args)

        return run

    compiled = torch.compile(torch.nn.functional.scaled_dot_product_attention, backend=backend)

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
        out = compiled(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("test_custom", attention)
    model, inputs = made("llama", "sdpa"), inputs_of("none")
    model.set_attn_implementation("test_custom")
    tapped(model, inputs, span=False)
    assert ran == [SWEEP] * 4
    assert len(graphs) == 4


@pytest.mark.parametrize(
    ("longest", "form", "signals", "expected"),
    [
        (199, FORM, SignalsConfig(), False),
        (200, FORM, SignalsConfig(), True),
        (399, FORM, SignalsConfig(horizon="revised"), False),
        (400, FORM, SignalsConfig(horizon="revised"), True),
        (40, FORM, SignalsConfig(horizon=(10, None)), True),
        (39, FORM, SignalsConfig(horizon=(10, None)), False),
        (4000, AttentionForm(0.3, window=99, softcap=None), SignalsConfig(), False),
        (4000, AttentionForm(0.3, window=100, softcap=None), SignalsConfig(), True),
        (4000, AttentionForm(0.3, None, None, chunk=199), SignalsConfig(), False),
        (4000, AttentionForm(0.3, None, None, chunk=200), SignalsConfig(), True),
    ],
)
def test_bands_pay_where_they_are_half_of_the_map(
    longest: int, form: AttentionForm, signals: SignalsConfig, expected: bool
) -> None:
    assert bands_pay(form, longest, signals.window, signals.horizon) == expected


def test_short_sequences_are_swept(ran: list[str]) -> None:
    model, inputs = made("llama", "sdpa"), inputs_of("none")
    swept, _ = tapped(model, inputs, span=True, signals=SignalsConfig(layers="all"))
    ran.clear()
    short, _ = tapped(model, inputs, span=False, signals=SignalsConfig(layers="all"))
    assert ran == [SWEEP] * 4
    assert_same(short.waad, swept.waad)
    assert short.span.isnan().all()


def test_fixed_groups_need_no_spans(ran: list[str]) -> None:
    model, inputs = made("llama", "sdpa"), inputs_of("right")
    where = {"attention_mask": inputs["attention_mask"], "prompt_lens": PROMPTS, "signals": EVERY}
    groups = fixed(16)
    with AttentionTap(model, **where) as tap:
        model(**inputs, use_cache=False)
    expected = tap.statistics().signals(groups)
    ran.clear()
    signals = observe(model, inputs["input_ids"], **where, groups=groups)
    assert ran == [BANDS] * 4
    assert_same(signals.waad, expected.waad, atol=1e-5)
    assert_same(signals.fai, expected.fai, atol=1e-5)
    assert signals.span.isnan().all()
