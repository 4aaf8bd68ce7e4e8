"""A simulation: everything a run is made of, bound together and validated."""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_sim import checks, memory, rounds
from fedjax_sim.hosts import HostClients, check_alike, spread
from fedjax_sim.memory import Memory
from fedjax_sim.models import Model
from fedjax_sim.registry import check_count
from fedjax_sim.sharding import replicate, size_in_bytes
from fedjax_sim.state import INIT, Arrays, History, RoundState, fresh_states
from fedjax_sim.types import (
    Aggregator,
    Array,
    ClientDefense,
    Clients,
    ClientUpdate,
    DataAttack,
    Examples,
    MakeSamples,
    Params,
    UpdateAttack,
)

# What the systems of a comparison must have in common, because their clients are
# trained together.
SHARED = (
    "clients",
    "model",
    "client_update",
    "make_samples",
    "test",
    "local_test",
    "cohort_size",
    "client_chunk",
    "num_devices",
    "update_memory",
)
# Above this many parameters clients are trained one by one on CPU.
CACHE_PARAMS = 50_000
# Likewise where one client takes more than this many times the local steps of the mean.
MOST_UNEQUAL = 1.5


@dataclasses.dataclass(frozen=True, eq=False)
class Simulation:
    """One federated system under study.

    Each round: draw the cohort, train its clients from the server's parameters, let
    Byzantine clients lie, aggregate, apply the server optimizer. Who is Byzantine is
    drawn once from the run's key and persists; aggregators are never told.

    Args:
        model: the network; only its three functions are used.
        clients: the clients' data, from ``fs.data.federate``; of several processes,
            from ``fs.hosts.share``.
        client_update: local training, such as ``fs.local_sgd``.
        aggregator: the server's rule.
        test: held-out samples for evaluation; None to never evaluate.
        local_test: samples that every client keeps for evaluation, from
            ``fs.data.hold_out``: the server's model is then evaluated on those of the
            cohort, client by client (``History.local``).
        root: the server's own clean samples, for rules that need a root update.
        root_steps: local steps of the root update. Default: as many as a client takes
            on average, because the norm of the root update grows with them and FLTrust
            scales everybody to it.
        attack: what Byzantine clients do to their updates.
        data_attack: what they do to their data; both may be given.
        client_defense: what clients leave out of their data before they train.
        make_samples: what a client makes of the rows it stores, to train on:
            ``(ClientData) -> ClientData`` of as many rows, after any attack on what is
            stored. ``fs.data.windows(60)`` cuts a series into windows; ``test`` and
            ``root`` then hold windows, ``clients`` and ``local_test`` series. Default:
            the rows are the samples.
        byzantine_update: local training of the Byzantine clients, where it is another
            than ``client_update``: more epochs, another rate or loss. What they learn
            by it then passes through ``attack``.
        num_byzantine: how many of the N clients really are Byzantine (a rule's assumed
            number is its own argument), drawn by the key.
        byzantine_clients: ids of those that are, instead of a draw;
            ``num_byzantine`` then is their number.
        cohort_size: clients sampled, without replacement, each round. Default: all.
        server_optimizer: optax transformation fed with minus the aggregate. The default
            adds the aggregate as it is.
        client_chunk: at most this many clients are trained side by side, the rest one
            chunk after the other: a knob of speed and memory that does not change what
            is computed. Default: measured per backend, see ``default_client_chunk``.
        num_devices: devices that the clients' training and the evaluation are spread
            over; on CPU, cores (see ``fs.use_cores``). Default: all of this process.
        update_memory: bytes of the cohort's updates that a device may hold. Default:
            every device holds them all, ``4 k d`` bytes. With a limit, each holds those
            of its own clients; where these are more, clients are trained chunk by chunk
            and anew in every pass that the rule takes (see ``fedjax_sim.passes``).

    Raises:
        ValueError, TypeError: a setting that cannot work, before any training.

    Example:
        >>> import fedjax_sim as fs, jax, optax
        >>> data = fs.data.load("digits")
        >>> clients, root = fs.data.federate(
        ...     data, num_clients=20, partition=fs.data.iid())
        >>> sim = Simulation(
        ...     model=fs.models.mlp((8, 8, 1), hidden=()), clients=clients, root=root,
        ...     test=data.test, aggregator=fs.aggregators.fltrust(),
        ...     client_update=fs.local_sgd(optax.sgd(0.1), epochs=1, batch_size=10),
        ...     attack=fs.attacks.sign_flip(), num_byzantine=4)
        >>> state, history = sim.run(jax.random.key(0), num_rounds=4, eval_every=2)
        >>> history.round.tolist(), history.num_byzantine.tolist()
        ([1, 2, 3, 4], [4, 4, 4, 4])
    """

    model: Model
    clients: Clients | HostClients = dataclasses.field(repr=False)
    client_update: ClientUpdate
    aggregator: Aggregator
    test: Examples | None = dataclasses.field(default=None, repr=False)
    local_test: Clients | None = dataclasses.field(default=None, repr=False)
    root: Examples | None = dataclasses.field(default=None, repr=False)
    root_steps: int | None = None
    attack: UpdateAttack | None = None
    data_attack: DataAttack | None = None
    client_defense: ClientDefense | None = None
    make_samples: MakeSamples | None = None
    byzantine_update: ClientUpdate | None = None
    num_byzantine: int = 0
    byzantine_clients: tuple[int, ...] | None = None
    # None until __post_init__ has put the default in, so an int to every reader.
    cohort_size: int = None  # type: ignore[assignment]
    server_optimizer: optax.GradientTransformation = optax.sgd(1.0)
    client_chunk: int = None  # type: ignore[assignment]
    num_devices: int = None  # type: ignore[assignment]
    update_memory: int | None = None

    def __post_init__(self) -> None:
        checks.check_types(self)
        sizes = np.asarray(self.clients.sizes())
        total = len(sizes)
        cohort = total if self.cohort_size is None else self.cohort_size
        if not 1 <= cohort <= total:
            raise ValueError(
                f"cohort_size must be from 1 to the number of clients ({total}); got "
                f"{cohort}."
            )
        checks.check_byzantine_clients(self)
        if self.byzantine_clients is not None:
            object.__setattr__(self, "num_byzantine", len(self.byzantine_clients))
        checks.check_data(self, sizes, self.num_classes)
        self.client_update.validate(sizes)
        self.aggregator.validate(cohort)
        checks.check_attackers(self, cohort, self.num_classes)
        checks.check_byzantine_update(self, sizes)
        checks.check_root(self)
        checks.check_local_test(self)
        checks.check_plugins(self, cohort)
        # A frozen dataclass is filled in once, here.
        object.__setattr__(self, "cohort_size", cohort)
        if self.client_chunk is None:
            steps = self.client_update.num_steps(sizes)
            chunk = default_client_chunk(self.num_params, steps)
            object.__setattr__(self, "client_chunk", chunk)
        there = jax.device_count() if self.hosted else jax.local_device_count()
        if self.num_devices is None:
            object.__setattr__(self, "num_devices", there)
        elif self.hosted and self.num_devices != there:
            raise ValueError(
                f"num_devices={self.num_devices}, but clients joined by fs.hosts.share "
                f"lie on all {there} devices. Leave it out."
            )
        elif self.num_devices > there:
            raise ValueError(
                f"num_devices={self.num_devices}, but this process has {there} "
                f"{jax.default_backend()} device(s). Lower it; on CPU, make more with "
                "fs.use_cores."
            )
        checks.check_passes(self, cohort)
        if self.root is not None and self.root_steps is None:
            steps = round(float(np.mean(self.client_update.num_steps(sizes))))
            object.__setattr__(self, "root_steps", steps)

    @property
    def num_clients(self) -> int:
        return self.clients.num_clients

    @property
    def needs(self) -> frozenset[str]:
        attack = self.attack.needs if self.attack is not None else frozenset()
        return self.aggregator.needs | attack

    @property
    def needs_root(self) -> bool:
        """Whether rule or attack cannot do without the server's root dataset."""
        by_attack = self.attack is not None and self.attack.needs_root
        return by_attack or self.aggregator.needs_root

    @functools.cached_property
    def num_classes(self) -> int:
        """Outputs of the model, one a class."""
        return checks.num_outputs(self)

    @functools.cached_property
    def num_params(self) -> int:
        """``d``."""
        params = jax.eval_shape(self.model.init, jax.random.key(0))
        return sum(leaf.size for leaf in jax.tree.leaves(params))

    @property
    def in_passes(self) -> bool:
        """Whether nobody holds all updates of a round: see ``update_memory``."""
        if self.update_memory is None:
            return False
        whole = 4 * self.cohort_size * self.num_params
        return self.num_devices > 1 or whole > self.update_memory

    @property
    def hosted(self) -> bool:
        """Whether each process holds its own clients only: see ``fedjax_sim.hosts``."""
        return isinstance(self.clients, HostClients)

    @property
    def own_clients(self) -> Clients:
        """The clients of this process: all, unless each holds its own only."""
        clients = self.clients
        return clients.own if isinstance(clients, HostClients) else clients

    @functools.cached_property
    def padded(self) -> bool:
        """Whether clients differ in size, so that some rows are padding."""
        return self.clients.padded

    @functools.cached_property
    def alone(self) -> "Comparison":
        """This simulation as a comparison of one."""
        return Comparison({self.aggregator.name: self})

    def init(self, key: Array) -> RoundState:
        """The state before round 0. The same key gives every system the same start.

        Args:
            key: a typed PRNG key, from ``jax.random.key``; ``[s]`` keys for s seeds.
        """
        return self.alone.init(key)[self.aggregator.name]

    def fork(self, state: RoundState) -> RoundState:
        """The state in which this system takes over where another one stands.

        Parameters, key and round go on; the attackers are drawn from the key, and what
        belonged to the other rule, attack, optimizer and clients starts afresh.
        """

        name, root = self.aggregator.name, self.alone.arrays.root

        def one(params: Params, key: Array, round: Array) -> RoundState:
            return fresh_states({name: self}, params, key, round, root)[name]

        one = jax.vmap(one) if state.key.ndim else one
        forked = jax.jit(one)(state.params, state.key, state.round)
        checks.check_learned({name: self}, {name: forked})
        return forked

    def step(self, state: RoundState) -> tuple[RoundState, History]:
        """One round, evaluated; jit-compiled."""
        states, histories = self.alone.step({self.aggregator.name: state})
        return states[self.aggregator.name], histories[self.aggregator.name]

    def run(
        self,
        key: Array | None = None,
        *,
        num_rounds: int,
        eval_every: int = 1,
        state: RoundState | None = None,
    ) -> tuple[RoundState, History]:
        """Runs ``num_rounds`` rounds as one compiled scan.

        Args:
            key: starts a new run; ``[s]`` keys run s seeds side by side.
            num_rounds: how many rounds.
            eval_every: evaluate on the test set after every this many rounds, and after
                the last.
            state: goes on from here instead of starting anew. Give this or ``key``.

        Returns:
            The final state, and the history with a leading round axis (after the seed
            axis, if any), as NumPy arrays.

        Raises:
            ValueError: not exactly one of ``key`` and ``state``; a count below 1; a
                state of another system (see ``fork``).
        """
        name = self.aggregator.name
        states, histories = self.alone.run(
            key,
            num_rounds=num_rounds,
            eval_every=eval_every,
            states=None if state is None else {name: state},
        )
        return states[name], histories[name]


