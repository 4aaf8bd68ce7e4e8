"""ALIE and inner-product manipulation at the strength that hurts this server most."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fedjax_sim.attacks.line_search import line_maximize
from fedjax_sim.attacks.rows import (
    known_rows,
    mean_over,
    replace_rows,
    sending,
    stateless,
    std_over,
    taking_part,
    unconditional,
)
from fedjax_sim.pytrees import ravel, ravel_clients, safe_norms
from fedjax_sim.registry import check_count, check_number, require
from fedjax_sim.types import Array, PyTree, RoundContext, UpdateAttack

NEEDS = frozenset({"byzantine", "aggregate"})


def optimal_alie(
    direction: int = 1,
    ddof: int = 0,
    evals: int = 16,
    delta: float = 1.0,
    ratio: float = 0.8,
) -> UpdateAttack:
    """ALIE with the shift that moves the server's aggregate the furthest.

    ``u' = mu + direction z sigma`` with mean ``mu`` and standard deviation ``sigma`` of
    the honest updates; each round ``z >= 0`` is the one that maximises
    ``|aggregate(attacked updates) - mu|``, found by ``line_maximize`` from 0.

    Threat model: untargeted. The attackers know every honest update, the server's rule,
    its settings and its memory, but not its random draws. Known rows are those that
    take part and are finite; where there is none, the attackers send what they trained.
    A round costs ``evals`` further runs of the rule. The search is best effort: where
    the harm has several peaks, as with rules that pick some rows, it may miss the best.

    Cost: as many times the rule as there are evaluations.

    Args:
        direction: 1 or -1, as in ``alie``.
        ddof: 0 or 1; ``sigma`` divides by the number of rows minus this.
        evals: strengths tried in a round.
        delta: the first step, in standard deviations.
        ratio: contraction of the step, between 0.5 and 1.

    Returns:
        An ``UpdateAttack``; needs ``byzantine`` and ``aggregate``.

    Raises:
        ValueError: an option out of range, or, while tracing, a context field missing.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedjax_sim.types import RoundContext
        >>> context = RoundContext(byzantine=jnp.array([True, False, False]),
        ...                        aggregate=lambda U: jnp.median(U, axis=0))
        >>> attack, U = optimal_alie(), jnp.array([[0.0], [1.0], [3.0]])
        >>> attack.apply(U, attack.init(U[0], 3), context)[0].tolist()
        [[3.0], [1.0], [3.0]]

    References:
        M. Baruch, G. Baruch and Y. Goldberg, "A little is enough: circumventing
        defenses for distributed learning", NeurIPS 2019.

        V. Shejwalkar and A. Houmansadr, "Manipulating the Byzantine: optimizing model
        poisoning attacks and defenses for federated learning", NDSS 2021 (the strength
        as an optimisation against the known rule).

    Differs from the paper:
        The search is that of ByzFL (``Optimal_ALittleIsEnough``) rather than the
        bisection of Shejwalkar and Houmansadr. Rows that take no part reach the rule as
        NaN, which it leaves out. A strength whose row leaves float32 counts as the
        worst.
    """
    if direction not in (1, -1):
        raise ValueError(
            f"optimal_alie needs direction 1 or -1; got direction={direction!r}."
        )
    if ddof not in (0, 1):
        raise ValueError(f"optimal_alie needs ddof 0 or 1; got ddof={ddof!r}.")

    def craft(u: Array, mean: Array, known: Array, z: Array) -> Array:
        return mean + direction * z * std_over(known, u, mean, ddof)

    return _optimal("optimal_alie", craft, evals, delta, ratio)


def optimal_ipm(
    evals: int = 16, delta: float = 1.0, ratio: float = 0.8
) -> UpdateAttack:
    """Inner-product manipulation at the multiple that moves the aggregate the furthest.

    ``u' = -x mu`` with the mean ``mu`` of the honest updates; each round ``x >= 0`` is
    the one that maximises ``|aggregate(attacked updates) - mu|``, found by
    ``line_maximize`` from 0.

    Threat model: as ``optimal_alie``.

    Cost: as many times the rule as there are evaluations.

    Args:
        evals: strengths tried in a round.
        delta: the first step.
        ratio: contraction of the step, between 0.5 and 1.

    Returns:
        An ``UpdateAttack``; needs ``byzantine`` and ``aggregate``.

    Raises:
        ValueError: an option out of range, or, while tracing, a context field missing.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedjax_sim.types import RoundContext
        >>> context = RoundContext(byzantine=jnp.array([True, False, False]),
        ...                        aggregate=lambda U: U.clip(-4, 4).mean(axis=0))
        >>> attack, U = optimal_ipm(), jnp.array([[0.0], [1.0], [3.0]])
        >>> attack.apply(U, attack.init(U[0], 3), context)[0].tolist()
        [[-6.0], [1.0], [3.0]]

    References:
        C. Xie, O. Koyejo and I. Gupta, "Fall of empires: breaking Byzantine-tolerant
        SGD by inner product manipulation", UAI 2019.

        V. Shejwalkar and A. Houmansadr, "Manipulating the Byzantine: optimizing model
        poisoning attacks and defenses for federated learning", NDSS 2021 (the strength
        as an optimisation against the known rule).

    Differs from the paper:
        The search is that of ByzFL (``Optimal_InnerProductManipulation``); otherwise as
        ``optimal_alie``. Of equal multiples the first one tried is sent, which is 0 if
        nothing makes a difference.
    """

    def craft(u: Array, mean: Array, known: Array, x: Array) -> Array:
        return -x * mean

    return _optimal("optimal_ipm", craft, evals, delta, ratio)


def _optimal(
    name: str, craft: Callable[..., Array], evals: int, delta: float, ratio: float
) -> UpdateAttack:
    """The attack of a ``craft(u, mean, known, strength)``, at its best strength."""
    evals = check_count(f"{name}'s evals", evals, 1)
    delta = check_number(f"{name}'s delta", delta, low=0)
    ratio = check_number(f"{name}'s ratio", ratio, low=0.5, high=1.0)

    def apply(
        updates: PyTree, state: PyTree, context: RoundContext
    ) -> tuple[PyTree, PyTree]:
        byzantine = require(name, context, "byzantine")
        aggregate = require(name, context, "aggregate")
        present = taking_part(updates, context)
        known = known_rows(present, byzantine, "omniscient")
        taking = sending(present, byzantine, context)
        replaced = byzantine & jnp.any(known)
        U, _ = ravel_clients(updates)
        mean = mean_over(known, U)

        def attacked(strength: Array) -> PyTree:
            return replace_rows(
                lambda u: craft(u, mean, known, strength), replaced, updates
            )

        def harm(strength: Array) -> Array:
            sent = attacked(strength)
            rows, unravel = ravel_clients(sent)
            received = jax.vmap(unravel)(jnp.where(taking[:, None], rows, jnp.nan))
            distance = safe_norms(ravel(aggregate(received)) - mean[0])
            usable = jnp.all(taking_part(sent, context) | ~(taking & byzantine))
            return jnp.where(usable & jnp.isfinite(distance), distance, -jnp.inf)

        best, _ = line_maximize(harm, evals, delta=delta, ratio=ratio)
        return attacked(best), state

    return UpdateAttack(stateless, apply, unconditional, "omniscient", NEEDS, name)
