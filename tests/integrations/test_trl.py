"""RhythmGRPOTrainer in real training steps of the tiny model."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from accelerate.state import AcceleratorState, PartialState
from datasets import Dataset
from PIL import Image
from torch import Tensor
from trl import GRPOTrainer
from trl_training import (
    GROUP,
    PROMPTS,
    ROWS,
    SIGNALS,
    TOKENIZER,
    config,
    made,
    parameters,
    reward,
    same,
    tiny,
    trained,
)

import rhythm
from rhythm.credit.config import CreditConfig
from rhythm.integrations import trl as trl_adapter
from rhythm.integrations.trl import RhythmGRPOTrainer
from rhythm.tap.rhythm_credit import RhythmCredit
from rhythm.tiny.model import BOS, EOS, PAD, UNKNOWN


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return trained(tmp_path_factory.mktemp("plain"), GRPOTrainer)


@pytest.fixture(scope="module")
def coupled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    credit = RhythmCredit(strategy="coupled", signals=SIGNALS)
    return trained(tmp_path_factory.mktemp("coupled"), credit=credit)


@pytest.fixture(autouse=True)
def _accelerate_stays_as_it_was() -> Iterator[None]:
    """The arguments of another trainer reset accelerate's shared state, which this module's trainers go on using."""
    before = [(state, dict(state._shared_state)) for state in (PartialState, AcceleratorState)]
    yield
    for state, values in before:
        if values:
            state._shared_state.clear()
            state._shared_state.update(values)


def by_hand(batches: list[dict[str, Any]], credit: CreditConfig) -> list[tuple[Tensor, Tensor]]:
    """(advantages × γ, γ) of each row that reached the loss in the first step, from its tokens and its reward alone."""
    rows = [
        (
            batch["prompt_ids"][i][batch["prompt_mask"][i].bool()],
            batch["completion_ids"][i][batch["completion_mask"][i].bool()],
        )
        for batch in batches
        for i in range(len(batch["prompt_ids"]))
    ]
    rewards = torch.tensor(reward(TOKENIZER.batch_decode([c for _, c in rows], skip_special_tokens=True)))
    model, result = tiny().eval(), []
    for i, (prompt, completion) in enumerate(rows):
        group = torch.tensor([p.equal(prompt) for p, _ in rows])
        assert group.sum() == GROUP
        advantage = (rewards[i] - rewards[group].mean()) / (rewards[group].std() + 1e-4)
        P = len(prompt)
        signals = rhythm.observe(model, torch.cat([prompt, completion])[None], prompt_lens=[P], signals=SIGNALS)
        gamma = rhythm.credit_weights(
            signals.waad[0, P:],
            signals.fai[0, P:],
            q=credit.top_fraction,
            **credit.model_dump(exclude={"apply_to", "top_fraction", "mass", "mean_preserving", "random_like"}),
        )
        applies = advantage >= 0 or credit.apply_to == "all"
        result.append((advantage * (gamma if applies else torch.ones_like(gamma)), gamma))
    return result


@pytest.mark.parametrize("credit", [None, CreditConfig(strategy="none")], ids=["no credit", "strategy none"])
def test_without_credit_it_is_trls_trainer_bit_for_bit(tmp_path: Path, plain: Any, credit: Any) -> None:
    trainer = trained(tmp_path, credit=credit)
    assert same(trainer, plain)
    assert trainer.seen[0]["advantages"].ndim == (1 if credit is None else 2)
    initial = tiny().state_dict()
    assert not all(x.equal(initial[name]) for name, x in parameters(plain).items())


@pytest.mark.parametrize("apply_to", ["nonnegative", "all"])
def test_advantages_that_reach_the_loss_are_multiplied_by_gamma(apply_to: Any, coupled: Any, tmp_path: Path) -> None:
    credit = CreditConfig(strategy="coupled", apply_to=apply_to)
    trainer = coupled
    if apply_to == "all":
        trainer = trained(tmp_path, credit=RhythmCredit(credit, signals=SIGNALS), config={"max_steps": 1})
    batches = trainer.seen[:2]  # the two micro-batches of the first step, shuffled by TRL
    prompt_lens = {int(n) for batch in batches for n in batch["prompt_mask"].sum(dim=1)}
    assert len(prompt_lens) == 2
    expected = by_hand(batches, credit)
    lengths = {len(shaped) for shaped, _ in expected}
    assert len(lengths) > 1  # or nothing would have been padded on the right
    actual = [row for batch in batches for row in batch["advantages"]]
    masks = [row.bool() for batch in batches for row in batch["completion_mask"]]
    for row, mask, (shaped, _) in zip(actual, masks, expected, strict=True):
        torch.testing.assert_close(row[mask], shaped, rtol=1e-5, atol=1e-6)
        assert not row[~mask].any()
    amplified = [bool((gamma > 1).any()) for _, gamma in expected]
    assert all(amplified)
    kept = [bool(shaped[0] < 0 and shaped.unique().numel() == 1) for shaped, _ in expected]
    assert any(kept) == (apply_to == "nonnegative")


def test_matched_mass_is_that_of_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if another process had as many tokens and three times as much credit: the factor is that of both."""
    trainer = made(tmp_path, credit=RhythmCredit(strategy="coupled", mass="matched", signals=SIGNALS))
    scored(trainer)
    alone = trainer._metrics["train"]["rhythm/bonus_mass"][-1]
    assert alone == pytest.approx(0.5 * 0.4, rel=1e-5)
    real = trainer.accelerator.reduce

    def with_another(x: Tensor, reduction: str) -> Tensor:
        return real(x, reduction=reduction) * (torch.tensor([4.0, 2.0]) if x.dtype == torch.float64 else 1.0)

    monkeypatch.setattr(trainer.accelerator, "reduce", with_another)
    scored(trainer)
    assert trainer._metrics["train"]["rhythm/bonus_mass"][-1] == pytest.approx(alone / 2, rel=1e-5)


