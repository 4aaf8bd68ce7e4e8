"""From vital-sign records to clients: gaps, standardisation, windows, states."""

import datetime
import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from fedjax_sim.data.federation import index_table
from fedjax_sim.data.vitals import Record, Vitals
from fedjax_sim.data.vitals_series import as_float32
from fedjax_sim.registry import check_count, check_number, check_type
from fedjax_sim.types import Array, ClientData, Clients, Examples, MakeSamples

# Thirds of a normal distribution: a patient is as often low as usual as high.
EDGES = (-0.43, 0.43)
STATES = ("low", "usual", "high")
CALENDAR = ("hour", "day", "weekday")


class Device(NamedTuple):
    """What became of one record.

    Attributes:
        name: of the record, or of its piece.
        patient: whose it is.
        steps: samples in time.
        missing: samples not measured, per channel.
        filled: of them those in gaps short enough to be filled, per channel.
        mean: per channel, over what its scale is fitted on; in the channel's unit.
        sd: likewise.
        windows: windows to train on.
        test_windows: windows to test on.
    """

    name: str
    patient: str
    steps: int
    missing: tuple[int, ...]
    filled: tuple[int, ...]
    mean: tuple[float, ...]
    sd: tuple[float, ...]
    windows: int
    test_windows: int


class SeriesFederation(NamedTuple):
    """Devices that each hold one series; see ``federate_series``.

    Attributes:
        clients: the stretch each device trains on, for ``Simulation(clients=)``.
        local_test: the stretch each device is tested on, after it in time.
        history: the clean stretch that detectors are trained and calibrated on.
        test: the windows of all devices' test stretches.
        root: clean windows of the server, from the histories; None with ``root_size=
            0``.
        devices: one for every client.
        left_out: name of a record that could not be used, and why, with those that
            were left out as they were loaded.
        channels: the measured columns of the inputs, which come first.
        features: all columns of the inputs.
        edges: of the states, in standard deviations.
    """

    clients: Clients
    local_test: Clients
    history: Clients
    test: Examples
    root: Examples | None
    devices: tuple[Device, ...]
    left_out: Mapping[str, str]
    channels: tuple[str, ...]
    features: tuple[str, ...]
    edges: tuple[float, ...]


def windows(length: int) -> MakeSamples:
    """Overlapping windows of a client's series: what it trains on.

    Sample j of a series ``x [T, F]`` with labels ``y [T]`` is::

        inputs_j = (x_j, ..., x_{j+L-1}),   target_j = y_{j+L}

    so a model sees L steps and tells the state of the one after them. There are as many
    rows as steps; the mask, which says where a window begins, is kept, and False where
    a window would run over the end.

    Args:
        length: ``L``.

    Returns:
        For ``Simulation(make_samples=)``. It takes and returns the ``ClientData`` of
        one client, ``[T, F]`` to ``[T, L, F]``.

    Raises:
        TypeError, ValueError: ``length`` is no integer of at least 1; while tracing, a
            series that is not ``[T, F]`` with a label a step, or has not ``L + 1``.

    Example:
        >>> x = jnp.array([[1.0], [2.0], [4.0], [7.0]])
        >>> series = ClientData(x, jnp.array([0, 0, 1, 1]), jnp.ones(4, bool))
        >>> samples = windows(2)(series)
        >>> samples.inputs[samples.mask][:, :, 0].tolist()
        [[1.0, 2.0], [2.0, 4.0]]
        >>> samples.targets[samples.mask].tolist()
        [1, 1]
    """
    length = check_count("windows' length", length, 1)

    def make_samples(series: ClientData) -> ClientData:
        total = series.inputs.shape[0]
        if series.inputs.ndim != 2 or series.targets.shape != (total,):
            raise ValueError(
                "windows need a series [steps, features] and one label a step; got "
                f"inputs {series.inputs.shape} and targets {series.targets.shape}."
            )
        if total <= length:
            raise ValueError(
                f"windows of {length} steps need a series of at least {length + 1}; "
                f"got {total}. Lower the length."
            )
        starts = jnp.arange(total)
        steps = starts[:, None] + jnp.arange(length)[None]
        after = starts + length
        return ClientData(
            series.inputs[jnp.minimum(steps, total - 1)],
            series.targets[jnp.minimum(after, total - 1)],
            series.valid & (after < total),
        )

    return make_samples


