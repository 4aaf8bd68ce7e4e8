"""The attack of Fang et al. on Krum."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_sim.attacks.rows import (
    KNOWLEDGE,
    known_rows,
    mean_over,
    replace_rows,
    sending,
    stateless,
)
from fedjax_sim.distances import krum_scores, pairwise_sq_distances
from fedjax_sim.pytrees import participants, safe_norms
from fedjax_sim.registry import check_count, check_number, lookup, require
from fedjax_sim.types import Array, PyTree, RoundContext, UpdateAttack

NEEDS = frozenset({"byzantine"})


class Found(NamedTuple):
    """What the search for the step found; the attackers send ``-step * sign``.

    Attributes:
        sign: ``[d]``, the direction Krum, or the attackers' mean, takes unattacked.
        first: ``[]``, the step tried first.
        step: ``[]``, the step sent.
        success: ``bool []``, whether Krum picks a crafted row at that step.
        halvings: ``int32 []``, halvings of the step, over all ``num_crafted`` tried.
        num_crafted: ``int32 []``, crafted rows in the Krum that picked one.
    """

    sign: Array
    first: Array
    step: Array
    success: Array
    halvings: Array
    num_crafted: Array


def first_step(
    distances: Array,
    lengths: Array,
    rows: Array,
    num_neighbours: Array | int,
    num_benign: Array | int,
    size: int,
    squared: bool = True,
) -> Array:
    """The largest step at which Krum could still pick a crafted row.

    ``sqrt(min_i S_i / (r d)) + max_i |u_i| / sqrt(d)``, where ``S_i`` is the sum of the
    squared distances of row i to its q nearest rows and r the benign neighbours that a
    crafted row needs; unsquared, ``min_i S_i / (r sqrt(d)) + max_i |u_i| / sqrt(d)``.

    Args:
        distances: ``[k, k]``, squared.
        lengths: ``[k]``, norms of the rows.
        rows: ``bool [k]``, the benign rows.
        num_neighbours: q, at least 1.
        num_benign: r, at least 1.
        size: d.
        squared: whether Krum sums squared distances.

    Returns:
        ``float32 []``, 0 if there is no benign row.

    Example:
        >>> U = jnp.array([[0.0], [1.0], [3.0]])
        >>> D = pairwise_sq_distances(U)
        >>> first_step(D, U[:, 0], jnp.ones(3, bool), 1, 1, size=1).item()
        4.0
    """
    scores = krum_scores(_summed(distances, squared), rows, num_neighbours)
    least = jnp.min(scores) / num_benign
    spread = jnp.sqrt(least / size) if squared else least / jnp.sqrt(float(size))
    furthest = jnp.max(jnp.where(rows, lengths, 0.0)) / jnp.sqrt(float(size))
    return jnp.where(jnp.any(rows), spread + furthest, 0.0)


def against_all(
    U: Array,
    present: Array,
    taking: Array,
    byzantine: Array,
    max_byzantine: int | None = None,
    threshold: float = 1e-5,
    initial: float | None = None,
    squared: bool = True,
) -> Found:
    """The search of attackers that know every row of ``U [k, d]``.

    Args:
        U: rows as trained.
        present: ``bool [k]``, those that are finite.
        taking: ``bool [k]``, those that take part once the crafted rows are sent.
        byzantine: ``bool [k]``.
        max_byzantine, threshold, initial, squared: as ``fang_krum`` has them.
    """

    def counts(rows: Array) -> tuple[Array, Array]:
        """Krum's f over these rows, and how many neighbours it sums."""
        num_rows = jnp.sum(rows)
        if max_byzantine is None:
            f = jnp.sum(rows & byzantine)
        else:  # what a rule of this package makes of rows that were left out
            f = jnp.maximum(max_byzantine - (len(U) - num_rows), 0)
        return f, jnp.maximum(num_rows - f - 2, 1)

    distances = pairwise_sq_distances(U, present)
    scores = krum_scores(_summed(distances, squared), present, counts(present)[1])
    sign = jnp.sign(U[jnp.argmin(scores)])
    lengths = safe_norms(U)
    f, num_neighbours = counts(taking)
    c = jnp.sum(taking & byzantine)
    if initial is None:
        benign = present & ~byzantine
        r = jnp.maximum(jnp.sum(taking) - f - c - 1, 1)
        first = first_step(
            distances, lengths, benign, num_neighbours, r, U.shape[1], squared
        )
    else:
        first = jnp.float32(initial)
    crafted_at = _distances_to_crafted(U, lengths, sign)
    both = byzantine[:, None] & byzantine[None, :]

    def wins(num_crafted: Array, step: Array) -> Array:
        new = crafted_at(step)
        D = jnp.where(byzantine[None, :], new[:, None], distances)
        D = jnp.where(byzantine[:, None], new[None, :], D)
        D = _summed(jnp.where(both, 0.0, D), squared)
        return byzantine[jnp.argmin(krum_scores(D, taking, num_neighbours))]

    return _halve(wins, sign, first, threshold, c, c)


