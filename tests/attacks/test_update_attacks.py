"""One contract for every update attack, and what is particular to each."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim import aggregators, attacks
from fedjax_sim.attacks.alie import z_max
from fedjax_sim.attacks.mimic import initial_direction
from fedjax_sim.attacks.rows import std_over
from fedjax_sim.types import RoundContext
from tests.references import attacks as reference
from tests.references import crafted

# What is built: the factory and its options.
MADE = {
    "sign_flip": (attacks.sign_flip, {"scale": 2.0}),
    "sign_flip weights": (attacks.sign_flip, {"space": "weights"}),
    "scaling": (attacks.scaling, {"factor": 10.0}),
    "gaussian": (attacks.gaussian, {"mean": 0.5, "std": 2.0}),
    "gaussian fitted": (attacks.gaussian, {"mode": "fitted"}),
    "ipm": (attacks.ipm, {"epsilon": 0.7}),
    "ipm colluding": (attacks.ipm, {"epsilon": 0.7, "knowledge": "colluding"}),
    "alie": (attacks.alie, {}),
    "alie z": (attacks.alie, {"z": 1.5}),
    "alie omniscient": (
        attacks.alie,
        {"direction": -1, "ddof": 1, "knowledge": "omniscient"},
    ),
    "additive_noise": (attacks.additive_noise, {}),
    "same_value": (attacks.same_value, {}),
    "same_value update": (attacks.same_value, {"value": -0.5, "space": "update"}),
    "inf_rows": (attacks.inf_rows, {"sign": -1}),
    "nan_rows": (attacks.nan_rows, {}),
    "free_rider": (attacks.free_rider, {}),
    "free_rider delta": (attacks.free_rider, {"mode": "delta_weights"}),
    "free_rider noisy": (attacks.free_rider, {"mode": "noisy", "decay": 0.5}),
    "model_replacement": (attacks.model_replacement, {"server_rate": 0.5}),
    "model_replacement bound": (
        attacks.model_replacement,
        {"scale": 4.0, "norm_bound": 30.0},
    ),
    "fang_krum": (attacks.fang_krum, {}),
    "fang_krum colluding": (attacks.fang_krum, {"knowledge": "colluding"}),
    "fang_trimmed_mean": (attacks.fang_trimmed_mean, {}),
    "fang_trimmed_mean weights": (attacks.fang_trimmed_mean, {"space": "weights"}),
    "fang_trimmed_mean colluding": (
        attacks.fang_trimmed_mean,
        {"knowledge": "colluding"},
    ),
    "min_max": (attacks.min_max, {}),
    "min_max colluding": (
        attacks.min_max,
        {"perturbation": "sign", "knowledge": "colluding"},
    ),
    "min_sum": (attacks.min_sum, {"perturbation": "std"}),
    "fltrust_adaptive": (attacks.fltrust_adaptive, {"passes": 2, "steps": 2}),
    "fltrust_adaptive own": (
        attacks.fltrust_adaptive,
        {"passes": 2, "steps": 2, "start": "own", "improving": True},
    ),
    "mimic": (attacks.mimic, {"warmup": 2}),
    "mimic target": (attacks.mimic, {"target": 2}),
    "optimal_alie": (attacks.optimal_alie, {}),
    "optimal_ipm": (attacks.optimal_ipm, {}),
}
MADE["scheduled ipm"] = (
    lambda **options: attacks.schedule(attacks.ipm(**options), stop=5),
    {"epsilon": 0.7},
)
CASES = {name: make(**options) for name, (make, options) in MADE.items()}
BYZANTINE = jnp.array([0, 1, 0, 1, 0, 0, 1, 0, 0], bool)
IDS = jnp.array([40, 3, 17, 8, 25, 99, 60, 2, 71])
K = len(BYZANTINE)

# What these send is not meant to be finite.
NONFINITE = {"inf_rows", "nan_rows"}

over_all = pytest.mark.parametrize("attack", CASES.values(), ids=CASES.keys())
# Without those that another row is built like: every test of these compiles a program.
DISTINCT = {
    name: attack
    for name, attack in CASES.items()
    if name
    not in {
        "same_value update",
        "nan_rows",
        "free_rider",
        "model_replacement",
        "fang_trimmed_mean weights",
        "fang_trimmed_mean colluding",
        "min_max colluding",
        "min_sum",
        "fltrust_adaptive own",
        "mimic target",
        "optimal_ipm",
    }
}
over_distinct = pytest.mark.parametrize(
    "attack", DISTINCT.values(), ids=DISTINCT.keys()
)


def make_updates(seed=0):
    """A cohort of pytrees with a matrix, a bfloat16 vector and a scalar."""
    rng = np.random.default_rng(seed)
    return {
        "dense": {
            "kernel": jnp.asarray(rng.normal(1.0, 2.0, (K, 3, 4)), jnp.float32),
            "bias": jnp.asarray(rng.normal(0.5, 1.0, (K, 4)), jnp.bfloat16),
        },
        "scale": jnp.asarray(rng.normal(0.0, 1.0, K), jnp.float32),
    }


def make_context(**changes):
    params = jax.tree.map(lambda x: jnp.ones(x.shape[1:], x.dtype), make_updates())
    params = changes.get("params", params)
    context = RoundContext(
        key=jax.random.key(7),
        params=params,
        round=jnp.array(0),
        client_ids=IDS,
        byzantine=BYZANTINE,
        previous_params=jax.tree.map(lambda w: 0.5 * w, params),
        root_update=jax.tree.map(lambda w: 2.0 * w, params),
        aggregate=trimmed_mean,
    )
    return context._replace(**changes)


def trimmed_mean(updates):
    """What attackers that try out the server's rule are given."""
    rule = aggregators.trimmed_mean(2)
    return rule.apply(updates, (), RoundContext())[0]


