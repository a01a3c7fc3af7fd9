"""rhythm.integrations.openrlhf on stand-ins for OpenRLHF's workers, groups and maker of experiences, with the contract
that docs/trainers.md has: OpenRLHF needs CUDA.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import tiny_model
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import rhythm
from rhythm.credit.config import CreditConfig
from rhythm.credit.gamma import batch_credit_weights
from rhythm.integrations import openrlhf
from rhythm.integrations.adapter import credit_of_process
from rhythm.tap.signals_config import SignalsConfig

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.cluster]

LENS, PROMPTS = [19, 11, 24, 15, 20], [6, 3, 8, 5, 7]
ORDER = [3, 0, 4, 1, 2]  # in which a dynamic batch has the samples
SIGNALS = {"layers": 2, "window": 4, "horizon": [2, 8], "backend": "reference"}
REWARDS = [1.0, -0.5, 2.0, 0.25, 1.5]


class Actor:
    """openrlhf.models.Actor in an engine of DeepSpeed: log-probs of the actions, by padded or packed rows."""

    def __init__(self, model: Any, packs: bool) -> None:
        self.model, self.packing_samples = SimpleNamespace(module=model), packs
        model.config.use_cache = False

    def __call__(self, sequences: Tensor, action_mask: Tensor, attention_mask: Tensor) -> Tensor:
        position = attention_mask.cumsum(-1) - 1
        if self.packing_samples:
            real = attention_mask.bool()
            self.model.module(sequences[real][None], attention_mask=None, position_ids=position[real][None])
        else:
            position = position.masked_fill(attention_mask == 0, 1)
            self.model.module(sequences, attention_mask=attention_mask, position_ids=position)
        return torch.zeros(action_mask.shape)


class PolicyModelActor:
    def __init__(self, model: Any, packs: bool) -> None:
        self.actor = Actor(model, packs)
        self.strategy = SimpleNamespace(_unwrap_model=lambda actor: actor.model.module)

    def forward(self, sequences: Tensor, action_mask: Any = None, attention_mask: Any = None) -> Tensor:
        with torch.no_grad():
            return self.actor(sequences, action_mask, attention_mask)


class RayActorGroup:
    """Two workers; micro-batches are dealt in runs, as many to the first as to the second, or one more."""

    def __init__(self, workers: list[Any]) -> None:
        self.workers = workers

    def async_run_method_batch(self, method_name: str, **kwargs: list[Any]) -> list[Any]:
        count = len(next(iter(kwargs.values())))
        size = -(-count // len(self.workers))
        refs = []
        for index, worker in enumerate(self.workers):
            part = range(index * size, min((index + 1) * size, count))
            refs.append([getattr(worker, method_name)(**{k: v[i] for k, v in kwargs.items()}) for i in part])
        return refs

    def async_run_method(self, method_name: str) -> list[Any]:
        return [getattr(worker, method_name)() for worker in self.workers]


class RemoteExperienceMaker:
    """OpenRLHF's, with micro-batches of two samples, and advantages normalized over all actions, on padding too."""

    def __init__(self, group: Any, args: Any) -> None:
        self.actor_model_group, self.args = group, args

    def make_experience_batch(self, rollout_samples: list[Any]) -> list[Any]:
        experiences = [
            SimpleNamespace(
                index=rows,
                sequences=pad_sequence([rollout_samples[row].ids for row in rows], batch_first=True),
                attention_mask=pad_sequence([torch.ones(LENS[row]).long() for row in rows], batch_first=True),
                action_mask=pad_sequence([rollout_samples[row].acts[1:] for row in rows], batch_first=True),
            )
            for rows in (ORDER[:2], ORDER[2:4], ORDER[4:])
        ]
        names = ("sequences", "action_mask", "attention_mask")
        self.actor_model_group.async_run_method_batch(
            "forward", **{name: [getattr(x, name) for x in experiences] for name in names}
        )
        for x in experiences:
            x.advantages = torch.tensor([REWARDS[row] for row in x.index])[:, None].repeat(1, x.action_mask.shape[1])
            x.advantages = x.advantages - 0.6
        return experiences


