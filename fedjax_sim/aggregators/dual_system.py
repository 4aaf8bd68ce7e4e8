"""The Dual-System: FLTrust's trust scores behind a Multi-Krum filter."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from fedjax_sim import passes
from fedjax_sim.aggregators.common import (
    assumed_counts,
    normalize,
    root_vector,
    weighted_sum,
)
from fedjax_sim.aggregators.fltrust import TINY, cosines
from fedjax_sim.aggregators.krum import validate_krum
from fedjax_sim.distances import krum_scores, lowest, pairwise_sq_distances
from fedjax_sim.order import median
from fedjax_sim.pytrees import participants, unit
from fedjax_sim.registry import check_count, check_number, lookup
from fedjax_sim.types import (
    Aggregator,
    AggregatorInfo,
    Array,
    Params,
    PyTree,
    RoundContext,
)

# The options of each variant, beyond those that all have, with their defaults.
_VARIANTS: dict[str, dict[str, Any]] = {
    "filter_then_trust": {"krum_space": "normalized"},
    "trust_then_filter": {"krum_space": "normalized", "tau": 0.0},
    "soft": {"krum_space": "normalized", "gamma": 1.0},
    "intersection": {"krum_space": "normalized", "tau": 0.0},
    "dynamic_trust": {
        "krum_space": "normalized",
        "base": "filter_then_trust",
        "rho": 0.9,
        "k": 1.5,
        "tau_min": 0.0,
        "tau_max": 0.5,
    },
    "gated_mean": {},
}
_SPACES = {"normalized": True, "raw": False}
_BASES = {"filter_then_trust": False, "trust_then_filter": True}
_FALLBACKS = {"zero": False, "root": True}
# Scales a median absolute deviation to a Gaussian's standard deviation.
_MAD_TO_STD = 1.4826


class DualSystemState(NamedTuple):
    """What ``dynamic_trust`` remembers: ``threshold``, the last round's gate."""

    threshold: Array


