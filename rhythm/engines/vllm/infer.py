"""Implements Infer by vLLM: one replica with its tensor parallel workers.

Shape suffixes: B responses, T positions of input_ids, right-padded.
"""

from __future__ import annotations

import multiprocessing.connection
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from rhythm.engines.batches import assemble, concatenate
from rhythm.engines.interfaces import EngineLostError, Rollout, SamplingConfig
from rhythm.engines.transfer import PushManifest, TransferKind, buckets, make_sender
from rhythm.engines.vllm.config import VllmConfig
from rhythm.engines.vllm.environment import prepare_vllm_environment
from rhythm.engines.vllm.sampling import drawing, ended, request_params
from rhythm.seeds import derive_seed

WORKER_EXTENSION = "rhythm.engines.vllm.worker.WorkerExtension"
LOCAL_BUCKET_BYTES = 64 << 20
"""Bytes of shared memory that `update_weights` uses at a time."""
DEATH_SECONDS = 5.0
"""Seconds to wait, after an error of an engine with several workers, for the death of one, which may be its cause."""

T = TypeVar("T")


class VllmInfer:
    """Generates responses by vLLM.

    A rollout depends only on weights, prompts, sampling and seed: every response has its own random generator. The
    temperature divides the logits inside the model, so vLLM's raw log-probs are those at the sampling temperature,
    before top-p and top-k. The head computes in fp32, whatever `dtype`.

    Weights are updated by a push: `start_push`, `receive` for each bucket, `finish_push`. A push must contain every
    weight, in the shapes of the checkpoint; after a push that failed midway the engine can't be used any more.

    An engine that sleeps has neither weights nor a KV cache. A push gives it weights and no more; `wake` after it gives
    it the KV cache, so that both need not be there while the trainer sends.

    Every method raises EngineLostError if a tensor parallel worker has died. On Linux the workers end with the thread
    that started the engine, whatever they are doing.
    """

    def __init__(
        self,
        checkpoint: Path,
        config: VllmConfig,
        *,
        max_length: int,
        end_ids: Sequence[int],
        pad_id: int,
        dtype: torch.dtype,
        seed: int = 0,
        trust_remote_code: bool = False,
        stop_strings: bool = False,
    ) -> None:
        """Start the engine with the weights in `checkpoint`, a transformers checkpoint in safetensors.

        Args:
            checkpoint: its directory; its tokenizer is read only with `stop_strings`.
            config: settings of the engine.
            max_length: longest prompt and response together, in tokens.
            end_ids: tokens that end a response.
            pad_id: token used for padding after a response.
            dtype: dtype of weights, activations and KV cache.
            seed: seed of the engine, for anything that doesn't use a response's own seed.
            trust_remote_code: run code contained in the checkpoint.
            stop_strings: load the checkpoint's tokenizer, without which no `sampling.stop` can be given.

        Raises ValueError for empty end_ids, a checkpoint without safetensors, and on a CPU without kv_cache_gib.
        """
        if not end_ids:
            raise ValueError("end_ids is empty: a response must be able to end")
        self._manifest = PushManifest.of_checkpoint(checkpoint)
        prepare_vllm_environment(os.environ.get("VLLM_HOST_IP") or "127.0.0.1")
        from vllm import LLM
        from vllm.platforms import current_platform

        self._on_cpu = bool(current_platform.is_cpu())
        if self._on_cpu and config.kv_cache_gib is None:
            raise ValueError("kv_cache_gib is not set: on CPUs vLLM needs the size of its KV cache")
        parallel = {"distributed_executor_backend": "mp"} if config.tensor_parallel_size > 1 else {}
        self._llm: Any = LLM(
            model=str(checkpoint),
            load_format="safetensors",
            skip_tokenizer_init=not stop_strings,
            trust_remote_code=trust_remote_code,
            generation_config="vllm",  # ignore the checkpoint's sampling defaults
            hf_overrides={"head_dtype": "float32"},
            dtype=str(dtype).removeprefix("torch."),
            max_model_len=max_length,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=max(config.max_num_batched_tokens, config.max_num_seqs),
            tensor_parallel_size=config.tensor_parallel_size,
            gpu_memory_utilization=config.gpu_memory_utilization,
            kv_cache_memory_bytes=None if config.kv_cache_gib is None else int(config.kv_cache_gib * 2**30),
            enforce_eager=config.enforce_eager or self._on_cpu,
            enable_prefix_caching=config.enable_prefix_caching,
            enable_sleep_mode=not self._on_cpu,
            logprobs_mode="raw_logprobs",
            worker_extension_cls=WORKER_EXTENSION,
            seed=seed,
            **parallel,
        )
        if parallel:
            self._on_workers("end_with_parent")
        self._max_length = max_length
        self._end_ids = list(end_ids)
        self._pad_id = pad_id
        self._stop_strings = stop_strings
        self._version = 0
        self._state: Literal["serving", "receiving", "asleep", "loaded", "lost", "closed"] = "serving"
        self._has_cache = True
        self._temperature = 1.0

    @property
    def version(self) -> int:
        """The training step that made the current weights."""
        return self._version

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        sampling: SamplingConfig,
        seed: int,
        done: Callable[[Rollout], None] | None = None,
    ) -> Rollout:
        """Sample `n` responses per prompt; the rollout is on the CPU. `sampling.rows_at_once` is ignored: max_num_seqs
        limits the responses at a time.

        A response has at most the tokens that its prompt leaves within max_length, and none after the one that
        completes a string of `sampling.stop`.

        Raises ValueError for no prompts, an empty prompt, one that leaves no token, n < 1, or stop strings for an
        engine started without; RuntimeError if the engine is not serving.
        """
        parts: dict[int, Rollout] = {}
        for part in self.parts(prompts, n, sampling, seed):
            parts[int(part.group[0])] = part
            if done is not None:
                done(part)
        return concatenate([parts[index] for index in range(len(prompts))], self._pad_id)

    def parts(self, prompts: Sequence[Sequence[int]], n: int, sampling: SamplingConfig, seed: int) -> Iterator[Rollout]:
        """The rollout of `generate`, each prompt's responses by themselves as soon as the last of them ends, whichever
        prompt that is. Raises as `generate`.
        """
        if n < 1:
            raise ValueError(f"n is {n}: must be at least 1")
        seeds = [derive_seed(seed, index, sample) for index in range(len(prompts)) for sample in range(n)]
        answers: dict[int, dict[int, Any]] = {}
        for row, answer in self._answers([prompt for prompt in prompts for _ in range(n)], sampling, seeds):
            index, sample = divmod(row, n)
            of_prompt = answers.setdefault(index, {})
            of_prompt[sample] = answer
            if len(of_prompt) == n:
                yield self._rollout([prompts[index]] * n, [of_prompt[sample] for sample in range(n)], [index] * n)
                del answers[index]

    def generate_each(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingConfig, seeds: Sequence[int]
    ) -> Rollout:
        """See `rhythm.engines.interfaces.SeededInfer`; raises as `generate` does."""
        answers = dict(self._answers(prompts, sampling, seeds))
        return self._rollout(prompts, [answers[row] for row in range(len(prompts))], range(len(prompts)))

    def _answers(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingConfig, seeds: Sequence[int]
    ) -> Iterator[tuple[int, Any]]:
        """(row, vLLM's response) of one response to each prompt, by its own seed, in the order in which they end."""
        self._must_be("serving")
        if sampling.stop and not self._stop_strings:
            raise ValueError(f"sampling.stop is {list(sampling.stop)}: must be empty without stop_strings=True")
        if not prompts or not all(prompts):
            raise ValueError("prompts: must contain at least one prompt, and none may be empty")
        if (longest := max(map(len, prompts))) >= self._max_length:
            raise ValueError(f"prompts: the longest has {longest} tokens, which leaves none of {self._max_length}")
        self._set_temperature(sampling.temperature or 1.0)
        # A prefix cached by an earlier call would change the order of sums, and thereby the rollout.
        self._reset_prefix_cache()
        common = drawing(sampling, self._end_ids)
        params = [
            {**common, "seed": seed, "max_tokens": min(sampling.max_new_tokens, self._max_length - len(prompt))}
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        for row, output in self._run(prompts, params):
            yield row, output.outputs[0]

    def _rollout(self, prompts: Sequence[Sequence[int]], answers: Sequence[Any], group: Sequence[int]) -> Rollout:
        return assemble(
            prompts,
            [list(answer.token_ids) for answer in answers],
            [list(answer.logprobs.logprobs) for answer in answers],
            group=group,
            finished=[ended(answer, self._end_ids) for answer in answers],
            pad_id=self._pad_id,
        )

    def score(self, rollout: Rollout, temperature: float = 1.0) -> Tensor:
        """Log-probs of the response tokens at `temperature`, in nats, fp32 [B, T]; NaN outside the response.

        Prompt and response are given to vLLM as a prompt, except the last token, which is the only one that it may
        generate.

        Raises ValueError for a row longer than max_length; RuntimeError if the engine is not serving.
        """
        self._must_be("serving")
        lens = rollout.lens.tolist()
        if max(lens) > self._max_length:
            raise ValueError(f"rollout: its longest row has {max(lens)} tokens; max_length is {self._max_length}")
        self._set_temperature(temperature)
        rows = [row[:length].tolist() for row, length in zip(rollout.input_ids, lens, strict=True)]
        params = [
            {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0, "allowed_token_ids": [row[-1]]} for row in rows
        ]
        outputs = dict(self._run([row[:-1] for row in rows], params))
        logprobs_BT = torch.full(rollout.input_ids.shape, torch.nan)
        for b, row in enumerate(rows):
            output = outputs[b]
            picked = [*output.prompt_logprobs.logprobs, *output.outputs[0].logprobs.logprobs]
            logprobs_BT[b, 1 : len(row)] = torch.tensor(picked)
        return logprobs_BT.masked_fill(~rollout.response_mask.cpu(), torch.nan)

    def update_weights(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Copy all weights from this process, through shared memory.

        Raises ValueError if `version` is lower than before, a name is missing or unknown, or a shape differs.
        """
        self._must_not_fall(version)
        with make_sender("shared_memory") as sender:
            self.init_transfer("shared_memory", sender.init_info())
            self.start_push()
            for bucket in buckets(weights.items(), LOCAL_BUCKET_BYTES):
                self.receive(sender.stage(bucket))
            self.finish_push(version)

    def init_transfer(self, kind: TransferKind, info: Mapping[str, Any]) -> None:
        """Prepare to receive weights by this kind of transfer; `info` is a sender's init_info. With nccl it returns
        once all processes have connected.
        """
        self._must_be("serving", "asleep", "loaded")
        self._on_workers("open_transfer", kind, dict(info))

    def start_push(self) -> None:
        """Begin a push of weights; until `finish_push` the engine can't generate. One that sleeps gets memory for them,
        not for the KV cache.
        """
        self._must_be("serving", "asleep", "loaded")
        sleeps, self._state = self._state == "asleep", "lost"
        if sleeps and not self._on_cpu:
            self._watched(self._llm.wake_up, tags=["weights"])
        self._on_workers("start_weight_update")
        self._manifest = self._manifest.fresh()
        self._state = "receiving"

    def receive(self, info: Mapping[str, Any]) -> None:
        """Load one bucket, as described by a sender's `stage`; returns when its memory may be reused.

        Raises ValueError, before anything is loaded, for unknown or repeated names and wrong shapes.
        """
        self._must_be("receiving")
        self._state = "lost"
        self._manifest.enter(info["names"], info["shapes"])
        self._on_workers("receive_bucket", dict(info))
        self._state = "receiving"

    def finish_push(self, version: int) -> None:
        """End the push; the engine now has the weights of training step `version`. One that slept still needs `wake`.

        Raises ValueError if `version` is lower than before or weights are missing.
        """
        self._must_be("receiving")
        self._state = "lost"
        self._must_not_fall(version)
        self._manifest.must_be_complete()
        self._on_workers("finish_weight_update")
        self._on_workers("repack_heads")
        self._reset_prefix_cache()
        self._version = version
        self._state = "serving" if self._has_cache else "loaded"

    def sleep(self) -> None:
        """Drop weights and KV cache: the GPU's memory is the trainer's until the next push. On a CPU they stay in
        memory, although the engine can't be used either. Does nothing if it sleeps.
        """
        self._must_be("serving", "loaded", "asleep")
        if not self._on_cpu and self._state != "asleep":
            self._watched(self._llm.sleep, level=2)
        self._state, self._has_cache = "asleep", False

    def wake(self) -> None:
        """Allocate the KV cache after a push. Does nothing if the engine serves. Raises RuntimeError if it sleeps: then
        it has no weights.
        """
        self._must_be("serving", "loaded")
        if not self._on_cpu and self._state == "loaded":
            self._watched(self._llm.wake_up, tags=["kv_cache"])
        self._state, self._has_cache = "serving", True

    def close(self) -> None:
        """Stop the engine and its workers. May be called twice."""
        if self._state == "closed":
            return
        from vllm.distributed import cleanup_dist_env_and_memory

        self._state = "closed"
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        cleanup_dist_env_and_memory()

    def _run(self, prompts: Sequence[Sequence[int]], params: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, Any]]:
        """(place, vLLM's output) of each prompt, in the order in which they end."""
        engine = self._llm.llm_engine
        running = {str(place) for place in range(len(prompts))}
        try:
            for place, (prompt, options) in enumerate(zip(prompts, params, strict=True)):
                engine.add_request(str(place), {"prompt_token_ids": list(prompt)}, request_params(options))
            while running:
                for output in self._watched(engine.step):
                    running.remove(output.request_id)
                    yield int(output.request_id), output
        finally:
            if running:  # the caller gave up
                engine.abort_request(list(running))

    def _set_temperature(self, temperature: float) -> None:
        if temperature <= 0:
            raise ValueError(f"temperature is {temperature}: must be above 0")
        if temperature != self._temperature:
            self._on_workers("scale_logits", 1 / temperature)
            self._temperature = temperature

    def _on_workers(self, method: str, *arguments: Any) -> None:
        """Call a method of every worker, one of vLLM's or of WorkerExtension."""
        self._watched(self._llm.collective_rpc, method, args=arguments)

    def _watched(self, method: Callable[..., T], *arguments: Any, **named: Any) -> T:
        """Call a method of vLLM's that uses the workers. Raises EngineLostError if one of them died."""
        try:
            return method(*arguments, **named)
        except Exception as error:
            if dead := self._dead_workers():
                self._state = "lost"
                raise EngineLostError(f"vLLM's worker processes ended: {', '.join(dead)}") from error
            raise

    def _dead_workers(self) -> list[str]:
        """Names and exit codes of workers that ended. When one dies vLLM ends the others."""
        processes = [worker.proc for worker in getattr(self._llm.llm_engine.model_executor, "workers", None) or ()]
        if processes:
            multiprocessing.connection.wait([process.sentinel for process in processes], DEATH_SECONDS)
        return [f"{process.name} ({process.exitcode})" for process in processes if not process.is_alive()]

    def _reset_prefix_cache(self) -> None:
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache: requests are still running")

    def _must_be(self, *states: str) -> None:
        if self._state not in states:
            raise RuntimeError(f"the vLLM engine is {self._state}: this needs it {' or '.join(states)}")

    def _must_not_fall(self, version: int) -> None:
        if version < self._version:
            raise ValueError(
                f"version is {version}: must not be lower than {self._version}, the engine's current version"
            )
