"""Arguments that launchers pass to every kernel over q and k: operands, lengths, scales, and the form of attention."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

from rhythm.kernels.sequences import Lengths, Sequences
from rhythm.kernels.tiles import (
    LARGEST,
    LOG2_E,
    SMALLEST,
    Form,
    OperandStrides,
    dot_precision,
    padded_size,
    strides_of,
    upcast,
    wide,
)


class Forms(NamedTuple):
    """What makes attention other than plain; None where it is not so.

    Attributes:
        sliding_window: w, tokens: keys at distance ≥ w are hidden.
        softcap: c: scores are c·tanh(score / c).
        sinks: fp32 [Hq], natural logits, one more in the denominator of each row of a head.
    """

    sliding_window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


PLAIN = Forms()


class Scales(NamedTuple):
    """What makes scores of a tile's products, with a softcap of their tanh.

    Attributes:
        base2, natural: of base-2 and of natural exponents, above 0; with a softcap those of the cap.
        sign: products are multiplied by it: -1, 0 or 1, the sign of the softmax scale.
        cap: tanh is of a product times this; None without a softcap.
    """

    base2: float
    natural: float
    sign: int
    cap: float | None


def scales(scale: float, softcap: float | None) -> Scales:
    base2, natural, sign = scale_and_sign(scale)
    if softcap is None:
        return Scales(base2, natural, sign, None)
    cap = min(natural / softcap, LARGEST)
    return Scales(*scale_and_sign(softcap)[:2], sign, cap)


def scale_and_sign(scale: float) -> tuple[float, float, int]:
    """(scale of base-2 exponents, scale of natural exponents, sign): both scales are above 0, the sign is −1, 0 or 1.

    A scale that is 0 in fp32 becomes 1, since masked scores are −inf, and −inf · 0 would be NaN; with the sign 0 all
    products are 0. A finite scale stays finite, since the largest product's difference of 0 must stay 0.
    """
    natural = abs(scale)
    if natural <= 2.0**-150:  # 0 in fp32
        return LOG2_E.value, 1.0, 0
    if natural > LARGEST:
        natural = math.inf
    base2 = min(max(natural * LOG2_E.value, SMALLEST), LARGEST) if natural < math.inf else math.inf
    return base2, natural, -1 if scale < 0 else 1


def common_arguments(
    q: Tensor, k: Tensor, sequences: Sequences, scale: float, forms: Forms, v: Tensor | None = None
) -> dict[str, Any]:
    """Arguments by name that every kernel over q and k takes, and the launch option that all share.

    `scale` becomes the scale of base-2 exponents, above 0. A sliding window that hides nothing becomes None.
    """
    by = scales(scale, forms.softcap)
    form = Form(
        group=q.shape[-2] // k.shape[-2],
        batched=q.ndim == 4,
        size=q.shape[-1],
        padded=padded_size(q.shape[-1]),
        wide=any(wide(x) for x in (q, k, v) if x is not None),
        upcast=upcast(q.dtype),
        precision=dot_precision(),
        sign=by.sign,
    )
    window = forms.sliding_window
    return {
        "q": q,
        "k": k,
        "lengths": Lengths.of(sequences),
        "strides": OperandStrides(strides_of(q), strides_of(k), None if v is None else strides_of(v)),
        "sequences": sequences.count,
        "tokens": sequences.tokens,
        "heads": q.shape[-2],
        "scale": by.base2,
        "rows": sequences.rows if sequences.fewer_rows else None,
        "sliding_window": None if window is None or window >= sequences.tokens else window,
        "cap_scale": by.cap,
        "form": form,
        "enable_fp_fusion": True,  # a multiply and an add are one instruction; Triton's default is about to change
    }
