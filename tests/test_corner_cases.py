"""The table of odd inputs, through the C++ kernels; tests/kernels runs it through Triton's."""

from __future__ import annotations

import pytest
from corner_cases import CASES, Case, assert_agrees, by_name


def test_every_case_has_a_name_of_its_own() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_the_kernels_agree_with_the_reference(case: Case) -> None:
    assert_agrees(case, "cpu")
