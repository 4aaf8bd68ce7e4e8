"""What the attack and the rule may know of a round, and what follows from theirs."""

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_sim.cohorts import Defended
from fedjax_sim.evaluation import make_root_scores
from fedjax_sim.metrics import detection
from fedjax_sim.pytrees import ravel, unraveler
from fedjax_sim.state import ATTACK, History, RoundState, stream
from fedjax_sim.types import (
    AggregatorInfo,
    Array,
    Clients,
    Params,
    PyTree,
    RoundContext,
)

if TYPE_CHECKING:
    from fedjax_sim.simulation import Simulation


class Outcome(NamedTuple):
    """What a cohort's round came to, before the server's step.

    Attributes:
        ids: ``int32 [k]``, the cohort.
        loss: ``[k]``, of the local training.
        clients: what the cohort's clients remember, ``[k, ...]``.
        samples: counts ``[k]`` of what a client defense left out, by name.
        attack: the attack's state.
        aggregate: with the structure of the parameters.
        rule: the rule's state.
        verdict: the rule's ``AggregatorInfo``.
        finite: ``bool [k]``, whose update was finite.
    """

    ids: Array
    loss: Array
    clients: PyTree
    samples: dict[str, Array]
    attack: PyTree
    aggregate: Params
    rule: PyTree
    verdict: AggregatorInfo
    finite: Array


def make_context(
    sim: "Simulation",
    state: RoundState,
    ids: Array,
    sizes: Array,
    root_update: Array | None,
    root: Clients | None,
) -> RoundContext:
    """What an attack, and but for ``byzantine`` a rule, may know of the round.

    ``sizes`` are the samples that the clients ``ids`` train on.
    """
    unravel = unraveler(state.params)
    return RoundContext(
        key=stream(state, ATTACK),
        params=state.params,
        previous_params=state.previous_params,
        previous_aggregate=state.previous_aggregate,
        round=state.round,
        client_ids=ids,
        num_samples=sizes.astype(jnp.float32),
        mask=None if sim.client_defense is None else sizes > 0,
        root_update=None if root_update is None else unravel(root_update),
        root_scores=None if root is None else make_root_scores(sim.model, root),
        byzantine=state.byzantine[ids],
    )


def close_round(
    sim: "Simulation", state: RoundState, defended: Defended | None, outcome: Outcome
) -> tuple[RoundState, History]:
    """Server step and the round's metrics of one system."""
    ids, aggregate, verdict = outcome.ids, outcome.aggregate, outcome.verdict
    step, optimizer = sim.server_optimizer.update(
        jax.tree.map(jnp.negative, aggregate), state.optimizer, state.params
    )
    params = jax.tree.map(lambda p, u: (p + u).astype(p.dtype), state.params, step)
    new_state = RoundState(
        params=params,
        previous_params=state.params,
        previous_aggregate=aggregate,
        aggregator=outcome.rule,
        attack=outcome.attack,
        defense=state.defense if defended is None else defended.state,
        optimizer=optimizer,
        clients=jax.tree.map(
            lambda x, y: x.at[ids].set(y), state.clients, outcome.clients
        ),
        byzantine=state.byzantine,
        key=state.key,
        round=state.round + 1,
    )
    byzantine = state.byzantine[ids]
    found = detection(verdict.flagged, byzantine)
    honest = jnp.logical_not(byzantine) & jnp.isfinite(outcome.loss)
    unknown = jnp.full((), jnp.nan, jnp.float32)
    norm = jnp.linalg.norm(ravel(aggregate))
    history = History(
        round=new_state.round,
        accuracy=unknown,
        loss=unknown,
        auc=unknown,
        balanced_accuracy=unknown,
        attack_success=unknown,
        class_recall=jnp.full(sim.num_classes, jnp.nan, jnp.float32),
        class_specificity=jnp.full(sim.num_classes, jnp.nan, jnp.float32),
        train_loss=jnp.where(honest, outcome.loss, 0.0).sum() / honest.sum(),
        aggregate_norm=norm,
        num_byzantine=found.num_byzantine,
        num_flagged=found.num_flagged,
        num_nonfinite=jnp.logical_not(outcome.finite).sum(dtype=jnp.int32),
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
        local={},
        defense={} if defended is None else outcome.samples | defended.info,
    )
    return new_state, history
