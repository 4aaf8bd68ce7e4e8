"""The rules that a detector stands before: what is done with the clients it leaves."""

import jax.numpy as jnp

from fedjax_sim.aggregators.common import (
    assumed_counts,
    check_cohort,
    client_shares,
    normalize,
    weighted_sum,
)
from fedjax_sim.aggregators.krum import validate_krum
from fedjax_sim.distances import krum_scores, lowest, pairwise_sq_distances
from fedjax_sim.order import mean_of_ranks, median_ranks
from fedjax_sim.registry import check_count, lookup
from fedjax_sim.types import Array, RoundContext

BASES = {
    "fedavg": "the mean, by data size",
    "krum": "the update closest to its neighbours",
    "median": "the coordinate-wise median",
    "trimmed_mean": "the mean without the f largest and f smallest values",
}


def check_base(
    rule: str, base: str, max_byzantine: int, bases: dict[str, str] = BASES
) -> int:
    """``max_byzantine``, checked, for a detector that is built on this rule.

    Raises:
        ValueError: an unknown rule, or a negative number.
    """
    lookup(f"base of {rule}", base, bases)
    return check_count(f"{rule}'s max_byzantine", max_byzantine, 0)


def validate_base(rule: str, base: str, cohort_size: int, max_byzantine: int) -> None:
    """ValueError unless the base can work on a whole cohort of this size."""
    if base == "krum":
        validate_krum(rule, cohort_size, max_byzantine)
    elif base == "trimmed_mean":
        check_cohort(rule, cohort_size, max_byzantine, factor=2, more=1)
    else:
        check_count(f"{rule}'s cohort_size", cohort_size, 1)


def base_distances(base: str, U: Array, mask: Array) -> Array | None:
    """What the base has to know of the rows, once for all uses in a round."""
    return pairwise_sq_distances(U, mask) if base == "krum" else None


def krum_weights(distances: Array, rows: Array, f: Array | int) -> Array:
    """``[n]``: 1 for the row that Krum picks among ``rows``; see ``reaggregate``."""
    count = rows.sum()
    picked = lowest(krum_scores(distances, rows, count - f - 2), 1)
    shares = normalize(rows.astype(jnp.float32))
    return jnp.where(count >= f + 3, picked.astype(jnp.float32), shares)


def base_ranks(base: str, count: Array, f: Array | int) -> tuple[Array, Array]:
    """First and last rank that the trimmed mean, or the median, keeps of ``count``."""
    first, last = median_ranks(count)
    if base == "trimmed_mean":
        first = jnp.where(count > 2 * f, f, first)
        last = jnp.where(count > 2 * f, count - 1 - f, last)
    return jnp.asarray(first), jnp.asarray(last)


def reaggregate(
    base: str,
    U: Array,
    rows: Array,
    f: Array | int,
    distances: Array | None,
    context: RoundContext,
) -> tuple[Array, Array]:
    """The base on some of the rows, of which f may still be Byzantine.

    Krum sums ``r - f - 2`` neighbours of r rows; with fewer than ``f + 3`` rows it is
    the mean. The trimmed mean of up to ``2 f`` rows is the median.

    Args:
        base: a name in ``BASES``.
        U: ``[n, d]``, finite in ``rows``.
        rows: ``bool [n]``, those that are left.
        f: may be traced.
        distances: from ``base_distances``.
        context: for the data sizes of ``fedavg``.

    Returns:
        The aggregate ``[d]``, zero where no row is left, and the shares ``[n]``.
    """
    if base in ("median", "trimmed_mean"):
        return mean_of_ranks(U, rows, *base_ranks(base, rows.sum(), f))
    if base == "krum":
        assert distances is not None
        weights = krum_weights(distances, rows, f)
    else:
        weights = client_shares(rows, context, by_data=True)
    return weighted_sum(weights, U, rows), weights


def aggregate_kept(
    base: str,
    U: Array,
    keep: Array,
    max_byzantine: int,
    distances: Array | None,
    context: RoundContext,
) -> tuple[Array, Array]:
    """``reaggregate`` with ``f' = max(0, f - rows that are not kept)``."""
    _, f = assumed_counts(keep, max_byzantine)
    return reaggregate(base, U, keep, f, distances, context)
