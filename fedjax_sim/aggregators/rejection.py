"""ERR and LFR: who harms the aggregate on the server's validation samples, goes."""

import jax
import jax.numpy as jnp

from fedjax_sim.aggregators.common import (
    assumed_counts,
    client_shares,
    stateless,
    weighted_sum,
)
from fedjax_sim.aggregators.reaggregation import (
    aggregate_kept,
    base_distances,
    base_ranks,
    check_base,
    krum_weights,
    reaggregate,
    validate_base,
)
from fedjax_sim.distances import lowest
from fedjax_sim.order import means_without_each
from fedjax_sim.pytrees import participants
from fedjax_sim.registry import require
from fedjax_sim.types import (
    Aggregator,
    AggregatorInfo,
    Array,
    Params,
    PyTree,
    RoundContext,
)

# Models a GPU evaluates side by side.
_AT_ONCE = 64
NEEDS = frozenset({"params", "root_scores"})


def err(max_byzantine: int, base: str = "fedavg") -> Aggregator:
    """Error-rate-based rejection: removes who raises the validation error most.

    With A the model aggregated from all clients, B_i from all but i, and E the error
    rate on the server's root dataset, the f clients of largest impact
    ``E(A) - E(B_i)`` are removed and the others aggregated.

    Assumptions: a clean root dataset of the clients' task; f attackers exactly: f
    clients are removed in every round, with an attack or without, and the base then
    stands none: an attacker that was not among them has its way. An error rate has as
    many steps as there are samples: ties go to the lowest client index. So they do
    where attackers send the same to Krum: whichever is left out, another is chosen.

    Cost: n + 1 evaluations on the root dataset, n aggregations, which for the
    coordinate-wise rules are one sort in all, for Krum one set of distances.

    Args:
        max_byzantine: f, the number of Byzantine clients in a cohort, all of which are
            removed; also what the base is to stand.
        base: the rule: ``"fedavg"``, ``"krum"``, ``"trimmed_mean"`` (f values cut at
            each end) or ``"median"``.

    Returns:
        An ``Aggregator`` that needs ``params`` and ``root_scores``. Removed clients are
        flagged; scores ``[n]`` are the impact on the error rate; details are
        ``error_impact`` and ``loss_impact``, ``[n]`` each.

    Raises:
        ValueError: an option out of range; from ``validate`` where the base cannot work
            on one client fewer: ``n - 1 < 2f + 3`` for Krum, ``2f >= n - 1`` for the
            trimmed mean; or where ``f >= n``; from ``apply``, a context field missing.

    Example:
        >>> rule = err(max_byzantine=1)
        >>> def scores(w):  # of a model that should be 1
        ...     return jnp.square(w - 1).sum(), jnp.abs(w - 1).max()
        >>> U = jnp.array([[1.0], [0.9], [1.1], [-5.0]])
        >>> context = RoundContext(params=jnp.zeros(1), root_scores=scores)
        >>> rule.apply(U, rule.init(U[0], 4), context)[2].flagged.tolist()
        [False, False, False, True]

    References:
        M. Fang, X. Cao, J. Jia and N. Z. Gong, "Local model poisoning attacks to
        Byzantine-robust federated learning", USENIX Security 2020.

    Differs from the paper: it does not say how the base goes on after the removal; here
    with ``f' = max(0, f - removed)`` (see ``pdrr`` for what it is where it is not
    defined). B_i has the base's usual f. Rows left out of the round are taken for
    Byzantine: f becomes ``max(0, f - rows left out)``, and as many fewer are removed.
    """
    return _rejection("err", max_byzantine, base, ("error_impact",))


def lfr(max_byzantine: int, base: str = "fedavg") -> Aggregator:
    """Loss-function-based rejection: removes who raises the validation loss most.

    As ``err``, with the loss L instead of the error rate: the f clients of largest
    ``L(A) - L(B_i)`` are removed. Scores are the impact on the loss. A loss that is not
    finite counts as the largest number there is.

    Cost: n + 1 evaluations on the root dataset, n aggregations; see ``err``.

    Args:
        max_byzantine: as of ``err``.
        base: as of ``err``.

    Returns:
        As ``err``.

    Raises:
        ValueError: as ``err``.

    Example:
        >>> rule = lfr(max_byzantine=1)
        >>> def scores(w):  # of a model that should be 1
        ...     return jnp.square(w - 1).sum(), jnp.abs(w - 1).max()
        >>> U = jnp.array([[1.0], [0.9], [1.1], [-5.0]])
        >>> context = RoundContext(params=jnp.zeros(1), root_scores=scores)
        >>> rule.apply(U, rule.init(U[0], 4), context)[2].flagged.tolist()
        [False, False, False, True]

    References:
        M. Fang, X. Cao, J. Jia and N. Z. Gong, "Local model poisoning attacks to
        Byzantine-robust federated learning", USENIX Security 2020.

    Differs from the paper: as ``err``.
    """
    return _rejection("lfr", max_byzantine, base, ("loss_impact",))


