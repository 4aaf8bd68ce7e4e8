"""Norm clipping, norm thresholding, and weak differential privacy."""

import jax.numpy as jnp

from fedjax_sim import passes
from fedjax_sim.aggregators.common import (
    check_length,
    clip_factors,
    longest,
    normalize,
    standard_normal,
    stateless,
    weighted_sum,
)
from fedjax_sim.pytrees import participants
from fedjax_sim.registry import check_count, check_number, lookup, require
from fedjax_sim.types import Aggregator, AggregatorInfo, Array, PyTree, RoundContext

_MODES = {"clip": False, "reject": True}


def norm_clipping(
    bound: float | str = 3.0, mode: str = "clip", noise_std: float = 0.0
) -> Aggregator:
    """The mean of the updates, none of them longer than a bound, with noise if wanted.

    With ``xi`` standard normal in every coordinate::

        mode="clip":    aggregate = 1/n sum_i u_i min(1, bound / |u_i|) + noise_std xi
        mode="reject":  aggregate = mean of the u_i with |u_i| <= bound + noise_std xi

    Assumptions: a Byzantine update does its harm by its length, as a boosted backdoor
    does. Short updates in a common direction pass. Noise ("weak" differential privacy)
    wears away what little is left of a backdoor; it proves no privacy. Clients count
    alike whatever their data size.

    Cost: O(n d).

    Args:
        bound: longest norm of an update, or ``"median"``: the median norm of the
            participants.
        mode: ``"clip"`` shortens a longer update, ``"reject"`` drops it.
        noise_std: standard deviation of the noise in every coordinate of the aggregate,
            0 for none.

    Returns:
        An ``Aggregator`` that needs ``key`` if there is noise. A client's weight is its
        share in the average, of clipped updates too; scores are the norms. With
        ``"clip"`` nobody is flagged and details are the factors, ``clip``; with
        ``"reject"`` longer updates are flagged.

    Raises:
        ValueError: ``bound`` not positive and not ``"median"``, unknown ``mode``,
            ``noise_std`` negative; from ``apply`` where the key is missing.

    Example:
        >>> import jax.numpy as jnp
        >>> rule = norm_clipping(bound=2.5)
        >>> U = jnp.array([[3.0, 4.0], [0.0, 2.0]])
        >>> rule.apply(U, rule.init(U[0], 2), RoundContext())[0].tolist()
        [0.75, 2.0]

    References:
        Sun, Kairouz, Suresh, McMahan, "Can you really backdoor federated learning?",
        arXiv:1911.07963, 2019.

    Differs from the paper: the median as a bound is ours. Where nobody takes part, or
    every update is rejected, the aggregate is zero, without noise.
    """
    length = check_length("norm_clipping's bound", bound)
    rejects = lookup("norm_clipping mode", mode, _MODES)
    noise_std = check_number("norm_clipping's noise_std", noise_std, 0.0, closed="[)")

    def validate(cohort_size: int) -> None:
        check_count("norm_clipping's cohort_size", cohort_size, 1)

    def apply(
        updates: PyTree, state: PyTree, context: RoundContext
    ) -> tuple[PyTree, PyTree, AggregatorInfo]:
        U, mask, unravel = participants(updates, context)
        validate(len(U))
        norms = jnp.linalg.norm(U, axis=1)
        limit = longest(length, norms, mask)
        keep = mask & (norms <= limit) if rejects else mask
        weights = normalize(keep.astype(jnp.float32))
        aggregate = weighted_sum(weights * clip_factors(norms, limit), U)
        aggregate, info = finish(aggregate, weights, norms, limit, mask, context)
        return unravel(aggregate), state, info

    def in_passes(
        rows: passes.Rows, state: PyTree, context: RoundContext
    ) -> tuple[Array, PyTree, AggregatorInfo]:
        if length is None:
            norms = passes.norms(rows)
            limit = longest(length, norms, rows.present)
        else:
            limit = jnp.float32(length)

        def weigh(updates: Array) -> tuple[Array, Array, Array]:
            norms = jnp.linalg.norm(updates, axis=1)
            counts = norms <= limit if rejects else jnp.ones(len(norms))
            weight = counts.astype(jnp.float32)
            return weight * clip_factors(norms, limit), weight, norms

        mean, weights, norms = passes.weighted_mean(rows, weigh)
        mean, info = finish(mean, weights, norms, limit, rows.present, context)
        return mean, state, info

    def finish(
        aggregate: Array,
        weights: Array,
        norms: Array,
        limit: Array,
        mask: Array,
        context: RoundContext,
    ) -> tuple[Array, AggregatorInfo]:
        keep = mask & (norms <= limit) if rejects else mask
        if noise_std > 0:
            key = require("norm_clipping with noise_std > 0", context, "key")
            noise = noise_std * standard_normal(key, len(aggregate))
            aggregate += jnp.where(keep.any(), noise, 0.0)
        clip = jnp.where(mask, clip_factors(norms, limit), 0.0)
        return aggregate, AggregatorInfo(
            weights=weights,
            flagged=~keep,
            scores=jnp.where(mask, norms, jnp.inf),
            details={} if rejects else {"clip": clip},
        )

    needs = frozenset({"key"}) if noise_std > 0 else frozenset()
    return Aggregator(
        stateless, apply, validate, needs, "norm_clipping", in_passes=in_passes
    )