@functools.cache
def compiled(attack, aggregate):
    # A callable cannot be an argument of a compiled function: it is closed over.
    def apply(updates, state, context):
        return attack.apply(updates, state, context._replace(aggregate=aggregate))

    return jax.jit(apply)


def play(attack, updates, state, context):
    arrays = context._replace(aggregate=None)
    return compiled(attack, context.aggregate)(updates, state, arrays)


def run(attack, updates, context):
    state = attack.init(context.params, 100)
    return play(attack, updates, state, context)[0]


def row_bytes(updates):
    """Every row as bytes: equal only if it is bit-identical."""
    return [
        b"".join(np.asarray(x)[i].tobytes() for x in jax.tree.leaves(updates))
        for i in range(K)
    ]


def rows(updates):
    """``float64 [K, d]``."""
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(updates)]
    return np.concatenate([x.reshape(len(x), -1) for x in leaves], axis=1)


def assert_trees_close(a, b, rtol=1e-6):
    # bfloat16 has 8 bits: one rounding the other way is 2^-8.
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        tolerance = 2**-7 if x.dtype == jnp.bfloat16 else rtol
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def test_table_is_complete():
    assert {attack.name for attack in CASES.values()} == set(attacks.UPDATE_ATTACKS)
    assert set(attacks.__all__) == {
        *attacks.UPDATE_ATTACKS,
        *attacks.SERIES_ATTACKS,
        *attacks.DATA_ATTACKS,
        "UPDATE_ATTACKS",
        "DATA_ATTACKS",
        "SERIES_ATTACKS",
        "schedule",
    }


@over_all
def test_description(attack):
    assert attack.knowledge in ("own", "colluding", "omniscient")
    assert attack.needs <= set(RoundContext._fields)
    attack.validate(20, 4)
    attack.validate(20, 0)


@over_all
def test_structure_dtype_finite_and_honest_rows(attack):
    before = make_updates()
    after = run(attack, before, make_context())
    assert jax.tree.structure(after) == jax.tree.structure(before)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after)):
        assert (old.shape, old.dtype) == (new.shape, new.dtype)
        finite = np.all(np.isfinite(np.asarray(new, np.float32)))
        assert finite == (attack.name not in NONFINITE)
    same = [a == b for a, b in zip(row_bytes(before), row_bytes(after))]
    assert same == [not b for b in BYZANTINE]


