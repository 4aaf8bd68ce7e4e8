"""Sign flip: send the opposite of what was learned."""

from fedjax_sim.attacks.rows import remembered, replace_rows, unconditional
from fedjax_sim.pytrees import ravel
from fedjax_sim.registry import check_number, lookup, require
from fedjax_sim.types import Array, PyTree, RoundContext, UpdateAttack

SPACES = {"update": "-s u", "weights": "-s (w + u) - w"}


def sign_flip(scale: float = 1.0, space: str = "update") -> UpdateAttack:
    """Sends the honest update, or the honest model, with the sign reversed.

    With server parameters ``w``, own update ``u`` and scale ``s``::

        space="update":   u' = -s u
        space="weights":  u' = -s (w + u) - w,  so that the sent model is -s times the
                          trained one; -u - 2w for s = 1

    Threat model: untargeted; an attacker knows its own update only (and the broadcast
    model, in weight space). ``weights`` is by far the stronger one.

    Cost: O(n d).

    Args:
        scale: ``s > 0``; up to 10 for a "reverse" attack.
        space: ``update`` or ``weights``.

    Returns:
        An ``UpdateAttack`` of strength ``scale``; needs ``byzantine``, and ``params``
        in weight space.

    Raises:
        ValueError: ``scale`` not finite and positive, unknown ``space``, or, while
            tracing, a context field missing.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedjax_sim.types import RoundContext
        >>> U = jnp.array([[1.0, -2.0, 3.0], [1.0, -2.0, 3.0]])
        >>> context = RoundContext(byzantine=jnp.array([True, False]))
        >>> attack = sign_flip(scale=2.0)
        >>> attack.apply(U, attack.init(U[0], 2), context)[0].tolist()
        [[-2.0, 4.0, -6.0], [1.0, -2.0, 3.0]]

    References:
        L. Li, W. Xu, T. Chen, G. B. Giannakis and Q. Ling, "RSA: Byzantine-robust
        stochastic aggregation methods for distributed learning from heterogeneous
        datasets", AAAI 2019.

        S. Li, Y. Cheng, W. Wang, Y. Liu and T. Chen, "Learning to detect malicious
        clients for robust federated learning", arXiv:2002.00211, 2020 (weights).

    Differs from the paper:
        S. Li et al. negate the weights with s = 1; the scale in weight space is ours.
    """
    scale = check_number("sign_flip's scale", scale, low=0)
    lookup("space of sign_flip", space, SPACES)
    in_weights = space == "weights"
    needs = frozenset({"byzantine", "params"} if in_weights else {"byzantine"})

    def apply(
        updates: PyTree, state: PyTree, context: RoundContext
    ) -> tuple[PyTree, PyTree]:
        byzantine = require("sign_flip", context, "byzantine")
        if not in_weights:
            return replace_rows(lambda u: -state * u, byzantine, updates), state
        w = ravel(require("sign_flip", context, "params"))[None]

        def flip_weights(u: Array) -> Array:
            return -state * u - (1.0 + state) * w

        return replace_rows(flip_weights, byzantine, updates), state

    return UpdateAttack(
        remembered(scale), apply, unconditional, "own", needs, "sign_flip", "scale"
    )
