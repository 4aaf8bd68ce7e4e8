"""Free riders: receive the model, contribute nothing."""

import jax.numpy as jnp

from fedjax_sim.attacks.gaussian import normal_rows
from fedjax_sim.attacks.rows import (
    remembered,
    replace_rows,
    stateless,
    unconditional,
)
from fedjax_sim.pytrees import ravel
from fedjax_sim.registry import check_number, lookup, require
from fedjax_sim.types import Array, PyTree, RoundContext, UpdateAttack

NEEDS = {
    "zero": frozenset({"byzantine"}),
    "delta_weights": frozenset({"byzantine", "params", "previous_params"}),
    "noisy": frozenset({"byzantine", "key", "client_ids"}),
}
DEFAULTS = (1e-3, 0.0)


def free_rider(
    mode: str = "zero", std: float = DEFAULTS[0], decay: float = DEFAULTS[1]
) -> UpdateAttack:
    """Sends an update that took no training.

    With server parameters ``w_t`` in round t and ``xi`` standard normal in every
    coordinate::

        mode="zero":           u' = 0
        mode="delta_weights":  u' = w_t - w_(t-1), what the server did last; 0 at first
        mode="noisy":          u' = std t^(-decay) xi, with t = 1 in the first round

    Threat model: the client wants the model for nothing; harm is a side effect. It
    knows the last two models, as one that takes part in every round does. Its data size
    is reported as it is.

    Cost: O(n d).

    Args:
        mode: ``zero``, ``delta_weights`` or ``noisy``.
        std: standard deviation of the noise, positive, ``noisy`` only.
        decay: how fast the noise fades, not negative, ``noisy`` only.

    Returns:
        An ``UpdateAttack``, of strength ``std`` if ``noisy``; needs ``byzantine``, and
        ``params`` and ``previous_params``, or ``key``, ``client_ids`` and, with a
        decay, ``round``.

    Raises:
        ValueError: a number out of range, unknown ``mode``, ``std`` or ``decay`` given
            with another mode, or, while tracing, a context field missing.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedjax_sim.types import RoundContext
        >>> context = RoundContext(byzantine=jnp.array([True, False]),
        ...                        params=jnp.array([1.0, 2.0]),
        ...                        previous_params=jnp.array([0.5, 3.0]))
        >>> attack, U = free_rider("delta_weights"), jnp.ones((2, 2))
        >>> attack.apply(U, attack.init(U[0], 2), context)[0].tolist()
        [[0.5, -1.0], [1.0, 1.0]]

    References:
        J. Lin, M. Du and J. Liu, "Free-riders in federated learning: attacks and
        defenses", arXiv:1911.12560, 2019.

        Y. Fraboni, R. Vidal and M. Lorenzi, "Free-rider attacks on model aggregation
        in federated learning", AISTATS 2021 (noisy, decaying).

    Differs from the paper:
        The defaults of ``std`` and ``decay`` are ours. ``noisy`` is the noise alone, as
        an update: a free rider that disguises the model it received.
    """
    lookup("mode of free_rider", mode, NEEDS)
    std = check_number("free_rider's std", std, low=0)
    decay = check_number("free_rider's decay", decay, low=0, closed="[)")
    noisy = mode == "noisy"
    if not noisy and (std, decay) != DEFAULTS:
        raise ValueError(
            f"free_rider with mode={mode!r} sends no noise; got std={std}, "
            f"decay={decay}. Drop them, or use mode='noisy'."
        )
    needs = NEEDS[mode] | ({"round"} if decay else set())

    def apply(
        updates: PyTree, state: PyTree, context: RoundContext
    ) -> tuple[PyTree, PyTree]:
        byzantine = require("free_rider", context, "byzantine")
        if mode == "zero":
            return replace_rows(jnp.zeros_like, byzantine, updates), state
        if noisy:
            std_now = state
            if decay:
                number = require("free_rider", context, "round") + 1
                std_now = state * jnp.float32(number) ** -decay
            key = require("free_rider", context, "key")
            client_ids = require("free_rider", context, "client_ids")

            def craft(u: Array) -> Array:
                return std_now * normal_rows(key, client_ids, u.shape[1])

            return replace_rows(craft, byzantine, updates), state
        params = require("free_rider", context, "params")
        previous = require("free_rider", context, "previous_params")
        change = ravel(params) - ravel(previous)
        return replace_rows(lambda u: change, byzantine, updates), state

    init = remembered(std) if noisy else stateless
    strength = "std" if noisy else ""
    return UpdateAttack(
        init, apply, unconditional, "own", needs, "free_rider", strength
    )
