"""k-FED and the vote of labels, as plain float64 NumPy loops.

Written from the definitions alone; the uniform draws of k-means++ are given and the
singular vectors are LAPACK's. Masked rows are taken out first, so that a mistake with
them cannot be shared. Nothing here is shared with the package.
"""

import itertools
from typing import NamedTuple

import numpy as np


class Local(NamedTuple):
    lifted: np.ndarray
    core: list
    start: np.ndarray
    theta: np.ndarray
    labels: list
    separation: float


def sq_distance(a, b):
    return sum((x - y) ** 2 for x, y in zip(a, b))


def right_singular(A, rank):
    return np.linalg.svd(A)[2][:rank].T


def plus_plus(draws, X):
    """Rows, each drawn in proportion to the squared distance from those before."""
    rows = []
    for u in draws:
        weights = [min(sq_distance(x, X[r]) for r in rows) if rows else 1.0 for x in X]
        if sum(weights) == 0:
            weights = [1.0] * len(X)
        upto = itertools.accumulate(weights)
        rows.append(next(row for row, w in enumerate(upto) if w > u * sum(weights)))
    return np.array([X[r] for r in rows], np.float64)


def nearest(x, centers, origin):
    """Ties to within 1e-6 of the squares, taken from the origin, to the first."""
    distances = [sq_distance(x, c) for c in centers]
    for r, c in enumerate(centers):
        size = sq_distance(x, origin) + sq_distance(c, origin)
        if distances[r] <= min(distances) + 1e-6 * size:
            return r
    return None


def lloyd(X, centers, max_steps=50):
    """Centres and labels; an empty cluster keeps its centre."""
    origin = np.mean(X, axis=0)
    centers = [np.array(c, np.float64) for c in centers]
    labels = None
    for _ in range(max_steps):
        before = labels
        labels = [nearest(x, centers, origin) for x in X]
        for r in range(len(centers)):
            members = [x for x, label in zip(X, labels) if label == r]
            if members:
                centers[r] = np.mean(members, axis=0)
        if labels == before:
            break
    return np.array(centers), labels


def core_sets(X, centers, ratio=1 / 3):
    """``core[x][r]``: whether row x is in the core set of centre r."""
    core = []
    for x in X:
        d = [np.sqrt(sq_distance(x, c)) for c in centers]
        core.append(
            [
                all(d[r] <= ratio * d[s] for s in range(len(d)) if s != r)
                for r in range(len(d))
            ]
        )
    return core


def core_means(A, core, otherwise):
    means = []
    for r in range(len(otherwise)):
        members = [a for a, sets in zip(A, core) if sets[r]]
        means.append(np.mean(members, axis=0) if members else otherwise[r])
    return np.array(means)


def separation(A, labels, theta):
    k = len(theta)
    residual = np.array([a - theta[label] for a, label in zip(A, labels)])
    norm = np.linalg.norm(residual, 2)
    if norm <= 1e-5 * np.linalg.norm(A - np.mean(A, axis=0)):
        return np.inf
    found = [np.inf]
    for r, s in itertools.combinations(range(k), 2):
        sizes = labels.count(r), labels.count(s)
        if min(sizes):
            spread = sum(np.sqrt(k) * norm / np.sqrt(size) for size in sizes)
            found.append(np.sqrt(sq_distance(theta[r], theta[s])) / spread)
    return min(found)


def local_clusters(A, draws, k, ratio=1 / 3, max_steps=50):
    """One client, with the draws of its k-means++."""
    V = right_singular(A, min(k, A.shape[1]))
    P = A @ V
    nu, _ = lloyd(P, plus_plus(draws, P), max_steps)
    core = core_sets(P, nu, ratio)
    lifted = nu @ V.T
    start = core_means(A, core, lifted)
    theta, labels = lloyd(A, start, max_steps)
    return Local(lifted, core, start, theta, labels, separation(A, labels, theta))


def farthest_first(X, num_first, num_seeds):
    """Rows: the first ones, then always the farthest from those so far."""
    rows = list(range(num_first))[:num_seeds]
    while len(rows) < num_seeds:
        away = [min([sq_distance(x, X[r]) for r in rows], default=np.inf) for x in X]
        rows.append(away.index(max(away)))
    return rows


def merge_centers(thetas, k, max_steps=1):
    """``thetas``: per client, the centres of the clusters that hold samples.

    Returns the seeds, mu, and tau as one list for each client.
    """
    X = [np.asarray(c, np.float64) for theta in thetas for c in theta]
    seeds = [X[r] for r in farthest_first(X, len(thetas[0]), k)]
    mu, labels = lloyd(X, seeds, max_steps)
    labels = iter(labels)
    return np.array(seeds), mu, [[next(labels) for _ in theta] for theta in thetas]


def modes(clusters, labels, k):
    """The most frequent label of every cluster, the smallest of several, else -1."""
    found = []
    for c in range(k):
        inside = [y for cluster, y in zip(clusters, labels) if cluster == c]
        found.append(max(sorted(set(inside)), key=inside.count, default=-1))
    return found


def keep(clusters, labels, k):
    mode = modes(clusters, labels, k)
    return [y == mode[c] for c, y in zip(clusters, labels)]


def sanitize(features, labels, draws, k, vote="local", server_steps=1, **options):
    """What every client keeps, and the separation of its clusters.

    ``features`` and ``labels`` are lists of the clients' samples, without padding;
    a label may be anything that can be compared. ``draws``: ``[N, k]``.
    """
    found = [
        local_clusters(np.asarray(A, np.float64), u, k, **options)
        for A, u in zip(features, draws)
    ]
    filled = [[r for r in range(k) if r in local.labels] for local in found]
    thetas = [local.theta[rows] for local, rows in zip(found, filled)]
    _, _, tau = merge_centers(thetas, k, server_steps)
    clusters = [
        [tau_i[rows.index(r)] for r in local.labels]
        for local, rows, tau_i in zip(found, filled, tau)
    ]
    if vote == "global":
        every = [list(itertools.chain(*part)) for part in (clusters, labels)]
        pooled = iter(keep(*every, k))
        kept = [[next(pooled) for _ in y] for y in labels]
    else:
        kept = [keep(c, y, k) for c, y in zip(clusters, labels)]
    return kept, [local.separation for local in found]
