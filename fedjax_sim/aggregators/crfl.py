"""CRFL: the global model itself is clipped and perturbed."""

import jax.numpy as jnp

from fedjax_sim import passes
from fedjax_sim.aggregators.common import (
    WEIGHTING,
    client_shares,
    client_sizes,
    standard_normal,
    stateless,
    weighted_sum,
)
from fedjax_sim.distances import distances_to
from fedjax_sim.pytrees import participants, ravel
from fedjax_sim.registry import check_count, check_number, lookup, require
from fedjax_sim.types import Aggregator, AggregatorInfo, Array, PyTree, RoundContext


def clip_threshold(
    t: Array | int, start: float = 2.0, slope: float = 0.1, cap: float = 15.0
) -> Array:
    """Longest norm of the model after round ``t = 1, 2, ...``, as ``crfl`` has it.

    ``rho_t = min(cap, slope t + start)``

    Example:
        >>> clip_threshold(100).item(), clip_threshold(200).item()
        (12.0, 15.0)
    """
    return jnp.minimum(cap, slope * jnp.asarray(t, jnp.float32) + start)


def crfl(
    start: float = 2.0,
    slope: float = 0.1,
    cap: float = 15.0,
    noise_std: float = 0.01,
    weighting: str = "uniform",
) -> Aggregator:
    """The mean update, but the model it leads to is clipped and perturbed.

    With server parameters ``w``, ``rho_t = min(cap, slope t + start)`` and ``xi``
    standard normal in every coordinate::

        w'        = w + mean(u)
        w''       = w' min(1, rho_t / |w'|)
        aggregate = w'' + noise_std xi - w

    Assumptions: the backdoored clients' changes of their training data are bounded;
    then the trained and smoothed model can be certified. The rule bounds the model, not
    a client: an arbitrary update turns it anywhere within the norm. The server applies
    the aggregate as it is (plain averaging: server learning rate 1, no momentum).

    Cost: O(n d).

    Args:
        start: the norm's bound before the first round, in the unit of the parameters'
            norm.
        slope: its growth per round; 0 for a constant bound ``start``.
        cap: its largest value, at least ``start``. The published schedules: 2, 0.1, 15
            for MNIST; 4, 0.25, 100 for EMNIST; 2, 0.025 without a cap, that is one
            never reached, such as 1e6, for LOAN.
        noise_std: standard deviation of the noise in every parameter, 0 for none.
        weighting: ``"uniform"`` averages clients alike, ``"data"`` by ``num_samples``
            (alike where the context does not say).

    Returns:
        An ``Aggregator`` that needs ``params`` and ``round``, and ``key`` if there is
        noise. Weights are each client's share of the mean; nobody is suspected, so
        scores are 0.

    Raises:
        ValueError: an option out of range; from ``apply`` where a field of the context
            is missing.

    Example:
        >>> import jax.numpy as jnp
        >>> rule = crfl(start=2.5, slope=0.0, noise_std=0.0)
        >>> U = jnp.array([[2.0, 4.0], [4.0, 4.0]])
        >>> context = RoundContext(params=jnp.zeros(2), round=jnp.int32(0))
        >>> rule.apply(U, rule.init(U[0], 2), context)[0].tolist()
        [1.5, 2.0]

    References:
        Xie, Chen, Chen, Li, "CRFL: certifiably robust federated learning against
        backdoor attacks", ICML 2021.

    Differs from the paper: noise is part of every round's model, while the authors
    evaluate the clipped model before its noise and add none after the last round.
    Smoothing at test time and the certificate computed from it are no business of an
    aggregator. The authors weigh clients by their data in theory. Where nobody takes
    part, or nobody has data, the aggregate is zero: the model is neither clipped nor
    perturbed.
    """
    start = check_number("crfl's start", start, low=0)
    slope = check_number("crfl's slope", slope, low=0, closed="[)")
    cap = check_number("crfl's cap", cap, low=start, closed="[)")
    noise_std = check_number("crfl's noise_std", noise_std, low=0, closed="[)")
    by_data = lookup("crfl weighting", weighting, WEIGHTING)

    def validate(cohort_size: int) -> None:
        check_count("crfl's cohort_size", cohort_size, 1)

    def apply(
        updates: PyTree, state: PyTree, context: RoundContext
    ) -> tuple[PyTree, PyTree, AggregatorInfo]:
        U, mask, unravel = participants(updates, context)
        validate(len(U))
        weights = client_shares(mask, context, by_data)
        aggregate = finish(weighted_sum(weights, U), weights, context)
        scores = jnp.where(mask, 0.0, jnp.inf)
        return unravel(aggregate), state, AggregatorInfo(weights, ~mask, scores)

    def in_passes(
        rows: passes.Rows, state: PyTree, context: RoundContext
    ) -> tuple[Array, PyTree, AggregatorInfo]:
        sizes = client_sizes(len(rows), context, by_data)
        mean, weights = passes.mean(rows, sizes)
        scores = jnp.where(rows.present, 0.0, jnp.inf)
        info = AggregatorInfo(weights, ~rows.present, scores)
        return finish(mean, weights, context), state, info

    def finish(mean: Array, weights: Array, context: RoundContext) -> Array:
        w = ravel(require("crfl", context, "params"))
        t = require("crfl", context, "round") + 1
        norm = distances_to(mean[None], -w)[0]
        rho = clip_threshold(t, start, slope, cap)
        longer = norm > rho
        factor = jnp.where(longer, rho / jnp.where(longer, norm, 1.0), 1.0)
        # w'' - w, without the digits that w' loses of a small mean or a small w.
        aggregate = factor * mean - (1.0 - factor) * w
        if noise_std > 0:
            key = require("crfl with noise_std > 0", context, "key")
            aggregate += noise_std * standard_normal(key, len(mean))
        return jnp.where(weights.any(), aggregate, 0.0)

    needs = {"params", "round"} | ({"key"} if noise_std > 0 else set())
    return Aggregator(
        stateless, apply, validate, frozenset(needs), "crfl", in_passes=in_passes
    )
