"""Local training of the cohorts of several systems, as rows of one chunked map.

All systems of a comparison share model, clients and local training, so the clients of
every system, and of every seed, are trained by one compiled loop.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from fedjax_sim.models import Model
from fedjax_sim.pytrees import ravel_clients
from fedjax_sim.sharding import over_devices
from fedjax_sim.state import (
    POISON,
    ROOT,
    TRAIN,
    Arrays,
    RoundState,
    draw_cohort,
    stream,
)
from fedjax_sim.types import (
    Array,
    ClientInfo,
    Clients,
    ClientUpdate,
    DataAttack,
    Params,
    PyTree,
    RoundContext,
)

if TYPE_CHECKING:
    from fedjax_sim.simulation import Simulation


class Row(NamedTuple):
    """One client to train: everything but the shared data and the parameters.

    ``system`` picks its starting point from the stacked parameters; ``poison`` is the
    position of its data attack, -1 for an honest client, and ``rank`` its number among
    the attackers.
    """

    system: Array
    client_id: Array
    key: Array
    poison_key: Array
    poison: Array
    rank: Array
    round: Array
    state: PyTree


def make_trainer(
    model: Model,
    update: ClientUpdate,
    data_attacks: tuple[DataAttack, ...],
    padded: bool,
    chunk: int,
    num_devices: int = 1,
) -> Any:
    """``(clients, params [S, ...], rows [R]) -> (updates [R, d], states, info)``.

    Each device takes its part of the rows. There ``chunk`` rows at a time are vmapped,
    chunks run one after the other. vmapping the trainer itself (over seeds) only adds
    rows, so seeds run at the speed of clients.
    """

    def train_one(clients: Clients, params: Params, row: Row) -> Any:
        data = clients.gather(row.client_id)
        if not padded:
            data = data._replace(mask=None)
        context = RoundContext(round=row.round, client_ids=row.client_id, rank=row.rank)
        for position, attack in enumerate(data_attacks):
            poisoned = attack.poison(row.poison_key, data, context)
            chosen = row.poison == position
            data = jax.tree.map(
                lambda a, b, c=chosen: jnp.where(c, a, b), poisoned, data
            )
        start = jax.tree.map(lambda x: x[row.system], params)
        return update.apply(model, row.key, start, data, row.state, row.round)

    def train_rows(shared: tuple[Clients, Params], rows: Row) -> Any:
        clients, params = shared
        count = rows.client_id.shape[0]
        size = largest_divisor(count, chunk)

        def one(row: Row) -> Any:
            return train_one(clients, params, row)

        if size == count:
            out = jax.vmap(one)(rows)
        elif size == 1:
            out = jax.lax.map(one, rows)
        else:
            split = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), rows)
            out = jax.lax.map(jax.vmap(one), split)
            out = jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), out)
        updates, states, info = out
        return ravel_clients(updates)[0], states, info

    spread = over_devices(train_rows, num_devices)

    @custom_vmap
    def train(clients: Clients, params: Params, rows: Row) -> Any:
        return spread((clients, params), rows)

    @train.def_vmap
    def train_seeds(
        seeds: int, batched: Any, clients: Clients, params: Params, rows: Row
    ) -> Any:
        clients_batched, params_batched, rows_batched = batched
        if any(jax.tree.leaves(clients_batched)):
            raise NotImplementedError("the clients' data cannot differ between seeds")

        def spread(x: Array, is_batched: bool) -> Array:
            return x if is_batched else jnp.broadcast_to(x, (seeds, *x.shape))

        params = jax.tree.map(spread, params, params_batched)
        rows = jax.tree.map(spread, rows, rows_batched)
        systems = jax.tree.leaves(params)[0].shape[1]
        offset = systems * jnp.arange(seeds, dtype=rows.system.dtype)
        rows = rows._replace(system=rows.system + offset[:, None])
        count = rows.client_id.shape[1]
        out = train(
            clients,
            jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), params),
            jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows),
        )
        out = jax.tree.map(lambda x: x.reshape(seeds, count, *x.shape[1:]), out)
        return out, jax.tree.map(lambda _: True, out)

    return train


def largest_divisor(count: int, limit: int) -> int:
    """The largest divisor of ``count`` up to ``limit``: chunks without a remainder."""
    return next(size for size in range(min(count, limit), 0, -1) if count % size == 0)


class Trained(NamedTuple):
    """A trained cohort: ids ``[k]``, and what its clients gave back, row by row.

    ``updates`` is one matrix ``[k, d]``: the compiler then has one array to pass on,
    attack, check and aggregate, and not one for every array of the model.
    """

    ids: Array
    updates: Array
    states: PyTree
    info: ClientInfo


def train_cohorts(
    sims: Mapping[str, "Simulation"], states: Mapping[str, RoundState], arrays: Arrays
) -> dict[str, Trained]:
    """Trains every system's cohort."""
    first = next(iter(sims.values()))
    attacks = tuple({s.data_attack: None for s in sims.values() if s.data_attack})
    rows_of = {}
    for position, (name, sim) in enumerate(sims.items()):
        state = states[name]
        ids = draw_cohort(sim, state)
        fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
        which = attacks.index(sim.data_attack) if sim.data_attack else -1
        rows_of[name] = Row(
            system=jnp.full(ids.shape, position, jnp.int32),
            client_id=ids,
            key=fold(stream(state, TRAIN), ids),
            # Not folded by round: an attacker poisons its data once and for all.
            poison_key=fold(jax.random.fold_in(state.key, POISON), ids),
            poison=jnp.where(state.byzantine[ids], which, -1),
            rank=(jnp.cumsum(state.byzantine) - 1)[ids],
            round=jnp.broadcast_to(state.round, ids.shape),
            state=jax.tree.map(lambda x, i=ids: x[i], state.clients),
        )
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *(states[n].params for n in sims))

    def train(update: ClientUpdate, rows: dict[str, Row]) -> dict[str, Any]:
        trainer = make_trainer(
            first.model,
            update,
            attacks,
            first.padded,
            first.client_chunk,
            first.num_devices,
        )
        joined = jax.tree.map(lambda *x: jnp.concatenate(x), *rows.values())
        out, start, results = trainer(arrays.clients, stacked, joined), 0, {}
        for name, own in rows.items():
            part = slice(start, start + len(own.client_id))
            results[name] = jax.tree.map(lambda x, p=part: x[p], out)
            start = part.stop
        return results

    results = train(first.client_update, rows_of)
    replaced: dict[ClientUpdate, dict[str, Array]] = {}
    for name, sim in sims.items():
        if sim.byzantine_update is not None:
            places = byzantine_places(sim, states[name].byzantine, rows_of[name])
            replaced.setdefault(sim.byzantine_update, {})[name] = places
    for update, places_of in replaced.items():
        rows = {
            name: jax.tree.map(
                # Places past the end stand for nobody: train anyone, drop the result.
                lambda x, p=places: x[jnp.minimum(p, len(x) - 1)],
                rows_of[name],
            )
            for name, places in places_of.items()
        }
        for name, out in train(update, rows).items():
            results[name] = jax.tree.map(
                lambda x, new, p=places_of[name]: x.at[p].set(new, mode="drop"),
                results[name],
                out,
            )
    return {name: Trained(rows_of[name].client_id, *results[name]) for name in sims}