@over_distinct
def test_jit_equals_eager(attack):
    # One array, not the whole tree: eager JAX compiles every operation for every shape.
    updates = make_updates()["dense"]["kernel"]
    context = make_context(params=jnp.ones((3, 4)))
    eager = attack.apply(updates, attack.init(context.params, 100), context)[0]
    assert_trees_close(run(attack, updates, context), eager)


@over_distinct
def test_vmap_over_seeds_equals_loop(attack):
    keys = jax.random.split(jax.random.key(3), 2)
    cohorts = [make_updates(seed) for seed in range(2)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *cohorts)

    context = make_context()
    state = attack.init(context.params, 100)

    @jax.jit
    @jax.vmap
    def over_seeds(key, updates):
        return attack.apply(updates, state, context._replace(key=key))[0]

    together = over_seeds(keys, stacked)
    for i, (key, updates) in enumerate(zip(keys, cohorts)):
        alone = run(attack, updates, make_context(key=key))
        assert_trees_close(jax.tree.map(lambda x, i=i: x[i], together), alone)


@pytest.mark.parametrize("name", MADE)
def test_strength_is_the_state(name):
    """Other values of the state are other strengths of the same compiled program."""
    make, options = MADE[name]
    updates, context = make_updates(), make_context()
    state = CASES[name].init(context.params, 100)
    if not CASES[name].strength:
        assert getattr(state, "ndim", None) != 0
        return
    assert (state.shape, state.dtype) == ((), jnp.float32)
    one, other = (make(**options | {CASES[name].strength: s}) for s in (3.0, 7.0))
    states = [attack.init(context.params, 100) for attack in (one, other)]
    got, unchanged = (play(one, updates, s, context)[0] for s in states[::-1])
    assert row_bytes(got) == row_bytes(play(other, updates, states[1], context)[0])
    assert row_bytes(got) != row_bytes(unchanged)


@over_distinct
def test_scan_traces_once(attack):
    updates, context, traces = make_updates(), make_context(), []

    @jax.jit
    def rounds(updates, key):
        def one_round(carry, index):
            traces.append(index)
            here = context._replace(key=jax.random.fold_in(key, index), round=index)
            return attack.apply(*carry, here), None

        start = (updates, attack.init(context.params, 100))
        return jax.lax.scan(one_round, start, jnp.arange(3))[0][0]

    after = rounds(updates, jax.random.key(0))
    rounds(after, jax.random.key(1))
    assert len(traces) == 1
    assert jax.tree.structure(after) == jax.tree.structure(updates)


@over_all
def test_order_of_the_cohort_does_not_matter(attack):
    order = np.random.default_rng(1).permutation(K)
    updates, context = make_updates(), make_context()
    shuffled = context._replace(client_ids=IDS[order], byzantine=BYZANTINE[order])
    after = run(attack, jax.tree.map(lambda x: x[order], updates), shuffled)
    expected = jax.tree.map(lambda x: x[order], run(attack, updates, context))
    assert_trees_close(after, expected)


@over_all
def test_nobody_byzantine_changes_nothing(attack):
    updates = make_updates()
    after = run(attack, updates, make_context(byzantine=jnp.zeros(K, bool)))
    assert row_bytes(after) == row_bytes(updates)


@over_all
def test_everybody_byzantine_stays_finite(attack):
    updates = make_updates()
    after = run(attack, updates, make_context(byzantine=jnp.ones(K, bool)))
    assert np.all(np.isfinite(rows(after))) == (attack.name not in NONFINITE)
    if attack.knowledge == "omniscient":  # nobody left to learn from
        assert row_bytes(after) == row_bytes(updates)


