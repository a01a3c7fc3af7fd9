"""`import rhythm` loads only torch and numpy; the rest needs extras."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import rhythm
from rhythm.system.extras import EXTRAS

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# Finders that find nothing of some packages, as if they were not installed.
WITHOUT = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in refused else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
for name in [name for name in sys.modules if name.partition(".")[0] in refused]:
    del sys.modules[name]
"""
# A tree is found by PYTHONPATH, not where the package is installed in a link to a checkout.
NOT_EDITABLE = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "ScikitBuild" not in type(finder).__name__]
"""


def requirements(*names: str) -> set[str]:
    """Distributions and all that they require, without extras."""
    loaded: set[str] = set()
    wanted = list(names)
    while wanted:
        name = canonicalize_name(wanted.pop())
        if name in loaded:
            continue
        try:
            requires = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        loaded.add(name)
        parsed = [Requirement(line) for line in requires]
        wanted += [one.name for one in parsed if one.marker is None or one.marker.evaluate({"extra": ""})]
    return loaded


def without_extras(*also: str) -> str:
    """A prelude that hides every package but torch, numpy, what torch requires, and `also`."""
    allowed = requirements("torch", "numpy", *also) | {"rhythm"}
    refused = {
        module
        for module, distributions in metadata.packages_distributions().items()
        if not allowed & {canonicalize_name(name) for name in distributions}
    }
    assert {"pydantic", "transformers", "yaml", "rich", "pytest", "tokenizers", "matplotlib"} <= refused
    return f"refused = {sorted(refused)!r}\n{WITHOUT}"


def run(code: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=os.environ | environment, check=False)


def output(code: str, cwd: Path, **environment: str) -> str:
    done = run(code, cwd, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


OPS = """
import sys, torch, rhythm
from rhythm.ops import backends

def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))

q, k, v = normal(90, 4, 32), normal(90, 2, 32), normal(91, 2, 32)[1:]
where = {"cu_seqlens": torch.tensor([0, 30, 90], dtype=torch.int32), "prompt_lens": [4, 0]}
results = {"layers": torch.tensor(rhythm.sampled_layers(36))}
for backend in ("reference", "cpu"):
    out, fused = rhythm.attention_with_statistics(q, k, v, **where, backend=backend)
    alone = rhythm.attention_statistics(q, k, **where, backend=backend)
    groups = rhythm.select_heads(alone.span)
    columns = rhythm.column_scores(q, k, cu_seqlens=where["cu_seqlens"], backend=backend)
    tensors = [out, fused.span, alone.span, alone.waad, alone.fai, alone.lse, groups.local, groups.global_, columns]
    results |= {f"{backend} {i}": tensor for i, tensor in enumerate(tensors)}
torch.save(results, "results.pt")
assert backends.triton.__name__ == "rhythm.ops.backends.triton"
"""


def test_ops_need_torch_and_numpy_only(tmp_path: Path) -> None:
    alone, usual = tmp_path / "alone", tmp_path / "usual"
    alone.mkdir()
    usual.mkdir()
    shown = output(f"{without_extras()}{OPS}\nprint(sorted(set(sys.modules) & set(refused)))", alone)
    assert shown.strip() == "[]"
    output(OPS, usual)
    results, expected = (torch.load(place / "results.pt") for place in (alone, usual))
    assert list(results) == list(expected)
    assert len(results) == 19
    for name, tensor in results.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0, equal_nan=True)
    assert results["layers"].tolist() == [12, 15, 18, 21, 24]
    assert int(results["cpu 3"].isfinite().sum()) == 4 * (26 + 60)


def test_triton_kernels_need_triton_besides(tmp_path: Path) -> None:
    code = """
import torch, rhythm
q, k = (torch.randn(70, heads, 16, generator=torch.Generator().manual_seed(heads)) for heads in (2, 1))
backends = ("triton", "reference")
actual, expected = (rhythm.attention_statistics(q, k, prompt_lens=[5], backend=name) for name in backends)
for name in ("span", "waad", "fai", "lse"):
    torch.testing.assert_close(getattr(actual, name), getattr(expected, name), rtol=1e-4, atol=1e-5, equal_nan=True)
