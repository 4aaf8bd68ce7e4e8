"""Smallest maximum eigenvalue averaging."""

import jax
import jax.numpy as jnp

from fedjax_sim.aggregators.subsets import averaging_best_subset
from fedjax_sim.linalg import eigvalsh
from fedjax_sim.types import Aggregator, Array


def top_variance(distances: Array) -> Array:
    """``[c]``: the top eigenvalue of the covariance of the rows behind each block.

    From squared distances ``[c, s, s]`` alone: the covariance of s rows has the nonzero
    eigenvalues of their centred Gram matrix divided by s.

    Example:
        >>> import jax.numpy as jnp
        >>> top_variance(jnp.array([[[0.0, 16.0], [16.0, 0.0]]])).round(4).tolist()
        [4.0]
    """
    mean = distances.mean(axis=1, keepdims=True)
    centre = mean.mean(axis=2, keepdims=True)
    gram = (mean + jnp.swapaxes(mean, 1, 2) - distances - centre) / 2
    # The solver squares entries: near the end of float32 it would overflow.
    largest = jnp.abs(gram).max(axis=(1, 2))
    scale = jnp.where(largest > 0, largest, 1.0)
    top = jax.vmap(eigvalsh)(gram / scale[:, None, None])[:, -1]
    return jnp.maximum(top, 0.0) / distances.shape[1] * scale


def smea(max_byzantine: int) -> Aggregator:
    """The mean of the n - f updates that vary least in their worst direction.

    ``aggregate = mean of u_i over i in S`` with ``S = argmin over |S| = n - f`` of the
    largest eigenvalue of ``1/|S| sum_{i in S} (u_i - mean_S)(u_i - mean_S)^T``.

    Assumptions: ``n > 2f``. It solves an eigenvalue problem of size n - f for all
    ``C(n, f)`` subsets, so it is for small cohorts; more than a million subsets are
    refused. Its error does not grow with the dimension. Clients count alike whatever
    their data size.

    Cost: O(n^2 d + C(n, f) n^3).

    Args:
        max_byzantine: f, the number of Byzantine clients in a cohort that the rule is
            to stand.

    Returns:
        An ``Aggregator``. Clients outside the chosen subset are flagged; scores are
        squared distances to the aggregate.

    Raises:
        ValueError: an option out of range; from ``validate`` where ``n <= 2f`` or
            ``C(n, f) > 1,000,000``.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedjax_sim.types import RoundContext
        >>> rule = smea(max_byzantine=1)
        >>> U = jnp.array([[1.0, 0.0], [3.0, 2.0], [9.0, 9.0], [2.0, 1.0]])
        >>> rule.apply(U, rule.init(U[0], 4), RoundContext())[0].tolist()
        [2.0, 1.0]

    References:
        Allouah, Guerraoui, Gupta, Pinot, Stephan, "On the privacy-robustness-utility
        trilemma in distributed learning", ICML 2023.

    Differs from the paper: of several subsets of least eigenvalue, to within 1e-5 of
    it, the first in lexicographic order is taken. Eigenvalues are exact (ByzFL's code
    takes one power step from a random vector). Rows left out of the round are taken for
    Byzantine: only subsets of participants count, and where f or more are left out
    everybody else is averaged. Nobody left gives a zero aggregate.
    """
    return averaging_best_subset("smea", max_byzantine, top_variance)
