"""What Byzantine clients do: to the updates they send, or to the data they train on."""

from collections.abc import Callable

from fedjax_sim.attacks.alie import alie
from fedjax_sim.attacks.badnets import badnets
from fedjax_sim.attacks.dba import dba
from fedjax_sim.attacks.fang_krum import fang_krum
from fedjax_sim.attacks.fang_trimmed_mean import fang_trimmed_mean
from fedjax_sim.attacks.fltrust_adaptive import fltrust_adaptive
from fedjax_sim.attacks.free_rider import free_rider
from fedjax_sim.attacks.gaussian import additive_noise, gaussian
from fedjax_sim.attacks.hybrid import hybrid
from fedjax_sim.attacks.ipm import ipm
from fedjax_sim.attacks.label_flip import label_flip
from fedjax_sim.attacks.mimic import mimic
from fedjax_sim.attacks.min_max import min_max, min_sum
from fedjax_sim.attacks.model_replacement import model_replacement
from fedjax_sim.attacks.nonfinite import inf_rows, nan_rows
from fedjax_sim.attacks.optimal import optimal_alie, optimal_ipm
from fedjax_sim.attacks.same_value import same_value
from fedjax_sim.attacks.scaling import scaling
from fedjax_sim.attacks.schedule import schedule
from fedjax_sim.attacks.series_backdoors import gradual_pattern, repeated_pattern
from fedjax_sim.attacks.series_poisoning import pattern_scaling, variability
from fedjax_sim.attacks.sign_flip import sign_flip
from fedjax_sim.types import DataAttack, UpdateAttack

UPDATE_ATTACKS: dict[str, Callable[..., UpdateAttack]] = {
    "additive_noise": additive_noise,
    "alie": alie,
    "fang_krum": fang_krum,
    "fang_trimmed_mean": fang_trimmed_mean,
    "fltrust_adaptive": fltrust_adaptive,
    "free_rider": free_rider,
    "gaussian": gaussian,
    "inf_rows": inf_rows,
    "ipm": ipm,
    "mimic": mimic,
    "min_max": min_max,
    "min_sum": min_sum,
    "model_replacement": model_replacement,
    "nan_rows": nan_rows,
    "optimal_alie": optimal_alie,
    "optimal_ipm": optimal_ipm,
    "same_value": same_value,
    "scaling": scaling,
    "sign_flip": sign_flip,
}
DATA_ATTACKS: dict[str, Callable[..., DataAttack]] = {
    "badnets": badnets,
    "dba": dba,
    "hybrid": hybrid,
    "label_flip": label_flip,
}
# On data too, but on series alone: they need to know which columns are channels.
SERIES_ATTACKS: dict[str, Callable[..., DataAttack]] = {
    "gradual_pattern": gradual_pattern,
    "pattern_scaling": pattern_scaling,
    "repeated_pattern": repeated_pattern,
    "variability": variability,
}

__all__ = [
    "DATA_ATTACKS",
    "SERIES_ATTACKS",
    "UPDATE_ATTACKS",
    "additive_noise",
    "alie",
    "badnets",
    "dba",
    "fang_krum",
    "fang_trimmed_mean",
    "fltrust_adaptive",
    "free_rider",
    "gaussian",
    "gradual_pattern",
    "hybrid",
    "inf_rows",
    "ipm",
    "label_flip",
    "mimic",
    "min_max",
    "min_sum",
    "model_replacement",
    "nan_rows",
    "optimal_alie",
    "optimal_ipm",
    "pattern_scaling",
    "repeated_pattern",
    "same_value",
    "scaling",
    "schedule",
    "sign_flip",
    "variability",
]
