"""The attacks on series once more: float64, plain loops, no JAX.

A series is ``[T, F]`` of which the first C columns are channels. The noise, and which
steps an attacker chose, are inputs. Nothing here is shared with the package.
"""

import numpy as np


def each(values, num_channels):
    """A number for every channel, from one or from as many."""
    return list(values) if np.ndim(values) else [values] * num_channels


def variability(x, noise, amplitude, sd, chosen):
    out = np.array(x, np.float64)
    num_channels = len(noise[0])
    for t in chosen:
        for k in range(num_channels):
            spread = each(sd, num_channels)[k]
            out[t, k] += amplitude * spread * float(noise[t][k])
    return out


def pattern_scaling(x, num_channels, scale, mean, chosen):
    out = np.array(x, np.float64)
    for t in chosen:
        for k in range(num_channels):
            mu = each(mean, num_channels)[k]
            out[t, k] = mu + scale * (out[t, k] - mu)
    return out


def ramp_at(t, start, ramp):
    if t < start:
        return 0.0
    return 1.0 if t - start + 1 >= ramp else (t - start + 1) / ramp


def gradual_pattern(x, pattern, amplitude, start, ramp):
    out = np.array(x, np.float64)
    for t in range(len(out)):
        for k in range(len(pattern[0])):
            strength = amplitude * ramp_at(t, start, ramp)
            out[t, k] += strength * pattern[t % len(pattern)][k]
    return out


def gradual_steps(num_steps, start, ramp):
    """The steps at full strength."""
    return [t for t in range(num_steps) if ramp_at(t, start, ramp) == 1.0]


def gradual_windows(windows, pattern, amplitude):
    """Every step of every window at full strength."""
    return [gradual_pattern(window, pattern, amplitude, 0, 1) for window in windows]


def repeated_rows(num_steps, size, period, offset):
    """``step -> row of the pattern`` of the steps that it overwrites."""
    found = {}
    for first in range(offset, num_steps, period):
        for row in range(size):
            if first + row < num_steps:
                found[first + row] = row
    return found


def repeated_pattern(x, pattern, period, offset):
    out = np.array(x, np.float64)
    rows = repeated_rows(len(out), len(pattern), period, offset)
    for t, row in rows.items():
        for k in range(len(pattern[0])):
            out[t, k] = pattern[row][k]
    return out


def repeated_windows(windows, pattern):
    """The pattern at the end of every window, or as much of its end as fits."""
    out = [np.array(window, np.float64) for window in windows]
    for window in out:
        for back in range(1, min(len(pattern), len(window)) + 1):
            for k in range(len(pattern[0])):
                window[-back, k] = pattern[-back][k]
    return out


def aimed(labels, steps, target):
    """The labels with the target on the step after each of ``steps``."""
    labels = list(labels)
    for t in steps:
        if t + 1 < len(labels):
            labels[t + 1] = target
    return labels


def state(x, low=-0.5, high=0.5):
    """Labels for the tests: 0, 1 or 2 as the first channel is low, middle or high."""
    return [0 if row[0] < low else 2 if row[0] > high else 1 for row in x]
