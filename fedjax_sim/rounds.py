"""One communication round of several systems at once, as a pure function.

The clients of all systems are trained together (``training``); attack, aggregation and
server step then follow system by system. Where nobody holds all updates, every system
plays its round by itself (``streaming``).
"""

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from fedjax_sim.cohorts import Defended, defend_cohorts
from fedjax_sim.evaluation import evaluate_clients, evaluate_systems
from fedjax_sim.outcome import Outcome, close_round, make_context
from fedjax_sim.pytrees import finite_rows, ravel_clients, unraveler
from fedjax_sim.sharding import share_out
from fedjax_sim.state import AGGREGATE, Arrays, History, RoundState, stream
from fedjax_sim.streaming import play_in_passes
from fedjax_sim.training import Trained, train_cohorts, train_roots
from fedjax_sim.types import (
    Aggregator,
    AggregatorInfo,
    Array,
    Clients,
    Params,
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
    clients: Clients,
    trained: Trained,
    defended: Defended | None,
    root_update: Array | None,
    root: Clients | None,
) -> Outcome:
    """Attack and aggregation of one system, on all updates at once."""
    ids, rows, client_states, info, samples = trained
    sizes = clients.mask[ids].sum(axis=1) if defended is None else samples["samples"]
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


def play_round(
    sims: Mapping[str, "Simulation"],
    states: Mapping[str, RoundState],
    arrays: Arrays,
    round: Array,
    evaluate_now: Array,
) -> tuple[dict[str, RoundState], dict[str, History]]:
    """One round of every system, evaluated where ``evaluate_now`` (``bool []``).

    ``round`` is that of the states, which hold one for every seed.
    """
    first = next(iter(sims.values()))
    defended = defend_cohorts(sims, states, arrays.clients, round)
    roots = train_roots(sims, states, arrays)
    updates: dict[str, Array] = {}
    if first.in_passes:
        finished = {
            n: play_in_passes(sim, states[n], arrays, defended.get(n), roots.get(n))
            for n, sim in sims.items()
        }
    else:
        trained = train_cohorts(sims, states, arrays, defended)
        updates = {name: own.updates for name, own in trained.items()}
        outcomes = share_out(
            {n: functools.partial(aggregate_round, sim) for n, sim in sims.items()},
            {
                n: (
                    states[n],
                    arrays.clients,
                    trained[n],
                    defended.get(n),
                    roots.get(n),
                    arrays.root if "root_scores" in sim.needs else None,
                )
                for n, sim in sims.items()
            },
            first.num_devices,
            # Rather than as much as all updates, they compute it again.
            most_sent=4 * first.cohort_size * first.num_params,
        )
        finished = {
            n: close_round(sim, states[n], defended.get(n), outcomes[n])
            for n, sim in sims.items()
        }
    new_states = {name: state for name, (state, _) in finished.items()}
    histories = {name: history for name, (_, history) in finished.items()}

    def measure(params: Mapping[str, Params]) -> dict[str, Any]:
        found: dict[str, Any] = {name: {} for name in sims}
        if arrays.test is not None:
            for n, (scores, success) in evaluate_systems(
                sims, params, arrays.test
            ).items():
                found[n] |= scores._asdict() | {"attack_success": success}
        if arrays.local_test is not None:
            for n, local in evaluate_clients(
                sims, states, params, updates, arrays.local_test
            ).items():
                found[n]["local"] = local
        return found

    def skip(params: Mapping[str, Params]) -> dict[str, Any]:
        return jax.tree.map(
            lambda x: jnp.full(x.shape, jnp.nan, x.dtype),
            jax.eval_shape(measure, params),
        )

    params = {name: state.params for name, state in new_states.items()}
    found = jax.lax.cond(evaluate_now, measure, skip, params)
    return new_states, {n: h._replace(**found[n]) for n, h in histories.items()}