def byzantine_places(sim: "Simulation", byzantine: Array, rows: Row) -> Array:
    """Places of the Byzantine clients in the cohort, then ``k`` for nobody.

    As many as there can be at most, so that the shape is static.
    """
    cohort = len(rows.client_id)
    most = min(cohort, sim.num_byzantine)
    here = byzantine[rows.client_id]
    return jnp.nonzero(here, size=most, fill_value=cohort)[0]


def train_roots(
    sims: Mapping[str, "Simulation"], states: Mapping[str, RoundState], arrays: Arrays
) -> dict[str, Array]:
    """The server's own update ``[d]`` on its root data, for systems that need one."""
    needing = {n: s for n, s in sims.items() if "root_update" in s.needs}
    if not needing:
        return {}
    first = next(iter(needing.values()))
    assert first.root_steps is not None, "set by Simulation where there is a root"
    assert arrays.root is not None
    update = first.client_update.with_steps(first.root_steps)
    train = make_trainer(
        first.model, update, (), False, first.client_chunk, first.num_devices
    )
    keys = jnp.stack([stream(states[n], ROOT) for n in needing])
    count = jnp.arange(len(needing), dtype=jnp.int32)
    stacked = jax.tree.map(
        lambda *x: jnp.stack(x), *(states[n].params for n in needing)
    )
    rows = Row(
        system=count,
        client_id=jnp.zeros_like(count),
        key=keys,
        poison_key=keys,
        poison=jnp.full_like(count, -1),
        rank=count,
        round=jnp.stack([states[n].round for n in needing]),
        state=jax.tree.map(
            lambda x: jnp.broadcast_to(x, (len(needing), *x.shape)),
            update.init(states[next(iter(needing))].params),
        ),
    )
    updates, _, _ = train(arrays.root, stacked, rows)
    return {name: updates[i] for i, name in enumerate(needing)}
