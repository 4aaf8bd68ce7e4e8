"""Crafted updates: worked examples, and what each does to the rule it is made for."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim import aggregators, attacks
from fedjax_sim.attacks.fang_krum import against_all, against_own, first_step
from fedjax_sim.attacks.fang_trimmed_mean import (
    beyond_extremes,
    beyond_spread,
    uniform_rows,
)
from fedjax_sim.attacks.fltrust_adaptive import Goal, climb, rise, search_direction
from fedjax_sim.attacks.line_search import line_maximize
from fedjax_sim.attacks.mimic import MimicState, initial_direction
from fedjax_sim.attacks.rows import unit_rows
from fedjax_sim.distances import krum_scores, pairwise_sq_distances
from fedjax_sim.pytrees import safe_norms
from fedjax_sim.types import RoundContext
from tests.pages import EXAMPLES, VALIDATION, check, inputs, options
from tests.references import aggregators as rules
from tests.references import crafted as reference


def sent(attack, own, honest=(), state=None, **context):
    """All rows after the attack, attackers first, and the attack's state."""
    U = jnp.array([*own, *honest], jnp.float32)
    context = {"client_ids": jnp.arange(len(U)), "key": jax.random.key(3)} | context
    context = RoundContext(byzantine=jnp.arange(len(U)) < len(own), **context)
    state = attack.init(U[0], len(U)) if state is None else state

    @jax.jit
    def apply(U, state):
        return attack.apply(U, state, context)

    rows, state = apply(U, state)
    np.testing.assert_array_equal(rows[len(own) :], U[len(own) :])
    return rows, state


def aggregated(rule, U, **context):
    """``(aggregate, info)`` of a rule without memory."""
    context = RoundContext(**context)
    aggregate, _, info = jax.jit(lambda U: rule.apply(U, (), context))(jnp.array(U))
    return aggregate, info


def crafted_row(attack, own, honest=(), **context):
    return sent(attack, own, honest, **context)[0][0]


def module(name):
    """A module whose name the function of the package hides."""
    return sys.modules[f"fedjax_sim.attacks.{name}"]


def cohort(seed, n, d, spread=1.0):
    rng = np.random.default_rng(seed)
    return np.float32(rng.normal(0.5, spread, (n, d)))


# Attacks without a look at others -----------------------------------------------------


def test_additive_noise(monkeypatch):
    page = inputs("additive/basic")

    def draw(key, client_ids, size):
        return jnp.broadcast_to(jnp.array(page["noise"]), (len(client_ids), size))

    monkeypatch.setattr(module("gaussian"), "normal_rows", draw)
    row = crafted_row(attacks.additive_noise(0.3), [page["u"]], [page["u"]])
    check("additive/basic", u_mal=row)
    check("additive/basic", u_mal=reference.additive_noise(page["u"], page["noise"]))


@pytest.mark.parametrize("space", ["weights", "update"])
def test_same_value(space):
    identifier = f"same_value/{space}"
    w, value = inputs(identifier)["w"], options(identifier)["c"]
    attack = attacks.same_value(value, space)
    check(identifier, u_mal=crafted_row(attack, [w], params=jnp.array(w)))
    check(identifier, u_mal=reference.same_value(w, value, space))


@pytest.mark.parametrize(
    ("identifier", "mode"),
    [("free_rider/zero", "zero"), ("free_rider/delta", "delta_weights")],
)
def test_free_rider(identifier, mode):
    page = inputs(identifier)
    w, previous = jnp.array(page["w"]), page.get("w_prev")
    old = None if previous is None else jnp.array(previous)
    row = crafted_row(
        attacks.free_rider(mode), [page["w"]], params=w, previous_params=old
    )
    check(identifier, u_mal=row)
    check(identifier, u_mal=reference.free_rider(page["w"], mode, previous))


def test_free_rider_noise_fades():
    attack = attacks.free_rider("noisy", std=2.0, decay=0.5)
    own = np.zeros((1, 4000))
    first, fourth = (
        np.asarray(crafted_row(attack, own, round=jnp.int32(t)), np.float64)
        for t in (0, 3)
    )
    noise = first / 2.0
    assert abs(noise.std() - 1.0) < 0.05
    expected = reference.free_rider(noise, "noisy", None, noise, 2.0, 0.5, number=4)
    np.testing.assert_allclose(fourth, expected, rtol=1e-5)


@pytest.mark.parametrize("attack", [attacks.inf_rows(-1), attacks.nan_rows()])
def test_a_rule_goes_on_without_rows_that_are_no_numbers(attack):
    rows, _ = sent(attack, np.ones((2, 3)), np.eye(3))
    aggregate, info = aggregated(aggregators.fedavg(), rows, num_samples=jnp.ones(5))
    np.testing.assert_allclose(aggregate, np.full(3, 1 / 3), rtol=1e-6)
    assert info.flagged.tolist() == [True, True, False, False, False]


