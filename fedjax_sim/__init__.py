"""Simulation of federated learning under attack, in JAX."""

from fedjax_sim import (
    aggregators,
    attacks,
    checkpoint,
    client_defenses,
    data,
    distances,
    hosts,
    metrics,
    models,
    order,
    report,
    types,
)
from fedjax_sim.clients import local_sgd
from fedjax_sim.models import Model
from fedjax_sim.sharding import use_cores
from fedjax_sim.simulation import Comparison, Simulation, compare
from fedjax_sim.state import History, RoundState

__version__ = "0.1.0"

__all__ = [
    "Comparison",
    "History",
    "Model",
    "RoundState",
    "Simulation",
    "__version__",
    "aggregators",
    "attacks",
    "checkpoint",
    "client_defenses",
    "compare",
    "data",
    "distances",
    "hosts",
    "local_sgd",
    "metrics",
    "models",
    "order",
    "report",
    "types",
    "use_cores",
]
