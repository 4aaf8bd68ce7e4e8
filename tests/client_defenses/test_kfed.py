"""k-FED against plain NumPy, LAPACK and the worked examples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim.client_defenses import kfed
from tests.pages import check, inputs, options
from tests.references import sanitization as oracle

K, M, H = 3, 24, 6
KEY = jax.random.key(7)


def blobs(seed, m=M, h=H, k=K, spread=0.5):
    rng = np.random.default_rng(seed)
    centres = 2.0 * rng.normal(size=(k, h)) + 1.0
    noise = spread * rng.normal(size=(m, h))
    return (centres[rng.integers(0, k, m)] + noise).astype(np.float32)


def masks(seed, m=M):
    """Everybody, a part anywhere, padding last."""
    rng = np.random.default_rng(seed)
    yield np.ones(m, bool)
    yield rng.permutation(m) < rng.integers(K + 1, m)
    yield np.arange(m) < m - 5


def everybody(X):
    return jnp.ones(len(X), bool)


def page(identifier, *names):
    return [np.array(inputs(identifier)[name], np.float32) for name in names]


def test_worked_example_core_sets():
    name = "kfed/local_step"
    A, nu = page(name, "A", "nu")
    core = kfed.core_sets(A, everybody(A), nu, options(name)["ratio"])
    check(name, core=core, theta=kfed.cluster_means(core, A, nu))
    core = oracle.core_sets(A, nu, options(name)["ratio"])
    check(name, core=core, theta=oracle.core_means(A, core, nu))


def test_worked_example_lloyd_from_core_sets():
    name = "kfed/local_then_lloyd"
    A, nu = page(name, "A", "nu")
    steps = options(name)["lloyd_steps"]
    mean = A.mean(axis=0, keepdims=True)
    theta = kfed.cluster_means(kfed.core_sets(A, everybody(A), nu), A, nu)
    theta, labels = kfed.lloyd(A - mean, everybody(A), theta - mean, steps)
    check(name, theta=theta + mean, labels=labels)
    theta = oracle.core_means(A, oracle.core_sets(A, nu), nu)
    theta, labels = oracle.lloyd(A, theta, steps)
    check(name, theta=theta, labels=labels)


def test_worked_example_server():
    name = "kfed/server"
    (thetas,) = page(name, "thetas")
    k = options(name)["k"]
    merged = kfed.merge_centers(thetas, np.ones((2, 2), bool), k)
    labels = merged.labels.reshape(-1)
    check(name, seeds=merged.seeds, labels=labels, mu=merged.centers)
    seeds, mu, labels = oracle.merge_centers(list(thetas), k)
    check(name, seeds=seeds, labels=np.concatenate(labels), mu=mu)


@pytest.mark.parametrize("seed", range(4))
def test_plus_plus(seed):
    X = blobs(seed)
    if seed == 3:
        X = X[np.arange(M) % 2]  # fewer distinct rows than centres
    for i, mask in enumerate(masks(seed)):
        draws = np.asarray(jax.random.uniform(jax.random.key(10 * seed + i), (4,)))
        found = kfed.plus_plus(draws, X, mask)
        np.testing.assert_array_equal(found, oracle.plus_plus(draws, X[mask]))


def test_plus_plus_draws_by_squared_distance_and_never_a_masked_row():
    X = jnp.array([[0.0], [1.0], [9.0], [3.0]])
    mask = jnp.array([True, True, False, True])

    def second(u):
        return kfed.plus_plus(jnp.array([0.0, u]), X, mask)[1, 0]

    found = np.asarray(jax.vmap(second)(jnp.linspace(0.0, 1.0, 1000, endpoint=False)))
    assert 98 <= np.sum(found == 1.0) <= 102  # weights 0, 1 and 9
    assert np.sum(found == 3.0) == 1000 - np.sum(found == 1.0)
    # The largest draw below 1, times the sum, may round up to the sum.
    last = kfed.plus_plus(
        jnp.array([1.0 - 2.0**-24]), jnp.arange(3.0)[:, None], mask[:3]
    )
    assert last.tolist() == [[1.0]]


@pytest.mark.parametrize("seed", range(6))
def test_lloyd(seed):
    X = blobs(seed, spread=2.0)
    if seed % 2:
        X = np.round(X)  # ties, and rows that are equal
    for mask in masks(seed):
        rows = X[mask]
        centers = rows[:K].astype(np.float64)
        if seed == 5:
            centers[1] = 100.0  # empty: it stays where it is
        centred, mean = kfed.centred(jnp.asarray(X), mask)
        mean = np.asarray(mean)
        for steps in (1, 50):
            found, labels = kfed.lloyd(centred, mask, np.float32(centers - mean), steps)
            expected, groups = oracle.lloyd(rows, centers, steps)
            np.testing.assert_array_equal(np.asarray(labels)[mask], groups)
            np.testing.assert_allclose(
                np.asarray(found) + mean, expected, rtol=1e-4, atol=1e-4
            )


def test_lloyd_conventions():
    X = jnp.array([[-2.0], [0.0], [2.0]])
    # Between the two: to the first. Of centres that are equal, the second stays empty.
    labels = kfed.lloyd(X, everybody(X), jnp.array([[2.0], [-2.0]]), 1)[1]
    assert labels.tolist() == [1, 0, 0]
    centers, labels = kfed.lloyd(X, everybody(X), jnp.full((2, 1), 3.0), 1)
    assert (centers.ravel().tolist(), labels.tolist()) == ([0.0, 3.0], [0, 0, 0])


@pytest.mark.parametrize("seed", range(3))
def test_core_sets(seed):
    X = blobs(seed)
    centers = X[:K] + 0.1
    for mask in masks(seed):
        for ratio in (1 / 3, 0.8):
            found = np.asarray(kfed.core_sets(X, mask, centers, ratio))
            expected = oracle.core_sets(X[mask], centers, ratio)
            np.testing.assert_array_equal(found[mask], expected)
            assert not found[~mask].any()
            assert 0 < found.sum() < mask.sum()


def subspace(X, mean):
    """The three strongest directions of ``X`` plus its mean, and LAPACK's."""
    m, h = X.shape
    args = [np.float32(a) for a in (X, np.ones((m, 1)), mean[None])]
    V, s = kfed.singular_subspace(jax.random.normal(KEY, (13, h)), *args, rank=3)
    whole = X + mean
    values = np.linalg.svd(whole, compute_uv=False)[:3]
    return np.asarray(V), np.asarray(s), oracle.right_singular(whole, 3), values


