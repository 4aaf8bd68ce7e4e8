"""Stacked pytrees as matrices: raveling, norms, and who takes part."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from fedjax_sim.types import Array, PyTree, RoundContext


def ravel_clients(stacked: PyTree) -> tuple[Array, Callable[[Array], PyTree]]:
    """A stacked pytree as a float32 matrix ``[k, d]`` and the way back for one row.

    Returns:
        The matrix, and ``unravel: [d] -> pytree`` of one client's structure and dtypes.
        ``jax.vmap(unravel)`` turns a whole matrix back.

    Example:
        >>> import jax.numpy as jnp
        >>> matrix, unravel = ravel_clients({"b": jnp.ones(3), "w": jnp.zeros((3, 2))})
        >>> matrix.shape, sorted(unravel(matrix[0]))
        ((3, 3), ['b', 'w'])

    Raises:
        TypeError: no leaf, or one that is not floating-point or lacks the client axis.
        ValueError: no client.
    """
    leaves = jax.tree.leaves(stacked)
    for leaf in leaves or [None]:
        kind = getattr(leaf, "dtype", type(leaf))
        if not leaves or not jnp.issubdtype(kind, jnp.floating) or not leaf.ndim:
            raise TypeError(
                "updates must be floating-point arrays with a leading client axis; got "
                f"{kind}{getattr(leaf, 'shape', '')}. Use astype(float32)."
            )
    rows = leaves[0].shape[0]
    if rows == 0:
        raise ValueError("updates need at least one client (row); got none.")
    dtypes = jax.tree.map(lambda x: x.dtype, stacked)
    template = jax.tree.map(lambda x: jnp.zeros(x.shape[1:], jnp.float32), stacked)
    _, unravel_float32 = ravel_pytree(template)
    matrix = jnp.concatenate(
        [leaf.reshape(rows, -1).astype(jnp.float32) for leaf in leaves], axis=1
    )

    def unravel(row: Array) -> PyTree:
        # ravel_pytree casts back only where the dtypes of the leaves differ.
        return jax.tree.map(lambda x, t: x.astype(t), unravel_float32(row), dtypes)

    return matrix, unravel


def ravel(tree: PyTree) -> Array:
    """A pytree as one float32 vector ``[d]``, in the order of ``ravel_clients``."""
    return jnp.concatenate(
        [jnp.asarray(x).reshape(-1).astype(jnp.float32) for x in jax.tree.leaves(tree)]
    )


def unraveler(tree: PyTree) -> Callable[[Array], PyTree]:
    """From a vector ``[d]`` to the structure, shapes and dtypes of ``tree``.

    Example:
        >>> import jax.numpy as jnp
        >>> unraveler({"w": jnp.zeros((1, 2))})(jnp.array([3.0, 4.0]))["w"].tolist()
        [[3.0, 4.0]]
    """
    return ravel_clients(jax.tree.map(lambda x: jnp.asarray(x)[None], tree))[1]


def finite_rows(updates: PyTree) -> Array:
    """``bool [k]``: rows whose values and squared norm are all finite in float32."""
    matrix, _ = ravel_clients(updates)
    return jnp.isfinite(jnp.square(matrix).sum(axis=1))


def participants(
    updates: PyTree, context: RoundContext, zero: bool = True
) -> tuple[Array, Array, Callable[[Array], PyTree]]:
    """The one entry of every rule: ``(U [k, d], mask [k], unravel)``.

    Rows that hold a non-finite value, or whose squared norm is not finite, are taken
    out of ``context.mask``; every row that takes no part is set to zero, so that no NaN
    can leak through ``0 * NaN``. Setting them to zero copies the whole matrix: with
    ``zero=False`` a rule leaves them as they came, and passes ``mask`` wherever U goes.

    Example:
        >>> import jax.numpy as jnp
        >>> U, mask, _ = participants(jnp.array([[1.0], [jnp.nan]]), RoundContext())
        >>> U.tolist(), mask.tolist()
        ([[1.0], [0.0]], [True, False])
    """
    matrix, unravel = ravel_clients(updates)
    mask = finite_rows(matrix)
    if context.mask is not None:
        mask &= context.mask
    if zero:
        matrix = jnp.where(mask[:, None], matrix, 0.0)
    return matrix, mask, unravel


def along(rows: Array, leaf: Array) -> Array:
    """``[k]`` reshaped to ``[k, 1, ...]`` so that it selects whole rows of a leaf."""
    return rows.reshape(rows.shape + (1,) * (leaf.ndim - 1))


def reduce_clients(
    combine: Callable[[Array, Array], Array],
    start: float,
    f: Callable[..., Array],
    *stacked: Array,
) -> Array:
    """Sum, minimum or maximum of ``f(row, ...)`` over the client axis.

    XLA reduces a leading axis column by column on CPU, at a fiftieth of the speed of
    this loop, which adds one whole row after the other to a vector in cache.

    Args:
        combine: ``jax.lax.add``, ``min`` or ``max``.
        start: its neutral element.
        f: from one row of every array to a row.
        *stacked: arrays ``[k, ...]``.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> U = jnp.array([[1.0, -5.0], [2.0, 3.0]])
        >>> reduce_clients(jax.lax.max, -jnp.inf, jnp.abs, U).tolist()
        [2.0, 5.0]
    """
    rows = len(stacked[0])
    of_one = jax.eval_shape(f, *(x[0] for x in stacked))
    if jax.default_backend() != "cpu" or rows > of_one.size:
        first = jnp.asarray(start, of_one.dtype)
        return jax.lax.reduce(jax.vmap(f)(*stacked), first, combine, (0,))

    def add(i: Array, found: Array) -> Array:
        return combine(found, f(*(x[i] for x in stacked)))

    return jax.lax.fori_loop(0, rows, add, jnp.full_like(of_one, start))


def safe_norms(x: Array) -> Array:
    """Euclidean norms along the last axis, of values whose squares leave float32 too.

    Example:
        >>> import jax.numpy as jnp
        >>> safe_norms(jnp.array([[3e30, 4e30], [0.0, 0.0]]))
        Array([5.e+30, 0.e+00], dtype=float32)
    """
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True, initial=0.0)
    scale = jnp.where(largest > 0.0, largest, 1.0)
    return scale[..., 0] * jnp.linalg.norm(x / scale, axis=-1)


def unit(x: Array, norm: Array) -> Array:
    """``x / norm`` along the last axis, 0 where ``norm <= 1e-12`` (algorithms G3)."""
    safe = jnp.where(norm > 1e-12, norm, 1.0)[..., None]
    return jnp.where(norm[..., None] > 1e-12, x / safe, 0.0)
