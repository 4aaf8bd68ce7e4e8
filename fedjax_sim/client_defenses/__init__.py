"""What clients do to their own data before they train: leave samples of it out."""

from collections.abc import Callable

from fedjax_sim.client_defenses.fedsecure import (
    Calibration,
    calibrate,
    clean_windows,
    fedsecure,
)
from fedjax_sim.client_defenses.reference_model import (
    Detector,
    Scale,
    Training,
    adaptive_threshold,
    train_detector,
)
from fedjax_sim.client_defenses.sanitization import sanitization
from fedjax_sim.types import ClientDefense

CLIENT_DEFENSES: dict[str, Callable[..., ClientDefense]] = {
    "fedsecure": fedsecure,
    "sanitization": sanitization,
}

__all__ = [
    "CLIENT_DEFENSES",
    "Calibration",
    "Detector",
    "Scale",
    "Training",
    "adaptive_threshold",
    "calibrate",
    "clean_windows",
    "fedsecure",
    "sanitization",
    "train_detector",
]
