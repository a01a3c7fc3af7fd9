"""The command behind the table of docs/attention.md."""

from __future__ import annotations

import pytest

from benchmarks import span_error


def test_errors_fall_with_the_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert span_error.main(["--tokens", "512", "--rows", "16", "128", "448", "--seeds", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    medians, worst = ([float(line.split("|")[i].strip(" %")) for line in lines] for i in (3, 4))
    assert medians[0] > 3 * medians[1] > 0
    assert medians[2] < 0.01  # all response rows: the exact span, up to rounding
    assert worst[0] > worst[1] > worst[2]


def test_the_heads_differ_in_reach() -> None:
    from rhythm import attention_statistics

    q, k = span_error.structured(512, 0)
    span = attention_statistics(q, k, scale=1.0).span[0]
    assert span.max() > 5 * span.min()
    assert span[:8].mean() < span[-8:].mean()
