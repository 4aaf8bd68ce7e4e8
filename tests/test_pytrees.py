"""Stacked pytrees: who takes part, and sums over the client axis."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim.aggregators.common import weighted_sum
from fedjax_sim.pytrees import finite_rows, participants, reduce_clients
from fedjax_sim.types import RoundContext


# Longer rows than there are of them, and the other way round: two programs on CPU.
@pytest.mark.parametrize("shape", [(5, 3, 4), (40, 3), (1, 2)])
@pytest.mark.parametrize(
    ("combine", "start", "reference"),
    [
        (jax.lax.add, 0.0, np.sum),
        (jax.lax.max, -np.inf, np.max),
        (jax.lax.min, np.inf, np.min),
    ],
)
def test_reduce_clients(shape, combine, start, reference):
    rng = np.random.default_rng(0)
    U, chosen = rng.normal(size=shape).astype(np.float32), rng.random(shape[0]) < 0.7

    def f(take, row):
        return jnp.where(take, row * row - 1.0, start)

    found = jax.jit(lambda c, u: reduce_clients(combine, start, f, c, u))(chosen, U)
    along = chosen.reshape(-1, *[1] * (U.ndim - 1))
    expected = reference(np.where(along, U.astype(float) ** 2 - 1.0, start), axis=0)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_reduce_clients_under_vmap():
    U = np.random.default_rng(0).normal(size=(3, 4, 9)).astype(np.float32)
    found = jax.vmap(lambda u: reduce_clients(jax.lax.add, 0.0, jnp.abs, u))(U)
    np.testing.assert_allclose(found, np.abs(U).sum(axis=1), rtol=1e-5)


def test_finite_rows_of_a_tree_are_those_of_its_matrix():
    a = np.ones((4, 2, 3), np.float32)
    b = np.ones((4, 5), np.float32)
    a[1, 0, 2], b[2, 4], b[3, 0] = np.nan, -np.inf, 2e19  # whose square is infinite
    matrix = np.concatenate([a.reshape(4, -1), b], axis=1)
    expected = [True, False, False, False]
    assert finite_rows({"a": a, "b": b}).tolist() == expected
    assert finite_rows(matrix).tolist() == expected


@pytest.mark.parametrize("out", [[], [1], [0, 3]])
def test_a_weighted_sum_takes_nothing_from_rows_that_are_out(out):
    U = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    mask = ~np.isin(np.arange(4), out)
    weights = np.where(mask, 0.25, 0.0).astype(np.float32)
    expected = weights @ U
    U[~mask] = np.nan
    found = weighted_sum(jnp.asarray(weights), jnp.asarray(U), jnp.asarray(mask))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_participants_leave_the_matrix_as_it_is_if_asked_to():
    U = jnp.array([[1.0, 2.0], [jnp.nan, 1.0]])
    zeroed, mask, _ = participants(U, RoundContext())
    assert zeroed.tolist() == [[1.0, 2.0], [0.0, 0.0]]
    raw, same, _ = participants(U, RoundContext(), zero=False)
    np.testing.assert_array_equal(raw, U)
    assert mask.tolist() == same.tolist() == [True, False]
