"""Rules that turn the clients' updates into one, most of them Byzantine-robust."""

from collections.abc import Callable

from fedjax_sim.aggregators.dual_system import dual_system
from fedjax_sim.aggregators.fedavg import fedavg
from fedjax_sim.aggregators.fltrust import fltrust
from fedjax_sim.aggregators.krum import krum, multi_krum
from fedjax_sim.aggregators.median import median
from fedjax_sim.aggregators.trimmed_mean import trimmed_mean
from fedjax_sim.types import Aggregator

REGISTRY: dict[str, Callable[..., Aggregator]] = {
    "dual_system": dual_system,
    "fedavg": fedavg,
    "fltrust": fltrust,
    "krum": krum,
    "median": median,
    "multi_krum": multi_krum,
    "trimmed_mean": trimmed_mean,
}

__all__ = [
    "REGISTRY",
    "dual_system",
    "fedavg",
    "fltrust",
    "krum",
    "median",
    "multi_krum",
    "trimmed_mean",
]
