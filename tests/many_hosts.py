"""One process of several that run the same simulations; see test_hosts.

    python -m tests.many_hosts HOW FOLDER ROUNDS RUN...

HOW is that of ``fs.hosts.start``. Process 0 leaves what it found in FOLDER. Where there
are checkpoints in FOLDER, from however many processes, the run goes on from there.
"""

import os
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import fedjax_sim as fs
from fedjax_sim import checkpoint
from fedjax_sim.sharding import is_key

RUNS = ("all", "sampled", "passes")
CLIENTS = 11  # no number of processes divides it


def systems(clients, root, test):
    """What every way of cutting a cohort into processes has to get right."""
    a = fs.aggregators
    shared = {
        "model": fs.models.mlp((8, 8, 1), hidden=()),
        "clients": clients,
        "root": root,
        "test": test,
        "client_update": fs.local_sgd(optax.sgd(0.1), epochs=1, batch_size=5),
        "num_byzantine": 2,
    }
    return {
        # Everybody takes part: each process trains its own clients.
        "all": {
            "fltrust": fs.Simulation(
                aggregator=a.fltrust(), attack=fs.attacks.alie(z=1.0), **shared
            ),
        },
        # A cohort's data go to those that train them; all updates go to everybody.
        "sampled": {
            "foolsgold": fs.Simulation(
                aggregator=a.foolsgold(),
                data_attack=fs.attacks.badnets(target=0, num_classes=10, size=2),
                cohort_size=7,
                **shared,
            ),
        },
        # No process ever holds all updates.
        "passes": {
            "krum": fs.Simulation(
                aggregator=a.krum(max_byzantine=2),
                attack=fs.attacks.sign_flip(),
                update_memory=3 * 4 * 650,
                cohort_size=7,
                **shared,
            ),
        },
    }


def run(clients, root, test, folder, rounds, names=RUNS):
    """Runs some to a round, going on from checkpoints; states and histories."""
    keys = jax.numpy.stack([jax.random.key(0), jax.random.key(1)])
    found = {}
    every = systems(clients, root, test)
    for name in names:
        sims = every[name]
        comparison = fs.compare(sims)
        start = comparison.init(keys if name == "sampled" else keys[0])
        directory = folder / name
        done = checkpoint.latest_round(directory)
        if done is None:
            done, states = 0, start
        else:
            states = checkpoint.load(directory, done, lambda round, s=start: s)
        states, history = comparison.run(
            num_rounds=rounds - done, eval_every=2, states=states, last=rounds
        )
        checkpoint.save(directory, rounds, states)
        found[name] = (states, history)
    return found


def check_refusals(comparison):
    """What differs between the processes is named before anything is run."""
    me = jax.process_index()
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="the processes differ in their key: "):
        comparison.run(jax.random.key(me), num_rounds=2)
    with pytest.raises(ValueError, match=r"differ in their program .* the round they"):
        comparison.run(key, num_rounds=1 + me)


def as_arrays(found):
    """By the name of the run and the path in its states and histories."""
    return {
        f"{which}{jax.tree_util.keystr(path)}": np.asarray(
            jax.random.key_data(x) if is_key(x) else x
        )
        for which, tree in found.items()
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def main():
    how, folder, rounds, *names = sys.argv[1:]
    os.environ["JAX_PLATFORMS"] = "cpu"
    fs.hosts.start(how)
    data = fs.data.load("digits")
    clients, root = fs.data.federate(
        data,
        num_clients=CLIENTS,
        partition=fs.data.dirichlet(1.0, min_size=10),
        root_size=50,
    )
    mine = fs.hosts.cut(clients, fs.hosts.own_clients(CLIENTS))
    assert mine.num_clients < CLIENTS or jax.process_count() == 1
    joined = fs.hosts.share(mine)
    assert joined.counts.tolist() == clients.sizes().tolist()
    if jax.process_count() == 2:
        check_refusals(fs.compare(systems(joined, root, data.test)["all"]))
    found = run(joined, root, data.test, Path(folder), int(rounds), names)
    arrays = as_arrays(found)
    if jax.process_index() == 0:
        np.savez(Path(folder) / "found.npz", **arrays)
    print(f"process {jax.process_index()} of {jax.process_count()} is done")


if __name__ == "__main__":
    main()
