"""Kurtosis against scipy, scores between sentences against the whole map, and the choice of heads."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import kurtosis

from rhythm.analysis import attention as attention_module
from rhythm.analysis.attention import ObservedAttention
from rhythm.analysis.receivers import choose_receivers, excess_kurtosis, received_between_sentences, receiver_count
from rhythm.ops import reference

nan = float("nan")


def observed(n: int = 40, prompt: int = 6, **form: float | int | None) -> tuple[ObservedAttention, torch.Tensor]:
    """A layer of four query and two key heads, and its map from the reference."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(n, heads, 8, generator=generator) for heads in (4, 2))
    of_reference = {name if name != "sinks" else "sinks_H": value for name, value in form.items()}
    weights, lse = reference.attention_weights(query, key, 0.5, **of_reference)
    lse[:, :prompt] = nan
    return ObservedAttention(query=query, key=key, scale=0.5, lse=lse, prompt_len=prompt, **form), weights


FORMS = [{}, {"sliding_window": 9}, {"softcap": 1.5}, {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])}]


@pytest.mark.parametrize("form", FORMS)
def test_tiles_of_the_map(form: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    layer, weights = observed(**form)
    rows, columns, heads = torch.tensor([6, 20, 39]), torch.tensor([0, 19, 25]), torch.tensor([3, 1])
    torch.testing.assert_close(layer.weights(rows, columns, heads), weights[heads][:, rows][:, :, columns])
    assert layer.weights(torch.tensor([5]), columns, heads).isnan()[..., 0].all()  # a row of the prompt
    monkeypatch.setattr(attention_module, "TILE_ELEMENTS", 4 * 40 * 5)
    tiles = list(layer.row_tiles())
    assert [len(row) for row, _ in tiles] == [5] * 6 + [4]
    for row, tile in tiles:
        torch.testing.assert_close(tile, weights[:, row, : row[-1] + 1])


def test_kurtosis_is_scipys() -> None:
    x = torch.randn(3, 50, generator=torch.Generator().manual_seed(1)) ** 3
    x[1, 10:20] = nan
    expected = [kurtosis(row[~row.isnan()].double().numpy()) for row in x]
    assert excess_kurtosis(x).tolist() == pytest.approx(expected)


def test_kurtosis_of_too_little_is_undefined() -> None:
    x = torch.tensor([[1.0, 2, 3, nan], [1.0, 1, 1, 1], [nan] * 4, [0.0, 0, 0, 1]])
    assert excess_kurtosis(x).isnan().tolist() == [True, True, True, False]
    assert excess_kurtosis(torch.ones(2, 0)).isnan().all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gap", [1, 4])
def test_received_between_sentences(form: dict[str, float], gap: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, weights = observed(**form)
    sentence = torch.tensor([0] * 5 + [1] * 3 + [2] * 8 + [3] + [4] * 4 + [5] * 6 + [6] * 7)
    response = weights[:, 6:, 6:]
    expected = torch.full((4, 7), nan)
    for j in range(7 - gap):
        of_readers = [response[:, sentence == i][:, :, sentence == j].mean(dim=(1, 2)) for i in range(j + gap, 7)]
        expected[:, j] = torch.stack(of_readers).mean(dim=0)
    monkeypatch.setattr(attention_module, "TILE_ELEMENTS", 4 * 40 * 5)
    torch.testing.assert_close(received_between_sentences(layer, sentence, gap), expected, equal_nan=True)


def test_the_largest_kurtosis_receives() -> None:
    chosen = choose_receivers(torch.tensor([1.0, nan, 5.0, 5.0, 2.0]), 2)
    assert chosen.tolist() == [False, False, True, True, False]
    assert choose_receivers(torch.tensor([nan, 3.0]), 2).tolist() == [False, True]


def test_how_many_receive() -> None:
    assert receiver_count(None, 12, 4) == 4
    assert [receiver_count(share, 10, 3) for share in (0.01, 0.25, 1.0)] == [1, 3, 10]
