"""What a ``Simulation`` checks before any training, so that nothing fails late."""

import os
import sysconfig
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_sim.hosts import HostClients
from fedjax_sim.models import Model
from fedjax_sim.passes import Rows
from fedjax_sim.pytrees import ravel_clients
from fedjax_sim.registry import check_count, check_type
from fedjax_sim.sharding import is_key
from fedjax_sim.types import (
    Aggregator,
    AggregatorInfo,
    ClientData,
    ClientDefense,
    ClientInfo,
    Clients,
    ClientUpdate,
    DataAttack,
    Examples,
    PyTree,
    RoundContext,
    UpdateAttack,
)

if TYPE_CHECKING:
    from fedjax_sim.simulation import Simulation
    from fedjax_sim.state import RoundState

INFO_TYPES = {"weights": jnp.floating, "flagged": jnp.bool_, "scores": jnp.floating}
# What ``cohorts.left_out`` counts, beside the info of a client defense.
SAMPLE_COUNTS = {"samples", "poisoned", "poisoned_left_out", "clean_left_out"}


def check_types(sim: "Simulation") -> None:
    """Catches a value in the wrong argument, which NamedTuples would let pass.

    Raises:
        TypeError: with the argument, the type expected and the type that came.
        ValueError: what several processes cannot have.
    """
    several = isinstance(sim.clients, HostClients) or jax.process_count() > 1
    expected = {
        "model": Model,
        "clients": HostClients if several else Clients,
        "client_update": ClientUpdate,
        "aggregator": Aggregator,
        "test": Examples,
        "local_test": Clients,
        "root": Examples,
        "attack": UpdateAttack,
        "data_attack": DataAttack,
        "client_defense": ClientDefense,
        "byzantine_update": ClientUpdate,
        "server_optimizer": optax.GradientTransformation,
    }
    needed = {"model", "clients", "client_update", "aggregator", "server_optimizer"}
    for field, kind in expected.items():
        value = getattr(sim, field)
        if value is None and field not in needed:
            continue
        hint = ""
        if isinstance(value, DataAttack | UpdateAttack):
            right = "data_attack" if isinstance(value, DataAttack) else "attack"
            hint = f"Pass it as {right}=."
        if kind is HostClients:
            hint = "Several processes join their own clients by fs.hosts.share."
        check_type(field, value, kind, hint)
    for field in ("client_defense", "local_test"):
        if sim.hosted and getattr(sim, field) is not None:
            raise ValueError(
                f"{field} looks at the samples of clients of every process, and "
                "clients joined by fs.hosts.share stay where they are. Leave it out, "
                "or run in one process."
            )
    check_count("num_byzantine", sim.num_byzantine, 0)
    for field in ("cohort_size", "root_steps", "client_chunk", "num_devices"):
        value = getattr(sim, field)
        if value is not None:
            check_count(field, value, 1)


def check_data(sim: "Simulation", sizes: np.ndarray, num_outputs: int) -> None:
    """Every client has samples, and every label is one the model can give.

    Raises:
        ValueError: with the data set and the numbers.
    """
    if sizes.min() < 1:
        empty = np.flatnonzero(sizes == 0)
        raise ValueError(
            f"{len(empty)} of {len(sizes)} clients have no samples (the first is "
            f"client {empty[0]}): they cannot train. Use fewer clients or a partition "
            "with min_size."
        )
    multilabel = np.ndim(sim.own_clients.targets) == 2
    made = one_sample(sim)
    for name in ("clients", "test", "local_test", "root"):
        data = sim.own_clients if name == "clients" else getattr(sim, name)
        if data is None:
            continue
        targets = np.asarray(data.targets)
        if len(targets) != len(data.inputs) or len(targets) == 0:
            raise ValueError(
                f"{name} must have as many targets as inputs, and at least one; got "
                f"{len(data.inputs)} inputs and {len(targets)} targets."
            )
        stored = name in ("clients", "local_test")
        like = sim.own_clients.inputs if stored else made.inputs
        if np.shape(data.inputs)[1:] != np.shape(like)[1:]:
            whose = "inputs like the clients'"
            if sim.make_samples is not None and not stored:
                whose = "inputs like what make_samples makes of a client's"
            raise ValueError(
                f"{name} must have {whose}, of shape {np.shape(like)[1:]} each; got "
                f"{np.shape(data.inputs)[1:]}."
            )
        if multilabel != (targets.ndim == 2):
            raise ValueError(
                f"{name} must have targets of as many dimensions as the clients; got "
                f"shape {targets.shape} and {np.shape(sim.own_clients.targets)}."
            )
        integers = np.issubdtype(targets.dtype, np.integer)
        if multilabel:
            binary = integers and targets.min() >= 0 and targets.max() <= 1
            if not binary or targets.shape[1] != num_outputs:
                raise ValueError(
                    f"{name} has targets of shape {targets.shape} and type "
                    f"{targets.dtype}: of a multilabel task they must be integers 0 "
                    f"and 1, one for each of the model's {num_outputs} outputs."
                )
        elif integers and not (targets.min() >= 0 and targets.max() < num_outputs):
            raise ValueError(
                f"{name} has labels from {targets.min()} to {targets.max()}, but the "
                f"model has {num_outputs} outputs. Give the model num_classes="
                f"{targets.max() + 1}, or number the classes from 0."
            )
    _check_loss(sim, num_outputs)