@pytest.fixture(autouse=True)
def _options(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("RHYTHM_CREDIT", f"{{credit: {{strategy: coupled, mass: matched}}, signals: {SIGNALS}}}")
    monkeypatch.setattr(ray, "get", lambda refs: refs)
    credit_of_process.cache_clear()
    yield
    credit_of_process.cache_clear()


def model() -> Any:
    return tiny_model().eval()


def samples() -> list[Any]:
    random = torch.Generator().manual_seed(6)
    return [
        SimpleNamespace(
            ids=torch.randint(4, 100, (length,), generator=random), acts=(torch.arange(length) >= prompt).long()
        )
        for length, prompt in zip(LENS, PROMPTS, strict=True)
    ]


def arguments(**changes: Any) -> Any:
    ds = {"ring_attn_size": 1, "tensor_parallel_size": 1} | changes
    return SimpleNamespace(
        ds=SimpleNamespace(**ds),
        actor=SimpleNamespace(policy_loss_type=changes.get("policy_loss_type", "ppo")),
        train=SimpleNamespace(seed=3),
    )


@pytest.mark.parametrize("packs", [False, True], ids=["padded", "packed"])
def test_advantages_are_those_of_observe(packs: bool) -> None:
    policy, rollout = model(), samples()
    group = RayActorGroup([openrlhf.policy_class(PolicyModelActor)(policy, packs) for _ in range(2)])
    maker = openrlhf.ExperienceMaker(RemoteExperienceMaker(group, arguments()))
    ids = pad_sequence([sample.ids for sample in rollout], batch_first=True)
    mask = torch.arange(max(LENS)) < torch.tensor(LENS)[:, None]
    response = mask & (torch.arange(max(LENS)) >= torch.tensor(PROMPTS)[:, None])
    signals = rhythm.observe(
        policy, ids, attention_mask=mask.long(), prompt_lens=PROMPTS, signals=SignalsConfig(**SIGNALS)
    )
    gamma = batch_credit_weights(signals, response, CreditConfig(strategy="coupled", mass="matched"))
    assert gamma[response].unique().numel() > 2
    for _ in range(2):  # nothing of the first step is left over for the second
        for experience in maker.make_experience_batch(rollout):
            A = experience.action_mask.shape[1]
            for row, got in zip(experience.index, experience.advantages, strict=True):
                plain = REWARDS[row] - 0.6
                expected = plain * gamma[row, 1 : A + 1] if plain >= 0 else torch.full((A,), plain)
                torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)
    assert policy.config._attn_implementation == "sdpa"


def test_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for changes, message in (
        ({"policy_loss_type": "gspo"}, "actor.policy_loss_type is 'gspo'.*one ratio"),
        ({"ring_attn_size": 2}, "ds.ring_attn_size is 2; it must be 1"),
        ({"tensor_parallel_size": 4}, "ds.tensor_parallel_size is 4; it must be 1"),
    ):
        with pytest.raises(ValueError, match=message):
            openrlhf.ExperienceMaker(RemoteExperienceMaker(None, arguments(**changes)))
    group = RayActorGroup([openrlhf.policy_class(PolicyModelActor)(model(), False)])
    for place in (PROMPTS[2] + 4, LENS[2] - 1):  # what a tool wrote
        rollout = samples()
        rollout[2].acts[place] = 0
        with pytest.raises(ValueError, match="the loss mask of response 4 leaves out 1 of its 16 tokens"):
            openrlhf.ExperienceMaker(RemoteExperienceMaker(group, arguments())).make_experience_batch(rollout)
    monkeypatch.setenv("RHYTHM_CREDIT", "credit: {strategy: entropy}")
    credit_of_process.cache_clear()
    with pytest.raises(ValueError, match="strategy of RHYTHM_CREDIT is 'entropy'"):
        openrlhf.ExperienceMaker(RemoteExperienceMaker(None, arguments()))


def test_ray_classes_are_replaced_by_ray_classes() -> None:
    class BasePPOTrainer:
        def __init__(self) -> None:
            self.experience_maker = RemoteExperienceMaker(None, arguments())

    class PPOTrainer(BasePPOTrainer):
        pass

    modules = [
        SimpleNamespace(PolicyModelActor=ray.remote(num_gpus=1)(PolicyModelActor)),
        SimpleNamespace(PPOTrainer=ray.remote(PPOTrainer)),
        SimpleNamespace(TrainingActor=ray.remote(PPOTrainer)),
    ]
    openrlhf.install(*modules)
    for module, name in zip(modules, ("PolicyModelActor", "PPOTrainer", "TrainingActor"), strict=True):
        remote = getattr(module, name)
        plain = remote.__ray_metadata__.modified_class
        if name == "PolicyModelActor":
            assert remote._default_options["num_gpus"] == 1
            assert plain(model(), False).take_rhythm_signals() == []
        else:
            assert isinstance(plain().experience_maker, openrlhf.ExperienceMaker)
