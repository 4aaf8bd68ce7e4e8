"""The clients of a round, what data they have, and what of it they leave out."""

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_sim.hosts import Spread
from fedjax_sim.sharding import on_every_device, over_devices
from fedjax_sim.state import (
    COHORT,
    DEFENSE,
    POISON,
    TRAIN,
    RoundState,
    draw_cohort,
    stream,
)
from fedjax_sim.types import (
    Array,
    ClientData,
    ClientDefense,
    Clients,
    DataAttack,
    MakeSamples,
    PyTree,
    RoundContext,
)

if TYPE_CHECKING:
    from fedjax_sim.simulation import Simulation


class Row(NamedTuple):
    """One client of a round: everything but the shared data and the parameters.

    ``system`` picks its starting point from the stacked parameters; ``place`` is where
    its data are in the ``Clients`` at hand, its id where these are all; ``poison`` is
    the position of its data attack, -1 for an honest client, and ``rank`` its number
    among the attackers. ``keep``, ``bool [m]``, is what its defense leaves it, None
    where no system has a defense. ``state`` is what it remembers.
    """

    system: Array
    client_id: Array
    place: Array
    key: Array
    poison_key: Array
    poison: Array
    rank: Array
    round: Array
    keep: Array | None = None
    state: PyTree = ()


def data_attacks(sims: Mapping[str, "Simulation"]) -> tuple[DataAttack, ...]:
    """The different data attacks of the systems; ``Row.poison`` is a place here."""
    return tuple({s.data_attack: None for s in sims.values() if s.data_attack})


def make_row(state: RoundState, client: Array, system: Array, attack: Array) -> Row:
    """The row of one client, whether it is in the cohort or not.

    ``attack`` is the place of the system's data attack, -1 for none.
    """
    fold = jax.random.fold_in
    return Row(
        system=system,
        client_id=client,
        place=client,
        key=fold(stream(state, TRAIN), client),
        # Not folded by round: an attacker poisons its data once and for all.
        poison_key=fold(fold(state.key, POISON), client),
        poison=jnp.where(state.byzantine[client], attack, -1),
        rank=(jnp.cumsum(state.byzantine) - 1)[client],
        round=state.round,
    )


def attack_place(sim: "Simulation", attacks: tuple[DataAttack, ...]) -> Array:
    """The place of a system's data attack among those of all, -1 for none."""
    return jnp.int32(attacks.index(sim.data_attack) if sim.data_attack else -1)


def cohort_rows(
    sims: Mapping[str, "Simulation"], states: Mapping[str, RoundState]
) -> dict[str, Row]:
    """The rows of every system's cohort of this round, with a leading axis ``k``."""
    attacks = data_attacks(sims)

    def draw(sim: "Simulation", state: RoundState) -> Array:
        # By every device for itself: XLA would let them share the work of every step.
        own = on_every_device(functools.partial(draw_cohort, sim), sim.num_devices)
        drawn: Array = own(stream(state, COHORT))
        return drawn

    return {
        name: jax.vmap(make_row, in_axes=(None, 0, None, None))(
            states[name],
            draw(sim, states[name]),
            jnp.int32(i),
            attack_place(sim, attacks),
        )
        for i, (name, sim) in enumerate(sims.items())
    }


def join(rows: Mapping[str, Row]) -> Row:
    """The rows of all systems, one after the other."""
    return jax.tree.map(lambda *x: jnp.concatenate(x), *rows.values())


def split(joined: PyTree, rows: Mapping[str, Row]) -> dict[str, PyTree]:
    """What belongs to each system of results for its joined rows."""
    results, start = {}, 0
    for name, own in rows.items():
        part = slice(start, start + len(own.client_id))
        results[name] = jax.tree.map(lambda x, p=part: x[p], joined)
        start = part.stop
    return results


