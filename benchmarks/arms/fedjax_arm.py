"""This library, with the workloads of the other arms."""

import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fedjax_sim as fs
from benchmarks import workloads
from benchmarks.workloads import (
    ALIE,
    BATCH,
    IPM,
    LEARNING_RATE,
    MATRIX,
    NOISE,
    TRAINING,
)
from fedjax_sim import aggregation, outcome, training
from fedjax_sim.types import Aggregator, Clients, Examples, RoundContext

# Systems whose time outside local training is measured.
SYSTEMS = {
    "fltrust": lambda: fs.aggregators.fltrust(),
    "dual_system": lambda: fs.aggregators.dual_system(max_byzantine=20),
    "median": lambda: fs.aggregators.median(),
    "bulyan": lambda: fs.aggregators.bulyan(max_byzantine=20),
}


def random_clients(model: str, clients: int, samples: int) -> Clients:
    shape = TRAINING[model]["shape"]
    rng = np.random.default_rng(0)
    pool = clients * samples
    return Clients(
        jnp.asarray(rng.integers(0, 256, (pool, *shape), np.uint8)),
        jnp.asarray(rng.integers(0, 10, pool), jnp.int32),
        jnp.arange(pool, dtype=jnp.int32).reshape(clients, -1),
        jnp.ones((clients, samples), bool),
    )


def train(
    model: str,
    cores: int,
    chunk: int | None = None,
    clients: int = 0,
    samples: int = 0,
    precision: str = "float32",
) -> dict[str, Any]:
    """Local training of a cohort, as the engine does it."""
    fs.use_cores(cores)
    clients = clients or TRAINING[model]["clients"]
    samples = samples or TRAINING[model]["samples"]
    network = fs.models.MODELS[model](TRAINING[model]["shape"], 10)
    update = fs.local_sgd(
        optax.sgd(LEARNING_RATE), epochs=1, batch_size=BATCH, precision=precision
    )
    sim = fs.Simulation(
        model=network,
        clients=random_clients(model, clients, samples),
        client_update=update,
        aggregator=fs.aggregators.fedavg(),
        client_chunk=chunk,
    )
    comparison = sim.alone
    states = comparison.init(jax.random.key(0))

    def train_all(states: Any, arrays: Any) -> Any:
        return training.train_cohorts(comparison.systems, states, arrays, {})

    args = (comparison.placed(states), comparison.arrays)
    start = time.perf_counter()
    compiled = jax.jit(train_all).lower(*args).compile()
    compile_seconds = time.perf_counter() - start
    found = workloads.measure(
        lambda: jax.block_until_ready(compiled(*args)), workloads.REPEATS_A_PASS
    )
    rate = clients * samples / found["median"]
    return {**found, "compile": compile_seconds, "rate": rate}


def make_rules(assumed: int) -> dict[str, Aggregator]:
    """What ByzFL has too; pre-aggregators are followed by the mean."""
    a = fs.aggregators
    return {
        "fedavg": a.fedavg(),
        "median": a.median(),
        "trimmed_mean": a.trimmed_mean(assumed),
        "geometric_median": a.geometric_median(),
        "krum": a.krum(assumed),
        "multi_krum": a.multi_krum(assumed),
        "centered_clipping": a.centered_clipping(),
        "monna": a.monna(assumed),
        "meamed": a.meamed(assumed),
        "caf": a.caf(assumed),
        "mda": a.mda(assumed),
        "smea": a.smea(assumed),
        "nnm": a.chain(a.nnm(assumed), a.fedavg()),
        "bucketing": a.chain(a.bucketing(2), a.fedavg()),
        "clipping": a.chain(a.clipping(2.0), a.fedavg()),
        "arc": a.chain(a.arc(assumed), a.fedavg()),
    }


def aggregate(
    rules: list[str], rows: int, columns: int, assumed: int
) -> dict[str, Any]:
    """Seconds of each rule."""
    table = make_rules(assumed)
    rng = np.random.default_rng(0)
    U = jnp.asarray(rng.standard_normal((rows, columns), np.float32) * 0.01 + 0.02)
    context = RoundContext(
        key=jax.random.key(0), num_samples=jnp.ones(rows), root_update=U[0]
    )
    seconds, compiling = {}, {}
    for name in rules:
        rule = table[name]
        state = rule.init(U[0], rows)
        start = time.perf_counter()
        compiled = jax.jit(rule.apply).lower(U, state, context).compile()
        compiling[name] = time.perf_counter() - start
        found = workloads.measure(
            lambda c=compiled, s=state: jax.block_until_ready(c(U, s, context))
        )
        seconds[name] = found["median"]
    return {"seconds": seconds, "compile": compiling}


