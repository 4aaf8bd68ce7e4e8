"""Series of vital signs: what a record is, what counts as measured, equal steps."""

import datetime
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

# Of these 0 and less are what a monitor stores where it measured nothing; a pressure
# may be below 0 while a line is flushed or opened, so there only 0 itself is.
RATES = {
    "heart_rate": "beats/min",
    "pulse": "beats/min",
    "respiration_rate": "breaths/min",
    "spo2": "%",
}
PRESSURES = {
    f"{vessel}_{kind}": "mmHg"
    for vessel in ("abp", "pap")
    for kind in ("systolic", "diastolic", "mean")
}
CHANNELS = {**RATES, **PRESSURES}  # every channel's name, and its unit
MOST = 10_000.0  # of any channel: no monitor shows so much, and a damaged file may
MAX_SAMPLES = 10_000_000  # 19 years of minutes: beyond it the times are in another unit


class Record(NamedTuple):
    """A series of equally spaced samples of one patient.

    Attributes:
        name: of the record; no two of a ``Vitals`` are alike.
        patient: who it is of. A patient may have several records.
        start: time of the first sample, None where the source has none. MIMIC shifts
            the dates of each patient into the future; the time of day is true.
        values: ``float32 [T, C]``, NaN where not measured.
    """

    name: str
    patient: str
    start: datetime.datetime | None
    values: np.ndarray


class Vitals(NamedTuple):
    """Vital signs of patients, all at one interval.

    Attributes:
        name: the source it is of.
        records: in the order of the source.
        channels: what the C columns of every record are, out of ``CHANNELS``.
        interval: seconds between two samples.
        source: where it came from, with a checksum of the files.
        licence: under which the data may be used.
        left_out: name of a record that is not among them, and why.
    """

    name: str
    records: tuple[Record, ...]
    channels: tuple[str, ...]
    interval: float
    source: str
    licence: str
    left_out: Mapping[str, str] = MappingProxyType({})


def measured(values: np.ndarray, channels: tuple[str, ...]) -> np.ndarray:
    """``values`` with NaN in place of what stands for "not measured".

    That is what is not finite, a pressure of exactly 0, and any other channel's 0 or
    less.

    Args:
        values: ``[T, C]``.
        channels: the names of the C columns.

    Returns:
        ``float64 [T, C]``, a copy.

    Example:
        >>> values = np.array([[80.0, 20.0], [0.0, 0.0], [-1.0, -1.0]])
        >>> measured(values, ("heart_rate", "pap_mean")).tolist()
        [[80.0, 20.0], [nan, nan], [nan, -1.0]]
    """
    result = np.array(values, np.float64)
    rates = np.array([channel in RATES for channel in channels])
    absent = ~np.isfinite(result) | (result == 0) | (rates[None] & (result < 0))
    result[absent] = np.nan
    return result


def gridded(
    seconds: np.ndarray, values: np.ndarray, interval: float, what: str
) -> np.ndarray:
    """Samples at any times put into equal steps, the first of which starts with them.

    ``y_k = mean{x_i : k Δ <= t_i - min(t) < (k + 1) Δ, x_i measured}``, NaN where there
    is none.

    Args:
        seconds: the times ``t [S]``, in any order.
        values: the samples ``x [S, C]``, NaN where not measured.
        interval: Δ, in seconds.
        what: whose samples they are, for the error.

    Returns:
        ``float32 [T, C]``.

    Raises:
        ValueError: more than ``MAX_SAMPLES`` steps, or a value beyond float32.

    Example:
        >>> times = np.array([130.0, 0.0, 59.0])
        >>> gridded(times, np.array([[70.0], [80.0], [90.0]]), 60, "p1").tolist()
        [[85.0], [nan], [70.0]]
    """
    elapsed = seconds - seconds.min()
    # The slack keeps a time such as 0.3 in the bin 3 of 0.1 s, although 0.3 / 0.1 < 3.
    bins = np.floor(elapsed / interval + 1e-6)
    if bins.max() >= MAX_SAMPLES:
        raise ValueError(
            f"{what} is too long for a step of {interval:g} s: expected at most "
            f"{MAX_SAMPLES:,} samples; got {bins.max() + 1:,.0f}, from first to last "
            f"{elapsed.max() / 86_400:,.0f} days. Numbers are read as seconds: if the "
            "times are in milliseconds or another unit, or one is far off, mend them, "
            "or choose a larger interval."
        )
    places = bins.astype(np.int64)
    means = np.full((places.max() + 1, values.shape[1]), np.nan)
    for column, samples in zip(means.T, values.T):
        present = ~np.isnan(samples)
        sums = np.bincount(places[present], samples[present], len(means))
        counts = np.bincount(places[present], minlength=len(means))
        np.divide(sums, counts, out=column, where=counts > 0)
    return as_float32(means, what)


