"""Provides the responses to observe: those given with the problems, or generated ones."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rhythm.analysis.config import AnalysisConfig
from rhythm.analysis.problems import Problem, RowError
from rhythm.engines.interfaces import Infer
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
        finished: Mapping[tuple[int, int], bool],
        on_error: Callable[[RowError], None] | None = None,
        *,
        at_once: int = 1,
    ) -> Iterator[list[PendingResponse]]:
        """The responses to a batch of problems, in order, in groups of `at_once` that are not all `finished`.

        Generated responses depend only on weights, batch, index and seed, and groups only on the batch. So what is
        incomplete is generated and observed again as a whole, with the same result.

        Args:
            finished: (row, sample) → whether this response is finished, as it is when a group is asked for.
            on_error: called with the error of a problem, which is then left out; None: the error is raised.

        Raises:
            RowError: a prompt or response without tokens, or longer than the context together.
        """
        ready: list[tuple[Problem, str, tuple[int, ...]]] = []
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
                ready.append((problem, prompt, ids))
        bare = [item for item in ready if not item[0].responses]
        missing = any(not finished[problem.row, i] for problem, _, _ in bare for i in self.samples(problem))
        drawn = self._generated(bare, index) if missing else {}
        group: list[PendingResponse] = []

        def is_pending() -> bool:
            return not all(finished[response.problem.row, response.sample] for response in group)

        for problem, prompt, ids in ready:
            for response in drawn.get(problem.row, []) or self._given(problem, prompt, ids):
                try:
                    self._check_response(response)
                except RowError as error:
                    if on_error is None:
                        if is_pending():
                            yield group
                        raise
                    on_error(error)
                    continue
                group.append(response)
                if len(group) == at_once:
                    if is_pending():
                        yield group
                    group = []
        if is_pending():
            yield group

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

    def _check_response(self, response: PendingResponse) -> None:
        which = f"response {response.sample + 1}"
        if not response.response_ids:
            raise RowError(response.problem.row, f"{which} has no tokens")
        total = len(response.prompt_ids) + len(response.response_ids)
        if total > self._context:
            raise RowError(
                response.problem.row,
                f"the prompt and {which} have {total:,} tokens together; the model's context is {self._context:,}",
            )

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

    def _generated(
        self, items: Sequence[tuple[Problem, str, tuple[int, ...]]], index: int
    ) -> dict[int, list[PendingResponse]]:
        """Generated responses by the problem's row; prompts of similar length are in one batch."""
        if not items:
            return {}
        items = sorted(items, key=lambda item: len(item[2]))
        room = self._context - max(len(ids) for _, _, ids in items)
        sampling = self._config.sampling
        sampling = sampling.model_copy(update={"max_new_tokens": min(sampling.max_new_tokens, room)})
        n = self._config.responses_per_problem
        rollout = self._infer.generate(
            [ids for _, _, ids in items], n, sampling, analysis_seed(self._config.seed, index)
        )
        pending: dict[int, list[PendingResponse]] = {}
        for row, (which, prompt_len, length, finished) in enumerate(
            zip(
                rollout.group.tolist(),
                rollout.prompt_lens.tolist(),
                rollout.lens.tolist(),
                rollout.finished.tolist(),
                strict=True,
            )
        ):
            problem, prompt, ids = items[which]
            of_problem = pending.setdefault(problem.row, [])
            response = tuple(rollout.input_ids[row, prompt_len:length].tolist())
            of_problem.append(PendingResponse(problem, len(of_problem), "generated", finished, prompt, ids, response))
        return pending
