"""How many clients to train side by side: the measurement behind the default.

Times local training of a cohort (one epoch, batch 10, plain SGD, random images) for
several chunk sizes, compile time apart; the median of three repetitions. The defaults
in ``fedjax_sim.simulation.default_client_chunk`` are read off its table.

    python -m benchmarks.client_chunk
"""

import dataclasses
import sys
from typing import Literal

import jax
import numpy as np
import tyro

from benchmarks.arms import fedjax_arm
from fedjax_sim.sharding import usable_cores


@dataclasses.dataclass(frozen=True)
class Config:
    """Times local training for several chunk sizes."""

    models: tuple[Literal["cnn", "mlp", "digits_cnn"], ...] = (
        "cnn",
        "mlp",
        "digits_cnn",
    )
    """Networks of the zoo."""
    chunks: tuple[int, ...] = (1, 2, 5, 10, 25, 50)
    """Chunk sizes; each should divide the number of clients of a core."""
    clients: int = 100
    """Clients trained."""
    samples: int = 100
    """Samples of each client."""
    cores: int = usable_cores()
    """Cores of the CPU, each of which trains its own clients."""


def measure(name: str, chunk: int, config: Config) -> tuple[float, float]:
    """Compile seconds, and samples trained per second."""
    found = fedjax_arm.train(
        name,
        config.cores,
        chunk=chunk,
        clients=config.clients,
        samples=config.samples,
    )
    return found["compile"], found["rate"]


def main() -> None:
    prog = "python -m benchmarks.client_chunk"
    config = tyro.cli(Config, description=__doc__, prog=prog)
    if not 1 <= config.cores <= usable_cores():
        sys.exit(f"error: --cores must be from 1 to {usable_cores()}.")
    for name in ("chunks", "clients", "samples"):
        least = 10 if name == "samples" else 1  # a batch has ten
        if min(np.atleast_1d(getattr(config, name))) < least:
            sys.exit(f"error: --{name} must be at least {least}.")
    print("| model | chunk | compile s | samples/s |\n|---|---|---|---|")
    for name in config.models:
        for chunk in config.chunks:
            compile_seconds, rate = measure(name, chunk, config)
            print(f"| {name} | {chunk} | {compile_seconds:.1f} | {rate:,.0f} |")
    device = jax.devices()[0]
    print(f"{config.cores} x {device.device_kind}, jax {jax.__version__}")


if __name__ == "__main__":
    main()