def test_model_replacement_gamma():
    page, hp = (f("model_replacement/gamma") for f in (inputs, options))
    u = np.subtract(page["X"], page["w"])
    gamma = reference.replacement_scale(hp["n"], hp["m"], hp["eta"])
    honest = np.zeros((hp["n"] - hp["m"], 2))
    row = crafted_row(attacks.model_replacement(), [u], honest)
    check("model_replacement/gamma", u_mal=row, gamma=row[0] / u[0])
    row = reference.model_replacement(u, gamma)
    check("model_replacement/gamma", u_mal=row, gamma=gamma)


def test_model_replacement_makes_the_mean_the_attacker_s_model():
    page = inputs("model_replacement/mean_recovers_X")
    w = np.array(page["w"])
    rows, _ = sent(attacks.model_replacement(), [page["X"] - w], page["benign"])
    check("model_replacement/mean_recovers_X", new_params=w + rows.mean(axis=0))
    # Half the server's step takes twice the boost, two attackers half of it each.
    own = [page["X"] - w] * 2
    rows, _ = sent(attacks.model_replacement(server_rate=0.5), own, page["benign"])
    check("model_replacement/mean_recovers_X", new_params=w + 0.5 * rows.mean(axis=0))


def test_model_replacement_within_a_norm():
    page, hp = (f("model_replacement/norm_bound") for f in (inputs, options))
    attack = attacks.model_replacement(scale=hp["gamma"], norm_bound=hp["S"])
    rows, _ = sent(attack, [page["X"], [0.0, 0.0], [0.01, 0.0]])
    check("model_replacement/norm_bound", u_mal=rows[0])
    row = reference.model_replacement(page["X"], hp["gamma"], hp["S"])
    check("model_replacement/norm_bound", u_mal=row)
    np.testing.assert_allclose(rows[1:], [[0.0, 0.0], [0.1, 0.0]], rtol=1e-6)


# Fang et al. on Krum ------------------------------------------------------------------


def fang_page(identifier):
    page = inputs(identifier)
    U, byzantine = np.array(page["U"], np.float32), np.array(page["byz"], bool)
    return jnp.array(U), jnp.array(byzantine), U[byzantine], U[~byzantine]


@pytest.mark.parametrize("identifier", ["fang_krum/full", "fang_krum/full_fails"])
def test_fang_krum(identifier):
    U, byzantine, own, honest = fang_page(identifier)
    f = options(identifier)["f"]
    everybody = jnp.ones(len(U), bool)
    found = jax.jit(against_all)(U, everybody, everybody, byzantine)
    attack = attacks.fang_krum(max_byzantine=f)
    attack.validate(len(U), 2)
    rows, _ = sent(attack, own, honest)
    info = aggregated(aggregators.krum(f), rows)[1]
    check(
        identifier,
        lambda0=found.first,
        lam=found.step,
        success=found.success,
        halvings=found.halvings,
        u_mal=rows[0],
        krum_index=jnp.argmax(info.weights),
    )
    row, step, first, success, halvings = reference.fang_krum(honest, own, f)
    check(
        identifier,
        lambda0=first,
        lam=step,
        success=success,
        halvings=halvings,
        u_mal=row,
    )


def test_fang_krum_bounds():
    page, hp = (f("fang_krum/bound_unsquared") for f in (inputs, options))
    B, n, c = jnp.array(page["B"]), hp["m"], hp["c"]
    for name, squared in (("squared", True), ("theorem1", False)):
        bound = first_step(
            pairwise_sq_distances(B),
            safe_norms(B),
            jnp.ones(len(B), bool),
            n - c - 2,
            n - 2 * c - 1,
            B.shape[1],
            squared,
        )
        check("fang_krum/bound_unsquared", **{name: bound})
        expected = reference.krum_bound(page["B"], n, c, squared=squared)
        check("fang_krum/bound_unsquared", **{name: expected})


def test_fang_krum_of_colluding_attackers():
    U, byzantine, own, honest = fang_page("fang_krum/partial")
    start = options("fang_krum/partial")["lam0"]
    found = jax.jit(against_own)(U, byzantine, initial=start)
    attack = attacks.fang_krum("colluding", initial=start)
    attack.validate(len(U), len(own))
    check(
        "fang_krum/partial",
        u_mal=crafted_row(attack, own, honest),
        lam=found.step,
        crafted_used=found.num_crafted,
        success=found.success,
    )
    row, step, used, success = reference.fang_krum_partial(own, initial=start)
    check("fang_krum/partial", u_mal=row, lam=step, crafted_used=used, success=success)


