"""PDRR: pre-aggregation, detection, removal, re-aggregation."""

import jax
import jax.numpy as jnp

from fedjax_sim.aggregators.common import assumed_counts, stateless
from fedjax_sim.aggregators.reaggregation import (
    BASES,
    aggregate_kept,
    base_distances,
    base_ranks,
    check_base,
    reaggregate,
    validate_base,
)
from fedjax_sim.order import map_columns, supplied_where_moved
from fedjax_sim.pytrees import participants
from fedjax_sim.registry import check_number
from fedjax_sim.types import Aggregator, AggregatorInfo, Array, PyTree, RoundContext

# The detection parameter, by default.
THRESHOLDS = {"krum": 0.5, "median": 0.9, "trimmed_mean": 0.9}
_BASES = {name: BASES[name] for name in THRESHOLDS}


def pdrr(max_byzantine: int, base: str = "krum", q: float | None = None) -> Aggregator:
    """A rule that looks for the trace of attacks made for it, and is applied again.

    The rule is applied to all clients (pre-aggregation), clients that it treats as it
    would treat crafted ones are flagged (detection) and removed, and it is applied to
    the rest with ``f' = max(0, f - flagged)``:

    ========================  ==================================================
    ``base``                  index of a client, and who is flagged
    ========================  ==================================================
    ``krum``                  rho_i, Pearson's correlation of ``sign(u_i)`` and
                              ``sign(u_k)``, where k is Krum's choice;
                              ``rho_i >= q max rho``
    ``trimmed_mean``          n_i, coordinates in which its value is trimmed;
                              ``n_i >= q max n``
    ``median``                n_i, coordinates in which its value is the median, or
                              one of the two middle ones;
                              ``n_i <= (1 - q) max n``
    ========================  ==================================================

    Coordinates that the pre-aggregation leaves as they are count for nobody.

    Assumptions: clients' data differ, so that no two honest updates are much alike;
    attackers are, and Krum picks one of them; the trimmed mean cuts at least as many
    values a side as there are attackers. Without an attack honest clients are flagged:
    the largest index reaches any threshold. Each of them lowers f', so that the second
    aggregation may stand fewer attackers than are left. No data of the server's own are
    needed.

    Cost: twice that of the base.

    Args:
        max_byzantine: f, the number of Byzantine clients in a cohort that the base is
            to stand; of the trimmed mean, the values cut at each end. The median has no
            use for it.
        base: ``"krum"``, ``"trimmed_mean"`` or ``"median"``.
        q: detection parameter in [0, 1]; by default 0.5 for Krum, 0.9 for the others.

    Returns:
        An ``Aggregator``. Weights are those of the second aggregation, all zero where
        everybody is flagged and the aggregate is that of the first. Scores are the
        index over its maximum, of the median 1 minus that: who has a score of q or more
        is flagged. Details: ``index``, ``[n]``.

    Raises:
        ValueError: an option out of range; from ``validate`` where the base cannot
            work: ``n < 2f + 3`` for Krum, ``2f >= n`` for the trimmed mean.

    Example:
        >>> rule = pdrr(max_byzantine=2)
        >>> honest = [[1.0, 1.0, 1.0, -1.0], [1.2, -1.0, 0.9, 1.1],
        ...           [-1.0, 1.1, 1.0, 1.2], [1.5, 1.4, -1.3, 1.0]]
        >>> U = jnp.array(honest + 3 * [[-0.2, -0.2, -0.2, 0.2]])
        >>> rule.apply(U, rule.init(U[0], 7), RoundContext())[2].flagged.tolist()
        [False, False, False, False, True, True, True]

    References:
        Lu, Li, Chen, Ma, "Defense against local model poisoning attacks to
        Byzantine-robust federated learning", Frontiers of Computer Science 16, 2022.

    Differs from the paper: it names ranges of q that work, no default. Values that tie
    at the border of what is kept share it alike, whatever their client's number, so
    that counts may have fractions. The paper does not say with which f the base is
    applied again; rows left out of the round are taken for Byzantine as well. With
    fewer than ``f' + 3`` clients Krum is their mean, with up to ``2 f'`` the trimmed
    mean is the median; where all are flagged the first aggregate stands.
    """
    max_byzantine = check_base("pdrr", base, max_byzantine, _BASES)
    q = check_number("pdrr's q", THRESHOLDS[base] if q is None else q, 0, 1, "[]")

    def validate(cohort_size: int) -> None:
        validate_base("pdrr", base, cohort_size, max_byzantine)

    def apply(
        updates: PyTree, state: PyTree, context: RoundContext
    ) -> tuple[PyTree, PyTree, AggregatorInfo]:
        U, mask, unravel = participants(updates, context, zero=False)
        validate(len(U))
        num_rows, f = assumed_counts(mask, max_byzantine)
        distances = base_distances(base, U, mask)
        if base == "krum":
            first, chosen = reaggregate(base, U, mask, f, distances, context)
            correlations = sign_correlations(U, mask, first)
            index = jnp.where(chosen == 1.0, 1.0, correlations)
        else:
            ranks = base_ranks(base, num_rows, f)
            first, index, columns = supplied_where_moved(U, mask, *ranks)
            if base == "trimmed_mean":
                index = columns - index
        index = jnp.where(mask, index, 0.0)
        largest = jnp.where(mask, index, -jnp.inf).max()
        # Where the largest index is 0 everybody has it, and everybody is flagged.
        most = jnp.where(largest > 0, largest, 1.0)
        share = jnp.where(index < largest, index / most, 1.0)
        if base == "median":
            share = jnp.where(largest > 0, 1.0 - share, 1.0)

        keep = mask & ~(share >= q)
        second, weights = aggregate_kept(
            base, U, keep, max_byzantine, distances, context
        )
        aggregate = jnp.where(keep.any(), second, first)
        info = AggregatorInfo(
            weights,
            flagged=~keep,
            scores=jnp.where(mask, share, jnp.inf),
            details={"index": index},
        )
        return unravel(aggregate), state, info

    return Aggregator(stateless, apply, validate, name="pdrr")


