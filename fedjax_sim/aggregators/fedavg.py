"""Federated averaging, the baseline without any robustness."""

import jax.numpy as jnp

from fedjax_sim import passes
from fedjax_sim.aggregators.common import (
    WEIGHTING,
    client_shares,
    client_sizes,
    weighted_sum,
)
from fedjax_sim.pytrees import participants
from fedjax_sim.registry import check_count, lookup
from fedjax_sim.types import (
    Aggregator,
    AggregatorInfo,
    Array,
    Params,
    PyTree,
    RoundContext,
)

_DENOMINATOR = {"cohort": False, "total": True}


def fedavg(weighting: str = "data", denominator: str = "cohort") -> Aggregator:
    """The mean of the updates, in proportion to the clients' data.

    ``aggregate = sum_i p_i u_i / sum_i p_i``

    Assumptions: everybody is honest. A single Byzantine client moves the mean anywhere.

    Cost: O(n d).

    Args:
        weighting: ``"data"`` takes ``p_i = num_samples_i`` (equal where the context
            does not say), ``"uniform"`` takes ``p_i = 1``.
        denominator: ``"cohort"`` averages over those that take part. ``"total"``
            also shrinks the step by (rows that take part) / N, as if the other of the
            N clients had sent zero.

    Returns:
        An ``Aggregator``. Weights are each client's share of the mean; nobody is
        suspected, so scores are 0.

    Raises:
        ValueError: unknown ``weighting`` or ``denominator``.

    Example:
        >>> import jax.numpy as jnp
        >>> rule = fedavg()
        >>> U = jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 12.0]])
        >>> context = RoundContext(num_samples=jnp.array([1.0, 1.0, 2.0]))
        >>> rule.apply(U, rule.init(U[0], 3), context)[0].tolist()
        [3.5, 7.5]

    References:
        McMahan, Moore, Ramage, Hampson, Agüera y Arcas, "Communication-efficient
        learning of deep networks from decentralized data", AISTATS 2017.

    Differs from the paper: no participant, or no data, gives a zero aggregate.
    ``denominator="total"`` is the update of the Federated Data Sanitization study.
    """
    by_data = lookup("fedavg weighting", weighting, WEIGHTING)
    over_all = lookup("fedavg denominator", denominator, _DENOMINATOR)

    def init(params: Params, num_clients: int) -> PyTree:
        return jnp.float32(num_clients) if over_all else ()

    def validate(cohort_size: int) -> None:
        check_count("fedavg's cohort_size", cohort_size, 1)

    def apply(
        updates: PyTree, state: PyTree, context: RoundContext
    ) -> tuple[PyTree, PyTree, AggregatorInfo]:
        U, mask, unravel = participants(updates, context, zero=False)
        validate(len(U))
        weights = client_shares(mask, context, by_data)
        aggregate = weighted_sum(weights, U, mask)
        if over_all:
            aggregate = aggregate * (mask.sum() / state)
        scores = jnp.where(mask, 0.0, jnp.inf)
        return unravel(aggregate), state, AggregatorInfo(weights, ~mask, scores)

    def in_passes(
        rows: passes.Rows, state: PyTree, context: RoundContext
    ) -> tuple[Array, PyTree, AggregatorInfo]:
        sizes = client_sizes(len(rows), context, by_data)
        mean, weights = passes.mean(rows, sizes)
        mask = rows.present
        if over_all:
            mean = mean * (mask.sum() / state)
        scores = jnp.where(mask, 0.0, jnp.inf)
        return mean, state, AggregatorInfo(weights, ~mask, scores)

    return Aggregator(init, apply, validate, name="fedavg", in_passes=in_passes)