@pytest.mark.parametrize("squared", [True, False])
def test_fang_krum_equals_the_oracle(squared):
    """Random cohorts, some of them tight clouds far away where nothing succeeds."""
    n, c, d = 11, 4, 6
    everybody, byzantine = jnp.ones(n, bool), jnp.arange(n) < c

    def search(U):
        full = against_all(U, everybody, everybody, byzantine, squared=squared)
        own = against_own(U, byzantine, squared=squared)
        return full, own

    seeds = range(24)
    cohorts = [cohort(s, n, d, [1.0, 0.3, 0.03][s % 3]) for s in seeds]
    full, own = jax.jit(jax.vmap(search))(jnp.array(cohorts))
    outcomes = set()
    for i, U in enumerate(cohorts):
        honest, attackers = list(U[c:]), list(U[:c])
        row, _, first, success, halvings = reference.fang_krum(
            honest, attackers, squared=squared
        )
        np.testing.assert_allclose(full.first[i], first, rtol=1e-4)
        assert (full.success[i], full.halvings[i]) == (success, halvings)
        np.testing.assert_allclose(-full.step[i] * full.sign[i], row, rtol=1e-4)
        outcomes.add(success)
        row, _, used, success = reference.fang_krum_partial(attackers, squared=squared)
        assert (own.success[i], own.num_crafted[i]) == (success, used)
        np.testing.assert_allclose(-own.step[i] * own.sign[i], row, rtol=1e-6)
    assert outcomes == {True, False}


def test_krum_picks_what_fang_s_attackers_send():
    U = cohort(1, 15, 40)
    rows, _ = sent(attacks.fang_krum(max_byzantine=4), U[:4], U[4:])
    chosen = aggregated(aggregators.krum(4), rows)[0]
    np.testing.assert_array_equal(chosen, rows[0])
    before = aggregated(aggregators.krum(4), U)[0]
    np.testing.assert_array_equal(np.sign(chosen), -np.sign(before))


def test_fang_krum_of_huge_rows_and_of_any_number_of_attackers():
    U, everybody = jnp.array(cohort(2, 9, 5)), jnp.ones(9, bool)

    @jax.jit
    @jax.vmap
    def step(scale, count):
        found = against_all(scale * U, everybody, everybody, jnp.arange(9) < count)
        return found.step / scale, found.success

    steps, success = step(
        jnp.array([1.0, 1e18, 1.0, 1.0, 1.0]), jnp.array([3, 3, 0, 6, 9])
    )
    assert np.all(np.isfinite(steps))
    np.testing.assert_allclose(steps[1], steps[0], rtol=1e-3)
    assert success[0]
    assert success[1]


@pytest.mark.parametrize("c", [1, 2])
def test_two_colluding_attackers_cannot_play_krum(c):
    U = cohort(3, 9, 4)
    rows, _ = sent(attacks.fang_krum("colluding"), U[:c], U[c:])
    np.testing.assert_array_equal(rows, U)
    with pytest.raises(ValueError, match=f"num_byzantine >= 3.*num_byzantine={c}"):
        attacks.fang_krum("colluding").validate(9, c)


def test_fang_krum_validation():
    cases = [case for case in VALIDATION if case["algorithm"] == "fang_krum"]
    assert cases
    for case in cases:
        assert case["ok"]
        attacks.fang_krum().validate(case["args"]["n"], case["args"]["f"])
    with pytest.raises(ValueError, match="cohort_size=6, num_byzantine=2, f=2"):
        attacks.fang_krum().validate(6, 2)
    with pytest.raises(ValueError, match="a cohort of at least 8"):
        attacks.fang_krum(max_byzantine=1).validate(7, 5)
    attacks.fang_krum(max_byzantine=1).validate(8, 5)


# Fang et al. on the trimmed mean ------------------------------------------------------


def test_fang_trimmed_mean_examples():
    extremes = jax.jit(beyond_extremes)
    page, hp = (f("fang_trim/full") for f in (inputs, options))
    B, s, r = (jnp.array(page[name]) for name in "Bsr")
    everyone = jnp.ones(len(B), bool)
    row = extremes(B, everyone, s[None], r, hp["b"])
    check("fang_trim/full", u_mal=row)
    check("fang_trim/full", u_mal=reference.fang_trim(B, s, r, hp["b"]))

    page, hp = (f("fang_trim/zero_direction") for f in (inputs, options))
    B, s, r = (jnp.array(page[name]) for name in "Bsr")
    row = extremes(B, jnp.ones(len(B), bool), s[None], r, hp["b"])
    check("fang_trim/zero_direction", u_mal=row)
    check("fang_trim/zero_direction", u_mal=reference.fang_trim(B, s, r, hp["b"]))

    page = inputs("fang_trim/partial")
    S, s, r = (jnp.array(page[name]) for name in "Ssr")
    row = jax.jit(beyond_spread)(S, jnp.ones(len(S), bool), s[None], r)
    check("fang_trim/partial", u_mal=row)
    check("fang_trim/partial", u_mal=reference.fang_trim_partial(page["S"], s, r))


