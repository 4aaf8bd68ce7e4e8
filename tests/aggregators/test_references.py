"""The rules against the NumPy references, on inputs where rules and options differ."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.aggregators.cases import (
    CASES,
    KINDS,
    NUM_CLIENTS,
    D,
    F,
    N,
    attacked,
    cohort,
    compiled,
    context,
)
from tests.references import aggregators as oracle


def scenarios():
    """Name, U, mask, root update and sizes, all of one shape: one trace does."""
    U, g0, sizes = cohort(2, N, D)
    everybody = np.ones(N, bool)
    yield "plain", U, everybody, g0, sizes
    for kind in KINDS:
        yield kind, attacked(U, F, kind), everybody, g0, sizes
    for out in (1, 3, 8, N - 3, N - 2, N - 1, N):
        mask = everybody.copy()
        mask[np.random.default_rng(out).permutation(N)[:out]] = False
        U, g0, sizes = cohort(out, N, D)
        yield f"{out} out", U, mask, g0, sizes
    mask = np.arange(N) != 4
    yield "1 out, 1 nan", attacked(cohort(4, N, D)[0], 1, "nan"), mask, g0, sizes
    yield "no sizes", U, everybody, g0, 0 * sizes
    yield "zero root", U, everybody, 0 * g0, sizes
    yield "nan root", U, everybody, np.nan * g0, sizes
    yield "opposite root", U, everybody, -g0, sizes
    yield "ties", np.round(U), everybody, np.round(g0), sizes


# And their absolute tolerances: differences of losses are as exact as these.
DETAILS = dict.fromkeys(("cosine", "trust", "kappa", "clip", "picked", "index"), 1e-6)
DETAILS |= dict.fromkeys(("error_impact", "loss_impact"), 1e-4)


def check(case, f, result, U, mask, g0, sizes):
    aggregate, info = result
    expected = case.reference(f, U, mask, g0, sizes)
    # A mean of outliers is as exact as they are; whoever rejects them stays exact.
    scale = 1.0
    if not case.robust:
        parts = expected.weights[:, None] * np.where(expected.keep[:, None], U, 0)
        scale += np.abs(parts).max(initial=0)
    np.testing.assert_allclose(
        aggregate, expected.aggregate, rtol=1e-4, atol=1e-5 * scale
    )
    np.testing.assert_allclose(info.weights, expected.weights, rtol=2e-4, atol=1e-6)
    np.testing.assert_array_equal(~np.asarray(info.flagged), expected.keep)
    # Past 1e30 float32 has no exact squares left; such a score need only be huge.
    exact = (expected.scores < 1e30) | np.isinf(expected.scores)
    scores = np.asarray(info.scores)
    np.testing.assert_allclose(scores[exact], expected.scores[exact], 2e-4, 1e-4)
    assert np.all(scores[~exact] > 1e29)
    for name, atol in DETAILS.items():
        if name in info.details and name in expected.extra:
            np.testing.assert_allclose(
                info.details[name], expected.extra[name], 2e-4, atol, err_msg=name
            )


@pytest.mark.parametrize("name", CASES)
def test_equals_reference(name):
    case = CASES[name]
    for label, *inputs in scenarios():
        if label in case.inexact:
            continue
        if name == "krum-n-f" and label.startswith("1e"):
            continue  # it counts an outlier in every score: float32 holds no other part
        if name.startswith("crfl") and label.startswith("1e"):
            continue  # opposite outliers cancel in its mean, and take the rest along
        try:
            U, mask, g0, sizes = inputs
            check(case, F, compiled(name)(U, g0, mask, sizes), *inputs)
        except AssertionError as error:
            raise AssertionError(f"scenario {label!r}: {error}") from None


@pytest.mark.parametrize(
    "name",
    [
        "median",
        "trimmed_mean",
        "krum",
        "dual_system",
        "meamed",
    ],
)
def test_equals_reference_on_many_columns(name):
    n, d, f = 17, 1500, 7
    U, g0, sizes = cohort(n, n, d)
    rule = CASES[name].make(f)
    aggregate, _, info = jax.jit(rule.apply)(U, (), context(g0, sizes=sizes))
    check(CASES[name], f, (aggregate, info), U, None, g0, sizes)


# Rules that one cohort does not tell from another. Krum's and SignGuard's variants have
# tests over many of their own; FLDetector is the mean in its first round; a first step
# of centered clipping is norm clipping (its other case takes three); the others choose
# one row or n - f of them, and not many choices differ on one input (test_subsets.py
# and test_preaggregators.py tell them apart). Of the detectors, who is left is what
# another rule chooses too: test_detection.py has more of them.
ALIKE = (
    "krum-n-f-1",
    "krum-n-f",
    "krum-unsquared",
    "signguard-two_means",
    "signguard-cosine",
    "signguard-distance",
    "flame-update",  # it keeps everybody here; test_filters.py tells it from FLAME
    "fldetector",
    "centered_clipping",
    "mda",
    "smea",
    "monna",
    "monna-pivot",
    "chain-nnm-krum",
    "chain-arc-krum",
    "err_lfr",
    "vae_detector",
    "vae_detector-pca",
)


def test_inputs_tell_the_rules_apart():
    """Two rules that agree everywhere would hide a mistake in either."""
    U, g0, sizes = cohort(2, N, D)
    U = attacked(U, F, "collude")
    results = {
        name: case.reference(F, U, None, g0, sizes).aggregate
        for name, case in CASES.items()
        if name not in ALIKE
    }
    names = list(results)
    same = [
        (a, b)
        for i, a in enumerate(names)
        for b in names[i + 1 :]
        if np.allclose(results[a], results[b], rtol=1e-3)
    ]
    assert same == []


@pytest.mark.parametrize("option", ["krum-n-f-1", "krum-n-f", "krum-unsquared"])
def test_some_input_tells_krum_variants_apart(option):
    chosen = [
        [
            np.argmax(CASES[name].reference(F, U, None, g0, sizes).weights)
            for U, g0, sizes in (cohort(seed, N, D) for seed in range(12))
        ]
        for name in ("krum", option)
    ]
    assert chosen[0] != chosen[1]


def test_threshold_of_dynamic_trust_over_rounds():
    case = CASES["dual_system-dynamic_trust"]
    rule = case.make(F)
    state, tau = rule.init(jnp.zeros(D), NUM_CLIENTS), 0.0
    apply = jax.jit(rule.apply)
    for seed in range(4):
        U, g0, _ = cohort(seed, N, D)
        _, state, info = apply(U, state, context(g0))
        expected = oracle.dual_system(
            U, g0, F, "dynamic_trust", rho=0.2, k=0.1, tau_before=tau
        )
        tau = expected.extra["threshold"]
        np.testing.assert_allclose(state.threshold, tau, rtol=1e-4)
        np.testing.assert_allclose(info.details["threshold"], np.full(N, tau), 1e-4)
        np.testing.assert_array_equal(~np.asarray(info.flagged), expected.keep)
    assert tau > 0
    _, kept, _ = apply(np.zeros((N, D), np.float32), state, context(g0))
    assert kept.threshold == state.threshold
