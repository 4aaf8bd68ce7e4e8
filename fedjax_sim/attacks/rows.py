"""What the update attacks share: who is known, moments of rows, replacing rows.

Rows are replaced in the raveled matrix, in float32; results go back to each leaf's own
shape and dtype.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sim.passes import Rows
from fedjax_sim.pytrees import finite_rows, ravel_clients, reduce_clients, safe_norms
from fedjax_sim.types import Array, Params, PyTree, RoundContext

KNOWLEDGE = {"colluding": "the attackers' own rows", "omniscient": "the honest rows"}


def stateless(params: Params, num_clients: int) -> tuple[()]:
    """The ``init`` of an attack that remembers nothing."""
    return ()


def remembered(strength: float) -> Callable[[Params, int], Array]:
    """The ``init`` of an attack whose state is its strength (see ``UpdateAttack``).

    Raises:
        ValueError: a strength that float32 does not hold.
    """
    with np.errstate(all="ignore"):
        held = np.float32(strength)
    if not np.isfinite(held) or (held == 0.0) != (strength == 0.0):
        raise ValueError(f"a strength must fit float32; got {strength!r}.")

    def init(params: Params, num_clients: int) -> Array:
        return jnp.float32(strength)

    return init


def unconditional(cohort_size: int, num_byzantine: int) -> None:
    """The ``validate`` of an attack that works with any number of attackers."""


def taking_part(updates: PyTree, context: RoundContext) -> Array:
    """``bool [k]``: the rows that ``pytrees.participants`` leaves to an aggregator."""
    finite = finite_rows(updates)
    return finite if context.mask is None else finite & context.mask


def known_rows(present: Array, byzantine: Array, knowledge: str) -> Array:
    """``bool [k]``: the rows an attacker takes statistics of (see ``KNOWLEDGE``)."""
    return present & (byzantine if knowledge == "colluding" else ~byzantine)


def sending(present: Array, byzantine: Array, context: RoundContext) -> Array:
    """``bool [k]``: rows that take part once the attackers have replaced their own.

    What an attacker crafts is finite and counts, also where its training was not.
    """
    asked = byzantine if context.mask is None else byzantine & context.mask
    return present | asked


def mean_over(rows: Array, x: Array) -> Array:
    """Mean of the chosen rows, ``[1, ...]``; 0 where no row is chosen."""
    total = reduce_clients(
        jax.lax.add, 0.0, lambda chosen, row: jnp.where(chosen, row, 0.0), rows, x
    )
    return total[None] / jnp.maximum(jnp.sum(rows), 1)


def std_over(rows: Array, x: Array, mean: Array, ddof: int = 0) -> Array:
    """Standard deviation of the chosen rows, ``[1, ...]``; 0 up to ``ddof`` rows.

    Deviations are divided by the largest of their coordinate before they are squared,
    because a square leaves the range of float32 from 2e19 up and from 1e-19 down.
    """

    def size(chosen: Array, row: Array) -> Array:
        return jnp.where(chosen, jnp.abs(row - mean[0]), 0.0)

    largest = reduce_clients(jax.lax.max, 0.0, size, rows, x)
    scale = jnp.where(largest > 0.0, largest, 1.0)
    total = reduce_clients(
        jax.lax.add, 0.0, lambda *of: jnp.square(size(*of) / scale), rows, x
    )
    std = scale * jnp.sqrt(total / jnp.maximum(jnp.sum(rows) - ddof, 1))
    return std[None]


def look_at(rows: Rows) -> None:
    """A pass that only says who takes part, as ``Rows.present``."""
    rows.scan(lambda updates, present: ((), ()))


def mean_in_passes(rows: Rows, known: Array) -> Array:
    """``mean_over`` the known rows that take part, ``[d]``, in one pass."""

    def part(updates: Array, present: Array, known: Array) -> tuple[Any, tuple]:
        used = present & known
        return (jnp.where(used[:, None], updates, 0.0).sum(axis=0), used.sum()), ()

    (total, count), _ = rows.scan(part, known)
    return total / jnp.maximum(count, 1)


def std_in_passes(rows: Rows, known: Array, mean: Array, ddof: int = 0) -> Array:
    """``std_over`` the known rows that take part, ``[d]``, in one pass.

    Unlike there, deviations outside of 1e-19 to 1e19 leave the range of float32.
    """

    def part(updates: Array, present: Array, known: Array) -> tuple[Any, tuple]:
        used = present & known
        deviations = jnp.where(used[:, None], updates - mean[None], 0.0)
        return (jnp.square(deviations).sum(axis=0), used.sum()), ()

    (total, count), _ = rows.scan(part, known)
    return jnp.sqrt(total / jnp.maximum(count - ddof, 1))


def sending_all(crafted: Array, rows: Array) -> Callable[[Array, Array], Array]:
    """The change of ``Rows.then`` by which the chosen rows ``[k]`` send one ``[d]``."""

    def change(updates: Array, places: Array) -> Array:
        return jnp.where(rows[places][:, None], crafted[None], updates)

    return change


def replace_rows(
    craft: Callable[[Array], Array], rows: Array, updates: PyTree
) -> PyTree:
    """The updates with the chosen rows replaced, the rest bit-identical.

    Args:
        craft: from the raveled updates ``[k, d]`` to the new rows, ``[k, d]``, or
            ``[1, d]`` or ``[d]`` if all send the same.
        rows: ``bool [k]``, the rows to replace.
        updates: stacked pytree.

    Example:
        >>> import jax.numpy as jnp
        >>> rows = jnp.array([True, False])
        >>> replace_rows(lambda u: -u, rows, jnp.array([[1.0], [2.0]])).tolist()
        [[-1.0], [2.0]]
    """

    U, unravel = ravel_clients(updates)
    crafted = jnp.broadcast_to(craft(U), U.shape)
    return jax.vmap(unravel)(jnp.where(rows[:, None], crafted, U))


def unit_rows(x: Array) -> Array:
    """``x / |x|`` along the last axis at any scale, 0 where x is exactly 0."""
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    scaled = x / jnp.where(largest > 0.0, largest, 1.0)
    return scaled / jnp.maximum(safe_norms(scaled), 1.0)[..., None]
