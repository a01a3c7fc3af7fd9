"""Shared by the tests of the ops: one table of tolerances, and the rule for low precision."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

# Before anything imports Triton, which reads it once: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


class _Helpers(MetaPathFinder):
    """`import tensors`, the other `names` and `benchmarks` from any test, without this folder and the repository's root
    on sys.path.

    There they would make tests/kernels or kernels/ importable as `kernels`, which is another package's name.
    """

    names = (
        "cluster_case",
        "corner_cases",
        "forms",
        "gluon_threads",
        "in_browser",
        "interpreter",
        "kernels_elsewhere",
        "megatron_case",
        "megatron_sequences",
        "megatron_stand_in",
        "models",
        "paper_sets",
        "paper_workload",
        "registered_attention",
        "small_analysis",
        "tensors",
        "trl_training",
    )

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        if fullname == "benchmarks":
            root = Path(__file__).parents[1] / "benchmarks"
            return importlib.util.spec_from_file_location(fullname, root / "__init__.py")
        if fullname not in self.names:
            return None
        return importlib.util.spec_from_file_location(fullname, Path(__file__).with_name(f"{fullname}.py"))


sys.meta_path.insert(0, _Helpers())


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    from interpreter import make_faster

    make_faster()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kernels", metavar="COMMAND", help="starts the CPU kernels to test (tests/kernels_elsewhere.py)")


def pytest_configure(config: pytest.Config) -> None:
    if command := config.getoption("--kernels"):
        from kernels_elsewhere import KernelServer, put_in_place

        server = KernelServer(command)
        config.add_cleanup(server.close)
        put_in_place(server)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever asks for Chromium is a test of the marker `browser`. Tests of Triton's kernels run without coverage:
    its tracer would see each of the millions of Python calls that the interpreter makes. COVERED_TESTS, if not empty:
    the folders of tests/ whose tests alone run with it.

    `make test` finds the files of `slow`, `cluster` and `timing` by their text, to collect no others: a test with such
    a marker in a file without those words would never run, and is an error.
    """
    covered = [Path(__file__).parent / folder for folder in os.environ.get("COVERED_TESTS", "").split()]
    texts: dict[Path, str] = {}
    for item in items:
        if covered and not set(covered) & set(item.path.parents):
            item.add_marker("no_cover")
        for name in ("slow", "cluster", "timing"):
            if item.get_closest_marker(name):
                text = texts.setdefault(item.path, item.path.read_text(encoding="utf-8"))
                if f"mark.{name}" not in text:
                    raise pytest.UsageError(f"{item.nodeid} is marked {name}, but its file does not say mark.{name}")
        if "chromium" in getattr(item, "fixturenames", ()):
            item.add_marker("browser")
        if item.get_closest_marker("triton"):
            item.add_marker("no_cover")


@pytest.fixture(scope="module", autouse=True)
def _environment_stays_as_it_was() -> Iterator[None]:
    """vLLM wants variables set that change what torch does, for other modules' tests too."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys() - {"PYTEST_CURRENT_TEST"}:
        del os.environ[name]
    os.environ.update({name: value for name, value in before.items() if name != "PYTEST_CURRENT_TEST"})


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A headless Chromium for the tests of a module; `browser` is what they take."""
    from in_browser import start

    driver = start()
    yield driver
    driver.quit()


@pytest.fixture
def browser(chromium: Any) -> Iterator[Any]:
    """At desktop size and light; fails a test in which a script failed or something was fetched and missing."""
    from in_browser import DESKTOP, color_scheme, resize

    resize(chromium, DESKTOP)
    color_scheme(chromium, "light")
    yield chromium
    assert chromium.get_log("browser") == []


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """What a test draws without a seed of its own is the same in any order of tests."""
    torch.manual_seed(0)


# The error against fp64 may be twice that of a plain torch computation in the same type, plus this floor (for results
# on which the plain one happens to be exact), in units of the result's own largest size, or of the window for WAAD.
ERROR_FACTOR = 2.0
FLOOR = {
    (torch.float32, "span"): 2e-6,
    (torch.float32, "waad"): 4e-6,
    (torch.float32, "fai"): 4e-6,
    (torch.float32, "lse"): 2e-6,
    (torch.float32, "out"): 2e-6,
    (torch.bfloat16, "span"): 4e-6,
    (torch.bfloat16, "waad"): 8e-6,
    (torch.bfloat16, "fai"): 8e-6,
    (torch.bfloat16, "lse"): 2e-6,
    (torch.bfloat16, "out"): 4e-3,
    (torch.float16, "span"): 4e-6,
    (torch.float16, "waad"): 8e-6,
    (torch.float16, "fai"): 8e-6,
    (torch.float16, "lse"): 2e-6,
    (torch.float16, "out"): 5e-4,
} | {
    # Answers on request: logits as lse, the others as FAI.
    (dtype, name): 2e-6 if name == "max_logit" else floor
    for dtype, floor in ((torch.float32, 4e-6), (torch.bfloat16, 8e-6), (torch.float16, 8e-6))
    for name in ("max_logit", "top1", "entropy", "first_mass", "prompt_mass")
}


@pytest.fixture
def assert_accurate() -> Callable[..., None]:
    """assert_accurate(name, dtype, actual, exact fp64, plain torch, unit): that rule, and NaN where it is due."""

    def check(name: str, dtype: torch.dtype, actual: Tensor, exact: Tensor, plain: Tensor, unit: float = 1e-3) -> None:
        assert actual.shape == exact.shape
        undefined = exact.isnan()
        assert torch.equal(actual.isnan(), undefined), f"{name}: NaN in other places"
        if undefined.all():
            return
        exact = exact[~undefined]
        error = (actual[~undefined].double() - exact).abs().max().item()
        plain_error = (plain[~undefined].double() - exact).abs().max().item()
        allowed = ERROR_FACTOR * plain_error + FLOOR[dtype, name] * max(unit, exact.abs().max().item())
        assert error <= allowed, f"{name}: error {error:.3e}, plain torch {plain_error:.3e}, allowed {allowed:.3e}"

    return check
