"""Takes responses through their stages: measured (one forward pass, all of Table 2), then completed (counterfactuals).

Each stage is saved as soon as it exists, as responses/<row>-<sample>.json, where `trials` is null in between.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rhythm.analysis.config import AnalysisConfig
from rhythm.analysis.counterfactual import Scored, counterfactuals
from rhythm.analysis.forward import Observer
from rhythm.analysis.generation import KeptResponse, PendingResponse, response_name
from rhythm.analysis.observation import observe_response
from rhythm.analysis.problems import Problem, RowError
from rhythm.analysis.progress import AnalysisProgress
from rhythm.analysis.response import ResponseResult
from rhythm.analysis.results import read_json, response_path, write_json
from rhythm.seeds import analysis_seed

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setup:
    """What the stages compute with.

    Attributes:
        directory: of the analysis; tokenizer: of both models.
        observer: measures; writer: the model that continues texts, whose end tokens are end_ids.
        saved: called with the names of the batch's responses that are there, in order, whenever some were saved.
    """

    directory: Path
    tokenizer: Any
    observer: Observer
    writer: Any
    end_ids: Sequence[int]
    config: AnalysisConfig
    progress: AnalysisProgress
    saved: Callable[[Sequence[str]], None]


class BatchStages:
    """The responses to one batch of problems.

    kept: those that are measured, by (row, sample).
    """

    def __init__(self, setup: Setup, wanted: Sequence[tuple[Problem, int]], first: int) -> None:
        """
        Args:
            wanted: all responses of the batch, in order; what the directory has of them is not repeated.
            first: number of responses of earlier batches.

        Raises:
            RowError: a response in the directory was made from another row.
        """
        self._setup = setup
        self._names = {(problem.row, sample): response_name(problem, sample) for problem, sample in wanted}
        self._place = {key: first + i for i, key in enumerate(self._names)}
        self.kept: dict[tuple[int, int], KeptResponse] = {}
        self._complete: set[tuple[int, int]] = set()
        for problem, sample in wanted:
            if (before := self._read(problem, sample)) is not None:
                self._keep(before)

    @property
    def names(self) -> list[str]:
        """Of the responses that are measured, in order."""
        return [name for key, name in self._names.items() if key in self.kept]

    @property
    def complete_names(self) -> list[str]:
        """Of the responses that have all their results, in order."""
        return [name for key, name in self._names.items() if key in self._complete]

    @property
    def share(self) -> float:
        """The finished fraction of the batch, where a response without its counterfactuals is half finished."""
        return (len(self.kept) + len(self._complete)) / 2 / len(self._names)

    def measure(self, response: PendingResponse) -> None:
        """Observe a response and save all of its results but the counterfactuals, unless that is done."""
        key, setup = (response.problem.row, response.sample), self._setup
        if key in self.kept:
            return
        with setup.progress.aside(f"observing response {response.name}"):
            self._save([_measured(setup, response, maps=self._place[key] < setup.config.maps)])

    def complete(self, responses: Sequence[PendingResponse]) -> None:
        """Save the counterfactuals of responses that are measured, in groups that run together.

        How the responses are grouped decides the rounding of the continuations' sums, so a group that is not complete
        is computed as a whole.
        """
        config = self._setup.config.counterfactuals
        if config is None:
            return
        for start in range(0, len(responses), config.responses_at_once):
            group = responses[start : start + config.responses_at_once]
            if all((response.problem.row, response.sample) in self._complete for response in group):
                continue
            self._setup.progress.phase(f"counterfactuals of {', '.join(each.name for each in group)}")
            results = [read_json(ResponseResult, response_path(self._setup.directory, each.name)) for each in group]
            scored = [_scored(*pair) for pair in zip(group, results, strict=True)]
            tried = counterfactuals(
                self._setup.writer, self._setup.tokenizer, scored, config, end_ids=self._setup.end_ids
            )
            self._save([replace(result, trials=each.trials) for result, each in zip(results, tried, strict=True)])

    def _read(self, problem: Problem, sample: int) -> ResponseResult | None:
        """What the directory has of a response."""
        path = response_path(self._setup.directory, response_name(problem, sample))
        if not path.is_file():
            return None
        try:
            before = read_json(ResponseResult, path)
        except ValueError:
            log.warning("%s is damaged: this response is analyzed again", path)
            return None
        if before.digest != problem.digest(sample):
            raise RowError(problem.row, f"is not the row from which {path} was made; use another directory")
        return before

    def _save(self, results: Sequence[ResponseResult]) -> None:
        for result in results:
            write_json(result, response_path(self._setup.directory, result.name))
            self._keep(result)
        self._setup.progress.reached(self.share)
        self._setup.saved(self.names)

    def _keep(self, result: ResponseResult) -> None:
        key = result.row, result.sample
        self.kept[key] = KeptResponse(result.tokens.ids, result.finished)
        if result.complete:
            self._complete.add(key)


def _measured(setup: Setup, response: PendingResponse, *, maps: bool) -> ResponseResult:
    """All results of a response but its counterfactuals."""
    config = setup.config
    generator = torch.Generator().manual_seed(analysis_seed(config.seed, response.problem.row) + response.sample)
    seen = observe_response(
        setup.observer,
        setup.tokenizer,
        response.prompt_ids,
        response.response_ids,
        config,
        maps=maps,
        generator=generator,
    )
    return ResponseResult(
        name=response.name,
        row=response.problem.row,
        sample=response.sample,
        source=response.source,
        finished=response.finished,
        prompt=response.prompt,
        prompt_tokens=len(response.prompt_ids),
        response=setup.tokenizer.decode(response.response_ids, skip_special_tokens=True),
        answer=response.problem.answer,
        trials=() if config.counterfactuals is None else None,
        digest=response.problem.digest(response.sample),
        **vars(seen),
    )


def _scored(response: PendingResponse, result: ResponseResult) -> Scored:
    """What counterfactuals replace tokens of: a response as it was measured."""
    undefined = (float("nan"),) * len(response.prompt_ids)
    fai = torch.tensor([*undefined, *result.tokens.fai])
    return Scored([*response.prompt_ids, *result.tokens.ids], len(response.prompt_ids), fai)
