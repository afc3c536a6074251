"""Spaces: domains, narrowing, grids, and PuVAE's named spaces."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

import defenses
import spaces
from defenses.puvae import PuVAE
from spaces.space import InputError, SearchSpace, contains, draw, finite

WHOLE = SearchSpace.of(PuVAE)


def test_a_defense_says_which_knobs_need_a_new_training() -> None:
    assert {"lambda_rc", "lambda_kl", "lambda_ce", "label_injection", "reduction", "latent"} <= set(WHOLE.train)
    assert set(WHOLE.inference) == {"sigma_eps"}


def test_the_papers_grid_is_exactly_the_papers() -> None:
    space = WHOLE.narrow(spaces.named("puvae", "paper"))
    assert (space.trainings(), space.size()) == (216, 1296)
    settings = list(space.grid())
    assert len({tuple(s.flat().items()) for s in settings}) == 1296
    lambdas = {s.train[name] for s in settings for name in ("lambda_rc", "lambda_kl", "lambda_ce")}
    assert lambdas == {0.01, 0.1, 1, 10, 100, 1000}
    assert {s.inference["sigma_eps"] for s in settings} == {0, 0.01, 0.1, 1, 10, 100}


def test_knobs_that_a_space_does_not_name_keep_their_default() -> None:
    setting = next(WHOLE.narrow({"lambda_rc": 1.0}).grid())
    assert setting.train["lambda_rc"] == 1.0
    assert setting.train["conv_maps"] == 32 and setting.train["latent"] == 32 and setting.train["dense"] == 1024


@pytest.mark.parametrize("defense", defenses.names())
def test_every_named_space_fits_its_defense(defense: str) -> None:
    for name in spaces.names(defense):
        SearchSpace.of(defenses.find(defense)).narrow(spaces.named(defense, name))


def test_every_default_lies_in_its_domain() -> None:
    for name, domain in WHOLE.flat().items():
        assert contains(domain, WHOLE.defaults[name]), name


def test_a_whole_number_is_taken_for_a_float_knob() -> None:
    assert finite(WHOLE.narrow({"lambda_rc": [1, 10]}).train["lambda_rc"]) == (1.0, 10.0)


@pytest.mark.parametrize(
    ("domain", "value", "inside"),
    [
        (FloatDistribution(0, 1), 0.5, True),
        (FloatDistribution(0, 1), 1.5, False),
        (FloatDistribution(0, 1), math.nan, False),
        (FloatDistribution(0, 1), True, False),
        (IntDistribution(1, 4), 4, True),
        (IntDistribution(1, 4), 2.0, False),
        (CategoricalDistribution(("a", 1)), "a", True),
        (CategoricalDistribution(("a", 1)), True, False),
    ],
)
def test_a_domain_knows_its_values(domain: FloatDistribution, value: object, inside: bool) -> None:
    assert contains(domain, value) is inside


def test_draws_lie_in_the_domain_and_are_log_uniform_where_it_is() -> None:
    rng = np.random.default_rng(0)
    domain = FloatDistribution(1e-3, 1e3, log=True)
    drawn = [float(draw(domain, rng)) for _ in range(2000)]
    assert all(contains(domain, value) for value in drawn)
    assert abs(float(np.mean(np.log10(drawn)))) < 0.1
    assert {draw(IntDistribution(1, 3), rng) for _ in range(100)} == {1, 2, 3}


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ({"lamda_rc": 1.0}, "did you mean 'lambda_rc'"),
        ({"conv_maps": 0}, "conv_maps must be a whole number from 1 to 256, but is 0"),
        ({"conv_maps": 2.5}, "conv_maps must be a whole number"),
        ({"sigma_eps": -1.0}, "sigma_eps must be a number from 0 to 1000, but is -1.0"),
        ({"lambda_rc": 0}, "lambda_rc must be a number from 0.0001 to 10000 (log scale), but is 0.0"),
        ({"label_injection": "soup"}, "one of dense, planes"),
        ({"lambda_rc": []}, "grid is empty"),
        ({"lambda_rc": FloatDistribution(1e-9, 1.0, log=True)}, "lambda_rc must be"),
    ],
)
def test_a_wish_outside_the_law_is_refused_in_one_line(named: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)) as caught:
        WHOLE.narrow(named)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_grid_over_a_continuous_space_is_refused() -> None:
    with pytest.raises(InputError, match="a grid needs finite domains, but lambda_rc"):
        next(WHOLE.narrow(spaces.named("puvae", "default")).grid())