def default_client_chunk(num_params: int, steps: np.ndarray) -> int:
    """Clients trained side by side where the user does not say.

    On CPU parameters and activations of one client should stay in cache, so clients
    with a large model are trained one after the other, and small ones side by side to
    share the cost of starting an operation. Side by side, all wait for the one of the
    most local steps (``steps``, ``[N]``): clients too unequal are trained one after the
    other as well. On GPU: all of them.
    """
    if jax.default_backend() != "cpu":
        return 2**31 - 1
    unequal = np.max(steps) > MOST_UNEQUAL * np.mean(steps)
    return 1 if num_params > CACHE_PARAMS or unequal else 20


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
    """Several systems in one compiled program; see ``compare``.

    States and histories are dictionaries by system name.
    """

    systems: Mapping[str, Simulation]

    def __post_init__(self) -> None:
        if not self.systems:
            raise ValueError("compare needs at least one simulation; got none.")
        for name, sim in self.systems.items():
            if not isinstance(name, str) or not isinstance(sim, Simulation):
                raise TypeError(
                    "compare needs {name: Simulation}; got "
                    f"{{{name!r}: {type(sim).__name__}}}."
                )
        first_name, first = next(iter(self.systems.items()))
        for name, sim in self.systems.items():
            for field in SHARED:
                ours, theirs = getattr(sim, field), getattr(first, field)
                # Data and functions must be the same objects, counts the same number.
                if not (ours is theirs or (isinstance(ours, int) and ours == theirs)):
                    raise ValueError(
                        f"compare trains the clients of all systems together, so they "
                        f"must share {', '.join(SHARED)}; {name!r} and {first_name!r} "
                        f"differ in {field}. Pass the same object, or run them apart."
                    )
        roots = {
            (id(s.root), s.root_steps) for s in self.systems.values() if s.needs_root
        }
        if len(roots) > 1:
            raise ValueError(
                "systems that need a root dataset must share root and root_steps "
                "within one comparison. Pass the same ones, or run them apart."
            )

    @functools.cached_property
    def arrays(self) -> Arrays:
        """The data, on every device of the run."""
        first = next(iter(self.systems.values()))
        roots = [
            s.root for s in self.systems.values() if s.needs_root and s.root is not None
        ]
        root = None
        if roots:
            count = len(roots[0].targets)
            root = Clients(
                jnp.asarray(roots[0].inputs),
                jnp.asarray(roots[0].targets, jnp.int32),
                jnp.arange(count, dtype=jnp.int32)[None],
                jnp.ones((1, count), bool),
            )
        test = first.test
        if test is not None:
            test = Examples(
                jnp.asarray(test.inputs), jnp.asarray(test.targets, jnp.int32)
            )
        if isinstance(first.clients, HostClients):
            root, test = replicate((root, test), first.num_devices)
            return Arrays(spread(first.clients), root, test, None)
        return replicate(
            Arrays(first.clients, root, test, first.local_test), first.num_devices
        )

    @functools.cached_property
    def _fresh(self) -> "jax.stages.Wrapped":
        """``(params, key, root)`` -> every system's state before round 0."""

        def fresh(
            params: Params, key: Array, root: Clients | None
        ) -> dict[str, RoundState]:
            zero = jnp.zeros((), jnp.int32)
            return fresh_states(self.systems, params, key, zero, root)

        def of_seeds(
            params: Params, key: Array, root: Clients | None
        ) -> dict[str, RoundState]:
            each = jax.vmap(fresh, in_axes=(0, 0, None)) if key.ndim else fresh
            return each(params, key, root)

        return jax.jit(of_seeds)

    @functools.cached_property
    def _scan(self) -> "jax.stages.Wrapped":
        """``(states, arrays, start, last, num_rounds, eval_every)`` -> states, history.

        ``start`` and ``last`` are the first round and the run's end: arguments, so that
        segments of the same length share one program. They are not batched over seeds,
        which keeps the evaluation a real branch.
        """

        def scan(
            states: dict[str, RoundState],
            arrays: Arrays,
            start: Array,
            last: Array,
            num_rounds: int,
            eval_every: int,
        ) -> tuple[dict[str, RoundState], dict[str, History]]:
            def body(states: dict, index: Array) -> tuple[dict, dict]:
                done = index + 1
                evaluate_now = (done % eval_every == 0) | (done == last)
                return rounds.play_round(
                    self.systems, states, arrays, index, evaluate_now
                )

            def one(states: dict) -> tuple[dict, dict]:
                return jax.lax.scan(body, states, start + jnp.arange(num_rounds))

            seeds = next(iter(states.values())).key.ndim
            return (jax.vmap(one) if seeds else one)(states)

        return jax.jit(
            scan,
            static_argnames=("num_rounds", "eval_every"),
            donate_argnames="states",
        )

    def init(self, key: Array) -> dict[str, RoundState]:
        """Every system's state before round 0, from the same key (``[s]``: s seeds).

        Raises:
            TypeError: no key.
            ValueError: what a rule learned before the first round is not finite.
        """
        dtype: Any = getattr(key, "dtype", None)
        if not jnp.issubdtype(dtype, jax.dtypes.prng_key):
            raise TypeError(
                "expected a typed PRNG key, from jax.random.key(seed); got "
                f"{type(key).__name__} (jax.random.PRNGKey makes another kind)."
            )
        _ = self.arrays  # made here, and not while tracing
        state = size_in_bytes(jax.eval_shape(self._fresh_states, key))
        first = next(iter(self.systems.values()))
        memory.check_fits(Memory(0, state, 0, 0, 0), first)
        states = self._fresh_states(key)
        checks.check_learned(self.systems, states)
        return states

    def _fresh_states(self, key: Array) -> dict[str, RoundState]:
        first = next(iter(self.systems.values()))
        if first.hosted:
            key = replicate(key, first.num_devices)
        # By itself, so that comparisons of one model compile it once: drawing weights
        # takes a second or two to compile.
        draw = jax.jit(first.model.init)
        draw, fold = (
            (jax.vmap(draw), jax.vmap(jax.random.fold_in, in_axes=(0, None)))
            if key.ndim
            else (draw, jax.random.fold_in)
        )
        states: dict[str, RoundState] = self._fresh(
            draw(fold(key, INIT)), key, self.arrays.root
        )
        return states

    def trace(
        self,
        states: Mapping[str, RoundState],
        num_rounds: int,
        eval_every: int,
    ) -> "jax.stages.Traced":
        """The program of ``run``, traced, as JAX will compile it."""
        zero = jnp.zeros((), jnp.int32)
        return self._scan.trace(
            dict(states), self.arrays, zero, zero, num_rounds, eval_every
        )

    def memory(
        self,
        key: Array,
        *,
        num_rounds: int,
        eval_every: int = 1,
        donate: bool = False,
    ) -> Memory:
        """Bytes that ``run`` with the same arguments will take, told by its shapes.

        The parts of a ``fedjax_sim.memory.Memory``; ``.total`` is their sum, within
        about a fifth of what XLA then allots. Compiling takes some memory besides.
        """
        _ = self.arrays  # made here, and not while tracing
        states = jax.eval_shape(self._fresh_states, key)
        return memory.predict(self, states, num_rounds, eval_every, donate)

    def lower(
        self,
        states: dict[str, RoundState],
        num_rounds: int,
        eval_every: int,
    ) -> "jax.stages.Lowered":
        """The program of ``run``, lowered: ``.compile()`` it, or read its text."""
        zero = jnp.zeros((), jnp.int32)
        return self._scan.lower(
            self.placed(states), self.arrays, zero, zero, num_rounds, eval_every
        )

    def shapes(
        self, states: dict[str, RoundState], num_rounds: int, eval_every: int
    ) -> tuple[dict[str, RoundState], dict[str, History]]:
        """What ``run`` returns, as ``jax.ShapeDtypeStruct``, without running it."""
        zero = jnp.zeros((), jnp.int32)
        scan = functools.partial(
            self._scan, num_rounds=num_rounds, eval_every=eval_every
        )
        return jax.eval_shape(scan, states, self.arrays, zero, zero)

    def step(
        self, states: dict[str, RoundState]
    ) -> tuple[dict[str, RoundState], dict[str, History]]:
        """One round of every system, evaluated."""
        seeds = next(iter(states.values())).key.ndim
        states, histories = self.run(num_rounds=1, states=states)
        return states, jax.tree.map(lambda x: np.take(x, 0, axis=seeds), histories)

    def run(
        self,
        key: Array | None = None,
        *,
        num_rounds: int,
        eval_every: int = 1,
        states: Mapping[str, RoundState] | None = None,
        last: int | None = None,
        donate: bool = False,
        check_memory: bool = True,
    ) -> tuple[dict[str, RoundState], dict[str, History]]:
        """Runs every system for ``num_rounds`` rounds in one compiled scan.

        Args:
            key: starts a new run; ``[s]`` keys run s seeds side by side.
            num_rounds: how many rounds.
            eval_every: evaluate after every this many rounds, counted from the run's
                start, and after round ``last``.
            states: go on from here instead of starting anew. Give this or ``key``.
            last: the run's last round where this call is only a segment of it; by
                default this call's last.
            donate: let the run overwrite the arrays of ``states``, which are gone
                afterwards; otherwise it works on a copy of them. Where the state is
                large (a rule that remembers every client), this spares its memory.
            check_memory: refuse, before compiling, what would take more memory than is
                free (see ``memory``).

        Returns:
            States, and histories of NumPy arrays with a leading round axis (after the
            seed axis, if any).

        Raises:
            MemoryError: there is not enough; says what takes how much, and what to do.
        """
        check_count("num_rounds", num_rounds, 1)
        check_count("eval_every", eval_every, 1)
        if (key is None) == (states is None):
            raise ValueError("run needs exactly one of key= and a state to go on from.")
        if states is None:
            assert key is not None
            states = self.init(key)
        elif not donate:
            states = jax.tree.map(jnp.copy, dict(states))
        self._check_states(states)
        states = self.placed(states)
        if check_memory:
            self._check_memory(states, num_rounds, eval_every)
        start = int(np.ravel(next(iter(states.values())).round)[0])
        last = start + num_rounds if last is None else last
        if next(iter(self.systems.values())).hosted:
            self._check_alike(states, start, last, num_rounds, eval_every)
        states, histories = self._scan(
            states,
            self.arrays,
            jnp.int32(start),
            jnp.int32(last),
            num_rounds,
            eval_every,
        )
        # jax sorts dictionaries by key; give back the user's order.
        histories = jax.device_get(histories)
        return (
            {name: states[name] for name in self.systems},
            {name: histories[name] for name in self.systems},
        )

    def _check_memory(
        self, states: Mapping[str, RoundState], num_rounds: int, eval_every: int
    ) -> None:
        """Once for every program; the states are there already."""
        program = num_rounds, eval_every, next(iter(states.values())).key.shape
        if program in self._fitting:
            return
        needed = memory.predict(self, states, num_rounds, eval_every)
        there = needed._replace(data=0, state=0)
        memory.check_fits(
            there,
            next(iter(self.systems.values())),
            " With check_memory=False it is tried all the same.",
        )
        self._fitting.add(program)

    def _check_alike(
        self,
        states: Mapping[str, RoundState],
        start: int,
        last: int,
        num_rounds: int,
        eval_every: int,
    ) -> None:
        """All processes are about to run the same rounds of the same program."""
        keys = next(iter(states.values())).key
        program = num_rounds, eval_every, keys.shape
        if program not in self._texts:
            text = self.lower(dict(states), num_rounds, eval_every).as_text()
            self._texts[program] = hashlib.sha256(text.encode()).hexdigest()
        check_alike(
            {
                "their program (model, rule, attack, local training, rounds)": (
                    self._texts[program]
                ),
                "the round they are at": f"{start} of {last}",
                "their key": str(np.asarray(jax.random.key_data(keys)).tolist()),
            }
        )

    @functools.cached_property
    def _texts(self) -> dict[tuple[Any, ...], str]:
        """Hash of the text of every program that was compared: once is enough."""
        return {}

    @functools.cached_property
    def _fitting(self) -> set[tuple[Any, ...]]:
        """The programs that were found to fit into memory."""
        return set()

    def placed(self, states: Mapping[str, RoundState]) -> dict[str, RoundState]:
        """The states where the program of ``run`` wants them."""
        first = next(iter(self.systems.values()))
        return replicate(dict(states), first.num_devices)

    def _check_states(self, states: Mapping[str, RoundState]) -> None:
        if set(states) != set(self.systems):
            raise ValueError(
                f"states are of {sorted(states)}, but the systems are "
                f"{sorted(self.systems)}."
            )
        _ = self.arrays  # made here, and not while tracing below
        expected = jax.eval_shape(self.init, next(iter(states.values())).key)
        for name, state in states.items():
            want, got = (
                jax.tree.map(lambda x: (x.shape, x.dtype), tree)
                for tree in (expected[name], state)
            )
            if want != got:
                raise ValueError(
                    f"the state given for {name!r} is not one of this system: its "
                    "arrays differ in structure, shape or type. To take over from "
                    "another system, pass simulation.fork(state)."
                )


