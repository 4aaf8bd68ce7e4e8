"""Model replacement: boost a poisoned update until the server adopts the model."""

from collections.abc import Callable

import jax.numpy as jnp

from fedjax_sim.attacks.rows import (
    look_at,
    remembered,
    replace_rows,
    stateless,
    taking_part,
    unconditional,
)
from fedjax_sim.passes import Rows
from fedjax_sim.pytrees import safe_norms
from fedjax_sim.registry import check_number, require
from fedjax_sim.types import Array, PyTree, RoundContext, UpdateAttack

NEEDS = frozenset({"byzantine"})


def model_replacement(
    scale: float | None = None,
    server_rate: float = 1.0,
    norm_bound: float | None = None,
) -> UpdateAttack:
    """Scales the attacker's update so that a mean becomes the attacker's model.

    ``u' = gamma (X - w)`` with the attacker's trained model X, the server's w and
    ``gamma = n / (eta m)`` for m attackers among the n clients that take part, counted
    anew each round; with a bound S on the norm, ``gamma = min(gamma, S / |X - w|)``.
    Once the honest updates cancel, the server's step ``eta`` times the mean of all
    updates leads from w to the mean of the attackers' models.

    Threat model: targeted, with a data attack such as a backdoor: X is what the
    attacker trained on its poisoned data. It knows its own update, and how many clients
    and attackers take part. Against rules that average alike.

    Cost: O(n d).

    Args:
        scale: ``gamma > 0`` itself, in place of ``n / (eta m)``.
        server_rate: the server's step ``eta > 0``; not with ``scale``.
        norm_bound: ``S > 0``, the longest update that passes the server; None for no
            bound.

    Returns:
        An ``UpdateAttack``, of strength ``scale`` if that is given; needs
        ``byzantine``.

    Raises:
        ValueError: a number not finite and positive, ``server_rate`` given with
            ``scale``, or, while tracing, a context field missing.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedjax_sim.types import RoundContext
        >>> context = RoundContext(byzantine=jnp.array([True, False, False, False]))
        >>> U = jnp.array([[2.0, -3.0], [0.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
        >>> attack = model_replacement()
        >>> attack.apply(U, attack.init(U[0], 4), context)[0].mean(axis=0).tolist()
        [2.0, -3.0]

    References:
        E. Bagdasaryan, A. Veit, Y. Hua, D. Estrin and V. Shmatikov, "How to backdoor
        federated learning", AISTATS 2020.

    Differs from the paper:
        The loss that keeps X close to w while it is trained (``alpha L_class + (1 -
        alpha) L_anomaly``) belongs to local training and is not part of this attack.
        Several attackers share the boost, as in the authors' code. An update of norm 0
        stays 0.
    """
    if scale is not None:
        scale = check_number("model_replacement's scale", scale, low=0)
    server_rate = check_number("model_replacement's server_rate", server_rate, low=0)
    if scale is not None and server_rate != 1.0:
        raise ValueError(
            "model_replacement takes either scale or server_rate, which scale = n / "
            f"(server_rate m) replaces; got scale={scale}, server_rate={server_rate}. "
            "Drop one of them."
        )
    if norm_bound is not None:
        norm_bound = check_number("model_replacement's norm_bound", norm_bound, low=0)

    def apply(
        updates: PyTree, state: PyTree, context: RoundContext
    ) -> tuple[PyTree, PyTree]:
        byzantine = require("model_replacement", context, "byzantine")
        gamma = state
        if scale is None:
            gamma = gamma_of(taking_part(updates, context), byzantine)
        return replace_rows(lambda u: boost(u, gamma), byzantine, updates), state

    def in_passes(
        rows: Rows, state: PyTree, context: RoundContext
    ) -> Callable[[Array, Array], Array]:
        byzantine = require("model_replacement", context, "byzantine")
        gamma = state
        if scale is None:
            look_at(rows)
            gamma = gamma_of(rows.present, byzantine)

        def change(updates: Array, places: Array) -> Array:
            boosted = boost(updates, gamma)
            return jnp.where(byzantine[places][:, None], boosted, updates)

        return change

    def gamma_of(present: Array, byzantine: Array) -> Array:
        attackers = jnp.maximum(jnp.sum(present & byzantine), 1)
        return jnp.sum(present) / (server_rate * attackers)

    def boost(u: Array, gamma: Array) -> Array:
        gammas = jnp.broadcast_to(gamma, len(u))
        if norm_bound is not None:
            length = safe_norms(u)
            # A row that is not finite is sent as it is, not as 0 * inf.
            bounded = jnp.isfinite(length) & (length > 0.0)
            allowed = norm_bound / jnp.where(bounded, length, 1.0)
            gammas = jnp.where(bounded, jnp.minimum(gammas, allowed), gammas)
        return gammas[:, None] * u

    return UpdateAttack(
        stateless if scale is None else remembered(scale),
        apply,
        unconditional,
        "own",
        NEEDS,
        "model_replacement",
        strength="" if scale is None else "scale",
        in_passes=in_passes,
    )
