"""The results for one response, as frozen dataclasses that `rhythm.analysis.results` reads and writes as JSON.

Token indices count from the response's first token, 0. A head is (layer, head). Undefined numbers are NaN here, null in
JSON and empty in CSV. Shapes: n tokens of a response, L layers, H query heads per layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BeforeValidator

Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
"""A float; NaN is null in JSON."""
Numbers = tuple[Number, ...]
Head = tuple[int, int]
HeadMap = tuple[Numbers, ...]
"""[L][H]; NaN for layers that were not read."""


@dataclass(frozen=True)
class Tokens:
    """The tokens of a response; every field has n entries.

    Attributes:
        ids: in the tokenizer's vocabulary.
        texts: joined, they are the response; a token that ends within a character has "".
        waad: windowed average attention distance, tokens (eq. 9), mean over the local heads.
        fai: future attention influence, mean attention received within the horizon (eq. 10), mean over the global
            heads.
        fai_receiver: FAI over the receiver heads (token level).
        entropy: of the model's distribution for the token at temperature 1, nats.
        logprob: of the token in that distribution, nats.
        gamma: factor that training would apply to the token's advantage.
    """

    ids: tuple[int, ...]
    texts: tuple[str, ...]
    waad: Numbers
    fai: Numbers
    fai_receiver: Numbers
    entropy: Numbers
    logprob: Numbers
    gamma: Numbers


@dataclass(frozen=True)
class Peaks:
    """Token indices of the peaks of four curves, ascending."""

    waad: tuple[int, ...]
    fai: tuple[int, ...]
    fai_receiver: tuple[int, ...]
    entropy: tuple[int, ...]


@dataclass(frozen=True)
class Attender:
    """A later token of the response that attends to an anchor. weight: mean of A[t, s] over the global heads."""

    token: int
    weight: float


@dataclass(frozen=True)
class Anchor:
    """A peak of FAI and the tokens that attend to it, the strongest first.

    reach: mean distance, in tokens, at which later tokens of the response attend to it, weighted by their attention,
    over the global heads; NaN where attenders were not asked for.
    """

    token: int
    attenders: tuple[Attender, ...]
    reach: Number = math.nan


@dataclass(frozen=True)
class ResponseHeads:
    """Statistics of all heads on one response, and the sets chosen from the pool.

    Attributes:
        span: [L][H] tokens (eq. 7).
        kurtosis: [L][H] excess kurtosis of the to-the-end column scores over the response's tokens.
        kurtosis_sentence: [L][H] excess kurtosis of scores between sentences at least the minimum gap apart; NaN with
            too few sentences.
        local, global_: heads of the pool with the smallest and the largest span.
        receiver, receiver_sentence: heads of the pool with the largest kurtosis; by default as many as global heads,
            none where it is undefined.
        sentences: number of sentences in the response.
        entropy: [L][H] entropy of a row's attention, nats; sink_mass, prompt_mass: [L][H] the share of it on the first
            four tokens and on the prompt. Means over the response's rows; empty in results of earlier versions.
    """

    span: HeadMap
    kurtosis: HeadMap
    kurtosis_sentence: HeadMap
    local: tuple[Head, ...]
    global_: tuple[Head, ...]
    receiver: tuple[Head, ...]
    receiver_sentence: tuple[Head, ...]
    sentences: int
    entropy: HeadMap = ()
    sink_mass: HeadMap = ()
    prompt_mass: HeadMap = ()


@dataclass(frozen=True)
class AttentionMap:
    """A mean attention map (eq. 8) over the rows of a response, rounded to 4 digits; see
    `rhythm.analysis.maps.MeanMap`.

    Attributes:
        weights: [R][C].
        cell: height and width of a cell in tokens.
        prompt_columns: number of columns of the prompt.
        band: [n][W], attention to the nearest W tokens; NaN before the start of the sequence.
    """

    weights: tuple[Numbers, ...]
    cell: int
    prompt_columns: int
    band: tuple[Numbers, ...]


@dataclass(frozen=True)
class Maps:
    """The mean maps over the local and the global heads."""

    local: AttentionMap
    global_: AttentionMap


@dataclass(frozen=True)
class Trial:
    """A counterfactual: one token replaced, and a greedy continuation.

    Attributes:
        group: whether the position is among those of highest (top) or lowest (bottom) FAI, or among those of low FAI
            nearest to the highest ones (matched).
        position: index of the replaced token.
        fai: FAI of the replaced token.
        original_token, replacement_token: texts of the two tokens; `*_id`: their ids.
        candidate: rank of the replacement in the model's distribution at this position; 1 is the most likely.
        probability: probability of the replacement at this position.
        jaccard: Jaccard index of the content words after the position, of original and continuation (eq. 11); NaN if
            neither has any.
        continuation: text after the replacement.
        finished: whether the continuation ended with an end token.
    """

    group: Literal["top", "bottom", "matched"]
    position: int
    fai: float
    original_id: int
    original_token: str
    replacement_id: int
    replacement_token: str
    candidate: int
    probability: float
    jaccard: Number
    continuation: str
    finished: bool


@dataclass(frozen=True)
class ResponseResult:
    """The results for one response.

    Attributes:
        name: row and sample, for example "00012-0".
        row: row in the file of problems, from 1; sample: index of the response, from 0.
        source: whether the response was given in the file or generated.
        finished: whether it ended with an end token, not at the limit; None if it was given.
        prompt: the text given to the model; prompt_tokens: its number of tokens.
        answer: as in the row, if it has one.
        chunks: index of the first token of each chunk: 0 and the peaks of WAAD.
        anchors: the peaks of FAI; the strongest `attended_anchors` ones have attenders.
        maps: None if they were not requested.
        trials: empty if counterfactuals were not requested; None (null) as long as they are not done.
        digest: hash of the row's prompt and given response, to detect changed rows.
    """

    name: str
    row: int
    sample: int
    source: Literal["given", "generated"]
    finished: bool | None
    prompt: str
    prompt_tokens: int
    response: str
    answer: str | None
    tokens: Tokens
    peaks: Peaks
    chunks: tuple[int, ...]
    anchors: tuple[Anchor, ...]
    heads: ResponseHeads
    maps: Maps | None = None
    trials: tuple[Trial, ...] | None = ()
    digest: str = ""

    @property
    def complete(self) -> bool:
        """Whether nothing is missing: the counterfactuals are done, or were not requested."""
        return self.trials is not None

    def after(self, position: int) -> str:
        """The response's text after the token at `position`."""
        return "".join(self.tokens.texts[position + 1 :])
