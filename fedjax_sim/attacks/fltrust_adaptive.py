"""The attack on FLTrust by its authors: keep the trust, turn the aggregate."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_sim.aggregators.common import root_vector
from fedjax_sim.attacks.fang_trimmed_mean import WIDTH, beyond_extremes, uniform_rows
from fedjax_sim.attacks.rows import (
    known_rows,
    mean_over,
    replace_rows,
    sending,
    stateless,
    unconditional,
    unit_rows,
)
from fedjax_sim.pytrees import participants, safe_norms
from fedjax_sim.registry import check_count, check_number, lookup, require
from fedjax_sim.types import Array, PyTree, RoundContext, UpdateAttack

NEEDS = frozenset({"byzantine", "client_ids", "key", "root_update"})
STARTS = {"trim": "the crafted rows of fang_trimmed_mean", "own": "as trained"}


class Goal(NamedTuple):
    """What one attacker climbs while all others keep their rows.

    Attributes:
        root: ``[d]``, the root update at length 1.
        length: ``[]``, the norm of the root update.
        sign: ``[d]``, the sign of FLTrust's aggregate without an attack.
        trust: ``[]``, the sum of the others' trust scores t.
        along: ``[]``, their sum of ``t sign.e``, with rows e of length 1.
    """

    root: Array
    length: Array
    sign: Array
    trust: Array
    along: Array


def search_direction(key: Array, step: Array, size: int) -> Array:
    """A standard normal vector ``[d]`` for one step of one attacker."""
    return jax.random.normal(jax.random.fold_in(key, step), (size,), jnp.float32)


def rise(
    goal: Goal, cosine: Array, along: Array, cosines: Array, alongs: Array
) -> Array:
    """How much h grows as the attacker's row goes from one place to another.

    ``h = const - |g0| (A + t b) / (T + t)`` with t the positive part of the row's
    cosine, b its product with the sign, and T and A the sums of the others. The
    difference of the two quotients is worked out, because in float32 that of their
    values would lose the digits that count.

    Args:
        goal: T and A among others.
        cosine: product of the row with the root direction, before.
        along: product of the row with the sign, before.
        cosines: change of the cosine.
        alongs: change of the other product.
    """
    t, b = jnp.maximum(cosine, 0.0), along
    t_new, b_new = jnp.maximum(cosine + cosines, 0.0), along + alongs
    both = (t > 0.0) & (t_new > 0.0)
    change = jnp.where(both, cosines, t_new - t)
    top = (
        goal.trust * (change * b_new + t * alongs)
        - goal.along * change
        + t * t_new * alongs
    )
    bottom = (goal.trust + t) * (goal.trust + t_new)
    # With nobody else trusted the aggregate is the row itself, or 0 without trust.
    alone = jnp.where(t_new > 0.0, b_new, 0.0) - jnp.where(t > 0.0, b, 0.0)
    difference = jnp.where(
        bottom > 0.0, top / jnp.where(bottom > 0.0, bottom, 1.0), alone
    )
    return -goal.length * difference


def climb(
    row: Array,
    goal: Goal,
    direction: Array,
    smoothing: float,
    rate: float,
    improving: bool = False,
) -> Array:
    """One step of an attacker's row ``[d]`` along a random ``direction``.

    ``unit(e + rate (h(e + smoothing u) - h(e)) / smoothing u)``; ``improving`` keeps
    the row where that does not raise h.
    """

    def products(vector: Array) -> tuple[Array, Array]:
        return _dot(goal.root, vector), _dot(goal.sign, vector)

    here, along_u = products(row), products(direction)
    gain = rise(goal, *here, *(smoothing * x for x in along_u))
    # Of unit length whatever the gain: a huge one gives the direction alone.
    slope = rate * gain / smoothing
    new = unit_rows(row + slope * direction)
    if not improving:
        return new
    there = products(new)
    better = rise(goal, *here, there[0] - here[0], there[1] - here[1]) > 0.0
    return jnp.where(better, new, row)


def fltrust_adaptive(
    variance: float = 0.5,
    smoothing: float = 0.005,
    rate: float = 0.01,
    passes: int = 10,
    steps: int = 10,
    start: str = "trim",
    improving: bool = False,
) -> UpdateAttack:
    """Turns FLTrust's aggregate as far as trusted rows can.

    With the root update ``g0``, rows e of length 1 and trust ``t = max(cos(e, g0), 0)``
    the attackers' rows e' maximise ``h = s.(g - g')``, with FLTrust's aggregate g
    before the attack, its sign s, and under attack ``g' = |g0| (sum_m t_m e'_m + sum_b
    t_b e_b) / (sum_m t_m + sum_b t_b)``. One attacker after the other, in the order of
    client ids, takes ``steps`` steps of ::

        u ~ N(0, variance I)
        e' <- unit(e' + rate (h(e' + smoothing u) - h(e')) / smoothing u)

    and that ``passes`` times. It sends ``|g0| e'``.

    Threat model: untargeted, against FLTrust. The attackers know the honest updates and
    the root update. Known rows are those that take part and are finite; where there is
    none, or the root update is zero or not finite, the attackers send what they
    trained. A step costs a normal draw and four products of d numbers: m attackers take
    ``passes steps m`` of them, 2000 for 20 attackers. In a model of 1.6 million
    parameters that is some 3 billion normal values a round, minutes on a CPU.

    Cost: O(V Q m d) for m attackers, V passes of Q steps.

    Args:
        variance: of u in every coordinate, positive.
        smoothing: length of the finite difference, positive.
        rate: of the ascent, positive.
        passes: times that every attacker has its turn.
        steps: steps of one turn.
        start: ``trim``, the rows of an omniscient ``fang_trimmed_mean``; ``own``, the
            rows as trained.
        improving: take only steps that raise h.

    Returns:
        An ``UpdateAttack``; needs ``byzantine``, ``key``, ``client_ids`` and
        ``root_update``.

    Raises:
        ValueError: an option out of range or unknown, or, while tracing, a context
            field missing.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from fedjax_sim.types import RoundContext
        >>> context = RoundContext(key=jax.random.key(0), client_ids=jnp.arange(3),
        ...                        byzantine=jnp.array([True, False, False]),
        ...                        root_update=jnp.array([2.0, 0.0]))
        >>> U = jnp.array([[1.0, 0.1], [1.0, 0.2], [1.0, -0.3]])
        >>> attack = fltrust_adaptive(start="own", passes=2)
        >>> sent = attack.apply(U, attack.init(U[0], 3), context)[0]
        >>> round(float(jnp.linalg.norm(sent[0])), 4)
        2.0

    References:
        X. Cao, M. Fang, J. Liu and N. Z. Gong, "FLTrust: Byzantine-robust federated
        learning via trust bootstrapping", NDSS 2021 (its adaptive attack).

    Differs from the paper:
        ``start="own"`` and ``improving`` are ours. A row of ``trim`` that points away
        from the root update has no trust, and no step that leaves it so changes h, so
        such an attacker may stay without effect; and in many dimensions the published
        steps are longer than the row itself. Where nobody is trusted the aggregate
        counts as zero, as in ``fltrust``.
    """
    variance = check_number("fltrust_adaptive's variance", variance, low=0)
    smoothing = check_number("fltrust_adaptive's smoothing", smoothing, low=0)
    rate = check_number("fltrust_adaptive's rate", rate, low=0)
    passes = check_count("fltrust_adaptive's passes", passes, 1)
    steps = check_count("fltrust_adaptive's steps", steps, 1)
    lookup("start of fltrust_adaptive", start, STARTS)
    std = variance**0.5

    def apply(
        updates: PyTree, state: PyTree, context: RoundContext
    ) -> tuple[PyTree, PyTree]:
        byzantine = require("fltrust_adaptive", context, "byzantine")
        client_ids = require("fltrust_adaptive", context, "client_ids")
        key_start, key = jax.random.split(require("fltrust_adaptive", context, "key"))
        U, present, _ = participants(updates, context)
        root, length = root_vector("fltrust_adaptive", context)
        root = unit_rows(root)
        honest = known_rows(present, byzantine, "omniscient")
        attackers = sending(present, byzantine, context) & byzantine

        lengths = safe_norms(U)
        per_length = jnp.where(lengths > 0.0, 1.0 / lengths, 0.0)
        trust = jnp.maximum(_dot(U, root) * per_length, 0.0)
        sign = jnp.sign(_dot(trust * per_length, U))
        along = _dot(U, sign) * per_length

        if start == "trim":
            draws = uniform_rows(key_start, client_ids, U.shape[1])
            rows = beyond_extremes(
                U, honest, jnp.sign(mean_over(present, U)), draws, WIDTH
            )
        else:
            rows = U
        rows = unit_rows(rows)
        # Trust and product with the sign of everybody, as sent.
        ts = jnp.where(attackers, jnp.maximum(_dot(rows, root), 0.0), trust)
        bs = jnp.where(attackers, _dot(rows, sign), along)

        num_attackers = jnp.sum(attackers)
        last = jnp.iinfo(client_ids.dtype).max
        order = jnp.argsort(jnp.where(attackers, client_ids, last))

        def turn(
            index: Array, carry: tuple[Array, Array, Array]
        ) -> tuple[Array, Array, Array]:
            rows, ts, bs = carry
            me = order[index % num_attackers]
            others = jnp.where(jnp.arange(len(U)) == me, 0.0, ts)
            goal = Goal(root, length, sign, others.sum(), (others * bs).sum())
            my_key = jax.random.fold_in(key, client_ids[me])

            def one_step(step: Array, row: Array) -> Array:
                number = (index // num_attackers) * steps + step
                u = std * search_direction(my_key, number, U.shape[1])
                return climb(row, goal, u, smoothing, rate, improving)

            row = jax.lax.fori_loop(0, steps, one_step, rows[me])
            return (
                rows.at[me].set(row),
                ts.at[me].set(jnp.maximum(_dot(root, row), 0.0)),
                bs.at[me].set(_dot(sign, row)),
            )

        turns = (passes * num_attackers).astype(jnp.int32)
        rows, _, _ = jax.lax.fori_loop(jnp.int32(0), turns, turn, (rows, ts, bs))
        replaced = byzantine & jnp.any(honest) & (length > 0.0)
        return replace_rows(lambda u: length * rows, replaced, updates), state

    return UpdateAttack(
        stateless, apply, unconditional, "omniscient", NEEDS, "fltrust_adaptive"
    )


def _dot(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
