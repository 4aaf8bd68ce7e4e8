"""Detectors before a rule, as plain float64 NumPy loops from the definitions.

PDRR, ERR, LFR and their union, a variational autoencoder and its linear stand-in, and a
deep autoencoding Gaussian mixture. Nothing here is shared with the package.
"""

import numpy as np

from tests.references.aggregators import (
    Result,
    best,
    combine,
    coordinate_wise,
    counts,
    members,
    normalized,
    scores_among,
)


def rest(base, U, rows, f, sizes=None):
    """The base on some of the rows, f of which may be Byzantine: ``(Delta, shares)``.

    Krum on fewer than f + 3 rows is their mean, the trimmed mean of up to 2 f rows is
    the median.
    """
    n, r = len(U), len(rows)
    if base in ("median", "trimmed_mean"):
        ranks = list(range(f, r - f))
        if base == "median" or 2 * f >= r:
            ranks = sorted({(r - 1) // 2, r // 2}) if r else []
        result = coordinate_wise(U, members(n, rows), lambda _: ranks)
        return result.aggregate, result.weights
    weights = np.zeros(n)
    for i in rows:
        weights[i] = sizes[i] if base == "fedavg" and sizes is not None else 1.0
    if base == "krum" and r >= f + 3:
        chosen = best(scores_among(U, rows, r - f - 2), 1)
        weights = 1.0 * members(n, chosen)
    weights = normalized(weights)
    return combine(U, weights), weights


def after_removal(base, U, kept, f, sizes=None):
    """The base on who is kept, with f less everybody who is not."""
    return rest(base, U, kept, max(0, f - (len(U) - len(kept))), sizes)


# PDRR ---------------------------------------------------------------------------------


def pearson(a, b):
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    a, b = a - np.mean(a), b - np.mean(b)
    lengths = np.sqrt(np.sum(a * a)) * np.sqrt(np.sum(b * b))
    return np.sum(a * b) / lengths if lengths > 0 else 0.0


def pdrr(U, f, base="krum", q=None, mask=None):
    n = len(U)
    q = {"krum": 0.5, "trimmed_mean": 0.9, "median": 0.9}[base] if q is None else q
    rows, r, left = counts(U, mask, f)
    first, shares = rest(base, U, rows, left)
    index = np.zeros(n)
    if base == "krum":
        # The client that Krum picks, or the mean where it is not defined.
        for i in rows:
            index[i] = pearson(np.sign(U[i]), np.sign(first))
            index[i] = 1.0 if shares[i] == 1.0 else index[i]
    else:
        # In these ranks a value counts: where it is cut, or where it is the median.
        counted = [j for j in range(r) if j < left or j >= r - left]
        if base == "median":
            counted = sorted({(r - 1) // 2, r // 2}) if r else []
        for j in range(len(first)):
            if first[j] == 0:
                continue
            values = sorted(float(U[i][j]) for i in rows)
            hits = [values[k] for k in counted]
            for i in rows:
                own = float(U[i][j])  # ties share what they have
                index[i] += hits.count(own) / values.count(own)
    # Products of floats like 0.1 * 10 are not to decide who ties with a threshold.
    largest = max((index[i] for i in rows), default=0.0)
    scores, flagged = np.full(n, np.inf), []
    for i in rows:
        if base == "median":
            guilty = index[i] <= (1 - q) * largest + 1e-9
            scores[i] = 1 - index[i] / largest if largest > 0 else 1.0
        else:
            guilty = index[i] >= q * largest - 1e-9
            scores[i] = index[i] / largest if largest > 0 else 1.0
        flagged += [i] if guilty else []
    kept = [i for i in rows if i not in flagged]
    aggregate, weights = after_removal(base, U, kept, f)
    extra = {"index": index, "first": first, "first_weights": shares}
    aggregate = aggregate if kept else first
    return Result(aggregate, weights, members(n, kept), scores, extra)


# ERR, LFR -----------------------------------------------------------------------------


def rejection(U, f, judge, criteria, base="fedavg", mask=None, sizes=None):
    """``judge(update)`` is the loss and the error rate of the model it leads to."""
    n = len(U)
    rows, _, left = counts(U, mask, f)
    impact = {"loss": np.full(n, np.inf), "error": np.full(n, np.inf)}
    left_behind: dict = {"loss": {}, "error": {}}
    of_all = judge(rest(base, U, rows, left, sizes)[0])
    for i in rows:
        others = np.delete(np.asarray(U), i, axis=0)
        rows_of_others = [j if j < i else j - 1 for j in rows if j != i]
        theirs = None if sizes is None else np.delete(sizes, i)
        without = judge(rest(base, others, rows_of_others, left, theirs)[0])
        for j, criterion in enumerate(("loss", "error")):
            left_behind[criterion][i] = without[j]
            impact[criterion][i] = of_all[j] - without[j]
    removed = set()
    for criterion in criteria:
        order = sorted(rows, key=lambda i: (left_behind[criterion][i], i))
        removed |= set(order[:left])
    kept = [i for i in rows if i not in removed]
    aggregate, weights = after_removal(base, U, kept, f, sizes)
    extra = {f"{c}_impact": np.where(members(n, rows), impact[c], 0) for c in impact}
    scores = impact["error" if criteria == ("error",) else "loss"]
    return Result(aggregate, weights, members(n, kept), scores, extra)


# What a network makes of a model ------------------------------------------------------


def seen(U, rows, view, params=None):
    """Rows ``[c]`` of who takes part: ``view`` is ``(columns, mean, scale)``."""
    columns, mean, scale = (np.asarray(x) for x in view)
    x = {}
    for i in rows:
        vector = np.asarray(U[i], np.float64)
        vector = vector if params is None else vector + np.asarray(params, np.float64)
        x[i] = (vector[columns] - np.float64(mean)) / np.float64(scale)
    return x


def dense(layer, x):
    kernel, bias = (np.asarray(a, np.float64) for a in layer)
    return x @ kernel + bias


def relu(x):
    return np.where(x > 0, x, 0.0)


def softplus(x):
    return np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0)


def through(hidden, x, activation):
    for layer in hidden:
        x = activation(dense(layer, x))
    return x


def vae_forward(net, x, xi=None):
    """``(x', mu, log s^2)`` of one x; the code is mu, or drawn with ``xi``."""
    h = through(net["encoder"], x, relu)
    mu, log_variance = dense(net["to_mean"], h), softplus(dense(net["to_spread"], h))
    z = mu if xi is None else mu + np.exp(0.5 * log_variance) * xi
    output = dense(net["to_output"], through(net["decoder"], z, relu))
    return output, mu, log_variance


def vae_score(x, output, mu, log_variance):
    x, output, mu, log_variance = (
        np.asarray(a, np.float64) for a in (x, output, mu, log_variance)
    )
    divergence = -0.5 * np.sum(1 + log_variance - mu**2 - np.exp(log_variance))
    return np.sum((x - output) ** 2) + divergence


def pca_residual(x, components):
    x = np.asarray(x, np.float64)
    left = x.copy()
    for component in np.asarray(components, np.float64):
        left -= np.sum(x * component) * component
    return np.sum(left**2)


def without_flagged(U, f, base, mask, sizes, scores, flags):
    """The base on the participants without ``flags(participants, f')``."""
    rows, _, left = counts(U, mask, f)
    flagged = flags(rows, left)
    kept = [i for i in rows if i not in flagged]
    aggregate, weights = after_removal(base, U, kept, f, sizes)
    everyone = np.array([scores.get(i, np.inf) for i in range(len(U))])
    return Result(aggregate, weights, members(len(U), kept), everyone)


def above_mean(scores):
    """Who scores above the mean; ``scores`` is a dict by client."""

    def flags(rows, f):
        if len({scores[i] for i in rows}) < 2:
            return []
        mean = sum(scores[i] for i in rows) / len(rows)
        return [i for i in rows if scores[i] > mean]

    return flags


def highest(scores):
    return lambda rows, f: sorted(rows, key=lambda i: (-scores[i], i))[:f]


def above(scores, threshold):
    return lambda rows, f: [i for i in rows if scores[i] > threshold]


# DAGMM --------------------------------------------------------------------------------


def dagmm_features(x, output):
    x, output = np.asarray(x, np.float64), np.asarray(output, np.float64)
    length, other = np.sqrt(np.sum(x**2)), np.sqrt(np.sum(output**2))
    relative = np.sqrt(np.sum((x - output) ** 2)) / max(length, 1e-12)
    parallel = np.sum(x * output) / (length * other) if length * other > 0 else 0.0
    return np.array([relative, parallel])


def dagmm_forward(net, x):
    """``[code, relative distance, cosine]`` of one x, and who it belongs to."""
    code = dense(net["code"], through(net["encoder"], x, np.tanh))
    output = dense(net["output"], through(net["decoder"], code, np.tanh))
    z = np.concatenate([code, dagmm_features(x, output)])
    logits = dense(net["member"], through(net["estimator"], z, np.tanh))
    powers = np.exp(logits - np.max(logits))
    return z, powers / np.sum(powers)


def mixture_moments(z, members):
    z, members = np.asarray(z, np.float64), np.asarray(members, np.float64)
    q, K = len(z[0]), len(members[0])
    phi, mu, cov = np.zeros(K), np.zeros((K, q)), np.zeros((K, q, q))
    for k in range(K):
        total = sum(members[i][k] for i in range(len(z)))
        phi[k] = total / len(z)
        for i in range(len(z)):
            mu[k] += members[i][k] * z[i] / total
        for i in range(len(z)):
            cov[k] += members[i][k] * np.outer(z[i] - mu[k], z[i] - mu[k]) / total
    return phi, mu, cov


def energy(z, phi, mu, cov, epsilon=0.0):
    """Minus the log density of one z, by inverse and determinant."""
    terms = []
    for k in range(len(phi)):
        S = np.asarray(cov[k], np.float64) + epsilon * np.eye(len(z))
        away = np.asarray(z, np.float64) - mu[k]
        power = -0.5 * away @ np.linalg.inv(S) @ away
        terms.append(
            np.log(phi[k]) + power - 0.5 * np.log(np.linalg.det(2 * np.pi * S))
        )
    largest = max(terms)  # far out every density is 0 as a float
    return -(largest + np.log(sum(np.exp(t - largest) for t in terms)))
