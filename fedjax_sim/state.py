"""What passes from round to round, what is measured, and the keys of a round."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_sim.hosts import Spread
from fedjax_sim.pytrees import along
from fedjax_sim.types import (
    AnyArray,
    Array,
    Clients,
    ClientUpdate,
    Params,
    PyTree,
    Train,
)

if TYPE_CHECKING:
    from fedjax_sim.simulation import Simulation

# Streams of a run's key. Adding one at the end leaves earlier results as they are.
INIT, BYZANTINE, COHORT, TRAIN, POISON = range(5)
ATTACK, AGGREGATE, ROOT, DEFENSE, PRETRAIN = range(5, 10)

# Up to this many clients are shuffled to draw a cohort, and where so many pairs of the
# cohort would be compared for every client that it takes longer (2 cores, measured).
SHUFFLED = 1000
PAIRS_A_CLIENT = 2000


class RoundState(NamedTuple):
    """All that passes from one round to the next: the scan's only carry.

    ``byzantine`` is ``bool [N]``, the persistent attackers; ``aggregator``, ``attack``,
    ``defense``, ``optimizer`` and ``clients`` (leading axis N) are what each of those
    remembers. With several seeds every leaf has a leading seed axis.
    """

    params: Params
    previous_params: Params
    previous_aggregate: Params
    aggregator: PyTree
    attack: PyTree
    defense: PyTree
    optimizer: PyTree
    clients: PyTree
    byzantine: Array
    key: Array
    round: Array


class History(NamedTuple):
    """What was measured, with a leading round axis R (after the seed axis, if any).

    Attributes:
        round: ``int32 [R]``, rounds finished, from 1.
        accuracy: ``float32 [R]``, share of test samples classified correctly (of their
            labels, in a multilabel task); NaN where the round was not evaluated.
        loss: ``float32 [R]``, mean test loss; NaN likewise.
        auc: ``float32 [R]``, area under the ROC curve, mean over classes; NaN likewise,
            and where an output was not finite. See ``fs.metrics.auc``.
        balanced_accuracy: ``float32 [R]``, accuracy with every class counting alike;
            NaN likewise. See ``fs.metrics.balanced_accuracy``.
        attack_success: ``float32 [R]``, share of the test samples on which the model
            says what the system's data attack wants, of those that count (see
            ``DataAttack.trigger``); NaN likewise, and without a targeted data attack.
        class_recall: ``float32 [R, C]``, share of the test samples of each class that
            were told so, its sensitivity; NaN likewise, and for a class without any.
        class_specificity: ``float32 [R, C]``, share of the test samples not of each
            class that were told so; NaN likewise.
        train_loss: ``float32 [R]``, mean local loss of the cohort's honest clients.
        aggregate_norm: ``float32 [R]``, Euclidean norm of the aggregate.
        num_byzantine: ``int32 [R]``, Byzantine clients in the cohort.
        num_flagged: ``int32 [R]``, clients the rule rejected, or that their own defense
            left without samples.
        num_nonfinite: ``int32 [R]``, updates left out for a NaN or infinity.
        no_aggregate: ``bool [R]``, True where nobody was left and the model stayed.
        tpr: ``float32 [R]``, share of Byzantine clients that were flagged; NaN without
            any in the cohort.
        fpr: ``float32 [R]``, share of honest clients flagged (false alarm rate).
        fnr: ``float32 [R]``, share of Byzantine clients missed (missing alarm rate).
        client_ids: ``int32 [R, k]``, the cohort.
        byzantine: ``bool [R, k]``, the truth.
        weights: ``float32 [R, k]``; with ``flagged`` ``bool [R, k]`` and ``scores``
            ``float32 [R, k]`` as in ``AggregatorInfo``.
        details: the rule's further per-client arrays ``[R, k]`` by name.
        local: ``loss`` and ``accuracy`` ``[R, k]`` of the new model on every client's
            own held-out samples, poisoned where it is Byzantine; NaN where the round
            was not evaluated; ``own_loss`` and ``own_accuracy`` likewise of the model
            each client had after its local training, before any attack on its update.
            Empty without ``Simulation.local_test``.
        defense: of a system with a client defense ``int32 [R, k]``: ``samples`` each
            client trained on, ``poisoned`` samples it had, ``poisoned_left_out`` and
            ``clean_left_out``; and what the defense itself reports. Else empty.
    """

    round: AnyArray
    accuracy: AnyArray
    loss: AnyArray
    auc: AnyArray
    balanced_accuracy: AnyArray
    attack_success: AnyArray
    class_recall: AnyArray
    class_specificity: AnyArray
    train_loss: AnyArray
    aggregate_norm: AnyArray
    num_byzantine: AnyArray
    num_flagged: AnyArray
    num_nonfinite: AnyArray
    no_aggregate: AnyArray
    tpr: AnyArray
    fpr: AnyArray
    fnr: AnyArray
    client_ids: AnyArray
    byzantine: AnyArray
    weights: AnyArray
    flagged: AnyArray
    scores: AnyArray
    details: Mapping[str, AnyArray]
    local: Mapping[str, AnyArray]
    defense: Mapping[str, AnyArray]


class Arrays(NamedTuple):
    """The data of a run, handed to the compiled program as arguments."""

    clients: Clients | Spread
    root: Clients | None
    test: Any
    local_test: Clients | None


def stream(state: RoundState, which: int) -> Array:
    """The key of one use in this round: a function of run key, use and round only."""
    return jax.random.fold_in(jax.random.fold_in(state.key, which), state.round)


def fresh_states(
    sims: Mapping[str, "Simulation"],
    params: Params,
    key: Array,
    round: Array,
    root: Clients | None,
) -> dict[str, RoundState]:
    """Every system's state with these parameters and nothing remembered.

    Rules that learn before their first round do so, each once for all its systems.
    """
    learned: dict[Any, PyTree] = {}
    for sim in sims.values():
        pretrain = sim.aggregator.pretrain
        if pretrain is not None and pretrain not in learned:
            assert root is not None, "checked by Simulation"
            own_key = jax.random.fold_in(key, PRETRAIN)
            learned[pretrain] = pretrain(params, own_key, root_training(sim, root))
    return {
        name: _fresh_state(sim, params, key, round, learned)
        for name, sim in sims.items()
    }


def root_training(sim: "Simulation", root: Clients) -> Train:
    """The server's own training on its root dataset, as long as for a root update."""
    assert sim.root_steps is not None, "set by Simulation where there is a root"
    update = sim.client_update.with_steps(sim.root_steps)
    data = root.gather(jnp.int32(0))._replace(mask=None)

    def train(key: Array, params: Params) -> Params:
        own, zero = update.init(params), jnp.int32(0)
        return update.apply(sim.model, key, params, data, own, zero)[0]

    return train


