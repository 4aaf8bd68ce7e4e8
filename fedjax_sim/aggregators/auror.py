"""AUROR: the clients that side with the majority where clients disagree."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_sim.aggregators.common import normalize, weighted_sum
from fedjax_sim.clustering import split_sorted, two_means
from fedjax_sim.distances import pairwise_sq_distances
from fedjax_sim.order import _sort_rows, map_columns
from fedjax_sim.pytrees import participants, ravel
from fedjax_sim.registry import check_count, check_number, lookup
from fedjax_sim.types import Aggregator, AggregatorInfo, Array, PyTree, RoundContext

_MODES = {"cluster": False, "vote": True}


class AurorState(NamedTuple):
    """What AUROR remembers.

    Attributes:
        indicative: ``bool [d]``, the coordinates in which clients fall into two groups.
        rounds: ``int32 []``, rounds so far in which two clients or more took part.
    """

    indicative: Array
    rounds: Array


def auror(
    threshold: float = 0.002,
    mode: str = "cluster",
    num_rounds: int = 10,
    share: float | None = None,
) -> Aggregator:
    """The mean of the larger of two groups of clients.

    In every coordinate the clients' values are split in two by exact 2-means; the
    coordinate is *indicative* if the two means are at least ``threshold`` apart. The
    clients are then split by their indicative coordinates alone, and::

        aggregate = mean of u_i over the clients i of the larger group

    Assumptions: ``n > 2f``; attackers differ from the honest clients, and agree with
    each other, in coordinates where the honest agree. Two groups are all there are:
    outliers in opposite directions leave some of them with the honest.

    Cost: O(n^2 d + n d log^2 n).

    Args:
        threshold: alpha, in units of an update's coordinate: to be calibrated to the
            task. The default is that of public code for output layers.
        mode: ``"cluster"`` runs 2-means on the indicative coordinates (see
            ``clustering.two_means``). ``"vote"``, the original rule, drops whoever is
            in the smaller group in more than ``share`` of them.
        num_rounds: rounds in which the indicative coordinates are determined anew;
            those of the last of them stay.
        share: ``"vote"`` only, 0.5 by default.

    Returns:
        An ``Aggregator``. Clients outside the larger group are flagged. Scores are the
        distance to the mean of those kept, in the indicative coordinates; with
        ``"vote"`` the share of them in which a client is in the smaller group. Its
        state is an ``AurorState``.

    Raises:
        ValueError: an option out of range, or ``share`` with ``"cluster"``; from
            ``validate`` where ``n < 2``.

    Example:
        >>> rule = auror(threshold=0.5)
        >>> U = jnp.array([[1.0, 0.1], [1.2, 0.2], [1.1, 0.15], [-1.0, 0.12]])
        >>> _, state, info = rule.apply(U, rule.init(U[0], 4), RoundContext())
        >>> info.flagged.tolist(), state.indicative.tolist()
        ([False, False, False, True], [True, False])

    References:
        Shen, Tople, Saxena, "AUROR: defending against poisoning attacks in
        collaborative deep learning systems", ACSAC 2016.

    Differs from the paper: 2-means is deterministic, exact in one dimension and started
    from the farthest pair in many. Of groups of one size, the one of the first
    participant stays. Without an indicative coordinate everybody stays. A round with
    fewer than two participants determines nothing and is not counted.
    """
    threshold = check_number("auror's threshold", threshold, low=0)
    vote = lookup("auror mode", mode, _MODES)
    num_rounds = check_count("auror's num_rounds", num_rounds, 1)
    if share is not None and not vote:
        raise ValueError(
            f"auror's share belongs to mode='vote'; got share={share!r} with "
            f"mode={mode!r}. Leave share out or use mode='vote'."
        )
    share = 0.5 if share is None else share
    share = check_number("auror's share", share, 0.0, 1.0, "[)")

    def init(params: PyTree, num_clients: int) -> AurorState:
        return AurorState(jnp.zeros(ravel(params).shape, bool), jnp.int32(0))

    def validate(cohort_size: int) -> None:
        check_count("auror's cohort_size", cohort_size, 2)

    def apply(
        updates: PyTree, state: AurorState, context: RoundContext
    ) -> tuple[PyTree, AurorState, AggregatorInfo]:
        U, mask, unravel = participants(updates, context)
        validate(len(U))
        counts = mask.sum() >= 2
        indicative = jax.lax.cond(
            counts & (state.rounds < num_rounds),
            lambda: column_gaps(U, mask) >= threshold,
            lambda: state.indicative,
        )
        if vote:
            scores = minority_share(U, mask, indicative)
            keep = mask & (scores <= share)
        else:
            restricted = jnp.where(indicative[None], U, 0.0)
            keep = two_means(pairwise_sq_distances(restricted, mask), mask)
        weights = normalize(keep.astype(jnp.float32))
        aggregate = weighted_sum(weights, U)
        if not vote:
            offset = jnp.where(indicative[None], U - aggregate[None], 0.0)
            scores = jnp.linalg.norm(offset, axis=1)
        # The squares of two rows at float32's end may not have a finite sum.
        scores = jnp.minimum(scores, jnp.finfo(jnp.float32).max)
        info = AggregatorInfo(weights, ~keep, jnp.where(mask, scores, jnp.inf))
        state = AurorState(indicative, state.rounds + counts.astype(jnp.int32))
        return unravel(aggregate), state, info

    return Aggregator(init, apply, validate, name="auror")


def column_gaps(U: Array, mask: Array) -> Array:
    """``[d]``: how far apart the two means of every column's exact 2-means are."""

    def one_block(block: Array, _: Array) -> tuple[Array, tuple[()]]:
        ordered = _sort_rows(jnp.where(mask[:, None], block, jnp.inf))
        return split_sorted(ordered, mask.sum())[0], ()

    return map_columns(one_block, U)[0]


def minority_share(U: Array, mask: Array, counted: Array) -> Array:
    """``[n]``: share of the counted columns that have a client in the smaller group."""
    num_rows = mask.sum()
    first = jnp.argmax(mask)

    def one_block(
        block: Array, fresh: Array, counted: Array
    ) -> tuple[Array, tuple[Array]]:
        ordered = _sort_rows(jnp.where(mask[:, None], block, jnp.inf))
        gap, num_low, edge = split_sorted(ordered, num_rows)
        low = block <= edge[None]
        surplus = 2 * num_low - num_rows
        low_is_smaller = (surplus < 0) | ((surplus == 0) & ~low[first])
        smaller = mask[:, None] & (low == low_is_smaller[None])
        return gap, ((smaller & (fresh & counted)[None]).sum(axis=1),)

    (votes,) = map_columns(one_block, U, counted)[1]
    return votes / jnp.maximum(counted.sum(), 1)
