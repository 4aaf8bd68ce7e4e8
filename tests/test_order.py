"""The sort network and what is read off it, against NumPy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim import order


def matrix(n, d, seed=0):
    """Values with ties, infinities and fifteen orders of magnitude."""
    rng = np.random.default_rng(seed)
    U = np.round(rng.normal(size=(n, d)) * 10.0 ** rng.integers(-3, 12, (n, 1)), 1)
    return U.astype(np.float32)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 9, 100])
def test_sorts_any_number_of_rows(n):
    U = matrix(n, 7)
    U[0, 0], U[-1, 1] = np.inf, -np.inf
    np.testing.assert_array_equal(order.sort_clients(U), np.sort(U, axis=0))


@pytest.mark.parametrize("d", [0, 1, 1024, 1025, 3000])
def test_any_number_of_columns(d):
    """Blocks of 1024 columns, the last of which overlaps the one before."""
    U = matrix(6, d)
    np.testing.assert_array_equal(order.sort_clients(U), np.sort(U, axis=0))
    medians, shares = order.mean_of_ranks(U, jnp.ones(6, bool), 2, 3)
    np.testing.assert_allclose(medians, np.median(U, axis=0), rtol=1e-6)
    assert np.isclose(shares.sum(), 1) or d == 0
    assert np.all(np.isfinite(shares))


def test_shares_do_not_depend_on_the_blocks():
    U = matrix(6, 3000)
    mask = jnp.ones(6, bool)
    _, shares = order.mean_of_ranks(U, mask, 2, 3)
    parts = [
        order.mean_of_ranks(U[:, i : i + 500], mask, 2, 3)[1]
        for i in range(0, 3000, 500)
    ]
    np.testing.assert_allclose(shares, np.mean(parts, axis=0), rtol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 7])
def test_masked_median_and_trimmed_mean(n):
    U = matrix(n, 11)
    rng = np.random.default_rng(n)
    for _ in range(6):
        mask = rng.random(n) < 0.6
        rows = U[mask].astype(np.float64)
        zero = np.zeros(11)
        expected = np.median(rows, axis=0) if mask.any() else zero
        np.testing.assert_allclose(order.median(U, mask), expected, rtol=1e-6)
        lower = np.sort(rows, axis=0)[(len(rows) - 1) // 2] if mask.any() else zero
        np.testing.assert_array_equal(order.median(U, mask, "lower"), lower)
        for trim in range(3):
            kept = np.sort(rows, axis=0)[trim : len(rows) - trim]
            expected = kept.mean(axis=0) if len(kept) else zero
            found = order.trimmed_mean(U, mask, trim)
            scale = np.abs(kept).max(initial=1)
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * scale)


def test_trimmed_outliers_leave_no_rounding_error():
    rng = np.random.default_rng(0)
    U = rng.normal(size=(20, 50)).astype(np.float32)
    for size in (1e8, 1e18, np.inf):
        U[:3], U[3:5] = size, -size
        expected = np.sort(U, axis=0)[5:15].astype(np.float64).mean(axis=0)
        np.testing.assert_allclose(order.trimmed_mean(U, None, 5), expected, 1e-5, 1e-6)


def test_ties_share_what_they_supplied():
    U = jnp.array([[1.0], [1.0], [1.0], [5.0], [9.0]])
    everybody = jnp.ones(5, bool)
    for first, last, shares in [
        (0, 4, [0.2, 0.2, 0.2, 0.2, 0.2]),
        (1, 3, [2 / 9, 2 / 9, 2 / 9, 1 / 3, 0]),
        (2, 2, [1 / 3, 1 / 3, 1 / 3, 0, 0]),
        (3, 3, [0, 0, 0, 1, 0]),
        (3, 2, [0, 0, 0, 0, 0]),
    ]:
        found = order.mean_of_ranks(U, everybody, first, last)[1]
        np.testing.assert_allclose(found, shares, rtol=1e-6)


def nearest(U, mask, centre, count):
    """Means and shares of the values nearest to a centre, in plain loops."""
    n, d = U.shape
    rows = [i for i in range(n) if mask[i]]
    means, shares = np.zeros(d), np.zeros(n)
    for j in range(d):
        far = np.abs(U[:, j].astype(np.float64) - centre[j])
        kept = sorted(rows, key=lambda i: (far[i], i))[: max(count, 0)]
        for i in kept:
            means[j] += np.float64(U[i, j]) / len(kept)
            shares[i] += 1 / len(kept) / d
    return means, shares


@pytest.mark.parametrize(("n", "d"), [(1, 3), (7, 40), (12, 1023), (12, 2500)])
def test_mean_near(n, d):
    """With ties on both sides of the centre, and blocks that overlap."""
    rng = np.random.default_rng(n)
    U = rng.integers(-4, 5, (n, d)).astype(np.float32)
    U[:, ::3] += rng.normal(size=U[:, ::3].shape).astype(np.float32)
    centre = rng.integers(-1, 2, d).astype(np.float32)
    mean_near = jax.jit(order.mean_near)
    for count in (-1, 0, 1, n // 2, n - 1, n, n + 2):
        for mask in (np.ones(n, bool), rng.random(n) < 0.7, np.zeros(n, bool)):
            means, shares = mean_near(U, mask, centre, count)
            expected, supplied = nearest(U, mask, centre, count)
            np.testing.assert_allclose(means, expected, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(shares, supplied, rtol=1e-5, atol=1e-7)


def test_mean_near_breaks_ties_by_index():
    U, everybody = jnp.array([[4.0], [0.0], [2.0], [4.0], [0.0]]), jnp.ones(5, bool)
    for count, kept in [(1, [2]), (2, [2, 0]), (3, [2, 0, 1]), (4, [2, 0, 1, 3])]:
        means, shares = order.mean_near(U, everybody, jnp.array([2.0]), count)
        np.testing.assert_allclose(means, np.mean(U[jnp.array(kept)]), rtol=1e-6)
        np.testing.assert_array_equal(np.flatnonzero(shares), sorted(kept))


def test_mean_near_leaves_no_rounding_error_of_what_is_far():
    U = np.random.default_rng(0).normal(size=(20, 50)).astype(np.float32)
    U[:3], U[3:5] = 1e18, -1e8
    means, shares = order.mean_near(U, jnp.ones(20, bool), jnp.zeros(50), 15)
    expected = U[5:].astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(means, expected, 1e-5, 1e-6)
    np.testing.assert_allclose(shares, np.where(np.arange(20) < 5, 0, 1 / 15), 1e-5)


@pytest.mark.parametrize("d", [23, 1024, 1500])
def test_mean_near_a_centre_that_is_computed_with_it(d):
    """Where the compiler computes the centre twice, in another rounding."""
    rng = np.random.default_rng(1)
    mask = np.arange(12) < 10

    @jax.jit
    def mean_of_all(U):
        centre = order.trimmed_mean(U, mask, 0)
        return order.mean_near(U, mask, centre, mask.sum())

    for _ in range(5):
        U = rng.lognormal(size=(12, 1)) * rng.normal(size=(12, d))
        means, shares = mean_of_all(U.astype(np.float32))
        np.testing.assert_allclose(means, U[:10].mean(axis=0), 1e-4, 1e-5)
        np.testing.assert_allclose(shares, mask / 10, 1e-5)


@pytest.mark.parametrize(("n", "d"), [(1, 3), (7, 40), (9, 5000)])
def test_supplied_where_moved(n, d):
    """With ties, blocks that overlap and columns whose mean is 0."""
    rng = np.random.default_rng(n)
    U = rng.integers(-2, 3, (n, d)).astype(np.float32)
    U[:, ::3] += rng.normal(size=U[:, ::3].shape).astype(np.float32)
    U[:, 1] = 0
    find = jax.jit(order.supplied_where_moved)  # the ranks are traced
    for first, last in [(0, n - 1), (n // 3, n // 2), (1, n), (2, 1)]:
        for mask in (np.ones(n, bool), rng.random(n) < 0.7, np.zeros(n, bool)):
            means, supplied, columns = find(U, mask, first, last)
            rows = U[mask].astype(np.float64)
            kept = np.sort(rows, axis=0)[first : last + 1]
            expected = kept.mean(axis=0) if len(kept) else np.zeros(d)
            np.testing.assert_allclose(means, expected, rtol=1e-5, atol=1e-6)
            moved, shares = np.asarray(means) != 0, np.zeros(n)
            if len(kept):
                own = (kept[:, None] == rows[None]).sum(axis=0)
                among = (rows[:, None] == rows[None]).sum(axis=0)
                shares[mask] = np.where(moved, own / among, 0).sum(axis=1)
            np.testing.assert_allclose(supplied, shares, 1e-5, 1e-6)
            np.testing.assert_allclose(supplied.sum(), len(kept) * moved.sum(), 1e-5)
            assert columns == moved.sum()
    assert not find(U[:, :2] * 0, np.ones(n, bool), 0, n - 1)[2]


@pytest.mark.parametrize(("n", "d"), [(1, 3), (2, 5), (7, 40), (9, 5000)])
def test_means_without_each(n, d):
    """Every row left out in turn, of ties, of blocks that overlap and of masks."""
    rng = np.random.default_rng(n)
    U = rng.integers(-2, 3, (n, d)).astype(np.float32)
    U[:, ::3] += rng.normal(size=U[:, ::3].shape).astype(np.float32)
    find = jax.jit(order.means_without_each)
    for first, last in [(0, n - 2), (n // 3, n // 2), (1, n), (2, 1), (-1, 0)]:
        for mask in (np.ones(n, bool), rng.random(n) < 0.7):
            found = find(U, mask, first, last)
            for i in np.flatnonzero(mask):
                others = np.sort(U[mask & (np.arange(n) != i)], axis=0)
                kept = others[max(first, 0) : last + 1].astype(np.float64)
                expected = kept.mean(axis=0) if len(kept) else np.zeros(d)
                np.testing.assert_allclose(found[i], expected, 1e-5, 1e-6)


def test_means_without_each_leave_no_rounding_error_of_what_is_trimmed():
    U = np.random.default_rng(0).normal(size=(12, 5000)).astype(np.float32)
    U[:2], U[2] = 1e8, -1e8
    found = order.means_without_each(U, jnp.ones(12, bool), 2, 8)
    for i in range(12):
        others = np.sort(np.delete(U, i, axis=0), axis=0)
        expected = others[2:9].astype(np.float64).mean(axis=0)
        np.testing.assert_allclose(found[i], expected, 1e-5, 1e-6)


def test_jit_vmap_and_no_sort():
    U = np.stack([matrix(7, 2500, seed) for seed in range(3)])
    masks = np.array([[1] * 7, [1, 0] * 3 + [1], [0] * 7], bool)
    trims = np.array([1, 2, 0])
    found = jax.jit(jax.vmap(order.trimmed_mean))(U, masks, trims)
    for one, *args in zip(found, U, masks, trims):
        np.testing.assert_allclose(one, order.trimmed_mean(*args), rtol=1e-6)
    centres = U[:, 0]
    near = jax.jit(jax.vmap(order.mean_near))(U, masks, centres, trims + 1)
    for one, share, *args in zip(*near, U, masks, centres, trims + 1):
        expected = order.mean_near(*args)
        np.testing.assert_allclose(one, expected[0], rtol=1e-6)
        np.testing.assert_allclose(share, expected[1], rtol=1e-6)
    for function, args in [(order.median, ()), (order.mean_near, (centres, trims))]:
        jaxpr = str(jax.make_jaxpr(jax.vmap(function))(U, masks, *args))
        assert not re.search(r"\b(sort|top_k)\[", jaxpr)


def test_unknown_even():
    with pytest.raises(ValueError, match="Did you mean 'midpoint'"):
        order.median(jnp.ones((2, 1)), even="midpiont")


@pytest.mark.parametrize("count", [0, 1, 5, 17, 40])
def test_sum_of_smallest(count):
    x = np.random.default_rng(3).exponential(size=(6, 30)).astype(np.float32)
    x[0, 4:] = np.inf
    x[1, :] = 2.5  # ties
    x[2, ::3] = 0.0
    x[3] *= 1e-30
    x[4] *= 1e30
    found = jax.jit(order.sum_of_smallest)(x, count)
    kept = np.sort(x, axis=1)[:, :count].astype(np.float64)
    kept[~np.isfinite(kept)] = 0.0
    np.testing.assert_allclose(found, kept.sum(axis=1), rtol=1e-5)
