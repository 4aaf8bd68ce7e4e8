"""The covariance-bound agnostic filter."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_sim.aggregators.common import (
    assumed_counts,
    check_cohort,
    normalize,
    stateless,
    weighted_sum,
)
from fedjax_sim.distances import pairwise_sq_distances
from fedjax_sim.linalg import eigh
from fedjax_sim.pytrees import participants
from fedjax_sim.registry import check_count
from fedjax_sim.types import Aggregator, AggregatorInfo, Array, PyTree, RoundContext

# A weight that falls to this or below is 0: float32 leaves such a rest of two weights
# that should vanish in the same pass.
_NOTHING = 1e-5
# With no variance above this left there is nothing to filter.
_NO_VARIANCE = 1e-12


class Filtered(NamedTuple):
    """Where the filter stands.

    Attributes:
        weights: ``[n]``, 1 for an untouched client, 0 for one filtered out.
        best: ``[n]``, the weights whose covariance had the least top eigenvalue.
        variance: ``[]``, that eigenvalue.
        steps: ``int32 []``, passes made.
        done: ``bool []``, whether a pass found no variance.
    """

    weights: Array
    best: Array
    variance: Array
    steps: Array
    done: Array


def filter_by_covariance(distances: Array, mask: Array, floor: Array) -> Filtered:
    """Takes weight away along the direction of largest variance, pass by pass.

    Args:
        distances: ``[n, n]``, squared, symmetric and finite.
        mask: ``bool [n]``, who takes part.
        floor: ``[]``, passes go on while the weights sum to more than this.

    Returns:
        The end, with the best weights seen. The mask itself if there was no pass.
    """

    def going_on(at: Filtered) -> Array:
        # Every pass takes all the weight of one client at least, so n bound the loop.
        left = at.weights.sum() > floor
        return left & ~at.done & (at.steps < len(mask))

    def one_pass(at: Filtered) -> Filtered:
        shares = normalize(at.weights)
        alive = shares > 0
        # Products of the rows about their weighted mean, from distances alone.
        mean = weighted_sum(shares, distances)
        gram = (mean[:, None] + mean[None] - distances - weighted_sum(shares, mean)) / 2
        gram = jnp.where(alive[:, None] & alive[None], gram, 0.0)
        # It has the nonzero eigenvalues of the weighted covariance.
        root = jnp.sqrt(shares)
        matrix = root[:, None] * gram * root[None]
        largest = jnp.abs(matrix).max()
        scale = jnp.where(largest > 0, largest, 1.0)
        values, vectors = eigh(matrix / scale)
        top = jnp.maximum(values[-1], 0.0)
        along = weighted_sum(root * vectors[:, -1], gram / scale)
        # Squared projections of the rows on the top eigenvector.
        tau = scale * along**2 / jnp.where(top > 0, top, 1.0)
        highest = tau.max()
        done = highest <= _NO_VARIANCE
        weights = at.weights * (1.0 - tau / jnp.where(done, 1.0, highest))
        weights = jnp.where(weights > _NOTHING, weights, 0.0)
        variance = scale * top
        better = variance < at.variance
        return Filtered(
            weights=jnp.where(done, at.weights, weights),
            best=jnp.where(better, at.weights, at.best),
            variance=jnp.where(better, variance, at.variance),
            steps=at.steps + 1,
            done=done,
        )

    everybody = mask.astype(jnp.float32)
    start = Filtered(
        everybody, everybody, jnp.float32(jnp.inf), jnp.int32(0), jnp.array(False)
    )
    return jax.lax.while_loop(going_on, one_pass, start)


def caf(max_byzantine: int) -> Aggregator:
    """The mean under weights that lower the largest variance of the updates.

    From weights ``c = 1``, while ``sum(c) > n - 2f``: ``mu = sum_i c_i u_i / sum(c)``;
    ``(lambda, v)`` is the top eigenpair of the weighted covariance about mu; ``tau_i =
    ((u_i - mu) . v)^2``; ``c_i <- c_i (1 - tau_i / max_j tau_j)``. The aggregate is the
    mu of the smallest lambda.

    Assumptions: ``n > 2f``. A bound on the honest covariance need not be known, and the
    error does not grow with the dimension. Clients count alike whatever their data
    size.

    Cost: O(n^2 d + n^4).

    Args:
        max_byzantine: f, the number of Byzantine clients in a cohort that the rule is
            to stand.

    Returns:
        An ``Aggregator``. A client's score is the part of its weight, 0 to 1, that the
        filter has taken where lambda was smallest; those that lost all are flagged.

    Raises:
        ValueError: an option out of range; from ``validate`` where ``n <= 2f``.

    Example:
        >>> import jax.numpy as jnp
        >>> rule = caf(max_byzantine=1)
        >>> U = jnp.array([[1.0], [2.0], [2.0], [3.0], [90.0]])
        >>> rule.apply(U, rule.init(U[0], 5), RoundContext())[2].flagged.tolist()
        [False, False, False, False, True]

    References:
        Allouah, Guerraoui, Stephan, "Towards trustworthy federated learning with
        untrusted participants", ICML 2025.

    Differs from the paper: eigenpairs are exact (ByzFL's code takes one power step from
    a random vector, and the largest tau over clients of weight 0 too). A weight of 1e-5
    or less counts as 0. The filter stops where no tau is above 1e-12. ``f = 0`` gives
    the mean. Rows left out of the round are taken for Byzantine, so f becomes ``max(0,
    f - rows left out)``; nobody left gives a zero aggregate.
    """
    max_byzantine = check_count("caf's max_byzantine", max_byzantine, 0)

    def validate(cohort_size: int) -> None:
        check_cohort("caf", cohort_size, max_byzantine, factor=2, more=1)

    def apply(
        updates: PyTree, state: PyTree, context: RoundContext
    ) -> tuple[PyTree, PyTree, AggregatorInfo]:
        U, mask, unravel = participants(updates, context, zero=False)
        validate(len(U))
        num_rows, f = assumed_counts(mask, max_byzantine)
        distances = pairwise_sq_distances(U, mask)
        kept = filter_by_covariance(distances, mask, num_rows - 2 * f).best
        weights = normalize(kept)
        info = AggregatorInfo(
            weights=weights,
            flagged=kept == 0,
            scores=jnp.where(mask, 1.0 - kept, jnp.inf),
        )
        return unravel(weighted_sum(weights, U, mask)), state, info

    return Aggregator(stateless, apply, validate, name="caf")
