"""Attack and rule of one system on all updates of a round at once."""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from fedjax_sim.cohorts import Defended
from fedjax_sim.hosts import Spread
from fedjax_sim.outcome import Outcome, make_context
from fedjax_sim.pytrees import finite_rows, ravel_clients, unraveler
from fedjax_sim.state import AGGREGATE, RoundState, stream
from fedjax_sim.training import Trained
from fedjax_sim.types import (
    Aggregator,
    AggregatorInfo,
    Array,
    Clients,
    PyTree,
    RoundContext,
)

if TYPE_CHECKING:
    from fedjax_sim.simulation import Simulation


def apply_rule(
    rule: Aggregator, updates: PyTree, state: PyTree, context: RoundContext
) -> tuple[PyTree, PyTree, AggregatorInfo, Array]:
    """Applies a rule with non-finite rows, and those not in the mask, taken out first.

    Returns the aggregate, the rule's state, its info, and ``finite bool [k]``.
    """
    U, unravel = ravel_clients(updates)
    finite = finite_rows(U)
    present = finite if context.mask is None else finite & context.mask
    clean = jax.vmap(unravel)(jnp.where(present[:, None], U, 0.0))
    context = context._replace(mask=present, byzantine=None, aggregate=None)
    aggregate, state, info = rule.apply(clean, state, context)
    info = info._replace(
        flagged=info.flagged | ~present, weights=jnp.where(present, info.weights, 0.0)
    )
    return aggregate, state, info, finite


def aggregate_round(
    sim: "Simulation",
    state: RoundState,
    clients: Clients | Spread,
    trained: Trained,
    defended: Defended | None,
    root_update: Array | None,
    root: Clients | None,
) -> Outcome:
    """Attack and aggregation of one system, on all updates at once."""
    ids, rows, client_states, info, samples = trained
    sizes = clients.samples_of(ids) if defended is None else samples["samples"]
    context = make_context(sim, state, ids, sizes, root_update, root)
    # Attacks and rules ravel what is unraveled here, and XLA drops both. It cannot once
    # it has joined these cuts with the cut of this system's rows: hence the barrier.
    updates = jax.vmap(unraveler(state.params))(jax.lax.optimization_barrier(rows))
    attack_state = state.attack
    if sim.attack is not None:

        def try_out(updates: PyTree) -> PyTree:
            return apply_rule(sim.aggregator, updates, state.aggregator, context)[0]

        updates, attack_state = sim.attack.apply(
            updates, attack_state, context._replace(aggregate=try_out)
        )
    context = context._replace(key=stream(state, AGGREGATE))
    aggregate, rule_state, verdict, finite = apply_rule(
        sim.aggregator, updates, state.aggregator, context
    )
    return Outcome(
        ids,
        info.loss,
        client_states,
        samples,
        attack_state,
        aggregate,
        rule_state,
        verdict,
        finite,
    )