def _check_loss(sim: "Simulation", num_outputs: int) -> None:
    """The model's loss gives one number a sample on these targets."""
    targets = sim.own_clients.targets[:2]
    outputs = jax.ShapeDtypeStruct((len(targets), num_outputs), jnp.float32)
    got: Any
    try:
        got = jax.eval_shape(sim.model.loss, outputs, targets).shape
    except Exception as error:
        got = f"{type(error).__name__}: {str(error)[:200]}"
    if got != (len(targets),):
        raise ValueError(
            f"the model's loss must give one number a sample, here ({len(targets)},), "
            f"for outputs {outputs.shape} and targets {targets.shape}; got {got}. For "
            "multilabel data use fs.models.for_task(model, 'multilabel')."
        )


def check_local_test(sim: "Simulation") -> None:
    """Every client has samples of its own to evaluate on, and trains on none of them.

    Raises:
        ValueError: other clients than those of the run, somebody without samples, or
            samples on which the client also trains.
    """
    held_out = sim.local_test
    if held_out is None:
        return
    ours = sim.own_clients
    if held_out.num_clients != ours.num_clients:
        raise ValueError(
            f"local_test must have the clients of the run, {ours.num_clients}; got "
            f"{held_out.num_clients}. Take both from fs.data.hold_out."
        )
    sizes = np.asarray(held_out.sizes())
    if sizes.min() < 1:
        raise ValueError(
            f"local_test has no samples for {int((sizes < 1).sum())} clients, the "
            f"first of them client {int(np.argmin(sizes))}. Hold out a larger share."
        )
    rows = np.asarray(held_out.indices)[np.asarray(held_out.mask)]
    if rows.min() < 0 or rows.max() >= len(held_out.targets):
        raise ValueError(
            f"local_test has indices from {rows.min()} to {rows.max()}, but its pool "
            f"has {len(held_out.targets)} rows, numbered from 0. Take it from "
            "fs.data.hold_out."
        )
    if held_out.inputs is not ours.inputs:
        return
    pool = len(ours.targets)

    def owned(clients: Clients) -> np.ndarray:
        client = np.arange(clients.num_clients)[:, None]
        return (client * pool + np.asarray(clients.indices))[np.asarray(clients.mask)]

    both = np.intersect1d(owned(held_out), owned(ours))
    if both.size:
        raise ValueError(
            f"{both.size} samples of local_test are also trained on by their client, "
            f"the first is row {both[0] % pool} of client {both[0] // pool}. Pass the "
            "first of the two that fs.data.hold_out returns as clients=."
        )


def num_outputs(sim: "Simulation") -> int:
    """Size of the model's output on the clients' inputs.

    Raises:
        ValueError: the model cannot take inputs of that shape.
    """
    inputs = one_sample(sim).inputs

    def outputs(key: jax.Array, inputs: jax.Array) -> jax.Array:
        return sim.model.apply(sim.model.init(key), inputs)

    try:
        return int(jax.eval_shape(outputs, jax.random.key(0), inputs).shape[-1])
    except Exception as error:
        raise ValueError(
            f"the model cannot take the clients' inputs of shape {inputs.shape[1:]} "
            f"({type(error).__name__}: {str(error)[:200]}). Build it with "
            f"input_shape={inputs.shape[1:]}."
        ) from error


