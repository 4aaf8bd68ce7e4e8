"""Robust learning rate: the server turns back where clients disagree."""

import jax
import jax.numpy as jnp

from fedjax_sim import passes
from fedjax_sim.aggregators.common import (
    client_shares,
    client_sizes,
    normalize,
    stateless,
    weighted_sum,
)
from fedjax_sim.order import mean_of_ranks, median_ranks
from fedjax_sim.pytrees import participants, reduce_clients
from fedjax_sim.registry import check_count, lookup
from fedjax_sim.types import Aggregator, AggregatorInfo, Array, PyTree, RoundContext

_BASES = {"mean": False, "median": True}


def robust_learning_rate(threshold: int = 4, base: str = "mean") -> Aggregator:
    """The mean or the median, reversed in coordinates without a clear common sign.

    ``aggregate_j = base_j`` where ``|sum_i sign(u_ij)| >= threshold``, else ``-base_j``

    Assumptions: a backdoor is pushed by few clients in coordinates in which the others
    have no common direction. ``threshold > f``, or the f alone can reach it. Where
    clients' data differ much, honest coordinates without agreement are reversed too,
    not only stopped.

    Cost: O(n d).

    Args:
        threshold: agreement from which a coordinate keeps its sign: clients of one sign
            less clients of the other. 0 keeps every sign.
        base: ``"mean"``, weighted by the clients' data (alike where the context does
            not say), or the coordinate-wise ``"median"``, which counts clients alike.

    Returns:
        An ``Aggregator``. Weights are the base's: shares of the mean, or the share of
        coordinates that a client's value supplied. Scores are 0 with the mean and 1
        minus the weight with the median.

    Raises:
        ValueError: ``threshold`` negative or unknown ``base``; from ``validate`` where
            ``threshold > n``.

    Example:
        >>> import jax.numpy as jnp
        >>> rule = robust_learning_rate(threshold=2)
        >>> U = jnp.array([[1.0, 1.0], [2.0, -1.0], [3.0, -2.0], [-2.0, 5.0]])
        >>> rule.apply(U, rule.init(U[0], 4), RoundContext())[0].tolist()
        [1.0, -0.75]

    References:
        Ozdayi, Kantarcioglu, Gel, "Defending against backdoors in federated learning
        with robust learning rate", AAAI 2021.

    Differs from the paper: signs are those of the updates alone; clipping and noise are
    not part of the rule, and neither is the base that steps by one unit per coordinate
    (sign aggregation). The median of an even count is the midpoint. 4 is the authors'
    threshold for 10 clients: raise it with the cohort. Fewer participants than the
    threshold could only ever reverse; the aggregate is then zero and everybody is
    flagged. No data gives a zero aggregate.
    """
    threshold = check_count("robust_learning_rate's threshold", threshold, 0)
    by_median = lookup("robust_learning_rate base", base, _BASES)

    def validate(cohort_size: int) -> None:
        check_count("robust_learning_rate's cohort_size", cohort_size, 1)
        if threshold > cohort_size:
            raise ValueError(
                "robust_learning_rate needs threshold <= cohort_size; got threshold="
                f"{threshold}, cohort_size={cohort_size}: every coordinate would be "
                f"reversed. Lower threshold to {cohort_size} or less, or use a larger "
                "cohort."
            )

    def apply(
        updates: PyTree, state: PyTree, context: RoundContext
    ) -> tuple[PyTree, PyTree, AggregatorInfo]:
        U, mask, unravel = participants(updates, context)
        validate(len(U))
        mask &= mask.sum() >= threshold
        if by_median:
            aggregate, weights = mean_of_ranks(U, mask, *median_ranks(mask.sum()))
            suspicion = 1.0 - weights
        else:
            weights = client_shares(mask, context, by_data=True)
            aggregate = weighted_sum(weights, U)
            suspicion = jnp.zeros(len(U))
        # Rows that take no part are zero, and so is their sign.
        agreement = jnp.abs(reduce_clients(jax.lax.add, 0.0, jnp.sign, U))
        aggregate = jnp.where(agreement >= threshold, aggregate, -aggregate)
        scores = jnp.where(mask, suspicion, jnp.inf)
        return unravel(aggregate), state, AggregatorInfo(weights, ~mask, scores)

    def in_passes(
        rows: passes.Rows, state: PyTree, context: RoundContext
    ) -> tuple[Array, PyTree, AggregatorInfo]:
        sizes = client_sizes(len(rows), context, by_data=True)

        def part(updates: Array, present: Array, sizes: Array) -> tuple[tuple, Array]:
            sizes = jnp.where(present, sizes, 0.0)
            return (weighted_sum(sizes, updates), jnp.sign(updates).sum(axis=0)), sizes

        (total, signs), sizes = rows.scan(part, sizes)
        mask = rows.present & (rows.present.sum() >= threshold)
        suspicion = jnp.zeros(len(rows))
        if by_median:
            aggregate, weights = passes.mean_of_ranks(
                rows, lambda mask: median_ranks(mask.sum())
            )
            enough = mask.any()
            aggregate = jnp.where(enough, aggregate, 0.0)
            weights = jnp.where(enough, weights, 0.0)
            suspicion = 1.0 - weights
        else:
            sizes = jnp.where(mask, sizes, 0.0)
            weights, weight = normalize(sizes), sizes.sum()
            aggregate = jnp.where(weight > 0.0, total / jnp.maximum(weight, 1.0), 0.0)
        aggregate = jnp.where(jnp.abs(signs) >= threshold, aggregate, -aggregate)
        scores = jnp.where(mask, suspicion, jnp.inf)
        return aggregate, state, AggregatorInfo(weights, ~mask, scores)

    return Aggregator(
        stateless, apply, validate, name="robust_learning_rate", in_passes=in_passes
    )
