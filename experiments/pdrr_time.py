"""How long one detection takes: every detector on the models of one attacked round."""

import dataclasses
import json
import statistics
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

import fedjax_sim as fs
from experiments.results import write_atomically
from fedjax_sim.evaluation import make_root_scores
from fedjax_sim.types import Aggregator, AggregatorInfo, PyTree, RoundContext

REPEATS = 5

# base -> scheme -> seconds; ``pretraining`` beside the schemes that have one.
Times = dict[str, dict[str, float]]


def measure(
    config: Any, schemes: Mapping[tuple[str, str], fs.Simulation], console: Console
) -> Times:
    """Seconds of one detection, compiling apart, by base and scheme.

    All detectors see the models of the same first round of the attack on their base.
    What was measured lies in ``detection_seconds.json`` of the run directory, and a run
    that is resumed takes it from there.
    """
    path = config.out / "detection_seconds.json"
    if path.exists():
        found: Times = json.loads(path.read_text())
        return found
    times: Times = {}
    learned: dict[Any, PyTree] = {}  # by pretraining, which the bases share
    if schemes:
        console.print("timing one detection of every scheme")
    for base in dict.fromkeys(base for base, _ in schemes):
        own = {scheme: sim for (b, scheme), sim in schemes.items() if b == base}
        attacked = next(iter(own.values()))
        key = jax.random.key(config.seed)
        updates, context = one_round(attacked, key)
        times[base] = {}
        for scheme, sim in own.items():
            memory = sim.aggregator.pretrain or sim
            if memory not in learned:
                learned[memory] = sim.init(key).aggregator
            times[base][scheme] = seconds(sim, updates, learned[memory], context)
    write_atomically(path, json.dumps(times, indent=2) + "\n")
    return times


def one_round(sim: fs.Simulation, key: jax.Array) -> tuple[PyTree, RoundContext]:
    """What the server of a system has received in the first round, and knows.

    A rule that keeps what it is given stands in for the system's own.
    """

    def init(params: PyTree, num_clients: int) -> PyTree:
        return jax.tree.map(
            lambda w: jnp.zeros((sim.cohort_size, *w.shape), w.dtype), params
        )

    def apply(
        updates: PyTree, state: PyTree, context: RoundContext
    ) -> tuple[PyTree, PyTree, AggregatorInfo]:
        zero = jnp.zeros(sim.cohort_size)
        info = AggregatorInfo(zero, zero > 0, zero)
        return jax.tree.map(lambda u: 0.0 * u[0], updates), updates, info

    keep = Aggregator(init, apply, lambda cohort_size: None, name="keep")
    state, _ = dataclasses.replace(sim, aggregator=keep, test=None).run(
        key, num_rounds=1
    )
    return state.aggregator, RoundContext(
        key=key,
        params=state.params,  # those of the start: the aggregate is zero
        round=jnp.int32(0),
        client_ids=jnp.arange(sim.cohort_size),
        num_samples=jnp.ones(sim.cohort_size),
    )


def seconds(
    sim: fs.Simulation, updates: PyTree, state: PyTree, context: RoundContext
) -> float:
    """The median of several calls of a system's rule, compiled, on one device."""
    root, rule = sim.alone.arrays.root, sim.aggregator

    @jax.jit
    def detect(updates: PyTree, state: PyTree, context: RoundContext, root: Any) -> Any:
        if root is not None:
            scores = make_root_scores(sim.model, root)
            context = context._replace(root_scores=scores)
        return rule.apply(updates, state, context)

    here = jax.local_devices()[0]
    args = jax.device_put((updates, state, context, root), here)
    jax.block_until_ready(detect(*args))  # compiles
    took = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(detect(*args))
        took.append(time.perf_counter() - start)
    return statistics.median(took)
