"""Vital signs as intensive-care monitors record them, generated: no files needed."""

import datetime
from pathlib import Path

import numpy as np

from fedjax_sim.data.vitals_series import Record, Vitals, missing_channel
from fedjax_sim.registry import check_count, check_number

EPISODES = 2.0  # a day
ARTEFACTS = 3.0  # a day and channel
DROP_OUT = 5.0  # mean length in minutes
SLOW, FAST = 45.0, 2.0  # minutes after which a correlation has fallen to 1/e
SHARED = 0.4  # of the variance of the slow noise

CHANNELS = ("heart_rate", "respiration_rate", "spo2")  # the rows of what follows
LIMITS = np.array([[30, 220], [4, 60], [70, 100]], float)  # of what is physiological
BASELINE = np.array([[82, 10], [18, 2.5], [97, 0.8]])  # mean and deviation of patients
BASELINE_LIMITS = np.array([[60, 110], [12, 25], [93, 99]], float)
CIRCADIAN = np.array([[3, 8], [0.6, 1.6], [0.1, 0.3]])  # amplitude, from and to
SLOW_NOISE = np.array([4.0, 1.2, 0.5])
FAST_NOISE = np.array([1.2, 0.8, 0.3])
COUPLING = np.array([1.0, 1.0, -1.0])  # saturation falls where the rates rise
EPISODE = np.array([[10, 30], [3, 8], [-4, -1]], float)  # height, from and to


def generated(
    data_dir: Path,
    channels: tuple[str, ...],
    *,
    patients: int = 5,
    minutes: int = 2880,
    seed: int = 0,
    missing: float = 0.02,
) -> Vitals:
    """Heart rate, respiration rate and oxygen saturation once a minute, not of people.

    Of a patient and a channel c, at minute t and the hour of day h(t)::

        y_c(t) = b_c + a_c cos(2π (h(t) − φ) / 24) + σ_c n_c(t) + τ_c f_c(t) + e_c(t)
        n_c = k_c √w s + √(1 − w) u_c          w = 0.4, k = (1, 1, −1)
        s, u_c: AR(1), ρ = exp(−1/45)          f_c: AR(1), ρ = exp(−1/2), unit variance
        e_c(t) = Σ_j H_cj sin²(π (t − t_j) / L_j)   for 0 <= t − t_j < L_j

    The baseline b_c, the amplitude a_c and the hour of the peak φ ~ N(15, 1) are the
    patient's own, so that the rates are lowest at about 3 o'clock at night. s is common
    to the channels. Episodes e (a Poisson number, two a day, of L = 20 to 90 minutes)
    raise both rates together and lower the saturation. Three times a day a channel has
    an artefact for one or two minutes: the reading is halved, doubled, or off by up to
    60 %. The result is clipped to what is physiological (30..220 beats/min, 4..60
    breaths/min, 70..100 %) and rounded to 0.1.

    A drop-out, of geometric length with a mean of L = 5 minutes, takes one channel or
    all; beginnings are Poisson with the rate −ln(1 − missing) / L, half of it of each
    kind, so that each channel lacks the share ``missing`` in expectation.

    The ranges are those of a plausible patient, not fitted to data: for examples and
    tests, no stand-in for a result on patients.

    Args:
        data_dir: not used; every source takes it.
        channels: out of ``heart_rate``, ``respiration_rate``, ``spo2``. The values of
            one do not depend on which others are asked for.
        patients: how many, one record each. Patient i is the same for every number.
        minutes: samples of each.
        seed: of NumPy's generator, with the number of the patient.
        missing: expected share of samples that are not measured, in [0, 1).

    Raises:
        TypeError, ValueError: an option is out of its range, or another channel.

    Example:
        >>> vitals = generated(Path(), ("heart_rate",), patients=2, minutes=60)
        >>> [(record.name, record.values.shape) for record in vitals.records]
        [('generated_000', (60, 1)), ('generated_001', (60, 1))]
    """
    del data_dir
    check_count("patients", patients, 1)
    check_count("minutes", minutes, 1)
    check_count("seed", seed, 0)
    check_number("missing", missing, 0, 1, "[)")
    for channel in channels:
        if channel not in CHANNELS:
            way_out = "Ask for those, or take another source."
            raise missing_channel("source 'generated'", channel, CHANNELS, way_out)
    columns = [CHANNELS.index(channel) for channel in channels]
    records = []
    for patient in range(patients):
        name = f"generated_{patient:03d}"
        rng = np.random.default_rng([seed, patient])
        start, values = _patient(rng, minutes, missing)
        records.append(Record(name, name, start, values[:, columns]))
    return Vitals(
        name="generated",
        records=tuple(records),
        channels=channels,
        interval=60.0,
        source=f"generated: {patients} patients, {minutes} minutes, seed {seed}, "
        f"missing {missing:g}",
        licence="none: generated, not of people",
    )