def one_sample(sim: "Simulation") -> ClientData:
    """Shapes of one sample of a client, as the model sees it.

    Raises:
        TypeError: ``make_samples`` does not return as many rows of ``ClientData``.
    """

    def one_client() -> ClientData:
        data = sim.own_clients.gather(jnp.zeros((), jnp.int32))
        if sim.make_samples is None:
            return data
        with _blamed("make_samples"):
            made = sim.make_samples(data)
        rows = data.targets.shape[:1]
        if not isinstance(made, ClientData) or made.mask is None:
            raise TypeError(
                f"make_samples must return ClientData with a mask; got {made!r:.200}."
            )
        for field, value in made._asdict().items():
            if value.shape[:1] != rows:
                raise TypeError(
                    f"make_samples must return as many rows as the client has, {rows}; "
                    f"got {field} of shape {value.shape}."
                )
        _check_like("make_samples: targets", made.targets, data.targets)
        _check_like("make_samples: mask", made.mask, data.mask)
        return made

    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype),
        jax.eval_shape(one_client),
    )


def check_byzantine_clients(sim: "Simulation") -> None:
    """The clients named as Byzantine are some of the run's, each once.

    Raises:
        TypeError: no tuple of integers.
        ValueError: an id that there is not or that comes twice, or another number.
    """
    ids = sim.byzantine_clients
    if ids is None:
        return
    check_type("byzantine_clients", ids, tuple, "Pass ids, such as (1,).")
    total = sim.clients.num_clients
    for id in ids:
        if check_count("byzantine_clients", id, 0) >= total:
            raise ValueError(
                f"byzantine_clients must be ids from 0 to {total - 1}; got {id}."
            )
    if len(set(ids)) < len(ids):
        raise ValueError(f"byzantine_clients names a client twice: {ids}.")
    if sim.num_byzantine not in (0, len(ids)):
        raise ValueError(
            f"byzantine_clients names {len(ids)} clients, but num_byzantine is "
            f"{sim.num_byzantine}. Drop num_byzantine."
        )


def check_attackers(sim: "Simulation", cohort: int, num_classes: int) -> None:
    """The attackers and their attacks belong together.

    Raises:
        ValueError: attackers without an attack or the reverse, or too many of them.
    """
    total = sim.clients.num_clients
    if sim.num_byzantine >= total:
        raise ValueError(
            f"num_byzantine must be from 0 to {total - 1} for {total} clients, so that "
            f"somebody is honest; got {sim.num_byzantine}."
        )
    attacks = [a.name for a in (sim.attack, sim.data_attack) if a is not None]
    if sim.byzantine_update is not None:
        attacks.append("byzantine_update")
    if sim.num_byzantine and not attacks:
        raise ValueError(
            f"num_byzantine={sim.num_byzantine}, but there is no attack: Byzantine "
            "clients would be honest. Give attack=, data_attack= or byzantine_update=, "
            "or drop num_byzantine."
        )
    if attacks and not sim.num_byzantine:
        raise ValueError(
            f"there is an attack ({attacks[0]}), but num_byzantine is 0: nobody would "
            "use it. Give num_byzantine=, or drop the attack."
        )
    if sim.attack is not None:
        sim.attack.validate(cohort, round(cohort * sim.num_byzantine / total))
    if sim.data_attack is not None:
        sim.data_attack.validate(num_classes)


def check_byzantine_update(sim: "Simulation", sizes: np.ndarray) -> None:
    """The attackers' own training fits every client and returns what honest ones do.

    Raises:
        TypeError: other shapes than those of the honest training.
        ValueError: sizes it cannot train.
    """
    update = sim.byzantine_update
    if update is None:
        return
    try:
        update.validate(sizes)
    except ValueError as error:
        raise ValueError(f"byzantine_update: {error}") from None

    def one_client(key: jax.Array) -> None:
        params, (data, context) = sim.model.init(key), _one_client(sim, samples=True)
        state = sim.client_update.init(params)
        _check_like("byzantine_update: client state", update.init(params), state)
        out: Any = update.apply(sim.model, key, params, data, state, context.round)
        _check_tuple("byzantine_update", out, ("update", "state", "ClientInfo"))
        _check_like("byzantine_update: update", out[0], params)
        _check_like("byzantine_update: client state", out[1], state)
        _check_like("byzantine_update: info", out[2], ClientInfo(jnp.zeros(())))

    jax.eval_shape(one_client, jax.random.key(0))


