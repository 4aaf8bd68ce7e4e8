"""Centered clipping: the server's memory, moved by what clients differ from it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_sim import passes
from fedjax_sim.aggregators.common import (
    check_length,
    clip_factors,
    longest,
    normalize,
    weighted_sum,
)
from fedjax_sim.distances import distances_to
from fedjax_sim.pytrees import participants, ravel
from fedjax_sim.registry import check_count
from fedjax_sim.types import (
    Aggregator,
    AggregatorInfo,
    Array,
    Params,
    PyTree,
    RoundContext,
)


class CenteredClippingState(NamedTuple):
    """What the server remembers: ``centre [d]``, its last aggregate that was not empty.

    Raveled, float32, in the order of ``pytrees.ravel``.
    """

    centre: Array


def centered_clipping(radius: float | str = "median", num_steps: int = 1) -> Aggregator:
    """Moves the last aggregate by the clients' differences from it, each clipped.

    From the last aggregate v, ``num_steps`` times::

        v = v + 1/n * sum_i (u_i - v) min(1, radius / |u_i - v|)

    Assumptions: ``n > 2f``, and honest updates within about a radius of each other. The
    memory is what recovers from attacks that are small in every round but always the
    same way; a client moves v by at most ``radius / n`` in a step. Meant for clients
    that send momentum; with plain updates the same holds for changes between rounds.
    Clients count alike whatever their data size.

    Cost: O(L n d) for L steps.

    Args:
        radius: length from which a difference is clipped, in the unit of an update's
            norm, or ``"median"``: the median of the participants' ``|u_i - v|``, anew
            in every step.
        num_steps: steps per round.

    Returns:
        An ``Aggregator`` whose state is a ``CenteredClippingState``, zero at first.
        Every participant has the same weight, its share in the average of the clipped
        differences; scores are the distances ``|u_i - v|`` and details the ``clip``
        factors of the last step; nobody is flagged.

    Raises:
        ValueError: ``radius`` not positive and not ``"median"``; ``num_steps`` below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> rule = centered_clipping(radius=2.5)
        >>> U = jnp.array([[3.0, 4.0], [0.0, 2.0]])
        >>> rule.apply(U, rule.init(U[0], 2), RoundContext())[0].tolist()
        [0.75, 2.0]

    References:
        Karimireddy, He, Jaggi, "Learning from history for Byzantine robust
        optimization", ICML 2021.

    Differs from the paper: the default radius adapts to the round, because a fixed one
    has to fit the length of an update (the authors' code takes 100, for one step, and
    10, for three, on momenta of gradients). Where nobody takes part the aggregate is
    zero and the memory stays.
    """
    length = check_length("centered_clipping's radius", radius)
    num_steps = check_count("centered_clipping's num_steps", num_steps, 1)

    def init(params: Params, num_clients: int) -> CenteredClippingState:
        return CenteredClippingState(jnp.zeros_like(ravel(params)))

    def validate(cohort_size: int) -> None:
        check_count("centered_clipping's cohort_size", cohort_size, 1)

    def apply(
        updates: PyTree, state: CenteredClippingState, context: RoundContext
    ) -> tuple[PyTree, CenteredClippingState, AggregatorInfo]:
        U, mask, unravel = participants(updates, context)
        validate(len(U))
        weights = normalize(mask.astype(jnp.float32))

        def step(_: int, carry: tuple[Array, Array, Array]) -> tuple[Array, ...]:
            v = carry[0]
            distances = distances_to(U, v)
            clip = clip_factors(distances, longest(length, distances, mask))
            share = weights * clip
            return v + weighted_sum(share, U) - share.sum() * v, distances, clip

        carry = (state.centre, jnp.zeros(len(U)), jnp.zeros(len(U)))
        v, distances, clip = jax.lax.fori_loop(0, num_steps, step, carry)
        aggregate = jnp.where(mask.any(), v, 0.0)
        return unravel(aggregate), CenteredClippingState(v), info(distances, clip, mask)

    def in_passes(
        rows: passes.Rows, state: CenteredClippingState, context: RoundContext
    ) -> tuple[Array, CenteredClippingState, AggregatorInfo]:
        def step(_: Any, carry: tuple[Array, Array, Array]) -> tuple[Array, ...]:
            v = carry[0]
            if length is None:
                limit = longest(length, passes.distances_to(rows, v), rows.present)
            else:
                limit = jnp.float32(length)

            def part(updates: Array, present: Array) -> tuple[tuple, tuple]:
                distances = distances_to(updates, v)
                clip = clip_factors(distances, limit)
                used = jnp.where(present, clip, 0.0)
                return (weighted_sum(used, updates), used.sum()), (distances, clip)

            (total, share), (distances, clip) = rows.scan(part)
            moved = (total - share * v) / jnp.maximum(rows.present.sum(), 1)
            return v + moved, distances, clip

        v, distances, clip = passes.repeat(num_steps, step, (state.centre,))
        mask = rows.present
        aggregate = jnp.where(mask.any(), v, 0.0)
        return aggregate, CenteredClippingState(v), info(distances, clip, mask)

    def info(distances: Array, clip: Array, mask: Array) -> AggregatorInfo:
        return AggregatorInfo(
            weights=normalize(mask.astype(jnp.float32)),
            flagged=~mask,
            scores=jnp.where(mask, distances, jnp.inf),
            details={"clip": jnp.where(mask, clip, 0.0)},
        )

    return Aggregator(
        init, apply, validate, name="centered_clipping", in_passes=in_passes
    )