@over_all
@pytest.mark.parametrize("bad", [np.nan, -np.inf, 1e25])
def test_broken_rows_are_not_learned_from(attack, bad):
    """Attackers do as if honest row 4 and own row 6 had not taken part.

    Who knows the honest rows counts attacker 6 still, for it sends what is crafted.
    """
    updates = make_updates()
    broken = jax.tree.map(lambda x: x, updates)
    broken["dense"]["bias"] = broken["dense"]["bias"].at[4, 1].set(bad)
    broken["scale"] = broken["scale"].at[6].set(bad)
    after = run(attack, broken, make_context())
    mask = jnp.ones(K, bool).at[4].set(False)
    mask = mask.at[6].set(attack.knowledge == "omniscient")
    # What it trained tells them nothing: zero, or too far away for Krum to pick it.
    silent = 50 if attack.name == "fang_krum" else 0
    untrained = jax.tree.map(lambda x: x.at[6].set(silent), updates)
    expected = run(attack, untrained, make_context(mask=mask))
    healthy = np.array([1, 3])
    got, wanted = (jax.tree.map(lambda x: x[healthy], t) for t in (after, expected))
    assert_trees_close(got, wanted)
    finite = np.all(np.isfinite(rows(after)[healthy]))
    assert finite == (attack.name not in NONFINITE)
    before, now = row_bytes(broken), row_bytes(after)
    assert all(before[i] == now[i] for i in range(K) if not BYZANTINE[i])


@over_all
def test_missing_field_is_named(attack):
    for field in attack.needs:
        with pytest.raises(ValueError, match=rf"{attack.name} needs context\.{field}"):
            run(attack, make_updates(), make_context()._replace(**{field: None}))


ORACLES = {
    "sign_flip": lambda u, n, m: reference.sign_flip(u[1], 2.0),
    "sign_flip weights": lambda u, n, m: reference.sign_flip(
        u[1], space="weights", w=np.ones(len(u[1]))
    ),
    "scaling": lambda u, n, m: reference.scaling(u[1], 10.0),
    "ipm": lambda u, n, m: reference.ipm(n, 0.7),
    "ipm colluding": lambda u, n, m: reference.ipm(m, 0.7),
    "alie z": lambda u, n, m: reference.alie(m, 1.5),
    "alie": lambda u, n, m: reference.alie(m, reference.alie_z(len(n + m), len(m))),
    "alie omniscient": lambda u, n, m: reference.alie(
        n, reference.alie_z(len(n + m), len(m)), ddof=1, direction=-1
    ),
    "same_value": lambda u, n, m: crafted.same_value(np.ones(len(u[1]))),
    "same_value update": lambda u, n, m: crafted.same_value(u[1], -0.5, "update"),
    "inf_rows": lambda u, n, m: np.full(len(u[1]), -np.inf),
    "nan_rows": lambda u, n, m: np.full(len(u[1]), np.nan),
    "free_rider": lambda u, n, m: crafted.free_rider(u[1], "zero"),
    "free_rider delta": lambda u, n, m: crafted.free_rider(
        np.ones(len(u[1])), "delta_weights", np.full(len(u[1]), 0.5)
    ),
    "model_replacement": lambda u, n, m: crafted.model_replacement(
        u[1], crafted.replacement_scale(len(n + m), len(m), 0.5)
    ),
    "model_replacement bound": lambda u, n, m: crafted.model_replacement(u[1], 4, 30),
    "fang_krum": lambda u, n, m: crafted.fang_krum(n, m)[0],
    "fang_krum colluding": lambda u, n, m: (
        crafted.fang_krum_partial(m)[0] if len(m) > 2 else u[1]
    ),
    "min_max": lambda u, n, m: crafted.min_max(n)[0],
    "min_max colluding": lambda u, n, m: crafted.min_max(m, "sign")[0],
    "min_sum": lambda u, n, m: crafted.min_sum(n, "std")[0],
    "mimic": lambda u, n, m: n[
        crafted.mimic_choice(
            n,
            crafted.mimic_learn(
                n, 0, None, initial_direction(jax.random.key(7), len(u[1]))
            )[1],
        )
    ],
    # The client of id 2 is the last honest row but one; without it, that of lowest id.
    "mimic target": lambda u, n, m: n[-2] if len(n) == 6 else n[1],
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ORACLES)
def test_equals_the_oracle(name, masked):
    mask = jnp.ones(K, bool).at[jnp.array([3, 7])].set(False) if masked else None
    updates = make_updates(5)
    after = run(CASES[name], updates, make_context(mask=mask))
    U = list(rows(updates))
    honest, own = (
        reference.known(U, BYZANTINE, knowledge, mask)
        for knowledge in ("omniscient", "colluding")
    )
    expected = np.broadcast_to(ORACLES[name](U, honest, own), (K, len(U[0])))
    got = rows(after)[1]
    bfloat16 = slice(0, 4)  # the bias comes first in the order of the leaves
    np.testing.assert_allclose(got[bfloat16], expected[1][bfloat16], rtol=2**-7)
    np.testing.assert_allclose(got[4:], expected[1][4:], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["ipm", "alie", "alie omniscient"])