def compare(simulations: Mapping[str, Simulation]) -> Comparison:
    """Several systems side by side in one compiled program.

    With the same key they see the same initial parameters, attackers, cohorts and
    minibatches, so a difference between them is due to attack and defense alone. Their
    clients are trained as rows of one map. With several seeds, seeds vary everything
    but the partition.

    Args:
        simulations: by name. They must be built from the same ``clients``, ``model``,
            ``client_update`` and ``test`` objects and the same cohort size.

    Raises:
        ValueError: no simulation, or one that differs in what must be shared.

    Example:
        >>> import fedjax_sim as fs, jax, optax
        >>> data = fs.data.load("digits")
        >>> clients, _ = fs.data.federate(data, num_clients=20, partition=fs.data.iid())
        >>> shared = dict(
        ...     model=fs.models.mlp((8, 8, 1), hidden=()), clients=clients,
        ...     test=data.test,
        ...     client_update=fs.local_sgd(optax.sgd(0.1), epochs=1, batch_size=10))
        >>> fedavg = fs.aggregators.fedavg()
        >>> both = compare({
        ...     "clean": Simulation(aggregator=fedavg, **shared),
        ...     "attacked": Simulation(aggregator=fedavg, attack=fs.attacks.sign_flip(),
        ...                            num_byzantine=8, **shared)})
        >>> _, history = both.run(jax.random.key(0), num_rounds=10, eval_every=10)
        >>> bool(history["clean"].accuracy[-1] > history["attacked"].accuracy[-1])
        True
    """
    if not isinstance(simulations, Mapping):
        raise TypeError(
            f"compare needs {{name: Simulation}}; got {type(simulations).__name__}."
        )
    return Comparison(dict(simulations))