def dual_system(
    max_byzantine: int,
    variant: str = "filter_then_trust",
    *,
    num_selected: int | None = None,
    fallback: str = "zero",
    krum_space: str | None = None,
    tau: float | None = None,
    gamma: float | None = None,
    base: str | None = None,
    rho: float | None = None,
    k: float | None = None,
    tau_min: float | None = None,
    tau_max: float | None = None,
) -> Aggregator:
    """Trust weights of FLTrust on the clients that a Multi-Krum filter keeps.

    With ``c_i = cos(u_i, g0)``, ``TS_i = max(c_i, 0)``, ``v_i = |g0| u_i / |u_i|`` and
    the m clients of lowest Krum score among the ``v_i`` kept:
    ``aggregate = sum_kept TS_i v_i / sum_kept TS_i``.

    Variants:
        filter_then_trust: as above. The filter needs an honest majority and so sees
            everybody; trust weighs what it keeps.
        trust_then_filter: first a gate ``c_i > tau``; who fails it counts as one of the
            f, and Multi-Krum filters the r others (all are kept where ``r < f + 3``).
        soft: no client is dropped; ``TS_i`` is multiplied by
            ``min(1, s_(m) / s_i) ** gamma``, with ``s_(m)`` the m-th lowest score.
        intersection: kept by Multi-Krum over everybody and ``c_i > tau``.
        dynamic_trust: ``base``, one of the first two, with the gate ``c_i > tau_t``.
            ``tau_t = rho tau_{t-1} + (1 - rho) (med(c) - k 1.4826 med|c - med(c)|)``,
            clipped to ``[tau_min, tau_max]``; ``tau_0 = 0``.
        gated_mean: Multi-Krum over everybody on the raw updates, and ``c_i > 0``. The
            aggregate is the plain mean of the raw updates that pass both: trust neither
            weighs nor rescales them.

    Assumptions: ``n >= 2f + 3``, which leaves at least one honest client among the
    ``n - f - 2`` kept; a clean root dataset, as for ``fltrust``. Strong against
    colluders that keep a positive cosine while f is small; at 40 % a tight colluding
    group can win the filter.

    Cost: O(n^2 d).

    Args:
        max_byzantine: f, the number of Byzantine clients in a cohort that the filter is
            to stand.
        variant: one of the six above.
        num_selected: m; by default ``n - f - 2`` of those that take part.
        fallback: the aggregate where nobody is left or trusted: ``"zero"`` or
            ``"root"``, the root update.
        krum_space: what the filter looks at, ``"normalized"`` (the ``v_i``, default) or
            ``"raw"`` (the ``u_i``). Not for ``gated_mean``, which is raw.
        tau: threshold in ``[0, 1)``, default 0. For ``trust_then_filter`` and
            ``intersection``.
        gamma: exponent > 0, default 1. For ``soft``.
        base: default ``"filter_then_trust"``. This and the following are for
            ``dynamic_trust``.
        rho: memory of the threshold in ``[0, 1]``, default 0.9.
        k: deviations below the median cosine, >= 0, default 1.5.
        tau_min: lowest threshold, in ``[0, 1)``, default 0.
        tau_max: highest threshold, in ``[tau_min, 1)``, default 0.5. A lower one
            protects clients whose data differ.

    Returns:
        An ``Aggregator`` that needs ``root_update``; stateless but for
        ``dynamic_trust`` (``DualSystemState``). Clients that are not kept are flagged
        (for ``soft``: those of weight 0); scores are Krum's, ``inf`` for who was not
        eligible. Details are ``cosine``, ``trust`` (``TS_i``, 0 where not kept),
        ``krum_score``, for ``soft`` ``kappa`` (the factor on trust) and for
        ``dynamic_trust`` ``threshold`` (the same for all).

    Raises:
        ValueError: an option out of range, or one that the variant does not have; from
            ``validate`` where ``n < 2f + 3`` or ``m > n``; from ``apply`` where the
            context has no root update.

    Example:
        >>> import jax.numpy as jnp
        >>> rule = dual_system(max_byzantine=1, num_selected=2)
        >>> U = jnp.array([[3.0, 0.0], [2.0, 0.0], [1.0, 1.0], [0.0, 5.0], [-4.0, 0.0]])
        >>> context = RoundContext(root_update=jnp.array([2.0, 0.0]))
        >>> rule.apply(U, rule.init(U[0], 5), context)[0].tolist()
        [2.0, 0.0]

    References:
        Cao, Fang, Liu, Gong, "FLTrust: Byzantine-robust federated learning via trust
        bootstrapping", NDSS 2021.

        Blanchard, El Mhamdi, Guerraoui, Stainer, "Machine learning with adversaries:
        Byzantine tolerant gradient descent", NeurIPS 2017.

        The source study (see the README) joins the two without a formula; the variants
        are this project's readings of it.

    Differs from both: rows of norm up to 1e-12 are nobody's neighbour and never kept,
    though they count in n. Rows left out of the round are taken for Byzantine, so f
    becomes ``max(0, f - rows left out)``; with fewer than ``2f + 3`` participants
    nobody is kept (``trust_then_filter`` then keeps whoever passed the gate).
    """
    given = {
        "krum_space": krum_space,
        "tau": tau,
        "gamma": gamma,
        "base": base,
        "rho": rho,
        "k": k,
        "tau_min": tau_min,
        "tau_max": tau_max,
    }
    options = _options(variant, given)
    max_byzantine = check_count("dual_system's max_byzantine", max_byzantine, 0)
    if num_selected is not None:
        num_selected = check_count("dual_system's num_selected", num_selected, 1)
    to_root = lookup("dual_system fallback", fallback, _FALLBACKS)
    gate_first = variant == "trust_then_filter" or (
        variant == "dynamic_trust" and _BASES[options["base"]]
    )
    normalized = variant != "gated_mean" and _SPACES[options["krum_space"]]

    def init(params: Params, num_clients: int) -> PyTree:
        dynamic = variant == "dynamic_trust"
        return DualSystemState(jnp.zeros(())) if dynamic else ()

    def validate(cohort_size: int) -> None:
        validate_krum("dual_system", cohort_size, max_byzantine, num_selected)

    def apply(
        updates: PyTree, state: PyTree, context: RoundContext
    ) -> tuple[PyTree, PyTree, AggregatorInfo]:
        U, mask, unravel = participants(updates, context)
        validate(len(U))
        root, root_norm = root_vector("dual_system", context)
        norms = jnp.linalg.norm(U, axis=1)
        cosine = cosines(U, norms, root, root_norm)
        rescaled = root_norm * unit(U, norms)

        def distances(pool: Array) -> Array:
            return pairwise_sq_distances(rescaled if normalized else U, pool)

        state, info = judge(cosine, norms, mask, distances, state)
        used = U if variant == "gated_mean" else rescaled
        aggregate = weighted_sum(info.weights, used)
        if to_root:
            aggregate = jnp.where(info.weights.any(), aggregate, root)
        return unravel(aggregate), state, info

    def in_passes(
        rows: passes.Rows, state: PyTree, context: RoundContext
    ) -> tuple[Array, PyTree, AggregatorInfo]:
        root, root_norm = root_vector("dual_system", context)

        def look(updates: Array, present: Array) -> tuple[tuple, tuple]:
            norms = jnp.linalg.norm(updates, axis=1)
            return (), (norms, cosines(updates, norms, root, root_norm))

        def factors(norms: Array) -> Array:
            """Of the rescaled rows to the updates."""
            return root_norm * jnp.where(
                norms > TINY, 1.0 / jnp.where(norms > TINY, norms, 1.0), 0.0
            )

        def distances(pool: Array) -> Array:
            return passes.sq_distances(rows, pool, factors if normalized else None)

        _, (norms, cosine) = rows.scan(look)
        state, info = judge(cosine, norms, rows.present, distances, state)
        weights = info.weights
        if variant != "gated_mean":
            weights = weights * factors(norms)
        aggregate = passes.weighted_sum(rows, weights)
        if to_root:
            aggregate = jnp.where(info.weights.any(), aggregate, root)
        return aggregate, state, info

    def judge(
        cosine: Array,
        norms: Array,
        mask: Array,
        distances_of: Callable[[Array], Array],
        state: PyTree,
    ) -> tuple[PyTree, AggregatorInfo]:
        trust = jnp.maximum(cosine, 0.0)
        eligible = mask & (norms > TINY)
        if variant == "dynamic_trust":
            threshold = _next_threshold(state.threshold, cosine, eligible, options)
            state = DualSystemState(threshold)
        else:
            threshold = options.get("tau", 0.0)
        gate = cosine > threshold

        # The filter: Multi-Krum over `pool`, with f counting down who is out of it.
        present = mask & gate if gate_first else mask
        pool = present & eligible
        num_rows, f = assumed_counts(present, max_byzantine)
        scores = krum_scores(distances_of(pool), pool, num_rows - f - 2)
        m = num_rows - f - 2 if num_selected is None else num_selected
        if gate_first:
            keep = jnp.where(num_rows < f + 3, pool, lowest(scores, m))
        else:
            feasible = num_rows >= 2 * f + 3
            keep = feasible & (pool if variant == "soft" else lowest(scores, m))
            if variant in ("intersection", "dynamic_trust", "gated_mean"):
                keep &= gate

        details = {"cosine": cosine, "krum_score": scores}
        details["trust"] = jnp.where(keep, trust, 0.0)
        if variant == "gated_mean":
            weights = normalize(keep.astype(jnp.float32))
        else:
            raw_weights = details["trust"]
            if variant == "soft":
                details["kappa"] = _kappa(scores, m, options["gamma"])
                raw_weights = raw_weights * details["kappa"]
                keep = raw_weights > 0
            weights = normalize(raw_weights, TINY)
        if variant == "dynamic_trust":
            details["threshold"] = jnp.full(len(mask), threshold)
        return state, AggregatorInfo(weights, ~keep, scores, details)

    needs = frozenset({"root_update"})
    return Aggregator(init, apply, validate, needs, "dual_system", in_passes=in_passes)


