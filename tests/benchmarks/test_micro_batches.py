from __future__ import annotations

import pytest
import torch

from benchmarks import micro_batches


def test_every_way_is_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(micro_batches, "ROWS", 8)
    monkeypatch.setattr(micro_batches, "RESPONSES", 2)
    monkeypatch.setattr(micro_batches, "MINI_BATCH", 4)
    monkeypatch.setattr(micro_batches, "ROUNDS", 1)
    monkeypatch.setattr(micro_batches, "WORK", {"short": ((2, 3), (4, 9))})
    assert micro_batches.main() == 0
    torch.set_num_threads(threads)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| short")]
    assert [row[1] for row in rows] == list(micro_batches.WAYS)
    assert all(0 < float(row[3]) < 60 and 0 < float(row[4].rstrip(" |")) < 60 for row in rows)


def test_positions_are_what_goes_through_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(micro_batches, "ROWS", 8)
    monkeypatch.setattr(micro_batches, "RESPONSES", 2)
    monkeypatch.setattr(micro_batches, "MINI_BATCH", 4)
    rollout = micro_batches.make_rollout((3, 3), (1, 8))
    lens = rollout.lens.tolist()
    by_rows = micro_batches.Way(rows=2)
    parts = [sorted((lens[i] for i in index.tolist()), reverse=True) for index in by_rows.mini_batches()]
    assert by_rows.positions(rollout) == sum(2 * part[0] + 2 * part[2] for part in parts) > sum(lens)
    assert micro_batches.Way(max_tokens=100).positions(rollout) == sum(lens)
    whole = micro_batches.Way(share_prompts=True, of_whole_prompts=True)
    assert whole.positions(rollout) == sum(lens) - 4 * 3
    mixed = micro_batches.Way(share_prompts=True)
    split = sum(len({i // 2 for i in index.tolist()}) for index in mixed.mini_batches()) - 4
    assert mixed.positions(rollout) == sum(lens) - (4 - split) * 3
