"""FoolsGold: clients whose contributions are too alike learn less."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_sim.aggregators.common import normalize, weighted_sum
from fedjax_sim.pytrees import participants, ravel, safe_norms, unit
from fedjax_sim.registry import check_count, check_number, lookup, require
from fedjax_sim.types import Aggregator, AggregatorInfo, Array, PyTree, RoundContext

_COMBINE = {
    "normalized": "divided by the sum of the learning rates",
    "sum": "not divided",
    "mean": "divided by the number of participants",
}


class FoolsGoldState(NamedTuple):
    """``history``: sum of each client's updates so far, ``float32 [N, d]``."""

    history: Array


def foolsgold(
    kappa: float = 1.0, epsilon: float = 1e-5, combine: str = "normalized"
) -> Aggregator:
    """Lowers the learning rate of clients that pursue one goal together.

    With ``H_i`` the sum of all updates of client i, this round's included, and
    ``S_ij = cos(H_i, H_j)``, ``S_ii = 0``::

        v_i  = max_j S_ij + epsilon
        S_ij = S_ij v_i / v_j  where v_i < v_j                      (pardoning)
        a_i  = clip(1 - max_j S_ij, 0, 1),  divided by max_j a_j,  at most 0.99
        a_i  = clip(kappa (ln(a_i / (1 - a_i) + epsilon) + 1/2), 0, 1)
        aggregate = sum_i a_i u_i / sum_i a_i

    Assumptions: sybils, two or more, send updates more alike than honest clients with
    different data do; their number does not matter. A single attacker passes, as do
    sybils that take care to differ, and an update's length is not looked at: clip first
    where that matters. Honest clients with like data are punished.

    Cost: O(n^2 d).

    Args:
        kappa: confidence, the slope of the logit.
        epsilon: keeps the quotient of the pardoning and the logarithm finite.
        combine: ``"normalized"``; ``"sum"`` (the paper, whose clients send single
            gradient steps) does not divide: with updates of local training the server
            would go as many times too far as there are clients; ``"mean"`` divides by
            the number of participants.

    Returns:
        An ``Aggregator`` that needs ``client_ids``. Clients of rate 0 are flagged;
        weights are the rates divided by their sum; scores are the largest similarity
        after pardoning; details are ``learning_rate``, the final ``a_i``. Its state is
        a ``FoolsGoldState``: N vectors as long as the model.

    Raises:
        ValueError: an option out of range, or, from ``apply``, no ``client_ids``.

    Example:
        >>> rule = foolsgold()
        >>> U = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [-1.0, 2.0]])
        >>> context = RoundContext(client_ids=jnp.arange(4))
        >>> rule.apply(U, rule.init(U[0], 4), context)[2].flagged.tolist()
        [True, True, False, False]

    References:
        Fung, Yoon, Beschastnikh, "The limitations of federated learning in sybil
        settings", RAID 2020.

    Differs from the paper: the weighted mean instead of the sum (see ``combine``);
    ``epsilon``, which the authors' code has in the logarithm only; histories are of all
    parameters, as in that code. Cosines from ``1 - 1e-6`` count as 1, since float32
    tells them apart no better: where all are alike, the aggregate is zero. A client
    whose history, with this round's update, is zero has cosine 0 to everybody; a lone
    participant has weight 1.
    Clients left out of a round are compared to nobody and their history stays.
    """
    kappa = check_number("foolsgold's kappa", kappa, low=0)
    epsilon = check_number("foolsgold's epsilon", epsilon, low=0)
    lookup("foolsgold combine", combine, _COMBINE)

    def init(params: PyTree, num_clients: int) -> FoolsGoldState:
        return FoolsGoldState(jnp.zeros((num_clients, ravel(params).size)))

    def validate(cohort_size: int) -> None:
        check_count("foolsgold's cohort_size", cohort_size, 1)

    def apply(
        updates: PyTree, state: FoolsGoldState, context: RoundContext
    ) -> tuple[PyTree, FoolsGoldState, AggregatorInfo]:
        U, mask, unravel = participants(updates, context)
        validate(len(U))
        ids = require("foolsgold", context, "client_ids")
        history = state.history.at[ids].add(U)  # rows left out are zero
        rates, similarity = learning_rates(history[ids], mask, kappa, epsilon)
        weights = normalize(rates)
        given = weights
        if combine == "sum":
            given = rates
        elif combine == "mean":
            given = rates / jnp.maximum(mask.sum(), 1)
        info = AggregatorInfo(
            weights,
            flagged=rates == 0.0,
            scores=jnp.where(mask, similarity, jnp.inf),
            details={"learning_rate": rates},
        )
        return unravel(weighted_sum(given, U)), FoolsGoldState(history), info

    needs = frozenset({"client_ids"})
    return Aggregator(init, apply, validate, needs, "foolsgold")


def learning_rates(
    history: Array, mask: Array, kappa: float, epsilon: float
) -> tuple[Array, Array]:
    """The rates ``a_i`` and the largest similarities after pardoning, each ``[n]``."""
    rows = jnp.where(mask[:, None], history, 0.0)
    # A history may be longer than any one update: its square need not be finite.
    rows = unit(rows, safe_norms(rows))
    S = jnp.matmul(rows, rows.T, precision=jax.lax.Precision.HIGHEST)
    S = jnp.where(S >= 1.0 - 1e-6, 1.0, S)
    S = jnp.where(jnp.eye(len(S), dtype=bool), 0.0, S)
    v = S.max(axis=1) + epsilon
    S = jnp.where(v[:, None] < v[None, :], S * (v[:, None] / v[None, :]), S)
    similarity = S.max(axis=1)
    rates = jnp.where(mask, jnp.clip(1.0 - similarity, 0.0, 1.0), 0.0)
    largest = rates.max()
    rates = jnp.minimum(rates / jnp.where(largest > 0.0, largest, 1.0), 0.99)
    logit = jnp.log(rates / (1.0 - rates) + epsilon)
    rates = jnp.where(mask, jnp.clip(kappa * (logit + 0.5), 0.0, 1.0), 0.0)
    return jnp.where(mask.sum() == 1, mask.astype(rates.dtype), rates), similarity