def _options(variant: str, given: dict[str, Any]) -> dict[str, Any]:
    """The variant's options, defaults filled in and checked; refuses any others."""
    options = dict(lookup("dual_system variant", variant, _VARIANTS))
    given = {name: value for name, value in given.items() if value is not None}
    foreign = [name for name in given if name not in options]
    if foreign:
        name = foreign[0]
        having = [v for v, known in _VARIANTS.items() if name in known]
        raise ValueError(
            f"dual_system variant {variant!r} has no option {name!r}; got "
            f"{name}={given[name]!r}. Leave it out, or use a variant that has it: "
            f"{', '.join(having)}."
        )
    options.update(given)
    for name, table in (("krum_space", _SPACES), ("base", _BASES)):
        if name in options:
            lookup(f"dual_system {name}", options[name], table)
    ranges = {
        "tau": (0.0, 1.0, "[)"),
        "gamma": (0.0, float("inf"), "()"),
        "rho": (0.0, 1.0, "[]"),
        "k": (0.0, float("inf"), "[)"),
        "tau_min": (0.0, 1.0, "[)"),
        "tau_max": (options.get("tau_min", 0.0), 1.0, "[)"),
    }
    for name, (low, high, closed) in ranges.items():
        if name in options:
            check_number(f"dual_system's {name}", options[name], low, high, closed)
    return options


def _next_threshold(
    last: Array, cosine: Array, eligible: Array, options: dict[str, Any]
) -> Array:
    """This round's gate; last round's where nobody is eligible."""
    middle = median(cosine[:, None], eligible)[0]
    spread = median(jnp.abs(cosine - middle)[:, None], eligible)[0]
    raw = middle - options["k"] * _MAD_TO_STD * spread
    mixed = options["rho"] * last + (1.0 - options["rho"]) * raw
    mixed = jnp.clip(mixed, options["tau_min"], options["tau_max"])
    return jnp.where(eligible.any(), mixed, last)


def _kappa(scores: Array, m: Array | int, gamma: float) -> Array:
    """``min(1, s_(m) / s_i) ** gamma``, 0 where the score is infinite."""
    mth = jnp.max(jnp.where(lowest(scores, m), scores, 0.0))
    # A score up to the m-th is positive or tied at 0, where the quotient has no value.
    ratio = jnp.where(scores > mth, mth / jnp.where(scores > mth, scores, 1.0), 1.0)
    return jnp.where(jnp.isfinite(scores), ratio**gamma, 0.0)