def parts(cores: int, steps: int = 60) -> dict[str, Any]:
    """Seconds of a round's training, and of all the rest of it: ALIE and the rule.

    FLTrust's CNN, 100 clients, one epoch of ten times ``steps`` samples.
    """
    fs.use_cores(cores)
    clients = random_clients("cnn", 100, 10 * steps)
    root = Examples(np.asarray(clients.inputs[:100]), np.asarray(clients.targets[:100]))
    shared = {
        "model": fs.models.cnn(),
        "clients": clients,
        "root": root,
        "client_update": fs.local_sgd(
            optax.sgd(LEARNING_RATE), epochs=1, batch_size=BATCH
        ),
        "attack": fs.attacks.alie(z=ALIE),
        "num_byzantine": 20,
    }
    found: dict[str, Any] = {}
    for name, rule in SYSTEMS.items():
        sim = fs.Simulation(aggregator=rule(), **shared)
        comparison = sim.alone
        sims = comparison.systems
        key = next(iter(sims))
        states = comparison.placed(comparison.init(jax.random.key(0)))
        arrays = comparison.arrays

        def train(states: Any, arrays: Any, sims: Any = sims) -> Any:
            trained = training.train_cohorts(sims, states, arrays, {})
            return trained, training.train_roots(sims, states, arrays)

        def rest(
            states: Any,
            arrays: Any,
            trained: Any,
            roots: Any,
            sim: Any = sim,
            key: str = key,
        ) -> Any:
            state = states[key]
            found = aggregation.aggregate_round(
                sim, state, arrays.clients, trained[key], None, roots.get(key), None
            )
            return outcome.close_round(sim, state, None, found)

        train_all, finish = jax.jit(train), jax.jit(rest)
        trained, roots = train_all(states, arrays)
        training_time = workloads.measure(
            lambda f=train_all, s=states, a=arrays: jax.block_until_ready(f(s, a))
        )
        rest_time = workloads.measure(
            lambda f=finish, s=states, a=arrays, t=trained, r=roots: (
                jax.block_until_ready(f(s, a, t, r))
            )
        )
        found[name] = {"train": training_time["median"], "rest": rest_time["median"]}
    return {"systems": found}


def matrix(
    model: str,
    folder: str,
    rules: list[str],
    attacks: list[str],
    rounds: int,
    cores: int,
    seed: int = 0,
) -> dict[str, Any]:
    """Rules x attacks: all rules of an attack in one program, compiling included."""
    fs.use_cores(cores)
    b = fs.attacks
    table = make_rules(MATRIX["byzantine"])
    rate = MATRIX["learning_rate"]
    crafted = {
        "sign_flip": b.ipm(1.0),
        "ipm": b.ipm(IPM),
        "alie": b.alie(z=ALIE, direction=-1, knowledge="omniscient"),
        "gaussian": b.gaussian(std=rate * NOISE),
    }
    data = fs.data.load("mnist", data_dir=Path(folder))
    clients, _ = fs.data.federate(
        data, num_clients=MATRIX["clients"], partition=fs.data.iid(), seed=seed
    )
    shared = {
        "model": fs.models.MODELS[model](),
        "clients": clients,
        "test": data.test,
        "client_update": fs.local_sgd(optax.sgd(rate), steps=1, batch_size=BATCH),
        "num_byzantine": MATRIX["byzantine"],
    }

    def play(comparison: fs.Comparison, seed: int) -> dict[str, float]:
        _, histories = comparison.run(
            jax.random.key(seed), num_rounds=rounds, eval_every=rounds
        )
        return {rule: float(h.accuracy[-1]) for rule, h in histories.items()}

    cells = {}
    total = compile_seconds = 0.0
    for attack in attacks:
        start = time.perf_counter()
        systems = {
            rule: fs.Simulation(
                aggregator=table[rule], attack=crafted[attack], **shared
            )
            for rule in rules
        }
        comparison = fs.compare(systems)
        states = comparison.init(jax.random.key(seed))
        began = time.perf_counter()
        comparison.lower(states, rounds, rounds).compile()
        compile_seconds += time.perf_counter() - began
        found = play(comparison, seed)
        total += time.perf_counter() - start
        again = play(comparison, seed + 1)  # not in the total: how much seeds differ
        for rule in rules:
            cells[f"{rule}/{attack}"] = {
                "accuracy": found[rule],
                "of another seed": again[rule],
            }
    return {"cells": cells, "total": total, "compile": compile_seconds}


def sgemm() -> dict[str, Any]:
    """Floating point operations per second of a large matrix product."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    a = jnp.ones((size, size)) * 0.5
    product = jax.jit(lambda a: jnp.matmul(a, a, precision="highest"))
    found = workloads.measure(lambda: jax.block_until_ready(product(a)), 7)
    return {"gflops": 2 * size**3 / found["median"] / 1e9}


def version() -> dict[str, Any]:
    from experiments.results import versions

    return {"versions": versions()}


if __name__ == "__main__":
    workloads.main(
        {
            "train": train,
            "aggregate": aggregate,
            "parts": parts,
            "matrix": matrix,
            "sgemm": sgemm,
            "version": version,
        }
    )
