from __future__ import annotations

import pytest
import torch

from benchmarks import micro_batches


def test_every_way_is_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(micro_batches, "ROWS", 8)
    monkeypatch.setattr(micro_batches, "MINI_BATCH", 4)
    monkeypatch.setattr(micro_batches, "ROUNDS", 1)
    monkeypatch.setattr(micro_batches, "WORK", {"short": ((2, 3), (4, 9))})
    assert micro_batches.main() == 0
    torch.set_num_threads(threads)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| short")]
    assert [row[1] for row in rows] == list(micro_batches.WAYS)
    assert all(0 < float(row[3]) < 60 and 0 < float(row[4].rstrip(" |")) < 60 for row in rows)


def test_padding_is_what_each_micro_batch_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(micro_batches, "ROWS", 8)
    monkeypatch.setattr(micro_batches, "MINI_BATCH", 4)
    rollout = micro_batches.make_rollout((2, 2), (1, 8))
    lens = rollout.lens.tolist()
    parts = [sorted((lens[i] for i in index.tolist()), reverse=True) for index in micro_batches.mini_batches()]
    positions = sum(2 * part[0] + 2 * part[2] for part in parts)
    assert micro_batches.padding(rollout, 2, None) == pytest.approx(1 - sum(lens) / positions)
    assert micro_batches.padding(rollout, 2, None) > 0
    assert micro_batches.padding(rollout, 2, 100) == 0
