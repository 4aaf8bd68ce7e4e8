"""MAD: its worked examples, and the rule followed round by round."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim import aggregators as rules
from fedjax_sim.aggregators.mad import MADState, distances_to_centre
from fedjax_sim.types import RoundContext
from tests.aggregators.bare import compiled, everybody, play
from tests.aggregators.cases import attacked, cohort
from tests.pages import EXAMPLES, check, inputs, options
from tests.references import mad as oracle

N, D = 14, 9  # clients in all, of which a round may have fewer
made = functools.cache(rules.mad)  # so that equal rules are compiled once

# Worked examples

PAGE = [e for e in EXAMPLES if EXAMPLES[e]["algorithm"] == "mad"]


def given(example):
    """The example's options by our names, and its state."""
    names = {
        "beta_R": "beta_reputation",
        "beta_T": "beta_trust",
        "tau": "threshold",
        "warmup": "start",
    }
    hp = {names.get(k, k): v for k, v in options(example).items()}
    return hp, EXAMPLES[example]["state_in"]


@pytest.mark.parametrize("example", PAGE)
def test_example(example):
    hp, before = given(example)
    state = MADState(
        jnp.array(before["R"]),
        jnp.array(before["Trust"]),
        jnp.array(before["removed"]),
        jnp.int32(before["t"]),
    )
    delta, state, info = play(made(**hp), inputs(example)["U"], state)
    check(
        example,
        delta=delta,
        d=1 - info.details["distance"],
        R=state.reputation,
        Trust=state.trust,
        removed=state.removed,
    )
    assert int(state.round) == before["t"] + 1
    np.testing.assert_array_equal(info.flagged, state.removed)


@pytest.mark.parametrize("example", PAGE)
def test_example_by_the_reference(example):
    hp, before = given(example)
    reference = oracle.MAD(**hp)
    reference.reputation = dict(enumerate(before["R"]))
    reference.trust = dict(enumerate(before["Trust"]))
    reference.t = before["t"]
    U = np.array(inputs(example)["U"])
    result = reference(U, range(len(U)))
    check(
        example,
        delta=result.aggregate,
        d=1 - result.extra["distance"],
        R=result.extra["reputation"],
        Trust=result.extra["trust"],
        removed=~result.keep,
    )


def test_there_are_five_examples():
    assert len(PAGE) == 5


# Rounds


def rounds(seed, num_rounds, cohort_size, far=4.0):
    """``U, ids, mask, sizes``; clients 0 to 2 are far off, rows are missing or NaN."""
    rng = np.random.default_rng(seed)
    distance = rng.uniform(0.5, 2.0, N)
    for t in range(num_rounds):
        ids = rng.permutation(N)[:cohort_size].astype(np.int32)
        U = rng.normal(size=(cohort_size, D)) * distance[ids][:, None]
        U += 0.2 + far * (ids < 3)[:, None] * rng.uniform(0.3, 1, (cohort_size, 1))
        mask = rng.uniform(size=cohort_size) > 0.1
        if t == 7:
            mask[:] = False
        U = U.astype(np.float32)
        if t % 3 == 1:
            U[rng.integers(cohort_size), 2] = np.nan
        yield U, ids, mask, rng.integers(1, 30, cohort_size).astype(np.float32)


SETTINGS = {
    "paper": {"start": 6},
    "never": {"start": 99, "alpha": 0.7, "beta_reputation": 0.4, "beta_trust": 0.3},
    "code": {"start": 5, "variant": "code", "measured": "all", "weighting": "data"},
    "max": {"start": 4, "scale": "max"},
    "clusters": {"start": 5, "clusters": 2, "threshold": 0.5},
}
SAMPLED = {"code": 8, "max": 10}  # sizes of the cohort, where it is not everybody


