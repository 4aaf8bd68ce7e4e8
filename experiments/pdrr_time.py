"""How long one detection takes: every detector on the models of one attacked round."""

import dataclasses
import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

import fedjax_sim as fs
from experiments.results import write_atomically
from fedjax_sim.evaluation import make_root_scores
from fedjax_sim.types import Aggregator, AggregatorInfo, PyTree, RoundContext

REPEATS = 5
FILE = "detection_seconds.json"

# base -> scheme -> seconds
Times = dict[str, dict[str, float]]


def measure(
    config: Any, schemes: Mapping[tuple[str, str], fs.Simulation], console: Console
) -> Times:
    """Seconds of one detection, compiling apart, by base and scheme.

    All detectors see the models of the same first round of the attack on their base.
    What was measured lies in ``detection_seconds.json`` of the run directory, and a run
    that is resumed takes it from there.

    Args:
        config: of ``experiments.pdrr``.
        schemes: the attacked systems by base and scheme.
        console: for a line that says so.
    """
    path = config.out / FILE
    if path.exists():
        found = read(path)
        if found is not None:
            return found
        console.print(f"{path} is damaged: measuring again")
    times: Times = {}
    if schemes:
        console.print("timing one detection of every scheme")
        attacked = {base: sim for (base, _), sim in schemes.items()}
        sent = first_round(attacked, jax.random.key(config.seed))
        times = {base: {} for base in attacked}
        for (base, scheme), sim in schemes.items():
            times[base][scheme] = seconds(sim, *sent[base])
    write_atomically(path, json.dumps(times, indent=2) + "\n")
    return times


def read(path: Path) -> Times | None:
    """What ``measure`` wrote; None where the file holds anything else."""
    try:
        found = json.loads(path.read_text())
        return {
            base: {scheme: float(took) for scheme, took in own.items()}
            for base, own in found.items()
        }
    except (ValueError, AttributeError, TypeError, OSError):
        return None


def first_round(
    sims: Mapping[str, fs.Simulation], key: jax.Array
) -> dict[str, tuple[PyTree, RoundContext]]:
    """What the server of each system receives in the first round, and knows then.

    A rule that keeps what it is given stands in for the system's own.
    """
    size = next(iter(sims.values())).cohort_size

    def init(params: PyTree, num_clients: int) -> PyTree:
        return jax.tree.map(lambda w: jnp.zeros((size, *w.shape), w.dtype), params)

    def apply(
        updates: PyTree, state: PyTree, context: RoundContext
    ) -> tuple[PyTree, PyTree, AggregatorInfo]:
        zero = jnp.zeros(size)
        info = AggregatorInfo(zero, zero > 0, zero)
        return jax.tree.map(lambda u: 0.0 * u[0], updates), updates, info

    keep = Aggregator(init, apply, lambda cohort_size: None, name="keep")
    comparison = fs.compare(
        {
            name: dataclasses.replace(sim, aggregator=keep, test=None)
            for name, sim in sims.items()
        }
    )
    states, _ = comparison.run(key, num_rounds=1)
    context = RoundContext(
        key=key,
        round=jnp.int32(0),
        client_ids=jnp.arange(size),
        num_samples=jnp.ones(size),
    )
    # The parameters are those of the start: the aggregate is zero.
    return {
        name: (state.aggregator, context._replace(params=state.params))
        for name, state in states.items()
    }


def seconds(sim: fs.Simulation, updates: PyTree, context: RoundContext) -> float:
    """The median of several calls of a system's rule, compiled, on one device.

    A detector that learns does not have to for this: what its network is makes no
    difference to the time.
    """
    root, rule = sim.alone.arrays.root, sim.aggregator
    state = jax.tree.map(
        lambda x: jnp.ones(x.shape, x.dtype),
        jax.eval_shape(sim.init, context.key).aggregator,
    )

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
