"""Windows, FedSecure's networks and its thresholds once more: float64, plain loops.

A network's parameters are inputs. Nothing here is shared with the package.
"""

import math

import numpy as np


def windows(x, y, starts, length):
    """``[(start, window, label of the step after)]``, as lists of one client's rows."""
    found = []
    for j in range(len(x)):
        if starts[j] and j + length < len(x):
            found.append((j, [x[j + t] for t in range(length)], y[j + length]))
    return found


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def lstm(x, kernel, bias):
    """Hidden states ``[L, H]`` of a series ``[L, F]``; gates in the order i f g o."""
    x, kernel, bias = (np.asarray(a, np.float64) for a in (x, kernel, bias))
    H, F = len(bias) // 4, x.shape[1]
    W = [kernel[:F, n * H : (n + 1) * H] for n in range(4)]
    U = [kernel[F:, n * H : (n + 1) * H] for n in range(4)]
    b = [bias[n * H : (n + 1) * H] for n in range(4)]
    h, c, states = np.zeros(H), np.zeros(H), []
    for step in x:
        i, f, g, o = (step @ W[n] + h @ U[n] + b[n] for n in range(4))
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        states.append(h)
    return np.array(states)


def both_directions(x, params):
    kernel, bias = params["kernel"], params["bias"]
    backward = lstm(np.asarray(x)[::-1], kernel[1], bias[1])[::-1]
    return np.hstack([lstm(x, kernel[0], bias[0]), backward])


def dense(h, params):
    return h @ np.asarray(params["kernel"], np.float64) + np.asarray(params["bias"])


def autoencode(windows, params):
    return np.array(
        [
            dense(both_directions(x, params["_BiLSTM_0"]), params["Dense_0"])
            for x in windows
        ]
    )


def bilstm(windows, params):
    logits = []
    for x in windows:
        h = both_directions(x, params["states"])
        H = h.shape[1] // 2
        last = np.concatenate([h[-1, :H], h[0, H:]])
        logits.append(dense(last, params["Dense_0"]))
    return np.array(logits)


def error(window, rebuilt):
    squares = [
        (float(a) - float(b)) ** 2
        for row, other in zip(window, rebuilt)
        for a, b in zip(row, other)
    ]
    return sum(squares) / len(squares)


def scale(errors):
    logs = [math.log(e) for e in errors]
    center = sum(logs) / len(logs)
    return center, math.sqrt(sum((v - center) ** 2 for v in logs) / len(logs))


def classify(layers, x):
    h = np.asarray(x, np.float64)
    for n, (W, b) in enumerate(layers):
        h = h @ np.asarray(W, np.float64) + np.asarray(b, np.float64)
        if n < len(layers) - 1:
            h = np.where(h > 0, h, 0)
    return sigmoid(h[:, 0])


def scores(detector, errors, center, spread):
    """Nothing is further from the usual than what the classifier has seen."""
    inputs = [(math.log(e) - center) / spread for e in errors]
    highest = float(detector.highest)
    return classify(detector.layers, [[min(x, highest)] for x in inputs])


def threshold(scores, k=3.0, percentile=95.0, mix=0.5, low=0.5, high=0.99):
    if len(scores) == 0:
        return high
    first = np.mean(scores) + k * np.std(scores)
    found = mix * first + (1 - mix) * np.percentile(scores, percentile)
    return min(max(found, low), high)


def limit(errors):
    """Of a device's errors, the one above which a window is a positive."""
    logs = [math.log(e) for e in errors]
    return math.exp(threshold(logs, low=-math.inf, high=math.inf))
