"""Rules in passes over four devices, and what they send; see test_sharding."""

import re

import jax
import numpy as np
import optax

import fedjax_sim as fs
from fedjax_sim import passes, sharding
from tests.test_passes import CUTS, RULES, N, cohort
from tests.trees import assert_close

DEVICES = 4
# What a pass over rows costs, over columns, and both.
SUMS = {"all-reduce": 1}
COLUMNS = {"all-to-all": 1, "all-reduce": 1}
DISTANCES = {"all-to-all": 1, "all-reduce": 2}
COLLECTIVES = {
    "fedavg": SUMS,
    "norm_clipping": SUMS,
    "fltrust": SUMS,
    "centered_clipping radius": SUMS,
    "robust_learning_rate": SUMS,
    "median": COLUMNS,
    "trimmed_mean": COLUMNS,
    "phocas": COLUMNS,
    "krum": DISTANCES,
    "multi_krum": DISTANCES,
    "dual_system soft": {"all-to-all": 1, "all-reduce": 3},
}


def program(rule, U, context, chunk, memory):
    """The rule in passes, of which every device makes its rows by itself."""
    state = rule.init(U[0], N)

    def part(U, context, state):
        def make(places):
            return U[places], ()

        rows = passes.Rows(
            make,
            *U.shape,
            chunk=chunk,
            memory=memory,
            mask=context.mask,
            num_devices=DEVICES,
        )
        return *rule.in_passes(rows, state, context), rows.present

    spread = sharding.on_every_device(part, DEVICES)
    return jax.jit(spread), (U, context, state)


def collectives(compiled):
    """How often each kind stands in a compiled program."""
    found = re.findall(
        r" (all-\w+(?:-\w+)?|reduce-scatter|collective-\w+)\(", compiled.as_text()
    )
    return {kind: found.count(kind) for kind in set(found)}


def check_rounds():
    """Whole rounds send what the rule does: training sends nothing.

    But for the data of a cohort that is drawn, where processes load their own clients.
    """
    data = fs.data.load("digits")
    clients, _ = fs.data.federate(
        data, num_clients=12, partition=fs.data.dirichlet(1.0, min_size=10)
    )
    hosted = fs.hosts.share(clients)
    samples = {"reduce-scatter": 3}  # inputs, targets, and which are padding
    fedavg, krum = fs.aggregators.fedavg(), fs.aggregators.krum(max_byzantine=2)
    for own, cohort_size, rule, wanted in (
        (clients, 7, fedavg, SUMS),
        (clients, 12, krum, DISTANCES),
        (hosted, 12, krum, DISTANCES),
        (hosted, 7, fedavg, SUMS | samples),
    ):
        sim = fs.Simulation(
            model=fs.models.mlp((8, 8, 1), hidden=()),
            clients=own,
            client_update=fs.local_sgd(optax.sgd(0.1), epochs=1, batch_size=5),
            aggregator=rule,
            attack=fs.attacks.sign_flip(),
            num_byzantine=2,
            cohort_size=cohort_size,
            update_memory=2**22,
        )
        states = sim.alone.init(jax.random.key(0))
        sent = collectives(sim.alone.lower(states, 2, 2).compile())
        assert sent == wanted, (rule.name, cohort_size, sent)


def main():
    assert len(jax.devices()) == DEVICES, jax.devices()
    check_rounds()
    for name in COLLECTIVES:
        rule, (U, context) = RULES[name], cohort(1)
        wanted = rule.apply(U, rule.init(U[0], N), context)
        # On one device test_passes plays every cut of every rule.
        cuts = CUTS if name in ("fltrust", "median", "krum") else ("held",)
        for cut in cuts:
            chunk, memory = CUTS[cut]
            run, args = program(rule, U, context, chunk, memory // DEVICES)
            *found, _ = run(*args)
            assert_close(found, list(wanted), rtol=2e-4, atol=2e-5)
            np.testing.assert_array_equal(found[2].flagged, wanted[2].flagged)
            if cut == "held":
                sent = collectives(run.lower(*args).compile())
                assert sent == COLLECTIVES[name], (name, sent)
    print("the same on one and four devices")


if __name__ == "__main__":
    main()
