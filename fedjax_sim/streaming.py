"""A round of one system in which every device trains its own part of the cohort.

Its updates are then held by no one, and the rule sees them in passes (``passes``). Or,
where the clients' data are spread over several processes (``hosts``) and there is no
limit to what a device may hold, all devices are sent all of them.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from fedjax_sim.aggregation import aggregate_round
from fedjax_sim.cohorts import Defended, Row
from fedjax_sim.hosts import LAYOUT, Spread
from fedjax_sim.outcome import Outcome, close_round, make_context
from fedjax_sim.passes import Rows
from fedjax_sim.pytrees import ravel_clients, unraveler
from fedjax_sim.sharding import AXIS, on_every_device
from fedjax_sim.state import AGGREGATE, Arrays, History, RoundState, stream
from fedjax_sim.training import Trained, defended_rows, row_maker
from fedjax_sim.types import Array, Clients, PyTree, RoundContext, UpdateAttack

if TYPE_CHECKING:
    from fedjax_sim.simulation import Simulation

# Rows that pass by at a time at least: a product with one row is slow.
ROWS_AT_A_TIME = 16


def play_in_parts(
    sim: "Simulation",
    state: RoundState,
    arrays: Arrays,
    defended: Defended | None,
    root_update: Array | None,
) -> tuple[RoundState, History]:
    """A round of one system, on every device's part of the cohort."""
    decided = {} if defended is None else {"": defended}
    row = defended_rows({"": sim}, {"": state}, arrays, decided)[""]

    def part(state: RoundState, arrays: Arrays, row: Row, root_update: Any) -> Outcome:
        ids = row.client_id
        sizes = arrays.clients.samples_of(ids)
        if row.keep is not None:
            sizes = (arrays.clients.mask[ids] & row.keep).sum(axis=1)
        root = arrays.root if "root_scores" in sim.needs else None
        context = make_context(sim, state, ids, sizes, root_update, root)
        clients, row = on_this_device(sim, arrays.clients, row)
        memory = 4 * len(ids) * sim.num_params
        if sim.in_passes:
            assert sim.update_memory is not None
            memory = sim.update_memory
        rows = Rows(
            row_maker(sim, state, clients, row),
            len(ids),
            sim.num_params,
            chunk=max(sim.client_chunk, ROWS_AT_A_TIME),
            memory=memory,
            mask=context.mask,
            num_devices=sim.num_devices,
        )
        if not sim.in_passes:
            updates, others = rows.whole()
            trained = Trained(ids, updates, *others)
            return aggregate_round(
                sim, state, arrays.clients, trained, None, root_update, root
            )
        if sim.attack is not None:
            strike = sim.attack.in_passes or alone(sim.attack)
            rows = rows.then(strike(rows, state.attack, context))
        context = context._replace(key=stream(state, AGGREGATE), byzantine=None)
        assert sim.aggregator.in_passes is not None, "checked by Simulation"
        aggregate, rule_state, verdict = sim.aggregator.in_passes(
            rows, state.aggregator, context
        )
        verdict = verdict._replace(
            flagged=verdict.flagged | ~rows.present,
            weights=jnp.where(rows.present, verdict.weights, 0.0),
        )
        clients, info, samples = rows.extras
        return Outcome(
            ids,
            info.loss,
            clients,
            samples,
            state.attack,
            unraveler(state.params)(aggregate),
            rule_state,
            verdict,
            rows.finite,
        )

    layout: Any = None
    if sim.hosted:
        whole: Any = PartitionSpec()
        layout = (whole, Arrays(LAYOUT, whole, whole, whole), whole, whole)
    run = on_every_device(part, sim.num_devices, layout)
    return close_round(sim, state, defended, run(state, arrays, row, root_update))


def on_this_device(
    sim: "Simulation", clients: Clients | Spread, row: Row
) -> tuple[Clients, Row]:
    """The clients that this device trains, and the cohort's rows with places in them.

    Only those of this device's part have a place.
    """
    if not isinstance(clients, Spread):
        return clients, row
    own = clients.cohort(row.client_id)
    share = -(-len(row.client_id) // sim.num_devices)
    first = jax.lax.axis_index(AXIS) * share if sim.num_devices > 1 else 0
    places = jnp.clip(jnp.arange(len(row.client_id)) - first, 0, own.num_clients - 1)
    return own, row._replace(place=places)


def alone(attack: UpdateAttack) -> Callable[..., Callable[[Array, Array], Array]]:
    """``UpdateAttack.in_passes`` of an attack that knows its own row only."""

    def in_passes(
        rows: Rows, state: PyTree, context: RoundContext
    ) -> Callable[[Array, Array], Array]:
        unravel = unraveler(context.params)

        def change(updates: Array, places: Array) -> Array:
            def own(x: Array | None) -> Array | None:
                return None if x is None else x[places]

            theirs = context._replace(
                client_ids=own(context.client_ids),
                num_samples=own(context.num_samples),
                mask=own(context.mask),
                byzantine=own(context.byzantine),
            )
            sent, _ = attack.apply(jax.vmap(unravel)(updates), state, theirs)
            return ravel_clients(sent)[0]

        return change

    return in_passes
