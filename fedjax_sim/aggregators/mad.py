"""MAD: clients build up trust round by round, or are excluded for good."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_sim.aggregators.common import (
    WEIGHTING,
    client_shares,
    normalize,
    weighted_sum,
)
from fedjax_sim.clustering import two_means
from fedjax_sim.distances import distances_to, pairwise_sq_distances
from fedjax_sim.pytrees import participants, reduce_clients
from fedjax_sim.registry import check_count, check_number, lookup, require
from fedjax_sim.types import Aggregator, AggregatorInfo, Array, PyTree, RoundContext

# Whether the least distance is subtracted.
_SCALES = {"min_max": True, "max": False}
_VARIANTS = {"paper": False, "code": True}
# Whether clients that were excluded still shape the centre and the scale.
_MEASURED = {"kept": False, "all": True}


class MADState(NamedTuple):
    """What MAD remembers of N clients.

    Attributes:
        reputation: ``float32 [N]``, R; 0 of a client that has not taken part.
        trust: ``float32 [N]``; 0 likewise.
        removed: ``bool [N]``, who is out for good.
        round: ``int32 []``, the t of the next round, from 1.
    """

    reputation: Array
    trust: Array
    removed: Array
    round: Array


def mad(
    start: int = 5,
    alpha: float = 0.5,
    beta_reputation: float = 0.75,
    beta_trust: float = 0.85,
    threshold: float = 0.15,
    clusters: int = 1,
    scale: str = "min_max",
    variant: str = "paper",
    weighting: str = "uniform",
    measured: str = "kept",
) -> Aggregator:
    """The mean of the clients that have not lost the server's trust.

    With ``delta_i`` the distance of ``u_i`` to the mean of all updates (of the larger
    of two clusters, if ``clusters=2``) and ``d = 1 - (delta - min) / (max - min)``, in
    round t = 1, 2, ...::

        R = d                                              in round 1         (1)
        R = R_old + d + R_old / t                          where d >= alpha   (2)
        R = R_old + d - exp(-(1 - d) R_old / t)            where d < alpha
        R = clip(R, 0, 1)                                                     (3)
        R = beta_R R + (1 - beta_R) R_old                                     (4)
        T = sqrt(R^2 + d^2) - sqrt((1 - R)^2 + (1 - d)^2)                     (5)
        T = beta_T T + (1 - beta_T) T_old                                     (6)
        T = clip(T, 0, 1)                                                     (7)

    A client with ``T < tau`` in a round from ``start`` on is excluded, from that round
    and all later ones; the aggregate is the mean of the others.

    Assumptions: attackers are farther from the mean than every honest client, from the
    first rounds on. ``d`` is relative: the farthest client has ``d = 0`` in every
    round, without an attack too, and with the default options its trust is then below
    ``tau`` whatever it was before. So every round from ``start`` on excludes somebody,
    in the end honest clients, until two are left, who are equally far (with
    ``clusters=2`` one): report false alarms. ``measured="all"`` spares the honest while
    excluded attackers stay the farthest. A very far attacker hides nearer ones until it
    is out; and a client first seen after ``start`` is judged by that one round.

    Cost: O(n d); O(n^2 d) with ``clusters=2``.

    Args:
        start: the first round in which clients are excluded, from 1; trust is kept from
            round 1 on. The paper has 5, 10, 20, 40, 60, 80 and 500.
        alpha: closeness ``d`` from which reputation grows.
        beta_reputation: ``beta_R``, share of the new value in (4).
        beta_trust: ``beta_T``, share of the new value in (6).
        threshold: ``tau``. Trust is at most 1, so above 1 nobody is left.
        clusters: 1, or 2 for the mean of the larger cluster by ``clustering.two_means``
            (where both are of one size, that of the first participant).
        scale: ``"min_max"``, as above, or ``"max"`` for ``d = 1 - delta / max``, which
            is never higher: where all are about equally far, all lose their trust.
        variant: ``"code"`` for the update of reputation in the authors' code:
            ``- R_old / t`` and ``exp(-(1 - d R_old / t))`` in (2), and (4) before (3).
        weighting: ``"uniform"``, or ``"data"`` for a mean weighted by data size. The
            centre is never weighted.
        measured: whose updates give the centre and the least and largest distance:
            those of the clients ``"kept"`` so far, or of ``"all"`` that take part, with
            those excluded before, as in the authors' code.

    Returns:
        An ``Aggregator`` that needs ``client_ids``. Excluded clients are flagged;
        scores are ``1 - T``, ``inf`` for clients that were excluded in an earlier
        round; details are ``trust``, ``reputation`` and ``distance = 1 - d`` (0 of
        those not judged). Its state is a ``MADState``. Reputation and trust stand still
        while a client takes no part, and for good once it is excluded.

    Raises:
        ValueError: an option out of range; from ``validate`` where ``n < 2``; from
            ``apply``, no ``client_ids``.

    Example:
        >>> rule = mad(start=1)
        >>> U = jnp.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -8.0]])
        >>> context = RoundContext(client_ids=jnp.arange(4))
        >>> _, state, info = rule.apply(U, rule.init(U[0], 4), context)
        >>> info.flagged.tolist(), [f"{trust:.2f}" for trust in state.trust]
        ([False, False, False, True], ['1.00', '1.00', '0.33', '0.00'])

    References:
        Korobeinikov, Chuprov, Reznik, "Towards more robust federated learning with
        medical imaging model anomaly detection", RIT and UTRGV, 2024.

        Patel, Chuprov, Korobeinikov, Zatsarenko, Reznik, "Improving federated learning
        security with trust evaluation to detect adversarial attacks", ASIA 2024.

        Zatsarenko, Chuprov, Korobeinikov, Reznik, "Trust-based anomaly detection in
        federated edge learning", IEEE AIIoT 2024.

    Differs from the paper: it calls three constants beta, and gives no value for tau;
    0.15 is that of the authors' code. That code also has one beta for (4) and (6),
    excludes only the client of least trust in its first round of exclusion, and
    excludes from the next round on; here it is this round, as the paper says. Distances
    that differ by at most 1e-6 of the largest are equal, and then ``d = 1``. In (2) a
    client first seen after round 1 has ``R_old = 0``.
    """
    start = check_count("mad's start", start, 1)
    alpha = check_number("mad's alpha", alpha, 0, 1, "[]")
    beta_reputation = check_number("mad's beta_reputation", beta_reputation, 0, 1, "(]")
    beta_trust = check_number("mad's beta_trust", beta_trust, 0, 1, "(]")
    threshold = check_number("mad's threshold", threshold, low=0, closed="[)")
    clusters = check_count("mad's clusters", clusters, 1)
    if clusters > 2:
        raise ValueError(
            f"mad takes the mean of one cluster or of the larger of two; got clusters="
            f"{clusters}. Use 2."
        )
    by_range = lookup("mad scale", scale, _SCALES)
    as_code = lookup("mad variant", variant, _VARIANTS)
    by_data = lookup("mad weighting", weighting, WEIGHTING)
    by_all = lookup("mad measured", measured, _MEASURED)

    def init(params: PyTree, num_clients: int) -> MADState:
        return MADState(
            reputation=jnp.zeros(num_clients),
            trust=jnp.zeros(num_clients),
            removed=jnp.zeros(num_clients, bool),
            round=jnp.int32(1),
        )

    def validate(cohort_size: int) -> None:
        check_count("mad's cohort_size", cohort_size, 2)

    def apply(
        updates: PyTree, state: MADState, context: RoundContext
    ) -> tuple[PyTree, MADState, AggregatorInfo]:
        U, mask, unravel = participants(updates, context, zero=False)
        validate(len(U))
        ids = require("mad", context, "client_ids")
        judged = mask & ~state.removed[ids]
        yardstick = mask if by_all else judged
        distances = distances_to_centre(U, yardstick, clusters)
        d = closeness(distances, yardstick, by_range)

        known, trusted = state.reputation[ids], state.trust[ids]
        reputation = new_reputation(
            known, d, state.round, alpha, beta_reputation, as_code
        )
        trust = new_trust(trusted, reputation, d, beta_trust)
        reputation = jnp.where(judged, reputation, known)
        trust = jnp.where(judged, trust, trusted)
        out = judged & (trust < threshold) & (state.round >= start)

        keep = judged & ~out
        weights = client_shares(keep, context, by_data)
        aggregate = weighted_sum(weights, U, mask)
        state = MADState(
            state.reputation.at[ids].set(reputation),
            state.trust.at[ids].set(trust),
            state.removed.at[ids].set(state.removed[ids] | out),
            state.round + 1,
        )
        info = AggregatorInfo(
            weights,
            flagged=~keep,
            scores=jnp.where(judged, 1.0 - trust, jnp.inf),
            details={
                "trust": trust,
                "reputation": reputation,
                "distance": jnp.where(judged, 1.0 - d, 0.0),
            },
        )
        return unravel(aggregate), state, info

    return Aggregator(init, apply, validate, frozenset({"client_ids"}), "mad")


def distances_to_centre(U: Array, mask: Array, clusters: int) -> Array:
    """Distances ``[n]`` to the mean of the rows in ``mask``, or of their main cluster.

    Those of other rows may be anything.
    """
    members = mask
    if clusters == 2:
        members = two_means(pairwise_sq_distances(U, mask), mask)
    # Relative to one of the rows: a common offset costs no digits then.
    origin = U[jnp.argmax(mask)]

    def part(row: Array, member: Array, share: Array) -> Array:
        return jnp.where(member, share * (row - origin), 0.0)

    shares = normalize(members.astype(U.dtype))
    centre = reduce_clients(jax.lax.add, 0.0, part, U, members, shares)
    return distances_to(U - origin[None], centre)


def closeness(distances: Array, mask: Array, by_range: bool) -> Array:
    """``d [n]``: from 1 for the least distance, or for 0, down to 0 for the largest."""
    high = jnp.where(mask, distances, -jnp.inf).max()
    low = jnp.where(mask, distances, jnp.inf).min() if by_range else 0.0
    differ = high - low > 1e-6 * high
    scaled = (distances - low) / jnp.where(differ, high - low, 1.0)
    return jnp.where(mask & differ, 1.0 - jnp.clip(scaled, 0.0, 1.0), 1.0)


def new_reputation(
    old: Array, d: Array, t: Array, alpha: float, beta: float, as_code: bool
) -> Array:
    """Equations (1) to (4), or what the authors' code has for them; ``[n]``."""
    if as_code:
        near, decay = -old / t, jnp.exp(-(1.0 - d * old / t))
    else:
        near, decay = old / t, jnp.exp(-(1.0 - d) * old / t)
    new = old + d + jnp.where(d >= alpha, near, -decay)
    if not as_code:
        new = jnp.clip(new, 0.0, 1.0)
    new = jnp.clip(beta * new + (1.0 - beta) * old, 0.0, 1.0)
    return jnp.where(t == 1, d, new)


def new_trust(old: Array, R: Array, d: Array, beta: float) -> Array:
    """Equations (5) to (7), ``[n]``."""
    new = jnp.hypot(R, d) - jnp.hypot(1.0 - R, 1.0 - d)
    return jnp.clip(beta * new + (1.0 - beta) * old, 0.0, 1.0)
