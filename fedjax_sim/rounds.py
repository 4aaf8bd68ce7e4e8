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

from fedjax_sim.aggregation import aggregate_round
from fedjax_sim.cohorts import defend_cohorts
from fedjax_sim.evaluation import evaluate_clients, evaluate_systems
from fedjax_sim.outcome import close_round
from fedjax_sim.sharding import share_out
from fedjax_sim.state import Arrays, History, RoundState
from fedjax_sim.streaming import play_in_parts
from fedjax_sim.training import train_cohorts, train_roots
from fedjax_sim.types import Array, Params

if TYPE_CHECKING:
    from fedjax_sim.simulation import Simulation


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
    if first.in_passes or first.hosted:
        finished = {
            n: play_in_parts(sim, states[n], arrays, defended.get(n), roots.get(n))
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
