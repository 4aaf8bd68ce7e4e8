"""FLTrust: trust bootstrapped from the server's own small dataset."""

import jax
import jax.numpy as jnp

from fedjax_sim import passes
from fedjax_sim.aggregators.common import (
    normalize,
    root_vector,
    stateless,
    weighted_sum,
)
from fedjax_sim.pytrees import participants
from fedjax_sim.registry import check_count
from fedjax_sim.types import Aggregator, AggregatorInfo, Array, PyTree, RoundContext

# Below this a norm, or a sum of trust, counts as zero.
TINY = 1e-12


def cosines(U: Array, norms: Array, root: Array, root_norm: Array) -> Array:
    """``[n]``: cosine of every row to the root update, 0 where either is zero."""
    # One product of the vectors as they are: exactly 0 where they are orthogonal.
    dots = jnp.matmul(U, root, precision=jax.lax.Precision.HIGHEST)
    nonzero = (norms > TINY) & (root_norm > TINY)
    cosine = dots / jnp.where(nonzero, norms, 1.0) / jnp.where(nonzero, root_norm, 1.0)
    return jnp.where(nonzero, jnp.clip(cosine, -1.0, 1.0), 0.0)


def fltrust() -> Aggregator:
    """Weighs clients by their cosine to the server's own update, at its norm.

    ``TS_i = max(cos(u_i, g0), 0)`` and
    ``aggregate = sum_i TS_i |g0| u_i / |u_i| / sum_i TS_i``.

    Assumptions: the server holds a small clean root dataset of the clients' task,
    disjoint from theirs and from the test set, and trains on it like a client to get
    ``g0``. No honest majority is needed. Data sizes are not used.

    Cost: O(n d).

    Returns:
        An ``Aggregator`` that needs ``root_update``. Clients of trust 0 are flagged;
        scores are ``1 - cosine``; details are ``cosine`` and ``trust``.

    Raises:
        ValueError: from ``apply``, where the context has no root update.

    Example:
        >>> import jax.numpy as jnp
        >>> rule = fltrust()
        >>> U = jnp.array([[3.0, 0.0], [0.0, 5.0], [-4.0, 0.0]])
        >>> context = RoundContext(root_update=jnp.array([2.0, 0.0]))
        >>> rule.apply(U, rule.init(U[0], 3), context)[0].tolist()
        [2.0, 0.0]

    References:
        Cao, Fang, Liu, Gong, "FLTrust: Byzantine-robust federated learning via trust
        bootstrapping", NDSS 2021.

    Differs from the paper: where nobody is trusted, or the root update is zero or not
    finite, the aggregate is zero (some public code falls back to the plain mean there,
    attackers included). Norms up to 1e-12 count as zero.
    """

    def validate(cohort_size: int) -> None:
        check_count("fltrust's cohort_size", cohort_size, 1)

    def apply(
        updates: PyTree, state: PyTree, context: RoundContext
    ) -> tuple[PyTree, PyTree, AggregatorInfo]:
        U, mask, unravel = participants(updates, context)
        validate(len(U))
        root, root_norm = root_vector("fltrust", context)
        norms = jnp.linalg.norm(U, axis=1)
        cosine = cosines(U, norms, root, root_norm)
        weights = normalize(jnp.maximum(cosine, 0.0), TINY)
        scale = weights * root_norm / jnp.where(norms > TINY, norms, 1.0)
        info = _info(weights, cosine, mask)
        return unravel(weighted_sum(scale, U)), state, info

    def in_passes(
        rows: passes.Rows, state: PyTree, context: RoundContext
    ) -> tuple[Array, PyTree, AggregatorInfo]:
        root, root_norm = root_vector("fltrust", context)

        def weigh(updates: Array) -> tuple[Array, Array, Array]:
            norms = jnp.linalg.norm(updates, axis=1)
            cosine = cosines(updates, norms, root, root_norm)
            trust = jnp.maximum(cosine, 0.0)
            return (
                trust * root_norm / jnp.where(norms > TINY, norms, 1.0),
                trust,
                cosine,
            )

        mean, weights, cosine = passes.weighted_mean(rows, weigh, floor=TINY)
        return mean, state, _info(weights, cosine, rows.present)

    needs = frozenset({"root_update"})
    return Aggregator(stateless, apply, validate, needs, "fltrust", in_passes=in_passes)


def _info(weights: Array, cosine: Array, mask: Array) -> AggregatorInfo:
    trust = jnp.maximum(cosine, 0.0)
    return AggregatorInfo(
        weights=weights,
        flagged=trust == 0,
        scores=jnp.where(mask, 1.0 - cosine, jnp.inf),
        details={"cosine": cosine, "trust": trust},
    )
