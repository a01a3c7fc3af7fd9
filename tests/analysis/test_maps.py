"""Mean attention maps: equal to the reference if they fit, thumbnails that agree with it if not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rhythm.analysis.maps import LayerAttention, MeanMap, mean_map
from rhythm.ops.reference import attention_weights

HEADS = ((3, 1), (3, 3), (5, 1))


SINKS = torch.tensor([0.5, 3.0])


def layers_of(
    n: int, *, window: int | None = None, softcap: float | None = None, sinks: Tensor | None = None
) -> dict[int, LayerAttention]:
    generator = torch.Generator().manual_seed(n)

    def draw(heads: int) -> Tensor:
        return torch.randn(n, heads, 8, generator=generator)

    return {
        3: LayerAttention(2 * draw(4), draw(2), 8**-0.5),
        5: LayerAttention(3 * draw(2), draw(1), 8**-0.5, window, softcap, sinks),
    }


def by_definition(layers: dict[int, LayerAttention]) -> Tensor:
    """[N, N]: the maps of all heads from the reference, then the mean of the chosen ones."""
    of_layer = {
        i: attention_weights(
            x.query, x.key, x.scale, sliding_window=x.sliding_window, softcap=x.softcap, sinks_H=x.sinks
        )[0]
        for i, x in layers.items()
    }
    return torch.stack([of_layer[layer][head] for layer, head in HEADS]).mean(dim=0)


def test_a_response_that_fits_gets_the_map_itself() -> None:
    layers = layers_of(23)
    result = mean_map(layers, HEADS, prompt_len=7)
    assert (result.cell, result.prompt_columns) == (1, 7)
    torch.testing.assert_close(result.weights, by_definition(layers)[7:])


def test_chunks_are_cut_from_the_map() -> None:
    layers = layers_of(23)
    layers[5] = replace(layers[5], chunk=6)
    chunk_N = torch.arange(23) // 6
    exact_NN = by_definition(layers)  # of layer 5 as if it were whole
    x = layers[5]
    whole = attention_weights(x.query, x.key, x.scale)[0][1]
    cut = whole * (chunk_N[:, None] == chunk_N)
    exact_NN += (cut / cut.sum(dim=1, keepdim=True) - whole) / len(HEADS)
    for max_cells in (192, 23):
        result = mean_map(layers, HEADS, prompt_len=7, max_cells=max_cells, block_rows=5)
        torch.testing.assert_close(result.weights, exact_NN[7:])


@pytest.mark.parametrize(
    ("window", "softcap", "sinks"), [(None, None, None), (6, None, None), (None, 1.5, None), (6, None, SINKS)]
)
@pytest.mark.parametrize(("n", "prompt_len", "block_rows"), [(53, 11, 9), (64, 0, 128), (50, 49, 1)])
def test_a_thumbnail_pools_the_map(
    n: int, prompt_len: int, block_rows: int, window: int | None, softcap: float | None, sinks: Tensor | None
) -> None:
    layers = layers_of(n, window=window, softcap=softcap, sinks=sinks)
    result = mean_map(layers, HEADS, prompt_len=prompt_len, max_cells=16, width=5, block_rows=block_rows)
    exact_NN = by_definition(layers)
    cell = result.cell
    assert cell == 4
    assert result.prompt_columns == -(-prompt_len // 4)

    def bounds(index: int) -> slice:  # the prompt ends between two cells
        return slice(
            max(prompt_len + (index - result.prompt_columns) * cell, 0),
            prompt_len + (index + 1 - result.prompt_columns) * cell,
        )

    rows = [bounds(result.prompt_columns + r) for r in range(result.weights.shape[0])]
    columns = [bounds(c) for c in range(result.weights.shape[1])]
    assert rows[-1].start < n <= rows[-1].stop
    expected = torch.stack([torch.stack([exact_NN[r, c].sum(dim=1).mean() for c in columns]) for r in rows])
    torch.testing.assert_close(result.weights, expected)
    held = torch.stack([exact_NN[r].sum(dim=1).mean() for r in rows])
    torch.testing.assert_close(result.weights.sum(dim=1), held)
    assert sinks is not None or held.allclose(torch.ones(()))


@pytest.mark.parametrize("max_cells", [16, 64])
def test_the_band_holds_the_nearest_tokens(max_cells: int) -> None:
    layers = layers_of(40)
    band = mean_map(layers, HEADS, prompt_len=3, max_cells=max_cells, width=6).band
    exact_NN = by_definition(layers)
    assert band.shape == (37, 6)
    for m in range(37):
        for distance in range(6):
            s = 3 + m - distance
            if s < 0:
                assert band[m, distance].isnan()
            else:
                torch.testing.assert_close(band[m, distance], exact_NN[3 + m, s])


@pytest.mark.parametrize("max_cells", [16, 128])
def test_planted_patterns_show(max_cells: int) -> None:
    """A head that looks two tokens back fills one column of the band; an anchor everyone sees, one of the map."""
    n, prompt_len, anchor = 100, 20, 44
    one_hot = 40 * torch.eye(n)
    back = LayerAttention(torch.roll(one_hot, 2, dims=0)[:, None], torch.eye(n)[:, None], 1.0)
    back.query[:2] = one_hot[:2, None]  # nothing lies two tokens before these
    key = torch.zeros(n, 1, 1)
    key[anchor] = 40.0
    to_anchor = LayerAttention(torch.ones(n, 1, 1), key, 1.0)
    layers = {0: back, 1: to_anchor}

    local = mean_map(layers, [(0, 0)], prompt_len=prompt_len, max_cells=max_cells, width=4)
    assert local.band.argmax(dim=1).tolist() == [2] * (n - prompt_len)
    global_ = mean_map(layers, [(1, 0)], prompt_len=prompt_len, max_cells=max_cells, width=4)
    column = global_.prompt_columns + (anchor - prompt_len) // global_.cell
    first = -(-(anchor - prompt_len) // global_.cell)
    assert (global_.weights[first:, column] > 0.99).all()


def test_rows_that_are_undefined_stay_visible() -> None:
    layers = layers_of(40)
    layers[3].query[21, 1] = torch.nan
    for max_cells in (10, 64):
        result: MeanMap = mean_map(layers, HEADS, prompt_len=8, max_cells=max_cells)
        undefined = result.weights.isnan().any(dim=1).nonzero().flatten().tolist()
        assert undefined == [(21 - 8) // result.cell]


def test_bad_arguments_are_named() -> None:
    layers = layers_of(9)
    for message, heads, prompt_len, options in [
        ("heads is empty", [], 3, {}),
        (r"heads holds \(layer 4, head 0\)", [(4, 0)], 3, {}),
        (r"heads holds \(layer 5, head 2\)", [(3, 0), (5, 2)], 3, {}),
        ("prompt_len is 9", HEADS, 9, {}),
        ("width is 0", HEADS, 3, {"width": 0}),
        ("max_cells is -1", HEADS, 3, {"max_cells": -1}),
    ]:
        with pytest.raises(ValueError, match=message):
            mean_map(layers, heads, prompt_len=prompt_len, **options)  # type: ignore[arg-type]
