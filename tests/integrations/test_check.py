"""python -m rhythm.integrations.check."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from rhythm.integrations import check

GRPO = """
class _Base:
    def _compute_loss(self, model, inputs): ...

class GRPOTrainer(_Base):
    async def _generate_and_score_completions(self, inputs):
        return {"advantages": 1}
"""


def package(folder: Path, source: str) -> None:
    (folder / "trl" / "trainer").mkdir(parents=True)
    (folder / "trl" / "__init__.py").write_text("raise RuntimeError('not to be imported')")
    (folder / "trl" / "trainer" / "grpo_trainer.py").write_text(source)


def test_the_installed_trl_has_what_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main(["trl"]) == 0
    assert "3 of 3 seams of rhythm.integrations.trl are there" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("_compute_loss(self", "_loss(self", "GRPOTrainer._compute_loss is missing"),
        ("model, inputs", "model, batch", "GRPOTrainer._compute_loss has no argument inputs"),
        ("'advantages'", "'returns'", "'advantages' does not occur"),
        ("class GRPOTrainer", "class Trainer", "GRPOTrainer._generate_and_score_completions is missing"),
    ],
)
def test_what_is_missing_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    before: str,
    after: str,
    said: str,
) -> None:
    source = GRPO.replace('"advantages"', "'advantages'")
    assert before in source
    package(tmp_path / "good", source)
    package(tmp_path / "bad", source.replace(before, after))
    monkeypatch.setattr(check, "find_spec", lambda name: FakeSpec(tmp_path / "good" / name))
    assert list(check.missing_seams(check.SEAMS["trl"])) == []
    monkeypatch.setattr(check, "find_spec", lambda name: FakeSpec(tmp_path / "bad" / name))
    assert check.main(["trl"]) == 1
    assert said in capsys.readouterr().out


class FakeSpec:
    def __init__(self, folder: Path) -> None:
        self.submodule_search_locations = [str(folder)]


def test_a_module_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, GRPO)
    (tmp_path / "trl" / "trainer" / "grpo_trainer.py").unlink()
    monkeypatch.setattr(check, "find_spec", lambda name: FakeSpec(tmp_path / name))
    assert list(check.missing_seams(check.SEAMS["trl"])) == ["trl.trainer.grpo_trainer: no such module"]


def test_what_is_not_installed_or_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main(["nemo_rl"]) == 2
    assert "nemo_rl is not installed" in capsys.readouterr().err
    assert check.main(["torch"]) == 2
    assert (
        "usage: python -m rhythm.integrations.check {slime,verl,roll,nemo_rl,openrlhf,prime_rl,trl}"
        in capsys.readouterr().err
    )


def test_every_adapter_has_its_seams() -> None:
    folder = Path(check.__file__).parent
    others = {"__init__", "adapter", "check", "kvpress", "megatron_rows", "short_masks", "transformers"}
    assert {path.stem for path in folder.glob("*.py")} - others == set(check.SEAMS)


def test_what_an_adapter_overrides_is_among_its_seams() -> None:
    """Methods of a subclass that call the inherited one."""
    folder = Path(check.__file__).parent
    for trainer, seams in check.SEAMS.items():
        tree = ast.parse((folder / f"{trainer}.py").read_text(encoding="utf-8"))
        known = {seam.partition("(")[0].split(".")[-1] for wanted in seams.values() for seam in wanted}
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and "super()." in ast.unparse(node) and not node.name.startswith("__"):
                assert node.name in known | {"get_reference_policy_logprobs"} or node.name.endswith("_class"), trainer