def test_attackers_of_one_mind_send_the_same(name):
    after = rows(run(CASES[name], make_updates(), make_context()))
    sent = after[np.asarray(BYZANTINE)]
    assert np.all(sent == sent[0])


# Gaussian -----------------------------------------------------------------------------


def test_gaussian_replace_moments_and_independence():
    d = 20_000
    updates = {"a": jnp.zeros((3, d)), "b": jnp.zeros((3, d))}
    context = RoundContext(
        key=jax.random.key(0), client_ids=jnp.arange(3), byzantine=jnp.ones(3, bool)
    )
    attack = attacks.gaussian(mean=0.5, std=2.0)
    after = attack.apply(updates, attack.init(updates, 3), context)[0]
    draws = np.concatenate([after["a"], after["b"]]).astype(np.float64)
    # Standard errors: mean 2 / sqrt(d) = 0.014, std 2 / sqrt(2 d) = 0.010.
    np.testing.assert_allclose(draws.mean(axis=1), 0.5, atol=0.07)
    np.testing.assert_allclose(draws.std(axis=1), 2.0, atol=0.05)
    # Rows and leaves are independent: correlations have standard error 0.007.
    correlation = np.corrcoef(draws) - np.eye(6)
    assert np.abs(correlation).max() < 0.035
    # Kurtosis of a normal distribution.
    centred = (draws - 0.5) / 2.0
    np.testing.assert_allclose((centred**4).mean(axis=1), 3.0, atol=0.25)


def test_gaussian_fitted_moments():
    own = jnp.array([[1.0, 0.0, -4.0], [3.0, 0.0, 4.0], [5.0, 6.0, 9.0]])
    updates = jnp.concatenate([own, jnp.full((2, 3), 100.0)])
    context = RoundContext(client_ids=jnp.arange(5), byzantine=jnp.arange(5) < 3)
    attack = attacks.gaussian(mode="fitted")

    @jax.jit
    @jax.vmap
    def draw(key):
        return attack.apply(updates, (), context._replace(key=key))[0][:3]

    draws = np.asarray(draw(jax.random.split(jax.random.key(1), 10_000)), np.float64)
    spread = reference.std(np.asarray(own))
    error = spread / np.sqrt(10_000)
    assert np.all(np.abs(draws.mean(axis=0) - reference.mean(own)) < 5 * error)
    assert np.all(np.abs(draws.std(axis=0) - spread) < 5 * error)
    correlation = np.corrcoef(draws[:, :, 0].T) - np.eye(3)
    assert np.abs(correlation).max() < 0.05


def test_gaussian_draw_belongs_to_the_client_not_to_the_cohort():
    attack = attacks.gaussian()
    state = attack.init(jnp.zeros(6), 100)

    def draw(ids):
        ids = jnp.array(ids)
        context = RoundContext(
            key=jax.random.key(0), client_ids=ids, byzantine=jnp.ones(ids.shape, bool)
        )
        return np.asarray(attack.apply(jnp.zeros((len(ids), 6)), state, context)[0])

    np.testing.assert_allclose(draw([5, 9, 2])[1], draw([9, 70])[0], rtol=1e-6)
    assert not np.any(draw([5, 9])[0] == draw([5, 9])[1])


# ALIE ---------------------------------------------------------------------------------


