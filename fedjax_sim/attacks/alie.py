"""A little is enough: hide inside the spread of the honest updates."""

from collections.abc import Callable

import jax.numpy as jnp
from jax.scipy.special import ndtri

from fedjax_sim.attacks.rows import (
    KNOWLEDGE,
    known_rows,
    mean_in_passes,
    mean_over,
    remembered,
    replace_rows,
    sending,
    sending_all,
    stateless,
    std_in_passes,
    std_over,
    taking_part,
    unconditional,
)
from fedjax_sim.passes import Rows
from fedjax_sim.registry import check_number, lookup, require
from fedjax_sim.types import Array, PyTree, RoundContext, UpdateAttack

NEEDS = frozenset({"byzantine"})


def z_max(num_clients: Array, num_byzantine: Array) -> Array:
    """The largest shift, in standard deviations, that a majority still supports.

    ``z_max = Phi^-1((n - m - s) / (n - m))`` with ``s = floor(n / 2 + 1) - m``, the
    honest clients the attackers need on their side. The counts may be traced. The
    probability is kept half a client away from 0 and 1, which changes nothing where the
    formula has a meaning (``1 <= s < n - m``) and keeps z finite elsewhere.

    Example:
        >>> [round(float(z_max(n, m)), 3) for n, m in [(50, 24), (100, 20), (5, 1)]]
        [1.426, 0.286, 0.0]
    """
    honest = jnp.maximum(num_clients - num_byzantine, 1)
    supporters = num_clients // 2 + 1 - num_byzantine
    half = 0.5 / honest
    return ndtri(jnp.clip((honest - supporters) / honest, half, 1.0 - half))


def _validate(cohort_size: int, num_byzantine: int) -> None:
    most = cohort_size // 2
    if num_byzantine == 0 or (cohort_size >= 3 and num_byzantine <= most):
        return
    fix = f"Lower num_byzantine to {most}" if cohort_size >= 3 else "Add clients"
    raise ValueError(
        "alie with z=None needs cohort_size >= 3 and num_byzantine <= cohort_size // 2 "
        "(s = floor(n / 2 + 1) - m >= 1, else z_max is infinite); got "
        f"cohort_size={cohort_size}, num_byzantine={num_byzantine}. {fix}, or give z "
        "(the paper's experiments use 1.5)."
    )


def alie(
    z: float | None = None,
    direction: int = 1,
    ddof: int = 0,
    knowledge: str = "colluding",
) -> UpdateAttack:
    """Shifts the mean by less than the natural spread of the updates.

    ``u' = mu + direction z sigma`` in every coordinate, with mean ``mu`` and standard
    deviation ``sigma`` of the known rows; all attackers send the same. By default ``z``
    is ``z_max = Phi^-1((n - m - s) / (n - m))``, ``s = floor(n / 2 + 1) - m``, of the
    ``n`` clients that take part and the ``m`` attackers among them, counted anew each
    round because they vary with the cohort.

    Threat model: untargeted. ``colluding`` attackers know only their own honestly
    trained updates, ``omniscient`` ones the honest updates. Known rows are those that
    take part and are finite; where there is none, the attackers send what they trained.
    The spread of a single row is 0: a lone colluding attacker sends what it trained.

    Cost: O(n d).

    Args:
        z: shift in standard deviations, not negative; None for ``z_max``.
        direction: 1 or -1. The paper subtracts ``z sigma`` from *gradients*, which is 1
            on updates.
        ddof: 0 or 1; ``sigma`` divides by the number of rows minus this.
        knowledge: ``colluding`` or ``omniscient``.

    Returns:
        An ``UpdateAttack``, of strength ``z`` if that is given; needs ``byzantine``.
        With ``z=None``, ``validate`` refuses numbers for which ``z_max`` is infinite.

    Raises:
        ValueError: an option out of range or unknown, or, while tracing, a context
            field missing.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedjax_sim.types import RoundContext
        >>> U = jnp.array([[1.0, 0.0], [3.0, 4.0], [9.0, 9.0]])
        >>> context = RoundContext(byzantine=jnp.array([True, True, False]))
        >>> attack = alie(z=1.0)
        >>> attack.apply(U, attack.init(U[0], 3), context)[0].tolist()
        [[3.0, 4.0], [3.0, 4.0], [9.0, 9.0]]

    References:
        M. Baruch, G. Baruch and Y. Goldberg, "A little is enough: circumventing
        defenses for distributed learning", NeurIPS 2019.

    Differs from the paper:
        ``omniscient`` and ``ddof=1`` (both common in public code) are options. In a
        sampled cohort where ``s < 1``, or with fewer than two honest clients, the
        probability inside ``z_max`` is kept half a client away from 0 and 1. With a
        single attacker (or two, where n is even) ``z_max`` is 0 or slightly below, as
        the formula says.
    """
    if z is not None:
        z = check_number("alie's z", z, low=0, closed="[)")
    if direction not in (1, -1):
        raise ValueError(f"alie needs direction 1 or -1; got direction={direction!r}.")
    if ddof not in (0, 1):
        raise ValueError(f"alie needs ddof 0 or 1; got ddof={ddof!r}.")
    lookup("knowledge of alie", knowledge, KNOWLEDGE)

    def apply(
        updates: PyTree, state: PyTree, context: RoundContext
    ) -> tuple[PyTree, PyTree]:
        byzantine = require("alie", context, "byzantine")
        present = taking_part(updates, context)
        known = known_rows(present, byzantine, knowledge)
        shift = shift_of(present, byzantine, state, context)

        def craft(u: Array) -> Array:
            mean = mean_over(known, u)
            return mean + direction * shift * std_over(known, u, mean, ddof)

        return replace_rows(craft, byzantine & jnp.any(known), updates), state

    def in_passes(
        rows: Rows, state: PyTree, context: RoundContext
    ) -> Callable[[Array, Array], Array]:
        byzantine = require("alie", context, "byzantine")
        asked = known_rows(jnp.ones(len(rows), bool), byzantine, knowledge)
        mean = mean_in_passes(rows, asked)
        std = std_in_passes(rows, asked, mean, ddof)
        shift = shift_of(rows.present, byzantine, state, context)
        replaced = byzantine & jnp.any(rows.present & asked)
        return sending_all(mean + direction * shift * std, replaced)

    def shift_of(
        present: Array, byzantine: Array, state: PyTree, context: RoundContext
    ) -> Array:
        if z is not None:
            return state
        taking = sending(present, byzantine, context)
        return z_max(jnp.sum(taking), jnp.sum(taking & byzantine))

    validate = _validate if z is None else unconditional
    init = stateless if z is None else remembered(z)
    strength = "" if z is None else "z"
    return UpdateAttack(
        init, apply, validate, knowledge, NEEDS, "alie", strength, in_passes
    )
