"""The command behind a table of docs/experiments.md."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import tapped_layer
from rhythm.tap import attention_tap


def test_bands_take_less_than_a_sweep(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(tapped_layer, "LEAST_SECONDS", 0.0)
    assert tapped_layer.main(["--tokens", "1024", "--rounds", "3", "--heads", "4", "2", "32"]) == 0
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [cells[1:3] for cells in lines] == [
        [dtype, kind] for dtype in ("float32", "bfloat16") for kind in ("whole", "padded")
    ]
    for cells in lines:
        assert all(float(cell) > 0 for cell in cells[3:])
    # fp32: 60 of 512 keys a row. In bf16 a sweep of heads this small is soon done.
    assert min(float(cells[6]) for cells in lines[:2]) < 0.8


@pytest.mark.parametrize("what", ["output", "lse"])
def test_what_is_wrong_is_not_timed(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = attention_tap.run_with_lse

    def wrong(*args: Any) -> Any:
        (output, weights), lse = run(*args)
        assert lse is not None
        return ((output + 1e-6 if what == "output" else output), weights), (lse + 1e-3 if what == "lse" else lse)

    monkeypatch.setattr(attention_tap, "run_with_lse", wrong)
    layers = tapped_layer.Layers((4, 2, 16), 2, 256, torch.float32)
    with pytest.raises((RuntimeError, AssertionError), match="changes the output" if what == "output" else "not close"):
        tapped_layer.timings(layers, 1)