def states(inputs: Array, edges: Sequence[float] = EDGES, channel: int = 0) -> Array:
    """The state of every step: in which interval a standardised channel lies.

    ``y_t = #{e in edges: x_tc >= e}``.

    Args:
        inputs: ``[..., F]``.
        edges: increasing, in standard deviations of the patient.
        channel: ``c``.

    Returns:
        ``int32 [...]``, from 0 to the number of edges.

    Example:
        >>> states(jnp.array([[-1.0], [0.0], [2.0]])).tolist()
        [0, 1, 2]
    """
    values = inputs[..., channel]
    return sum((values >= edge).astype(jnp.int32) for edge in edges)  # type: ignore


def cut(vitals: Vitals, num_devices: int) -> Vitals:
    """Cuts the longest records into pieces disjoint in time, as devices of their own.

    Pieces of one record are one patient: **pseudo-devices**, for studies that have more
    devices than records. The next cut goes to the record whose pieces are longest, and
    a record's pieces are of equal length (to a step).

    Args:
        vitals: as loaded.
        num_devices: pieces in all, at least as many as records.

    Returns:
        ``Vitals`` of that many records, called ``name 1/3`` and so on where cut.

    Raises:
        TypeError: ``vitals`` is something else, or the number no integer.
        ValueError: fewer devices than records, or more than samples.

    Example:
        >>> record = Record("a", "a", None, np.zeros((7, 1), np.float32))
        >>> vitals = Vitals("x", (record,), ("heart_rate",), 60.0, "", "")
        >>> [(r.name, len(r.values)) for r in cut(vitals, 2).records]
        [('a 1/2', 3), ('a 2/2', 4)]
    """
    check_type("vitals", vitals, Vitals, "Load them: fs.data.load_vitals('generated').")
    count = check_count("num_devices", num_devices, 1)
    sizes = [len(record.values) for record in vitals.records]
    if not len(sizes) <= count <= sum(sizes):
        raise ValueError(
            f"the number of devices must be from that of the records, {len(sizes)}, to "
            f"that of their samples, {sum(sizes)}; got {num_devices}. Choose fewer "
            "records, or another number."
        )
    pieces = [1] * len(sizes)
    while sum(pieces) < count:
        longest = max(range(len(sizes)), key=lambda i: sizes[i] / pieces[i])
        pieces[longest] += 1
    records: list[Record] = []
    for record, number in zip(vitals.records, pieces, strict=True):
        bounds = np.linspace(0, len(record.values), number + 1).astype(int)
        for i, (first, last) in enumerate(itertools.pairwise(bounds)):
            name, start = record.name, record.start
            if number > 1:
                name += f" {i + 1}/{number}"
            if start is not None:
                start += datetime.timedelta(seconds=int(first) * vitals.interval)
            piece = record.values[first:last]
            records.append(Record(name, record.patient, start, piece))
    return vitals._replace(records=tuple(records))


def fill_gaps(values: np.ndarray, max_gap: int) -> np.ndarray:
    """Joins the ends of gaps of up to ``max_gap`` samples by a straight line.

    Longer gaps, and those at either end of the series, stay.

    Args:
        values: ``[T]`` or ``[T, C]``, NaN where not measured.
        max_gap: samples; 0 fills none.

    Example:
        >>> nan = np.nan
        >>> fill_gaps(np.array([1, nan, 3, nan, nan, 9, nan]), 1).tolist()
        [1.0, 2.0, 3.0, nan, nan, 9.0, nan]
    """
    if values.ndim == 2:
        columns = [fill_gaps(column, max_gap) for column in values.T]
        return np.stack(columns, axis=1)
    known = np.flatnonzero(~np.isnan(values))
    filled = values.copy()
    for before, after in itertools.pairwise(known):
        gap = after - before - 1
        if 0 < gap <= max_gap:
            ends = values[before], values[after]
            filled[before : after + 1] = np.linspace(*ends, gap + 2)
    return filled


