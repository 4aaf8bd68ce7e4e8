"""MAD in float64 NumPy, client by client, from the definitions alone.

Nothing here is shared with the package.
"""

import math

import numpy as np

from tests.references.aggregators import (
    Result,
    combine,
    members,
    norm,
    normalized,
    present,
)
from tests.references.filters import rows_of, two_means


def similarities(U, rows, clusters=1, scale="min_max"):
    """``d`` of every row of U, by the centre and the range of ``rows``."""
    main = rows if clusters == 1 else two_means(U, rows)
    centre = sum(U[i] for i in main) / len(main)
    delta = [norm(u - centre) for u in U]
    high = max(delta[i] for i in rows)
    low = min(delta[i] for i in rows) if scale == "min_max" else 0.0
    if high - low <= 1e-6 * high:
        return [1.0 for _ in U]
    return [1 - min(max((x - low) / (high - low), 0), 1) for x in delta]


def clip(x):
    return min(max(x, 0.0), 1.0)


def reputation(old, d, t, alpha=0.5, beta=0.75, variant="paper"):
    if t == 1:
        return d
    if variant == "code":
        raw = old + d - (old / t if d >= alpha else math.exp(-(1 - d * (old / t))))
        return clip(beta * raw + (1 - beta) * old)
    raw = old + d + (old / t if d >= alpha else -math.exp(-(1 - d) * (old / t)))
    return beta * clip(raw) + (1 - beta) * old


def trust(old, R, d, beta=0.85):
    raw = math.sqrt(R**2 + d**2) - math.sqrt((1 - R) ** 2 + (1 - d) ** 2)
    return clip(beta * raw + (1 - beta) * old)


class MAD:
    """The rule with its memory in dictionaries; call it once a round."""

    def __init__(
        self,
        start=5,
        alpha=0.5,
        beta_reputation=0.75,
        beta_trust=0.85,
        threshold=0.15,
        clusters=1,
        scale="min_max",
        variant="paper",
        weighting="uniform",
        measured="kept",
    ):
        self.start, self.threshold, self.measured = start, threshold, measured
        self.alpha, self.betas = alpha, (beta_reputation, beta_trust)
        self.clusters, self.scale, self.variant = clusters, scale, variant
        self.weighting = weighting
        self.reputation, self.trust, self.removed, self.t = {}, {}, set(), 1

    def __call__(self, U, ids, mask=None, sizes=None):
        n, rows = len(U), present(U, mask)
        U = rows_of(U, rows)
        judged = [i for i in rows if ids[i] not in self.removed]
        yardstick = rows if self.measured == "all" else judged
        d = np.ones(n)
        if yardstick:
            d = similarities(U, yardstick, self.clusters, self.scale)
        scores = np.full(n, np.inf)
        for i in judged:
            client = ids[i]
            known, trusted = (
                memory.get(client, 0.0) for memory in (self.reputation, self.trust)
            )
            known = reputation(
                known, d[i], self.t, self.alpha, self.betas[0], self.variant
            )
            trusted = trust(trusted, known, d[i], self.betas[1])
            self.reputation[client], self.trust[client] = known, trusted
            scores[i] = 1 - trusted
            if self.t >= self.start and trusted < self.threshold:
                self.removed.add(client)
        self.t += 1
        kept = [i for i in judged if ids[i] not in self.removed]
        weights = np.zeros(n)
        for i in kept:
            by_data = self.weighting == "data" and sizes is not None
            weights[i] = sizes[i] if by_data else 1.0
        weights = normalized(weights)
        extra = {
            "trust": np.array([self.trust.get(i, 0.0) for i in ids]),
            "reputation": np.array([self.reputation.get(i, 0.0) for i in ids]),
            "distance": np.array([1 - d[i] if i in judged else 0 for i in range(n)]),
        }
        return Result(combine(U, weights), weights, members(n, kept), scores, extra)
