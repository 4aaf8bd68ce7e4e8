"""Local training of the cohorts of several systems, as rows of one chunked map.

All systems of a comparison share model, clients and local training, so the clients of
every system, and of every seed, are trained by one compiled loop.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from fedjax_sim.cohorts import (
    Defended,
    Row,
    cohort_rows,
    data_attacks,
    join,
    left_out,
    own_data,
    split,
)
from fedjax_sim.models import Model
from fedjax_sim.pytrees import along, ravel_clients
from fedjax_sim.sharding import over_devices
from fedjax_sim.state import ROOT, Arrays, RoundState, stream
from fedjax_sim.types import (
    Array,
    ClientInfo,
    Clients,
    ClientUpdate,
    DataAttack,
    MakeSamples,
    Params,
    PyTree,
)

if TYPE_CHECKING:
    from fedjax_sim.simulation import Simulation


def over_rows(
    one: Callable[[Clients, Params, Row], PyTree],
    chunk: int,
    num_devices: int,
    finish: Callable[[PyTree], PyTree] = lambda out: out,
) -> Any:
    """``(clients, params [S, ...], rows [R]) -> finish(one of every row [R, ...])``.

    ``one`` gets the parameters of the row's system. Each device takes its part of the
    rows. There ``chunk`` rows at a time are vmapped, chunks run one after the other.
    vmapping the whole (over seeds) only adds rows, so seeds run at the speed of
    clients.
    """

    def part(shared: tuple[Clients, Params], rows: Row) -> Any:
        clients, params = shared
        count = rows.client_id.shape[0]
        size = largest_divisor(count, chunk)

        def row(row: Row) -> Any:
            return one(clients, jax.tree.map(lambda x: x[row.system], params), row)

        if size == count:
            out = jax.vmap(row)(rows)
        elif size == 1:
            out = jax.lax.map(row, rows)
        else:
            chunks = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), rows)
            out = jax.lax.map(jax.vmap(row), chunks)
            out = jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), out)
        return finish(out)

    spread = over_devices(part, num_devices)

    @custom_vmap
    def whole(clients: Clients, params: Params, rows: Row) -> Any:
        return spread((clients, params), rows)

    @whole.def_vmap
    def seeds(
        seeds: int, batched: Any, clients: Clients, params: Params, rows: Row
    ) -> Any:
        clients_batched, params_batched, rows_batched = batched

        def each(x: Array, is_batched: bool) -> Array:
            return x if is_batched else jnp.broadcast_to(x, (seeds, *x.shape))

        params = jax.tree.map(each, params, params_batched)
        rows = jax.tree.map(each, rows, rows_batched)
        if any(jax.tree.leaves(clients_batched)):
            # Cohorts that were sent to those that train them: one pool of all seeds'.
            clients = jax.tree.map(each, clients, clients_batched)
            pool, number = clients.inputs.shape[1], clients.indices.shape[1]
            seed = jnp.arange(seeds, dtype=clients.indices.dtype)
            clients = clients._replace(
                indices=clients.indices + pool * seed[:, None, None]
            )
            clients = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), clients)
            rows = rows._replace(place=rows.place + number * seed[:, None])
        systems = jax.tree.leaves(params)[0].shape[1]
        offset = systems * jnp.arange(seeds, dtype=rows.system.dtype)
        rows = rows._replace(system=rows.system + offset[:, None])
        count = rows.client_id.shape[1]
        out = whole(
            clients,
            jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), params),
            jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows),
        )
        out = jax.tree.map(lambda x: x.reshape(seeds, count, *x.shape[1:]), out)
        return out, jax.tree.map(lambda _: True, out)

    return whole


class Trained(NamedTuple):
    """A trained cohort: ids ``[k]``, and what its clients gave back, row by row.

    ``updates`` is one matrix ``[k, d]``: the compiler then has one array to pass on,
    attack, check and aggregate, and not one for every array of the model. ``samples``
    counts what each client trained on and left out, where a system has a defense.
    """

    ids: Array
    updates: Array
    states: PyTree
    info: ClientInfo
    samples: dict[str, Array]


def make_trainer(
    model: Model,
    update: ClientUpdate,
    attacks: tuple[DataAttack, ...],
    padded: bool,
    make_samples: MakeSamples | None,
    chunk: int,
    num_devices: int = 1,
) -> Any:
    """``(clients, params [S, ...], rows [R]) -> the fields of Trained but its ids``."""

    def train_one(clients: Clients, params: Params, row: Row) -> Any:
        masked = padded or row.keep is not None
        data, clean = own_data(clients, row, attacks, masked, make_samples)
        samples = {}
        if row.keep is not None:
            samples = left_out(data, clean, row.keep)
            data = data._replace(mask=data.valid & row.keep)
        out = update.apply(model, row.key, params, data, row.state, row.round)
        return *out, samples

    def finish(out: Any) -> Any:
        updates, *others = out
        return ravel_clients(updates)[0], *others

    return over_rows(train_one, chunk, num_devices, finish)


def largest_divisor(count: int, limit: int) -> int:
    """The largest divisor of ``count`` up to ``limit``: chunks without a remainder."""
    return next(size for size in range(min(count, limit), 0, -1) if count % size == 0)


def train_cohorts(
    sims: Mapping[str, "Simulation"],
    states: Mapping[str, RoundState],
    arrays: Arrays,
    defended: Mapping[str, Defended],
) -> dict[str, Trained]:
    """Trains every system's cohort on what its defense leaves it."""
    first = next(iter(sims.values()))
    rows_of = defended_rows(sims, states, arrays, defended)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *(states[n].params for n in sims))

    def train(update: ClientUpdate, rows: dict[str, Row]) -> dict[str, Any]:
        trainer = make_trainer(
            first.model,
            update,
            data_attacks(sims),
            first.padded,
            first.make_samples,
            first.client_chunk,
            first.num_devices,
        )
        return split(trainer(arrays.clients, stacked, join(rows)), rows)

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


