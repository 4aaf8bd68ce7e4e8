"""What is measured: sizes that every arm shares. Standard library only.

Each arm runs in the environment of its library, so this file must not import any.
"""

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

BATCH = 10
LEARNING_RATE = 0.01
REPEATS = 3
# Of local training, whose arms take turns several times (`--passes`).
REPEATS_A_PASS = 1

# Local training: every client takes one epoch of `samples` in batches of ten. MNIST has
# 600 for each of 100 clients; with so many the CNN would take PyTorch half an hour.
TRAINING: dict[str, dict[str, Any]] = {
    "cnn": {"shape": (28, 28, 1), "clients": 100, "samples": 100},
    "mlp": {"shape": (28, 28, 1), "clients": 100, "samples": 600},
    "digits_cnn": {"shape": (8, 8, 1), "clients": 100, "samples": 100},
}
# Forward and backward of one sample, in 1e6 floating point operations: a convolution of
# k^2 taps takes 2 k^2 Ci Co H W, a dense layer 2 in out; three times (two for the first
# layer, whose input needs no gradient).
MFLOP = {
    "cnn": (
        2 * (2 * 9 * 1 * 30 * 26 * 26)
        + 3 * (2 * 9 * 30 * 50 * 11 * 11)
        + 3 * (2 * 1250 * 100)
        + 3 * (2 * 100 * 10)
    )
    / 1e6,
    "mlp": (2 * (2 * 784 * 200) + 3 * (2 * 200 * 10)) / 1e6,
    "digits_cnn": (
        2 * (2 * 9 * 1 * 8 * 8 * 8) + 3 * (2 * 9 * 8 * 16 * 4 * 4) + 3 * (2 * 64 * 10)
    )
    / 1e6,
}

# Aggregation: n rows of d numbers, f of them assumed to be Byzantine.
ROWS, COLUMNS, ASSUMED = 100, 1_600_000, 20
LARGE = [
    "fedavg",
    "median",
    "trimmed_mean",
    "meamed",
    "krum",
    "multi_krum",
    "geometric_median",
    "centered_clipping",
    "monna",
    "caf",
    "nnm",
    "bucketing",
    "clipping",
    "arc",
]
# Rules that try every subset of the clients.
FEW_ROWS, FEW_ASSUMED = 10, 2
FEW = ["mda", "smea"]

# The matrix: rules and attacks that ByzFL and this library both have. Everybody trains
# one step of ten samples a round. ByzFL's attacks act on gradients, ours on updates,
# which are gradients times minus the rate: ALIE's direction and the size of the noise
# follow. ByzFL's SignFlipping sends minus the honest mean: IPM of strength 1 here.
MATRIX: dict[str, Any] = {
    "clients": 100,
    "byzantine": 20,
    "learning_rate": 0.1,
    "rules": [
        "fedavg",
        "median",
        "trimmed_mean",
        "geometric_median",
        "krum",
        "multi_krum",
        "meamed",
    ],
    "attacks": ["sign_flip", "ipm", "alie", "gaussian"],
    "model": "cnn",
    "rounds": 20,
}
IPM, ALIE, NOISE = 2.0, 1.5, 1.0

# Flower: rounds of FedAvg with every client, one epoch of `samples`.
FLOWER = {"clients": 100, "samples": 60, "rounds": 3}


def measure(call: Callable[[], Any], repeats: int = REPEATS) -> dict[str, Any]:
    """Seconds of the first call, and of ``repeats`` more."""
    start = time.perf_counter()
    call()
    first = time.perf_counter() - start
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return {"first": first, "seconds": seconds, "median": statistics.median(seconds)}


def main(arms: dict[str, Callable[..., dict[str, Any]]]) -> None:
    """``python arm.py NAME '{"option": value}'``: prints what it found as JSON."""
    name, options = sys.argv[1], json.loads(sys.argv[2])
    found = arms[name](**options)
    # Linux counts kilobytes, macOS bytes.
    unit = 1e3 if sys.platform == "linux" else 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    print("\n" + json.dumps({**found, "peak_mb": round(peak)}), flush=True)