@pytest.mark.parametrize("case", ["update", "weights", "colluding"])
def test_fang_trimmed_mean_equals_the_oracle(case):
    U, w = cohort(4, 9, 8), cohort(5, 1, 8)[0]
    U[:, 3] = 0.0  # no direction
    key = jax.random.key(8)
    draws = np.asarray(uniform_rows(key, jnp.arange(9), U.shape[1]))[:3]
    s = np.sign((U[:3] if case == "colluding" else U).astype(np.float64).mean(axis=0))
    if case == "colluding":
        attack = attacks.fang_trimmed_mean(knowledge="colluding")
        expected = reference.fang_trim_partial(list(U[:3]), s, draws)
    else:
        attack = attacks.fang_trimmed_mean(1.5, space=case)
        offset = w if case == "weights" else 0 * w
        expected = reference.fang_trim(offset + U[3:], s, draws, 1.5) - offset
        expected[:, s == 0] = 0.0
    rows, _ = sent(attack, U[:3], U[3:], key=key, params=jnp.array(w))
    np.testing.assert_allclose(rows[:3], expected, rtol=1e-4, atol=1e-5)
    assert np.all((draws >= 0) & (draws < 1))
    assert len(np.unique(draws)) == draws.size


@pytest.mark.parametrize("rule", [aggregators.median(), aggregators.trimmed_mean(4)])
def test_fang_trimmed_mean_turns_the_rule_it_is_made_for(rule):
    U = cohort(6, 20, 200)
    rows, _ = sent(attacks.fang_trimmed_mean(), U[:4], U[4:])
    noisy, _ = sent(attacks.gaussian(std=5.0), U[:4], U[4:])
    honest = U[4:].mean(axis=0)

    def error(rows):
        return np.linalg.norm(aggregated(rule, rows)[0] - honest)

    assert error(rows) > 1.5 * error(noisy)


# Min-Max and Min-Sum ------------------------------------------------------------------

STEALTHY = [i for i in EXAMPLES if i.startswith(("minmax/", "minsum/"))]


def gamma_of(row, p, mean):
    return reference.length(np.asarray(row) - mean) / reference.length(p)


@pytest.mark.parametrize("knowledge", ["omniscient", "colluding"])
@pytest.mark.parametrize("identifier", STEALTHY)
def test_min_max_and_min_sum(identifier, knowledge):
    B, hp = inputs(identifier)["B"], options(identifier)
    kind, other = hp["perturbation"], [[50.0, -50.0]]
    own, honest = (B, other) if knowledge == "colluding" else (other, B)
    if identifier.startswith("minmax/"):
        attack = attacks.min_max(kind, knowledge)
        expected, gamma = reference.min_max(B, kind)
    else:
        attack = attacks.min_sum(kind, knowledge, hp["rule"])
        expected, gamma = reference.min_sum(B, kind, hp["rule"])
    row = crafted_row(attack, own, honest)
    mean, p = np.mean(B, axis=0), reference.perturbation(B, kind)
    for found in (row, expected):
        check(identifier, u_mal=found, p=p)
        names = EXAMPLES[identifier]["expected"]
        if "gamma" in names:
            check(identifier, gamma=gamma_of(found, p, mean))
        if "max_dist_mal" in names:
            furthest = max(reference.distance(found, u) for u in B)
            widest = max(reference.distance(u, v) for u in B for v in B)
            check(identifier, max_dist_mal=furthest, max_dist_benign=widest)
        if "bound" in names:
            pick = {"max": max, "min": min}[hp["rule"]]
            bound = pick(reference.sum_sq(u, B) for u in B)
            check(identifier, sum_sq_mal=reference.sum_sq(found, B), bound=bound)
    if gamma:
        check(identifier, gamma=gamma)


@pytest.mark.parametrize("perturbation", ["unit", "sign", "std"])
@pytest.mark.parametrize("scale", [1e-25, 1e-3, 1.0, 1e17])
def test_min_max_keeps_within_its_bound_at_every_scale(perturbation, scale):
    U = cohort(7, 14, 30)
    attack = attacks.min_max(perturbation)
    row = np.asarray(crafted_row(attack, scale * U[:3], scale * U[3:]), np.float64)
    row, B = row / scale, U[3:].astype(np.float64)
    furthest = max(reference.distance(row, u) for u in B)
    widest = max(reference.distance(u, v) for u in B for v in B)
    np.testing.assert_allclose(furthest, widest, rtol=1e-5)
    np.testing.assert_allclose(row, reference.min_max(B, perturbation)[0], rtol=1e-4)


