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
from fedjax_sim.data.population import populate
from fedjax_sim.data.series import (
    SeriesFederation,
    cut,
    federate_series,
    states,
    windows,
)
from fedjax_sim.data.vitals import Record, Vitals, load_vitals

__all__ = [
    "DATASETS",
    "PARTITIONS",
    "Partition",
    "Record",
    "SeriesFederation",
    "Vitals",
    "by_client",
    "clients_from_indices",
    "cut",
    "dirichlet",
    "federate",
    "federate_series",
    "hold_out",
    "iid",
    "label_bias",
    "load",
    "load_vitals",
    "populate",
    "shards",
    "states",
    "windows",
]
