"""Krum and Multi-Krum: the updates closest to their neighbours."""

import warnings

import jax.numpy as jnp

from fedjax_sim import passes
from fedjax_sim.aggregators.common import (
    assumed_counts,
    check_cohort,
    normalize,
    stateless,
    weighted_sum,
)
from fedjax_sim.distances import (
    krum_order,
    krum_scores,
    lowest,
    pairwise_sq_distances,
)
from fedjax_sim.pytrees import participants
from fedjax_sim.registry import check_count, lookup, require
from fedjax_sim.types import Aggregator, AggregatorInfo, Array, PyTree, RoundContext

# Neighbours summed: those that take part, minus f, minus this.
_NEIGHBOURS = {"n-f-2": 2, "n-f-1": 1, "n-f": 0}
_RULES = {"one_shot": False, "iterative": True}


def validate_krum(
    rule: str, cohort_size: int, max_byzantine: int, num_selected: int | None = None
) -> None:
    """ValueError unless ``n >= 2f + 3`` and ``m <= n``; a warning if ``m > n - f``."""
    check_cohort(rule, cohort_size, max_byzantine, factor=2, more=3)
    if num_selected is None:
        return
    if num_selected > cohort_size:
        raise ValueError(
            f"{rule} needs num_selected <= cohort_size; got num_selected="
            f"{num_selected}, cohort_size={cohort_size}. Lower num_selected to at most "
            f"{cohort_size - max_byzantine}, or leave it out."
        )
    if num_selected > cohort_size - max_byzantine:
        warnings.warn(
            f"{rule} with num_selected={num_selected} lets a Byzantine client in by "
            f"construction: cohort_size={cohort_size} less max_byzantine="
            f"{max_byzantine} leaves {cohort_size - max_byzantine}.",
            stacklevel=2,
        )


def krum(
    max_byzantine: int, squared: bool = True, neighbours: str = "n-f-2"
) -> Aggregator:
    """The one update closest to its nearest neighbours.

    ``s_i = sum over the n - f - 2 nearest others j of |u_i - u_j|^2``, and the
    aggregate is the update of lowest score, ties to the lowest index.

    Assumptions: ``n >= 2f + 3``. Robust by distance, not by coordinate; all but one
    update are thrown away. Clients count alike whatever their data size.

    Cost: O(n^2 d).

    Args:
        max_byzantine: f, the number of Byzantine clients in a cohort that the rule is
            to stand.
        squared: False sums the distances themselves, as some code and Fang et al. do.
        neighbours: how many are summed, ``"n-f-2"``, ``"n-f-1"`` (SignGuard's and
            ByzFL's code) or ``"n-f"`` (the code of Baruch et al.; one more than an
            honest client has honest others). A client is never its own neighbour.

    Returns:
        An ``Aggregator``. The chosen client has weight 1, all others are flagged;
        scores are Krum's.

    Raises:
        ValueError: an option out of range; from ``validate`` where ``n < 2f + 3``.

    Example:
        >>> import jax.numpy as jnp
        >>> rule = krum(max_byzantine=1)
        >>> U = jnp.array([[1.0], [2.0], [2.5], [4.0], [-50.0]])
        >>> rule.apply(U, rule.init(U[0], 5), RoundContext())[0].tolist()
        [2.0]

    References:
        Blanchard, El Mhamdi, Guerraoui, Stainer, "Machine learning with adversaries:
        Byzantine tolerant gradient descent", NeurIPS 2017.

    Differs from the paper: rows left out of the round are taken for Byzantine, so f
    becomes ``max(0, f - rows left out)``; with fewer than ``2f + 3`` participants the
    aggregate is zero and everybody is flagged.
    """
    max_byzantine = check_count("krum's max_byzantine", max_byzantine, 0)
    fewer = lookup("krum neighbours", neighbours, _NEIGHBOURS)

    def validate(cohort_size: int) -> None:
        validate_krum("krum", cohort_size, max_byzantine)

    def apply(
        updates: PyTree, state: PyTree, context: RoundContext
    ) -> tuple[PyTree, PyTree, AggregatorInfo]:
        U, mask, unravel = participants(updates, context, zero=False)
        validate(len(U))
        info = choose(pairwise_sq_distances(U, mask), mask)
        chosen = ~info.flagged
        aggregate = jnp.where(chosen.any(), U[jnp.argmax(chosen)], 0.0)
        return unravel(aggregate), state, info

    def in_passes(
        rows: passes.Rows, state: PyTree, context: RoundContext
    ) -> tuple[Array, PyTree, AggregatorInfo]:
        distances = passes.sq_distances(rows)
        info = choose(distances, rows.present)
        return passes.weighted_sum(rows, info.weights), state, info

    def choose(distances: Array, mask: Array) -> AggregatorInfo:
        num_rows, f = assumed_counts(mask, max_byzantine)
        if not squared:
            distances = jnp.sqrt(distances)
        scores = krum_scores(distances, mask, num_rows - f - fewer)
        chosen = lowest(scores, 1) & (num_rows >= 2 * f + 3)
        return AggregatorInfo(chosen.astype(jnp.float32), ~chosen, scores)

    return Aggregator(stateless, apply, validate, name="krum", in_passes=in_passes)


