"""Bulyan: Krum's selection, repeated, then a mean around the median."""

import jax.numpy as jnp

from fedjax_sim.aggregators.common import assumed_counts, check_cohort, stateless
from fedjax_sim.distances import krum_order, krum_scores, pairwise_sq_distances
from fedjax_sim.order import mean_near, mean_of_ranks, median_ranks
from fedjax_sim.pytrees import participants
from fedjax_sim.registry import check_count
from fedjax_sim.types import Aggregator, AggregatorInfo, Array, PyTree, RoundContext


def bulyan(max_byzantine: int) -> Aggregator:
    """A mean around the median, by coordinate, of what Krum selects one by one.

    1. ``theta = n - 2f`` times, the client of lowest Krum score (``max(1, r - f - 2)``
       neighbours among the r clients left) is taken out and selected.
    2. ``aggregate_j`` is the mean of the ``beta = theta - 2f`` selected values nearest
       to the median of the selected values of coordinate j.

    Assumptions: ``n >= 4f + 3``. The second stage bounds every single coordinate, where
    an update that Krum alone selects may still hide a large value. Clients count alike
    whatever their data size.

    Cost: O(n^2 d + n^3 log^2 n).

    Args:
        max_byzantine: f, the number of Byzantine clients in a cohort that the rule is
            to stand.

    Returns:
        An ``Aggregator``. Clients that are not selected are flagged; a client's weight
        is the share of averaged values it supplied; scores are Krum's, of the first
        pass. Details: ``picked``, the step in which a client was selected, n if never.

    Raises:
        ValueError: ``max_byzantine`` negative; from ``validate`` where ``n < 4f + 3``.

    Example:
        >>> import jax.numpy as jnp
        >>> rule = bulyan(max_byzantine=1)
        >>> U = jnp.array([[1.0], [2.0], [2.5], [4.5], [3.5], [0.5], [-50.0]])
        >>> rule.apply(U, rule.init(U[0], 7), RoundContext())[2].flagged.tolist()
        [False, False, False, False, False, True, True]

    References:
        El Mhamdi, Guerraoui, Rouault, "The hidden vulnerability of distributed learning
        in Byzantium", ICML 2018.

    Differs from the paper: with ``max(1, ...)`` Krum's score is defined down to the
    last client (0 for a single one). In those last passes nearest neighbours of each
    other tie exactly, and the lowest client index is selected; so the result may depend
    on the order of the clients if f is 1 or 2. Of values equally far from the median
    those of the lowest client index are averaged. Rows left out of the round are taken
    for Byzantine, so f becomes ``max(0, f - rows left out)``; with fewer than
    ``4f + 3`` participants the aggregate is zero and everybody is flagged. The authors'
    later code selects ``n - 2f - 2`` averages instead.
    """
    max_byzantine = check_count("bulyan's max_byzantine", max_byzantine, 0)

    def validate(cohort_size: int) -> None:
        check_cohort("bulyan", cohort_size, max_byzantine, factor=4, more=3)

    def apply(
        updates: PyTree, state: PyTree, context: RoundContext
    ) -> tuple[PyTree, PyTree, AggregatorInfo]:
        U, mask, unravel = participants(updates, context, zero=False)
        validate(len(U))
        num_rows, f = assumed_counts(mask, max_byzantine)
        # 0 selects nobody, so that everything below comes out zero.
        theta = jnp.where(num_rows >= 4 * f + 3, num_rows - 2 * f, 0)

        def neighbours(left: Array) -> Array:
            return jnp.maximum(left - f - 2, 1)

        distances = pairwise_sq_distances(U, mask)
        picked = krum_order(distances, mask, theta, neighbours)
        keep = picked < len(U)
        centre, _ = mean_of_ranks(U, keep, *median_ranks(theta))
        aggregate, weights = mean_near(U, keep, centre, theta - 2 * f)
        info = AggregatorInfo(
            weights=weights,
            flagged=~keep,
            scores=krum_scores(distances, mask, neighbours(num_rows)),
            details={"picked": picked},
        )
        return unravel(aggregate), state, info

    return Aggregator(stateless, apply, validate, name="bulyan")
