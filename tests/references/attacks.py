"""The attacks written once more, from the papers: float64, plain loops, no JAX.

``U`` is a list of rows. Nothing here is shared with the package.
"""

import math
from statistics import NormalDist

import numpy as np


def mean(rows):
    """Coordinate-wise mean of a list of rows."""
    total = np.zeros(len(rows[0]))
    for row in rows:
        total = total + np.asarray(row, np.float64)
    return total / len(rows)


def std(rows, ddof=0):
    """Coordinate-wise standard deviation; 0 where it is not defined."""
    if len(rows) <= ddof:
        return np.zeros(len(rows[0]))
    centre, total = mean(rows), np.zeros(len(rows[0]))
    for row in rows:
        total = total + (np.asarray(row, np.float64) - centre) ** 2
    return np.sqrt(total / (len(rows) - ddof))


def sign_flip(u, scale=1.0, space="update", w=None):
    u = np.asarray(u, np.float64)
    if space == "update":
        return -scale * u
    w = np.asarray(w, np.float64)
    sent_model = -scale * (w + u)
    return sent_model - w


def scaling(u, factor):
    return factor * np.asarray(u, np.float64)


def gaussian(noise, mean=0.0, std=1.0):
    return mean + std * np.asarray(noise, np.float64)


def gaussian_fitted(rows, noise):
    return mean(rows) + std(rows) * np.asarray(noise, np.float64)


def ipm(rows, epsilon):
    return -epsilon * mean(rows)


def alie_counts(n, m):
    """``(s, p)``: supporters needed, and the probability inside ``z_max``."""
    s = math.floor(n / 2 + 1) - m
    return s, (n - m - s) / (n - m)


def alie_z(n, m):
    return NormalDist().inv_cdf(alie_counts(n, m)[1])


def alie(rows, z, ddof=0, direction=1):
    return mean(rows) + direction * z * std(rows, ddof)


def known(U, byzantine, knowledge, mask=None):
    """The rows an attack may take statistics of: finite, taking part, of its kind."""
    rows = []
    for i, row in enumerate(U):
        present = mask is None or mask[i]
        wanted = byzantine[i] if knowledge == "colluding" else not byzantine[i]
        if present and wanted and np.all(np.isfinite(row)):
            rows.append(row)
    return rows


def label_flip(y, mode, num_classes, source=None, target=None):
    """Every deterministic mode, on all samples."""
    flipped = []
    for label in y:
        if mode == "symmetric":
            flipped.append(num_classes - 1 - label)
        elif mode == "shift":
            flipped.append(label + 1 if label + 1 < num_classes else 0)
        elif mode == "targeted":
            flipped.append(target if label == source else label)
        else:
            raise ValueError(mode)
    return flipped


def detection(flagged, byzantine, present):
    """Counts and rates of one round by name; NaN where a rate is undefined."""
    tp = fp = num_byzantine = num_honest = 0
    for f, b, p in zip(flagged, byzantine, present):
        if not p:
            continue
        num_byzantine += bool(b)
        num_honest += not b
        tp += bool(f and b)
        fp += bool(f and not b)
    nan = float("nan")
    return {
        "num_byzantine": num_byzantine,
        "num_flagged": tp + fp,
        "true_positives": tp,
        "false_positives": fp,
        "tpr": tp / num_byzantine if num_byzantine else nan,
        "fpr": fp / num_honest if num_honest else nan,
        "fnr": (num_byzantine - tp) / num_byzantine if num_byzantine else nan,
    }