def _one_client(sim: "Simulation", samples: bool) -> tuple[ClientData, RoundContext]:
    """What a client stores, or its ``samples``, and a data attack's context."""
    zero = jnp.zeros((), jnp.int32)
    data = sim.own_clients.gather(zero)
    if not sim.padded:
        data = data._replace(mask=None)
    if samples and sim.make_samples is not None:
        data = sim.make_samples(data)
    return data, RoundContext(round=zero, client_ids=zero, rank=zero)


def check_root(sim: "Simulation") -> None:
    """The root dataset is there when it is needed, and can be trained on.

    Raises:
        ValueError: it is missing, smaller than a batch, or holds a NaN or infinity.
    """
    if sim.root is None:
        if sim.needs_root:
            name = sim.aggregator.name
            if sim.attack is not None and not sim.aggregator.needs_root:
                name = sim.attack.name
            raise ValueError(
                f"{name} needs a root dataset; got root=None. Pass root=, from "
                "fs.data.federate(..., root_size=100)."
            )
        if sim.root_steps is not None:
            raise ValueError(
                f"root_steps={sim.root_steps}, but there is no root dataset. Pass "
                "root=, or drop root_steps (root_steps=None, where "
                "dataclasses.replace drops the root)."
            )
        return
    inputs = np.asarray(sim.root.inputs)
    if not np.isfinite(inputs.sum(dtype=np.float64)):
        finite = np.isfinite(inputs.reshape(len(inputs), -1)).all(axis=1)
        bad = np.flatnonzero(~finite)
        raise ValueError(
            f"{len(bad)} of {len(inputs)} samples of the root dataset hold a NaN or "
            f"infinity, the first is sample {bad[0]}: the server would learn nothing "
            "from them. Leave them out."
        )
    try:
        sim.client_update.validate(np.array([len(sim.root.targets)]))
    except ValueError as error:
        raise ValueError(
            f"the root dataset of {len(sim.root.targets)} samples cannot be trained on "
            f"as a client is: {error}"
        ) from None


def check_learned(
    sims: Mapping[str, "Simulation"], states: Mapping[str, "RoundState"]
) -> None:
    """What rules have learned before the first round is finite.

    Raises:
        ValueError: a rule's own training, or that on the root dataset, diverged.
    """
    for name, sim in sims.items():
        learned = states[name].aggregator
        if sim.aggregator.pretrain is None:
            continue
        for path, leaf in jax.tree_util.tree_leaves_with_path(learned):
            if isinstance(leaf, jax.core.Tracer):  # only shapes are asked for
                return
            # Keys and integers always are.
            floats = jnp.issubdtype(leaf.dtype, jnp.floating)
            if floats and not np.isfinite(leaf).all():
                raise ValueError(
                    f"{sim.aggregator.name} ({name}) has learned nothing before the "
                    f"first round: {jax.tree_util.keystr(path)} of its state holds a "
                    "NaN or infinity. Lower the rate of the clients' training, with "
                    "which the server trains too, or the rule's learning_rate."
                )


def check_plugins(sim: "Simulation", cohort: int) -> None:
    """Attack and rule keep their contracts on this model and cohort, by shapes alone.

    Raises:
        TypeError: what they return has not the form ``fedjax_sim.types`` asks for.
        ValueError: they need something a round does not have.
    """
    known = set(RoundContext._fields)
    for plugin, allowed in (
        (sim.aggregator, known - {"byzantine", "aggregate", "rank", "features"}),
        (sim.attack, known - {"rank", "features"}),
    ):
        if plugin is None:
            continue
        unknown = plugin.needs - allowed
        if unknown:
            raise ValueError(
                f"{plugin.name} needs {sorted(unknown)}, which a round does not give "
                f"it. It gives {sorted(allowed)}."
            )

    def one_round(key: jax.Array) -> None:
        params, updates, context = _example_round(sim, cohort, key)
        if sim.attack is not None:
            who = f"the attack {sim.attack.name}"
            with _blamed(who):
                state = sim.attack.init(params, sim.num_clients)
                attacked: Any = sim.attack.apply(
                    updates, state, context._replace(aggregate=lambda updates: params)
                )
            _check_tuple(who, attacked, ("updates", "state"))
            _check_like(f"{who}: updates", attacked[0], updates)
            _check_like(f"{who}: state", attacked[1], state)
        who = f"the aggregator {sim.aggregator.name}"
        with _blamed(who):
            if sim.aggregator.pretrain is None:
                state = sim.aggregator.init(params, sim.num_clients)
            else:
                state = sim.aggregator.pretrain(params, key, lambda key, w: w)
            out: Any = sim.aggregator.apply(
                updates, state, context._replace(byzantine=None)
            )
        _check_aggregation(who, out, params, state, cohort)

    jax.eval_shape(one_round, jax.random.key(0))
    if sim.data_attack is not None:
        _check_data_attack(sim, sim.data_attack)
    if sim.client_defense is not None:
        _check_client_defense(sim, sim.client_defense, cohort)


