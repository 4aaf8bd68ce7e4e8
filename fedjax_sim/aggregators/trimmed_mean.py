"""The coordinate-wise trimmed mean."""

import math

import jax.numpy as jnp

from fedjax_sim import passes
from fedjax_sim.aggregators.common import assumed_counts, check_cohort, stateless
from fedjax_sim.order import mean_of_ranks
from fedjax_sim.pytrees import participants
from fedjax_sim.registry import check_count, check_number
from fedjax_sim.types import Aggregator, AggregatorInfo, Array, PyTree, RoundContext


def trimmed_mean(
    max_byzantine: int | None = None, trim: float | None = None
) -> Aggregator:
    """The mean of every coordinate without its b largest and b smallest values.

    ``aggregate_j = 1 / (n - 2b) * sum_{k=b+1}^{n-b} u_(k)j``

    Assumptions: ``b >= f`` and ``n > 2b``; then every Byzantine value that is kept lies
    between honest ones. Clients count alike whatever their data size.

    Cost: O(n d log^2 n).

    Args:
        max_byzantine: b itself, the number of Byzantine clients in a cohort that the
            rule is to stand. Or give
        trim: the fraction of the cohort cut at each end, in ``[0, 0.5)``:
            ``b = floor(trim * n)``.

    Returns:
        An ``Aggregator``. A client's weight is the share of kept values it supplied,
        its score 1 minus that; nobody is flagged for it.

    Raises:
        ValueError: both or neither of the two options, or one out of range; from
            ``validate`` where ``2b >= n``.

    Example:
        >>> import jax.numpy as jnp
        >>> rule = trimmed_mean(max_byzantine=1)
        >>> U = jnp.array([[1.0], [2.0], [3.0], [4.0], [1e8]])
        >>> rule.apply(U, rule.init(U[0], 5), RoundContext())[0].tolist()
        [3.0]

    References:
        Yin, Chen, Ramchandran, Bartlett, "Byzantine-robust distributed learning:
        towards optimal statistical rates", ICML 2018.

    Differs from the paper: rows left out of the round are taken for Byzantine, so b
    becomes ``max(0, b - rows left out)``; where then ``r <= 2b`` of r participants, the
    aggregate is zero.
    """
    if (max_byzantine is None) == (trim is None):
        raise ValueError(
            "trimmed_mean needs either max_byzantine (a number of clients) or trim (a "
            f"fraction); got max_byzantine={max_byzantine!r}, trim={trim!r}. "
            "Give exactly one."
        )
    count, fraction = 0, 0.0
    if trim is None:
        count = check_count("trimmed_mean's max_byzantine", max_byzantine, 0)
    else:
        fraction = check_number("trimmed_mean's trim", trim, 0.0, 0.5, "[)")

    def cut(cohort_size: int) -> int:
        # Rounded first: 0.29 * 100 is 28.999999999999996.
        return count + math.floor(round(fraction * cohort_size, 9))

    def validate(cohort_size: int) -> None:
        b = cut(cohort_size)
        check_cohort("trimmed_mean", cohort_size, b, factor=2, more=1)

    def apply(
        updates: PyTree, state: PyTree, context: RoundContext
    ) -> tuple[PyTree, PyTree, AggregatorInfo]:
        U, mask, unravel = participants(updates, context, zero=False)
        validate(len(U))
        num_rows, b = assumed_counts(mask, cut(len(U)))
        aggregate, weights = mean_of_ranks(U, mask, b, num_rows - 1 - b)
        scores = jnp.where(mask, 1.0 - weights, jnp.inf)
        return unravel(aggregate), state, AggregatorInfo(weights, ~mask, scores)

    def in_passes(
        rows: passes.Rows, state: PyTree, context: RoundContext
    ) -> tuple[Array, PyTree, AggregatorInfo]:
        def kept(mask: Array) -> tuple[Array, Array]:
            num_rows, b = assumed_counts(mask, cut(len(rows)))
            return b, num_rows - 1 - b

        aggregate, weights = passes.mean_of_ranks(rows, kept)
        scores = jnp.where(rows.present, 1.0 - weights, jnp.inf)
        return aggregate, state, AggregatorInfo(weights, ~rows.present, scores)

    return Aggregator(
        stateless, apply, validate, name="trimmed_mean", in_passes=in_passes
    )