def test_credit_changes_what_is_learnt(plain: Any, coupled: Any) -> None:
    assert not same(coupled, plain)
    # The first rollout is the same: what differs comes from γ.
    for batch, other in zip(coupled.seen[:2], plain.seen[:2], strict=True):
        assert batch["completion_ids"].equal(other["completion_ids"])


def test_metrics_are_in_trls_log(coupled: Any, plain: Any) -> None:
    first = coupled.state.log_history[0]
    expected = by_hand(coupled.seen[:2], CreditConfig(strategy="coupled"))
    gamma = torch.cat([gamma for _, gamma in expected])
    assert first["rhythm/gamma_mean"] == pytest.approx(float(gamma.mean()), rel=1e-5)
    assert first["rhythm/bonus_mass"] == pytest.approx(float(gamma.mean()) - 1, rel=1e-4)
    assert first["rhythm/amplified_fraction"] == pytest.approx(float((gamma > 1).float().mean()), rel=1e-5)
    model, waad = tiny().eval(), []
    for batch in coupled.seen[:2]:
        ids, mask = (torch.cat([batch[f"prompt_{x}"], batch[f"completion_{x}"]], dim=1) for x in ("ids", "mask"))
        lens = batch["prompt_mask"].sum(dim=1)
        waad.append(rhythm.observe(model, ids, attention_mask=mask, prompt_lens=lens, signals=SIGNALS).waad.flatten())
    assert first["rhythm/waad_mean"] == pytest.approx(float(torch.cat(waad).nanmean()), rel=1e-5)
    assert not any(key.startswith("rhythm/") for key in plain.state.log_history[0])


@pytest.fixture
def observed(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What later RhythmCredits observe, and in which mode the model then is."""
    calls: list[dict[str, Any]] = []

    def spy(model: Any, input_ids: Tensor, **options: Any) -> Any:
        training, autocast = {module.training for module in model.modules()}, torch.is_autocast_enabled("cpu")
        calls.append({"rows": len(input_ids), "training": training, "autocast": autocast})
        return rhythm.observe(model, input_ids, **options)

    monkeypatch.setattr("rhythm.tap.rhythm_credit.observe", spy)
    return calls


def scored(trainer: Any) -> dict[str, Any]:
    """A generated batch, from the same random state each time."""
    torch.manual_seed(3)
    output: dict[str, Any] = trainer._generate_and_score_completions([{"prompt": p} for p in PROMPTS for _ in range(4)])
    return output


@pytest.mark.parametrize("grouping", ["sequence", "batch"])
def test_the_pass_is_cut_into_micro_batches(tmp_path: Path, grouping: Any, observed: list[dict[str, Any]]) -> None:
    advantages = []
    for size in (2, 8):
        changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": ROWS // size}
        credit = RhythmCredit(strategy="coupled", signals=SIGNALS.model_copy(update={"grouping": grouping}))
        trainer = made(tmp_path, credit=credit, config=changes)
        trainer.model.train()
        frozen = trainer.model.model.layers[1].eval()
        observed.clear()
        advantages.append(scored(trainer)["advantages"])
        assert [call["rows"] for call in observed] == ([size] * (ROWS // size) if grouping == "sequence" else [ROWS])
        assert all(call["training"] == {False} for call in observed)
        # Each module is back in its own mode.
        assert trainer.model.training
        assert trainer.model.lm_head.training
        assert not any(module.training for module in frozen.modules())
    assert advantages[0].equal(advantages[1])


def test_evaluation_has_credit_and_batches_of_its_own(tmp_path: Path, observed: list[dict[str, Any]]) -> None:
    changes = {"per_device_eval_batch_size": 8, "num_generations_eval": 4}
    trainer = made(tmp_path, credit=CreditConfig(), config=changes, eval_dataset=Dataset.from_dict({"prompt": PROMPTS}))
    metrics = trainer.evaluate()
    assert [call["rows"] for call in observed] == [8]
    assert metrics["eval_rhythm/gamma_mean"] >= 1


@pytest.mark.parametrize("bf16", [False, True])
def test_the_pass_has_the_precision_of_training(tmp_path: Path, observed: list[dict[str, Any]], bf16: bool) -> None:
    scored(made(tmp_path, credit=CreditConfig(), config={"bf16": bf16}))
    assert [call["autocast"] for call in observed] == [bf16, bf16]


def test_a_batch_without_completions_has_no_mean(tmp_path: Path) -> None:
    """mask_truncated_completions leaves nothing of a batch in which no response ended."""
    trainer = made(
        tmp_path, credit=CreditConfig(), config={"mask_truncated_completions": True, "max_completion_length": 1}
    )
    trainer.eos_token_ids = []
    output = scored(trainer)
    assert not output["completion_mask"].any()
    assert output["advantages"].equal(torch.zeros(ROWS, 1))
    assert math.isnan(trainer._metrics["train"]["rhythm/gamma_mean"][0])


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"])
def test_every_loss_takes_token_advantages(loss_type: str, coupled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """[B, T] advantages without γ give the loss of [B] ones, those with γ another."""
    monkeypatch.setattr(coupled, "loss_type", loss_type)
    monkeypatch.setattr(coupled, "off_policy_mask_threshold", 0.0)
    batch = next(dict(batch) for batch in coupled.seen if not batch["completion_mask"].all())
    ids, mask = (torch.cat([batch[f"prompt_{x}"], batch[f"completion_{x}"]], dim=1) for x in ("ids", "mask"))
    C = batch["completion_ids"].shape[1]
    with torch.no_grad():
        now = coupled._get_per_token_logps_and_entropies(coupled.model, ids, mask, C)[0]
    batch["old_per_token_logps"] = now + 0.05 * torch.sin(torch.arange(4.0 * C)).view(4, C)
    advantages_B = torch.tensor([1.0, -0.5, 0.3, -2.0])
    gamma_T = torch.where(torch.arange(C) % 3 == 0, 1.5, 1.0)

    def loss(advantages: Tensor) -> float:
        return coupled._compute_loss(coupled.model, batch | {"advantages": advantages}).item()

    alike = advantages_B[:, None] * batch["completion_mask"]
    assert abs(loss(advantages_B)) > 0.01
    assert loss(alike) == pytest.approx(loss(advantages_B), rel=1e-5)
    assert loss(alike * gamma_T) != pytest.approx(loss(advantages_B), rel=1e-2)


@pytest.mark.parametrize(
    ("changes", "credit", "message"),
    [
        ({"importance_sampling_level": "sequence"}, CreditConfig(), "importance_sampling_level is 'sequence'"),
        ({"temperature": 0.7}, CreditConfig(strategy="entropy"), "temperature is 0.7; it must be 1 for the strategy"),
        ({}, "coupled", "credit is a str; it must be a RhythmCredit, a CreditConfig or None"),
    ],
)
def test_what_can_not_be_right_is_refused(tmp_path: Path, changes: Any, credit: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(tmp_path, credit=credit, config=changes)
    if changes:
        made(tmp_path, credit=None, config=changes)


def test_responses_that_are_not_all_of_the_models_own_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = made(tmp_path, credit=CreditConfig())
    monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", lambda *_: {"tool_mask": torch.ones(1)})
    with pytest.raises(ValueError, match=r"the batch holds tool_mask .*; credit must be None with these"):
        trainer._generate_and_score_completions([])


def gemma3() -> tuple[Any, Any]:
    """A random vision-language model whose images see themselves whole, and its processor."""
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=TOKENIZER.backend_tokenizer,
        extra_special_tokens={"image_token": "<image>", "boi_token": "<start>", "eoi_token": "<end>"},
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="left",
    )
    template = (
        "{% for message in messages %}{% for part in message.content %}"
        "{{ '<start>' if part.type == 'image' else part.text }}{% endfor %}{% endfor %}"
    )
    images = transformers.Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    processor = transformers.Gemma3Processor(images, tokenizer, chat_template=template, image_seq_length=4)
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "initializer_range": 0.3,
        "layer_types": ["full_attention"] * 3,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        mm_tokens_per_image=4,
    )
    return transformers.Gemma3ForConditionalGeneration(config), processor


def test_prompts_with_images(tmp_path: Path) -> None:
    model, processor = gemma3()
    pictures = [Image.fromarray(torch.randint(0, 256, (28, 28, 3)).byte().numpy()) for _ in PROMPTS]
    examples = [
        {"prompt": [{"role": "user", "content": text}], "image": picture}
        for text, picture in zip(PROMPTS, pictures, strict=True)
        for _ in range(GROUP)
    ]

    def of_messages(completions: list[Any], **_: Any) -> list[float]:
        return reward([message[0]["content"] for message in completions])

    trainer = RhythmGRPOTrainer(
        model,
        of_messages,
        config(tmp_path, max_completion_length=20),
        Dataset.from_list([{"prompt": "unused"}]),
        processing_class=processor,
        credit=RhythmCredit(strategy="coupled", signals=SIGNALS),
    )
    outputs = []
    for credit in (trainer.credit, None):
        trainer.credit = credit
        torch.manual_seed(3)
        outputs.append(trainer._generate_and_score_completions(examples))
    shaped, plain = outputs
    assert shaped["completion_ids"].equal(plain["completion_ids"])
    assert shaped["pixel_values"].shape == (ROWS, 3, 28, 28)
    for row, advantage in enumerate(plain["advantages"]):
        prompt, completion = (
            plain[f"{part}_ids"][row][plain[f"{part}_mask"][row].bool()] for part in ("prompt", "completion")
        )
        ids, P = torch.cat([prompt, completion])[None], len(prompt)
        kinds = (ids == model.config.image_token_id).int()
        inputs = {"pixel_values": plain["pixel_values"][row][None], "token_type_ids": kinds}
        signals = rhythm.observe(model.eval(), ids, prompt_lens=[P], signals=SIGNALS, inputs=inputs)
        gamma = rhythm.credit_weights(signals.waad[0, P:], signals.fai[0, P:], strategy="coupled")
        expected = advantage * (gamma if advantage >= 0 else 1)
        got = shaped["advantages"][row][: len(completion)]
        torch.testing.assert_close(got, expected.expand(len(completion)), rtol=1e-5, atol=1e-6)
    assert (shaped["advantages"] != plain["advantages"][:, None]).any()


def test_sharded_parameters_are_read_in_whole_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, coupled: Any, observed: list[dict[str, Any]]
) -> None:
    """Of FSDP itself: test_adapter.py."""
    monkeypatch.setattr("rhythm.integrations.trl._is_sharded", lambda trainer: True)
    trainer = trained(tmp_path, credit=RhythmCredit(strategy="coupled", signals=SIGNALS))
    assert not observed  # these stop early
    assert same(trainer, coupled)


@pytest.mark.parametrize(("fsdp", "stage"), [(True, 0), (False, 2), (False, 3)])
def test_what_counts_as_sharded(fsdp: bool, stage: int) -> None:
    plugin = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage)))
    trainer = SimpleNamespace(is_fsdp_enabled=fsdp, is_deepspeed_enabled=not fsdp, accelerator=plugin)
    assert trl_adapter._is_sharded(trainer) is (fsdp or stage == 3)  # type: ignore[arg-type]


def test_the_entropy_strategy_trains(tmp_path: Path) -> None:
    trainer = trained(tmp_path, credit=CreditConfig(strategy="entropy"), config={"max_steps": 1})
    batch = trainer.seen[0]
    mask = batch["completion_mask"].bool()
    for row, of_response in zip(batch["advantages"], mask, strict=True):
        if row[0] > 0:  # ⌈0.4·n⌉ tokens have γ = 1.5
            amplified = (row[of_response] / row[of_response].min() > 1.4).sum()
            assert amplified == -(-4 * int(of_response.sum()) // 10)


def test_without_trl_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "rhythm.integrations.trl")
    said = r"rhythm\.integrations\.trl needs trl, which is not installed: pip install '\.\[trl\]' in a clone"
    with pytest.raises(ModuleNotFoundError, match=said):
        importlib.import_module("rhythm.integrations.trl")
