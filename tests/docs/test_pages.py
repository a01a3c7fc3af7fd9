"""The site's pages against the code and against each other."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import yaml

import rhythm
import rhythm.credit
from rhythm.cli.config_file import load_config
from rhythm.tasks.countdown import CountdownConfig

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def module(name: str) -> ModuleType:
    """A script of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_the_configuration_page_is_up_to_date() -> None:
    text = (DOCS / "configuration.md").read_text(encoding="utf-8")
    assert text == module("configuration").document(), "run python docs/configuration.py --write"


def test_write_makes_the_configuration_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = module("configuration")
    monkeypatch.setattr(script, "DOC", tmp_path / "configuration.md")
    script.main(["--write"])
    assert (tmp_path / "configuration.md").read_text(encoding="utf-8") == script.document()


def test_every_page_is_in_the_navigation_once() -> None:
    def pages(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        inner = entry.values() if isinstance(entry, dict) else entry
        return [page for part in inner for page in pages(part)]  # type: ignore[attr-defined]

    # A line of its own, since the file has a tag that only mkdocs knows.
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    assert sorted(pages(yaml.safe_load(nav))) == PAGES


def test_the_api_pages_have_every_public_name() -> None:
    listed = set(re.findall(r"^::: (\S+)$", "".join((DOCS / page).read_text("utf-8") for page in PAGES), re.MULTILINE))
    public = {f"rhythm.{name}" for name in rhythm.__all__} | {f"rhythm.credit.{name}" for name in rhythm.credit.__all__}
    # Its fields are those of the configuration page; the other name is rhythm.credit_weights.
    assert public - listed == {"rhythm.credit.CreditConfig", "rhythm.credit.credit_weights"}


def test_links_of_pages_and_readme_lead_somewhere() -> None:
    checked = 0
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(DOCS / page for page in PAGES)]:
        for target in re.findall(r"(?:\]\(|src=\")([^)#\s\"]+)", path.read_text(encoding="utf-8")):
            if not re.match(r"https?://", target):
                assert (path.parent / target).exists(), f"{path.relative_to(ROOT)} links to {target}"
                checked += 1
    assert checked > 50


@pytest.mark.parametrize(
    ("repository", "expected"),
    [
        (
            "https://host/us/rhythm/",
            "see [the op](https://host/us/rhythm/blob/main/rhythm/ops/statistics.py) and [ops](../ops.md)",
        ),
        ("", "see the op and [ops](../ops.md)"),
    ],
)
def test_links_to_source_files_go_to_the_repository_or_become_text(repository: str, expected: str) -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri="page.md"))
    files = SimpleNamespace(documentation_pages=lambda: [SimpleNamespace(src_uri="ops.md")])
    text = "see [the op](../rhythm/ops/statistics.py) and [ops](../ops.md)"
    on_page_markdown = module("hooks").on_page_markdown
    assert on_page_markdown(text, page=page, config={"repo_url": repository}, files=files) == expected


def test_functions_named_on_pages_exist() -> None:
    sources = [path for folder in ("rhythm", "kernels", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    defined = {
        name
        for path in sources
        for name in re.findall(r"(?:def|class) (\w+)|^    (\w+):", path.read_text("utf-8"), re.M)
    }
    names = {name for pair in defined for name in pair}
    texts = {page: (DOCS / page).read_text(encoding="utf-8") for page in PAGES}
    texts |= {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md")}
    for page, text in texts.items():
        prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        for called in re.findall(r"`([A-Za-z_][\w.]*)\(", prose):
            if called.split(".")[0] not in ("torch", "tl", "pytest"):
                assert called.split(".")[-1] in names, f"{page}: {called}"


def test_the_guide_to_a_real_model_evaluates_the_task_that_it_trains() -> None:
    """The same held-out problems, asked in the same way; options that only score don't matter."""
    page = (DOCS / "real_model.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^rhythm-eval (?:.*\\\n)*.*", page, re.MULTILINE)
    words = shlex.split(command.replace("\\\n", " "))[1:]
    given = dict(word.split("=", 1) for word in words if "=" in word)
    trained = load_config(ROOT / "configs" / "countdown_model.yaml")
    (task,) = yaml.safe_load(given["tasks"])
    evaluated = CountdownConfig.model_validate(task["options"]).model_dump(exclude={"format_score"})
    assert task["name"] == trained.task.name
    assert evaluated == trained.task.options.model_dump(exclude={"format_score"})
    assert int(given["sampling.max_new_tokens"]) == trained.sampling.max_new_tokens
    assert words[words.index("--model") + 1] == f"{trained.run_dir}/checkpoints/step_{trained.steps:06d}"


def test_contributing_names_every_target_and_package() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (targets,) = re.findall(r"^TARGETS := (.*)$", makefile, re.MULTILINE)
    # The README has `make train`, docs/gpu.md the parts of `make gpu`; test-cluster makes `cluster`.
    elsewhere = {"train", "gpu-check", "gpu-race", "gpu-record", "cluster"}
    assert {target for target in targets.split() if f"`make {target}`" not in text} == elsewhere
    packages = {path.parent.name for path in (ROOT / "rhythm").glob("*/__init__.py")} - {"kernels"}
    assert {name for name in packages if f"](rhythm/{name})" not in text} == set()


def test_every_variable_of_make_is_on_its_page() -> None:
    page = (DOCS / "environment.md").read_text(encoding="utf-8").partition("## Variables of make")[2]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    defaults = set(re.findall(r"^(\w+) +\?=", makefile, re.MULTILINE))
    assert set(re.findall(r"^\| `(\w+)` ", page, re.MULTILINE)) == defaults | {"COVERAGE", "CXX", "TORCH_INDEX"}


def test_every_environment_variable_of_ours_is_on_its_page() -> None:
    page = (DOCS / "environment.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `(RHYTHM_\w+)`", page, re.MULTILINE))
    used: set[str] = set()
    sources = [ROOT / "mkdocs.yml", *(ROOT / "csrc").glob("*.cpp")]
    sources += [path for folder in ("rhythm", "kernels", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    for path in sources:
        used |= set(
            re.findall(r"(?:getenv\(|environ\.get\(|environ\[|!ENV \[)\"?(RHYTHM_\w+)", path.read_text("utf-8"))
        )
    assert listed == used