def sign_correlations(U: Array, mask: Array, direction: Array) -> Array:
    """Pearson's correlation ``[n]`` of the signs of every row and of a direction.

    0 where the signs of either are all the same.

    Example:
        >>> U = jnp.array([[1.0, -2.0, 3.0, 0.0], [-5.0, 1.0, -1.0, 0.0]])
        >>> sign_correlations(U, jnp.ones(2, bool), U[0]).tolist()
        [1.0, -1.0]
    """
    size = U.shape[1]

    def moments(
        block: Array, fresh: Array, along: Array
    ) -> tuple[tuple[()], tuple[Array, ...]]:
        signs = jnp.where(mask[:, None] & fresh[None], jnp.sign(block), 0.0)
        own = jnp.where(fresh, jnp.sign(along), 0.0)
        return (), (
            signs.sum(axis=1),
            jnp.abs(signs).sum(axis=1),
            jnp.matmul(signs, own, precision=jax.lax.Precision.HIGHEST),
            own.sum(),
            jnp.abs(own).sum(),
        )

    _, (sums, squares, products, own_sum, own_square) = map_columns(
        moments, U, direction
    )
    covariance = products - sums * own_sum / size
    variance = squares - sums * sums / size
    own_variance = own_square - own_sum * own_sum / size
    varies = (variance > 0) & (own_variance > 0)
    scale = jnp.sqrt(jnp.where(varies, variance * own_variance, 1.0))
    # Equal signs, which these counts show, correlate to exactly 1 without rounding.
    equal = (products == squares) & (products == own_square)
    return jnp.where(varies, jnp.where(equal, 1.0, covariance / scale), 0.0)