def _example_round(
    sim: "Simulation", cohort: int, key: jax.Array
) -> tuple[PyTree, PyTree, RoundContext]:
    """Parameters, updates and context of a round, of which only the shapes count."""
    params, zero = sim.model.init(key), jnp.zeros(())
    updates = jax.tree.map(lambda p: jnp.broadcast_to(p, (cohort, *p.shape)), params)
    context = RoundContext(
        key=key,
        params=params,
        previous_params=params,
        previous_aggregate=params,
        round=jnp.zeros((), jnp.int32),
        client_ids=jnp.arange(cohort, dtype=jnp.int32),
        num_samples=jnp.ones(cohort),
        mask=jnp.ones(cohort, bool),
        root_update=params if sim.root is not None else None,
        root_scores=None if sim.root is None else lambda params: (zero, zero),
        byzantine=jnp.zeros(cohort, bool),
    )
    return params, updates, context


def _check_aggregation(
    who: str, out: Any, aggregate: PyTree, state: PyTree, cohort: int
) -> None:
    """What a rule returns has the form that ``Aggregator`` asks for."""
    _check_tuple(who, out, ("aggregate", "state", "AggregatorInfo"))
    _check_like(f"{who}: aggregate", out[0], aggregate)
    _check_like(f"{who}: state", out[1], state)
    if not isinstance(out[2], AggregatorInfo):
        raise TypeError(
            f"{who} must return an AggregatorInfo third; got {type(out[2]).__name__}."
        )
    fields = {**out[2]._asdict(), **out[2].details}
    del fields["details"]
    for name, value in fields.items():
        if jnp.shape(value) != (cohort,):
            raise TypeError(
                f"{who}: info {name} must have shape ({cohort},), one value a client; "
                f"got {jnp.shape(value)}."
            )
    for name, kind in INFO_TYPES.items():
        dtype = jnp.result_type(fields[name])
        if not jnp.issubdtype(dtype, kind):
            raise TypeError(
                f"{who}: info {name} must be of type {kind.__name__}; got {dtype}."
            )


