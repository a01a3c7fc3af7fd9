"""Keeps the statistics of single heads on the responses of an analysis, so that signals can be made from them by other
settings without the model.

A response takes one forward pass, whatever the number of windows and horizons: of each layer it keeps query, key and
lse, and every further pair of window and horizon is one visit to the bands near the diagonal (a horizon to the end of
the response: one sweep). On disk a token and head take 4 bytes per window and 4 per horizon.

Shape suffixes: M response tokens, n heads, layer after layer.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from rhythm.analysis.attention import ObservedAttention
from rhythm.analysis.config import AnalysisConfig
from rhythm.analysis.forward import Observer
from rhythm.analysis.response import ResponseResult
from rhythm.analysis.results import Analysis
from rhythm.system.writing import replace_file
from rhythm.tap.chunks import chunked_statistics
from rhythm.tap.padding import PaddedBatch

Horizon = tuple[int, int | None]


@dataclass(frozen=True)
class KeptHeads:
    """The heads of some layers on one response; fp32, NaN where undefined.

    Attributes:
        layers: [n], the layer of each head.
        span: [n], tokens.
        waad: window → [n, M], tokens. fai: horizon → [n, M].
    """

    layers: Tensor
    span: Tensor
    waad: dict[int, Tensor]
    fai: dict[Horizon, Tensor]

    def covers(self, layers: Iterable[int], windows: Iterable[int], horizons: Iterable[Horizon]) -> bool:
        """Whether all these were kept."""
        return (
            set(layers) <= set(self.layers.tolist())
            and set(windows) <= self.waad.keys()
            and set(horizons) <= self.fai.keys()
        )

    def only(self, layers: Sequence[int]) -> KeptHeads:
        """Those of these layers."""
        here_n = torch.isin(self.layers, torch.tensor(layers))
        waad = {window: x_nM[here_n] for window, x_nM in self.waad.items()}
        fai = {horizon: x_nM[here_n] for horizon, x_nM in self.fai.items()}
        return KeptHeads(self.layers[here_n], self.span[here_n], waad, fai)


class HeadKeeper:
    """Reads the statistics of heads from the directory of an analysis, `heads/<response>.npz`, or makes them.

    Args:
        analysis: its responses are those that `heads` may be asked for.
        layers, windows, horizons: what is wanted of each response.

    Raises ValueError as `Observer` does.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        analysis: Analysis,
        *,
        layers: Sequence[int],
        windows: Sequence[int],
        horizons: Sequence[Horizon],
    ) -> None:
        self._tokenizer, self._directory = tokenizer, analysis.directory / "heads"
        self._layers, self._windows, self._horizons = tuple(sorted(set(layers))), windows, horizons
        config = AnalysisConfig.model_validate(analysis.settings)
        self._chat, self._backend = config.chat, config.signals.backend
        first = {"layers": self._layers, "window": windows[0], "horizon": horizons[0]}
        self._observer = Observer(model, config.signals.model_copy(update=first))

    def heads(self, response: ResponseResult) -> KeptHeads:
        """The kept statistics of a response, made if they are missing or lack something.

        Raises ValueError where the tokenizer is not that of the analysis; OSError where the file can't be written.
        """
        path = self._directory / f"{response.name}.npz"
        kept = _read(path)
        if kept is None or not kept.covers(self._layers, self._windows, self._horizons):
            kept = self._observed(response)
            self._directory.mkdir(exist_ok=True)
            _write(kept, path)
        return kept.only(self._layers)

    def _observed(self, response: ResponseResult) -> KeptHeads:
        prompt_ids = prompt_ids_of(response, self._tokenizer, self._chat)
        ids = response.tokens.ids
        seen = self._observer.observe([*prompt_ids, *ids], len(prompt_ids), [0] * len(ids))
        attentions = [attention for layer in self._layers if (attention := seen.layers[layer].attention) is not None]
        waad: dict[int, Tensor] = {}
        fai: dict[Horizon, Tensor] = {}
        for window, horizon in zip_longest(self._windows, self._horizons):
            pair = {"window": window or self._windows[0], "horizon": horizon or self._horizons[0]}
            waads, fais = zip(*(_bands(each, backend=self._backend, **pair) for each in attentions), strict=True)
            if window is not None:
                waad[window] = torch.cat(waads)
            if horizon is not None:
                fai[horizon] = torch.cat(fais)
        span = torch.cat([seen.layers[layer].span for layer in self._layers])
        heads = self._observer.config.num_attention_heads
        return KeptHeads(torch.tensor(self._layers).repeat_interleave(heads), span, waad, fai)


def prompt_ids_of(response: ResponseResult, tokenizer: Any, chat: bool) -> list[int]:
    """The tokens of a response's prompt. Raises ValueError where they are not as many as when it was analyzed."""
    ids = list(tokenizer(response.prompt, add_special_tokens=not chat).input_ids)
    if len(ids) != response.prompt_tokens:
        raise ValueError(
            f"tokenizer: gives the prompt of response {response.name} {len(ids)} tokens; it must be the one it was "
            f"analyzed with, {response.prompt_tokens}"
        )
    return ids


def _bands(attention: ObservedAttention, **options: Any) -> tuple[Tensor, Tensor]:
    """WAAD and FAI of the heads of a layer, [H, M], from the lse that is known. options: window, horizon, backend."""
    batch = PaddedBatch.from_mask(torch.ones((1, len(attention.query)), dtype=torch.int64), [attention.prompt_len])
    got = chunked_statistics(
        attention.query,
        attention.key,
        batch.to(attention.query.device),
        attention.chunk,
        lse=attention.lse,
        span=False,
        scale=attention.scale,
        softcap=attention.softcap,
        sliding_window=attention.sliding_window,
        sinks=attention.sinks,
        **options,
    )
    response = slice(attention.prompt_len, None)
    return got.waad[:, response].float().cpu(), got.fai[:, response].float().cpu()


def _write(kept: KeptHeads, path: Path) -> None:
    arrays = {"layers": kept.layers, "span": kept.span}
    arrays |= {f"waad {window}": x for window, x in kept.waad.items()}
    arrays |= {f"fai {low} {'end' if high is None else high}": x for (low, high), x in kept.fai.items()}
    file = io.BytesIO()
    np.savez(file, **{name: x.numpy() for name, x in arrays.items()})  # type: ignore[arg-type]
    replace_file(path, file.getvalue())


def _read(path: Path) -> KeptHeads | None:
    """None where there is no such file, or a damaged one."""
    try:
        with np.load(path) as file:
            arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    except FileNotFoundError:
        return None
    except (ValueError, EOFError, BadZipFile):
        return None
    waad, fai = {}, {}
    for name, x in arrays.items():
        signal, *numbers = name.split()
        if signal == "waad":
            waad[int(numbers[0])] = x
        elif signal == "fai":
            fai[int(numbers[0]), None if numbers[1] == "end" else int(numbers[1])] = x
    return KeptHeads(arrays["layers"], arrays["span"], waad, fai)
