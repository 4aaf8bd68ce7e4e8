"""Steps before a rule that mix, group or shorten the updates; see ``chain``."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fedjax_sim.aggregators.common import (
    assumed_counts,
    check_cohort,
    clip_factors,
    longest,
    weighted_sum,
)
from fedjax_sim.distances import pairwise_sq_distances
from fedjax_sim.registry import check_count, check_number, lookup, require
from fedjax_sim.types import Array, PreAggregator, RoundContext


def nnm(max_byzantine: int) -> PreAggregator:
    """Nearest neighbour mixing: every update becomes the mean of its nearest ones.

    ``v_i = mean of the n - f updates nearest to u_i``, itself included, ties to the
    lowest index.

    Assumptions: ``n > 2f`` for the guarantees of the paper; it can be computed for
    ``n > f``. Honest updates contract towards each other where clients' data differ.

    Cost: O(n^2 d).

    Args:
        max_byzantine: f, the number of Byzantine clients in a cohort.

    Returns:
        A ``PreAggregator``. Row i still belongs to client i.

    Raises:
        ValueError: an option out of range; from ``validate`` where ``n <= f``.

    Example:
        >>> U = jnp.array([[0.0], [2.0], [4.0], [90.0]])
        >>> rows, _, _ = nnm(1).apply(U, jnp.ones(4, bool), RoundContext())
        >>> rows.tolist()
        [[2.0], [2.0], [2.0], [32.0]]

    References:
        Allouah, Farhadkhani, Guerraoui, Gupta, Pinot, Stephan, "Fixing by mixing: a
        recipe for optimal Byzantine ML under heterogeneity", AISTATS 2023.

    Differs from the paper: rows left out of the round are taken for Byzantine, so f
    becomes ``max(0, f - rows left out)``.
    """
    max_byzantine = check_count("nnm's max_byzantine", max_byzantine, 0)

    def validate(cohort_size: int) -> None:
        check_cohort("nnm", cohort_size, max_byzantine, factor=1, more=1)

    def apply(
        U: Array, mask: Array, context: RoundContext
    ) -> tuple[Array, Array, Array]:
        num_rows, f = assumed_counts(mask, max_byzantine)
        distances = pairwise_sq_distances(U, mask)
        # Itself before its duplicates, those left out last.
        distances = jnp.where(jnp.eye(len(U), dtype=bool), -1.0, distances)
        distances = jnp.where(mask[None], distances, jnp.inf)
        rank = jnp.argsort(jnp.argsort(distances, axis=1), axis=1)
        near = (rank < num_rows - f) & mask[None] & mask[:, None]
        mixing = near / jnp.maximum(num_rows - f, 1)
        return weighted_sum(mixing, U, mask), mixing, mask

    return PreAggregator(apply, _as_many, validate, per_client=True, name="nnm")


def bucketing(size: int = 2, weighted: bool = False) -> PreAggregator:
    """Random groups of clients; each group is averaged to one row.

    ``v_b = mean of u_i over bucket b``, for the ``ceil(n / s)`` buckets of s clients
    that follow each other in a random order.

    Assumptions: the rule that follows stands f Byzantine rows of ``ceil(n / s)``, since
    every Byzantine client spoils one bucket at most; so ``s <= n / (2f)``. Honest rows
    vary s times less.

    Cost: O(n d).

    Args:
        size: s, clients in a bucket, and in the last one those left over. 1 only
            shuffles.
        weighted: average in proportion to the clients' data.

    Returns:
        A ``PreAggregator`` that needs ``key``, with ``weighted`` also ``num_samples``.
        Where the context has client ids, the order does not depend on the places of
        the clients in the cohort.

    Raises:
        ValueError: ``size`` out of range; from ``apply``, where the context lacks what
            the step needs.

    Example:
        >>> U = jnp.array([[1.0], [2.0], [3.0], [4.0], [5.0]])
        >>> context = RoundContext(key=jax.random.key(0))
        >>> rows, mixing, _ = bucketing(2).apply(U, jnp.ones(5, bool), context)
        >>> rows.shape, mixing.sum(axis=1).tolist()
        ((3, 1), [1.0, 1.0, 1.0])

    References:
        Karimireddy, He, Jaggi, "Byzantine-robust learning on heterogeneous datasets via
        bucketing", ICLR 2022.

    Differs from the paper: a bucket is the mean of those of its clients that take part,
    and one without any is left out of the round. ``weighted`` is ours.
    """
    size = check_count("bucketing's size", size, 1)

    def validate(cohort_size: int) -> None:
        check_count("bucketing's cohort_size", cohort_size, 1)

    def num_rows(cohort_size: int) -> int:
        return -(-cohort_size // size)

    def apply(
        U: Array, mask: Array, context: RoundContext
    ) -> tuple[Array, Array, Array]:
        key = require("bucketing", context, "key")
        ids = context.client_ids
        order = random_order(key, jnp.arange(len(U)) if ids is None else ids)
        place = jnp.zeros(len(U), jnp.int32).at[order].set(jnp.arange(len(U)))
        shares = mask.astype(jnp.float32)
        if weighted:
            sizes = require("bucketing with weighted=True", context, "num_samples")
            shares = jnp.where(mask, sizes.astype(jnp.float32), 0.0)
        bucket = jnp.arange(num_rows(len(U)))[:, None]
        mixing = jnp.where(place[None] // size == bucket, shares[None], 0.0)
        total = mixing.sum(axis=1, keepdims=True)
        mixing = mixing / jnp.where(total > 0, total, 1.0)
        return weighted_sum(mixing, U, mask), mixing, total[:, 0] > 0

    needs = frozenset({"key", "num_samples"} if weighted else {"key"})
    return PreAggregator(apply, num_rows, validate, False, needs, "bucketing")


def random_order(key: Array, ids: Array) -> Array:
    """A random order ``[k]`` of the rows whose clients are ``ids``.

    Every client draws its place by itself: the order of the clients stays the same
    however the rows are arranged.
    """
    draws = jax.vmap(lambda i: jax.random.bits(jax.random.fold_in(key, i)))(ids)
    return jnp.argsort(draws)


def clipping(bound: float | str = "median") -> PreAggregator:
    """Shortens the updates to a length.

    ``v_i = u_i min(1, c / |u_i|)``

    Assumptions: c is about the length of an honest update. Bounds what a client can do
    to a mean; the direction stays its own.

    Cost: O(n d).

    Args:
        bound: c, a positive number, or ``"median"``: the median length of the updates
            of this round.

    Returns:
        A ``PreAggregator``. Row i still belongs to client i.

    Raises:
        ValueError: ``bound`` is another word, or not positive.

    Example:
        >>> U = jnp.array([[3.0, 4.0], [0.0, 1.0]])
        >>> clipping(2.5).apply(U, jnp.ones(2, bool), RoundContext())[0].tolist()
        [[1.5, 2.0], [0.0, 1.0]]

    References:
        Sun, Kairouz, Suresh, McMahan, "Can you really backdoor federated learning?",
        arXiv:1911.07963, 2019.

    Differs from the paper: ``"median"`` is ours.
    """
    limit: float | None = None
    if isinstance(bound, str):
        lookup("bound of clipping (or a positive number)", bound, {"median": None})
    else:
        limit = check_number("clipping's bound", bound, low=0)

    def validate(cohort_size: int) -> None:
        check_count("clipping's cohort_size", cohort_size, 1)

    def to_bound(lengths: Array, mask: Array) -> Array:
        return longest(limit, lengths, mask)

    return PreAggregator(
        _clip_to(to_bound), _as_many, validate, per_client=True, name="clipping"
    )


def arc(max_byzantine: int) -> PreAggregator:
    """Adaptive robust clipping: the k longest updates are cut to the next length.

    ``k = floor(2 (f / n) (n - f))``; every update is shortened to the ``(k + 1)``-th
    largest length ``|u|``. Shorter ones, n - k of them or more, stay as they are.

    Assumptions: ``n > 2f``. Keeps the guarantees of a robust rule that follows, and
    bounds its aggregate by the honest lengths.

    Cost: O(n d).

    Args:
        max_byzantine: f, the number of Byzantine clients in a cohort.

    Returns:
        A ``PreAggregator``. Row i still belongs to client i.

    Raises:
        ValueError: an option out of range; from ``validate`` where ``n <= 2f``.

    Example:
        >>> U = jnp.array([[1.0], [2.0], [-4.0], [3.0], [50.0]])
        >>> arc(1).apply(U, jnp.ones(5, bool), RoundContext())[0].tolist()
        [[1.0], [2.0], [-4.0], [3.0], [4.0]]

    References:
        Allouah, Guerraoui, Gupta, Jellouli, Rizk, Stephan, "Adaptive gradient clipping
        for robust federated learning", ICLR 2025.

    Differs from the paper: rows left out of the round are taken for Byzantine, so n
    counts the others and f becomes ``max(0, f - rows left out)``.
    """
    max_byzantine = check_count("arc's max_byzantine", max_byzantine, 0)

    def validate(cohort_size: int) -> None:
        check_cohort("arc", cohort_size, max_byzantine, factor=2, more=1)

    def to_next(lengths: Array, mask: Array) -> Array:
        num_rows, f = assumed_counts(mask, max_byzantine)
        clipped = 2 * f * (num_rows - f) // jnp.maximum(num_rows, 1)
        ascending = jnp.sort(jnp.where(mask, lengths, jnp.inf))
        return ascending[jnp.maximum(num_rows - 1 - clipped, 0)]

    return PreAggregator(
        _clip_to(to_next), _as_many, validate, per_client=True, name="arc"
    )


def _as_many(cohort_size: int) -> int:
    """The ``num_rows`` of a step that keeps one row for every client."""
    return cohort_size


def _clip_to(
    limit: Callable[[Array, Array], Array],
) -> Callable[[Array, Array, RoundContext], tuple[Array, Array, Array]]:
    """The ``apply`` of a step that shortens to ``limit(lengths [k], mask [k])``."""

    def apply(
        U: Array, mask: Array, context: RoundContext
    ) -> tuple[Array, Array, Array]:
        lengths = jnp.linalg.norm(U, axis=1)
        factors = clip_factors(lengths, limit(lengths, mask))
        rows = jnp.where(mask[:, None], factors[:, None] * U, 0.0)
        return rows, jnp.diag(mask.astype(jnp.float32)), mask

    return apply
