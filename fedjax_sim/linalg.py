"""Decompositions of small matrices, one after the other where there are many.

On CPU, XLA's batched LAPACK calls wait in a worker thread for other worker threads.
Where several devices share the workers (see ``sharding``), each of them may wait for a
thread that waits itself, and the program stands still for good. A single matrix is
decomposed by the thread that asks. So ``jax.vmap`` of these maps over the matrices.
"""

import jax.numpy as jnp
from jax.custom_batching import sequential_vmap

from fedjax_sim.types import Array


@sequential_vmap
def eigh(matrix: Array) -> tuple[Array, Array]:
    """Eigenvalues, ascending, and eigenvectors as columns of a symmetric ``[n, n]``.

    Example:
        >>> values, vectors = eigh(jnp.diag(jnp.array([3.0, 1.0])))
        >>> values.tolist(), jnp.abs(vectors).tolist()
        ([1.0, 3.0], [[0.0, 1.0], [1.0, 0.0]])
    """
    values, vectors = jnp.linalg.eigh(matrix)
    return values, vectors


@sequential_vmap
def eigvalsh(matrix: Array) -> Array:
    """Eigenvalues, ascending, of a symmetric ``[n, n]``.

    Example:
        >>> eigvalsh(jnp.diag(jnp.array([3.0, 1.0]))).tolist()
        [1.0, 3.0]
    """
    return jnp.linalg.eigvalsh(matrix)


@sequential_vmap
def solve(matrix: Array, right: Array) -> Array:
    """``x`` of ``matrix x = right``, for ``[n, n]`` and ``[n]``.

    Example:
        >>> solve(jnp.diag(jnp.array([2.0, 4.0])), jnp.array([2.0, 2.0])).tolist()
        [1.0, 0.5]
    """
    return jnp.linalg.solve(matrix, right)