@pytest.mark.parametrize("num_rows", [40, 5])
def test_singular_subspace(num_rows):
    rng = np.random.default_rng(num_rows)
    X = rng.normal(size=(40, 3)) @ rng.normal(size=(3, 60)) * 5.0
    X += 0.3 * rng.normal(size=X.shape)
    mean = 50.0 * rng.normal(size=60)  # it dominates
    X[num_rows:] = -mean  # zero rows, as masked ones are
    V, s, expected, values = subspace(X, mean)
    np.testing.assert_allclose(V @ V.T, expected @ expected.T, atol=1e-3)
    np.testing.assert_allclose(V.T @ V, np.eye(3), atol=1e-5)
    np.testing.assert_allclose(s, values, rtol=2e-4)


def test_singular_subspace_of_few_directions():
    """Rank 1 of 3: what is left over is no direction of the rows."""
    row = np.zeros(60)
    row[[0, 2]] = 3.0, 4.0
    X = np.outer(np.arange(40.0), row)
    V, s, _, values = subspace(X, np.zeros(60))
    np.testing.assert_allclose(np.abs(V[:, 0]), row / 5.0, atol=1e-5)
    np.testing.assert_allclose(X @ V[:, 1:], 0.0, atol=1e-2)
    np.testing.assert_allclose(s, values, rtol=1e-5, atol=0.1)
    assert all(np.isfinite(found).all() for found in subspace(0 * X, np.zeros(60)))


def draws_of(key):
    """Those of k-means++: the first of all the draws of a client."""
    return np.asarray(jax.random.uniform(key, (K + H * H,)))[:K]


