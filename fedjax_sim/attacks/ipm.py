"""Inner-product manipulation: send a negative multiple of the honest mean."""

from collections.abc import Callable

import jax.numpy as jnp

from fedjax_sim.attacks.rows import (
    KNOWLEDGE,
    known_rows,
    mean_in_passes,
    mean_over,
    remembered,
    replace_rows,
    sending_all,
    taking_part,
    unconditional,
)
from fedjax_sim.passes import Rows
from fedjax_sim.registry import check_number, lookup, require
from fedjax_sim.types import Array, PyTree, RoundContext, UpdateAttack

NEEDS = frozenset({"byzantine"})


def ipm(epsilon: float = 0.1, knowledge: str = "omniscient") -> UpdateAttack:
    """Makes the inner product of the aggregate and the true direction negative.

    ``u' = -epsilon mean(B)``, with ``B`` the known rows; all attackers send the same.

    Threat model: untargeted. ``omniscient`` attackers know the honest updates,
    ``colluding`` ones estimate the mean from their own honestly trained updates. A
    small epsilon hides inside Krum; ``epsilon > (n - m) / m`` with ``m`` attackers of
    ``n`` reverses the plain mean. Known rows are those that take part and are finite;
    where there is none, the attackers send what they trained.

    Cost: O(n d).

    Args:
        epsilon: positive; 0.1 to hide, 1 to 2 for an attack on the mean.
        knowledge: ``omniscient`` or ``colluding``.

    Returns:
        An ``UpdateAttack`` of strength ``epsilon``; needs ``byzantine``.

    Raises:
        ValueError: ``epsilon`` not finite and positive, unknown ``knowledge``, or,
            while tracing, a context field missing.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedjax_sim.types import RoundContext
        >>> U = jnp.array([[9.0, 9.0], [1.0, 0.0], [3.0, 4.0]])
        >>> context = RoundContext(byzantine=jnp.array([True, False, False]))
        >>> attack = ipm(epsilon=0.5)
        >>> attack.apply(U, attack.init(U[0], 3), context)[0].tolist()
        [[-1.0, -1.0], [1.0, 0.0], [3.0, 4.0]]

    References:
        C. Xie, O. Koyejo and I. Gupta, "Fall of empires: breaking Byzantine-tolerant
        SGD by inner product manipulation", UAI 2019.

    Differs from the paper:
        ``colluding`` is ours; the paper's attackers are omniscient.
    """
    epsilon = check_number("ipm's epsilon", epsilon, low=0)
    lookup("knowledge of ipm", knowledge, KNOWLEDGE)

    def apply(
        updates: PyTree, state: PyTree, context: RoundContext
    ) -> tuple[PyTree, PyTree]:
        byzantine = require("ipm", context, "byzantine")
        known = known_rows(taking_part(updates, context), byzantine, knowledge)

        def craft(u: Array) -> Array:
            return -state * mean_over(known, u)

        return replace_rows(craft, byzantine & jnp.any(known), updates), state

    def in_passes(
        rows: Rows, state: PyTree, context: RoundContext
    ) -> Callable[[Array, Array], Array]:
        byzantine = require("ipm", context, "byzantine")
        asked = known_rows(jnp.ones(len(rows), bool), byzantine, knowledge)
        mean = mean_in_passes(rows, asked)
        return sending_all(-state * mean, byzantine & jnp.any(rows.present & asked))

    init = remembered(epsilon)
    return UpdateAttack(
        init, apply, unconditional, knowledge, NEEDS, "ipm", "epsilon", in_passes
    )