def multi_krum(
    max_byzantine: int,
    num_selected: int | None = None,
    weighted: bool = False,
    rule: str = "one_shot",
) -> Aggregator:
    """The mean of the m updates closest to their nearest neighbours.

    ``aggregate = 1/m * sum over the m lowest s_i of u_i``, with the scores of ``krum``.

    Assumptions: ``n >= 2f + 3``, which leaves at least one honest client among the
    ``m = n - f - 2`` selected by default, and an honest majority of them where
    ``n > 3f + 2``.

    Cost: O(n^2 d), iterative also O(n^3 log^2 n).

    Args:
        max_byzantine: f, the number of Byzantine clients in a cohort that the rule is
            to stand.
        num_selected: m; by default ``n - f - 2`` of those that take part.
        weighted: weigh the selected updates by their data size.
        rule: ``"one_shot"`` scores once. ``"iterative"`` picks the best, takes it out
            and scores the rest again while more than ``2f + 2`` are left, which selects
            ``n - 2f - 2``.

    Returns:
        An ``Aggregator``. Clients that are not selected are flagged; scores are Krum's,
        of the first pass.

    Raises:
        ValueError: an option out of range, or ``num_selected`` with ``"iterative"``;
            from ``validate`` where ``n < 2f + 3`` or ``m > n``.

    Example:
        >>> import jax.numpy as jnp
        >>> rule = multi_krum(max_byzantine=1, num_selected=3)
        >>> U = jnp.array([[1.0], [2.0], [2.5], [4.0], [-50.0]])
        >>> rule.apply(U, rule.init(U[0], 5), RoundContext())[2].flagged.tolist()
        [False, False, False, True, True]

    References:
        Blanchard, El Mhamdi, Guerraoui, Stainer, "Machine learning with adversaries:
        Byzantine tolerant gradient descent", NeurIPS 2017. Iterative: the code of
        Shejwalkar and Houmansadr, NDSS 2021.

    Differs from the paper: m defaults to ``n - f - 2``, as in AggregaThor. Rows left
    out of the round are taken for Byzantine, so f becomes ``max(0, f - rows left out)``
    and a larger ``num_selected`` selects every participant; with fewer than ``2f + 3``
    participants the aggregate is zero and everybody is flagged.
    """
    max_byzantine = check_count("multi_krum's max_byzantine", max_byzantine, 0)
    iterative = lookup("multi_krum rule", rule, _RULES)
    if num_selected is not None:
        num_selected = check_count("multi_krum's num_selected", num_selected, 1)
        if iterative:
            raise ValueError(
                "multi_krum with rule='iterative' selects n - 2f - 2 clients; got "
                f"num_selected={num_selected}. Leave num_selected out or use "
                "rule='one_shot'."
            )

    def validate(cohort_size: int) -> None:
        validate_krum("multi_krum", cohort_size, max_byzantine, num_selected)

    def apply(
        updates: PyTree, state: PyTree, context: RoundContext
    ) -> tuple[PyTree, PyTree, AggregatorInfo]:
        U, mask, unravel = participants(updates, context, zero=False)
        validate(len(U))
        info = select(pairwise_sq_distances(U, mask), mask, context)
        return unravel(weighted_sum(info.weights, U, mask)), state, info

    def in_passes(
        rows: passes.Rows, state: PyTree, context: RoundContext
    ) -> tuple[Array, PyTree, AggregatorInfo]:
        distances = passes.sq_distances(rows)
        info = select(distances, rows.present, context)
        return passes.weighted_sum(rows, info.weights), state, info

    def select(distances: Array, mask: Array, context: RoundContext) -> AggregatorInfo:
        num_rows, f = assumed_counts(mask, max_byzantine)
        scores = krum_scores(distances, mask, num_rows - f - 2)
        if iterative:
            steps = num_rows - 2 * f - 2
            picked = krum_order(distances, mask, steps, lambda left: left - f - 2)
            keep = picked < len(mask)
        else:
            keep = lowest(scores, num_selected or num_rows - f - 2)
        keep &= num_rows >= 2 * f + 3
        weights = keep.astype(jnp.float32)
        if weighted:
            sizes = require("multi_krum with weighted=True", context, "num_samples")
            weights = jnp.where(keep, sizes, 0.0)
        return AggregatorInfo(normalize(weights), ~keep, scores)

    needs = frozenset({"num_samples"}) if weighted else frozenset()
    return Aggregator(
        stateless, apply, validate, needs, "multi_krum", in_passes=in_passes
    )
