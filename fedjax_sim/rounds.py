"""One communication round of several systems at once, as a pure function.

The clients of all systems are trained together (``training``); attack, aggregation and
server step then follow system by system.
"""

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from fedjax_sim.evaluation import Scores, evaluate_systems
from fedjax_sim.metrics import detection
from fedjax_sim.pytrees import finite_rows, ravel, ravel_clients
from fedjax_sim.sharding import share_out
from fedjax_sim.state import AGGREGATE, ATTACK, Arrays, History, RoundState, stream
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
    """Applies a rule with non-finite rows taken out first.

    Returns the aggregate, the rule's state, its info, and ``finite bool [k]``.
    """
    U, unravel = ravel_clients(updates)
    finite = finite_rows(U)
    clean = jax.vmap(unravel)(jnp.where(finite[:, None], U, 0.0))
    context = context._replace(mask=finite, byzantine=None, aggregate=None)
    aggregate, state, info = rule.apply(clean, state, context)
    info = info._replace(
        flagged=info.flagged | ~finite, weights=jnp.where(finite, info.weights, 0.0)
    )
    return aggregate, state, info, finite


def finish_round(
    sim: "Simulation",
    state: RoundState,
    clients: Clients,
    trained: Trained,
    root_update: Array | None,
) -> tuple[RoundState, History]:
    """Attack, aggregation, server step and the round's metrics of one system."""
    ids, rows, client_states, info = trained
    _, unravel = ravel_clients(jax.tree.map(lambda w: w[None], state.params))
    # Attacks and rules ravel what is unraveled here, and XLA drops both. It cannot once
    # it has joined these cuts with the cut of this system's rows: hence the barrier.
    updates = jax.vmap(unravel)(jax.lax.optimization_barrier(rows))
    byzantine = state.byzantine[ids]
    context = RoundContext(
        key=stream(state, ATTACK),
        params=state.params,
        previous_params=state.previous_params,
        previous_aggregate=state.previous_aggregate,
        round=state.round,
        client_ids=ids,
        num_samples=clients.mask[ids].sum(axis=1).astype(jnp.float32),
        root_update=None if root_update is None else unravel(root_update),
        byzantine=byzantine,
    )
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
    step, optimizer = sim.server_optimizer.update(
        jax.tree.map(jnp.negative, aggregate), state.optimizer, state.params
    )
    params = jax.tree.map(lambda p, u: (p + u).astype(p.dtype), state.params, step)
    new_state = RoundState(
        params=params,
        previous_params=state.params,
        previous_aggregate=aggregate,
        aggregator=rule_state,
        attack=attack_state,
        optimizer=optimizer,
        clients=jax.tree.map(
            lambda x, y: x.at[ids].set(y), state.clients, client_states
        ),
        byzantine=state.byzantine,
        key=state.key,
        round=state.round + 1,
    )
    found = detection(verdict.flagged, byzantine)
    honest = jnp.logical_not(byzantine) & jnp.isfinite(info.loss)
    unknown = jnp.full((), jnp.nan, jnp.float32)
    norm = jnp.linalg.norm(ravel(aggregate))
    history = History(
        round=new_state.round,
        accuracy=unknown,
        loss=unknown,
        attack_success=unknown,
        class_recall=jnp.full(sim.num_classes, jnp.nan, jnp.float32),
        train_loss=jnp.where(honest, info.loss, 0.0).sum() / honest.sum(),
        aggregate_norm=norm,
        num_byzantine=found.num_byzantine,
        num_flagged=found.num_flagged,
        num_nonfinite=jnp.logical_not(finite).sum(dtype=jnp.int32),
        # A rule that falls back on the root update moves the model without a client.
        no_aggregate=jnp.all(verdict.weights == 0) & (norm == 0.0),
        tpr=found.tpr,
        fpr=found.fpr,
        fnr=found.fnr,
        client_ids=ids,
        byzantine=byzantine,
        weights=verdict.weights,
        flagged=verdict.flagged,
        scores=verdict.scores,
        details=verdict.details,
    )
    return new_state, history


def play_round(
    sims: Mapping[str, "Simulation"],
    states: Mapping[str, RoundState],
    arrays: Arrays,
    evaluate_now: Array,
) -> tuple[dict[str, RoundState], dict[str, History]]:
    """One round of every system, evaluated where ``evaluate_now`` (``bool []``)."""
    trained = train_cohorts(sims, states, arrays)
    roots = train_roots(sims, states, arrays)
    finished = share_out(
        {name: functools.partial(finish_round, sim) for name, sim in sims.items()},
        {n: (states[n], arrays.clients, trained[n], roots.get(n)) for n in sims},
        next(iter(sims.values())).num_devices,
    )
    new_states = {name: state for name, (state, _) in finished.items()}
    histories = {name: history for name, (_, history) in finished.items()}
    if arrays.test is not None:

        def measure(params: Mapping[str, Params]) -> Any:
            return evaluate_systems(sims, params, arrays.test)

        def skip(params: Mapping[str, Params]) -> Any:
            return {
                n: (Scores(h.accuracy, h.loss, h.class_recall), h.attack_success)
                for n, h in histories.items()
            }

        params = {name: state.params for name, state in new_states.items()}
        found = jax.lax.cond(evaluate_now, measure, skip, params)
        for name, (scores, success) in found.items():
            histories[name] = histories[name]._replace(
                **scores._asdict(), attack_success=success
            )
    return new_states, histories
