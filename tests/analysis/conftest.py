"""An invented analysis with known numbers, for tests of figures, tables and pages."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from rhythm.analysis.config import AnalysisConfig
from rhythm.analysis.response import (
    Anchor,
    Attender,
    AttentionMap,
    Head,
    HeadMap,
    Maps,
    Peaks,
    ResponseHeads,
    ResponseResult,
    Tokens,
    Trial,
)
from rhythm.analysis.results import (
    Analysis,
    Heads,
    Interval,
    Overlap,
    SetSummary,
    Table1,
    Table2Row,
    response_path,
    write_json,
)

PROMPT = (
    "Please reason step by step, and put your final answer within \\boxed{}.\n"
    "Terry eats 2 yogurts a day. They are currently on sale at 4 yogurts for $5.00. How much does he spend on "
    "yogurt over 30 days?"
)
TEXT = (
    "To find out how much Terry spends on yogurt over 30 days, we first need the number of yogurts he eats.\n\n"
    "Step 1: He eats 2 yogurts a day, so over 30 days he eats 30 * 2 = 60 yogurts.\n"
    "Step 2: The yogurts are on sale at 4 for $5.00, so he buys 60 / 4 = 15 sets.\n"
    "Step 3: Each set costs $5.00, so he spends 15 * 5 = 75 dollars.\n\nThe answer is \\boxed{75}."
)
LAYERS, HEADS, POOL = 6, 4, (2, 3, 4)
BAND = 8
PEAK = 7  # every 7th token is a peak of WAAD, and the one after it a peak of FAI


def words_of(text: str) -> list[str]:
    return re.findall(r" ?\w+|\s+|[^\w\s]", text)


def invented_map(n: int, prompt: int, anchors: Sequence[int], local: bool) -> AttentionMap:
    weights = []
    for t in range(n):
        row = [0.0] * (prompt + n)
        for distance in range(min(3, prompt + t + 1)):
            row[prompt + t - distance] = 0.6 * 0.4**distance if local else 0.05
        for s in anchors:
            if s <= t and not local:
                row[prompt + s] += 0.3 / len(anchors)
        weights.append(tuple(row))
    band = tuple(
        tuple(weights[t][prompt + t - d] if prompt + t - d >= 0 else math.nan for d in range(BAND)) for t in range(n)
    )
    return AttentionMap(tuple(weights), cell=1, prompt_columns=prompt, band=band)


def invented_response(row: int, texts: Sequence[str], *, prompt: str = PROMPT, trials: bool = True) -> ResponseResult:
    draw = random.Random(row)
    n = len(texts)
    waad_peaks = tuple(range(PEAK, n - 1, PEAK))
    fai_peaks = tuple(i + 1 for i in waad_peaks if i + 1 < n - 10)
    waad = tuple(6.0 + draw.random() if i in waad_peaks else 1.0 + draw.random() for i in range(n))
    fai = tuple(
        math.nan
        if i >= n - 10
        else 0.9
        if i == 0
        else 0.08 + 0.02 * draw.random()
        if i in fai_peaks
        else 0.02 * draw.random()
        for i in range(n)
    )
    entropy = tuple((1.2 if i in waad_peaks else 0.1) * draw.random() for i in range(n))
    tokens = Tokens(
        ids=tuple(range(n)),
        texts=tuple(texts),
        waad=waad,
        fai=fai,
        fai_receiver=tuple(value * (0.7 + 0.6 * draw.random()) for value in fai),
        entropy=entropy,
        logprob=tuple(-value for value in entropy),
        gamma=tuple(1.5 if i in fai_peaks else 1.25 if i in waad_peaks else 1.0 for i in range(n)),
    )
    anchors = tuple(
        Anchor(s, tuple(Attender(t, 0.3 - 0.05 * k) for k, t in enumerate(range(s + 10, min(n, s + 14)))))
        for s in fai_peaks
    )
    each_layer = tuple(tuple(4.0 * (layer + 1) * (h + 1) for h in range(HEADS)) for layer in range(LAYERS))
    heads = ResponseHeads(each_layer, each_layer, each_layer, ((2, 0),), ((4, 3),), ((4, 3),), ((4, 2),), sentences=5)
    counterfactuals = (
        tuple(
            Trial(
                group,
                i,
                fai[i],
                i,
                texts[i],
                500 + k,
                " however",
                k + 1,
                0.4 / (k + 1),
                jaccard,
                ", we need 12 bananas.",
                k == 0,
            )
            for group, i, jaccard in (
                ("top", fai_peaks[1] if len(fai_peaks) > 1 else 0, 0.4),
                ("bottom", min(3, n - 1), 0.7),
            )
            for k in range(2)
        )
        if trials
        else ()
    )
    return ResponseResult(
        name=f"{row:05d}-0",
        row=row,
        sample=0,
        source="generated",
        finished=True,
        prompt=prompt,
        prompt_tokens=12,
        response="".join(texts),
        answer="75",
        tokens=tokens,
        peaks=Peaks(waad_peaks, fai_peaks, fai_peaks, waad_peaks),
        chunks=(0, *waad_peaks),
        anchors=anchors,
        heads=heads,
        maps=Maps(invented_map(n, 12, fai_peaks, True), invented_map(n, 12, fai_peaks, False)),
        trials=counterfactuals,  # type: ignore[arg-type]
    )


def invented_heads() -> Heads:
    def grid(value: Callable[[int, int], float], pool: bool = False) -> HeadMap:
        rows = range(LAYERS)
        return tuple(tuple(value(i, h) if not pool or i in POOL else math.nan for h in range(HEADS)) for i in rows)

    def chosen(name: str, heads: tuple[Head, ...]) -> SetSummary:
        share = grid(lambda i, h: 0.75 if (i, h) in heads else 0.05, pool=True)
        return SetSummary(name, heads, share, 0.8, 0.3, 3)  # type: ignore[arg-type]

    return Heads(
        layers=LAYERS,
        heads=HEADS,
        pool_layers=POOL,
        span=grid(lambda i, h: 2.0 * (h + 1) ** 2 + i),
        kurtosis=grid(lambda i, h: 3.0 * h + i - 1),
        kurtosis_sentence=grid(lambda i, h: math.nan),
        sets=(
            chosen("local", ((2, 0), (3, 0), (4, 0))),
            chosen("global", ((2, 3), (3, 3), (4, 3))),
            chosen("receiver", ((2, 3), (3, 2), (4, 3))),
            chosen("receiver_sentence", ((4, 3), (3, 1))),
        ),
        overlaps=(
            Overlap("receiver", 0.66, Interval(0.5, 0.8), 0.25, 0.667),
            Overlap("receiver_sentence", 0.5, Interval(math.nan, math.nan), 0.25, 0.5),
        ),
        entropy=grid(lambda i, h: 0.5 * i + h),
        sink_mass=grid(lambda i, h: 0.1 * h),
        prompt_mass=grid(lambda i, h: 0.2 + 0.1 * h),
    )


TABLE1 = Table1(0.534, Interval(0.5, 0.57), 0.631, Interval(0.6, 0.66), 0.8714, 2e-5, 70, 700, 690)
TABLE2 = (
    Table2Row(
        "entropy", 0.3608, Interval(0.3, 0.42), 0.2386, 0.5197, Interval(0.3, 0.75), 0.2412, 0.496, 0.001, 812, 70
    ),
    Table2Row(
        "cooccurrence", 0.6084, Interval(0.55, 0.66), 0.2241, 1.7149, Interval(1.4, 2.0), 0.23, 1.6452, 0.001, 640, 70
    ),
    Table2Row(
        "follows", 0.5253, Interval(0.49, 0.56), 0.3687, 0.4247, Interval(-0.1, 0.6), 0.38, 0.3824, 0.034, 655, 70
    ),
)

Invented = Callable[..., Analysis]


@pytest.fixture
def invented(tmp_path: Path) -> Invented:
    """invented(responses, **fields of Analysis): written to a directory; by default three responses."""

    def build(responses: Sequence[ResponseResult] | None = None, **fields: object) -> Analysis:
        if responses is None:
            responses = [
                invented_response(1, words_of(TEXT)),
                invented_response(2, list("40 - 25 + 10 = 25 <answer>")),
                replace(invented_response(3, words_of(TEXT * 6), trials=False), maps=None),
            ]
        (tmp_path / "responses").mkdir(exist_ok=True)
        for response in responses:
            write_json(response, response_path(tmp_path, response.name))
        analysis = Analysis(
            model="/models/Qwen3-4B",
            problems="/data/gsm8k.jsonl",
            settings=AnalysisConfig().model_dump(mode="json"),
            names=tuple(response.name for response in responses),
            failures=(),
            heads=invented_heads(),
            table1=TABLE1,
            table2=TABLE2,
            directory=tmp_path,
        )
        return replace(analysis, **fields)  # type: ignore[arg-type]

    return build