def calendar(start: datetime.datetime, interval: float, steps: int) -> np.ndarray:
    """Hour, day of the month and weekday of every sample, each from 0 to 1.

    Args:
        start: time of the first sample.
        interval: seconds between samples.
        steps: ``T``.

    Returns:
        ``float32 [T, 3]``: hour / 23, (day - 1) / 30 and weekday / 6, Monday first.

    Example:
        >>> calendar(datetime.datetime(2100, 1, 1, 23), 3600, 2).tolist()
        [[1.0, 0.0, 0.6666666865348816], [0.0, 0.03333333507180214, 0.8333333134651184]]
    """
    times = [start + datetime.timedelta(seconds=i * interval) for i in range(steps)]
    found = [(t.hour / 23, (t.day - 1) / 30, t.weekday() / 6) for t in times]
    return np.array(found, np.float32).reshape(steps, 3)


class _Stretch(NamedTuple):
    """Steps from ``first`` to ``last`` of a device, and where a window may begin."""

    first: int
    last: int
    starts: np.ndarray  # bool [last - first]


def federate_series(
    vitals: Vitals,
    *,
    length: int = 60,
    train: float = 0.7,
    history: float | None = None,
    max_gap: int = 5,
    calendar_features: bool = True,
    edges: Sequence[float] = EDGES,
    flat: float = 0.1,
    skip_unusable: bool = False,
    root_size: int = 0,
    seed: int = 0,
) -> SeriesFederation:
    """One client for every record: windows to train on, and later ones to test on.

    The first ``train`` of a record's time is for training, the rest for testing; no
    window has steps of both, and no gap is filled from the next stretch. Every channel
    is standardised per record, ``(x - mean) / sd``, with mean and sd of the measured
    samples of what the server may know, which is the training stretch or the part of it
    that is ``history``; never of what is tested on. The label of a step is the
    ``states`` of the first channel; a sample's is that of the step after its window.

    Gaps of up to ``max_gap`` samples are joined by a straight line. A window with a
    longer one in it, or in the step after it, is no sample.

    Args:
        vitals: from ``load_vitals``, maybe ``cut``.
        length: steps of a window.
        train: share of the time that is for training, in (0, 1).
        history: None: detectors are trained and calibrated on the very stretch that
            devices train on (before any attack on it), as in FedSecure's paper. A share
            in (0, 1): on that first part of it, and devices train on the rest.
        max_gap: samples that are filled in; 0 for none.
        calendar_features: whether hour, day and weekday follow the channels.
        edges: of the states, in standard deviations.
        flat: standard deviation, in a channel's unit, up to which it counts as flat.
        skip_unusable: leaves out records that cannot be used, and says so in
            ``left_out``, instead of raising.
        root_size: windows of the server's root dataset, drawn from the histories.
        seed: of that draw.

    Returns:
        A ``SeriesFederation``. Inputs are ``float32``, steps ``[P, F]`` in the pools
        of the clients and windows ``[s, length, F]`` in ``test`` and ``root``. What is
        still missing is 0 in the pools, and in no sample.

    Raises:
        TypeError: ``vitals`` is something else, or an option of another type.
        ValueError: an option out of range; a record without a window of its own in
            each stretch, with a flat channel or an infinite sample, without a column
            for each channel, or without a start while ``calendar_features`` is set; two
            records of one name.

    Example:
        >>> from fedjax_sim.data import load_vitals
        >>> vitals = load_vitals("generated", patients=3, minutes=600)
        >>> devices = federate_series(vitals, length=30, root_size=10)
        >>> devices.clients.num_clients, devices.clients.inputs.shape[1]
        (3, 5)
        >>> devices.test.inputs.shape[1:], devices.root.inputs.shape
        ((30, 5), (10, 30, 5))
    """
    check_type("vitals", vitals, Vitals, "Load them: fs.data.load_vitals('generated').")
    length = check_count("length", length, 1)
    train = check_number("train", train, 0, 1)
    if history is not None:
        history = check_number("history", history, 0, 1)
    max_gap = check_count("max_gap", max_gap, 0)
    flat = check_number("flat", flat, 0, closed="[)")
    edges = tuple(check_number("edges", edge) for edge in edges)
    if not edges or list(edges) != sorted(set(edges)):
        raise ValueError(f"edges must be one or more, increasing; got {edges}.")
    check_type("calendar_features", calendar_features, bool)
    check_type("skip_unusable", skip_unusable, bool)
    root_size = check_count("root_size", root_size, 0)
    seed = check_count("seed", seed, 0)
    names = [record.name for record in vitals.records]
    again = sorted({name for name in names if names.count(name) > 1})
    if again:
        raise ValueError(
            f"records must have names of their own; got {again[0]!r} more than once."
        )
    if calendar_features:
        nowhen = [r.name for r in vitals.records if r.start is None]
        if nowhen:
            raise ValueError(
                f"{len(nowhen)} records of {vitals.name} do not say when they begin "
                f"(the first is {nowhen[0]}), so there is no hour, day and weekday. "
                "Pass calendar_features=False."
            )
    pools, parts, devices = [], [], []
    left_out = dict(vitals.left_out)
    for record in vitals.records:
        try:
            pool, stretches, device = _device(
                record, vitals, length, train, history, max_gap, calendar_features, flat
            )
        except ValueError as error:
            if not skip_unusable:
                raise
            left_out[record.name] = str(error)
            continue
        pools.append(pool)
        parts.append(stretches)
        devices.append(device)
    if not devices:
        # What is to be done about each comes after the first sentence.
        reasons = [why.partition(". ")[0] for why in left_out.values()]
        raise ValueError(
            f"none of the {len(vitals.records)} records of {vitals.name} can be used: "
            f"{'; '.join(reasons[:3])}. Load others, ask for other channels, or change "
            "the stretches, windows and gaps."
        )
    inputs = np.concatenate(pools)
    labels = np.asarray(states(jnp.asarray(inputs), edges))
    offsets = np.cumsum([0, *(len(pool) for pool in pools[:-1])])
    shared = jnp.asarray(inputs), jnp.asarray(labels)

    def clients(which: int) -> Clients:
        chosen = [stretches[which] for stretches in parts]
        sizes = np.array([len(s.starts) for s in chosen])
        rows = [o + np.arange(s.first, s.last) for o, s in zip(offsets, chosen)]
        indices, there = index_table(np.concatenate(rows), sizes)
        mask = np.zeros(there.shape, bool)
        mask[np.asarray(there)] = np.concatenate([s.starts for s in chosen])
        return Clients(*shared, indices, jnp.asarray(mask))

    def materialise(which: int) -> Examples:
        begins = np.concatenate(
            [
                o + s[which].first + np.flatnonzero(s[which].starts)
                for o, s in zip(offsets, parts)
            ]
        )
        return Examples(
            inputs[begins[:, None] + np.arange(length)], labels[begins + length]
        )

    root = None
    if root_size:
        root = materialise(0)
        if root_size > len(root.targets):
            raise ValueError(
                f"root_size={root_size}, but the histories have only "
                f"{len(root.targets)} windows. Lower root_size."
            )
        rng = np.random.default_rng(seed)
        drawn = rng.choice(len(root.targets), root_size, replace=False)
        root = Examples(root.inputs[drawn], root.targets[drawn])
    return SeriesFederation(
        clients=clients(1),
        local_test=clients(2),
        history=clients(0),
        test=materialise(2),
        root=root,
        devices=tuple(devices),
        left_out=left_out,
        channels=vitals.channels,
        features=vitals.channels + (CALENDAR if calendar_features else ()),
        edges=edges,
    )


