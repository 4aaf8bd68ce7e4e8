"""Aggregators as plain float64 NumPy loops, written from the definitions alone.

Every function takes the cohort's updates ``U [n, d]`` and an optional mask of who
takes part, and returns a ``Result``. Nothing here is shared with the package.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np


class Result(NamedTuple):
    aggregate: np.ndarray
    weights: np.ndarray
    keep: np.ndarray
    scores: np.ndarray
    extra: Mapping[str, Any] = MappingProxyType({})


def present(U, mask=None):
    """Indices of the rows that take part: in the mask, finite, and of finite norm."""
    rows = []
    for i in range(len(U)):
        with np.errstate(over="ignore", invalid="ignore"):
            norm = np.sum(np.asarray(U[i], np.float32) ** 2)
        if np.isfinite(norm) and (mask is None or mask[i]):
            rows.append(i)
    return rows


def combine(U, weights):
    total = np.zeros(len(U[0]))
    for i, weight in enumerate(weights):
        if weight != 0:
            total += weight * np.asarray(U[i], np.float64)
    return total


def normalized(weights):
    weights = np.asarray(weights, np.float64)
    return weights / weights.sum() if weights.sum() > 1e-12 else 0.0 * weights


def members(n, rows):
    return np.array([i in rows for i in range(n)])


def fedavg(U, mask=None, sizes=None, total=None):
    rows = present(U, mask)
    weights = np.zeros(len(U))
    for i in rows:
        weights[i] = 1.0 if sizes is None else sizes[i]
    weights = normalized(weights)
    shrink = 1.0 if total is None else len(rows) / total
    keep = members(len(U), rows)
    return Result(
        shrink * combine(U, weights), weights, keep, np.where(keep, 0, np.inf)
    )


def coordinate_wise(U, mask, ranks):
    """Mean of the values of the ranks ``ranks(r)``; ties share what they supplied."""
    n, d = np.shape(U)
    rows = present(U, mask)
    ranks = ranks(len(rows))
    aggregate, shares = np.zeros(d), np.zeros(n)
    for j in range(d):
        if not len(ranks):
            continue
        values = sorted(float(U[i][j]) for i in rows)
        kept = [values[k] for k in ranks]
        aggregate[j] = sum(kept) / len(kept)
        for value in set(kept):
            holders = [i for i in rows if float(U[i][j]) == value]
            for i in holders:
                shares[i] += kept.count(value) / len(kept) / len(holders) / d
    keep = members(n, rows)
    return Result(aggregate, shares, keep, np.where(keep, 1 - shares, np.inf))


def median(U, mask=None, even="midpoint"):
    def ranks(r):
        if r == 0:
            return []
        if r % 2 == 1 or even == "lower":
            return [(r - 1) // 2]
        return [r // 2 - 1, r // 2]

    return coordinate_wise(U, mask, ranks)


def trimmed_mean(U, b, mask=None):
    b = max(0, b - (len(U) - len(present(U, mask))))
    return coordinate_wise(U, mask, lambda r: list(range(b, r - b)))


def distance(u, v):
    return np.sum((np.asarray(u, np.float64) - np.asarray(v, np.float64)) ** 2)


def scores_among(U, rows, q, squared=True):
    """Sum of the distances to the q nearest others among ``rows``; inf elsewhere."""
    scores = np.full(len(U), np.inf)
    for i in rows:
        others = sorted(distance(U[i], U[j]) for j in rows if j != i)
        if not squared:
            others = [np.sqrt(x) for x in others]
        scores[i] = sum(others[: max(q, 0)])
    return scores


def best(scores, m):
    """The m clients of lowest finite score, ties to the lowest index."""
    finite = [i for i in range(len(scores)) if np.isfinite(scores[i])]
    return sorted(finite, key=lambda i: (scores[i], i))[: max(m, 0)]


def counts(U, mask, f):
    rows = present(U, mask)
    return rows, len(rows), max(0, f - (len(U) - len(rows)))


def krum(U, f, mask=None, squared=True, neighbours="n-f-2"):
    rows, r, f = counts(U, mask, f)
    q = {"n-f-2": r - f - 2, "n-f-1": r - f - 1, "n-f": r - f}[neighbours]
    scores = scores_among(U, rows, q, squared)
    chosen = best(scores, 1) if r >= 2 * f + 3 else []
    keep = members(len(U), chosen)
    return Result(combine(U, 1.0 * keep), 1.0 * keep, keep, scores)


def multi_krum(U, f, m=None, mask=None, sizes=None, rule="one_shot"):
    rows, r, f = counts(U, mask, f)
    scores = scores_among(U, rows, r - f - 2)
    chosen = []
    if r >= 2 * f + 3 and rule == "iterative":
        left = list(rows)
        while len(left) > 2 * f + 2:
            chosen += best(scores_among(U, left, len(left) - f - 2), 1)
            left.remove(chosen[-1])
    elif r >= 2 * f + 3:
        chosen = best(scores, r - f - 2 if m is None else m)
    weights = np.zeros(len(U))
    for i in chosen:
        weights[i] = 1.0 if sizes is None else sizes[i]
    weights = normalized(weights)
    keep = members(len(U), chosen)
    return Result(combine(U, weights), weights, keep, scores, {"order": chosen})


def norm(u):
    return np.sqrt(np.sum(np.asarray(u, np.float64) ** 2))


def cosine(u, v):
    if norm(u) <= 1e-12 or norm(v) <= 1e-12:
        return 0.0
    dot = np.sum(np.asarray(u, np.float64) * np.asarray(v, np.float64))
    return dot / (norm(u) * norm(v))


def rescaled(u, length):
    u = np.asarray(u, np.float64)
    return u / norm(u) * length if norm(u) > 1e-12 else 0.0 * u


def trust_inputs(U, g0, rows):
    n = len(U)
    if not np.isfinite(norm(g0)):
        g0 = np.zeros(len(g0))
    cosines, moved = np.zeros(n), np.zeros((n, len(g0)))
    for i in rows:
        cosines[i] = cosine(U[i], g0)
        moved[i] = rescaled(U[i], norm(g0))
    return cosines, moved, g0


def fltrust(U, g0, mask=None):
    rows = present(U, mask)
    cosines, moved, g0 = trust_inputs(U, g0, rows)
    trust = np.maximum(cosines, 0)
    weights = normalized(trust)
    scores = np.full(len(U), np.inf)
    for i in rows:
        scores[i] = 1 - cosines[i]
    extra = {"trust": trust, "cosine": cosines}
    return Result(combine(moved, weights), weights, trust > 0, scores, extra)


def dual_system(
    U,
    g0,
    f,
    variant="filter_then_trust",
    mask=None,
    m=None,
    krum_space="normalized",
    fallback="zero",
    tau=0.0,
    gamma=1.0,
    base="filter_then_trust",
    rho=0.9,
    k=1.5,
    tau_min=0.0,
    tau_max=0.5,
    tau_before=0.0,
):
    n = len(U)
    rows = present(U, mask)
    cosines, moved, g0 = trust_inputs(U, g0, rows)
    trust = np.maximum(cosines, 0)
    eligible = [i for i in rows if norm(U[i]) > 1e-12]
    raw_space = variant == "gated_mean" or krum_space == "raw"
    space = [np.zeros(len(g0))] * n
    for i in rows:
        space[i] = np.asarray(U[i], np.float64) if raw_space else moved[i]
    extra = {"cosine": cosines}

    threshold = tau
    if variant == "dynamic_trust":
        threshold = tau_before
        if eligible:
            c = np.array([cosines[i] for i in eligible])
            raw = np.median(c) - k * 1.4826 * np.median(np.abs(c - np.median(c)))
            extra["tau_raw"] = raw
            threshold = min(max(rho * tau_before + (1 - rho) * raw, tau_min), tau_max)
        extra["threshold"] = threshold

    if variant == "trust_then_filter" or (
        variant == "dynamic_trust" and base == "trust_then_filter"
    ):
        survivors = [i for i in rows if cosines[i] > threshold]
        r = len(survivors)
        f = max(0, f - (n - r))
        extra["gate"], extra["f_remaining"] = members(n, survivors), f
        scores = scores_among(space, survivors, r - f - 2)
        m = r - f - 2 if m is None else m
        keep = survivors if r < f + 3 else best(scores, m)
        weights = normalized(trust * members(n, keep))
    else:
        r = len(rows)
        f = max(0, f - (n - r))
        scores = scores_among(space, eligible, r - f - 2)
        m = r - f - 2 if m is None else m
        filtered = best(scores, m) if r >= 2 * f + 3 else []
        extra["krum_keep"] = members(n, filtered)
        if variant == "soft":
            kappa = np.zeros(n)
            ordered = sorted(scores[i] for i in eligible)
            mth = ordered[m - 1] if 0 < m <= len(ordered) else np.inf
            for i in eligible:
                kappa[i] = 1.0 if scores[i] <= mth else (mth / scores[i]) ** gamma
            extra["kappa"] = kappa
            weights = normalized(trust * kappa * (r >= 2 * f + 3))
            keep = [i for i in range(n) if weights[i] > np.finfo(np.float32).tiny]
            trust = trust * (r >= 2 * f + 3)
        elif variant == "filter_then_trust":
            keep = filtered
            weights = normalized(trust * members(n, keep))
        elif variant == "gated_mean":
            keep = [i for i in filtered if cosines[i] > 0]
            weights = normalized(1.0 * members(n, keep))
        else:
            keep = [i for i in filtered if cosines[i] > threshold]
            weights = normalized(trust * members(n, keep))

    averaged = [np.zeros(len(g0)) if i not in rows else U[i] for i in range(n)]
    aggregate = combine(averaged if variant == "gated_mean" else moved, weights)
    if weights.sum() == 0 and fallback == "root":
        aggregate = np.asarray(g0, np.float64)
    keep = members(n, keep)
    extra["trust"] = trust if variant == "soft" else trust * keep
    return Result(aggregate, weights, keep, scores, extra)