def own_data(
    clients: Clients,
    row: Row,
    attacks: tuple[DataAttack, ...],
    padded: bool,
    make_samples: MakeSamples | None,
) -> tuple[ClientData, ClientData]:
    """The samples of one client as it has them, and as they were before any attack."""
    clean = clients.gather(row.place)
    if not padded:
        clean = clean._replace(mask=None)
    context = RoundContext(round=row.round, client_ids=row.client_id, rank=row.rank)
    data = clean
    for position, attack in enumerate(attacks):
        poisoned = attack.poison(row.poison_key, clean, context)
        chosen = row.poison == position
        # What no attack changes stays the same array, which costs nothing.
        data = jax.tree.map(
            lambda new, clean, old, c=chosen: (
                old if new is clean else jnp.where(c, new, old)
            ),
            poisoned,
            clean,
            data,
        )
    if make_samples is None:
        return data, clean
    samples = make_samples(clean)
    return (samples if data is clean else make_samples(data)), samples


class Defended(NamedTuple):
    """What a client defense decided: see ``ClientDefense.apply``."""

    keep: Array
    state: PyTree
    info: dict[str, Array]


def defend_cohorts(
    sims: Mapping[str, "Simulation"],
    states: Mapping[str, RoundState],
    clients: Clients | Spread,
    round: Array,
) -> dict[str, Defended]:
    """What the defenses decide, of every system that has one.

    Systems with the same defense are served by one copy of it in the program, each by
    one device. ``round`` is a number of its own, the same as in every state: with
    several seeds those of the states are batched, and a defense's branch on them would
    be none.
    """
    attacks = data_attacks(sims)
    first = next(iter(sims.values()))
    names_of: dict[ClientDefense, list[str]] = {}
    for name, sim in sims.items():
        if sim.client_defense is not None:
            names_of.setdefault(sim.client_defense, []).append(name)

    def ask(defense: ClientDefense, shared: tuple, own: tuple) -> Defended:
        (clients, round), (state, attack) = shared, own

        def gather(client: Array) -> ClientData:
            row = make_row(state, client, jnp.int32(0), attack)
            return own_data(clients, row, attacks, True, first.make_samples)[0]

        features = first.model.features
        context = RoundContext(
            key=stream(state, DEFENSE),
            params=state.params,
            round=round,
            client_ids=draw_cohort(first, stream(state, COHORT)),
            features=features and functools.partial(features, state.params),
        )
        return Defended(*defense.apply(gather, state.defense, context))

    decided = {}
    for defense, names in names_of.items():
        own = [
            (
                # What a rule, an attack or clients remember differs between systems.
                states[name]._replace(
                    aggregator=(), attack=(), optimizer=(), clients=()
                ),
                attack_place(sims[name], attacks),
            )
            for name in names
        ]

        def ask_all(shared: tuple, rows: tuple, defense: Any = defense) -> Defended:
            return jax.lax.map(functools.partial(ask, defense, shared), rows)

        stacked = jax.tree.map(lambda *x: jnp.stack(x), *own)
        found = over_devices(ask_all, first.num_devices)((clients, round), stacked)
        for i, name in enumerate(names):
            decided[name] = jax.tree.map(lambda x, i=i: x[i], found)
    return decided


def left_out(data: ClientData, clean: ClientData, keep: Array) -> dict[str, Array]:
    """How many samples of a client took part, and which kind its defense left out.

    A sample is poisoned where an attack changed its input or its target.
    """
    poisoned = jnp.zeros(data.valid.shape, bool)
    for a, b in ((data.inputs, clean.inputs), (data.targets, clean.targets)):
        if a is b:
            continue
        differs = a != b
        if jnp.issubdtype(a.dtype, jnp.inexact):  # a NaN differs from itself
            differs &= ~(jnp.isnan(a) & jnp.isnan(b))
        poisoned |= differs.reshape(len(poisoned), -1).any(axis=1)

    def count(samples: Array) -> Array:
        return jnp.sum(data.valid & samples, dtype=jnp.int32)

    return {
        "samples": count(keep),
        "poisoned": count(poisoned),
        "poisoned_left_out": count(poisoned & ~keep),
        "clean_left_out": count(~poisoned & ~keep),
    }