@pytest.mark.parametrize("rule", ["max", "min"])
def test_min_sum_reaches_its_bound_far_from_the_origin(rule):
    """Rows that share an offset a thousand times their spread."""
    U = 100.0 + 0.1 * cohort(8, 12, 50)
    row = crafted_row(attacks.min_sum("sign", rule=rule), U[:2], U[2:])
    B = list(U[2:].astype(np.float64))
    bound = {"max": max, "min": min}[rule](reference.sum_sq(u, B) for u in B)
    np.testing.assert_allclose(reference.sum_sq(row, B), bound, rtol=1e-3)


@pytest.mark.parametrize("make", [attacks.min_max, attacks.min_sum])
def test_among_alike_rows_the_stealthy_send_the_mean(make):
    honest = np.tile(np.float32([1.0, -2.0, 0.5]), (4, 1))
    for perturbation in ("unit", "sign", "std"):
        row = crafted_row(make(perturbation), np.ones((2, 3)), honest)
        np.testing.assert_allclose(row, honest[0], rtol=1e-6)


# FLTrust's adaptive attack ------------------------------------------------------------


def goal_of(page):
    """The goal of the only attacker of the example."""
    g0 = np.array(page["g0"])
    honest = [reference.unit(u) for u in page["honest"]]
    trust = [max(float(e @ reference.unit(g0)), 0.0) for e in honest]
    s = np.array(page["s"])
    along = sum(t * float(s @ e) for t, e in zip(trust, honest))
    return Goal(
        jnp.array(reference.unit(g0), jnp.float32),
        jnp.float32(reference.length(g0)),
        jnp.array(s, jnp.float32),
        jnp.float32(sum(trust)),
        jnp.float32(along),
    )


def test_fltrust_adaptive_step():
    identifier = "fltrust_adaptive/one_step"
    page, hp = (f(identifier) for f in (inputs, options))
    gamma, eta = hp["gamma"], hp["eta"]
    goal, u = goal_of(page), jnp.array(page["u"], jnp.float32)
    e = jnp.array(page["e_init"][0], jnp.float32)
    change = gamma * goal.root @ u, gamma * goal.sign @ u
    gain = rise(goal, goal.root @ e, goal.sign @ e, *change)
    new = climb(e, goal, u, gamma, eta)
    check(identifier, grad=gain / gamma * u, e_new=new, u_mal=goal.length * new)
    np.testing.assert_array_equal(climb(e, goal, u, gamma, eta, improving=True), new)

    g0, s = np.array(page["g0"]), np.array(page["s"])
    honest = [reference.unit(x) for x in page["honest"]]
    own = [reference.unit(x) for x in page["own"]]
    before = reference.fltrust_of_units([*honest, *own], g0)
    start = [np.array(page["e_init"][0])]
    new, gradient = reference.adaptive_step(
        start, 0, honest, g0, s, before, np.array(page["u"]), gamma, eta
    )
    check(
        identifier,
        g_before=before,
        h0=reference.adaptive_h(start, honest, g0, s, before),
        grad=gradient,
        e_new=new,
        h1=reference.adaptive_h([new], honest, g0, s, before),
        u_mal=reference.length(g0) * new,
    )


def test_rise_is_the_difference_of_h_even_where_trust_begins_or_ends():
    rng = np.random.default_rng(0)
    for _ in range(200):
        trust, cosine, b = rng.choice([0.0, 1.0]), *rng.normal(size=2)
        along = trust * rng.normal()
        changes = rng.normal(size=2)
        goal = Goal(jnp.ones(1), jnp.float32(3.0), jnp.ones(1), trust, along)

        def value(c, b, trust=trust, along=along):
            total = trust + max(c, 0)
            return -3 * (along + max(c, 0) * b) / total if total > 0 else 0.0

        expected = value(cosine + changes[0], b + changes[1]) - value(cosine, b)
        got = rise(goal, *(jnp.float32(x) for x in (cosine, b, *changes)))
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def trusting(seed=9, n=10, d=12):
    """Honest and root updates that point much the same way."""
    U = 1.0 + 0.7 * cohort(seed, n, d)
    return U, np.float32(1.0 + 0.2 * cohort(seed + 1, 1, d)[0])