@pytest.mark.parametrize("name", SETTINGS)
def test_mad_over_rounds(name):
    rule, reference = (make(**SETTINGS[name]) for make in (made, oracle.MAD))
    state = rule.init(jnp.zeros(D), N)
    removed = []
    cohorts = rounds(3, 12, SAMPLED.get(name, N))
    for t, (U, ids, mask, sizes) in enumerate(cohorts):
        old = state
        aggregate, state, info = play(
            rule,
            U,
            state,
            client_ids=jnp.asarray(ids),
            mask=jnp.asarray(mask),
            num_samples=jnp.asarray(sizes),
        )
        expected = reference(U, ids.tolist(), mask, sizes)
        np.testing.assert_array_equal(~info.flagged, expected.keep)
        np.testing.assert_allclose(info.weights, expected.weights, rtol=1e-5)
        np.testing.assert_allclose(aggregate, expected.aggregate, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(info.scores, expected.scores, rtol=1e-4, atol=1e-5)
        for key, value in expected.extra.items():
            np.testing.assert_allclose(info.details[key], value, 1e-4, 1e-5)
        assert set(np.flatnonzero(state.removed).tolist()) == reference.removed
        assert int(state.round) == reference.t == t + 2

        # Whoever took no part, or was out before, is as before.
        left = np.array(old.removed)
        left[ids[~mask | ~np.isfinite(U).all(axis=1)]] = True
        left[np.setdiff1d(np.arange(N), ids)] = True
        for one, other in zip(old[:3], state[:3]):
            np.testing.assert_array_equal(one[left], other[left])
        removed.append(len(reference.removed))
    start = SETTINGS[name]["start"]
    assert not any(removed[: start - 1])
    assert (removed[-1] > 0) == (name != "never")


def test_every_option_makes_a_difference():
    ends = {}
    settings = [setting.items() for setting in SETTINGS.values()]
    for option, value in set(itertools.chain(*settings)) - {("start", 6)}:
        reference = oracle.MAD(**{"start": 4, option: value})
        for U, ids, mask, sizes in rounds(3, 6, N):
            result = reference(U, ids.tolist(), mask, sizes)
        end = (*reference.trust.values(), *result.aggregate)
        ends[option, value] = tuple(np.round(end, 4))
    assert len(set(ends.values())) == len(ends) == 12


def test_one_scan_of_rounds_over_seeds_equals_loops():
    rule = made(start=2)
    U = np.float32(np.random.default_rng(0).normal(size=(2, 5, 6, D)))
    ids = np.stack([np.random.default_rng(t).permutation(N)[:6] for t in range(5)])
    traces = []

    def one_round(state, given):
        traces.append(None)
        context = RoundContext(client_ids=given[1])
        aggregate, state, info = rule.apply(given[0], state, context)
        return state, (aggregate, info)

    def one_seed(U):
        return jax.lax.scan(one_round, rule.init(U[0, 0], N), (U, jnp.asarray(ids)))

    states, found = jax.jit(jax.vmap(one_seed))(U)
    assert len(traces) == 1
    assert states.removed.any(axis=1).all()
    for seed in range(2):
        state = rule.init(jnp.zeros(D), N)
        for t in range(5):
            given = jnp.asarray(ids[t])
            aggregate, state, info = play(rule, U[seed, t], state, client_ids=given)
            jax.tree.map(
                lambda one, every, s=seed, t=t: np.testing.assert_allclose(
                    one, every[s, t], rtol=1e-4, atol=1e-5
                ),
                (aggregate, info),
                found,
            )
        np.testing.assert_array_equal(state.removed, states.removed[seed])


# What it does


def iid(t, far=0):
    U = np.random.default_rng(t).normal(size=(8, D))
    U[:far] += 30 * np.arange(1, far + 1)[:, None]
    return U


def played(rule, num_rounds, **how):
    """The state after every round in which all clients take part."""
    state, states = None, []
    for t in range(num_rounds):
        _, state, info = play(rule, iid(t, **how), state)
        np.testing.assert_array_equal(info.flagged, state.removed)
        states.append(state)
    return states


def test_without_an_attack_the_farthest_is_excluded_in_every_round():
    """What min-max scaling means, and the docstring says."""
    numbers = [int(state.removed.sum()) for state in played(made(start=1), 12)]
    assert numbers[0] > 0
    assert all(b > a or a == 6 for a, b in itertools.pairwise(numbers))
    assert numbers[-1] == 6  # the last two are equally far from their mean


def test_excluded_attackers_spare_the_honest_if_all_are_measured():
    attackers = np.arange(8) < 1
    kept, everyone = (
        played(made(start=1, measured=who), 12, far=1)[-1].removed
        for who in ("kept", "all")
    )
    assert int(kept.sum()) == 6
    np.testing.assert_array_equal(everyone, attackers)


def test_a_farther_attacker_hides_a_nearer_one_for_a_while():
    states = played(made(start=1), 2, far=2)
    assert np.flatnonzero(states[0].removed).tolist() == [1]
    assert np.flatnonzero(states[1].removed)[:2].tolist() == [0, 1]


@pytest.mark.parametrize("measured", ["kept", "all"])
def test_excluded_rows_are_never_in_the_mean_again(measured):
    rule = made(start=1, measured=measured)
    U = iid(0, far=1)
    _, state, _ = play(rule, U, None)
    assert bool(state.removed[0])
    results = []
    for kind in ("1e8", "nan", "zero"):
        moved = attacked(np.float32(iid(1))[::-1], 1, kind)[::-1]
        aggregate, new, info = play(rule, moved, state)
        assert bool(info.flagged[0])
        assert float(info.scores[0]) == np.inf
        assert float(info.weights[0]) == 0
        assert float(new.trust[0]) == float(state.trust[0])
        results.append((aggregate, new, info))
    for other in results[1:] if measured == "kept" else []:
        jax.tree.map(np.testing.assert_array_equal, results[0], other)
    if measured == "all":
        assert float(results[0][1].trust[1:].min()) > 0.9  # all near, beside 1e8
        assert float(results[2][1].trust[1:].min()) < 0.15


def test_a_newcomer_starts_without_reputation():
    """Equation (2), not (1): a reputation of 0 is smoothed in."""
    rule, state = made(start=1), made(start=1).init(jnp.zeros(D), 16)
    for t, factor in enumerate([1.0, 0.75]):
        ids = jnp.arange(8) + 8 * t
        _, state, info = play(rule, iid(t), state, client_ids=ids)
        d = 1 - np.asarray(info.details["distance"])
        # Far from the centre (d < alpha), d - exp(0) is clipped to 0 in round 2.
        expected = factor * np.where((d >= 0.5) | (t == 0), d, 0)
        np.testing.assert_allclose(state.reputation[ids], expected, atol=1e-6)
        assert 0 < (d >= 0.5).sum() < 8


# Numbers


def test_a_common_offset_costs_no_digits():
    U = np.float32(1e3 + 0.1 * np.random.default_rng(0).normal(size=(9, 500)))
    wide = U.astype(np.float64)
    expected = np.linalg.norm(wide - wide.mean(axis=0), axis=1)
    found = jax.jit(distances_to_centre, static_argnums=2)(U, everybody(9), 1)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_equally_far_clients_are_all_near():
    """Their distances to the mean differ by rounding alone."""
    for seed in range(5):
        cross = np.random.default_rng(seed).normal(size=(2, D))
        cross[1] *= np.linalg.norm(cross[0]) / np.linalg.norm(cross[1])
        U = 5 + np.concatenate([cross, -cross, cross, -cross])
        _, state, info = play(made(start=1), U)
        assert info.details["distance"].tolist() == [0] * 8
        assert state.trust.tolist() == [1] * 8


@pytest.mark.parametrize("options", [{}, {"clusters": 2, "scale": "max"}])
@pytest.mark.parametrize("kind", ["1e18", "1e8", "overflow", "nan"])
def test_mad_survives_float32_s_end(kind, options):
    rule, state = made(start=1, **options), None
    for t in range(3):
        U = attacked(cohort(t, 8, D)[0], 2, kind)
        aggregate, state, info = play(rule, U, state)
        for x in jax.tree.leaves((aggregate, state, info.weights, info.details)):
            assert np.all(np.isfinite(x))
        assert np.abs(aggregate).max() < 100
        assert np.all(info.flagged[-2:])


def test_a_second_round_compiles_nothing():
    rule = made(start=1)
    played(rule, 1)
    size = compiled(rule)._cache_size()
    assert int(played(rule, 3)[-1].round) == 4
    assert compiled(rule)._cache_size() == size


# Options


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"start": 0}, "mad's start must be an integer of at least 1; got 0"),
        ({"alpha": 1.5}, r"mad's alpha must be .* in \[0, 1\]; got 1.5"),
        ({"beta_reputation": 0}, r"beta_reputation must be .* in \(0, 1\]; got 0"),
        ({"beta_trust": np.nan}, r"beta_trust must be .* in \(0, 1\]; got nan"),
        ({"threshold": -0.1}, r"threshold must be .* in \[0, inf\); got -0.1"),
        ({"clusters": 0}, "clusters must be an integer of at least 1; got 0"),
        ({"clusters": 3}, "of the larger of two; got clusters=3. Use 2"),
        ({"scale": "minmax"}, "unknown mad scale 'minmax'. Did you mean 'min_max'"),
        ({"variant": "codes"}, "unknown mad variant 'codes'. Did you mean 'code'"),
        ({"weighting": "size"}, "Valid: data, uniform"),
        ({"measured": "everybody"}, "Valid: all, kept"),
    ],
)
def test_refused_at_construction(option, message):
    with pytest.raises(ValueError, match=message):
        rules.mad(**option)


def test_what_it_cannot_do_without():
    rule = rules.mad()
    rule.validate(2)
    with pytest.raises(ValueError, match="cohort_size must be an integer of at least"):
        rule.validate(1)
    with pytest.raises(ValueError, match="cohort_size must be an integer of at least"):
        rule.apply(jnp.ones((1, 2)), rule.init(jnp.ones(2), 1), RoundContext())
    with pytest.raises(ValueError, match=r"mad needs context\.client_ids"):
        rule.apply(jnp.ones((3, 2)), rule.init(jnp.ones(2), 3), RoundContext())
