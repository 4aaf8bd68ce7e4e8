"""Coordinate-wise means around a centre: MeaMed (the median), Phocas (trimmed mean)."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from fedjax_sim import passes
from fedjax_sim.aggregators.common import (
    assumed_counts,
    check_cohort,
    normalize,
    stateless,
)
from fedjax_sim.order import mean_near, median, trimmed_mean, values_near
from fedjax_sim.pytrees import participants
from fedjax_sim.registry import check_count
from fedjax_sim.types import Aggregator, AggregatorInfo, Array, PyTree, RoundContext


def meamed(max_byzantine: int) -> Aggregator:
    """The mean of the values nearest to the median, in every coordinate by itself.

    ``aggregate_j = 1 / (n - f) * sum of the n - f values u_ij nearest to median_j``

    Assumptions: ``n > 2f``; then every value kept is no farther from the median than
    some honest one. It varies less than the median, and like it is blind to
    correlations between coordinates. Clients count alike whatever their data size.

    Cost: O(n d log^2 n).

    Args:
        max_byzantine: f, the number of Byzantine clients in a cohort that the rule is
            to stand.

    Returns:
        An ``Aggregator``. A client's weight is the share of kept values it supplied,
        its score 1 minus that; nobody is flagged for it.

    Raises:
        ValueError: ``max_byzantine`` negative; from ``validate`` where ``f >= n``.

    Example:
        >>> import jax.numpy as jnp
        >>> rule = meamed(max_byzantine=1)
        >>> U = jnp.array([[1.0, 0.0], [2.0, 5.0], [3.0, 1.0], [4.0, 2.0], [9.0, -9.0]])
        >>> rule.apply(U, rule.init(U[0], 5), RoundContext())[0].tolist()
        [2.5, 2.0]

    References:
        Xie, Koyejo, Gupta, "Generalized Byzantine-tolerant SGD", arXiv:1802.10116,
        2018.

    Differs from the paper: of an even count the median is the midpoint; of values
    equally far from it those of the lowest client index are kept. Rows left out of the
    round are taken for Byzantine, so f becomes ``max(0, f - rows left out)``; no
    participant gives a zero aggregate. A cohort of ``f < n <= 2f`` is allowed, though
    nothing is promised for it.
    """
    max_byzantine = check_count("meamed's max_byzantine", max_byzantine, 0)

    def validate(cohort_size: int) -> None:
        check_cohort("meamed", cohort_size, max_byzantine, factor=1, more=1)

    def centre(U: Array, mask: Array, f: Array) -> Array:
        return median(U, mask)

    return _mean_around(centre, validate, max_byzantine, "meamed")


def phocas(max_byzantine: int) -> Aggregator:
    """The mean of the values nearest to the trimmed mean, in every coordinate.

    ``aggregate_j = 1 / (n - f) * sum of the n - f values u_ij nearest to t_j``, where
    ``t_j`` is the mean without the f largest and the f smallest values.

    Assumptions: ``n > 2f``. Less biased than ``meamed`` where values are skewed.
    Clients count alike whatever their data size.

    Cost: O(n d log^2 n).

    Args:
        max_byzantine: f, the number of Byzantine clients in a cohort that the rule is
            to stand.

    Returns:
        An ``Aggregator``. A client's weight is the share of kept values it supplied,
        its score 1 minus that; nobody is flagged for it.

    Raises:
        ValueError: ``max_byzantine`` negative; from ``validate`` where ``2f >= n``.

    Example:
        >>> import jax.numpy as jnp
        >>> rule = phocas(max_byzantine=1)
        >>> U = jnp.array([[1.0, 0.0], [2.0, 5.0], [3.0, 1.0], [4.5, 2.0], [9.0, -9.0]])
        >>> rule.apply(U, rule.init(U[0], 5), RoundContext())[0].tolist()
        [2.625, 2.0]

    References:
        Xie, Koyejo, Gupta, "Phocas: dimensional Byzantine-resilient stochastic gradient
        descent", arXiv:1805.09682, 2018.

    Differs from the paper: of values equally far from the centre those of the lowest
    client index are kept. Rows left out of the round are taken for Byzantine, so f
    becomes ``max(0, f - rows left out)``; no participant gives a zero aggregate.
    """
    max_byzantine = check_count("phocas's max_byzantine", max_byzantine, 0)

    def validate(cohort_size: int) -> None:
        check_cohort("phocas", cohort_size, max_byzantine, factor=2, more=1)

    return _mean_around(trimmed_mean, validate, max_byzantine, "phocas")


def _mean_around(
    centre: Callable[[Array, Array, Array], Array],
    validate: Callable[[int], None],
    max_byzantine: int,
    name: str,
) -> Aggregator:
    """The rule that averages the ``n - f`` values nearest to ``centre(U, mask, f)``."""

    def apply(
        updates: PyTree, state: PyTree, context: RoundContext
    ) -> tuple[PyTree, PyTree, AggregatorInfo]:
        U, mask, unravel = participants(updates, context, zero=False)
        validate(len(U))
        num_rows, f = assumed_counts(mask, max_byzantine)
        aggregate, weights = mean_near(U, mask, centre(U, mask, f), num_rows - f)
        scores = jnp.where(mask, 1.0 - weights, jnp.inf)
        return unravel(aggregate), state, AggregatorInfo(weights, ~mask, scores)

    def in_passes(
        rows: passes.Rows, state: PyTree, context: RoundContext
    ) -> tuple[Array, PyTree, AggregatorInfo]:
        def part(block: Array, real: Array, mask: Array, norms: Array) -> Any:
            num_rows, f = assumed_counts(mask, max_byzantine)
            middle = centre(block, mask, f)
            return values_near(block, mask, middle, num_rows - f, real)

        aggregate, supplied = rows.columns(part)
        weights = normalize(supplied)
        scores = jnp.where(rows.present, 1.0 - weights, jnp.inf)
        return aggregate, state, AggregatorInfo(weights, ~rows.present, scores)

    return Aggregator(stateless, apply, validate, name=name, in_passes=in_passes)
