"""What the rules share: checks of options, counts under a mask, weighted sums."""

import math
import numbers

import jax
import jax.numpy as jnp

from fedjax_sim.pytrees import ravel
from fedjax_sim.types import Array, Params, PyTree, RoundContext


def stateless(params: Params, num_clients: int) -> tuple[()]:
    """The ``init`` of a rule that remembers nothing."""
    del params, num_clients
    return ()


def number(
    rule: str, option: str, value: float, low: float, high: float, closed: str
) -> float:
    """``value`` as a float between ``low`` and ``high``; ValueError otherwise.

    ``closed`` is the interval in brackets, such as ``"[)"``: a square bracket includes
    its end.
    """
    inside = (
        isinstance(value, numbers.Real)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and (low <= value if closed[0] == "[" else low < value)
        and (value <= high if closed[1] == "]" else value < high)
    )
    if not inside:
        raise ValueError(
            f"{rule} needs {option} to be a number in "
            f"{closed[0]}{low:g}, {high:g}{closed[1]}; got {value!r}."
        )
    return float(value)


def require(rule: str, field: str, value: PyTree, meaning: str) -> PyTree:
    """``value``, a field of the context that ``rule`` cannot do without."""
    if value is None:
        raise ValueError(
            f"{rule} needs context.{field}, {meaning}; got None. Simulation provides "
            f"it; in a bare call pass RoundContext({field}=...)."
        )
    return value


def root_vector(rule: str, context: RoundContext) -> tuple[Array, Array]:
    """The root update ``[d]`` and its norm; zero where the server's training diverged.

    Raises:
        ValueError: the context has no root update.
    """
    meaning = "the update of the server's own training on its root dataset"
    root = ravel(require(rule, "root_update", context.root_update, meaning))
    norm = jnp.linalg.norm(root)
    finite = jnp.isfinite(norm)
    return jnp.where(finite, root, 0.0), jnp.where(finite, norm, 0.0)


def assumed_counts(mask: Array, max_byzantine: int) -> tuple[Array, Array]:
    """Rows that take part, and how many of them may still be Byzantine.

    Rows left out are taken for Byzantine: ``f' = max(0, f - rows left out)``.
    """
    num_rows = mask.sum()
    return num_rows, jnp.maximum(max_byzantine - (len(mask) - num_rows), 0)


def normalize(weights: Array, floor: float = 0.0) -> Array:
    """``weights / sum``, or all zero where the sum is not above ``floor``."""
    total = weights.sum()
    return jnp.where(total > floor, weights / jnp.where(total > floor, total, 1.0), 0.0)


def weighted_sum(weights: Array, U: Array) -> Array:
    """``sum_i weights_i u_i`` of finite rows, in full float32 on every device."""
    return jnp.matmul(weights, U, precision=jax.lax.Precision.HIGHEST)
