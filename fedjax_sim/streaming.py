"""A round of one system whose updates are held by no one: see ``passes``."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from fedjax_sim.cohorts import Defended, Row
from fedjax_sim.outcome import Outcome, close_round, make_context
from fedjax_sim.passes import Rows
from fedjax_sim.pytrees import ravel_clients, unraveler
from fedjax_sim.sharding import on_every_device
from fedjax_sim.state import AGGREGATE, Arrays, History, RoundState, stream
from fedjax_sim.training import defended_rows, row_maker
from fedjax_sim.types import Array, PyTree, RoundContext, UpdateAttack

if TYPE_CHECKING:
    from fedjax_sim.simulation import Simulation

# Rows that pass by at a time at least: a product with one row is slow.
ROWS_AT_A_TIME = 16


def play_in_passes(
    sim: "Simulation",
    state: RoundState,
    arrays: Arrays,
    defended: Defended | None,
    root_update: Array | None,
) -> tuple[RoundState, History]:
    """A round of one system whose updates are held by no one; see ``passes``."""
    decided = {} if defended is None else {"": defended}
    row = defended_rows({"": sim}, {"": state}, arrays, decided)[""]

    def part(state: RoundState, arrays: Arrays, row: Row, root_update: Any) -> Outcome:
        ids = row.client_id
        kept = arrays.clients.mask[ids]
        sizes = (kept if row.keep is None else kept & row.keep).sum(axis=1)
        root = arrays.root if "root_scores" in sim.needs else None
        context = make_context(sim, state, ids, sizes, root_update, root)
        assert sim.update_memory is not None, "or the round is not in passes"
        rows = Rows(
            row_maker(sim, state, arrays.clients, row),
            len(ids),
            sim.num_params,
            chunk=max(sim.client_chunk, ROWS_AT_A_TIME),
            memory=sim.update_memory,
            mask=context.mask,
            num_devices=sim.num_devices,
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

    run = on_every_device(part, sim.num_devices)
    return close_round(sim, state, defended, run(state, arrays, row, root_update))


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
