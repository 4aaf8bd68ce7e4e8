"""SignGuard: a norm filter and a clustering of sign statistics."""

import jax
import jax.numpy as jnp

from fedjax_sim.aggregators.common import (
    clip_factors,
    normalize,
    stateless,
    weighted_sum,
)
from fedjax_sim.clustering import mean_shift, two_means
from fedjax_sim.distances import pairwise_sq_distances
from fedjax_sim.order import median, median_ranks, sort_clients
from fedjax_sim.pytrees import participants, ravel, unit
from fedjax_sim.registry import check_count, check_number, lookup, require
from fedjax_sim.types import Aggregator, AggregatorInfo, Array, PyTree, RoundContext

_CLUSTER = {"mean_shift": False, "two_means": True}
_SIMILARITY = {
    "none": "sign statistics alone",
    "cosine": "SignGuard-Sim",
    "distance": "SignGuard-Dist",
}


def signguard(
    lower: float = 0.1,
    upper: float = 3.0,
    cluster: str = "mean_shift",
    fraction: float = 0.1,
    similarity: str = "none",
) -> Aggregator:
    """The clipped mean of updates of usual length and usual signs.

    With m the median of the ``|u_i|``::

        S1 = {i: lower m < |u_i| < upper m}
        S2 = largest cluster of the sign statistics
        aggregate = mean of u_i min(1, m / |u_i|) over S1 and S2

    The sign statistics of a client are the shares of positive, zero and negative values
    in a random contiguous block of coordinates, each divided by the largest share of
    any client (plus 1e-8).

    Assumptions: ``n > 2f``. Stops attacks that turn, blow up or flatten the updates;
    none that keeps lengths and the balance of signs.

    Cost: O(n d + n^2), with ``similarity`` O(n^2 d).

    Args:
        lower: L, from which multiple of the median length on a client may stay.
        upper: R, up to which multiple of it.
        cluster: ``"mean_shift"`` as the authors do, or ``"two_means"``, faster and not
            equivalent; see ``fedjax_sim.clustering``.
        fraction: size of the block as a share of all coordinates, at least one.
        similarity: a fourth feature ``clip(c_i, 0, med c) / (5 med c + 1e-8)``, 0 where
            ``med c <= 0``. For ``"cosine"`` (SignGuard-Sim) ``c_i`` is the cosine to
            the last aggregate, for ``"distance"`` (SignGuard-Dist) the distance from
            it; while the last aggregate is zero, the median one to the other clients.

    Returns:
        An ``Aggregator`` that needs ``key``, and ``previous_aggregate`` for a
        similarity. Clients outside ``S1`` or ``S2`` are flagged; weights are their
        share in the mean, clipped or not; scores count the filters a client failed;
        details are ``norm_ok`` and ``sign_ok``, 1 where it passed.

    Raises:
        ValueError: an option out of range; from ``validate`` where ``n < 3``; from
            ``apply``, a context field missing.

    Example:
        >>> rule = signguard(fraction=1.0)
        >>> U = jnp.array([[1, 2], [2, 1], [1, 1], [-1, -2], [50, 1]], jnp.float32)
        >>> context = RoundContext(key=jax.random.key(0))
        >>> rule.apply(U, rule.init(U[0], 5), context)[2].flagged.tolist()
        [False, False, False, True, True]

    References:
        Xu, Huang, Song, Lan, "Byzantine-robust federated learning through collaborative
        malicious gradient filtering", ICDCS 2022.

    Differs from the paper: mean shift is a restatement with static shapes that uses
    every client to estimate the bandwidth; the authors' code takes 50 at random from
    more. Filter and clip use the one midpoint median (the code clips with the lower
    one). A zero row fails the norm filter, so a median length of 0 keeps nobody. Nobody
    left gives a zero aggregate.
    """
    lower = check_number("signguard's lower", lower, low=0, closed="[)")
    upper = check_number("signguard's upper", upper, low=lower)
    by_two_means = lookup("signguard cluster", cluster, _CLUSTER)
    fraction = check_number("signguard's fraction", fraction, 0.0, 1.0, "(]")
    lookup("signguard similarity", similarity, _SIMILARITY)

    def validate(cohort_size: int) -> None:
        check_count("signguard's cohort_size", cohort_size, 3)

    def apply(
        updates: PyTree, state: PyTree, context: RoundContext
    ) -> tuple[PyTree, PyTree, AggregatorInfo]:
        U, mask, unravel = participants(updates, context)
        validate(len(U))
        key = require("signguard", context, "key")
        norms = jnp.linalg.norm(U, axis=1)
        middle = median(norms[:, None], mask)[0]
        norm_ok = mask & (norms > lower * middle) & (norms < upper * middle)

        size = max(1, int(fraction * U.shape[1] + 1e-9))
        start = draw_start(key, U.shape[1] - size)
        block = jax.lax.dynamic_slice_in_dim(U, start, size, axis=1)
        features = sign_features(block, mask)
        if similarity != "none":
            last = ravel(require("signguard", context, "previous_aggregate"))
            further = similarity_feature(U, norms, mask, last, similarity == "cosine")
            features = jnp.concatenate([features, further[:, None]], axis=1)
        if by_two_means:
            sign_ok = two_means(pairwise_sq_distances(features, mask), mask)
        else:
            sign_ok = mean_shift(features, mask)

        keep = norm_ok & sign_ok
        weights = normalize(keep.astype(jnp.float32))
        failed = 2.0 - norm_ok - sign_ok
        info = AggregatorInfo(
            weights,
            ~keep,
            scores=jnp.where(mask, failed, jnp.inf),
            details={
                "norm_ok": norm_ok.astype(jnp.float32),
                "sign_ok": sign_ok.astype(jnp.float32),
            },
        )
        aggregate = weighted_sum(weights * clip_factors(norms, middle), U)
        return unravel(aggregate), state, info

    needs = {"key"} if similarity == "none" else {"key", "previous_aggregate"}
    return Aggregator(stateless, apply, validate, frozenset(needs), "signguard")


