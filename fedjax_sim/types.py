"""The values a simulation is made of: NamedTuples of arrays or of pure functions.

Everything a study varies plugs into one fixed round as one of these values. The sign
convention, stated once and used everywhere: **update = client params - server params**.
"Stacked" means that every leaf has a leading client axis.

Symbols in shapes: ``N`` clients in all, ``k`` clients in a round's cohort, ``m``
samples per client (padded, with a mask), ``P`` samples in the pool, ``d`` parameters.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
AnyArray = np.ndarray | jax.Array
PyTree = Any
Params = PyTree
# ``(key, params) -> update``.
Train = Callable[[Array, Params], Params]
# Fields of a ``RoundContext`` that come from the server's root dataset.
OF_THE_ROOT = frozenset({"root_update", "root_scores"})


class Examples(NamedTuple):
    """Labelled samples on the host: ``inputs [s, ...]`` and integer ``targets [s]``.

    Of a ``multilabel`` task ``targets`` are ``[s, L]``, 1 where a sample has the label.
    """

    inputs: AnyArray
    targets: AnyArray


class Dataset(NamedTuple):
    """A data set with its origin. Images are ``uint8 [s, height, width, channels]``.

    ``task`` is ``classification`` (one label a sample) or ``multilabel`` (any number of
    the ``L`` labels). ``val`` is the validation part, where the publisher has one.
    ``owners``, ``int32 [s]``, says of every sample of ``train`` whose it is, by the
    number of the client (such as the writer), where the data come divided.
    """

    name: str
    train: Examples
    test: Examples
    class_names: tuple[str, ...]
    source: str
    licence: str
    task: str = "classification"
    val: Examples | None = None
    owners: AnyArray | None = None

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


class ClientData(NamedTuple):
    """The samples of one client, or of a stacked cohort with a leading ``k`` axis.

    Attributes:
        inputs: ``[m, ...]``, as stored (``uint8`` images stay ``uint8``).
        targets: ``int32 [m]``, or ``[m, L]`` of a multilabel task.
        mask: ``bool [m]``, False where a row is padding, which comes last, or was left
            out by a ``ClientDefense``. None when no client of the run has such rows, so
            that sizes are static.
    """

    inputs: Array
    targets: Array
    mask: Array | None

    @property
    def valid(self) -> Array:
        """``bool [m]``: the samples of one client that count."""
        if self.mask is not None:
            return self.mask
        return jnp.ones(self.inputs.shape[:1], bool)


# What a client makes of the rows it stores, to train on; see ``Simulation``.
MakeSamples = Callable[[ClientData], ClientData]


class Clients(NamedTuple):
    """All clients of a run: one sample pool and an index table into it, no copies.

    Of a series the pool's rows are steps and a client's rows its steps in time order;
    ``Simulation.make_samples`` then cuts each client's windows out of them.

    Attributes:
        inputs: the pool's inputs, ``[P, ...]``.
        targets: the pool's targets, ``int32 [P]``, or ``[P, L]`` of a multilabel task.
        indices: ``int32 [N, m]``, the pool rows of each client; padding holds 0.
        mask: ``bool [N, m]``, False where ``indices`` is padding, which comes last; of
            a series, True where a sample begins.
    """

    inputs: Array
    targets: Array
    indices: Array
    mask: Array

    @property
    def num_clients(self) -> int:
        return self.indices.shape[0]

    def sizes(self) -> Array:
        """Number of samples of every client, ``int32 [N]``."""
        return self.mask.sum(axis=1, dtype=jnp.int32)

    def samples_of(self, ids: Array) -> Array:
        """Number of samples of the clients ``ids``, without counting those of all."""
        return self.mask[ids].sum(axis=-1, dtype=jnp.int32)

    @property
    def padded(self) -> bool:
        """Whether clients differ in size, so that some rows are padding."""
        return not np.asarray(self.mask).all()

    def gather(self, ids: Array) -> ClientData:
        """The data of the clients ``ids``: a scalar id, or ``[k]`` for a cohort."""
        rows = self.indices[ids]
        return ClientData(self.inputs[rows], self.targets[rows], self.mask[ids])


class RoundContext(NamedTuple):
    """What a rule or an attack may know of the round besides the updates.

    Every field is optional, so a rule can be called on a plain ``[n, d]`` array without
    an engine: ``rule.apply(U, rule.init(U[0], len(U)), RoundContext())``.

    Attributes:
        key: PRNG key of this use in this round.
        params: server parameters the round started from.
        previous_params: server parameters one round earlier (``params`` in round 0).
        previous_aggregate: last round's aggregate (zeros in round 0).
        round: ``int32 []``, from 0.
        client_ids: ``int32 [k]``, index of each row in the ``N`` clients; per-client
            state is indexed by it.
        num_samples: ``float32 [k]``, data size of each row.
        mask: ``bool [k]``, who takes part. Rows with a non-finite value or norm are
            taken out of it by every rule.
        root_update: update of the server's own training on its root dataset, with the
            structure of ``params``.
        root_scores: ``(params) -> (loss, error rate)`` of a model on the server's root
            dataset, ``float32 []`` each.
        byzantine: ``bool [k]``, who is Byzantine. This and the following are given to
            attacks only: they are always None for an aggregator.
        aggregate: ``(updates) -> aggregate``, the server's real rule with its present
            memory, for attacks that try out what they would achieve. Its randomness is
            the attacker's own: the server's draws cannot be foreseen.
        rank: ``int32 []``, for a data attack: the number of this attacker among the
            attackers of the run, from 0, so that they can share out the work.
        features: ``(inputs [b, ...]) -> [b, h]``, the shallow features of samples by
            the server's model, for client defenses.
    """

    key: Array | None = None
    params: Params | None = None
    previous_params: Params | None = None
    previous_aggregate: Params | None = None
    round: Array | None = None
    client_ids: Array | None = None
    num_samples: Array | None = None
    mask: Array | None = None
    root_update: Params | None = None
    root_scores: Callable[[Params], tuple[Array, Array]] | None = None
    byzantine: Array | None = None
    aggregate: Callable[[PyTree], PyTree] | None = None
    rank: Array | None = None
    features: Callable[[Array], Array] | None = None


class AggregatorInfo(NamedTuple):
    """What a rule thought of each client. The same three arrays for every rule.

    Attributes:
        weights: ``float32 [k]``, share of each client in the aggregate; sums to 1, or
            is all zero where nobody was left, and the aggregate is zero or what the
            rule falls back on. For a coordinate-wise rule: the share of coordinates the
            client supplied.
        flagged: ``bool [k]``, True where the rule rejected the client.
        scores: ``float32 [k]``, higher = more suspicious; ``inf`` for rows left out
            before the rule looked (non-finite, or masked).
        details: further per-client arrays ``[k]`` by name, such as ``trust``.
    """

    weights: Array
    flagged: Array
    scores: Array
    details: dict[str, Array] = {}


class Aggregator(NamedTuple):
    """A rule that turns stacked client updates into one update.

    Attributes:
        init: ``(params, num_clients) -> state``; per-client state has a leading ``N``.
        apply: ``(updates, state, context) -> (aggregate, state, AggregatorInfo)``. The
            updates are any pytree with a leading client axis; the aggregate has the
            same structure without it.
        validate: ``(cohort_size) -> None``; raises ValueError where the rule's
            condition on the number of clients does not hold. Called by ``Simulation``
            before any training and by a bare ``apply`` while tracing.
        needs: names of the ``RoundContext`` fields the rule cannot do without.
        name: as on the command line and in the results.
        pretrain: of a rule that learns before its first round, ``(params, key, train)
            -> state``, in place of ``init``, which refuses. ``train(key, params) ->
            update`` is the server's own training on its root dataset, as long as for
            ``root_update``.
        in_passes: the same rule for more updates than fit into memory, or one device:
            ``(rows, state, context) -> (aggregate float32 [d], state, info)``, with
            ``passes.Rows`` in place of the updates. None where it has no such form.
    """

    init: Callable[[Params, int], PyTree]
    apply: Callable[
        [PyTree, PyTree, RoundContext], tuple[PyTree, PyTree, AggregatorInfo]
    ]
    validate: Callable[[int], None]
    needs: frozenset[str] = frozenset()
    name: str = "custom"
    pretrain: Callable[[Params, Array, Train], PyTree] | None = None
    in_passes: Callable[..., tuple[Array, PyTree, AggregatorInfo]] | None = None

    @property
    def needs_root(self) -> bool:
        """Whether it cannot do without the server's root dataset."""
        return bool(self.needs & OF_THE_ROOT) or self.pretrain is not None


