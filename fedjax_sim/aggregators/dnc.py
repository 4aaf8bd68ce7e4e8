"""DnC: removes what stands out in the direction of largest variance."""

import math

import jax
import jax.numpy as jnp

from fedjax_sim.aggregators.common import (
    assumed_counts,
    normalize,
    stateless,
    weighted_sum,
)
from fedjax_sim.distances import lowest, pairwise_sq_distances
from fedjax_sim.linalg import eigh
from fedjax_sim.pytrees import participants
from fedjax_sim.registry import check_count, check_number, require
from fedjax_sim.types import Aggregator, AggregatorInfo, Array, PyTree, RoundContext


def dnc(
    max_byzantine: int,
    num_iterations: int = 1,
    num_coordinates: int = 10_000,
    fraction: float = 1.0,
) -> Aggregator:
    """The mean of the updates that stand out in no dominant direction.

    For ``num_iterations`` random sets of coordinates, with ``X`` those columns of the
    updates less their mean and ``v`` the top right singular vector of ``X``::

        s_i = (X_i . v)^2

    and the ``ceil(fraction f)`` clients of largest ``s_i`` go. Who is left every time
    makes up the mean.

    Assumptions: attackers that shift the mean span a direction of larger variance than
    the honest clients do. Few coordinates at a time make it cheap, and hard to foresee.

    Cost: O(n d + n^2 b + n^3) an iteration, for b coordinates.

    Args:
        max_byzantine: f, the number of Byzantine clients in a cohort that the rule is
            to stand.
        num_iterations: sets of coordinates.
        num_coordinates: size of a set, drawn without replacement; all of them if there
            are not so many.
        fraction: c, removed clients as a multiple of f.

    Returns:
        An ``Aggregator`` that needs ``key``. Removed clients are flagged; scores are
        the largest over the sets of ``s_i / sum_j s_j``, between 0 and 1.

    Raises:
        ValueError: an option out of range; from ``validate`` where
            ``ceil(fraction f) >= n``; from ``apply``, no ``key``.

    Example:
        >>> rule = dnc(max_byzantine=1)
        >>> U = jnp.array([[1, 0], [-1, 0], [0, 1], [0, -1], [8, 1]], jnp.float32)
        >>> context = RoundContext(key=jax.random.key(0))
        >>> rule.apply(U, rule.init(U[0], 5), context)[2].flagged.tolist()
        [False, False, False, False, True]

    References:
        Shejwalkar and Houmansadr, "Manipulating the Byzantine: optimizing model
        poisoning attacks and defenses for federated learning", NDSS 2021.

    Differs from the paper: ``v`` comes from the ``n x n`` Gram matrix of ``X``, which
    is the same; its sign does not matter to the squares. Where two directions share the
    largest variance, the eigenvector that the solver returns last counts. Of clients
    with one ``s_i``, those of lowest index stay. Rows left out of the round are taken
    for Byzantine, so f becomes ``max(0, f - rows left out)``. An empty intersection
    gives a zero aggregate.
    """
    max_byzantine = check_count("dnc's max_byzantine", max_byzantine, 0)
    num_iterations = check_count("dnc's num_iterations", num_iterations, 1)
    num_coordinates = check_count("dnc's num_coordinates", num_coordinates, 1)
    fraction = check_number("dnc's fraction", fraction, low=0)
    # For every f' up to f; 1e-9 is more than the product's rounding.
    removed = [math.ceil(fraction * f - 1e-9) for f in range(max_byzantine + 1)]

    def validate(cohort_size: int) -> None:
        check_count("dnc's cohort_size", cohort_size, 1)
        if removed[-1] >= cohort_size:
            raise ValueError(
                "dnc needs ceil(fraction * max_byzantine) < cohort_size; got fraction="
                f"{fraction:g}, max_byzantine={max_byzantine}, cohort_size="
                f"{cohort_size}, which leaves nobody. Lower max_byzantine or fraction, "
                f"or use a cohort of at least {removed[-1] + 1}."
            )

    def apply(
        updates: PyTree, state: PyTree, context: RoundContext
    ) -> tuple[PyTree, PyTree, AggregatorInfo]:
        U, mask, unravel = participants(updates, context)
        validate(len(U))
        key = require("dnc", context, "key")
        num_rows, f = assumed_counts(mask, max_byzantine)
        num_kept = num_rows - jnp.array(removed)[f]

        def one_set(key: Array) -> Array:
            if num_coordinates >= U.shape[1]:
                return variance_shares(U, mask)
            return variance_shares(
                U[:, draw_columns(key, U.shape[1], num_coordinates)], mask
            )

        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(num_iterations))
        scores = jnp.stack([one_set(k) for k in keys])
        scores = jnp.where(mask[None], scores, jnp.inf)
        keep = jax.vmap(lowest, (0, None))(scores, num_kept).all(axis=0)
        weights = normalize(keep.astype(jnp.float32))
        info = AggregatorInfo(weights, ~keep, scores.max(axis=0))
        return unravel(weighted_sum(weights, U)), state, info

    needs = frozenset({"key"})
    return Aggregator(stateless, apply, validate, needs, "dnc")


def draw_columns(key: Array, num_columns: int, count: int) -> Array:
    """``int32 [count]``: different columns, each set of them equally likely."""
    return jax.random.choice(key, num_columns, (count,), replace=False)


def variance_shares(X: Array, mask: Array) -> Array:
    """Shares of the participants in the largest variance: ``s_i / sum_j s_j``, ``[n]``.

    Zero where all rows are equal, and for rows that take no part.
    """
    # The centred Gram matrix by way of distances, which large outliers and a large
    # common offset do not rob of their digits.
    distances = pairwise_sq_distances(X, mask)
    pairs = mask[:, None] & mask[None, :]
    distances = jnp.where(pairs, distances, 0.0)
    largest = distances.max()
    distances = distances / jnp.where(largest > 0.0, largest, 1.0)
    mean = distances.sum(axis=0) / jnp.maximum(mask.sum(), 1)
    overall = mean.sum() / jnp.maximum(mask.sum(), 1)
    gram = (mean[:, None] + mean[None, :] - distances - overall) / 2
    _, vectors = eigh(jnp.where(pairs, gram, 0.0))
    return jnp.where(mask & (largest > 0.0), jnp.square(vectors[:, -1]), 0.0)