def _device(
    record: Record,
    vitals: Vitals,
    length: int,
    train: float,
    history: float | None,
    max_gap: int,
    calendar_features: bool,
    flat: float,
) -> tuple[np.ndarray, tuple[_Stretch, ...], Device]:
    """The steps ``[T, F]`` of a record; history, training and test stretch; a report.

    Raises:
        ValueError: the record cannot be used.
    """
    values = as_float32(record.values, record.name)
    if values.ndim != 2 or values.shape[1] != len(vitals.channels):
        raise ValueError(
            f"{record.name} must have a column for each of "
            f"{', '.join(vitals.channels)}; got shape {values.shape}."
        )
    steps = len(values)
    end = round(train * steps)
    middle = 0 if history is None else round(history * end)
    known_to_server = end if history is None else middle
    # Apart, so that no gap is filled by what its stretch is not to know.
    borders = [end] if history is None else [middle, end]
    filled = np.concatenate([fill_gaps(x, max_gap) for x in np.split(values, borders)])
    whole = ~np.isnan(filled).any(axis=1)
    stretches = tuple(
        _Stretch(first, last, _starts(whole[first:last], length))
        for first, last in ((0, known_to_server), (middle, end), (end, steps))
    )
    first = "training" if history is None else "history"
    for what, stretch in zip((first, "training", "test"), stretches, strict=True):
        if not stretch.starts.any():
            raise ValueError(
                f"{record.name} has no window of {length} samples and the one after "
                f"it in its {what} stretch: {len(stretch.starts)} samples, "
                f"{int(whole[stretch.first : stretch.last].sum())} of them measured or "
                f"filled in, the most in a row {_longest(whole, stretch)}. Shorten the "
                "windows, fill longer gaps, or leave it out."
            )
    scale = values[:known_to_server].astype(np.float64)
    mean, sd = np.nanmean(scale, axis=0), np.nanstd(scale, axis=0)
    for channel, spread in zip(vitals.channels, sd, strict=True):
        if not spread > flat:
            raise ValueError(
                f"{channel} of {record.name} is flat: its standard deviation is "
                f"{spread:.3g} over the {known_to_server} samples that its scale is "
                f"fitted on, and must be above flat={flat:g}. Lower flat, ask for "
                "other channels, or leave the record out."
            )
    columns = [((filled - mean) / sd).astype(np.float32)]
    if calendar_features:
        assert record.start is not None, "checked by federate_series"
        columns.append(calendar(record.start, vitals.interval, steps))
    pool = np.concatenate(columns, axis=1)
    missing = np.isnan(values).sum(axis=0)
    device = Device(
        name=record.name,
        patient=record.patient,
        steps=steps,
        missing=tuple(missing.tolist()),
        filled=tuple((missing - np.isnan(filled).sum(axis=0)).tolist()),
        mean=tuple(mean.tolist()),
        sd=tuple(sd.tolist()),
        windows=int(stretches[1].starts.sum()),
        test_windows=int(stretches[2].starts.sum()),
    )
    return np.where(np.isnan(pool), np.float32(0), pool), stretches, device


def _starts(whole: np.ndarray, length: int) -> np.ndarray:
    """``bool [T]``: where ``length + 1`` whole steps begin."""
    found = np.zeros(len(whole), bool)
    if len(whole) > length:
        runs = np.lib.stride_tricks.sliding_window_view(whole, length + 1)
        found[: len(runs)] = runs.all(axis=1)
    return found


def _longest(whole: np.ndarray, stretch: _Stretch) -> int:
    """The most whole steps in a row."""
    breaks = np.flatnonzero(~whole[stretch.first : stretch.last])
    edges = np.concatenate([[-1], breaks, [stretch.last - stretch.first]])
    return int(np.diff(edges).max() - 1)