def as_float32(values: np.ndarray, what: str) -> np.ndarray:
    """``values``, as many bits as the engine computes with.

    Raises:
        ValueError: an infinity, or a number that is one in float32.

    Example:
        >>> as_float32(np.array([[1e39]]), "p1")
        Traceback (most recent call last):
        ...
        ValueError: p1 has a sample of 1e+39: expected finite float32 numbers, or NaN \
where nothing was measured. Mend it, or leave the record out.
    """
    with np.errstate(over="ignore"):
        result = np.asarray(values).astype(np.float32)
    beyond = np.isinf(result)
    if beyond.any():
        first = np.asarray(values)[beyond][0]
        raise ValueError(
            f"{what} has a sample of {first:g}: expected finite float32 numbers, or "
            "NaN where nothing was measured. Mend it, or leave the record out."
        )
    return result


def averaged(
    values: np.ndarray, own: float, interval: float | None, what: str
) -> np.ndarray:
    """Equally spaced samples at a longer interval: the mean of the measured of a bin.

    Args:
        values: ``[T, C]``, NaN where not measured.
        own: seconds between two of them.
        interval: seconds between two of the result, a whole multiple of ``own``; None
            for ``own``.
        what: whose samples they are, for the error.

    Returns:
        ``float32 [ceil(T own / interval), C]``.

    Raises:
        ValueError: ``interval`` is no whole multiple of ``own``, or a value is beyond
            float32.

    Example:
        >>> values = np.array([[1.0], [3.0], [np.nan]])
        >>> averaged(values, 60, 120, "p1").tolist()
        [[2.0], [nan]]
    """
    factor = 1 if interval is None else math.floor(interval / own + 1e-6)
    if interval is not None and (factor < 1 or abs(factor * own / interval - 1) > 1e-6):
        near = " or ".join(f"{k * own:g}" for k in (factor, factor + 1) if k > 0)
        raise ValueError(
            f"interval must be a whole multiple of what lies between two samples of "
            f"{what}, {own:g} s; got {interval:g}. Take {near}, or None to keep that "
            "of the source."
        )
    if factor == 1 or not len(values):
        return as_float32(values, what)
    return gridded(np.arange(len(values)), values, factor, what)


def missing_channel(
    what: str, channel: str, has: Iterable[str], way_out: str
) -> ValueError:
    """The error for a channel that a source or a record does not have."""
    return ValueError(
        f"{what} has no {channel}: expected a signal of it; got "
        f"{', '.join(has) or 'none'}. {way_out}"
    )


def not_found(source: str, places: Iterable[str | Path], *ways_out: str) -> OSError:
    """The error for a source whose files are nowhere; says how to go on."""
    tried = "\n".join(f"  - {place}" for place in places)
    ways = ", or ".join(
        (
            *ways_out,
            "--data-dir DIR (in code: data_dir=DIR) with a folder that holds them",
            "the source 'generated', which needs no files",
        )
    )
    return FileNotFoundError(
        f"the files of {source!r} were not found. Tried:\n{tried}\nWays out: {ways}."
    )
