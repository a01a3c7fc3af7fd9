"""Runs an analysis: processes one response at a time, skips those already in the directory, and writes the results.

The directory holds settings.json and responses/<row>-<sample>.json, and when all responses are finished also
results.json, the CSV files, report.html and figures/.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console

from rhythm.analysis.config import AnalysisConfig
from rhythm.analysis.counterfactual import counterfactuals
from rhythm.analysis.figures import write_figures
from rhythm.analysis.forward import Observer
from rhythm.analysis.generation import PendingResponse, ResponseSource, response_name
from rhythm.analysis.observation import observe_response
from rhythm.analysis.page import write_page
from rhythm.analysis.problems import Problem, RowError, Source, check_file, read_problems
from rhythm.analysis.progress import AnalysisProgress, finishing
from rhythm.analysis.results import Analysis, ResponseResult, Trial, read_json, response_path, write_json
from rhythm.analysis.summary import summarize
from rhythm.checkpoints import model_end_tokens
from rhythm.engines.interfaces import Infer
from rhythm.engines.local.infer import GenerateInfer
from rhythm.seeds import analysis_seed
from rhythm.system.directory_lock import content, lock_directory
from rhythm.system.writing import naming, replace_file

log = logging.getLogger(__name__)

VERSION = 1  # of the file format; files of another version are not continued
PROBE_TOKENS = 8  # of the first forward pass, which checks that the model's attention can be read
DIGEST_ENTRIES = 64
T = TypeVar("T")


def analyze(
    model: Any,
    tokenizer: Any,
    problems: Source | str,
    *,
    out: Path | str | None = None,
    config: AnalysisConfig | None = None,
    infer: Infer | None = None,
    end_ids: Sequence[int] | None = None,
    model_name: str | None = None,
    keep_going: bool = False,
    page: bool = True,
    console: Console | None = None,
) -> Analysis:
    """Generate responses (or use given ones), observe each in one forward pass, and write the results.

    Responses that are already in `out` are not repeated, and finished ones are kept if a later one fails. Memory does
    not grow with the number of problems, except for a few numbers per response.

    Args:
        model: a causal transformers model, which is put into eval mode; tokenizer: its tokenizer.
        problems: a JSONL file, or a list of prompts or rows; see `read_problems`.
        out: directory, created if missing; None: a new temporary one, see `directory` of the result.
        config: AnalysisConfig() if None.
        infer: generates responses; None: transformers, with the same model.
        end_ids: tokens that end a response; None: those of the tokenizer and the generation config.
        model_name: name in the report; None: the model's own.
        keep_going: leave out rows that can't be analyzed and list them in `failures`, instead of raising.
        page: also write report.html and figures/.
        console: shows the progress.

    Raises:
        RowError (a ValueError): a row can't be analyzed; the message names it.
        DirectoryLockedError (a ValueError): another process is using `out`.
        ValueError: the model can't be analyzed, `out` contains another analysis, or no response is left.
        OSError: a file can't be read or written; the message names it. Finished responses are kept.
    """
    config = config or AnalysisConfig()
    asked: Source = Path(problems) if isinstance(problems, str) else problems
    ends = end_ids_of(model, tokenizer) if end_ids is None else list(end_ids)
    observer = _observer(model, config)
    if infer is None:
        pad = tokenizer.pad_token_id
        infer = GenerateInfer(model, end_ids=ends, pad_id=ends[0] if pad is None else pad)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    responses = ResponseSource(tokenizer, infer, config, context)

    failures: list[str] = []
    on_error = (lambda error: failures.append(str(error))) if keep_going else None
    with ExitStack() as stack:
        source = _readable_twice(asked, stack)
        total = sum(1 for _ in read_problems(source, on_error))  # check every row before the work begins
        failures.clear()
        directory = Path(tempfile.mkdtemp(prefix="rhythm-analysis-")) if out is None else Path(out)
        stack.enter_context(lock_directory(directory))
        name = model_name or getattr(model.config, "_name_or_path", "") or type(model).__name__
        _check_settings(
            directory,
            {"version": VERSION, "model": name, "weights": _weights_digest(model), **config.model_dump(mode="json")},
        )

        def is_finished(problem: Problem, sample: int) -> bool:
            path = response_path(directory, response_name(problem, sample))
            if not path.is_file():
                return False
            try:
                before = read_json(ResponseResult, path)
            except ValueError:
                log.warning("%s is damaged: this response is analyzed again", path)
                return False
            if before.digest != problem.digest(sample):
                raise RowError(problem.row, f"is not the row from which {path} was made; use another directory")
            return True

        names: list[str] = []
        attempted = 0
        with AnalysisProgress(console, problems=total) as progress:
            for index, batch in enumerate(_batches(read_problems(source, on_error), config.problems_at_once)):
                wanted = [(problem, sample) for problem in batch for sample in responses.samples(problem)]
                finished = {(problem.row, sample): is_finished(problem, sample) for problem, sample in wanted}
                place = {response_name(*pair): attempted + i for i, pair in enumerate(wanted)}
                attempted += len(wanted)
                progress.batch(len(batch))
                progress.phase(_generating(infer, config), share=0)
                for response in responses.pending(batch, index, finished, on_error):
                    share = sum(finished.values()) / len(finished)
                    progress.phase(f"observing response {response.name}, and its counterfactuals", share)
                    maps = place[response.name] < config.maps
                    write_json(
                        _result(model, tokenizer, observer, response, config, ends, maps=maps),
                        response_path(directory, response.name),
                    )
                    finished[response.problem.row, response.sample] = True
                names += [response_name(task, sample) for task, sample in wanted if finished[task.row, sample]]
                progress.end_batch()
        stack.enter_context(finishing(console))
        if not names:
            raise ValueError("\n".join(["problems: no response is left to analyze", *failures]))
        analysis = summarize(
            directory,
            model=name,
            problems=str(asked) if isinstance(asked, Path) else "",
            names=names,
            failures=failures,
            config=config,
            pool_layers=observer.pool,
        )
        if page:
            write_page(analysis)
            with naming(directory / "figures"):
                write_figures(analysis)
        return analysis


def _generating(infer: Infer, config: AnalysisConfig) -> str | Callable[[], str]:
    """The name of the phase; with transformers it includes the number of tokens."""
    if not isinstance(infer, GenerateInfer):
        return "generating responses"
    most = config.sampling.max_new_tokens
    return lambda: f"generating responses ({infer.sampled} of at most {most} tokens each)"


def _observer(model: Any, config: AnalysisConfig) -> Observer:
    """An observer that has been tried on a few tokens. Raises ValueError if the model's attention can't be read."""
    model.eval()
    observer = Observer(model, config.signals, sentence_gap=config.receivers.sentence_gap)
    probe = [i % observer.config.vocab_size for i in range(PROBE_TOKENS)]
    observer.observe(probe, PROBE_TOKENS // 2, [0] * (PROBE_TOKENS // 2))
    return observer


def _result(
    model: Any,
    tokenizer: Any,
    observer: Observer,
    response: PendingResponse,
    config: AnalysisConfig,
    end_ids: Sequence[int],
    *,
    maps: bool,
) -> ResponseResult:
    generator = torch.Generator().manual_seed(analysis_seed(config.seed, response.problem.row) + response.sample)
    seen = observe_response(
        observer, tokenizer, response.prompt_ids, response.response_ids, config, maps=maps, generator=generator
    )
    trials: tuple[Trial, ...] = ()
    if config.counterfactuals is not None:
        undefined = (float("nan"),) * len(response.prompt_ids)
        trials = counterfactuals(
            model,
            tokenizer,
            [*response.prompt_ids, *response.response_ids],
            len(response.prompt_ids),
            torch.tensor([*undefined, *seen.tokens.fai]),
            config.counterfactuals,
            end_ids=end_ids,
        ).trials
    return ResponseResult(
        name=response.name,
        row=response.problem.row,
        sample=response.sample,
        source=response.source,
        finished=response.finished,
        prompt=response.prompt,
        prompt_tokens=len(response.prompt_ids),
        response=tokenizer.decode(response.response_ids, skip_special_tokens=True),
        answer=response.problem.answer,
        trials=trials,
        digest=response.problem.digest(response.sample),
        **vars(seen),
    )


def _readable_twice(source: Source, stack: ExitStack) -> Source:
    """The source, or for a pipe a temporary copy of its content, deleted when the stack is left."""
    if not isinstance(source, Path):
        return source
    check_file(source)
    if source.is_file():
        return source
    copy = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rhythm-problems-"))) / "problems.jsonl"
    with naming(copy), source.open("rb") as pipe, copy.open("wb") as file:
        shutil.copyfileobj(pipe, file)
    return copy


def _check_settings(directory: Path, settings: dict[str, Any]) -> None:
    """Write the settings into a new directory, or check that they are those of an existing one.

    Raises ValueError if the directory belongs to an analysis with other settings, or holds other files.
    """
    path = directory / "settings.json"
    settings = json.loads(json.dumps(settings))  # in the form in which they are read back
    responses = directory / "responses"
    unused = not any(responses.glob("*.json")) and path.is_file() and not path.stat().st_size
    if path.is_file() and not unused:
        try:
            before = json.loads(path.read_bytes())
            if not isinstance(before, dict):
                raise ValueError("no object")
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path} is damaged, so the settings of the responses beside it are unknown: restore it, or use "
                f"another directory ({error})"
            ) from error
        if differing := sorted(_differences(before, settings)):
            raise ValueError(
                f"out is {directory}, which holds an analysis with another {', '.join(differing)}; use another "
                "directory"
            )
        return
    # A process that was killed in this function leaves these.
    ours = {responses, path, path.with_name(f".{path.name}.part")}
    if set(content(directory)) - ours or any(responses.glob("*")):
        raise ValueError(f"out is {directory}, which is not empty and holds no analysis; use another directory")
    responses.mkdir(exist_ok=True)
    replace_file(path, json.dumps(settings, indent=2) + "\n")


def _weights_digest(model: Any) -> str:
    """A hash of some entries of every parameter, enough to detect training, which changes nearly all."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        some = flat[:: max(1, flat.numel() // DIGEST_ENTRIES)][:DIGEST_ENTRIES].float().cpu()
        digest.update(f"{name} {tuple(parameter.shape)}".encode() + some.numpy().tobytes())
    return digest.hexdigest()[:16]


def _differences(one: Any, other: Any, name: str = "") -> Iterator[str]:
    """Dotted names of entries that differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in one.keys() | other.keys():
            yield from _differences(one.get(key), other.get(key), f"{name}.{key}" if name else key)
    elif one != other:
        yield name


def end_ids_of(model: Any, tokenizer: Any) -> list[int]:
    """End tokens of tokenizer and generation config. Raises ValueError if there are none."""
    ends = list(model_end_tokens(model, tokenizer))
    if not ends:
        raise ValueError("tokenizer: neither it nor the generation config has an end token, which responses need")
    return ends


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch
