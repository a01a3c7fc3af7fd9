"""Small trainings by TRL: of the tiny model, by rhythm's trainer or TRL's own, whose batches are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset
from models import widened
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from rhythm.integrations.trl import RhythmGRPOTrainer
from rhythm.tap.signals_config import SignalsConfig
from rhythm.tiny.model import TinyModelConfig, build_model, build_tokenizer

TOKENIZER = build_tokenizer()
MODEL = TinyModelConfig(layers=3, hidden_size=32, mlp_size=32, query_heads=4, key_heads=2, head_size=8)
PROMPTS = ["1+1=", "the sum of 20 and 3 is "]  # of unlike lengths, so that TRL pads
GROUP, ROWS = 4, 8
SIGNALS = SignalsConfig(window=4, horizon=(2, 8))


def reward(completions: list[str], **_: Any) -> list[float]:
    """The fraction of digits: differs from one response to the next."""
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]


def config(output_dir: Path, **changes: Any) -> GRPOConfig:
    options: dict[str, Any] = {
        "use_cpu": True,
        "bf16": False,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_generations": GROUP,
        "max_completion_length": 24,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return GRPOConfig(output_dir=str(output_dir), **(options | changes))


def tiny() -> Any:
    return widened(build_model(MODEL, TOKENIZER))


def recording(trainer: type[GRPOTrainer]) -> Any:
    """That class, keeping what reaches its loss."""

    class Recording(trainer):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **options: Any) -> None:
            self.seen: list[dict[str, Any]] = []
            super().__init__(*args, **options)

        def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
            self.seen.append(inputs)
            loss: Tensor = super()._compute_loss(model, inputs)
            return loss

    return Recording


def made(output_dir: Path, kind: type[GRPOTrainer] = RhythmGRPOTrainer, **options: Any) -> Any:
    dataset = Dataset.from_dict({"prompt": PROMPTS * 4})
    args = options.pop("args", None) or config(output_dir, **options.pop("config", {}))
    return recording(kind)(tiny(), reward, args, dataset, processing_class=TOKENIZER, **options)


def trained(*args: Any, **options: Any) -> Any:
    trainer = made(*args, **options)
    trainer.train()
    return trainer


def parameters(trainer: Any) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in trainer.model.named_parameters()}


def same(one: Any, other: Any) -> bool:
    return all(x.equal(y) for x, y in zip(parameters(one).values(), parameters(other).values(), strict=True))
