"""Min-Max and Min-Sum: as far from the mean as the honest updates are themselves."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_sim.attacks.rows import (
    KNOWLEDGE,
    known_rows,
    mean_over,
    replace_rows,
    stateless,
    std_over,
    unconditional,
    unit_rows,
)
from fedjax_sim.distances import pairwise_sq_distances
from fedjax_sim.pytrees import participants, safe_norms
from fedjax_sim.registry import lookup, require
from fedjax_sim.types import Array, PyTree, RoundContext, UpdateAttack

NEEDS = frozenset({"byzantine"})
PERTURBATIONS = {"unit": "-mu / |mu|", "sign": "-sign(mu)", "std": "-sigma"}
RULES = {"max": "the paper's", "min": "the authors' code's"}


class Geometry(NamedTuple):
    """The known rows as seen from their mean, in units of ``scale``.

    Attributes:
        mean: ``[d]``, in the updates' own units.
        direction: ``[d]``, the perturbation at length 1; 0 if it has none.
        scale: ``[]``, the largest absolute deviation of a coordinate from its mean.
        deviations: ``[k, d]``, the known rows less their mean; 0 elsewhere.
        known: ``bool [k]``.
    """

    mean: Array
    direction: Array
    scale: Array
    deviations: Array
    known: Array


def geometry(U: Array, known: Array, perturbation: str) -> Geometry:
    """What both attacks need of the rows ``U [k, d]``.

    Only the direction of the perturbation counts, because its multiple is searched for;
    so the divisor of the standard deviation (``ddof``) does not.
    """
    mean = mean_over(known, U)
    if perturbation == "std":
        direction = -std_over(known, U, mean)[0]
    else:
        direction = -(jnp.sign(mean) if perturbation == "sign" else mean)[0]
    deviations = jnp.where(known[:, None], U - mean, 0.0)
    largest = jnp.max(jnp.abs(deviations))
    scale = jnp.where(largest > 0.0, largest, 1.0)
    return Geometry(mean[0], unit_rows(direction), scale, deviations / scale, known)


def min_max_step(g: Geometry) -> Array:
    """The largest step along ``direction`` within the greatest known distance."""
    radius = jnp.sqrt(jnp.max(_known_pairs(g)))
    safe = jnp.where(radius > 0.0, radius, 1.0)
    # A row e of the deviations is |t p - e| away after the step t: with |p| = 1 the
    # largest t of |t p - e| <= R is p.e + sqrt((p.e)^2 + R^2 - |e|^2), and |e| <= R.
    along = _dot(g.deviations, g.direction) / safe
    room = jnp.maximum(1.0 - jnp.square(safe_norms(g.deviations) / safe), 0.0)
    furthest = along + jnp.sqrt(jnp.square(along) + room)
    return radius * jnp.maximum(_least(furthest, g.known), 0.0)


def min_sum_step(g: Geometry, rule: str) -> Array:
    """The step within the sum of squared distances of a known row to all others."""
    lengths = safe_norms(g.deviations)
    return _least(lengths, g.known) if rule == "min" else jnp.max(lengths)


def min_max(perturbation: str = "unit", knowledge: str = "omniscient") -> UpdateAttack:
    """As far from the mean as possible, yet no stranger than the strangest pair.

    ``u' = mu + gamma p`` with the mean ``mu`` of the known rows and the largest gamma
    of ``max_i |u' - u_i| <= max_ij |u_i - u_j| =: R``. In closed form, with
    ``e_i = mu - u_i``, ``gamma = min_i [-p.e_i + sqrt((p.e_i)^2 - |p|^2 (|e_i|^2 -
    R^2))] / |p|^2``.

    Threat model: untargeted, no knowledge of the server's rule. ``omniscient``
    attackers know the honest updates, ``colluding`` ones only their own honestly
    trained ones. Known rows are those that take part and are finite; where there is
    none, the attackers send what they trained. All attackers send the same.

    Cost: O(n^2 d).

    Args:
        perturbation: p, ``unit`` (``-mu / |mu|``), ``sign`` (``-sign(mu)``) or ``std``
            (``-sigma`` of the known rows).
        knowledge: ``omniscient`` or ``colluding``.

    Returns:
        An ``UpdateAttack``; needs ``byzantine``.

    Raises:
        ValueError: unknown ``perturbation`` or ``knowledge``, or, while tracing, a
            context field missing.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedjax_sim.types import RoundContext
        >>> U = jnp.array([[9.0, 9.0], [1.0, 0.0], [3.0, 0.0], [2.0, 3.0]])
        >>> context = RoundContext(byzantine=jnp.arange(4) < 1)
        >>> attack = min_max("sign")
        >>> sent = attack.apply(U, attack.init(U[0], 4), context)[0]
        >>> [round(x, 3) for x in sent[0].tolist()]
        [1.0, 0.0]

    References:
        V. Shejwalkar and A. Houmansadr, "Manipulating the Byzantine: optimizing model
        poisoning attacks and defenses for federated learning", NDSS 2021.

    Differs from the paper:
        gamma is exact; the published search stays below 20 even where gamma may be
        larger. Where p is 0 (``unit`` or ``sign`` at a zero mean) or all known rows are
        alike, the attackers send the mean.
    """

    def step(g: Geometry) -> Array:
        return min_max_step(g)

    return _stealthy("min_max", step, perturbation, knowledge)


def min_sum(
    perturbation: str = "unit", knowledge: str = "omniscient", rule: str = "max"
) -> UpdateAttack:
    """As far from the mean as possible within a sum of squared distances.

    ``u' = mu + gamma p`` with the largest gamma of
    ``sum_i |u' - u_i|^2 <= max_i sum_j |u_i - u_j|^2``. Because
    ``sum_i |x - u_i|^2 = n |x - mu|^2 + const``, that is
    ``gamma = max_i |u_i - mu| / |p|``.

    Threat model: as ``min_max``.

    Cost: O(n d).

    Args:
        perturbation: p, ``unit`` (``-mu / |mu|``), ``sign`` (``-sign(mu)``) or ``std``
            (``-sigma`` of the known rows).
        knowledge: ``omniscient`` or ``colluding``.
        rule: ``max``, the bound above; ``min`` bounds by the smallest sum instead, as
            the authors' code does.

    Returns:
        An ``UpdateAttack``; needs ``byzantine``.

    Raises:
        ValueError: unknown ``perturbation``, ``knowledge`` or ``rule``, or, while
            tracing, a context field missing.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedjax_sim.types import RoundContext
        >>> U = jnp.array([[9.0, 9.0], [1.0, 0.0], [3.0, 0.0], [2.0, 3.0]])
        >>> context = RoundContext(byzantine=jnp.arange(4) < 1)
        >>> attack = min_sum("std")
        >>> sent = attack.apply(U, attack.init(U[0], 4), context)[0]
        >>> [round(x, 3) for x in sent[0].tolist()]
        [1.0, -0.732]

    References:
        V. Shejwalkar and A. Houmansadr, "Manipulating the Byzantine: optimizing model
        poisoning attacks and defenses for federated learning", NDSS 2021.

    Differs from the paper:
        As ``min_max``.
    """
    lookup("rule of min_sum", rule, RULES)

    def step(g: Geometry) -> Array:
        return min_sum_step(g, rule)

    return _stealthy("min_sum", step, perturbation, knowledge)


def _dot(rows: Array, vector: Array) -> Array:
    return jnp.matmul(rows, vector, precision=jax.lax.Precision.HIGHEST)


def _least(values: Array, known: Array) -> Array:
    """The least value of a known row, 0 if none is known."""
    least = jnp.min(jnp.where(known, values, jnp.inf))
    return jnp.where(jnp.any(known), least, 0.0)


def _known_pairs(g: Geometry) -> Array:
    """Squared distances between known rows, 0 for the other pairs."""
    pairs = g.known[:, None] & g.known[None, :]
    return jnp.where(pairs, pairwise_sq_distances(g.deviations, g.known), 0.0)


def _stealthy(
    name: str, step: Callable[[Geometry], Array], perturbation: str, knowledge: str
) -> UpdateAttack:
    lookup(f"perturbation of {name}", perturbation, PERTURBATIONS)
    lookup(f"knowledge of {name}", knowledge, KNOWLEDGE)

    def apply(
        updates: PyTree, state: PyTree, context: RoundContext
    ) -> tuple[PyTree, PyTree]:
        byzantine = require(name, context, "byzantine")
        U, present, _ = participants(updates, context)
        known = known_rows(present, byzantine, knowledge)
        g = geometry(U, known, perturbation)
        crafted = g.mean + (step(g) * g.scale) * g.direction
        replaced = byzantine & jnp.any(known)
        return replace_rows(lambda u: crafted, replaced, updates), state

    return UpdateAttack(stateless, apply, unconditional, knowledge, NEEDS, name)
