"""Runs simulations on one and on two devices and compares them; see test_sharding."""

import dataclasses
import tempfile
from pathlib import Path

import jax
import optax

import fedjax_sim as fs
from fedjax_sim import checkpoint
from tests.trees import assert_close


def compared(found, wanted):
    """Every array of two histories or states, up to the rounding of a product."""
    assert len(jax.tree.leaves(wanted)) > 0
    assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def main():
    assert len(jax.devices()) == 2, jax.devices()
    data = fs.data.load("digits")
    # 21 clients and 355 test samples in one batch: nothing divides by two.
    clients, root = fs.data.federate(
        data, num_clients=21, partition=fs.data.dirichlet(1.0, min_size=10)
    )
    clients, local_test = fs.data.hold_out(clients, 0.2)
    shared = {
        "model": fs.models.mlp((8, 8, 1), hidden=(32,)),
        "clients": clients,
        "root": root,
        "test": data.test,
        "local_test": local_test,
        "client_update": fs.local_sgd(optax.sgd(0.1), steps=3, batch_size=10),
        "cohort_size": 15,
    }
    attacked = {"num_byzantine": 4, "attack": fs.attacks.alie(z=1.5)}
    backdoor = {
        "num_byzantine": 4,
        "data_attack": fs.attacks.badnets(target=0, num_classes=10, size=2),
        "byzantine_update": fs.local_sgd(optax.sgd(0.2), steps=4, batch_size=10),
    }

    def systems(devices):
        own = shared | {"num_devices": devices}
        a = fs.aggregators
        return {
            "fltrust": fs.Simulation(aggregator=a.fltrust(), **own, **attacked),
            # What the rule remembers of all clients stays on each device; clients
            # cluster their samples, and have a test set each.
            "sanitization": fs.Simulation(
                aggregator=a.foolsgold(),
                client_defense=fs.client_defenses.sanitization(3, start=1),
                **own,
                **backdoor,
            ),
        }

    one, two = (fs.compare(systems(n)) for n in (1, 2))
    start = two.init(jax.random.split(jax.random.key(0), 2))
    states, history = two.run(states=start, num_rounds=2, eval_every=2)
    compared((states, history), one.run(states=start, num_rounds=2, eval_every=2))

    # Held by no one, and trained anew in every pass.
    split = dataclasses.replace(
        two.systems["fltrust"], update_memory=2**14, local_test=None
    )
    _, found = split.run(
        jax.random.split(jax.random.key(0), 2), num_rounds=2, eval_every=2
    )
    compared(found, history["fltrust"]._replace(local={}))

    # A checkpoint of two devices goes on where it was, on either number of them.
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(Path(folder), 2, states)
        loaded = checkpoint.load(
            Path(folder), 2, lambda round: two.shapes(start, 2, 2)[0]
        )
    straight = two.run(states=states, num_rounds=2, eval_every=2)
    for comparison in (two, one):
        compared(comparison.run(states=loaded, num_rounds=2, eval_every=2), straight)
    print("the same on one and two devices")


if __name__ == "__main__":
    main()