def _patient(
    rng: np.random.Generator, minutes: int, missing: float
) -> tuple[datetime.datetime, np.ndarray]:
    """Start, and ``float32 [minutes, 3]``."""
    num_channels = len(CHANNELS)
    hour = int(rng.integers(24))
    start = datetime.datetime(2100, 1, 1, hour)
    baseline = np.clip(rng.normal(*BASELINE.T), *BASELINE_LIMITS.T)
    amplitude = rng.uniform(*CIRCADIAN.T)
    phase = rng.normal(15.0, 1.0)
    clock = hour + np.arange(minutes) / 60
    rhythm = np.cos(2 * np.pi * (clock - phase) / 24)
    slow = _ar1(rng, minutes, 1 + num_channels, SLOW)
    common = COUPLING * np.sqrt(SHARED) * slow[:, :1]
    noise = SLOW_NOISE * (common + np.sqrt(1 - SHARED) * slow[:, 1:])
    noise += FAST_NOISE * _ar1(rng, minutes, num_channels, FAST)
    values = baseline + amplitude * rhythm[:, None] + noise
    for _ in range(rng.poisson(EPISODES * minutes / 1440)):
        begin, length = rng.integers(minutes), rng.integers(20, 91)
        shape = np.sin(np.pi * np.arange(min(length, minutes - begin)) / length) ** 2
        values[begin : begin + length] += shape[:, None] * rng.uniform(*EPISODE.T)
    for channel in range(num_channels):
        for _ in range(rng.poisson(ARTEFACTS * minutes / 1440)):
            begin, length = rng.integers(minutes), rng.integers(1, 3)
            factor = rng.choice([0.5, 2.0, rng.uniform(0.4, 1.6)])
            values[begin : begin + length, channel] *= factor
    values = np.round(np.clip(values, *LIMITS.T), 1)
    rate = -np.log1p(-missing) / DROP_OUT / 2
    dropped = _drop_outs(rng, minutes, rate)[:, None] | np.stack(
        [_drop_outs(rng, minutes, rate) for _ in range(num_channels)], axis=1
    )
    values[dropped] = np.nan
    return start, values.astype(np.float32)


def _ar1(
    rng: np.random.Generator, minutes: int, width: int, memory: float
) -> np.ndarray:
    """Stationary autoregressive noise of unit variance, ``[minutes, width]``."""
    from scipy.signal import lfilter  # type: ignore[import-untyped]  # slow to import

    rho = np.exp(-1 / memory)
    before = rng.normal(size=(1, width))
    shocks = np.sqrt(1 - rho**2) * rng.normal(size=(minutes, width))
    noise, _ = lfilter([1.0], [1.0, -rho], shocks, axis=0, zi=rho * before)
    return np.asarray(noise)


def _drop_outs(rng: np.random.Generator, minutes: int, rate: float) -> np.ndarray:
    """Which minutes are in a burst; those that began before the first one count."""
    lead = int(20 * DROP_OUT)
    begins = np.repeat(np.arange(-lead, minutes), rng.poisson(rate, lead + minutes))
    ends = begins + rng.geometric(1 / DROP_OUT, len(begins))
    change = np.zeros(minutes + 1, int)
    np.add.at(change, np.clip(begins, 0, minutes), 1)
    np.add.at(change, np.clip(ends, 0, minutes), -1)
    return np.cumsum(change[:-1]) > 0