class PreAggregator(NamedTuple):
    """A step before the rule that mixes, groups or shortens the updates.

    ``aggregators.chain(pre, ..., rule)`` makes an ``Aggregator`` of it.

    Attributes:
        apply: ``(U [k, d], mask [k], context) -> (rows [r, d], mixing [r, k], mask
            [r])``. Where the mask is False, ``U`` may hold anything, NaN too, and
            ``rows`` are zero. ``mixing`` says which share of each row came from which
            client; its rows sum to 1, or to 0 where the new mask is False. A client
            that takes no part has share 0 everywhere.
        num_rows: ``(cohort_size) -> r``.
        validate: ``(cohort_size) -> None``, as for an ``Aggregator``.
        per_client: whether row i still belongs to client i, so that a rule with a
            memory of clients may follow.
        needs: names of the ``RoundContext`` fields it cannot do without.
        name: as on the command line and in the results.
    """

    apply: Callable[[Array, Array, RoundContext], tuple[Array, Array, Array]]
    num_rows: Callable[[int], int]
    validate: Callable[[int], None]
    per_client: bool
    needs: frozenset[str] = frozenset()
    name: str = "custom"


class UpdateAttack(NamedTuple):
    """Byzantine clients replace their updates after honest training.

    Attributes:
        init: ``(params, num_clients) -> state``.
        apply: ``(updates, state, context) -> (updates, state)``. Rows where
            ``context.byzantine`` is False come back bit-identical.
        validate: ``(cohort_size, num_byzantine) -> None`` with the number of Byzantine
            clients expected in a cohort; raises ValueError where the attack's formula
            has no meaning.
        knowledge: ``own`` (an attacker sees its own row), ``colluding`` (attackers see
            each other's rows) or ``omniscient`` (they see every row).
        needs: names of the ``RoundContext`` fields the attack cannot do without.
        name: as on the command line and in the results.
        strength: name of the option that says how strong the attack is, if its state is
            that number, ``float32 []``. Then one compiled program serves every
            strength: put other values into the ``attack`` of a ``RoundState``, or one
            for every seed.
        in_passes: the same attack for more updates than fit into memory, or one device:
            ``(rows, state, context) -> change``, with ``passes.Rows`` in place of the
            updates and ``change(updates [c, d], places [c])`` as ``Rows.then`` has it.
            An attack that knows its own row only needs none.
    """

    init: Callable[[Params, int], PyTree]
    apply: Callable[[PyTree, PyTree, RoundContext], tuple[PyTree, PyTree]]
    validate: Callable[[int, int], None]
    knowledge: str
    needs: frozenset[str] = frozenset()
    name: str = "custom"
    strength: str = ""
    in_passes: Callable[..., Callable[[Array, Array], Array]] | None = None

    @property
    def needs_root(self) -> bool:
        """Whether it cannot do without the server's root dataset."""
        return bool(self.needs & OF_THE_ROOT)


