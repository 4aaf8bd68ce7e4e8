"""Seconds a local batch that each defense of the sanitization study costs.

The paper's figure 5. Every defense runs alone, without evaluation, in the setting of
``experiments.sanitization``; compile time apart. The time of a round is divided by the
local batches of its cohort. Sanitization clusters once, in round 0: that round's extra
time stands in a column of its own, and per batch of the study's whole run.

    python -m benchmarks.defense_time --data-dir DIR
"""

import dataclasses
import statistics
import sys
import time
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tyro

import fedjax_sim as fs
from experiments import runner, sanitization
from fedjax_sim.registry import check_count
from fedjax_sim.sharding import usable_cores


@dataclasses.dataclass(frozen=True)
class Config:
    """Seconds a local batch that each defense of the sanitization study costs."""

    preset: Literal["paper", "pneumonia", "demo"] = "paper"
    """Of experiments.sanitization."""
    data_dir: Path | None = None
    """As for experiments.sanitization."""
    rounds: int = 3
    """Rounds after the first; their median counts."""
    cores: int = usable_cores()
    """Cores of the CPU."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """Seconds of a usual round, and what the first one takes beyond that."""

    round: float
    first: float
    batches: int


def measure(sim: fs.Simulation, rounds: int) -> Cost:
    """Runs a system alone, without evaluation."""
    alone = fs.compare({"alone": dataclasses.replace(sim, test=None)})
    states = alone.init(jax.random.key(0))
    alone.run(num_rounds=1, states=states)  # compiles
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        states, _ = alone.run(num_rounds=1, states=states)
        jax.block_until_ready(states)
        seconds.append(time.perf_counter() - start)
    usual = statistics.median(seconds[1:])
    steps = sim.client_update.num_steps(np.asarray(sim.clients.sizes()))
    batches = round(float(np.mean(steps)) * sim.cohort_size)
    return Cost(usual, max(seconds[0] - usual, 0.0), batches)


def main() -> None:
    prog = "python -m benchmarks.defense_time"
    config = tyro.cli(Config, description=__doc__, prog=prog)
    try:
        check_count("--rounds", config.rounds, 1)
        runner.start(config.cores)
        study = dataclasses.replace(
            sanitization.PRESETS[config.preset], data_dir=config.data_dir
        )
        (phase,), _ = sanitization.make_phases(study)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print("| defense | s a round | ms a batch | once, s | with it, ms a batch |")
    print("|:---|---:|---:|---:|---:|")
    for cell in sanitization.cells(study):
        own = (cell.attack, cell.poison, cell.attackers)
        if own != ("label_flip", study.poison, study.attackers[0]):
            continue
        cost = measure(phase.systems[cell.name], config.rounds)
        name = "no defense" if cell.defense == "fedavg" else cell.defense
        batch = 1000 * cost.round / cost.batches
        whole = batch + 1000 * cost.first / (cost.batches * study.rounds)
        once = f"{cost.first:.2f}" if name.startswith("sanitization") else "-"
        print(f"| {name} | {cost.round:.2f} | {batch:.3f} | {once} | {whole:.3f} |")
    device = jax.devices()[0]
    print(
        f"{study.dataset}, {study.model}, batch {study.batch_size}, {study.rounds} "
        f"rounds; {config.cores} x {device.device_kind}, jax {jax.__version__}"
    )


if __name__ == "__main__":
    main()
