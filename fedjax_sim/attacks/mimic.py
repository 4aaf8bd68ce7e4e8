"""Mimic: all attackers copy one honest client."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_sim.attacks.rows import (
    known_rows,
    mean_over,
    replace_rows,
    stateless,
    unconditional,
    unit_rows,
)
from fedjax_sim.pytrees import participants, ravel
from fedjax_sim.registry import check_count, lookup, require
from fedjax_sim.types import Array, Params, PyTree, RoundContext, UpdateAttack

CRITERIA = {"argmax": "the furthest along z", "argmin": "the furthest against z"}
WARMUP = 10


class MimicState(NamedTuple):
    """What the attackers have learned of the honest clients.

    Attributes:
        mean: ``float32 [d]``, running mean of the honest updates.
        direction: ``float32 [d]``, z, the direction of their greatest spread.
        rounds: ``int32 []``, rounds in which there was an honest update to see.
        target: ``int32 []``, id of the client to copy; -1 before there is one.
    """

    mean: Array
    direction: Array
    rounds: Array
    target: Array


def initial_direction(key: Array, size: int) -> Array:
    """The standard normal vector ``[d]`` with which the first round begins."""
    return jax.random.normal(key, (size,), jnp.float32)


def learn(state: MimicState, U: Array, honest: Array, key: Array) -> MimicState:
    """One round of warm-up: a step of the power method on the honest updates.

    With t rounds seen before, ``mean <- t / (1 + t) mean + mean(B) / (1 + t)``,
    ``q = sum_i (u_i - mean) ((u_i - mean).z)`` and ``z <- unit(t / (1 + t) z + unit(q)
    / (1 + t))``. The first z, which only q depends on, is random.
    """
    first = state.rounds == 0
    share = 1.0 / (1.0 + state.rounds.astype(jnp.float32))
    mean = (1.0 - share) * state.mean + share * mean_over(honest, U)[0]
    z = jnp.where(first, initial_direction(key, U.shape[1]), state.direction)
    deviations = jnp.where(honest[:, None], U - mean[None], 0.0)
    # At length 1 and of weights at most 1, so that huge rows do not overflow.
    weights = _dot(deviations, unit_rows(z))
    largest = jnp.max(jnp.abs(weights))
    q = _dot(weights / jnp.where(largest > 0.0, largest, 1.0), deviations)
    z = unit_rows((1.0 - share) * z + share * unit_rows(q))
    return state._replace(mean=mean, direction=z)


def mimic(
    warmup: int | None = None,
    criterion: str | None = None,
    target: int | None = None,
) -> UpdateAttack:
    """All attackers send what one honest client sends.

    ``u' = u_j``. For ``warmup`` rounds the attackers learn the direction z in which the
    honest updates differ most (see ``learn``) and copy ``j = argmax_i u_i.z`` of each
    round; the j of the last of them is copied from then on. In a round in which it does
    not take part, they copy the argmax of that round.

    Threat model: untargeted, and harmful only where clients' data differ: the copied
    client counts for as many as there are attackers, and rules that look for outliers
    leave out those it is unlike. The attackers know the honest updates. Known rows are
    those that take part and are finite; where there is none, the attackers send what
    they trained, and learn nothing.

    Cost: O(n d).

    Args:
        warmup: rounds of learning, at least 1, 10 by default; not with ``target``.
        criterion: ``argmax``, the default, or ``argmin``; not with ``target``.
        target: id of the client to copy from the start. In a round in which it is not
            an honest participant, the honest one of lowest id is copied.

    Returns:
        An ``UpdateAttack`` with a ``MimicState``, or none if there is a ``target``;
        needs ``byzantine`` and ``client_ids``, and without a ``target`` ``key``.

    Raises:
        ValueError: a number out of range, unknown ``criterion``, ``warmup`` or
            ``criterion`` given with ``target``, or, while tracing, a context field
            missing.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedjax_sim.types import RoundContext
        >>> U = jnp.array([[5.0], [1.0], [2.0]])
        >>> context = RoundContext(byzantine=jnp.array([True, False, False]),
        ...                        client_ids=jnp.array([8, 4, 6]))
        >>> attack = mimic(target=6)
        >>> attack.apply(U, attack.init(U[0], 9), context)[0].tolist()
        [[2.0], [1.0], [2.0]]

    References:
        S. P. Karimireddy, L. He and M. Jaggi, "Byzantine-robust learning on
        heterogeneous datasets via bucketing", ICLR 2022.

    Differs from the paper:
        The target is chosen by the products of the round, as in the authors' code; the
        paper sums them over the warm-up. What to do when the target does not take part
        is ours, as is the default of ``warmup``.
    """
    fixed = target is not None
    if fixed and (warmup is not None or criterion is not None):
        raise ValueError(
            "mimic with a target learns nothing; got "
            f"target={target}, warmup={warmup}, criterion={criterion!r}. Drop either "
            "the target or the others."
        )
    if target is not None:
        target = check_count("mimic's target", target, 0)
    warmup = check_count("mimic's warmup", WARMUP if warmup is None else warmup, 1)
    criterion = "argmax" if criterion is None else criterion
    lookup("criterion of mimic", criterion, CRITERIA)
    towards = 1.0 if criterion == "argmax" else -1.0
    needs = frozenset({"byzantine", "client_ids"} | (set() if fixed else {"key"}))

    def init(params: Params, num_clients: int) -> MimicState:
        nothing = jnp.zeros_like(ravel(params))
        return MimicState(nothing, nothing, jnp.int32(0), jnp.int32(-1))

    def apply(
        updates: PyTree, state: PyTree, context: RoundContext
    ) -> tuple[PyTree, PyTree]:
        byzantine = require("mimic", context, "byzantine")
        ids = require("mimic", context, "client_ids")
        U, present, _ = participants(updates, context)
        honest = known_rows(present, byzantine, "omniscient")
        some = jnp.any(honest)
        if fixed:
            suits, wanted = -ids.astype(jnp.float32), jnp.int32(target)
        else:
            key = require("mimic", context, "key")
            learning = some & (state.rounds < warmup)
            learned = learn(state, U, honest, key)
            state = jax.tree.map(
                lambda new, old: jnp.where(learning, new, old), learned, state
            )
            suits = towards * _dot(U, state.direction)
            wanted = jnp.where(learning, -1, state.target)
        here = jnp.where(honest & (ids == wanted), jnp.inf, suits)
        chosen = jnp.argmax(jnp.where(honest, here, -jnp.inf))
        if not fixed:
            state = state._replace(
                rounds=state.rounds + learning,
                target=jnp.where(learning, ids[chosen], state.target),
            )
        return replace_rows(lambda u: U[chosen], byzantine & some, updates), state

    init_or_none = stateless if fixed else init
    return UpdateAttack(
        init_or_none, apply, unconditional, "omniscient", needs, "mimic"
    )


def _dot(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
