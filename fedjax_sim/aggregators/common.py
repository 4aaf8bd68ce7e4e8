"""What the rules share: the root update, counts, bounds, weighted sums, noise."""

import jax
import jax.numpy as jnp

from fedjax_sim.order import median
from fedjax_sim.pytrees import ravel
from fedjax_sim.registry import check_count, check_number, lookup, require
from fedjax_sim.types import Array, Params, RoundContext

# Whether clients count in proportion to their data.
WEIGHTING = {"data": True, "uniform": False}


def stateless(params: Params, num_clients: int) -> tuple[()]:
    """The ``init`` of a rule that remembers nothing."""
    del params, num_clients
    return ()


def root_vector(rule: str, context: RoundContext) -> tuple[Array, Array]:
    """The root update ``[d]`` and its norm; zero where the server's training diverged.

    Raises:
        ValueError: the context has no root update.
    """
    root = ravel(require(rule, context, "root_update"))
    norm = jnp.linalg.norm(root)
    finite = jnp.isfinite(norm)
    return jnp.where(finite, root, 0.0), jnp.where(finite, norm, 0.0)


def assumed_counts(mask: Array, max_byzantine: int) -> tuple[Array, Array]:
    """Rows that take part, and how many of them may still be Byzantine.

    Rows left out are taken for Byzantine: ``f' = max(0, f - rows left out)``.
    """
    num_rows = mask.sum()
    return num_rows, jnp.maximum(max_byzantine - (len(mask) - num_rows), 0)


def check_cohort(
    rule: str, cohort_size: int, max_byzantine: int, factor: int, more: int
) -> None:
    """ValueError unless ``n >= factor * f + more``."""
    check_count(f"{rule}'s cohort_size", cohort_size, 1)
    least = factor * max_byzantine + more
    if cohort_size >= least:
        return
    most = (cohort_size - more) // factor
    lower = f"Lower max_byzantine to {most} or use" if most >= 0 else "Use"
    times = f"{factor} * " if factor > 1 else ""
    raise ValueError(
        f"{rule} needs cohort_size >= {times}max_byzantine + {more}; got cohort_size="
        f"{cohort_size}, max_byzantine={max_byzantine}. {lower} a cohort of at least "
        f"{least}."
    )


def normalize(weights: Array, floor: float = 0.0) -> Array:
    """``weights / sum``, or all zero where the sum is not above ``floor``."""
    total = weights.sum()
    return jnp.where(total > floor, weights / jnp.where(total > floor, total, 1.0), 0.0)


def weighted_sum(weights: Array, U: Array, mask: Array | None = None) -> Array:
    """``sum_i weights_i u_i``, in full float32 on every device.

    All rows must be finite; or, with ``mask``, those in it, and the others weigh 0.
    """

    def product(U: Array) -> Array:
        return jnp.matmul(weights, U, precision=jax.lax.Precision.HIGHEST)

    def without_the_others(U: Array) -> Array:
        assert mask is not None
        return product(jnp.where(mask[:, None], U, 0.0))

    if mask is None:
        return product(U)
    # A copy of U takes far longer than the product itself.
    return jax.lax.cond(mask.all(), product, without_the_others, U)


def client_shares(mask: Array, context: RoundContext, by_data: bool) -> Array:
    """Each participant's share ``[k]`` of a mean: of the data, or all alike.

    Alike also where the context does not say who has how much data.
    """
    sizes = client_sizes(len(mask), context, by_data)
    return normalize(jnp.where(mask, sizes, 0.0))


def client_sizes(count: int, context: RoundContext, by_data: bool) -> Array:
    """What ``client_shares`` are the shares of, ``[k]``."""
    if by_data and context.num_samples is not None:
        return context.num_samples.astype(jnp.float32)
    return jnp.ones(count)


def check_length(what: str, value: float | str) -> float | None:
    """A positive number, or None for ``"median"``: the median length of the round."""
    if isinstance(value, str):
        return lookup(f"{what} (a positive number or a name)", value, {"median": None})
    return check_number(what, value, low=0)


def longest(bound: float | None, lengths: Array, mask: Array) -> Array:
    """What ``check_length`` returned, in a round with these lengths ``[k]``."""
    return median(lengths[:, None], mask)[0] if bound is None else jnp.float32(bound)


def clip_factors(lengths: Array, limit: Array) -> Array:
    """``min(1, limit / length)``, 1 where the length is 0."""
    longer = lengths > limit
    return jnp.where(longer, limit / jnp.where(longer, lengths, 1.0), 1.0)


def standard_normal(key: Array, size: int) -> Array:
    """The server's own noise ``[size]``, before it is scaled."""
    return jax.random.normal(key, (size,), jnp.float32)