def err_lfr(max_byzantine: int, base: str = "fedavg") -> Aggregator:
    """The union of ``err`` and ``lfr``: removes whom either of them removes.

    From f to 2f clients go. Scores are the impact on the loss; ``error_impact`` stands
    in the details.

    Cost: n + 1 evaluations on the root dataset, n aggregations; see ``err``.

    Args:
        max_byzantine: as of ``err``.
        base: as of ``err``.

    Returns:
        As ``err``.

    Raises:
        ValueError: as ``err``.

    Example:
        >>> rule = err_lfr(max_byzantine=1)
        >>> def scores(w):  # the loss asks for 4, the error rate for -1
        ...     return jnp.square(w - 4).sum(), jnp.abs(w + 1).max()
        >>> U = jnp.array([[1.0], [1.2], [9.0], [-5.0]])
        >>> context = RoundContext(params=jnp.zeros(1), root_scores=scores)
        >>> rule.apply(U, rule.init(U[0], 4), context)[2].flagged.tolist()
        [False, False, True, True]

    References:
        M. Fang, X. Cao, J. Jia and N. Z. Gong, "Local model poisoning attacks to
        Byzantine-robust federated learning", USENIX Security 2020.

    Differs from the paper: as ``err``.
    """
    return _rejection("err_lfr", max_byzantine, base, ("error_impact", "loss_impact"))


def _rejection(
    name: str, max_byzantine: int, base: str, criteria: tuple[str, ...]
) -> Aggregator:
    max_byzantine = check_base(name, base, max_byzantine)

    def validate(cohort_size: int) -> None:
        fewest = {"krum": 2 * max_byzantine + 4, "trimmed_mean": 2 * max_byzantine + 2}
        least = fewest.get(base, max_byzantine + 1)
        if cohort_size < least:
            raise ValueError(
                f"{name} leaves out every client in turn: with base={base!r} and "
                f"max_byzantine={max_byzantine} it needs a cohort of at least {least}; "
                f"got cohort_size={cohort_size}. Lower max_byzantine, or use a larger "
                "cohort."
            )
        validate_base(name, base, cohort_size, max_byzantine)

    def apply(
        updates: PyTree, state: PyTree, context: RoundContext
    ) -> tuple[PyTree, PyTree, AggregatorInfo]:
        U, mask, unravel = participants(updates, context, zero=False)
        validate(len(U))
        params = require(name, context, "params")
        root_scores = require(name, context, "root_scores")
        _, f = assumed_counts(mask, max_byzantine)
        distances = base_distances(base, U, mask)

        def scores(update: Array) -> tuple[Array, Array]:
            loss, error = root_scores(moved(params, unravel(update)))
            return bounded(loss), error

        everybody, _ = reaggregate(base, U, mask, f, distances, context)
        without = aggregates_without_each(base, U, mask, f, distances, context)
        loss, error = scores(everybody)
        # A core of a CPU has enough to do with the samples of one model.
        at_once = None if jax.default_backend() == "cpu" else _AT_ONCE
        losses, errors = jax.lax.map(scores, without, batch_size=at_once)
        impacts = {
            "error_impact": jnp.where(mask, error - errors, 0.0),
            "loss_impact": jnp.where(mask, loss - losses, 0.0),
        }
        # By what is left without a client: where A is very bad, the impacts are all
        # one float.
        left = {"error_impact": errors, "loss_impact": losses}
        removed = jnp.zeros(len(U), bool)
        for criterion in criteria:
            removed |= lowest(jnp.where(mask, left[criterion], jnp.inf), f)

        keep = mask & ~removed
        aggregate, weights = aggregate_kept(
            base, U, keep, max_byzantine, distances, context
        )
        info = AggregatorInfo(
            weights,
            flagged=~keep,
            scores=jnp.where(mask, impacts[criteria[-1]], jnp.inf),
            details=impacts,
        )
        return unravel(aggregate), state, info

    return Aggregator(stateless, apply, validate, NEEDS, name)


def moved(params: Params, update: Params) -> Params:
    """The model after an update."""
    return jax.tree.map(lambda w, u: (w + u).astype(w.dtype), params, update)


def bounded(loss: Array) -> Array:
    """A loss that differences can be taken of."""
    largest = jnp.finfo(loss.dtype).max / 4
    return jnp.clip(jnp.where(jnp.isnan(loss), largest, loss), -largest, largest)


def aggregates_without_each(
    base: str,
    U: Array,
    mask: Array,
    f: Array | int,
    distances: Array | None,
    context: RoundContext,
) -> Array:
    """``[n, d]``: what the base makes of all participants but one, for each of them."""
    n = len(U)
    if base in ("median", "trimmed_mean"):
        ranks = base_ranks(base, mask.sum() - 1, f)
        return jnp.where(mask[:, None], means_without_each(U, mask, *ranks), 0.0)
    others = mask[None, :] & ~jnp.eye(n, dtype=bool)
    if base == "krum":
        assert distances is not None
        weights = jax.vmap(lambda rows: krum_weights(distances, rows, f))(others)
    else:
        weights = jax.vmap(lambda rows: client_shares(rows, context, True))(others)
    return weighted_sum(weights, U, mask)
