"""When an attack is active."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from fedjax_sim.passes import Rows
from fedjax_sim.registry import check_count, require
from fedjax_sim.types import (
    Array,
    ClientData,
    DataAttack,
    PyTree,
    RoundContext,
    UpdateAttack,
)

Attack = TypeVar("Attack", bound=UpdateAttack | DataAttack)


def schedule(
    attack: Attack, start: int = 0, stop: int | None = None, every: int = 1
) -> Attack:
    """The attack, in some rounds only; in the others its clients are honest.

    Active in round ``t``, from 0, where ``start <= t < stop`` and ``(t - start) mod
    every = 0``. An attack's memory stands still while it is not.

    Who is Byzantine does not change: detection rates and counts (``History.tpr``,
    ``num_byzantine``) take a Byzantine client for Byzantine in rounds in which it does
    not attack, too. Success of a data attack is measured in every evaluation.

    Args:
        attack: on updates or on data. A schedule of a schedule is active where both
            are.
        start: first round of the attack, >= 0.
        stop: round from which it is over, > ``start``; None for never.
        every: rounds from one strike to the next, >= 1.

    Returns:
        An attack of the same kind with the same name, knowledge, strength and trigger;
        it needs ``round`` besides.

    Raises:
        TypeError: not an attack, or a round that is not an integer.
        ValueError: an impossible range, or, while tracing, no ``context.round``.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedjax_sim.attacks import sign_flip
        >>> attack, U = schedule(sign_flip(), start=10, every=5), jnp.array([[1.0]])
        >>> def sent(t):
        ...     context = RoundContext(round=t, byzantine=jnp.array([True]))
        ...     return float(attack.apply(U, attack.init(U[0], 1), context)[0][0, 0])
        >>> [sent(t) for t in (9, 10, 11, 15)]
        [1.0, -1.0, 1.0, -1.0]

    References:
        C. Xie, K. Huang, P.-Y. Chen and B. Li, "DBA: Distributed backdoor attacks
        against federated learning", ICLR 2020 (single-shot and multi-shot attacks).
    """
    if not isinstance(attack, UpdateAttack | DataAttack):
        hint = " Did you forget to call the factory?" if callable(attack) else ""
        raise TypeError(
            "schedule needs an UpdateAttack or a DataAttack; got "
            f"{type(attack).__name__}.{hint}"
        )
    start = check_count("schedule's start", start, 0)
    every = check_count("schedule's every", every, 1)
    if stop is not None and check_count("schedule's stop", stop, 0) <= start:
        raise ValueError(
            f"schedule needs start < stop; got start={start}, stop={stop}: the attack "
            "would never be active."
        )

    def active(context: RoundContext) -> Array:
        t = jnp.asarray(require(attack.name, context, "round"))
        now = (t >= start) & ((t - start) % every == 0)
        return now if stop is None else now & (t < stop)

    if isinstance(attack, DataAttack):
        poison = attack.poison

        def poison_now(
            key: Array, data: ClientData, context: RoundContext
        ) -> ClientData:
            now, poisoned = active(context), poison(key, data, context)
            return jax.tree.map(lambda a, b: jnp.where(now, a, b), poisoned, data)

        data_attack: Any = attack._replace(poison=poison_now)
        return data_attack

    strike = attack.apply

    def apply_now(
        updates: PyTree, state: PyTree, context: RoundContext
    ) -> tuple[PyTree, PyTree]:
        return jax.lax.cond(
            active(context),
            lambda updates, state: strike(updates, state, context),
            lambda updates, state: (updates, state),
            updates,
            state,
        )

    parts: dict[str, Any] = {"apply": apply_now, "needs": attack.needs | {"round"}}
    if attack.in_passes is not None:
        passes_of = attack.in_passes

        def in_passes(
            rows: Rows, state: PyTree, context: RoundContext
        ) -> Callable[[Array, Array], Array]:
            now, change = active(context), passes_of(rows, state, context)

            def change_now(updates: Array, places: Array) -> Array:
                return jnp.where(now, change(updates, places), updates)

            return change_now

        parts["in_passes"] = in_passes
    update_attack: Any = attack._replace(**parts)
    return update_attack