class DataAttack(NamedTuple):
    """Byzantine clients train on poisoned data.

    Attributes:
        poison: ``(key, one client's data, context) -> data``, written for ONE client;
            the engine maps it over the Byzantine clients of a cohort and leaves honest
            clients' data as it is.
        validate: ``(num_classes) -> None``; raises ValueError where the attack does not
            fit the task.
        name: as on the command line and in the results.
        trigger: how a targeted attack's success is measured: ``(inputs, targets) ->
            (inputs, wanted, counts)`` on test samples. The attack succeeded on a sample
            if the model says ``wanted`` on the new inputs, and only samples where
            ``counts`` is True are counted. None for an untargeted attack.
    """

    poison: Callable[[Array, ClientData, RoundContext], ClientData]
    validate: Callable[[int], None]
    name: str = "custom"
    trigger: Callable[[Array, Array], tuple[Array, Array, Array]] | None = None


class ClientDefense(NamedTuple):
    """Clients look at their own data before they train, and leave some of it out.

    Attributes:
        init: ``(mask bool [N, m]) -> state``; the mask says which samples there are.
            The state holds no PRNG keys; every round has a fresh ``context.key``.
        apply: ``(gather, state, context) -> (keep bool [k, m], state, info)`` for the
            cohort ``context.client_ids``. ``gather(id)`` is the data of any one of the
            N clients as it has them, poisoned where it is Byzantine: map over clients.
            A sample takes part where ``keep`` is True and it is no padding; a client
            without any takes no part in the round. ``info`` holds per-client arrays
            ``[k]`` by name. ``context.round`` is the same for all seeds, so that a
            branch on it stays one.
        needs: names of the ``RoundContext`` fields it cannot do without; there are
            ``key``, ``params``, ``round``, ``client_ids`` and ``features``.
        name: as on the command line and in the results.
        validate: ``(sizes int [N], targets int [P, ...], num_classes) -> None``; raises
            ValueError where the data do not suit it. Host-side, before any training.
    """

    init: Callable[[Array], PyTree]
    apply: Callable[
        [Callable[[Array], ClientData], PyTree, RoundContext],
        tuple[Array, PyTree, dict[str, Array]],
    ]
    needs: frozenset[str] = frozenset()
    name: str = "custom"
    validate: Callable[[np.ndarray, np.ndarray, int], None] = lambda *_: None


class ClientInfo(NamedTuple):
    """What one client reports of its local training: ``loss``, the mean over steps."""

    loss: Array


class ClientUpdate(NamedTuple):
    """Local training, written for ONE client; the engine vmaps, chunks or shards it.

    Attributes:
        init: ``(params) -> client state`` kept by client id between rounds; ``()`` when
            a client remembers nothing.
        apply: ``(model, key, params, data, state, round) -> (update, state, info)``
            with update = client params - server params and ``ClientInfo`` as info.
        num_steps: ``(sizes int [N]) -> int [N]``: local steps a client of each size
            takes; host-side NumPy.
        with_steps: ``(steps) -> ClientUpdate``: the same training for exactly that many
            steps, as the root update needs.
        validate: ``(sizes int [N]) -> None``; raises ValueError on sizes it cannot
            train.
    """

    init: Callable[[Params], PyTree]
    apply: Callable[..., tuple[Params, PyTree, ClientInfo]]
    num_steps: Callable[[np.ndarray], np.ndarray]
    with_steps: Callable[[int], "ClientUpdate"]
    validate: Callable[[np.ndarray], None]