@pytest.mark.parametrize("seed", range(6))
def test_local_clusters(seed):
    A = blobs(seed, spread=[0.3, 1.5][seed % 2])
    key = jax.random.key(seed)
    for mask in masks(seed):
        garbage = np.where(mask[:, None], A, np.nan)
        found = kfed.local_clusters(key, garbage, mask, K)
        expected = oracle.local_clusters(A[mask].astype(float), draws_of(key), K)
        labels = np.asarray(found.labels)[mask]
        np.testing.assert_array_equal(labels, expected.labels)
        np.testing.assert_array_equal(
            found.counts, [expected.labels.count(r) for r in range(K)]
        )
        np.testing.assert_allclose(found.centers, expected.theta, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(found.separation, expected.separation, rtol=1e-3)


@pytest.mark.parametrize("power", [-40, 40, 58])
def test_local_clusters_have_no_unit(power):
    A, key, everybody = blobs(0, spread=0.3), jax.random.key(0), next(iter(masks(0)))
    scale = np.float32(2.0) ** power
    one = kfed.local_clusters(key, A, everybody, K)
    other = kfed.local_clusters(key, A * scale, everybody, K)
    np.testing.assert_array_equal(other.centers, one.centers * scale)
    np.testing.assert_array_equal(other.labels, one.labels)
    assert other.separation == one.separation


def test_local_clusters_of_two_distinct_rows():
    A = blobs(0)[np.arange(M) % 2]
    found = kfed.local_clusters(KEY, A, everybody(A), K)
    assert sorted(found.counts.tolist()) == [0, M // 2, M // 2]
    for r in np.flatnonzero(found.counts):
        rows = A[np.asarray(found.labels) == r]
        np.testing.assert_allclose(rows, np.broadcast_to(found.centers[r], rows.shape))
    assert np.isfinite(found.centers).all()


def test_local_clusters_of_nobody_and_of_equal_rows_are_finite():
    A = jnp.ones((M, H))
    for mask in (jnp.zeros(M, bool), jnp.ones(M, bool)):
        found = kfed.local_clusters(KEY, A, mask, K)
        assert np.isfinite(found.centers).all()
        assert found.counts.sum() == mask.sum()
        assert np.sum(found.counts > 0) == mask.any()
        assert found.separation == np.inf  # no two clusters


def test_an_empty_core_set_starts_from_the_lifted_centre():
    """The middle one of three clusters is two groups, too near to the others."""
    rng = np.random.default_rng(0)
    A = 5.0 + 0.01 * rng.normal(size=(M, H))
    A[:, 0] += np.repeat([-3.2, -1.0, 1.0, 3.2], M // 4)
    A = A.astype(np.float32)
    lifted = 0
    for seed in range(8):
        key = jax.random.key(seed)
        expected = oracle.local_clusters(A.astype(float), draws_of(key), K)
        empty = ~np.any(expected.core, axis=0)
        np.testing.assert_array_equal(expected.start[empty], expected.lifted[empty])
        lifted += int(empty.sum())
        found = kfed.local_clusters(key, A, everybody(A), K)
        np.testing.assert_array_equal(found.labels, expected.labels)
        np.testing.assert_allclose(found.centers, expected.theta, atol=1e-3)
    assert lifted


def test_farthest_first_conventions():
    X = jnp.array([[0.0], [5.0], [1.0], [-5.0], [9.0]])
    counted = jnp.array([True, True, True, True, False])
    first = jnp.arange(5) < 1
    # Of two as far the first; a row that does not count is never taken.
    assert kfed.farthest_first(X, counted, first, 3).tolist() == [0, 1, 3]
    # The first client has none that counts: the first centre of all.
    counted = jnp.array([False, False, True, True, True])
    assert kfed.farthest_first(X, counted, first, 3).tolist() == [2, 4, 3]


@pytest.mark.parametrize("max_steps", [1, 50])
@pytest.mark.parametrize("seed", range(4))
def test_merge_centers(seed, max_steps):
    N = 5
    theta = blobs(seed, N * K, spread=1.5).reshape(N, K, H)
    counted = np.random.default_rng(seed).uniform(size=(N, K)) < [1.0, 0.7][seed % 2]
    counted[:, 0] = True
    garbage = np.where(counted[:, :, None], theta, 1e9)
    merged = kfed.merge_centers(garbage, counted, K, max_steps)
    seeds, mu, tau = oracle.merge_centers(
        [rows[used] for rows, used in zip(theta, counted)], K, max_steps
    )
    np.testing.assert_allclose(merged.seeds, seeds, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(merged.centers, mu, rtol=1e-4, atol=1e-5)
    assert np.asarray(merged.labels)[counted].tolist() == np.concatenate(tau).tolist()