def defended_rows(
    sims: Mapping[str, "Simulation"],
    states: Mapping[str, RoundState],
    arrays: Arrays,
    defended: Mapping[str, Defended],
) -> dict[str, Row]:
    """The rows of every cohort, with what clients remember and a defense leaves them.

    Where one system has a defense, all have a mask.
    """
    rows_of = cohort_rows(sims, states)
    for name, row in rows_of.items():
        kept = None
        if defended:
            kept = arrays.clients.mask[row.client_id]
            kept = defended[name].keep if name in defended else kept
        own = jax.tree.map(lambda x, i=row.client_id: x[i], states[name].clients)
        rows_of[name] = row._replace(keep=kept, state=own)
    return rows_of


def row_maker(
    sim: "Simulation", state: RoundState, clients: Clients, row: Row
) -> Callable[[Array], tuple[Array, PyTree]]:
    """Trains those of a cohort at some places, on this device; see ``passes.Rows``.

    Beside their updates: what they remember, ``ClientInfo``, and counts of samples.
    """
    start = jax.tree.map(lambda x: x[None], state.params)

    def train(update: ClientUpdate, rows: Row) -> Any:
        trainer = make_trainer(
            sim.model,
            update,
            data_attacks({"": sim}),
            sim.padded,
            sim.make_samples,
            sim.client_chunk,
        )
        return trainer(clients, start, rows)

    def make(places: Array) -> tuple[Array, PyTree]:
        rows = jax.tree.map(lambda x: x[places], row)
        trained = train(sim.client_update, rows)
        if sim.byzantine_update is not None:
            byzantine = state.byzantine[rows.client_id]
            trained = jax.tree.map(
                lambda new, old: jnp.where(along(byzantine, old), new, old),
                train(sim.byzantine_update, rows),
                trained,
            )
        updates, *others = trained
        return updates, tuple(others)

    return make


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
        first.model, update, (), False, None, first.client_chunk, first.num_devices
    )
    keys = jnp.stack([stream(states[n], ROOT) for n in needing])
    count = jnp.arange(len(needing), dtype=jnp.int32)
    stacked = jax.tree.map(
        lambda *x: jnp.stack(x), *(states[n].params for n in needing)
    )
    rows = Row(
        system=count,
        client_id=jnp.zeros_like(count),
        place=jnp.zeros_like(count),
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
    updates, *_ = train(arrays.root, stacked, rows)
    return {name: updates[i] for i, name in enumerate(needing)}
