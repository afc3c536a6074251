"""The Gaussian process is the textbook's: compared with a slow one in loops, and with what it must learn."""

from __future__ import annotations

import math

import numpy as np

from search.optimizer.surrogate import ASSUMED, CENTRE, OFFSET, OWN, STEADY, Surrogate


def slow(log: np.ndarray, a: np.ndarray, u: float, b: np.ndarray, v: float) -> float:
    """Return the covariance of two observations, term by term."""
    *lengths, deviation, decay = np.exp(log)
    far = math.sqrt(sum(((p - q) / length) ** 2 for p, q, length in zip(a, b, lengths, strict=True)))
    matern = (1 + math.sqrt(5) * far + 5 * far**2 / 3) * math.exp(-math.sqrt(5) * far)
    own = OWN if far < 1e-5 else 0.0
    offset = OFFSET**2 * (1 + math.exp(-0.5 * ((u - v) / STEADY) ** 2))
    return deviation**2 * (matern + own) * math.exp(-decay * abs(u - v)) + offset


def test_it_is_the_slow_one_in_loops() -> None:
    rng = np.random.default_rng(0)
    x, u, y, noise = rng.random((9, 3)), rng.choice([-0.5, 0.0, 2.0], 9), rng.random(9), rng.random(9) * 0.01 + 1e-4
    x[5] = x[2]  # one training, seen at two fidelities
    surrogate = Surrogate(3, rng)
    surrogate.fit(x, u, y, noise, tries=5)
    log, at = surrogate._log, rng.random((4, 3))
    k = np.array([[slow(log, a, ua, b, ub) for b, ub in zip(x, u, strict=True)] for a, ua in zip(x, u, strict=True)])
    inverse = np.linalg.inv(k + np.diag(noise))
    prediction = surrogate.predict(at, -0.5)
    mean, sd = prediction.mean_Q, prediction.sd_Q
    for i, place in enumerate(at):
        row = np.array([slow(log, place, -0.5, b, ub) for b, ub in zip(x, u, strict=True)])
        assert np.isclose(mean[i], CENTRE + row @ inverse @ (y - CENTRE))
        assert np.isclose(sd[i] ** 2, slow(log, place, -0.5, place, -0.5) - row @ inverse @ row)


def test_it_learns_which_coordinate_matters_and_that_early_scores_tell_something() -> None:
    rng = np.random.default_rng(1)
    x = rng.random((30, 2))
    final = 0.2 + 0.5 * np.exp(-8 * (x[:, 0] - 0.7) ** 2)
    half = np.arange(30) < 15
    u = np.where(half, -0.5, 2.0)
    y = np.where(half, final, 0.5 * final)  # early scores are lower, but in the same order
    surrogate = Surrogate(2, rng)
    for _ in range(4):
        surrogate.fit(x, u, y, np.full(30, 1e-4), tries=30)
    assert (
        np.corrcoef(surrogate.predict(x[15:], -0.5).mean_Q, final[15:])[0, 1] > 0.95
        and surrogate._log[0] < surrogate._log[1]
    )


def test_what_was_never_seen_is_uncertain_and_what_was_seen_is_not() -> None:
    surrogate = Surrogate(1, np.random.default_rng(0))
    surrogate.fit(np.array([[0.1]]), np.array([-0.5]), np.array([0.6]), np.array([1e-4]))
    prediction = surrogate.predict(np.array([[0.1], [1.0]]), -0.5)
    mean, sd = prediction.mean_Q, prediction.sd_Q
    assert abs(mean[0] - 0.6) < 0.01 and sd[0] < 0.05 < 0.1 < sd[1]


def test_what_is_assumed_is_as_if_it_had_been_seen_as_predicted() -> None:
    rng = np.random.default_rng(2)
    x, u, y, noise, at = rng.random((9, 3)), np.full(9, -0.5), rng.random(9), np.full(9, 1e-3), rng.random((6, 3))
    surrogate = Surrogate(3, rng)
    surrogate.fit(x, u, y, noise)
    prediction = surrogate.predict(at, -0.5)
    for q in (4, 1, 4):
        prediction.assume(q)
        x, y = np.vstack([x, at[q]]), np.append(y, prediction.mean_Q[q])
        u, noise = np.append(u, -0.5), np.append(noise, ASSUMED)
    surrogate.fit(x, u, y, noise)
    again = surrogate.predict(at, -0.5)
    assert np.allclose(again.mean_Q, prediction.mean_Q, atol=1e-6) and np.allclose(
        again.sd_Q, prediction.sd_Q, rtol=1e-4
    )
