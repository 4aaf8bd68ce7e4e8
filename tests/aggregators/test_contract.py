"""What every rule promises: one test of each promise over the whole table."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim.aggregators import PRE_AGGREGATORS, REGISTRY
from fedjax_sim.types import RoundContext
from tests.aggregators.cases import (
    CASES,
    DISTINCT,
    KINDS,
    NUM_CLIENTS,
    D,
    F,
    N,
    attacked,
    cohort,
    compiled,
    context,
    start,
)

every_rule = pytest.mark.parametrize("name", DISTINCT)
# For the two tests that compile each rule anew: no two of the same structure.
every_structure = pytest.mark.parametrize(
    "name",
    [
        "fedavg-total",
        "median",
        "trimmed_mean",
        "krum",
        "multi_krum-weighted",
        "multi_krum-iterative",
        "fltrust",
        "dual_system",
        "dual_system-trust_then_filter",
        "dual_system-soft",
        "dual_system-dynamic_trust",
        "dual_system-gated_mean",
        "mda",
        "caf",
        "smea",
        "monna-pivot",
        "chain-nnm-trimmed_mean",
        "chain-nnm-bucketing-clipping-fltrust",
        "meamed",
        "geometric_median",
        "centered_clipping",
        "robust_learning_rate-median",
        "crfl",
        "foolsgold",
        "auror-vote",
        "mad",
        "dnc",
        "signguard-cosine",
        "flame",
        "fldetector",
        "pdrr",
        "pdrr-median",
        "lfr-trimmed_mean",
        "err_lfr",
        "vae_detector-count",
        "dagmm_detector-quantile",
    ],
)


def tree(U, dtype=jnp.float32):
    """``[..., D]`` as a pytree of two leaves, in the order of ``ravel``."""
    U = jnp.asarray(U)
    kernel = U[..., 3:].reshape(*U.shape[:-1], 4, 5)
    return {"bias": U[..., :3].astype(dtype), "kernel": kernel.astype(jnp.float32)}


def flat(tree):
    return np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(tree)])


def assert_same(one, other, **tolerance):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, **tolerance)


def test_table_covers_the_registry():
    assert {name.split("-")[0] for name in CASES} == {*REGISTRY, "chain"}
    for name, factory in REGISTRY.items():
        assert factory.__name__ == name
        rule = CASES[name].make(F)
        assert rule.name == name
        assert rule.needs <= set(RoundContext._fields)
        case = CASES[name]
        assert ("root_update" in rule.needs) == (case.trust or case.root)
        assert ("root_scores" in rule.needs) == case.scored
        assert (rule.pretrain is not None) == case.pretrained


def test_table_covers_the_steps_before_a_rule():
    chains = {name: name.split("-")[1:] for name in CASES if name.startswith("chain-")}
    assert set(PRE_AGGREGATORS) <= {step for steps in chains.values() for step in steps}
    for name, factory in PRE_AGGREGATORS.items():
        assert factory.__name__ == name
    for name, steps in chains.items():
        assert CASES[name].make(F).name == "+".join(steps)


@every_rule
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_structure_and_dtypes(name, dtype):
    rule = CASES[name].make(F)
    U, g0, sizes = cohort(0, N, D)
    params = tree(g0, dtype)
    state = jax.eval_shape(lambda: start(rule, params))
    aggregate, new_state, info = jax.eval_shape(
        rule.apply, tree(U, dtype), state, context(params, sizes=sizes)
    )
    shapes = functools.partial(jax.tree.map, lambda x: (x.shape, x.dtype))
    assert shapes(aggregate) == shapes(params)
    assert shapes(new_state) == shapes(state)
    assert shapes(tuple(info[:3])) == (
        ((N,), jnp.float32),
        ((N,), jnp.bool_),
        ((N,), jnp.float32),
    )
    assert all(x.shape == (N,) for x in info.details.values())
    only_bfloat16 = jax.eval_shape(
        rule.apply,
        jnp.asarray(U, jnp.bfloat16),
        state,
        context(jnp.asarray(g0, jnp.bfloat16), sizes=sizes),
    )
    assert only_bfloat16[0].dtype == jnp.bfloat16


@every_structure
def test_jit_equals_eager_and_pytree_equals_array(name):
    U, g0, sizes = cohort(1, N, D)
    one, info = compiled(name)(U, g0, sizes=sizes)
    rule = CASES[name].make(F)
    # What was learned is of the raveled model.
    learned = compiled(name).state if CASES[name].pretrained else None
    state = rule.init(tree(g0), NUM_CLIENTS) if learned is None else learned
    other, _, other_info = rule.apply(tree(U), state, context(tree(g0), sizes=sizes))
    assert jax.tree.structure(other) == jax.tree.structure(tree(g0))
    assert_same((one, info), (flat(other), other_info), rtol=1e-5, atol=1e-6)


@every_structure
def test_scan_over_rounds_and_vmap_over_seeds_equal_loops(name):
    rule = CASES[name].make(F)
    state = compiled(name).state
    data = [[cohort(10 * seed + t, N, D)[:2] for t in range(3)] for seed in range(2)]
    updates, roots = (np.array([[x[i] for x in row] for row in data]) for i in (0, 1))
    traces = []

    def one_round(state, inputs):
        traces.append(None)
        this = context(inputs[1], sizes=jnp.ones(N))
        aggregate, state, info = rule.apply(inputs[0], state, this)
        return state, (aggregate, info)

    def one_seed(updates, roots):
        return jax.lax.scan(one_round, state, (updates, roots))[1]

    aggregates, infos = jax.jit(jax.vmap(one_seed))(updates, roots)
    assert len(traces) == 1
    if CASES[name].stateful:
        return  # a rule with a memory: its own test follows it round by round
    for seed in range(2):
        for t in range(3):
            one, info = compiled(name)(updates[seed, t], roots[seed, t])
            this = jax.tree.map(lambda x, s=seed, t=t: x[s, t], infos)
            assert_same((aggregates[seed, t], this), (one, info), rtol=1e-4, atol=1e-5)


@every_rule
def test_info(name):
    """Weights sum to one or to nothing, and combine the rows into the aggregate."""
    for seed in range(5):
        U, g0, sizes = cohort(seed, N, D)
        mask = np.arange(N) != seed
        aggregate, info = compiled(name)(U, g0, mask, sizes)
        assert info.flagged[seed]
        assert info.scores[seed] == np.inf
        assert info.weights[seed] == 0
        assert np.all(info.weights >= 0)
        assert not np.any(np.asarray(info.weights)[np.asarray(info.flagged)])
        np.testing.assert_allclose(info.weights.sum(), float(info.weights.any()), 1e-5)
        if CASES[name].linear:
            rows = U
            if CASES[name].linear == "rescaled":
                norms = np.linalg.norm(U, axis=1, keepdims=True)
                rows = U / norms * np.linalg.norm(g0)
            if info.weights.any():
                np.testing.assert_allclose(
                    aggregate, info.weights @ rows, rtol=1e-4, atol=1e-5
                )


@every_rule
def test_who_is_byzantine_makes_no_difference(name):
    U, g0, sizes = cohort(2, N, D)
    one = compiled(name)(U, g0, sizes=sizes, byzantine=np.arange(N) < F)
    other = compiled(name)(U, g0, sizes=sizes, byzantine=np.arange(N) > F)
    assert_same(one, other, rtol=0)


@every_rule
def test_what_a_masked_row_holds_makes_no_difference(name):
    U, g0, sizes = cohort(3, N, D)
    mask = np.arange(N) != N - 1
    one = compiled(name)(U, g0, mask, sizes)
    for kind in KINDS:
        other = compiled(name)(attacked(U, 1, kind), g0, mask, sizes)
        assert_same(one, other, rtol=0)


@every_rule
def test_row_that_is_not_finite_is_a_masked_row(name):
    U, g0, sizes = cohort(3, N, D)
    one = compiled(name)(U, g0, np.arange(N) < N - F, sizes)
    for kind in ("inf", "nan", "overflow"):
        other = compiled(name)(attacked(U, F, kind), g0, sizes=sizes)
        assert_same(one, other, rtol=0)


@pytest.mark.parametrize("name", [n for n in DISTINCT if CASES[n].permutation])
def test_permuting_clients_permutes_the_info(name):
    U, g0, sizes = cohort(4, N, D)
    order = np.random.default_rng(0).permutation(N)
    aggregate, info = compiled(name)(U, g0, sizes=sizes)
    permuted, permuted_info = compiled(name)(U[order], g0, sizes=sizes[order])
    np.testing.assert_allclose(permuted, aggregate, rtol=1e-4, atol=1e-5)
    expected = jax.tree.map(lambda x: x[order], info)
    assert_same(permuted_info, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in DISTINCT if CASES[n].scale])
def test_scaling_everything_scales_the_aggregate(name):
    U, g0, sizes = cohort(5, N, D)
    aggregate, info = compiled(name)(U, g0, sizes=sizes)
    scaled, scaled_info = compiled(name)(4 * U, 4 * g0, sizes=sizes)
    np.testing.assert_allclose(scaled, 4 * aggregate, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(scaled_info.weights, info.weights, 1e-5, 1e-6)


@pytest.mark.parametrize("name", [n for n in DISTINCT if CASES[n].translation])
def test_translating_the_updates_translates_the_aggregate(name):
    U, g0, sizes = cohort(6, N, D)
    shift = np.linspace(-2, 2, D).astype(np.float32)
    aggregate, info = compiled(name)(U, g0, sizes=sizes)
    moved, moved_info = compiled(name)(U + shift, g0, sizes=sizes)
    np.testing.assert_allclose(moved, aggregate + shift, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(moved_info.weights, info.weights, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in DISTINCT if CASES[n].linear == "rescaled"])
def test_length_of_an_update_does_not_matter_to_trust(name):
    if "raw" in name:
        pytest.skip("the filter looks at lengths")
    U, g0, sizes = cohort(6, N, D)
    lengths = np.logspace(-3, 3, N, dtype=np.float32)[:, None]
    one, _ = compiled(name)(U, g0, sizes=sizes)
    other, _ = compiled(name)(lengths * U, g0, sizes=sizes)
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in DISTINCT if CASES[n].identical])
def test_identical_updates_return_that_update(name):
    update = cohort(7, N, D)[0][0]
    aggregate, info = compiled(name)(np.tile(update, (N, 1)), update)
    expected = update * N / NUM_CLIENTS if name == "fedavg-total" else update
    np.testing.assert_allclose(aggregate, expected, rtol=1e-5, atol=1e-6)
    if CASES[name].coordinate_wise:
        np.testing.assert_allclose(info.weights, np.full(N, 1 / N), rtol=1e-5)


@pytest.mark.parametrize("name", [n for n in DISTINCT if CASES[n].zero])
def test_zero_updates_give_zero(name):
    zero = np.zeros((N, D))
    root = cohort(7, N, D)[1]
    assert np.all(compiled(name)(zero, 0 * root)[0] == 0)
    if name != "dual_system-root":
        aggregate, info = compiled(name)(zero, root)
        assert np.all(aggregate == 0)
        assert info.weights.any() != CASES[name].trust


@every_rule
def test_nobody_left_gives_zero(name):
    U, g0, sizes = cohort(8, N, D)
    aggregate, info = compiled(name)(U, g0, np.zeros(N, bool), sizes)
    expected = g0 if name == "dual_system-root" else np.zeros(D)
    np.testing.assert_array_equal(aggregate, expected)
    assert not info.weights.any()
    assert info.flagged.all()
    assert np.all(info.scores == np.inf)


@pytest.mark.parametrize("name", [n for n in DISTINCT if CASES[n].robust])
@pytest.mark.parametrize("kind", KINDS)
def test_arbitrary_rows_do_not_move_the_aggregate_far(name, kind):
    U, g0, sizes = cohort(9, N, D)
    honest = U[: N - F]
    aggregate, info = compiled(name)(attacked(U, F, kind), g0, sizes=sizes)
    assert np.all(np.isfinite(aggregate))
    if CASES[name].coordinate_wise:
        assert np.all(aggregate >= honest.min(axis=0) - 1e-5)
        assert np.all(aggregate <= honest.max(axis=0) + 1e-5)
    elif CASES[name].linear == "rescaled":
        assert np.linalg.norm(aggregate) <= np.linalg.norm(g0) * (1 + 1e-5)
    elif CASES[name].bound is not None:
        longest = np.linalg.norm(honest, axis=1).max()
        assert np.linalg.norm(aggregate) <= CASES[name].bound * longest
    elif kind not in ("collude", "zero"):
        assert not info.weights[N - F :].any()
        assert np.abs(aggregate).max() <= np.abs(honest).max() * (1 + 1e-5)


@pytest.mark.parametrize(
    ("name", "n"),
    [
        ("fedavg", 1),
        ("median", 1),
        ("trimmed_mean", 1),
        ("fltrust", 1),
        ("krum", 3),
        ("multi_krum", 3),
        ("multi_krum-iterative", 3),
        ("dual_system", 3),
        ("meamed", 1),
        ("phocas", 1),
        ("geometric_median", 1),
        ("norm_clipping-median", 1),
    ],
)
def test_smallest_cohorts(name, n):
    rule = CASES[name].make(0)
    rule.validate(n)
    U = np.arange(1, 2 * n + 1, dtype=np.float32).reshape(n, 2)
    aggregate, _, info = jax.jit(rule.apply)(U, (), context(U[0]))
    np.testing.assert_allclose(info.weights.sum(), 1, rtol=1e-6)
    assert np.count_nonzero(info.weights) == 1  # all that krum's m leaves of three
    chosen = U[np.argmax(info.weights)]
    if CASES[name].trust:
        chosen = chosen / np.linalg.norm(chosen) * np.linalg.norm(U[0])
    np.testing.assert_allclose(aggregate, chosen, rtol=1e-5)


def sorts(function, *args):
    """Whether any sorting primitive is left in the function, at any depth."""
    jaxpr = str(jax.make_jaxpr(function)(*args))
    return re.search(r"\b(sort|top_k|approx_top_k)\[", jaxpr) is not None


@pytest.mark.parametrize(
    "name",
    [
        *(n for n in CASES if CASES[n].coordinate_wise),
        "meamed",
        "phocas",
        "robust_learning_rate-median",
    ],
)
def test_coordinate_wise_rules_do_not_sort(name):
    U = jnp.ones((N, 5000))
    assert sorts(jax.jit(lambda U: jnp.sort(U, axis=0)), U)
    assert not sorts(CASES[name].make(F).apply, U, (), RoundContext())