@pytest.mark.parametrize("start", ["trim", "own"])
def test_fltrust_adaptive_equals_the_oracle(start):
    U, g0 = trusting()
    c, passes, steps, d = 3, 2, 3, len(g0)
    key = jax.random.key(11)
    attack = attacks.fltrust_adaptive(passes=passes, steps=steps, start=start)
    rows, _ = sent(attack, U[:c], U[c:], key=key, root_update=jnp.array(g0))
    key_start, key_search = jax.random.split(key)
    draws = [
        [
            [
                np.sqrt(0.5)
                * np.asarray(
                    search_direction(
                        jax.random.fold_in(key_search, i), v * steps + q, d
                    ),
                    np.float64,
                )
                for q in range(steps)
            ]
            for i in range(c)
        ]
        for v in range(passes)
    ]
    if start == "trim":
        r = np.asarray(uniform_rows(key_start, jnp.arange(len(U)), U.shape[1]))
        begin = reference.fang_trim(U[c:], np.sign(U.mean(axis=0)), r[:c])
    else:
        begin = U[:c]
    expected = reference.fltrust_adaptive(begin, U[c:], U[:c], g0, draws)
    moved = np.linalg.norm(
        expected / reference.length(g0) - [reference.unit(u) for u in begin]
    )
    assert moved > 0.01
    np.testing.assert_allclose(rows[:c], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("start", ["trim", "own"])
def test_fltrust_adaptive_turns_the_aggregate_and_keeps_its_trust(start):
    U, g0 = trusting(n=12, d=20)
    rule, c = aggregators.fltrust(), 5
    rate = {"trim": 0.01, "own": 0.1}[start]
    attack = attacks.fltrust_adaptive(rate=rate, start=start, improving=True)
    rows, _ = sent(attack, U[:c], U[c:], root_update=jnp.array(g0))
    honest = U[c:].mean(axis=0)
    before, after = (aggregated(rule, x, root_update=jnp.array(g0)) for x in (U, rows))
    assert np.all(after[1].details["trust"][:c] > 0)
    cosines = [rules.cosine(x[0], honest) for x in (before, after)]
    assert cosines[1] < cosines[0] - 0.01
    # Rows are sent at the length of the root update.
    np.testing.assert_allclose(safe_norms(rows[:c]), reference.length(g0), rtol=1e-5)


def test_fltrust_adaptive_without_a_root_update_to_turn():
    U, g0 = trusting()
    for bad in (0.0 * g0, np.inf * g0):
        rows, _ = sent(
            attacks.fltrust_adaptive(), U[:3], U[3:], root_update=jnp.array(bad)
        )
        np.testing.assert_array_equal(rows, U)


# Mimic --------------------------------------------------------------------------------


def mimic_page(identifier, monkeypatch):
    page, hp = (f(identifier) for f in (inputs, options))
    state_in = EXAMPLES[identifier]["state_in"]
    z = page.get("z_init", state_in.get("z"))
    monkeypatch.setattr(
        module("mimic"), "initial_direction", lambda key, size: jnp.array(z)
    )
    start = MimicState(
        jnp.array(state_in.get("mu", [0.0, 0.0])),
        jnp.array(state_in.get("z", [0.0, 0.0])),
        jnp.int32(state_in["t"]),
        jnp.int32(-1),
    )
    return page["B"], hp["warmup"], start, z


@pytest.mark.parametrize("identifier", ["mimic/t0", "mimic/t1"])
def test_mimic(identifier, monkeypatch):
    B, warmup, start, z = mimic_page(identifier, monkeypatch)
    rows, state = sent(attacks.mimic(warmup), [[7.0, 7.0]], B, state=start)
    check(
        identifier,
        u_mal=rows[0],
        target=state.target - 1,  # the attacker is client 0
        mu=state.mean,
        z=state.direction,
    )
    assert state.rounds == start.rounds + 1
    mu, z = reference.mimic_learn(B, int(start.rounds), start.mean, z)
    target = reference.mimic_choice(B, z)
    check(identifier, u_mal=B[target], target=target, mu=mu, z=z)


@pytest.mark.parametrize("criterion", ["argmax", "argmin"])
def test_mimic_picks_the_same_client_after_the_warm_up(criterion):
    """Rounds of sampled cohorts; clients differ by a persistent offset of their own."""
    n, k, d, warmup = 12, 9, 10, 4
    rng = np.random.default_rng(12)
    offsets = 2.0 * rng.normal(size=(n, d))
    byzantine = np.isin(np.arange(n), [1, 5, 8])
    attack = attacks.mimic(warmup, criterion)
    state = attack.init(jnp.zeros(d), n)
    apply = jax.jit(attack.apply)
    z, mu, target = None, None, None
    seen = {"there": 0, "absent": 0}
    for t in range(14):
        ids = rng.permutation(n)[:k]
        U = np.float32(offsets[ids] + 0.5 * rng.normal(size=(k, d)))
        key = jax.random.fold_in(jax.random.key(0), t)
        context = RoundContext(
            key=key, client_ids=jnp.array(ids), byzantine=jnp.array(byzantine[ids])
        )
        rows, state = apply(jnp.array(U), state, context)
        honest = [i for i in range(k) if not byzantine[ids[i]]]
        B = [U[i] for i in honest]
        if t < warmup:
            z = np.asarray(initial_direction(key, d)) if t == 0 else z
            mu, z = reference.mimic_learn(B, t, mu, z)
        choice = ids[honest[reference.mimic_choice(B, z, criterion)]]
        if t < warmup:
            target = choice
        there = target in ids[honest]
        if t >= warmup:
            seen["there" if there else "absent"] += 1
        copied = list(ids).index(target if there else choice)
        assert state.target == target
        for i in range(k):
            wanted = U[copied] if byzantine[ids[i]] else U[i]
            np.testing.assert_array_equal(rows[i], wanted)
        np.testing.assert_allclose(state.direction, z, rtol=1e-3, atol=1e-4)
    assert state.rounds == warmup
    assert min(seen.values()) > 0


def test_mimic_learns_nothing_where_no_honest_row_is_known():
    U = cohort(13, 4, 3)
    attack = attacks.mimic(3)
    rows, state = sent(attack, U)
    np.testing.assert_array_equal(rows, U)
    assert (int(state.rounds), int(state.target)) == (0, -1)


def test_mimic_in_float32():
    """Directions of rows whose squares leave float32 are those of the rows scaled."""
    U = cohort(14, 8, 6)
    state = attacks.mimic().init(jnp.zeros(6), 8)
    plain, large = (
        sent(attacks.mimic(), scale * U[:2], scale * U[2:], state=state)[1]
        for scale in (1.0, 2.0**60)
    )
    np.testing.assert_allclose(large.direction, plain.direction, rtol=1e-3, atol=1e-5)


# The line search, and the attacks that use it -----------------------------------------

SCAPES = {
    "peak": lambda x: -((x - 3.3) ** 2),
    "at the start": lambda x: -x,
    "near 0": lambda x: -((x - 0.07) ** 2),
    "far": lambda x: -abs(x - 900.0),
    "two peaks": lambda x: -abs(x - 1.2) * abs(x - 5.0),
    "step": lambda x: 1.0 * (x < 2.6) * x,
    "flat": lambda x: 0.0 * x,
}


@pytest.mark.parametrize("name", SCAPES)
def test_line_search_equals_the_oracle_trial_by_trial(name):
    """The best after every number of trials tells each trial that was better."""
    scape = SCAPES[name]
    found = jax.jit(
        jax.vmap(lambda evals: line_maximize(lambda x: jnp.float32(scape(x)), evals))
    )(jnp.arange(1, 31))
    for i, (x, y) in enumerate(zip(*found)):
        best_x, best_y, tried = reference.line_maximize(scape, i + 1)
        assert len(tried) == i + 1
        np.testing.assert_allclose([x, y], [best_x, best_y], rtol=1e-4, atol=1e-5)


def test_line_search_visits_what_the_oracle_visits():
    with jax.disable_jit():
        visited = []

        def scape(x):
            visited.append(float(x))
            return -((x - 3.3) ** 2)

        line_maximize(scape, 16, 0.5, 0.75, 0.7)
    tried = reference.line_maximize(SCAPES["peak"], 16, 0.5, 0.75, 0.7)[2]
    np.testing.assert_allclose(visited, tried, rtol=1e-4)


@pytest.mark.parametrize("peak", [0.0, 0.4, 1.0, 7.7, 300.0])
def test_line_search_finds_the_maximum_of_concave_functions(peak):
    x, _ = line_maximize(lambda x: -jnp.abs(x - peak), evals=60)
    np.testing.assert_allclose(x, peak, atol=0.01 + 1e-3 * peak)


def test_line_search_never_takes_what_is_no_number():
    x, y = line_maximize(lambda x: jnp.where(x > 2.0, jnp.nan, x))
    assert 1.0 <= x <= 2.0
    assert y == x
    x, y = line_maximize(lambda x: x * jnp.nan, start=1.5)
    assert (x, y) == (1.5, -np.inf)


def real_rule(rule, **context):
    """The server's rule as an attacker may try it out."""
    return jax.jit(lambda U: rule.apply(U, (), RoundContext(**context))[0])


@pytest.mark.parametrize("trim", [1, 3])
@pytest.mark.parametrize("name", ["alie", "ipm"])
def test_optimal_attacks_equal_the_oracle(name, trim):
    U = cohort(15, 11, 7)
    rule = aggregators.trimmed_mean(trim)
    make, oracle = (
        (attacks.optimal_alie, reference.optimal_alie)
        if name == "alie"
        else (attacks.optimal_ipm, reference.optimal_ipm)
    )
    row = crafted_row(make(), U[:3], U[3:], aggregate=real_rule(rule))
    expected = oracle(U[3:], 3, lambda rows: rules.trimmed_mean(rows, trim).aggregate)
    np.testing.assert_allclose(row, expected, rtol=1e-4, atol=1e-5)


GRID = [0.1, 0.3, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0]
PAIRS = {
    "ipm on trimmed mean": (attacks.optimal_ipm, attacks.ipm, "trimmed_mean"),
    "alie on trimmed mean": (
        attacks.optimal_alie,
        lambda z: attacks.alie(z, knowledge="omniscient"),
        "trimmed_mean",
    ),
    "alie on krum": (
        attacks.optimal_alie,
        lambda z: attacks.alie(z, knowledge="omniscient"),
        "krum",
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_optimal_attacks_hurt_as_much_as_any_fixed_strength(name):
    optimal, fixed, rule = PAIRS[name]
    rule = real_rule(getattr(aggregators, rule)(4))
    U = cohort(16, 20, 30)
    honest = U[4:].mean(axis=0)

    def error(rows):
        return float(np.linalg.norm(rule(rows) - honest))

    best = error(sent(optimal(evals=30), U[:4], U[4:], aggregate=rule)[0])
    context = RoundContext(byzantine=jnp.arange(20) < 4)
    apply = jax.jit(fixed(1.0).apply)
    harm = [error(apply(jnp.array(U), jnp.float32(x), context)[0]) for x in GRID]
    assert best >= max(harm) - 1e-5
    assert best > 1.01 * min(harm)


def test_optimal_attacks_know_what_the_server_throws_away():
    """A mean grows with the strength for ever; a row beyond float32 has none."""
    U = 1e16 * cohort(17, 6, 4)
    rule = aggregators.fedavg()
    server = real_rule(rule, num_samples=jnp.ones(6))
    rows, _ = sent(attacks.optimal_ipm(evals=25), U[:1], U[1:], aggregate=server)
    assert np.isfinite(np.sum(np.square(rows[0])))
    info = aggregated(rule, rows, num_samples=jnp.ones(6))[1]
    assert not info.flagged[0]
    assert safe_norms(rows[0]) > 100 * safe_norms(jnp.array(U[0]))


# Shared -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attack", "own"),
    [
        # Rows of their own that tell the attackers nothing: so far away that Krum picks
        # an honest one, or zero and therefore without FLTrust's trust.
        (attacks.alie(knowledge="omniscient"), 50.0),
        (attacks.fang_krum(), 50.0),
        (attacks.fang_krum(max_byzantine=3), 50.0),
        (attacks.optimal_alie(), 50.0),
        (attacks.optimal_ipm(), 50.0),
        (attacks.fltrust_adaptive(start="own", passes=2), 0.0),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_attackers_whose_training_diverged_count_by_what_they_send(attack, own):
    U = cohort(18, 11, 6) + 0.5
    context = {
        "key": jax.random.key(0),
        "client_ids": jnp.arange(11),
        "root_update": jnp.ones(6),
        "aggregate": real_rule(aggregators.trimmed_mean(3)),
    }
    rows = [
        sent(attack, np.full((3, 6), value, np.float32), U[3:], **context)[0]
        for value in (own, np.nan)
    ]
    np.testing.assert_allclose(rows[1][:3], rows[0][:3], rtol=1e-5)
    assert np.linalg.norm(rows[1][0]) > 1e-3
    # One that the round leaves out does not count.
    mask = jnp.arange(11) != 0
    left_out = sent(
        attack, np.full((3, 6), np.nan, np.float32), U[3:], mask=mask, **context
    )[0]
    assert np.all(np.isfinite(left_out[1:3]))


def test_norms_and_units_at_every_scale():
    x = cohort(18, 5, 7)
    for scale in (1e-30, 1.0, 1e30):
        rows = jnp.array(scale * x, jnp.float32)
        expected = np.linalg.norm(x.astype(np.float64), axis=1)
        np.testing.assert_allclose(safe_norms(rows) / scale, expected, rtol=1e-5)
        np.testing.assert_allclose(
            unit_rows(rows), x / expected[:, None], rtol=1e-5, atol=1e-7
        )
    assert unit_rows(jnp.zeros(3)).tolist() == [0.0, 0.0, 0.0]


def test_crafted_rows_of_one_score_tie_to_the_lowest_index():
    """What the search on Krum counts on."""
    U = jnp.array([[1.0], [1.0], [0.0], [5.0], [9.0]])
    scores = krum_scores(pairwise_sq_distances(U), jnp.ones(5, bool), 1)
    assert jnp.argmin(scores) == 0


def test_every_example_of_these_attacks_is_used():
    ours = {"B3", "B4", "B5", "B9", "B13", "B14", "B15", "B16", "B17", "B18", "B19"}
    found = {i for i, e in EXAMPLES.items() if e["section"] in ours}
    used = {"additive/basic", "same_value/weights", "same_value/update"}
    used |= {f"free_rider/{name}" for name in ("zero", "delta")}
    used |= {
        f"model_replacement/{name}"
        for name in ("gamma", "mean_recovers_X", "norm_bound")
    }
    used |= {
        f"fang_krum/{name}"
        for name in ("full", "full_fails", "bound_unsquared", "partial")
    }
    used |= {f"fang_trim/{name}" for name in ("full", "partial", "zero_direction")}
    used |= {"fltrust_adaptive/one_step", "mimic/t0", "mimic/t1", *STEALTHY}
    assert found == used
