"""The geometric median, by a few smoothed Weiszfeld steps (RFA)."""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_sim import passes
from fedjax_sim.aggregators.common import (
    WEIGHTING,
    client_shares,
    client_sizes,
    normalize,
    stateless,
    weighted_sum,
)
from fedjax_sim.distances import distances_to
from fedjax_sim.pytrees import participants
from fedjax_sim.registry import check_count, check_number, lookup
from fedjax_sim.types import Aggregator, AggregatorInfo, Array, PyTree, RoundContext

_STARTS = {"mean": True, "zero": False}


def geometric_median(
    num_steps: int = 3,
    floor: float = 1e-6,
    start: str = "mean",
    weighting: str = "data",
) -> Aggregator:
    """The point of least total distance to the updates, approximately.

    It minimises ``sum_i p_i |z - u_i|`` by Weiszfeld steps from the mean of the
    updates::

        b_i = p_i / max(floor, |u_i - z|)
        z   = sum_i b_i u_i / sum_i b_i

    Assumptions: Byzantine clients hold less than half of all weight, which bounds the
    geometric median itself. A step divides the error of a far-off mean by only about n:
    three do not get over updates 1e8 times as long as the others. A client that
    announces more data than it has gains weight.

    Cost: O(T n d) for T steps.

    Args:
        num_steps: Weiszfeld steps, each two passes over the updates.
        floor: distance below which a client counts as that far away, in the unit of an
            update's norm.
        start: ``"mean"`` starts from the weighted mean, ``"zero"`` from the origin, as
            the server's present model.
        weighting: ``"data"`` takes ``p_i = num_samples_i`` (equal where the context
            does not say), ``"uniform"`` takes ``p_i = 1``.

    Returns:
        An ``Aggregator``. Weights are those of the last step, scores the distances
        they came from; nobody is flagged.

    Raises:
        ValueError: unknown ``start`` or ``weighting``, ``num_steps`` below 1, ``floor``
            below 1e-30, which float32 cannot divide by.

    Example:
        >>> import jax.numpy as jnp
        >>> rule = geometric_median(num_steps=50)
        >>> U = jnp.array([[0.0, 0.0], [2.0, 0.0], [1.0, 1.0], [1.0, 900.0]])
        >>> rule.apply(U, rule.init(U[0], 4), RoundContext())[0].round(2).tolist()
        [1.0, 1.0]

    References:
        Pillutla, Kakade, Harchaoui, "Robust aggregation for federated learning", IEEE
        Transactions on Signal Processing 2022.

    Differs from the paper: the number of steps is fixed, without a test of convergence.
    With ``start="zero"`` the result depends on the origin as long as it has not
    converged. The steps work on the updates: from their inner products the distance to
    a z close to one of them would be lost to rounding. No participant, or no data,
    gives a zero aggregate.
    """
    num_steps = check_count("geometric_median's num_steps", num_steps, 1)
    floor = check_number("geometric_median's floor", floor, low=1e-30, closed="[)")
    from_mean = lookup("geometric_median start", start, _STARTS)
    by_data = lookup("geometric_median weighting", weighting, WEIGHTING)

    def validate(cohort_size: int) -> None:
        check_count("geometric_median's cohort_size", cohort_size, 1)

    def apply(
        updates: PyTree, state: PyTree, context: RoundContext
    ) -> tuple[PyTree, PyTree, AggregatorInfo]:
        U, mask, unravel = participants(updates, context)
        validate(len(U))
        shares = client_shares(mask, context, by_data)

        def step(_: int, carry: tuple[Array, Array, Array]) -> tuple[Array, ...]:
            distances = distances_to(U, carry[0])
            weights = normalize(shares / jnp.maximum(distances, floor))
            return weighted_sum(weights, U), weights, distances

        z = weighted_sum(shares, U) if from_mean else jnp.zeros(U.shape[1])
        carry = (z, shares, jnp.zeros(len(U)))
        z, weights, distances = jax.lax.fori_loop(0, num_steps, step, carry)
        scores = jnp.where(mask, distances, jnp.inf)
        return unravel(z), state, AggregatorInfo(weights, ~mask, scores)

    def in_passes(
        rows: passes.Rows, state: PyTree, context: RoundContext
    ) -> tuple[Array, PyTree, AggregatorInfo]:
        sizes = client_sizes(len(rows), context, by_data)
        z = jnp.zeros(rows.size)
        if from_mean:
            z = passes.mean(rows, sizes)[0]

        def step(_: Any, carry: tuple[Array, Array, Array]) -> tuple[Array, ...]:
            def weigh(updates: Array, size: Array) -> tuple[Array, Array, Array]:
                distances = distances_to(updates, carry[0])
                weight = size / jnp.maximum(distances, floor)
                return weight, weight, distances

            return passes.weighted_mean(rows, weigh, sizes)

        z, weights, distances = passes.repeat(num_steps, step, (z,))
        scores = jnp.where(rows.present, distances, jnp.inf)
        return z, state, AggregatorInfo(weights, ~rows.present, scores)

    return Aggregator(
        stateless, apply, validate, name="geometric_median", in_passes=in_passes
    )
