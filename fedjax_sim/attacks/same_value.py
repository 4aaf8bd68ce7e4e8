"""Same value: send a model, or an update, whose parameters are all alike."""

import jax.numpy as jnp

from fedjax_sim.attacks.rows import (
    remembered,
    replace_rows,
    unconditional,
)
from fedjax_sim.pytrees import ravel
from fedjax_sim.registry import check_number, lookup, require
from fedjax_sim.types import PyTree, RoundContext, UpdateAttack

SPACES = {"update": "c", "weights": "c - w"}


def same_value(value: float = 100.0, space: str = "weights") -> UpdateAttack:
    """Sends one constant for all parameters.

    With server parameters ``w`` and the constant ``c``::

        space="weights":  u' = c 1 - w,  so that the sent model is c everywhere
        space="update":   u' = c 1

    Threat model: untargeted; an attacker needs no update at all, only the broadcast
    model in weight space. Large and easy to see: a test of how a rule treats norms.

    Cost: O(n d).

    Args:
        value: the constant c, finite, of any sign.
        space: ``weights`` or ``update``.

    Returns:
        An ``UpdateAttack`` of strength ``value``; needs ``byzantine``, and ``params``
        in weight space.

    Raises:
        ValueError: ``value`` not finite, unknown ``space``, or, while tracing, a
            context field missing.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedjax_sim.types import RoundContext
        >>> context = RoundContext(byzantine=jnp.array([True, False]),
        ...                        params=jnp.array([1.0, 2.0, -1.0]))
        >>> attack, U = same_value(), jnp.zeros((2, 3))
        >>> attack.apply(U, attack.init(U[0], 2), context)[0].tolist()
        [[99.0, 98.0, 101.0], [0.0, 0.0, 0.0]]

    References:
        L. Li, W. Xu, T. Chen, G. B. Giannakis and Q. Ling, "RSA: Byzantine-robust
        stochastic aggregation methods for distributed learning from heterogeneous
        datasets", AAAI 2019.

    Differs from the paper:
        ``update`` is ours.
    """
    value = check_number("same_value's value", value)
    lookup("space of same_value", space, SPACES)
    in_weights = space == "weights"
    needs = frozenset({"byzantine", "params"} if in_weights else {"byzantine"})

    def apply(
        updates: PyTree, state: PyTree, context: RoundContext
    ) -> tuple[PyTree, PyTree]:
        byzantine = require("same_value", context, "byzantine")
        if not in_weights:
            return (
                replace_rows(lambda u: jnp.full_like(u, state), byzantine, updates),
                state,
            )
        w = ravel(require("same_value", context, "params"))
        return replace_rows(lambda u: state - w, byzantine, updates), state

    return UpdateAttack(
        remembered(value), apply, unconditional, "own", needs, "same_value", "value"
    )