def test_z_max_equals_the_oracle_wherever_it_is_defined():
    pairs = [
        (n, m)
        for n in range(3, 60)
        for m in range(1, n // 2 + 1)
        if 0 < reference.alie_counts(n, m)[1] < 1
    ]
    n, m = np.array(pairs).T
    expected = [reference.alie_z(*pair) for pair in pairs]
    np.testing.assert_allclose(jax.jit(z_max)(n, m), expected, rtol=1e-4, atol=1e-5)


def test_z_max_is_finite_and_grows_with_the_attackers():
    counts = np.arange(1, 21)
    z = np.asarray(jax.jit(z_max)(20, counts))
    assert np.all(np.isfinite(z))
    # Up to the last honest pair; alone, or with nobody to hide among, it is 0.
    assert np.all(np.diff(z[:11]) > 0)
    np.testing.assert_allclose(z[[18, 19]], 0.0, atol=1e-6)


def test_alie_counts_the_cohort_it_is_in():
    """z_max follows the attackers present, not a number fixed at construction."""
    updates = jnp.asarray(np.random.default_rng(0).normal(size=(20, 5)), jnp.float32)
    apply = jax.jit(attacks.alie().apply)
    for m in (3, 6, 9):
        context = RoundContext(byzantine=jnp.arange(20) < m)
        after = apply(updates, (), context)[0]
        expected = reference.alie(np.asarray(updates[:m]), reference.alie_z(20, m))
        np.testing.assert_allclose(after[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("n", "m"), [(2, 1), (1, 1), (10, 6), (5, 5)])
def test_alie_validate_refuses_an_infinite_z(n, m):
    with pytest.raises(ValueError, match=f"cohort_size={n}, num_byzantine={m}"):
        attacks.alie().validate(n, m)


def test_std_in_float32_from_tiny_to_huge():
    """Squares of these values leave float32; their standard deviation does not."""
    x = jnp.array([[1.5e19, 3e-25], [-1.5e19, 1e-25], [1e19, -2e-25]], jnp.float32)
    everyone = jnp.ones(3, bool)
    got = std_over(everyone, x, x.mean(axis=0, keepdims=True))
    np.testing.assert_allclose(got[0], reference.std(np.asarray(x)), rtol=1e-5)


def test_std_of_near_identical_rows():
    noise = np.random.default_rng(0).normal(size=(20, 50))
    x = jnp.asarray(100.0 + 0.01 * noise, jnp.float32)
    got = std_over(jnp.ones(20, bool), x, x.mean(axis=0, keepdims=True))
    np.testing.assert_allclose(got[0], reference.std(np.asarray(x)), rtol=1e-3)


# Construction -------------------------------------------------------------------------

REFUSED = {
    "scale 0": (
        lambda: attacks.sign_flip(scale=0),
        r"scale must be a finite number in \(0, inf\); got 0",
    ),
    "scale nan": (
        lambda: attacks.sign_flip(scale=float("nan")),
        "scale must be .*; got nan",
    ),
    "space": (lambda: attacks.sign_flip(space="weight"), "Did you mean 'weights'"),
    "factor": (lambda: attacks.scaling(float("inf")), "factor must be .*; got inf"),
    "negative": (lambda: attacks.scaling(-1.0), "factor must be .*; got -1.0"),
    "epsilon": (lambda: attacks.ipm(-0.1), "epsilon must be"),
    "knows": (lambda: attacks.ipm(knowledge="own"), "unknown knowledge of ipm"),
    "z": (lambda: attacks.alie(z=-1.0), r"z must be a finite number in \[0, inf\)"),
    "z inf": (lambda: attacks.alie(z=float("inf")), "z must be .*; got inf"),
    "direction": (lambda: attacks.alie(direction=0), "direction 1 or -1"),
    "ddof": (lambda: attacks.alie(ddof=2), "ddof 0 or 1"),
    "collude": (lambda: attacks.alie(knowledge="coluding"), "mean 'colluding'"),
    "std": (lambda: attacks.gaussian(std=0.0), "std must be"),
    "mode": (lambda: attacks.gaussian(mode="fit"), "Did you mean 'fitted'"),
    "fitted std": (lambda: attacks.gaussian(std=2.0, mode="fitted"), "Drop them"),
    "noise": (lambda: attacks.additive_noise(0.0), "additive_noise's std must be"),
    "value": (lambda: attacks.same_value(float("nan")), "value must be .*; got nan"),
    "value space": (lambda: attacks.same_value(space="model"), "unknown space"),
    "inf sign": (lambda: attacks.inf_rows(sign=0), "sign 1 or -1; got sign=0"),
    "ride": (lambda: attacks.free_rider("none"), "unknown mode of free_rider"),
    "ride std": (lambda: attacks.free_rider(std=0.1), "mode='zero' sends no noise"),
    "ride decay": (
        lambda: attacks.free_rider("noisy", decay=-1.0),
        "decay must be a finite number in",
    ),
    "rate": (
        lambda: attacks.model_replacement(server_rate=0.0),
        "server_rate must be",
    ),
    "rate and scale": (
        lambda: attacks.model_replacement(scale=2.0, server_rate=0.5),
        "either scale or server_rate",
    ),
    "bound": (lambda: attacks.model_replacement(norm_bound=0), "norm_bound must be"),
    "krum knows": (lambda: attacks.fang_krum("own"), "unknown knowledge of fang_krum"),
    "krum f": (lambda: attacks.fang_krum(max_byzantine=-1), "max_byzantine must be"),
    "krum own f": (
        lambda: attacks.fang_krum("colluding", max_byzantine=2),
        "tries Krum with every number",
    ),
    "threshold": (lambda: attacks.fang_krum(threshold=0), "threshold must be"),
    "initial": (lambda: attacks.fang_krum(initial=-1), "initial must be"),
    "b": (
        lambda: attacks.fang_trimmed_mean(1.0),
        r"b must be a finite number in \(1, inf\)",
    ),
    "b colluding": (
        lambda: attacks.fang_trimmed_mean(1.5, "colluding"),
        "got b=1.5, space='update'",
    ),
    "space colluding": (
        lambda: attacks.fang_trimmed_mean(knowledge="colluding", space="weights"),
        "space='weights'. Drop them",
    ),
    "perturbation": (lambda: attacks.min_max("signs"), "Did you mean 'sign'"),
    "min_sum rule": (lambda: attacks.min_sum(rule="mean"), "unknown rule of min_sum"),
    "variance": (lambda: attacks.fltrust_adaptive(variance=0), "variance must be"),
    "passes": (lambda: attacks.fltrust_adaptive(passes=0), "passes must be"),
    "start": (lambda: attacks.fltrust_adaptive(start="zero"), "unknown start"),
    "warmup": (lambda: attacks.mimic(warmup=0), "warmup must be"),
    "criterion": (lambda: attacks.mimic(criterion="max"), "unknown criterion"),
    "target": (lambda: attacks.mimic(target=-1), "target must be"),
    "target learns": (lambda: attacks.mimic(5, target=1), "target=1, warmup=5"),
    "optimal direction": (lambda: attacks.optimal_alie(2), "direction 1 or -1"),
    "optimal ddof": (lambda: attacks.optimal_alie(ddof=3), "ddof 0 or 1"),
    "evals": (lambda: attacks.optimal_ipm(evals=0), "evals must be"),
    "ratio": (lambda: attacks.optimal_ipm(ratio=0.5), r"ratio must be .* \(0.5, 1\)"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_unsound_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("value", ["2", None, True, jnp.ones(())])
def test_options_must_be_numbers(value):
    with pytest.raises(TypeError, match="scaling's factor must be a number"):
        attacks.scaling(value)


def test_numpy_numbers_are_numbers():
    attack = attacks.scaling(np.float32(2.0))
    context = RoundContext(byzantine=jnp.array([True]))
    state = attack.init(jnp.ones(1), 1)
    assert attack.apply(jnp.ones((1, 1)), state, context)[0].tolist() == [[2.0]]