def _fresh_state(
    sim: "Simulation",
    params: Params,
    key: Array,
    round: Array,
    learned: Mapping[Any, PyTree],
) -> RoundState:
    if sim.byzantine_clients is None:
        byzantine = jax.random.permutation(
            jax.random.fold_in(key, BYZANTINE),
            jnp.arange(sim.num_clients) < sim.num_byzantine,
        )
    else:
        chosen = jnp.array(sim.byzantine_clients, jnp.int32)
        byzantine = jnp.zeros(sim.num_clients, bool).at[chosen].set(True)

    def clients(update: ClientUpdate) -> PyTree:
        return jax.tree.map(
            lambda x: jnp.broadcast_to(x, (sim.num_clients, *x.shape)),
            update.init(params),
        )

    client_states = clients(sim.client_update)
    if sim.byzantine_update is not None:
        client_states = jax.tree.map(
            lambda own, x: jnp.where(along(byzantine, x), own, x),
            clients(sim.byzantine_update),
            client_states,
        )
    attack = () if sim.attack is None else sim.attack.init(params, sim.num_clients)
    defense: PyTree = ()
    if sim.client_defense is not None:
        defense = sim.client_defense.init(sim.own_clients.mask)
    return RoundState(
        params=params,
        previous_params=params,
        previous_aggregate=jax.tree.map(jnp.zeros_like, params),
        aggregator=(
            sim.aggregator.init(params, sim.num_clients)
            if sim.aggregator.pretrain is None
            else learned[sim.aggregator.pretrain]
        ),
        attack=attack,
        defense=defense,
        optimizer=sim.server_optimizer.init(params),
        clients=client_states,
        byzantine=byzantine,
        key=key,
        round=round,
    )


def draw_cohort(sim: "Simulation", key: Array) -> Array:
    """``int32 [k]``: ids of a round's clients, without replacement.

    ``key`` is the ``stream`` ``COHORT`` of the round.
    """
    total, count = sim.num_clients, sim.cohort_size
    if count == total:
        return jnp.arange(total)
    return draw_distinct(key, total, count)


def draw_distinct(key: Array, total: int, count: int) -> Array:
    """``int32 [count]``: different numbers below ``total``, every set alike likely.

    Shuffling all of a million numbers takes 0.7 s on a CPU. A few of many are drawn by
    Floyd's algorithm, whose cost does not depend on ``total``: in step j = total -
    count, ..., total - 1 a number up to j is drawn, and j itself taken in its place if
    it is there already.

    Example:
        >>> drawn = draw_distinct(jax.random.key(0), 1_000_000, 3)
        >>> len(set(drawn.tolist())), drawn.dtype
        (3, dtype('int32'))

    References:
        Bentley and Floyd, "Programming pearls: a sample of brilliance", Communications
        of the ACM 1987.
    """
    if total <= SHUFFLED or count**2 > PAIRS_A_CLIENT * total:
        return jax.random.permutation(key, total)[:count]
    last = jnp.arange(total - count, total, dtype=jnp.int32)
    draws = jax.random.randint(key, (count,), 0, last + 1)

    def take(i: Array, taken: Array) -> Array:
        there = (taken == draws[i]).any()
        return taken.at[i].set(jnp.where(there, last[i], draws[i]))

    return jax.lax.fori_loop(0, count, take, jnp.full(count, -1, jnp.int32))