print(rhythm.ops.backends.availability()["triton"])
"""
    environment = {"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    assert output(without_extras("triton") + code, tmp_path, **environment).strip() == "None"


MISSING = {
    "rhythm.credit_weights": "rhythm.credit needs pydantic",
    "from rhythm import RhythmCredit": "rhythm.credit needs pydantic",
    "rhythm.credit.CreditConfig": "rhythm.credit needs pydantic",
    "import rhythm.credit.gamma": "rhythm.credit needs pydantic",
    "import rhythm.credit.advantages": "rhythm.credit needs pydantic",
    "import rhythm.credit.loss": "rhythm.credit.loss needs pydantic",
    "import rhythm.trainer.config": "rhythm.trainer needs pydantic",
    "import rhythm.analysis": "rhythm.analysis needs pydantic",
    "import rhythm.integrations.transformers": "rhythm.integrations.transformers needs transformers",
    "import rhythm.integrations.trl": "rhythm.credit needs pydantic",
    "rhythm.observe(torch.nn.Linear(1, 1), torch.zeros(1, 3).long(), prompt_lens=[1])": (
        "rhythm.observe (and AttentionTap) needs transformers"
    ),
}


def test_what_is_missing_is_named_with_its_command(tmp_path: Path) -> None:
    code = f"""
import torch, rhythm
for code in {list(MISSING)!r}:
    try:
        exec(code)
        print("nothing is missing")
    except ModuleNotFoundError as error:
        print(error)
"""
    said = dict(zip(MISSING, output(without_extras() + code, tmp_path).splitlines(), strict=True))
    end = ", which is not installed: pip install '.[models]' in a clone of rhythm"
    assert said == {code: message + end for code, message in MISSING.items()}


COMMANDS = {"train": "train", "analyze": "analyze", "eval": "train", "report": "train", "doctor": "train"}


def test_commands_say_in_a_line_what_to_install(tmp_path: Path) -> None:
    scripts = {f"rhythm-{name}": f"rhythm.cli.commands:{name}" for name in COMMANDS}
    assert scripts.items() <= PROJECT["scripts"].items()
    code = f"""
from rhythm.cli import commands
print(*[getattr(commands, name)() for name in {list(COMMANDS)!r}])
"""
    done = run(without_extras() + code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2"] * len(COMMANDS)
    lines = done.stderr.splitlines()
    for line, (name, extra) in zip(lines, COMMANDS.items(), strict=True):
        pattern = rf"rhythm-{name} needs \w+, which is not installed: pip install '\.\[{extra}\]' in a clone of rhythm"
        assert re.fullmatch(pattern, line)


def test_base_dependencies_are_torch_and_numpy_and_extras_bring_the_rest() -> None:
    assert sorted(Requirement(line).name for line in PROJECT["dependencies"]) == ["numpy", "torch"]
    extras = PROJECT["optional-dependencies"]
    assert set(extras) >= {"models", "train", "analyze", "trl", "cluster", "triton", "dev"}

    def brought(extra: str) -> set[str]:
        needed: set[str] = set()
        for one in map(Requirement, extras[extra]):
            needed |= {name for inner in one.extras for name in brought(inner)} if one.name == "rhythm" else {one.name}
        return needed

    distributions = {"yaml": "pyyaml", "megatron": "megatron-core"}
    distributions |= {"math_verify": "math-verify", "reasoning_gym": "reasoning-gym"}
    for package, extra in EXTRAS.items():
        # These three come with transformers.
        if package not in ("tokenizers", "safetensors", "huggingface_hub"):
            assert distributions.get(package, package) in brought(extra)
    for extra in ("train", "analyze", "cluster"):
        assert {"transformers", "pydantic", "pyyaml", "rich", "matplotlib", "jinja2"} <= brought(extra)
    assert {"transformers", "pydantic", "trl"} <= brought("trl")
    assert brought("models") == {"transformers", "pydantic"}


ORDERS = [
    "import rhythm",
    "import rhythm.tap.attention_tap",
    "import rhythm.tap.observe",
    "import rhythm.ops.column_scores",
    "from rhythm.tap.observe import observe",
    "from rhythm import observe",
    "import rhythm.credit.gamma, rhythm.tap.rhythm_credit",
    "import rhythm; rhythm.observe; import rhythm.tap.observe",
]


def test_observe_is_the_function_in_every_order_of_imports(tmp_path: Path) -> None:
    """Each order in a copy of one process, since loading torch and transformers is what takes the time."""
    code = f"""
import os, sys, pydantic, torch, transformers.masking_utils, transformers.modeling_utils

