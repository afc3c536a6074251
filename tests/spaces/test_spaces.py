"""Spaces: domains, narrowing, grids, and PuVAE's named spaces."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

import defenses
import spaces
from defenses.puvae import PuVAE
from search.optimizer.coordinates import Axis
from search.optimizer.samplers import asked
from spaces.domain import Domain, as_written, contains, draw, finite, written
from spaces.exceptions import InputError
from spaces.space import SearchSpace, knob

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


def test_a_whole_number_and_an_exponent_are_taken_for_a_float_knob() -> None:
    found = WHOLE.narrow({"lambda_rc": [1, 10, "1e-2"]}).train["lambda_rc"]  # YAML reads 1e-2 as text
    assert finite(found) == (1.0, 10.0, 0.01)


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


@pytest.mark.parametrize("defense", defenses.names())
def test_a_condition_names_categorical_knobs_that_come_before_and_training_never_waits_for_inference(
    defense: str,
) -> None:
    space = SearchSpace.of(defenses.find(defense))
    order = list(space.flat())
    for name, condition in space.given.items():
        for other, values in condition.items():
            assert order.index(other) < order.index(name), f"{name} depends on {other}, which must be declared before"
            assert isinstance(space.flat()[other], CategoricalDistribution)
            assert values and all(contains(space.flat()[other], value) for value in values)
            assert name in space.inference or other in space.train


@pytest.mark.parametrize("defense", defenses.names())
def test_a_finite_space_counts_its_settings_once(defense: str) -> None:
    for name in spaces.names(defense):
        space = SearchSpace.of(defenses.find(defense)).narrow(spaces.named(defense, name))
        size, trainings = space.size(), space.trainings()
        if size is not None and size < 3000:
            settings = [str(params) for params in space.grid()]
            assert len(settings) == len(set(settings)) == size
            assert len({str(params.train) for params in space.grid()}) == trainings


CHAIN = SearchSpace(
    {"kind": CategoricalDistribution(("a", "b", "c")), "sub": CategoricalDistribution(("x", "y"))},
    {"on": CategoricalDistribution((False, True)), "deep": CategoricalDistribution((1, 2, 3))},
    {"kind": "a", "sub": "x", "on": False, "deep": 1},
    {"sub": {"kind": ("b",)}, "deep": {"on": (True,), "sub": ("y",)}},
)


def test_a_knob_that_does_not_matter_takes_its_default_and_multiplies_nothing() -> None:
    settings = [tuple(params.flat().values()) for params in CHAIN.grid()]
    assert (CHAIN.size(), CHAIN.trainings()) == (len(settings), 4) and len(set(settings)) == len(settings) == 10
    assert [s for s in settings if s[0] == "a"] == [("a", "x", False, 1), ("a", "x", True, 1)]
    assert ("b", "y", True, 3) in settings and ("b", "y", False, 3) not in settings
    assert CHAIN.complete({"kind": "c", "sub": "y", "on": True, "deep": 3}).flat()["deep"] == 1
    rng = np.random.default_rng(0)
    assert {tuple(CHAIN.drawn(rng).flat().values()) for _ in range(300)} == set(settings)


def test_the_usual_inference_setting_is_one_that_is_scored() -> None:
    wishes: dict[str, Domain] = {"reclassify": [False, True], "doubt_enc": [2.0, 5.0], "tau_enc": [0.5, 3.0]}
    space = SearchSpace.of(defenses.find("gmvae")).narrow(wishes)
    assert (space.usual()["doubt_enc"], space.usual()["tau_enc"]) == (1.0, 0.5)
    assert space.usual() in [params.inference for params in space.grid()]


def test_a_narrow_space_forgets_conditions_that_are_decided() -> None:
    never = CHAIN.narrow({"kind": "a", "sub": ["x", "y"], "on": [False, True], "deep": 3})
    always = CHAIN.narrow({"kind": "b", "sub": "y", "on": True, "deep": [1, 2, 3]})
    assert never.searched().keys() == {"on"} and never.size() == 2  # sub never matters, so deep does not either
    assert next(never.grid()).flat() == {"kind": "a", "sub": "x", "on": False, "deep": 1}
    assert not always.given and always.size() == 3
    assert [params.flat()["deep"] for params in CHAIN.at({"kind": "b", "sub": "y"}).grid()] == [1, 1, 2, 3]


@pytest.mark.parametrize(
    ("knob", "text", "domain"),
    [
        ("lambda_rc", "1e-3..10:log", FloatDistribution(1e-3, 10, log=True)),
        ("lambda_rc", "1/255..8/255", FloatDistribution(1 / 255, 8 / 255)),
        ("lambda_rc", "1..2", FloatDistribution(1, 2)),
        ("conv_maps", "4..32:log", IntDistribution(4, 32, log=True)),
        ("conv_maps", "4..8", IntDistribution(4, 8)),
        ("sigma_eps", "0..1", FloatDistribution(0, 1)),
    ],
)
def test_a_range_may_be_given_as_text(knob: str, text: str, domain: FloatDistribution) -> None:
    assert WHOLE.narrow({knob: text}).flat()[knob] == domain


@pytest.mark.parametrize(
    "text",
    ["10..1", "0..1:log", "a..b", "1..2:lin", "1..1e9", "1..2..3", "..2", "nan..1", "1..inf", "1..1e400", "1..1/0"],
)
def test_a_range_outside_the_law_is_refused_in_one_line(text: str) -> None:
    words = rf"lambda_rc must be a number from 0.0001 to 10000 .*LOW..HIGH:log, but is '{re.escape(text)}'$"
    with pytest.raises(InputError, match=words):
        WHOLE.narrow({"lambda_rc": text})
    with pytest.raises(InputError, match="conv_maps must be a whole number.* a range"):
        WHOLE.narrow({"conv_maps": "2.5..4"})
    with pytest.raises(InputError, match="label_injection must be one of dense, planes, but is '1..2'"):
        WHOLE.narrow({"label_injection": "1..2"})


@pytest.mark.parametrize(
    ("value", "words"),
    [(8 / 255, "8/255"), (0.33333, "0.33333"), (1.5e-6, "1.5e-06"), (0.3, "0.3"), (16, "16")],
)
def test_a_value_is_written_as_papers_write_it_and_read_back(value: float, words: str) -> None:
    assert written(value) == words and as_written(words) == pytest.approx(value, rel=1e-9)


class Stepped:
    """A defense that was dropped in, with knobs on steps."""

    @dataclass(frozen=True)
    class Train:
        width: int = knob(16, IntDistribution(8, 64, step=8), "channels")

    @dataclass(frozen=True)
    class Inference:
        share: float = knob(0.5, FloatDistribution(0, 1, step=0.1), "a share")


def test_steps_are_kept_by_ranges_draws_grids_and_samplers() -> None:
    space = SearchSpace.of(Stepped).narrow({"width": "8..32", "share": "0..0.5"})
    widths, shares = (8, 16, 24, 32), (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
    assert space.train["width"] == IntDistribution(8, 32, step=8)
    assert (space.size(), [*space.grid()][-1].flat()) == (24, {"width": 32, "share": 0.5})
    rng, study = np.random.default_rng(0), optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = [space.drawn(rng).flat() for _ in range(200)]
    drawn += [asked(study.ask(), space, whole=True).flat() for _ in range(60)]
    near = [Axis(domain).neighbour(drawn[0][name], rng) for name, domain in space.flat().items() for _ in range(9)]
    assert {each["width"] for each in drawn} == set(widths) and {each["share"] for each in drawn} == set(shares)
    assert set(near) <= {*widths, *shares}


@pytest.mark.parametrize(
    ("named", "words"),
    [
        (
            {"width": "8..30"},
            r"width must be a whole number from 8 to 64 in steps of 8, or of these a range LOW\.\.HIGH",
        ),
        ({"width": [8, 12]}, r"width must be a whole number from 8 to 64 in steps of 8, but is 12$"),
        ({"width": "8..32:log"}, r"in steps of 8, or of these a range"),
        ({"width": IntDistribution(8, 32)}, r"in steps of 8, but the space says a whole number from 8 to 32$"),
        ({"share": FloatDistribution(0, 0.5)}, r"a number from 0 to 1 in steps of 0\.1, but the space says a number"),
        ({"share": 0.25}, r"share must be a number from 0 to 1 in steps of 0\.1, but is 0\.25$"),
    ],
)
def test_a_wish_off_the_steps_is_refused_in_one_line(named: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        SearchSpace.of(Stepped).narrow(named)
