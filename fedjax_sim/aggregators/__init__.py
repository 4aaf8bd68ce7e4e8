"""Rules that turn the clients' updates into one, most of them Byzantine-robust."""

from collections.abc import Callable

from fedjax_sim.aggregators.auror import auror
from fedjax_sim.aggregators.bulyan import bulyan
from fedjax_sim.aggregators.caf import caf
from fedjax_sim.aggregators.centered_clipping import centered_clipping
from fedjax_sim.aggregators.chain import chain
from fedjax_sim.aggregators.crfl import crfl
from fedjax_sim.aggregators.dagmm_detector import dagmm_detector
from fedjax_sim.aggregators.dnc import dnc
from fedjax_sim.aggregators.dual_system import dual_system
from fedjax_sim.aggregators.fedavg import fedavg
from fedjax_sim.aggregators.flame import flame
from fedjax_sim.aggregators.fldetector import fldetector
from fedjax_sim.aggregators.fltrust import fltrust
from fedjax_sim.aggregators.foolsgold import foolsgold
from fedjax_sim.aggregators.geometric_median import geometric_median
from fedjax_sim.aggregators.krum import krum, multi_krum
from fedjax_sim.aggregators.mad import mad
from fedjax_sim.aggregators.mda import mda
from fedjax_sim.aggregators.meamed import meamed, phocas
from fedjax_sim.aggregators.median import median
from fedjax_sim.aggregators.monna import monna
from fedjax_sim.aggregators.norm_clipping import norm_clipping
from fedjax_sim.aggregators.pdrr import pdrr
from fedjax_sim.aggregators.pre_aggregators import arc, bucketing, clipping, nnm
from fedjax_sim.aggregators.rejection import err, err_lfr, lfr
from fedjax_sim.aggregators.robust_learning_rate import robust_learning_rate
from fedjax_sim.aggregators.signguard import signguard
from fedjax_sim.aggregators.smea import smea
from fedjax_sim.aggregators.trimmed_mean import trimmed_mean
from fedjax_sim.aggregators.vae_detector import vae_detector
from fedjax_sim.types import Aggregator, PreAggregator

REGISTRY: dict[str, Callable[..., Aggregator]] = {
    "caf": caf,
    "bulyan": bulyan,
    "centered_clipping": centered_clipping,
    "crfl": crfl,
    "auror": auror,
    "dagmm_detector": dagmm_detector,
    "dnc": dnc,
    "dual_system": dual_system,
    "err": err,
    "err_lfr": err_lfr,
    "fedavg": fedavg,
    "flame": flame,
    "fldetector": fldetector,
    "fltrust": fltrust,
    "geometric_median": geometric_median,
    "foolsgold": foolsgold,
    "krum": krum,
    "lfr": lfr,
    "mad": mad,
    "mda": mda,
    "meamed": meamed,
    "median": median,
    "monna": monna,
    "multi_krum": multi_krum,
    "smea": smea,
    "norm_clipping": norm_clipping,
    "pdrr": pdrr,
    "phocas": phocas,
    "robust_learning_rate": robust_learning_rate,
    "signguard": signguard,
    "trimmed_mean": trimmed_mean,
    "vae_detector": vae_detector,
}

# Steps for ``chain``.
PRE_AGGREGATORS: dict[str, Callable[..., PreAggregator]] = {
    "arc": arc,
    "bucketing": bucketing,
    "clipping": clipping,
    "nnm": nnm,
}

__all__ = [
    "PRE_AGGREGATORS",
    "REGISTRY",
    "arc",
    "auror",
    "bucketing",
    "bulyan",
    "caf",
    "centered_clipping",
    "chain",
    "clipping",
    "crfl",
    "dagmm_detector",
    "dnc",
    "dual_system",
    "err",
    "err_lfr",
    "fedavg",
    "flame",
    "fldetector",
    "fltrust",
    "foolsgold",
    "geometric_median",
    "krum",
    "lfr",
    "mad",
    "mda",
    "meamed",
    "median",
    "monna",
    "multi_krum",
    "nnm",
    "norm_clipping",
    "pdrr",
    "phocas",
    "robust_learning_rate",
    "signguard",
    "smea",
    "trimmed_mean",
    "vae_detector",
]
