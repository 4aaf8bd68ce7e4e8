"""Pairwise distances and Krum scores where float32 is at its limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim import distances
from tests.references import aggregators as oracle


def exact(U):
    U = np.asarray(U, np.float64)
    return np.array([[np.sum((a - b) ** 2) for b in U] for a in U])


@pytest.mark.parametrize(("n", "d"), [(1, 1), (2, 3), (9, 40)])
def test_symmetric_with_zero_diagonal(n, d):
    U = np.random.default_rng(0).normal(size=(n, d)).astype(np.float32)
    D = np.asarray(distances.pairwise_sq_distances(U))
    np.testing.assert_array_equal(D, D.T)
    assert np.all(np.diagonal(D) == 0)
    np.testing.assert_allclose(D, exact(U), rtol=1e-5, atol=1e-6)


def test_common_offset_does_not_cost_the_digits():
    rng = np.random.default_rng(0)
    U = rng.normal(size=4000) * 1.5 + 1e-4 * rng.normal(size=(20, 4000))
    U = U.astype(np.float32)
    D = distances.pairwise_sq_distances(U)
    np.testing.assert_allclose(D, exact(U), rtol=1e-4)


@pytest.mark.parametrize("size", [1e2, 1e8, 1e18])
def test_outliers_do_not_cost_the_others_their_digits(size):
    rng = np.random.default_rng(1)
    U = (3.0 + 0.01 * rng.normal(size=(20, 300))).astype(np.float32)
    U[:8] *= size * np.sign(rng.normal(size=(8, 1)))
    D = np.asarray(distances.pairwise_sq_distances(U / 20))
    np.testing.assert_allclose(D[8:, 8:], exact(U / 20)[8:, 8:], rtol=1e-3)
    assert np.all(D[:8, 8:] > 1)


def test_rows_at_the_end_of_float32_are_far_not_near():
    """Their products overflow to inf - inf; that must not come out as a distance 0."""
    U = np.random.default_rng(2).normal(size=(9, 2)).astype(np.float32)
    U[0], U[1], U[2] = [1.5e19, 0], [-1.5e19, 0], [1.5e19, 1e18]
    D = np.asarray(distances.pairwise_sq_distances(U))
    assert np.all(np.isfinite(D))
    assert np.all(D[:3, 3:] > 1e30)
    scores = distances.krum_scores(D, jnp.ones(9, bool), 6)
    assert np.all(np.isfinite(scores))
    assert np.all(np.argsort(scores)[-3:] < 3)


def test_rows_left_out_are_no_centre():
    U = np.array([[0.0], [0.0], [0.0], [1e4], [1e4 + 0.01]], np.float32)
    mask = np.array([False, False, False, True, True])
    D = distances.pairwise_sq_distances(U, mask)
    np.testing.assert_allclose(D[3, 4], exact(U)[3, 4], rtol=1e-6)


def test_blocks_of_columns_count_every_column_once():
    # Two blocks and a rest on CPU, the last of which overlaps the one before it.
    rng = np.random.default_rng(0)
    U = rng.normal(size=(7, 2 * distances._CPU_BLOCK + 37)).astype(np.float32)
    D = np.asarray(distances.pairwise_sq_distances(U))
    np.testing.assert_allclose(D, exact(U), rtol=1e-5, atol=1e-2)
    assert np.all(np.diagonal(D) == 0)


def test_rows_left_out_may_hold_anything():
    U = np.random.default_rng(0).normal(size=(6, 5000)).astype(np.float32)
    expected = exact(U)[2:, 2:]
    U[0], U[1] = np.nan, np.inf
    D = np.asarray(distances.pairwise_sq_distances(U, np.arange(6) >= 2))
    np.testing.assert_allclose(D[2:, 2:], expected, rtol=1e-5, atol=1e-3)


def test_krum_scores_with_any_number_of_neighbours():
    U = np.random.default_rng(3).normal(size=(8, 5)).astype(np.float32)
    D = distances.pairwise_sq_distances(U)
    for rows in ([0, 1, 2, 3, 4, 5, 6, 7], [1, 3, 4, 7], [2], []):
        mask = np.isin(np.arange(8), rows)
        for q in (-1, 0, 1, 3, 7, 20):
            found = distances.krum_scores(D, mask, q)
            np.testing.assert_allclose(found, oracle.scores_among(U, rows, q), 1e-4)


def test_lowest_takes_the_lower_index_of_a_tie_and_never_inf():
    scores = jnp.array([3.0, 1.0, jnp.inf, 1.0, 3.0, jnp.inf])
    for count, chosen in [
        (-1, []),
        (0, []),
        (1, [1]),
        (2, [1, 3]),
        (3, [0, 1, 3]),
        (9, [0, 1, 3, 4]),
    ]:
        assert np.flatnonzero(distances.lowest(scores, count)).tolist() == chosen


def test_krum_order_of_the_worked_example():
    U = jnp.array(
        [[1.0, 0], [2.0, 0], [2.0, 1], [1.0, 2], [3.0, 2], [0.0, 1], [-9.0, 8]]
    )
    D = distances.pairwise_sq_distances(U)
    order = jax.jit(
        lambda steps: distances.krum_order(D, jnp.ones(7, bool), steps, lambda r: r - 3)
    )
    assert order(3).tolist() == [1, 7, 0, 2, 7, 7, 7]
    assert sorted(order(20).tolist()) == list(range(7))
    assert order(0).tolist() == [7] * 7


def test_distances_to_a_point_do_not_overflow():
    rng = np.random.default_rng(0)
    U = rng.normal(size=(5, 40)).astype(np.float32)
    point = U[1]
    expected = np.linalg.norm(U - point, axis=1)
    np.testing.assert_allclose(distances.distances_to(U, point), expected, 1e-6)
    assert distances.distances_to(U, point)[1] == 0
    far = 1.8e19 * np.eye(1, 40, dtype=np.float32)
    np.testing.assert_allclose(distances.distances_to(far, -far[0]), [3.6e19], 1e-6)


@pytest.mark.parametrize("n", [65, 128, 200])
def test_scores_of_many_clients_are_those_of_few(n):
    rng = np.random.default_rng(n)
    D = distances.pairwise_sq_distances(jnp.asarray(rng.normal(size=(n, 5)), "float32"))
    mask = jnp.asarray(rng.random(n) < 0.9)
    few = distances.krum_scores(D, mask, n // 3)
    many = jax.jit(distances._scores_of_many)(D, mask, n // 3)
    np.testing.assert_allclose(many, few, rtol=1e-5)
    # Where fewer are left than are asked for, those count.
    np.testing.assert_allclose(
        distances._scores_of_many(D, mask, n), distances.krum_scores(D, mask, n), 1e-5
    )
