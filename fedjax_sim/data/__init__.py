"""Data sets, and dividing them among clients."""

from fedjax_sim.data.catalog import DATASETS, load
from fedjax_sim.data.federation import clients_from_indices, federate, hold_out
from fedjax_sim.data.partition import (
    PARTITIONS,
    Partition,
    by_client,
    dirichlet,
    iid,
    label_bias,
    shards,
)

__all__ = [
    "DATASETS",
    "PARTITIONS",
    "Partition",
    "by_client",
    "clients_from_indices",
    "dirichlet",
    "federate",
    "hold_out",
    "iid",
    "label_bias",
    "load",
    "shards",
]
