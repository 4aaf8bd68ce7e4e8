"""The coordinate-wise median."""

import jax.numpy as jnp

from fedjax_sim import passes
from fedjax_sim.aggregators.common import stateless
from fedjax_sim.order import mean_of_ranks, median_ranks
from fedjax_sim.pytrees import participants
from fedjax_sim.registry import check_count
from fedjax_sim.types import Aggregator, AggregatorInfo, Array, PyTree, RoundContext


def median(even: str = "midpoint") -> Aggregator:
    """The median of the updates in every coordinate by itself.

    ``aggregate_j = median_i u_ij``

    Assumptions: ``n > 2f``; then each coordinate stays within the honest values. Blind
    to correlations between coordinates, biased where clients' data differ. Clients
    count alike whatever their data size.

    Cost: O(n d log^2 n).

    Args:
        even: of an even count, ``"midpoint"`` averages the two middle values,
            ``"lower"`` takes the lower one (``torch.median``, as several authors do).

    Returns:
        An ``Aggregator``. A client's weight is the share of coordinates it supplied,
        its score 1 minus that; nobody is flagged for it.

    Raises:
        ValueError: unknown ``even``.

    Example:
        >>> import jax.numpy as jnp
        >>> rule = median()
        >>> U = jnp.array([[1.0, 10.0], [2.0, -5.0], [9.0, 0.0]])
        >>> rule.apply(U, rule.init(U[0], 3), RoundContext())[0].tolist()
        [2.0, 0.0]

    References:
        Yin, Chen, Ramchandran, Bartlett, "Byzantine-robust distributed learning:
        towards optimal statistical rates", ICML 2018.

    Differs from the paper: no participant gives a zero aggregate.
    """
    median_ranks(1, even)

    def validate(cohort_size: int) -> None:
        check_count("median's cohort_size", cohort_size, 1)

    def apply(
        updates: PyTree, state: PyTree, context: RoundContext
    ) -> tuple[PyTree, PyTree, AggregatorInfo]:
        U, mask, unravel = participants(updates, context, zero=False)
        validate(len(U))
        first, last = median_ranks(mask.sum(), even)
        aggregate, weights = mean_of_ranks(U, mask, first, last)
        scores = jnp.where(mask, 1.0 - weights, jnp.inf)
        return unravel(aggregate), state, AggregatorInfo(weights, ~mask, scores)

    def in_passes(
        rows: passes.Rows, state: PyTree, context: RoundContext
    ) -> tuple[Array, PyTree, AggregatorInfo]:
        aggregate, weights = passes.mean_of_ranks(
            rows, lambda mask: median_ranks(mask.sum(), even)
        )
        scores = jnp.where(rows.present, 1.0 - weights, jnp.inf)
        return aggregate, state, AggregatorInfo(weights, ~rows.present, scores)

    return Aggregator(stateless, apply, validate, name="median", in_passes=in_passes)