def check_passes(sim: "Simulation", cohort: int) -> None:
    """A round whose updates are held by no one can be played.

    Raises:
        ValueError: rule or attack has no such form, or one update is too much.
        TypeError: what that form returns is not as ``fedjax_sim.types`` asks for.
    """
    budget, in_passes = sim.update_memory, sim.aggregator.in_passes
    if budget is None:
        return
    check_count("update_memory (bytes)", budget, 1)
    if not sim.in_passes:
        return
    whole, one = 4 * cohort * sim.num_params, 4 * sim.num_params
    given = f"update_memory={budget:,} bytes"
    if sim.num_devices > 1:
        given += f" on each of {sim.num_devices} devices"
    why = (
        f"with {given} no device holds all updates of a round ({cohort} clients of "
        f"{sim.num_params:,} parameters: {whole:,} bytes)"
    )
    way_out = (
        "leave update_memory out to hold them all, on every device; or take a smaller "
        "cohort_size"
    )
    if budget < one:
        raise ValueError(
            f"update_memory must hold at least one update of {sim.num_params:,} "
            f"parameters, {one:,} bytes; got {budget:,}. Raise it."
        )
    if sim.local_test is not None:
        raise ValueError(
            f"{why}, but local_test asks for the model of every client. Leave "
            f"local_test out, or {way_out}."
        )
    if in_passes is None:
        raise ValueError(
            f"{why}, and {sim.aggregator.name} has no form that sees them in passes. "
            f"{way_out.capitalize()}; or use a rule that has one, such as fedavg, "
            "fltrust, multi_krum, dual_system, median (docs/scale.md has them all)."
        )
    attack = sim.attack
    if attack is not None and attack.in_passes is None:

        def memory(key: jax.Array) -> PyTree:
            return attack.init(sim.model.init(key), sim.num_clients)

        remembers = bool(jax.tree.leaves(jax.eval_shape(memory, jax.random.key(0))))
        if attack.knowledge != "own" or (remembers and not attack.strength):
            raise ValueError(
                f"{why}, and the attack {attack.name} ({attack.knowledge}) has no form "
                f"that sees them in passes. {way_out.capitalize()}; or use an attack "
                "that knows its own update only, such as sign_flip, or alie, ipm, "
                "gaussian or model_replacement."
            )

    def one_round(key: jax.Array) -> None:
        params, updates, context = _example_round(sim, cohort, key)
        U, places = ravel_clients(updates)[0], jnp.arange(cohort)
        rows = Rows(
            lambda places: (U[places], ()),
            *U.shape,
            chunk=cohort,
            memory=budget,
            mask=context.mask,
        )
        if attack is not None and attack.in_passes is not None:
            who = f"the attack {attack.name}, in passes"
            with _blamed(who):
                memory = attack.init(params, sim.num_clients)
                change = attack.in_passes(rows, memory, context)
                changed = change(U, places)
            _check_like(f"{who}: updates", changed, U)
            rows = rows.then(change)
        who = f"the aggregator {sim.aggregator.name}, in passes"
        with _blamed(who):
            state = sim.aggregator.init(params, sim.num_clients)
            out: Any = in_passes(rows, state, context._replace(byzantine=None))
            _ = rows.present  # asked for by the round as well
        _check_aggregation(who, out, U[0], state, cohort)

    jax.eval_shape(one_round, jax.random.key(0))


def _check_client_defense(
    sim: "Simulation", defense: ClientDefense, cohort: int
) -> None:
    """The defense suits the data and keeps its contract, by shapes alone."""
    who = f"the client defense {defense.name}"
    sizes, targets = (
        np.asarray(sim.clients.sizes()),
        np.asarray(sim.own_clients.targets),
    )
    for field in ("init", "apply", "validate"):
        if not callable(getattr(defense, field)):
            raise TypeError(
                f"{who}: {field} must be a function; got {getattr(defense, field)!r}."
            )
    if not isinstance(defense.needs, frozenset | set):
        raise TypeError(
            f"{who}: needs must be a set of names, such as frozenset({{'key'}}); got "
            f"{defense.needs!r}."
        )
    defense.validate(sizes, targets, sim.num_classes)
    given = {"key", "params", "round", "client_ids", "features"}
    if defense.needs - given:
        raise ValueError(
            f"{who} needs {sorted(defense.needs - given)}, which it is not given. It "
            f"is given {sorted(given)}."
        )
    features = sim.model.features
    if features is None and "features" in defense.needs:
        raise ValueError(
            f"{who} needs a model with shallow features; this one has none. Name a "
            "layer: fs.Model.from_linen(module, input_shape, features='Conv_0'), or "
            "give model._replace(features=) a function (params, inputs) -> [b, h]."
        )

    def gather(id: jax.Array) -> ClientData:
        data = sim.own_clients.gather(id)
        return data if sim.make_samples is None else sim.make_samples(data)

    def one_round(key: jax.Array) -> None:
        params = sim.model.init(key)
        context = RoundContext(
            key=key,
            params=params,
            round=jnp.zeros((), jnp.int32),
            client_ids=jnp.arange(cohort, dtype=jnp.int32),
            features=features and (lambda inputs: features(params, inputs)),
        )
        with _blamed(who):
            state = defense.init(sim.own_clients.mask)
            if any(is_key(leaf) for leaf in jax.tree.leaves(state)):
                raise TypeError(
                    f"{who}: state must hold no PRNG keys. Take context.key, which is "
                    "another in every round."
                )
            out: Any = defense.apply(gather, state, context)
        _check_tuple(who, out, ("keep", "state", "info"))
        keep = jnp.zeros((cohort, sim.own_clients.mask.shape[1]), bool)
        _check_like(f"{who}: keep", out[0], keep)
        _check_like(f"{who}: state", out[1], state)
        if not isinstance(out[2], Mapping):
            raise TypeError(
                f"{who}: info must be a dictionary of arrays by name; got "
                f"{type(out[2]).__name__}."
            )
        for name, value in out[2].items():
            if not isinstance(name, str):
                raise TypeError(f"{who}: info must have names as keys; got {name!r}.")
            if name in SAMPLE_COUNTS:
                raise TypeError(
                    f"{who}: info {name} is what the engine reports itself, with "
                    f"{', '.join(sorted(SAMPLE_COUNTS - {name}))}. Choose another name."
                )
            if jnp.shape(value) != (cohort,):
                raise TypeError(
                    f"{who}: info {name} must have shape ({cohort},), one value a "
                    f"client; got {jnp.shape(value)}."
                )
            if not jnp.isrealobj(value):
                raise TypeError(
                    f"{who}: info {name} must be real numbers; got "
                    f"{jnp.result_type(value)}."
                )

    jax.eval_shape(one_round, jax.random.key(0))


