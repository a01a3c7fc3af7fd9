"""Seeds keep their values, so runs and analyses of earlier versions can be repeated and continued."""

from __future__ import annotations

import torch

from rhythm.seeds import analysis_seed, derive_seed, generator


def test_seeds_of_steps_replicas_and_responses_are_those_recorded() -> None:
    assert derive_seed(0, "rollout", 1) == 6166235045094533755
    assert derive_seed(7, "replica", 1) == 4271536116359113877
    assert derive_seed(12345, "replica", 3) == 202988205475617113
    assert derive_seed(7, 0, 0) == 604765523002891236
    assert derive_seed(5, 2, 11) == 1459881398138695644


def test_seeds_of_analyses_are_those_recorded() -> None:
    assert [analysis_seed(0, 0), analysis_seed(7, 42)] == [1234797308, 1227307389]


def test_a_generator_draws_from_its_derived_seed() -> None:
    drawn = torch.rand(3, generator=generator(3, "credit", 2))
    assert drawn.equal(torch.rand(3, generator=torch.Generator().manual_seed(derive_seed(3, "credit", 2))))
    assert not drawn.equal(torch.rand(3, generator=generator(3, "credit", 3)))
