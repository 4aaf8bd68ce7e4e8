"""Distances between clients and to a point, and the Krum scores built on them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fedjax_sim.order import map_columns, sort_clients, sum_of_smallest
from fedjax_sim.types import Array

# Columns whose products a CPU sums at once: 100 rows of them are read from memory once,
# centred and multiplied in cache.
_CPU_BLOCK = 4096
# Clients whose distances are sorted to find the nearest.
_SORTED = 1024
# Beyond that, rows whose nearest are found together: they stay in cache.
_SCORED = 64


@jax.jit
def pairwise_sq_distances(U: Array, mask: Array | None = None) -> Array:
    """Squared Euclidean distances between the rows of ``U``, by their Gram matrix.

    ``D_ij = |u_i|^2 + |u_j|^2 - 2 u_i . u_j`` loses every digit in float32 when the
    rows share a large offset, so one row is subtracted first. It is the participants'
    row of (lower) median norm, which no minority can blow up; the mean row can be.

    Args:
        U: float ``[n, d]``; finite in the rows that take part.
        mask: ``bool [n]``, who takes part; None for everybody. The entries of other
            rows mean nothing.

    Returns:
        ``[n, n]``: exactly symmetric, at least 0, diagonal 0, and capped where float32
        ends, so that a sum over n entries stays finite.

    Example:
        >>> import jax.numpy as jnp
        >>> pairwise_sq_distances(jnp.array([[0.0, 0.0], [3.0, 4.0]])).tolist()
        [[0.0, 25.0], [25.0, 0.0]]
    """
    mask = jnp.ones(len(U), bool) if mask is None else mask
    return from_gram(gram(U, mask, middle_row(jnp.sum(U * U, axis=1), mask)))


def middle_row(sq_norms: Array, mask: Array) -> Array:
    """Index of the participants' row of (lower) median norm."""
    ordered = jnp.argsort(jnp.where(mask, sq_norms, jnp.inf))
    return ordered[jnp.maximum(mask.sum() - 1, 0) // 2]


def gram(U: Array, mask: Array, middle: Array) -> Array:
    """``[n, n]``: inner products of the rows in ``mask`` less the row ``middle``."""

    def gram_of(block: Array, fresh: Array, centre: Array) -> tuple[tuple, Array]:
        used = mask[:, None] & fresh[None]
        centred = jnp.where(used, block - centre[None], 0.0)
        product = jnp.matmul(centred, centred.T, precision=jax.lax.Precision.HIGHEST)
        return (), product

    return map_columns(gram_of, U, U[middle], block=_CPU_BLOCK)[1]


def from_gram(gram: Array) -> Array:
    """Squared distances ``[n, n]`` of rows whose inner products these are."""
    sq_norms = jnp.diagonal(gram)
    D = (sq_norms[:, None] - gram) + (sq_norms[None, :] - gram)
    # Overflow leaves inf or inf - inf here: rows that far apart are as far as can be.
    cap = jnp.finfo(D.dtype).max / (2 * len(gram))
    D = jnp.clip(jnp.where(jnp.isnan(D), cap, D), 0.0, cap)
    return jnp.where(jnp.eye(len(gram), dtype=bool), 0.0, (D + D.T) / 2)


def distances_to(U: Array, point: Array) -> Array:
    """Euclidean distance of every row to a point.

    Args:
        U: float ``[n, d]``, rows of finite squared norm.
        point: ``[d]``, likewise.

    Returns:
        ``[n]``, finite: a difference may be twice as long as a vector whose square just
        fits float32, so a quarter of it is squared.

    Example:
        >>> import jax.numpy as jnp
        >>> U = jnp.array([[0.0, 0.0], [3.0, 4.0]])
        >>> distances_to(U, jnp.zeros(2)).tolist()
        [0.0, 5.0]
    """
    return 4.0 * jnp.linalg.norm(0.25 * (U - point[None]), axis=1)


@jax.jit
def krum_scores(distances: Array, mask: Array, num_neighbours: Array | int) -> Array:
    """Krum's score: the sum of a client's distances to its nearest neighbours.

    Args:
        distances: ``[n, n]``, symmetric and finite.
        mask: ``bool [n]``, who may be chosen and who counts as a neighbour.
        num_neighbours: neighbours summed, an integer that may be traced. Where fewer
            than that are left, those are summed.

    Returns:
        ``[n]``, ``inf`` where ``mask`` is False.

    Example:
        >>> import jax.numpy as jnp
        >>> D = pairwise_sq_distances(jnp.array([[0.0], [1.0], [3.0]]))
        >>> krum_scores(D, jnp.ones(3, bool), num_neighbours=1).tolist()
        [1.0, 1.0, 4.0]
    """
    if len(mask) > _SORTED:
        return _scores_of_many(distances, mask, num_neighbours)
    others = mask[:, None] & mask[None, :] & ~jnp.eye(len(mask), dtype=bool)
    nearest = sort_clients(jnp.where(others, distances, jnp.inf))
    counted = (jnp.arange(len(mask)) < num_neighbours)[:, None] & jnp.isfinite(nearest)
    return jnp.where(mask, jnp.where(counted, nearest, 0.0).sum(axis=0), jnp.inf)


def _scores_of_many(
    distances: Array, mask: Array, num_neighbours: Array | int
) -> Array:
    """``krum_scores``, a few rows at a time: no copy of the distances is made."""
    num_rows = len(mask)

    def of_some(i: Array) -> Array:
        start = jnp.minimum(i * _SCORED, num_rows - _SCORED)
        rows = jax.lax.dynamic_slice_in_dim(distances, start, _SCORED)
        mine = start + jnp.arange(_SCORED)
        others = mask[None, :] & (mine[:, None] != jnp.arange(num_rows)[None, :])
        return sum_of_smallest(jnp.where(others, rows, jnp.inf), num_neighbours)

    num_blocks = -(-num_rows // _SCORED)
    sums = jax.lax.map(of_some, jnp.arange(num_blocks))
    # The last block overlaps the one before it.
    overlap = num_blocks * _SCORED - num_rows
    sums = jnp.concatenate([sums[:-1].reshape(-1), sums[-1, overlap:]])
    return jnp.where(mask, sums, jnp.inf)


def lowest(scores: Array, count: Array | int) -> Array:
    """``bool [n]``: the ``count`` lowest finite scores, ties to the lowest index.

    Example:
        >>> import jax.numpy as jnp
        >>> lowest(jnp.array([2.0, 1.0, 1.0, jnp.inf]), 1).tolist()
        [False, True, False, False]
    """
    order = jnp.argsort(scores)
    rank = jnp.zeros(len(scores), jnp.int32).at[order].set(jnp.arange(len(scores)))
    return (rank < count) & jnp.isfinite(scores)


def krum_order(
    distances: Array,
    mask: Array,
    num_steps: Array | int,
    num_neighbours: Callable[[Array], Array],
) -> Array:
    """Picks the client of lowest Krum score, takes it out, scores the rest again.

    Args:
        distances: ``[n, n]``, symmetric and finite.
        mask: ``bool [n]``, who takes part.
        num_steps: clients to pick, an integer that may be traced; at most as many as
            take part.
        num_neighbours: from the number of clients left to the neighbours summed.

    Returns:
        ``int32 [n]``: the step in which each client was picked, n if it never was.

    Example:
        >>> import jax.numpy as jnp
        >>> D = pairwise_sq_distances(jnp.array([[0.0], [1.0], [3.0], [9.0]]))
        >>> krum_order(D, jnp.ones(4, bool), 2, lambda left: left - 2).tolist()
        [1, 0, 4, 4]
    """
    never = len(mask)

    def pick(step: Array, picked: Array) -> Array:
        left = mask & (picked == never)
        scores = krum_scores(distances, left, num_neighbours(left.sum()))
        return picked.at[jnp.argmin(scores)].set(step)

    picked = jnp.full(never, never, jnp.int32)
    num_steps = jnp.minimum(num_steps, mask.sum()).astype(jnp.int32)
    return jax.lax.fori_loop(jnp.int32(0), num_steps, pick, picked)