def draw_start(key: Array, last: int) -> Array:
    """``int32 []``: where the block starts, uniform on 0, ..., last."""
    return jax.random.randint(key, (), 0, last + 1)


def sign_features(block: Array, mask: Array) -> Array:
    """``[n, 3]``: shares of values > 0, = 0 and < 0, by the largest of each."""
    signs = (block > 0.0, block == 0.0, block < 0.0)
    shares = jnp.stack([sign.mean(axis=1) for sign in signs], axis=1)
    largest = jnp.where(mask[:, None], shares, 0.0).max(axis=0)
    return shares / (largest + 1e-8)[None]


def similarity_feature(
    U: Array, norms: Array, mask: Array, last: Array, cosine: bool
) -> Array:
    """``[n]``: closeness to the last aggregate, or to the others if that is zero."""
    last = jnp.where(jnp.isfinite(jnp.sum(last * last)), last, 0.0)
    length = jnp.linalg.norm(last)
    if cosine:
        rows = unit(U, norms)
        to_last = jnp.matmul(
            rows, unit(last, length), precision=jax.lax.Precision.HIGHEST
        )
        pairs = jnp.matmul(rows, rows.T, precision=jax.lax.Precision.HIGHEST)
    else:
        to_last = jnp.linalg.norm(U - last[None], axis=1)
        pairs = jnp.sqrt(pairwise_sq_distances(U, mask))
    values = jnp.where(length > 1e-12, to_last, _median_of_others(pairs, mask))
    middle = median(values[:, None], mask)[0]
    share = jnp.clip(values, 0.0, middle) / (5.0 * jnp.maximum(middle, 0.0) + 1e-8)
    return jnp.where(middle > 0.0, share, 0.0)


def _median_of_others(pairs: Array, mask: Array) -> Array:
    """For every client the median of its row over the other participants; 0 if none."""
    others = mask[:, None] & mask[None, :] & ~jnp.eye(len(mask), dtype=bool)
    ordered = sort_clients(jnp.where(others, pairs, jnp.inf))
    num_others = jnp.maximum(mask.sum() - 1, 0)
    first, last = median_ranks(num_others)
    middle = (ordered[jnp.maximum(first, 0)] + ordered[jnp.maximum(last, 0)]) / 2
    return jnp.where(mask & (num_others > 0), middle, 0.0)
