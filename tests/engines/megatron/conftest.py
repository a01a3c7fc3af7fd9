"""The case that the tests on real ranks share."""

from __future__ import annotations

import pytest
from megatron_case import Case, make_case


@pytest.fixture(scope="session")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("qwen3"))