def check(first):
    exec(first, {{}})
    import rhythm
    names = [getattr(rhythm, name) for name in ("observe", "column_scores", "observe")]
    from rhythm.tap.observe import observe
    from rhythm.ops.column_scores import column_scores
    from rhythm import observe as again
    assert rhythm.observe is again is observe is names[0] is names[2], first
    assert rhythm.column_scores is column_scores is names[1], first
    assert (type(observe).__name__, rhythm.tap.__name__) == ("function", "rhythm.tap"), first

for first in {ORDERS!r}:
    assert not any(name.startswith("rhythm") for name in sys.modules)
    child = os.fork()
    if not child:
        check(first)
        print("good", flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""
    done = run(code, tmp_path)
    assert done.stdout.split() == ["good"] * len(ORDERS), done.stderr


def test_import_loads_the_ops_alone(tmp_path: Path) -> None:
    code = """
import sys, rhythm
shown = dir(rhythm)
assert set(rhythm.__all__) <= set(shown), shown
heavy = {"pydantic", "transformers", "triton", "rhythm.tap", "rhythm.credit.gamma", "rhythm.integrations"}
print(sorted(heavy & set(sys.modules)))
rhythm.observe, rhythm.AttentionTap
print("transformers" in sys.modules)
try:
    rhythm.nothing
except AttributeError as error:
    print(error)
rhythm.observe = "another"  # as monkeypatch does
print(rhythm.observe)
"""
    assert output(code, tmp_path).splitlines() == [
        "[]",
        "False",
        "module 'rhythm' has no attribute 'nothing'",
        "another",
    ]
    assert all(getattr(rhythm, name).__name__ == name for name in rhythm.__all__)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The sources as a checkout has them, without the compiled extension."""
    for name in ("rhythm", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("_C*.so", "__pycache__", "kernels"))
    if not (tmp_path / "rhythm" / "kernels").exists():
        (tmp_path / "rhythm" / "kernels").symlink_to("../kernels")
    return tmp_path


def test_a_tree_that_was_not_built_or_installed_works(tree: Path, tmp_path: Path) -> None:
    code = """
import logging, torch, rhythm
logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
q, k = (torch.randn(70, heads, 16, generator=torch.Generator().manual_seed(heads)) for heads in (2, 1))
for _ in range(2):
    actual = rhythm.attention_statistics(q, k, prompt_lens=[5])
expected = rhythm.attention_statistics(q, k, prompt_lens=[5], backend="reference")
triton = rhythm.attention_statistics(q, k, prompt_lens=[5], backend="triton")
import rhythm.kernels
for name in ("span", "waad", "fai", "lse"):
    torch.testing.assert_close(getattr(actual, name), getattr(expected, name), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(getattr(triton, name), getattr(expected, name), rtol=1e-4, atol=1e-5, equal_nan=True)
print(rhythm.__file__, rhythm.kernels.__file__, rhythm.observe.__name__, sep="\\n")
try:
    rhythm.attention_statistics(q, k, backend="cpu")
except RuntimeError as error:
    print(error)
"""
    environment = {"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(tree)}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = run(NOT_EDITABLE + without_extras("triton") + code, elsewhere, **environment)
    assert done.returncode == 0, done.stderr
    package, kernels, observe, error = done.stdout.splitlines()
    assert Path(package) == tree / "rhythm" / "__init__.py"
    assert Path(kernels).resolve() == (tree / "kernels" / "__init__.py").resolve()
    assert observe == "observe"
    why = "the extension rhythm._C does not import (No module named 'rhythm._C')"
    gone = f"{why}; pip install . in a clone of rhythm builds it"
    assert error == f"backend 'cpu' is not available: {gone}"
    said = [line for line in done.stderr.splitlines() if line.startswith("rhythm: backend auto")]
    assert len(said) == 1
    assert said[0].startswith(f"rhythm: backend auto: reference for torch.float32 tensors on cpu; not cpu: {gone}")


def test_the_version_is_that_of_the_package_or_of_the_tree(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    said = tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
    code = """
import rhythm, importlib.metadata
print(rhythm.__version__)
def version(name):
    raise importlib.metadata.PackageNotFoundError(name)
importlib.metadata.version = version
from rhythm.system.version import _version, _PYPROJECT
print(_version())
import rhythm.system.version
rhythm.system.version._PYPROJECT = _PYPROJECT.with_name("none.toml")
print(_version())
"""
    assert output(code, tmp_path).splitlines() == [said, f"{said}+unknown", "0+unknown"]
