"""Provides the responses to observe: those given with the problems, or generated ones."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rhythm.analysis.config import AnalysisConfig
from rhythm.analysis.problems import Problem, RowError
from rhythm.engines.interfaces import Infer, Rollout
from rhythm.seeds import analysis_seed


@dataclass(frozen=True)
class PendingResponse:
    """A response that has not been observed yet.

    source: "given" in the file, or "generated"; finished: whether it ended with an end token, None if given; prompt:
    the text given to the model.
    """

    problem: Problem
    sample: int
    source: Literal["given", "generated"]
    finished: bool | None
    prompt: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]

    @property
    def name(self) -> str:
        return response_name(self.problem, self.sample)


@dataclass(frozen=True)
class KeptResponse:
    """A response that has been measured already. finished: whether it ended with an end token, None if given."""

    response_ids: tuple[int, ...]
    finished: bool | None


def response_name(problem: Problem, sample: int) -> str:
    return f"{problem.row:05d}-{sample}"


class ResponseSource:
    """Provides responses to problems that fit into the model's context.

    Args:
        infer: generates responses for problems without one.
        context: longest prompt and response together, in tokens; None: unlimited.
    """

    def __init__(self, tokenizer: Any, infer: Infer, config: AnalysisConfig, context: int | None) -> None:
        if config.chat and getattr(tokenizer, "chat_template", None) is None:
            raise ValueError("chat is true, but the tokenizer has no chat template")
        self._tokenizer, self._infer, self._config = tokenizer, infer, config
        self._context = sys.maxsize if context is None else context

    def pending(
        self,
        problems: Sequence[Problem],
        index: int,
        kept: Mapping[tuple[int, int], KeptResponse],
        ready: Callable[[PendingResponse], None],
        on_error: Callable[[RowError], None] | None = None,
    ) -> Iterator[PendingResponse]:
        """The responses to a batch of problems, in order.

        Generated responses depend only on weights, batch, index and seed. If one of the batch is not `kept`, all are
        generated, and those that are kept already are the same as before.

        Args:
            kept: by (row, sample).
            ready: called with every response as soon as it is there, and once more in their order: given ones at first,
                generated ones as they end, while others are generated.
            on_error: called with the error of a problem, which is then left out; None: the error is raised when it is
                its turn.

        Raises:
            RowError: a prompt or response without tokens, or longer than the context together.
        """
        items: list[tuple[Problem, str, tuple[int, ...]]] = []
        for problem in problems:
            prompt = self._prompt(problem)
            ids = tuple(self._tokenizer(prompt, add_special_tokens=not self._config.chat).input_ids)
            try:
                self._check(problem, ids)
            except RowError as error:
                if on_error is None:
                    raise
                on_error(error)
            else:
                items.append((problem, prompt, ids))

        def early(response: PendingResponse) -> None:
            if self._trouble(response) is None:
                ready(response)

        of_row = {problem.row: self._given(problem, prompt, ids) for problem, prompt, ids in items if problem.responses}
        for responses in of_row.values():
            for response in responses:
                early(response)
        bare = [item for item in items if not item[0].responses]
        if all((problem.row, i) in kept for problem, _, _ in bare for i in self.samples(problem)):
            of_row |= {item[0].row: self._kept(item, kept) for item in bare}
        else:
            of_row |= self._generated(bare, index, early)
        for problem, _, _ in items:
            for response in of_row[problem.row]:
                if (trouble := self._trouble(response)) is None:
                    ready(response)
                    yield response
                elif on_error is None:
                    raise trouble
                else:
                    on_error(trouble)

    def samples(self, problem: Problem) -> range:
        """Indices of the problem's responses, given or generated."""
        return range(len(problem.responses) or self._config.responses_per_problem)

    def _prompt(self, problem: Problem) -> str:
        if not self._config.chat:
            return problem.prompt
        messages = [{"role": "user", "content": problem.prompt}]
        text: str = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return text

    def _check(self, problem: Problem, ids: tuple[int, ...]) -> None:
        if not ids:
            raise RowError(problem.row, "the prompt has no tokens")
        if len(ids) >= self._context:
            raise RowError(
                problem.row,
                f"the prompt has {len(ids):,} tokens; the model's context of {self._context:,} leaves no room for a "
                "response",
            )

    def _trouble(self, response: PendingResponse) -> RowError | None:
        """Why a response can't be analyzed."""
        which = f"response {response.sample + 1}"
        if not response.response_ids:
            return RowError(response.problem.row, f"{which} has no tokens")
        total = len(response.prompt_ids) + len(response.response_ids)
        if total > self._context:
            return RowError(
                response.problem.row,
                f"the prompt and {which} have {total:,} tokens together; the model's context is {self._context:,}",
            )
        return None

    def _given(self, problem: Problem, prompt: str, ids: tuple[int, ...]) -> list[PendingResponse]:
        return [
            PendingResponse(
                problem,
                sample,
                "given",
                None,
                prompt,
                ids,
                tuple(self._tokenizer(text, add_special_tokens=False).input_ids),
            )
            for sample, text in enumerate(problem.responses)
        ]

    def _kept(
        self, item: tuple[Problem, str, tuple[int, ...]], kept: Mapping[tuple[int, int], KeptResponse]
    ) -> list[PendingResponse]:
        """Generated responses to a problem, from what is kept of them."""
        problem, prompt, ids = item
        return [
            PendingResponse(problem, sample, "generated", each.finished, prompt, ids, each.response_ids)
            for sample in self.samples(problem)
            for each in [kept[problem.row, sample]]
        ]

    def _generated(
        self,
        items: Sequence[tuple[Problem, str, tuple[int, ...]]],
        index: int,
        early: Callable[[PendingResponse], None],
    ) -> dict[int, list[PendingResponse]]:
        """Generated responses by the problem's row; prompts of similar length are in one batch. `early` gets those that
        the engine hands over while it generates others.
        """
        items = sorted(items, key=lambda item: len(item[2]))
        room = self._context - max(len(ids) for _, _, ids in items)
        sampling = self._config.sampling
        sampling = sampling.model_copy(update={"max_new_tokens": min(sampling.max_new_tokens, room)})
        handed: dict[int, int] = {}  # by group

        def done(part: Rollout) -> None:
            for response in _responses(items, part, handed):
                early(response)

        n = self._config.responses_per_problem
        seed = analysis_seed(self._config.seed, index)
        rollout = self._infer.generate([ids for _, _, ids in items], n, sampling, seed, done)
        of_row: dict[int, list[PendingResponse]] = {}
        for response in _responses(items, rollout, {}):
            of_row.setdefault(response.problem.row, []).append(response)
        return of_row


def _responses(
    items: Sequence[tuple[Problem, str, tuple[int, ...]]], rollout: Rollout, before: dict[int, int]
) -> Iterator[PendingResponse]:
    """The rows of a rollout, or of a part of one. `before`: how many responses to each prompt, by its number, the parts
    before had; counted on.
    """
    columns = (rollout.group, rollout.prompt_lens, rollout.lens, rollout.finished)
    for row, (which, prompt_len, length, finished) in enumerate(zip(*(x.tolist() for x in columns), strict=True)):
        problem, prompt, ids = items[which]
        sample = before.get(which, 0)
        before[which] = sample + 1
        response = tuple(rollout.input_ids[row, prompt_len:length].tolist())
        yield PendingResponse(problem, sample, "generated", finished, prompt, ids, response)
