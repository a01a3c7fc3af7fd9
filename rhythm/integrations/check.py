"""Says whether an installed trainer still has the seams that its adapter uses: python -m rhythm.integrations.check verl

Exits with 0 if all are there, 1 if one is missing, 2 if the trainer is not installed. Sources are read, not imported:
many trainers need CUDA at import.

A seam is a class or function in a module, written "Class.method(argument, …)" with the arguments that the adapter
passes or receives. A method may be inherited from a base class in the same module.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

SEAMS: dict[str, dict[str, tuple[str, ...]]] = {
    "slime": {
        "slime.backends.megatron_utils.model": ("'custom_megatron_before_log_prob_hook_path'", "'loss_mask'"),
        "slime.backends.megatron_utils.actor": ("'rollout_data_postprocess_path'",),
        "slime.backends.megatron_utils.data": ("get_batch", "'packed_seq_params'", "'full_loss_masks'"),
        "slime.backends.megatron_utils.loss": ("compute_advantages_and_returns(args, rollout_data)",),
    },
    "verl": {
        "verl.trainer.ppo.v1.trainer_base": (
            "register_trainer(name)",
            "PPOTrainer._compute_old_log_prob(self, batch, metrics)",
            "PPOTrainer._compute_advantage(self, batch, metrics)",
            "PPOTrainer._build_replay_buffer(self)",
        ),
        "verl.trainer.ppo.v1.trainer_sync": ("PPOTrainerSync",),
        "verl.workers.engine.base": ("EngineRegistry.register(cls, model_type, backend, device, vendor)",),
        "verl.workers.engine.fsdp.transformer_impl": (
            "FSDPEngineWithLMHead.forward_step(self, micro_batch, loss_function, forward_only)",
            "FSDPEngineWithLMHead.prepare_model_outputs",
        ),
        "verl.workers.engine.megatron.transformer_impl": (
            "MegatronEngine.forward_backward_batch(self, data, loss_function, forward_only)",
            "MegatronEngineWithLMHead.forward_step(self, batch_iter, model)",
        ),
        "verl.models.mcore.model_forward": ("'packed_seq_params'",),
        "verl.utils.tensordict_utils": ("get_non_tensor_data(data, key, default)",),
        "transfer_queue.interface": ("kv_batch_get(keys, partition_id, select_fields)", "kv_batch_put(keys, fields)"),
    },
    "roll": {
        "roll.pipeline.rlvr.actor_pg_worker": ("ActorPGWorker",),
        "roll.pipeline.base_worker": (
            "ActorWorker.train_step(self, data)",
            "ActorWorker.forward_func_log_probs(self, data, output_tensor)",
        ),
        "roll.distributed.scheduler.decorator": ("Dispatch", "register(dispatch_mode, trace, prefetch, to_remote)"),
        "roll.distributed.strategy.megatron_strategy": (
            "MegatronInferStrategy.get_data_input(self, batch)",
            "MegatronInferStrategy.forward_step(self, batch, forward_func)",
        ),
    },
    "nemo_rl": {
        "nemo_rl.algorithms.grpo": ("_create_advantage_estimator(master_config)", "'Policy'"),
        "nemo_rl.algorithms.advantage_estimator": (
            "GRPOAdvantageEstimator.compute_advantage(self, prompt_ids, rewards, mask)",
        ),
        "nemo_rl.models.policy.lm_policy": (
            "Policy.__init__(self, worker_extension_cls_fqn)",
            "Policy.get_logprobs(self, data, timer)",
        ),
        "nemo_rl.models.policy.workers.dtensor_policy_worker_v2": (
            "DTensorPolicyWorkerV2Impl.get_logprobs(self, data, micro_batch_size)",
        ),
        "nemo_rl.models.policy.workers.megatron_policy_worker": (
            "MegatronPolicyWorkerImpl.get_logprobs(self, data, micro_batch_size)",
        ),
        "nemo_rl.models.megatron.data": ("_pack_sequences_for_megatron(input_ids, seq_lengths)",),
        "nemo_rl.distributed.ray_actor_environment_registry": ("'ACTOR_ENVIRONMENT_REGISTRY'",),
    },
    "openrlhf": {
        "openrlhf.cli.train_ppo_ray": ("'PolicyModelActor'", "'PPOTrainer'"),
        "openrlhf.models.actor": ("'packing_samples'",),
        "openrlhf.trainer.ppo_trainer": (
            "BasePPOTrainer.train_step(self, rollout_samples, global_step)",
            "'experience_maker'",
            "PPOTrainer",
        ),
        "openrlhf.trainer.ppo_trainer_async": ("TrainingActor",),
        "openrlhf.trainer.ppo_utils.experience": ("'attention_mask'", "'action_mask'", "'advantages'"),
        "openrlhf.trainer.ppo_utils.experience_maker": (
            "RemoteExperienceMaker.make_experience_batch(self, rollout_samples)",
        ),
        "openrlhf.trainer.ray.launcher": ("RayActorGroup.async_run_method(self, method_name)",),
        "openrlhf.trainer.ray.ppo_actor": ("PolicyModelActor.forward(self, sequences, action_mask, attention_mask)",),
        "openrlhf.utils.deepspeed.deepspeed": ("DeepspeedStrategy._unwrap_model(self, model)",),
    },
    "prime_rl": {
        "prime_rl.configs.trainer": ("CustomLossConfig", "DefaultLossConfig", "IPOLossConfig"),
        "prime_rl.trainer.model": (
            "forward(model, input_ids, position_ids, seq_lens, labels, seq_lens_are_pre_shard)",
        ),
        "prime_rl.trainer.models.layers.attn": ("FlashAttention._compute_attention(self, q, k, v)",),
        "prime_rl.trainer.rl.loss": (
            "compute_loss(advantages, loss_mask, rl_weights)",
            "setup_rl_loss_fn(loss_config)",
        ),
        "prime_rl.trainer.rl.train": ("'forward'", "'compute_loss'", "'setup_rl_loss_fn'"),
    },
    "trl": {
        "trl.trainer.grpo_trainer": (
            "GRPOTrainer._generate_and_score_completions(self, inputs)",
            "GRPOTrainer._compute_loss(self, model, inputs)",
            "'advantages'",
        ),
    },
}
"""Trainer → module → what must be in it; in quotes: a name or a string anywhere in its source."""

DISTRIBUTIONS = {"nemo_rl": "nemo-rl", "prime_rl": "prime-rl"}  # where it isn't the package's name


def missing_seams(seams: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """One line for each that is missing."""
    for module, wanted in seams.items():
        path = _source(module)
        if path is None:
            yield f"{module}: no such module"
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        words = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        words |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        words |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        for seam in wanted:
            if seam.startswith("'"):
                if seam.strip("'") not in words:
                    yield f"{module}: {seam} does not occur"
            elif said := _lacks(tree, seam):
                yield f"{module}: {said}"


def _source(module: str) -> Path | None:
    """The file of a module, without importing more than the packages above the first."""
    package, *rest = module.split(".")
    spec = find_spec(package)
    for folder in [] if spec is None else spec.submodule_search_locations or []:
        path = Path(folder).joinpath(*rest)
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return file
    return None


def _lacks(tree: ast.Module, seam: str) -> str | None:
    """What is wrong with a class or function; None if it is there with its arguments."""
    path, _, arguments = seam.rstrip(")").partition("(")
    found: ast.AST = tree
    for name in path.split("."):
        member = _member(tree, found, name)
        if member is None:
            return f"{path} is missing"
        found = member
    if not arguments:
        return None
    if not isinstance(found, ast.FunctionDef | ast.AsyncFunctionDef):
        return f"{path} is not a function"
    has = {argument.arg for argument in (*found.args.posonlyargs, *found.args.args, *found.args.kwonlyargs)}
    lacking = [name for name in arguments.split(", ") if name not in has]
    return f"{path} has no argument {', '.join(lacking)}" if lacking and found.args.kwarg is None else None


def _member(tree: ast.Module, owner: ast.AST, name: str) -> ast.AST | None:
    """A class or function in a module or class, also in the bases that the same module has."""
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(owner) if owner is tree else getattr(owner, "body", []):
        if isinstance(node, kinds) and node.name == name:
            return node
    for base in getattr(owner, "bases", []):
        parent = _member(tree, tree, base.id) if isinstance(base, ast.Name) else None
        if parent is not None and (found := _member(tree, parent, name)) is not None:
            return found
    return None


def main(arguments: Sequence[str]) -> int:
    """Prints the report of one trainer; returns the exit status."""
    if len(arguments) != 1 or arguments[0] not in SEAMS:
        print(f"usage: python -m rhythm.integrations.check {{{','.join(SEAMS)}}}", file=sys.stderr)
        return 2
    (trainer,) = arguments
    if find_spec(trainer) is None:
        print(f"{trainer} is not installed", file=sys.stderr)
        return 2
    try:
        version = metadata.version(DISTRIBUTIONS.get(trainer, trainer))
    except metadata.PackageNotFoundError:
        version = "(a source tree)"
    lines = list(missing_seams(SEAMS[trainer]))
    count = sum(map(len, SEAMS[trainer].values()))
    print(f"{trainer} {version}: {count - len(lines)} of {count} seams of rhythm.integrations.{trainer} are there")
    for line in lines:
        print(f"  {line}")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
