"""Compares memory told before compiling with XLA's own word; see test_memory.

In a process of its own: how the suite has XLA compile is not how users do.
"""

import jax
import jax.numpy as jnp
import optax

import fedjax_sim as fs
from fedjax_sim import buffers
from fedjax_sim.types import RoundContext

K, D = 300, 20_000
a = fs.aggregators
RULES = [a.dual_system(max_byzantine=60), a.mad()]
SYSTEMS = [
    # clients, cohort, update_memory, rule: data, updates, memory of clients, distances.
    (2_000, 2_000, None, a.median()),
    (20_000, 50, None, a.foolsgold()),
    (3_000, 3_000, 2**20, a.krum(max_byzantine=600)),
]


def rule_is_told(rule):
    """What a rule needs on a matrix, and what was told of it, in bytes."""

    def apply(U, root, state, key):
        ids = jnp.arange(K)
        context = RoundContext(key=key, client_ids=ids, root_update=root)
        return rule.apply(U, state, context)

    args = jax.eval_shape(
        lambda: (
            jnp.zeros((K, D)),
            jnp.zeros(D),
            rule.init(jnp.zeros(D), K),
            jax.random.key(0),
        )
    )
    traced = jax.jit(apply).trace(*args)
    compiled = traced.lower().compile().memory_analysis()
    needed = compiled.temp_size_in_bytes + compiled.output_size_in_bytes
    return needed, buffers.peak_of(traced.jaxpr)


def run_is_told(data, num_clients, cohort_size, update_memory, rule):
    """The same of a whole run, with its data and states."""
    clients, root = fs.data.populate(data, num_clients, size=10)
    sim = fs.Simulation(
        model=fs.models.mlp((8, 8, 1), hidden=(32,)),
        clients=clients,
        root=root,
        test=data.test,
        client_update=fs.local_sgd(optax.sgd(0.1), epochs=1, batch_size=10),
        aggregator=rule,
        attack=fs.attacks.sign_flip(),
        num_byzantine=num_clients // 5,
        cohort_size=cohort_size,
        update_memory=update_memory,
        num_devices=1,
    )
    comparison, key = sim.alone, jax.random.key(0)
    told = comparison.memory(key, num_rounds=2, eval_every=2, donate=True)
    states = jax.eval_shape(comparison.init, key)
    compiled = comparison.lower(states, 2, 2).compile().memory_analysis()
    needed = compiled.temp_size_in_bytes + compiled.argument_size_in_bytes
    needed += compiled.output_size_in_bytes - compiled.alias_size_in_bytes
    return needed, told.total


def main():
    found = {rule.name: rule_is_told(rule) for rule in RULES}
    data = fs.data.load("digits")
    for system in SYSTEMS:
        *sizes, rule = system
        found[f"{sizes} {rule.name}"] = run_is_told(data, *system)
    off = {}
    for name, (needed, told) in found.items():
        print(f"{name:40} needs {needed / 1e6:8.1f} MB, told {told / 1e6:8.1f} MB")
        if not 0.8 < told / needed < 1.2:
            off[name] = told / needed
    assert not off, off
    print("told within a fifth")


if __name__ == "__main__":
    main()