def _check_data_attack(sim: "Simulation", attack: DataAttack) -> None:
    """Poison and trigger keep the form of the data and fit it, by shapes alone."""
    who = f"the data attack {attack.name}"

    def one_client(key: jax.Array, held_out: Clients | None) -> None:
        data, context = _one_client(sim, samples=False)
        stored = "clients" if sim.local_test is not None else ""
        if held_out is not None:
            data = held_out.gather(jnp.zeros((), jnp.int32))
            stored = "local_test, what clients hold out for evaluation"
        with _blamed(who, stored):
            poisoned: Any = attack.poison(key, data, context)
        if not isinstance(poisoned, ClientData):
            raise TypeError(
                f"{who} must return ClientData; got {type(poisoned).__name__}."
            )
        _check_like(f"{who}: data", poisoned, data)

    def evaluation(inputs: jax.Array, targets: jax.Array) -> None:
        assert attack.trigger is not None
        with _blamed(who):
            out: Any = attack.trigger(inputs, targets)
        _check_tuple(f"{who}: trigger", out, ("inputs", "wanted", "counts"))
        _check_like(f"{who}: trigger's inputs", out[0], inputs)
        one = jnp.zeros(len(targets), targets.dtype)
        _check_like(f"{who}: trigger's wanted", out[1], one)
        _check_like(f"{who}: trigger's counts", out[2], one.astype(bool))

    jax.eval_shape(one_client, jax.random.key(0), None)
    if sim.local_test is not None:
        jax.eval_shape(one_client, jax.random.key(0), sim.local_test)
    if attack.trigger is not None and sim.test is not None:
        inputs = jnp.asarray(sim.test.inputs[:1])
        targets = jnp.asarray(sim.test.targets[:1], jnp.int32)
        jax.eval_shape(evaluation, inputs, targets)


@contextmanager
def _blamed(who: str, data: str = "") -> Iterator[None]:
    """Says in whose code, and where, a function of the user's own failed.

    Also on which ``data``, where there are several.
    """
    try:
        yield
    except (ValueError, TypeError) as error:
        paths = sysconfig.get_paths()
        folders = (Path(__file__).parent, paths["stdlib"], paths["purelib"])
        others = tuple(f"{folder}{os.sep}" for folder in folders)
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if not frame.filename.startswith(others)]
        # Some errors of JAX cannot be made anew; they keep their own traceback.
        if type(error) not in (ValueError, TypeError) or not (own or data):
            raise
        said = f"{data}: {error}" if data else f"{error}"
        if own:
            said = f"{who} failed at {own[-1].filename}, line {own[-1].lineno}: {said}"
        raise type(error)(said) from error


def _check_tuple(who: str, out: Any, names: tuple[str, ...]) -> None:
    if not isinstance(out, tuple) or len(out) != len(names):
        raise TypeError(
            f"{who} must return ({', '.join(names)}); got {type(out).__name__}"
            f"{f' of length {len(out)}' if isinstance(out, tuple) else ''}."
        )


def _check_like(what: str, got: PyTree, expected: PyTree) -> None:
    def form(tree: PyTree) -> Any:
        return jax.tree.map(lambda x: f"{jnp.result_type(x)}{jnp.shape(x)}", tree)

    if form(got) != form(expected):
        raise TypeError(
            f"{what} must have the structure, shapes and types {form(expected)}; got "
            f"{form(got)}."
        )