def against_own(
    U: Array,
    own: Array,
    threshold: float = 1e-5,
    initial: float = 1.0,
    squared: bool = True,
) -> Found:
    """The search of attackers that know only their own rows of ``U``, as trained."""
    k = len(U)
    num_own = jnp.sum(own)
    sign = jnp.sign(mean_over(own, U))[0]
    distances = pairwise_sq_distances(U, own)
    crafted_at = _distances_to_crafted(U, safe_norms(U), sign)

    def wins(num_crafted: Array, step: Array) -> Array:
        """Krum over ``num_crafted`` crafted rows and, behind them, the own ones."""
        new = jnp.broadcast_to(crafted_at(step), (k, k))
        D = jnp.block([[jnp.zeros((k, k)), new], [new.T, distances]])
        rows = jnp.concatenate([jnp.arange(k) < num_crafted, own])
        scores = krum_scores(_summed(D, squared), rows, num_own - 2)
        return jnp.argmin(scores) < k

    first = jnp.float32(initial)
    return _halve(wins, sign, first, threshold, jnp.int32(1), num_own)


def fang_krum(
    knowledge: str = "omniscient",
    max_byzantine: int | None = None,
    threshold: float = 1e-5,
    initial: float | None = None,
    squared: bool = True,
) -> UpdateAttack:
    """The largest step against the true direction that Krum still picks.

    ``u' = -lambda s``; all attackers send the same.

    ``omniscient``: s is the sign of what Krum returns on the rows as trained, and
    lambda starts at an upper bound (see ``first_step``) and is halved until Krum over
    the crafted and the honest rows returns a crafted one, or until ``lambda <=
    threshold``: that last lambda is sent without success. With n clients that take
    part, c attackers among them and Krum's f, Krum sums ``n - f - 2`` neighbours.

    ``colluding``: s is the sign of the mean of the attackers' own c rows as trained.
    For 1, 2, ..., c crafted rows together with those own rows, lambda is halved from
    ``initial`` as above, under a Krum that expects as many attackers as there are
    crafted rows; the first success ends the search.

    Threat model: untargeted, against Krum. Known rows are those that take part and are
    finite; where there is none, the attackers send what they trained.

    Cost: O(n^2 d).

    Args:
        knowledge: ``omniscient`` or ``colluding``.
        max_byzantine: Krum's f as the attackers know it; None for the number of
            attackers that take part, counted anew each round. ``omniscient`` only.
        threshold: lambda at which the search gives up, positive.
        initial: lambda tried first; by default the bound if ``omniscient``, 1 if
            ``colluding``.
        squared: whether Krum sums squared distances.

    Returns:
        An ``UpdateAttack``; needs ``byzantine``. ``validate`` refuses ``omniscient``
        attackers where ``n < 2 f + 3`` or ``n < f + c + 2``, and fewer than 3
        ``colluding`` ones.

    Raises:
        ValueError: an option out of range or unknown, ``max_byzantine`` given with
            ``colluding``, or, while tracing, a context field missing.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedjax_sim.types import RoundContext
        >>> U = jnp.array([[1.0], [0.2], [-0.4], [0.8], [0.1], [0.3], [0.0]])
        >>> context = RoundContext(byzantine=jnp.arange(7) < 2)
        >>> attack = fang_krum()
        >>> sent = attack.apply(U, attack.init(U[0], 7), context)[0]
        >>> [round(x, 2) for x in sent[:3, 0].tolist()]
        [-0.29, -0.29, -0.4]

    References:
        M. Fang, X. Cao, J. Jia and N. Z. Gong, "Local model poisoning attacks to
        Byzantine-robust federated learning", USENIX Security 2020.

    Differs from the paper:
        The bound is that of Krum as it is defined, on squared distances;
        ``squared=False`` is Theorem 1 of the paper, for distances themselves. The
        attackers' rows are identical, not within a small distance of each other; the
        1e-7 that Lu et al. (see ``pdrr``) have, over all coordinates together, is less
        than float32 resolves next to a weight, so that theirs are duplicates too. In a
        sampled cohort where ``n - f - 2`` or ``n - f - c - 1`` is below 1, it is taken
        as 1; fewer than 3 ``colluding`` attackers send what they trained. The authors'
        code tries fewer than c crafted rows.
    """
    lookup("knowledge of fang_krum", knowledge, KNOWLEDGE)
    colluding = knowledge == "colluding"
    if max_byzantine is not None:
        max_byzantine = check_count("fang_krum's max_byzantine", max_byzantine, 0)
        if colluding:
            raise ValueError(
                "fang_krum with knowledge='colluding' tries Krum with every number of "
                f"crafted rows; got max_byzantine={max_byzantine}. Drop it, or use "
                "knowledge='omniscient'."
            )
    threshold = check_number("fang_krum's threshold", threshold, low=0)
    if initial is not None:
        initial = check_number("fang_krum's initial", initial, low=0)

    def validate(cohort_size: int, num_byzantine: int) -> None:
        if num_byzantine == 0:
            return
        if colluding:
            if num_byzantine < 3:
                raise ValueError(
                    "fang_krum with knowledge='colluding' needs num_byzantine >= 3, "
                    "because Krum among the attackers sums num_byzantine - 2 "
                    f"neighbours; got num_byzantine={num_byzantine}. Add attackers, or "
                    "use knowledge='omniscient'."
                )
            return
        f = num_byzantine if max_byzantine is None else max_byzantine
        fewest = max(2 * f + 3, f + num_byzantine + 2)
        if cohort_size < fewest:
            raise ValueError(
                "fang_krum needs cohort_size >= max(2 f + 3, f + num_byzantine + 2), "
                f"as Krum does; got cohort_size={cohort_size}, num_byzantine="
                f"{num_byzantine}, f={f}. Use a cohort of at least {fewest}, or fewer "
                "attackers."
            )

    def apply(
        updates: PyTree, state: PyTree, context: RoundContext
    ) -> tuple[PyTree, PyTree]:
        byzantine = require("fang_krum", context, "byzantine")
        U, present, _ = participants(updates, context)
        known = known_rows(present, byzantine, knowledge)
        if colluding:
            start = 1.0 if initial is None else initial
            found = against_own(U, known, threshold, start, squared)
            possible = jnp.sum(known) >= 3
        else:
            taking = sending(present, byzantine, context)
            found = against_all(
                U,
                present,
                taking,
                byzantine,
                max_byzantine,
                threshold,
                initial,
                squared,
            )
            possible = jnp.any(known)
        crafted = -found.step * found.sign
        return replace_rows(lambda u: crafted, byzantine & possible, updates), state

    return UpdateAttack(stateless, apply, validate, knowledge, NEEDS, "fang_krum")


