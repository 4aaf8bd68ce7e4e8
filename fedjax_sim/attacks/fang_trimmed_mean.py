"""The attack of Fang et al. on the trimmed mean and the median."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fedjax_sim.attacks.rows import (
    KNOWLEDGE,
    known_rows,
    mean_over,
    remembered,
    replace_rows,
    stateless,
    std_over,
    taking_part,
    unconditional,
)
from fedjax_sim.pytrees import ravel, reduce_clients
from fedjax_sim.registry import check_number, lookup, require
from fedjax_sim.types import Array, PyTree, RoundContext, UpdateAttack

NEEDS = frozenset({"byzantine", "client_ids", "key"})
SPACES = {"update": "intervals of the updates", "weights": "of the models"}
# By default an interval reaches to twice the extreme value.
WIDTH = 2.0


def uniform_rows(key: Array, client_ids: Array, size: int) -> Array:
    """Independent values ``[k, size]`` uniform in [0, 1), float32.

    The draw of a row depends on the key and its client id alone.
    """
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, client_ids)
    return jax.vmap(lambda k: jax.random.uniform(k, (size,), jnp.float32))(row_keys)


def beyond_extremes(
    u: Array, known: Array, sign: Array, draws: Array, b: Array | float
) -> Array:
    """Values just outside the known ones, on the side opposite to ``sign``; else 0.

    ``sign = -1`` draws from ``[max, b max]``, or ``[max, max / b]`` where max <= 0;
    ``sign = 1`` from ``[min / b, min]``, or ``[b min, min]`` where min <= 0.

    Example:
        >>> u, sign = jnp.array([[1.0, -2.0], [3.0, -1.0]]), jnp.array([[1.0, -1.0]])
        >>> beyond_extremes(u, jnp.ones(2, bool), sign, jnp.full((1, 2), 0.5), 2.0)
        Array([[ 0.75, -0.75]], dtype=float32)
    """

    def extreme(combine: Callable[[Array, Array], Array], none: float) -> Array:
        """The smallest or largest known value, ``none`` where nobody is known."""
        return reduce_clients(
            combine, none, lambda who, row: jnp.where(who, row, none), known, u
        )[None]

    low, high = extreme(jax.lax.min, jnp.inf), extreme(jax.lax.max, -jnp.inf)
    # Where nobody is known the caller sends something else; no NaN on the way.
    low, high = (jnp.where(jnp.any(known), x, 0.0) for x in (low, high))
    below = jnp.where(low > 0.0, low / b, b * low)
    above = jnp.where(high > 0.0, b * high, high / b)
    under = below + draws * (low - below)
    over = high + draws * (above - high)
    return jnp.where(sign > 0, under, jnp.where(sign < 0, over, 0.0))


def beyond_spread(u: Array, known: Array, sign: Array, draws: Array) -> Array:
    """Values 3 to 4 standard deviations from the known mean, opposite to ``sign``.

    Example:
        >>> u, sign = jnp.array([[1.0, 0.0], [3.0, 4.0]]), jnp.array([[1.0, -1.0]])
        >>> beyond_spread(u, jnp.ones(2, bool), sign, jnp.zeros((1, 2)))
        Array([[-2.,  8.]], dtype=float32)
    """
    mean = mean_over(known, u)
    std = std_over(known, u, mean)
    under = mean - (4.0 - draws) * std
    over = mean + (3.0 + draws) * std
    return jnp.where(sign > 0, under, jnp.where(sign < 0, over, 0.0))


def fang_trimmed_mean(
    b: float | None = None, knowledge: str = "omniscient", space: str = "update"
) -> UpdateAttack:
    """Puts every coordinate just outside the honest values, against the true direction.

    With the sign s of the mean of all rows (``omniscient``) or of the attackers' own
    (``colluding``), every attacker draws every coordinate uniformly from::

        omniscient, max and min over the honest rows
            s = -1:  [max, b max], or [max, max / b] where max <= 0
            s = 1:   [min / b, min], or [b min, min] where min <= 0
        colluding, mu and sigma (ddof 0) of the attackers' own rows
            s = -1:  [mu + 3 sigma, mu + 4 sigma]
            s = 1:   [mu - 4 sigma, mu - 3 sigma]
        s = 0:       0

    Threat model: untargeted, against the trimmed mean and the median, which it drives
    to the end of the honest range. The rows are those that take part and are finite,
    as trained; where none is known, the attackers send what they trained.

    Cost: O(n d).

    Args:
        b: greater than 1, how far the interval reaches, 2 by default; ``omniscient``
            only.
        knowledge: ``omniscient`` or ``colluding``.
        space: ``update``, or ``weights`` for intervals of the models ``w + u`` as in
            the paper, where b acts on the size of the weights; ``omniscient`` only.

    Returns:
        An ``UpdateAttack``, of strength ``b`` if ``omniscient``; needs ``byzantine``,
        ``key`` and ``client_ids``, and ``params`` in weight space.

    Raises:
        ValueError: ``b`` not above 1, unknown ``knowledge`` or ``space``, ``b`` or
            ``space`` given with ``colluding``, or, while tracing, a context field
            missing.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from fedjax_sim.types import RoundContext
        >>> context = RoundContext(key=jax.random.key(0), client_ids=jnp.arange(3),
        ...                        byzantine=jnp.array([True, False, False]))
        >>> attack, U = fang_trimmed_mean(), jnp.array([[3.0], [2.0], [4.0]])
        >>> sent = attack.apply(U, attack.init(U[0], 3), context)[0]
        >>> 1.0 <= sent[0].item() <= 2.0
        True

    References:
        M. Fang, X. Cao, J. Jia and N. Z. Gong, "Local model poisoning attacks to
        Byzantine-robust federated learning", USENIX Security 2020.

    Differs from the paper:
        Intervals are of updates by default, as in later code on gradients. The
        direction is the sign of the mean before the attack, and 0 where that is 0,
        which the paper leaves open.
    """
    lookup("knowledge of fang_trimmed_mean", knowledge, KNOWLEDGE)
    lookup("space of fang_trimmed_mean", space, SPACES)
    colluding, in_weights = knowledge == "colluding", space == "weights"
    if colluding and (b is not None or in_weights):
        raise ValueError(
            "fang_trimmed_mean with knowledge='colluding' draws 3 to 4 standard "
            f"deviations from the mean, in any space; got b={b}, space={space!r}. Drop "
            "them, or use knowledge='omniscient'."
        )
    b = check_number("fang_trimmed_mean's b", WIDTH if b is None else b, low=1)
    needs = NEEDS | ({"params"} if in_weights else set())

    def apply(
        updates: PyTree, state: PyTree, context: RoundContext
    ) -> tuple[PyTree, PyTree]:
        byzantine = require("fang_trimmed_mean", context, "byzantine")
        key = require("fang_trimmed_mean", context, "key")
        client_ids = require("fang_trimmed_mean", context, "client_ids")
        present = taking_part(updates, context)
        known = known_rows(present, byzantine, knowledge)
        replaced = byzantine & jnp.any(known)

        def against(u: Array) -> Array:
            r = uniform_rows(key, client_ids, u.shape[1])
            sign = jnp.sign(mean_over(known if colluding else present, u))
            if colluding:
                return beyond_spread(u, known, sign, r)
            return beyond_extremes(u, known, sign, r, state)

        if not in_weights:
            return replace_rows(against, replaced, updates), state
        w = ravel(require("fang_trimmed_mean", context, "params"))[None]

        def against_model(u: Array) -> Array:
            r = uniform_rows(key, client_ids, u.shape[1])
            sign = jnp.sign(mean_over(present, u))
            model = beyond_extremes(w + u, known, sign, r, state)
            return jnp.where(sign == 0, 0.0, model - w)

        return replace_rows(against_model, replaced, updates), state

    init = stateless if colluding else remembered(b)
    strength = "" if colluding else "b"
    return UpdateAttack(
        init, apply, unconditional, knowledge, needs, "fang_trimmed_mean", strength
    )
