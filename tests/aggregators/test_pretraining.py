"""Detectors that learn before the first round: what they learn, and when."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_sim as fs
from fedjax_sim import aggregators as rules
from fedjax_sim import checkpoint
from fedjax_sim.aggregators.reaggregation import aggregate_kept
from fedjax_sim.types import RoundContext
from tests.aggregators import tiny
from tests.aggregators.bare import everybody, module
from tests.aggregators.cases import D, N, attacked, cohort, compiled, layers
from tests.aggregators.tiny import ATTACK
from tests.pages import EXAMPLES, check, inputs
from tests.references import detection as oracle
from tests.trees import assert_close, assert_equal

SMALL = {"hidden": 4, "num_snapshots": 6, "num_steps": 5, "num_coordinates": 8}
vae = functools.partial(rules.vae_detector, **SMALL, latent=2)
pca = functools.partial(rules.vae_detector, **SMALL, latent=2, learner="pca")
dagmm = functools.partial(rules.dagmm_detector, **SMALL, estimator=4)
every_learner = pytest.mark.parametrize(
    "make", [vae, pca, dagmm], ids=["vae", "pca", "dagmm"]
)
KEY = jax.random.key(0)
simulate = functools.partial(tiny.simulate, test=None)


# The pages ----------------------------------------------------------------------------


def test_vae_scores_example():
    identifier = "vae_detect/score"
    given = {name: jnp.array(x) for name, x in inputs(identifier).items()}
    detector = module("vae_detector")
    seen = [given[name] for name in ("x", "xhat", "mu", "logvar")]
    scores = detector.vae_scores(*seen)
    keep = ~detector.above_mean(scores, everybody(3))
    sizes = RoundContext(num_samples=given["data_sizes"])
    _, weights = aggregate_kept("fedavg", given["x"], keep, 0, None, sizes)
    check(
        identifier, scores=scores, threshold=scores.mean(), keep=keep, weights=weights
    )
    scores = {i: oracle.vae_score(*row) for i, row in enumerate(zip(*seen))}
    by, sizes = oracle.above_mean(scores), inputs(identifier)["data_sizes"]
    found = oracle.without_flagged(seen[0], 0, "fedavg", None, sizes, scores, by)
    check(
        identifier,
        scores=found.scores,
        threshold=np.mean(found.scores),
        keep=found.keep,
        weights=found.weights,
    )
    assert EXAMPLES[identifier]["algorithm"] == "vae_anomaly"


def test_principal_components_example():
    given = {name: jnp.array(x) for name, x in inputs("spectral_detect/pca").items()}
    detector, x = module("vae_detector"), given["X"] - given["mean"][None]
    scores = detector.residuals(x, given["comps"])
    keep = ~detector.above_mean(scores, everybody(4))
    check("spectral_detect/pca", scores=scores, keep=keep)
    scores = {i: oracle.pca_residual(row, given["comps"]) for i, row in enumerate(x)}
    flagged = oracle.above_mean(scores)(range(4), 0)
    keep = [i not in flagged for i in range(4)]
    check("spectral_detect/pca", scores=list(scores.values()), keep=keep)


def test_features_example():
    x, output = (np.array(inputs("dagmm/features")[name]) for name in ("x", "xhat"))
    found = module("dagmm_detector").features(jnp.array(x), jnp.array(output))
    check("dagmm/features", features=found)
    expected = [oracle.dagmm_features(*rows) for rows in zip(x, output)]
    check("dagmm/features", features=expected)
    # Of nothing decoded to nothing, and to something.
    zero = np.zeros((2, 2)), np.array([[0.0, 0.0], [3e-12, 4e-12]])
    expected = [oracle.dagmm_features(*rows) for rows in zip(*zero)]
    found = jax.jit(module("dagmm_detector").features)(*map(jnp.array, zero))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_mixture_moments_example():
    given = [np.array(inputs("dagmm/gmm_params")[name]) for name in ("z", "gamma")]
    for moments in (module("dagmm_detector").mixture_moments, oracle.mixture_moments):
        phi, mu, cov = moments(*given)
        check("dagmm/gmm_params", phi=phi, mu=mu, cov=cov)


@pytest.mark.parametrize(
    "identifier", ["dagmm/energy_one_gaussian", "dagmm/energy_mixture"]
)
def test_energy_examples(identifier):
    z, *mixture = (np.array(inputs(identifier)[x]) for x in ("z", "phi", "mu", "cov"))
    detector = module("dagmm_detector")
    found = detector.energies(
        jnp.array(z), detector.factorised(*map(jnp.array, mixture))
    )
    check(identifier, energy=found)
    check(identifier, energy=[oracle.energy(row, *mixture) for row in z])


def test_equal_scores_flag_nobody():
    """Though the mean of equal floats may be below them."""
    above_mean = jax.jit(module("vae_detector").above_mean)
    rng = np.random.default_rng(0)
    for score in rng.lognormal(sigma=5, size=40).astype(np.float32):
        assert not above_mean(np.full(12, score), everybody(12)).any()
    for _ in range(20):
        scores, mask = rng.lognormal(size=12), rng.random(12) < 0.7
        expected = mask & (scores > scores[mask].mean())
        np.testing.assert_array_equal(above_mean(scores.astype("f4"), mask), expected)


# What is learned ----------------------------------------------------------------------


def turning(size, seed=0):
    """A training that turns the model about a point: every snapshot is another."""
    rng = np.random.default_rng(seed)
    turn, centre = np.linalg.qr(rng.normal(size=(size, size)))[0], rng.normal(size=size)
    turn, centre = np.float32(turn), np.float32(centre)

    def train(key, w):
        return turn @ (w - centre) + centre - w

    return train


def turned(train, w, count, space):
    rows = []
    for _ in range(count):
        update = train(None, w)
        w = w + update
        rows.append(update if space == "update" else w)
    return np.array(rows, np.float64)


@pytest.mark.parametrize(("size", "space"), [(8, "weights"), (11, "update")])
@every_learner
def test_the_learned_state_is_that_of_the_snapshots(make, size, space):
    """All 8 coordinates where there are no more, of 11 some; scales have a floor."""
    train, w = turning(size), np.float32(np.linspace(-1, 1, size))
    flat = np.ones(size, np.float32)
    flat[3] = 1e-4  # hardly moves

    def trained(key, w):
        return flat * train(key, w)

    state = jax.jit(lambda w, key: make(1, space=space).pretrain(w, key, trained))(
        w, KEY
    )
    columns = np.asarray(state.view.columns)
    assert len(columns) == 8
    assert (np.diff(columns) > 0).all()
    assert columns[0] >= 0
    assert columns[-1] < size
    rows = turned(trained, w, 6, space)[:, columns]
    spread = rows.std(axis=0)
    scale = np.maximum(spread, 0.1 * spread.mean())
    np.testing.assert_allclose(state.view.mean, rows.mean(axis=0), 1e-4, 1e-5)
    np.testing.assert_allclose(state.view.scale, scale, 1e-4, 1e-5)
    x = (rows - rows.mean(axis=0)) / scale
    if make is pca:
        _, _, components = np.linalg.svd(x)
        np.testing.assert_allclose(
            state.net.T @ state.net, components[:2].T @ components[:2], atol=1e-3
        )
    elif make is dagmm:
        net = layers(state.net)
        z, gamma = zip(*(oracle.dagmm_forward(net, row) for row in x), strict=True)
        mixture = oracle.mixture_moments(z, gamma)
        energies = [oracle.energy(row, *mixture, epsilon=1e-6) for row in z]
        np.testing.assert_allclose(state.energies, np.sort(energies), 1e-2, 1e-2)


@pytest.mark.parametrize("space", ["weights", "update"])
@pytest.mark.parametrize("make", [vae, dagmm], ids=["vae", "dagmm"])
def test_reversed_updates_are_told_from_honest_ones(make, space):
    """Honest models differ along two directions, and a little along all."""
    positions = np.arange(12, dtype=np.float32)
    step, ways = np.cos(positions), np.stack([np.sin(positions), np.cos(2 * positions)])

    def train(key, w):
        along = jax.random.uniform(key, (2,), minval=-0.5, maxval=0.5) @ ways
        return step - 0.5 * w + along + 0.01 * jax.random.normal(key, (12,))

    enough = {"hidden": 16, "estimator": 32} if make is dagmm else {"hidden": 16}
    enough |= {"num_snapshots": 300, "num_steps": 100, "learning_rate": 1e-2}
    rule = make(2, reject="count", space=space, num_coordinates=99, **enough)
    state = jax.jit(lambda w, key: rule.pretrain(w, key, train))(np.zeros(12), KEY)
    w = 2 * step  # where that training ends
    keys = jax.random.split(jax.random.key(1), 8)
    U = np.array([train(key, 0.9 * w) for key in keys])
    U[3], U[5] = -30 * U[3], -30 * U[5]
    this = RoundContext(params=jnp.asarray(w))
    info = jax.jit(lambda U: rule.apply(U, state, this))(U)[2]
    assert np.flatnonzero(info.flagged).tolist() == [3, 5]


def test_more_steps_make_a_better_autoencoder():
    train, size = turning(8), 8

    def error(num_steps):
        rule = rules.vae_detector(
            1, hidden=16, latent=4, num_snapshots=20, num_steps=num_steps
        )
        state = jax.jit(lambda w: rule.pretrain(w, KEY, train))(jnp.zeros(size))
        rows = turned(train, np.zeros(size, "f4"), 20, "weights")
        x = oracle.seen(rows, range(20), state.view)
        net = layers(state.net)
        return np.mean(
            [oracle.vae_score(x[i], *oracle.vae_forward(net, x[i])) for i in x]
        )

    assert error(400) < 0.7 * error(1)


def test_every_part_of_the_loss_counts():
    def learned(**options):
        rule = dagmm(1, **options)
        net = jax.jit(lambda w: rule.pretrain(w, KEY, turning(8)))(jnp.zeros(8)).net
        return np.concatenate([x.ravel() for x in jax.tree.leaves(net)])

    full = learned()
    for option in ("energy_weight", "covariance_weight"):
        assert not np.allclose(full, learned(**{option: 0.0}), rtol=1e-3)


@pytest.mark.parametrize(
    "name", ["vae_detector", "vae_detector-count", "vae_detector-pca", "dagmm_detector"]
)
def test_scores_of_the_farthest_are_finite(name):
    U, g0, sizes = cohort(9, N, D)
    aggregate, info = compiled(name)(attacked(U, 2, "1e18"), g0, sizes=sizes)
    assert np.isfinite(info.scores).all()
    assert np.isfinite(aggregate).all()


def test_a_mixture_does_not_see_how_far_a_model_is():
    """Code, relative distance and cosine are bounded: ten times as far is no matter."""
    U, g0, sizes = cohort(9, N, D)
    U[-1], U[-2] = 1e5 * U[0], 1e6 * U[0]
    scores = compiled("dagmm_detector")(U, g0, sizes=sizes)[1].scores
    np.testing.assert_allclose(scores[-1], scores[-2], rtol=1e-3)
    scores = compiled("vae_detector-pca")(U, g0, sizes=sizes)[1].scores
    np.testing.assert_allclose(scores[-2], 100 * scores[-1], rtol=1e-2)


# In a simulation ----------------------------------------------------------------------


@every_learner
def test_the_key_says_what_is_learned(make):
    sim, keys = simulate(make(2), **ATTACK), jax.random.split(KEY, 2)
    state = sim.init(keys)
    one, other = (jax.tree.map(lambda x, i=i: x[i], state.aggregator) for i in (0, 1))
    # Not by the models they start from alone.
    assert not np.array_equal(one.view.columns, other.view.columns)
    assert_equal(sim.init(keys).aggregator, state.aggregator)
    if make is pca:
        assert_close(sim.init(keys[1]).aggregator, other, rtol=1e-3, atol=1e-3)
    after, history = sim.run(state=state, num_rounds=2)
    assert_equal(after.aggregator, sim.init(keys).aggregator)  # what is learned, stays
    assert np.isfinite(history.scores).all()
    assert history.num_flagged.min() > 0


def test_a_comparison_learns_once_and_each_run_is_as_alone():
    asked = []
    rule = pca(2)

    def pretrain(params, key, train):
        asked.append(None)
        return rule.pretrain(params, key, train)

    counted = rule._replace(pretrain=pretrain)
    systems = {"clean": simulate(counted), "attacked": simulate(counted, **ATTACK)}
    comparison = fs.compare(systems)
    asked.clear()
    states = comparison.init(KEY)
    assert len(asked) == 1
    assert_equal(states["clean"].aggregator, states["attacked"].aggregator)
    together, histories = comparison.run(KEY, num_rounds=2)
    alone, history = systems["attacked"].run(KEY, num_rounds=2)
    assert_close(together["attacked"].params, alone.params)
    np.testing.assert_array_equal(histories["attacked"].flagged, history.flagged)
    assert history.flagged.any()


def test_rules_that_learn_the_same_share_it():
    """Whatever they do with it; other options learn something else."""
    assert pca(2).pretrain is pca(3, "median", "count").pretrain
    assert pca(2).pretrain is not pca(2, space="update").pretrain
    assert pca(2).pretrain is not vae(2).pretrain


def test_fork_learns_from_where_the_model_stands():
    trained, _ = simulate(rules.fedavg()).run(KEY, num_rounds=4)
    sim = simulate(pca(2), **ATTACK)
    state = sim.fork(trained)
    assert_equal(state.params, trained.params)
    fresh = sim.init(KEY)
    assert_equal(state.aggregator.view.columns, fresh.aggregator.view.columns)
    assert not np.allclose(state.aggregator.view.mean, fresh.aggregator.view.mean)
    _, history = sim.run(state=state, num_rounds=1)
    assert history.round.tolist() == [5]
    keys = jax.random.split(KEY, 2)
    seeds = simulate(rules.fedavg()).init(keys)
    assert sim.fork(seeds).aggregator.view.mean.shape == (2, 8)


def test_a_checkpoint_goes_on_as_if_it_had_not_stopped(tmp_path):
    comparison = fs.compare({"pca": simulate(pca(2), **ATTACK)})
    straight, _ = comparison.run(KEY, num_rounds=2)
    states, _ = comparison.run(KEY, num_rounds=1)
    checkpoint.save(tmp_path, 1, states)
    states = checkpoint.load(tmp_path, 1, lambda round: comparison.init(KEY))
    resumed, _ = comparison.run(states=states, num_rounds=1)
    assert_equal(resumed, straight)


def test_a_chain_looks_at_the_same_coordinates():
    train, size = turning(11), 11
    tree = {"b": jnp.zeros(3), "w": jnp.zeros((4, 2))}

    def train_tree(key, params):
        flat = jnp.concatenate([params["b"], params["w"].ravel()])
        update = train(key, flat)
        return {"b": update[:3], "w": update[3:].reshape(4, 2)}

    chained = rules.chain(rules.nnm(2), pca(2))
    assert chained.needs_root
    one = jax.jit(lambda w: pca(2).pretrain(w, KEY, train))(jnp.zeros(size))
    other = jax.jit(lambda w: chained.pretrain(w, KEY, train_tree))(tree)
    assert_close(one, other, rtol=1e-4, atol=1e-4)
    _, history = simulate(chained, **ATTACK).run(KEY, num_rounds=1)
    assert np.isfinite(history.scores).all()
    with pytest.raises(ValueError, match=r"chain|vae_detector has to be pre-trained"):
        chained.init(tree, 4)


@every_learner
def test_what_was_learned_must_be_finite(make):
    """Instead of a detector that from then on finds everybody alike."""
    wild = fs.local_sgd(optax.sgd(1e38), epochs=1, batch_size=4)
    sim = simulate(make(2), client_update=wild)
    with pytest.raises(ValueError, match=rf"^{make(2).name} .*learned nothing.* rate"):
        sim.init(KEY)
    if make is pca:
        calm = simulate(rules.fedavg()).init(KEY)
        with pytest.raises(ValueError, match="learned nothing before the first round"):
            sim.fork(calm)


def test_a_learned_state_may_hold_a_key():
    rule = rules.fedavg()._replace(pretrain=lambda params, key, train: key, name="key")
    state = simulate(rule).init(KEY)
    assert jnp.issubdtype(state.aggregator.dtype, jax.dtypes.prng_key)


@every_learner
def test_what_is_refused_before_training(make):
    rule = make(2)
    with pytest.raises(
        ValueError, match=f"{rule.name} has to be pre-trained.*pretrain"
    ):
        rule.init(jnp.zeros(3), 8)
    with pytest.raises(ValueError, match=f"{rule.name} needs a root dataset.*root="):
        simulate(rule, root=None)
    with pytest.raises(ValueError, match=f"{rule.name} needs cohort_size"):
        simulate(make(8))
    with pytest.raises(ValueError, match=f"{rule.name} needs .*3"):
        simulate(make(3, "krum"))
    this, U = RoundContext(), np.ones((4, 3), np.float32)
    state = jax.eval_shape(lambda: rule.pretrain(jnp.zeros(3), KEY, turning(3)))
    with pytest.raises(ValueError, match=f"{rule.name} needs .*params"):
        jax.eval_shape(lambda state: rule.apply(U, state, this), state)


@pytest.mark.parametrize(
    ("factory", "options", "message"),
    [
        (vae, {"base": "mean"}, "base of vae_detector.*fedavg"),
        (vae, {"reject": "quantile"}, "reject of vae_detector.*count, mean"),
        (vae, {"space": "weight"}, "Did you mean 'weights'"),
        (vae, {"learner": "ae"}, "learner of vae_detector.*pca"),
        (vae, {"latent": 0}, "vae_detector's latent"),
        (
            vae,
            {"latent": 5, "num_snapshots": 5, "learner": "pca"},
            r"latent must be below num_snapshots \(5\).* 4 dimensions; got 5",
        ),
        (vae, {"draws": -1}, "vae_detector's draws"),
        (vae, {"learning_rate": 0}, "vae_detector's learning_rate"),
        (vae, {"num_coordinates": 0}, "vae_detector's num_coordinates"),
        (dagmm, {"base": "mean"}, "base of dagmm_detector.*fedavg"),
        (dagmm, {"reject": "mean"}, "reject of dagmm_detector.*count, quantile"),
        (dagmm, {"components": 0}, "dagmm_detector's components"),
        (dagmm, {"num_snapshots": 1}, "dagmm_detector's num_snapshots"),
        (dagmm, {"energy_weight": -1}, "dagmm_detector's energy_weight"),
        (dagmm, {"covariance_weight": np.inf}, "dagmm_detector's covariance_weight"),
    ],
)
def test_options(factory, options, message):
    with pytest.raises(ValueError, match=message):
        factory(**{"max_byzantine": 1} | options)


def test_components_are_fewer_than_the_coordinates_looked_at():
    rule = pca(1, latent=4, num_coordinates=4)
    with pytest.raises(ValueError, match=r"latent below .*looks at, 4, .*; got 4"):
        rule.pretrain(jnp.zeros(9), KEY, turning(9))
    state = pca(1, latent=3, num_coordinates=4).pretrain(jnp.zeros(9), KEY, turning(9))
    assert state.net.shape == (3, 4)