def _summed(distances: Array, squared: bool) -> Array:
    return distances if squared else jnp.sqrt(distances)


def _distances_to_crafted(
    U: Array, lengths: Array, sign: Array
) -> Callable[[Array], Array]:
    """From a step to the squared distances ``[k]`` of the rows to ``-step * sign``."""
    dots = jnp.matmul(U, sign, precision=jax.lax.Precision.HIGHEST)
    size = jnp.sum(jnp.square(sign))
    cap = jnp.finfo(jnp.float32).max / (4 * len(U))

    def at(step: Array) -> Array:
        # |u + step s|^2, in an order in which no intermediate is inf - inf.
        new = jnp.square(lengths) + step * (2.0 * dots + step * size)
        return jnp.clip(jnp.where(jnp.isnan(new), cap, new), 0.0, cap)

    return at


def _halve(
    wins: Callable[[Array, Array], Array],
    sign: Array,
    first: Array,
    threshold: float,
    fewest: Array,
    most: Array,
) -> Found:
    """Halves the step until ``wins(num_crafted, step)``, for each number of rows."""

    def going_on(found: Found) -> Array:
        return ~found.success & (found.step > threshold)

    def one_trial(found: Found) -> Found:
        success = wins(found.num_crafted, found.step)
        step = jnp.where(success, found.step, found.step / 2)
        another = (step <= threshold) & (found.num_crafted < most)
        return found._replace(
            step=jnp.where(another, first, step),
            success=success,
            halvings=found.halvings + ~success,
            num_crafted=found.num_crafted + another,
        )

    start = Found(sign, first, first, jnp.array(False), jnp.int32(0), fewest)
    return jax.lax.while_loop(going_on, one_trial, start)
