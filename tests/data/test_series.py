"""From records to devices: every window against a loop over the record's steps."""

import datetime
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_sim as fs
from fedjax_sim.data.series import (
    STATES,
    calendar,
    cut,
    federate_series,
    fill_gaps,
    states,
    windows,
)
from fedjax_sim.data.vitals import Record, Vitals
from fedjax_sim.types import ClientData, Examples
from tests.references import fedsecure as reference

NAN = np.nan
CHANNELS = ("heart_rate", "respiration_rate")
START = datetime.datetime(2101, 1, 31, 22, 30)
L = 4


def make_vitals(*series, start=START, interval=60.0):
    series = [np.asarray(values, np.float32) for values in series]
    records = [
        Record(f"r{i}", f"p{i}", start, values) for i, values in enumerate(series)
    ]
    channels = CHANNELS[: series[0].shape[1]]
    return Vitals("hand", tuple(records), channels, interval, "test", "none")


def walk(steps, seed=0, gaps=()):
    """Two channels that wander; ``gaps`` are (channel, first, length)."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(steps, 2)).cumsum(axis=0) * [2, 0.7] + [80, 18]
    for channel, first, length in gaps:
        values[first : first + length, channel] = NAN
    return values


# Windows and states -------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 3, 10])
def test_windows_are_those_of_a_loop(length):
    rng = np.random.default_rng(length)
    x, y = rng.normal(size=(11, 2)).astype(np.float32), rng.integers(0, 9, 11)
    starts = rng.random(11) < 0.7
    starts[0], starts[-1] = True, True
    series = ClientData(jnp.asarray(x), jnp.asarray(y, jnp.int32), jnp.asarray(starts))
    samples = jax.jit(windows(length))(series)
    assert samples.inputs.shape == (11, length, 2)
    assert samples.targets.dtype == jnp.int32
    expected = reference.windows(x, y, starts, length)
    assert np.flatnonzero(samples.mask).tolist() == [j for j, *_ in expected]
    np.testing.assert_array_equal(
        samples.inputs[samples.mask], [window for _, window, _ in expected]
    )
    assert samples.targets[samples.mask].tolist() == [label for *_, label in expected]
    bare = windows(length)(series._replace(mask=None))
    assert bare.mask.tolist() == [j + length < 11 for j in range(11)]
    np.testing.assert_array_equal(bare.inputs, samples.inputs)


def test_series_too_short_for_a_window():
    series = ClientData(jnp.zeros((5, 1)), jnp.zeros(5, jnp.int32), jnp.ones(5, bool))
    assert windows(4)(series).mask.tolist() == [True, False, False, False, False]
    with pytest.raises(ValueError, match="of 5 steps need a series of at least 6; got"):
        windows(5)(series)
    for inputs, targets in ((jnp.zeros(9), 9), (jnp.zeros((9, 1)), 8)):
        other = ClientData(inputs, jnp.zeros(targets, jnp.int32), None)
        with pytest.raises(ValueError, match=r"\[steps, features\] and one label a st"):
            windows(4)(other)
    with pytest.raises(ValueError, match=r"windows' length must be .* at least 1; got"):
        windows(0)
    with pytest.raises(TypeError, match="windows' length must be an integer"):
        windows(2.0)


def test_states():
    x = jnp.array([[-2.0, 9.0], [-1.0, 9.0], [-0.5, -9.0], [0.25, 9.0], [0.3, -9.0]])
    found = states(x, (-1.0, 0.25, 4.0))
    assert found.dtype == jnp.int32
    assert found.tolist() == [0, 1, 1, 2, 2]  # exactly on an edge is above it
    assert states(x, (-1.0, 0.25, 4.0), channel=1).tolist() == [3, 3, 0, 3, 0]
    assert states(x[None], (0.0,)).tolist() == [[0, 0, 0, 1, 1]]
    assert len(STATES) == 1 + int(states(jnp.full((1, 1), 99.0)).max())


# Pieces -------------------------------------------------------------------------------


def numbered(*sizes, **options):
    bounds = np.cumsum([0, *sizes])
    return make_vitals(
        *(np.arange(a, b)[:, None] for a, b in itertools.pairwise(bounds)), **options
    )


def test_cut():
    vitals = numbered(10, 4, 7, interval=90.0)
    pieces = cut(vitals, 6).records
    assert [p.name for p in pieces] == [
        *["r0 1/3", "r0 2/3", "r0 3/3"],
        *["r1", "r2 1/2", "r2 2/2"],
    ]
    assert [p.patient for p in pieces] == ["p0", "p0", "p0", "p1", "p2", "p2"]
    assert [len(p.values) for p in pieces] == [3, 3, 4, 4, 3, 4]
    begins = [(p.start - START).total_seconds() / 90 for p in pieces]
    assert begins == [0, 3, 6, 0, 0, 3]
    # Disjoint, complete and in order.
    found = np.concatenate([p.values for p in pieces])
    np.testing.assert_array_equal(found[:, 0], np.arange(21))
    assert cut(vitals, 6)._replace(records=()) == vitals._replace(records=())
    for whole, record in zip(cut(vitals, 3).records, vitals.records, strict=True):
        assert whole[:3] == record[:3]
        np.testing.assert_array_equal(whole.values, record.values)


@pytest.mark.parametrize(
    ("sizes", "order"),
    # Whose pieces are longest: 10 7 4, 5 7 4, 5 3.5 4, 3.3 3.5 4, 3.3 3.5 2, ...
    [((10, 7, 4), [0, 1, 0, 2, 1, 0]), ((6, 6), [0, 1, 0, 1])],
)
def test_the_longest_pieces_are_cut_next(sizes, order):
    vitals = numbered(*sizes)
    expected = [1] * len(sizes)
    for i, record in enumerate(order):
        expected[record] += 1
        pieces = cut(vitals, len(sizes) + i + 1).records
        patients = [p.patient for p in pieces]
        assert [patients.count(f"p{n}") for n in range(len(sizes))] == expected


def test_cut_to_the_last_sample_and_without_a_start():
    pieces = cut(numbered(3, 2, start=None), 5).records
    assert [p.values.tolist() for p in pieces] == [[[0]], [[1]], [[2]], [[3]], [[4]]]
    assert [p.start for p in pieces] == [None] * 5


@pytest.mark.parametrize("count", [2, 13])
def test_cut_refuses(count):
    with pytest.raises(ValueError, match=f"records, 3, to .* 12; got {count}. Choose"):
        cut(numbered(5, 4, 3), count)
    with pytest.raises(ValueError, match="num_devices must be an integer of at least"):
        cut(numbered(5), 0)
    with pytest.raises(TypeError, match="num_devices must be an integer"):
        cut(numbered(5), 2.0)


# Gaps and calendar --------------------------------------------------------------------


def filled_by_loop(values, max_gap):
    out = np.array(values, np.float64)
    known = [t for t in range(len(out)) if not np.isnan(values[t])]
    for t in range(len(out)):
        before = [k for k in known if k < t]
        after = [k for k in known if k > t]
        if t in known or not before or not after:
            continue
        a, b = before[-1], after[0]
        if b - a - 1 <= max_gap:
            out[t] = values[a] + (values[b] - values[a]) * (t - a) / (b - a)
    return out


def test_fill_gaps_by_hand():
    x = np.array([NAN, 1, NAN, NAN, 7, NAN, NAN, NAN, 3, NAN, NAN])
    two = [NAN, 1, 3, 5, 7, NAN, NAN, NAN, 3, NAN, NAN]
    three = [NAN, 1, 3, 5, 7, 6, 5, 4, 3, NAN, NAN]
    for max_gap, expected in [(0, x), (1, x), (2, two), (3, three), (99, three)]:
        np.testing.assert_allclose(fill_gaps(x, max_gap), expected, rtol=1e-12)
    np.testing.assert_array_equal(fill_gaps(x[:1], 3), [NAN])
    assert np.isnan(x).sum() == 8  # not in place
    both = fill_gaps(np.stack([x, x[::-1]], axis=1), 2)
    np.testing.assert_allclose(both[:, 0], two, rtol=1e-12)
    np.testing.assert_allclose(both[:, 1], two[::-1], rtol=1e-12)


@pytest.mark.parametrize("max_gap", [0, 1, 2, 4])
def test_fill_gaps_is_the_loop(max_gap):
    rng = np.random.default_rng(max_gap)
    x = rng.normal(size=60)
    x[rng.random(60) < 0.5] = NAN
    expected = filled_by_loop(x, max_gap)
    np.testing.assert_allclose(fill_gaps(x, max_gap), expected, rtol=1e-9)


def test_calendar():
    # The last hour of a January, a Monday; half-hourly.
    found = calendar(START, 1800, 5) * np.array([23, 30, 6])
    expected = [[22, 30, 0], [23, 30, 0], [23, 30, 0], [0, 0, 1], [0, 0, 1]]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    assert START.strftime("%A") == "Monday"
    # 2100 is no leap year; its 28th February is a Sunday.
    found = calendar(datetime.datetime(2100, 2, 28, 23, 59), 60, 2)
    np.testing.assert_allclose(found, [[1, 27 / 30, 1], [0, 0, 0]], rtol=1e-6)
    assert calendar(START, 60, 0).shape == (0, 3)
    assert found.dtype == np.float32


# Devices ------------------------------------------------------------------------------


def device_by_loop(values, *, train=0.7, history=None, max_gap=5, edges=(-0.43, 0.43)):
    """Where windows of history, training and test begin; steps and labels; moments."""
    values = np.asarray(values, np.float32).astype(np.float64)
    end = round(train * len(values))
    middle = round(history * end) if history else 0
    known = middle if history else end
    x = np.empty_like(values)
    moments = []
    for c in range(values.shape[1]):
        for first, last in ((0, middle), (middle, end), (end, len(values))):
            x[first:last, c] = filled_by_loop(values[first:last, c], max_gap)
        own = [v for v in values[:known, c] if not np.isnan(v)]
        mean = sum(own) / len(own)
        sd = (sum((v - mean) ** 2 for v in own) / len(own)) ** 0.5
        moments.append((mean, sd))
        x[:, c] = (x[:, c] - mean) / sd
    labels = [sum(row[0] >= edge for edge in edges) for row in x]
    begins = [
        [
            j
            for j in range(first, last)
            if j + L < last and not np.isnan(x[j : j + L + 1]).any()
        ]
        for first, last in ((0, known), (middle, end), (end, len(values)))
    ]
    return begins, x, labels, moments


# Gaps of five and six, at the ends, in both channels, and over the border of training
# and test, which is at 0.7 of the steps; the lengths differ.
SERIES = [
    walk(60, 0, [(0, 7, 5), (1, 20, 6), (0, 40, 4), (1, 58, 2)]),
    walk(40, 1, [(0, 0, 3), (1, 26, 4), (0, 27, 2), (0, 35, 1)]),
    walk(51, 2, [(1, 12, 2), (0, 13, 1)]),
]
OPTIONS = {
    "default": {},
    "history": {"history": 0.4},
    "no filling": {"max_gap": 0, "train": 0.6},
    "all filled": {"max_gap": 6, "edges": (-1.0, 0.0, 0.5), "history": 0.6},
}


def samples_of(clients, id):
    made = windows(L)(clients.gather(jnp.int32(id)))
    chosen = np.asarray(made.mask)
    return np.asarray(made.inputs)[chosen], np.asarray(made.targets)[chosen]


@pytest.mark.parametrize("name", OPTIONS)
def test_every_window_against_the_loop(name):
    options = OPTIONS[name]
    found = federate_series(make_vitals(*SERIES), length=L, root_size=9, **options)
    parts = (found.history, found.clients, found.local_test)
    tests, histories = [], []
    for id, values in enumerate(SERIES):
        begins, x, labels, moments = device_by_loop(values, **options)
        for part, own in zip(parts, begins):
            inputs, targets = samples_of(part, id)
            assert own
            expected = np.array([x[j : j + L] for j in own])
            np.testing.assert_allclose(inputs[..., :2], expected, rtol=1e-4, atol=1e-5)
            times = calendar(START, 60.0, len(x))
            np.testing.assert_array_equal(
                inputs[..., 2:], [times[j : j + L] for j in own]
            )
            assert targets.tolist() == [labels[j + L] for j in own]
        histories.append(samples_of(found.history, id))
        tests.append(samples_of(found.local_test, id))
        device = found.devices[id]
        assert (device.name, device.patient) == (f"r{id}", f"p{id}")
        assert device.steps == len(values)
        assert (device.windows, device.test_windows) == tuple(map(len, begins[1:]))
        assert device.missing == tuple(np.isnan(values).sum(axis=0).tolist())
        left = np.isnan(x).sum(axis=0)
        assert device.filled == tuple((np.array(device.missing) - left).tolist())
        np.testing.assert_allclose(device.mean, [m for m, _ in moments], rtol=1e-6)
        np.testing.assert_allclose(device.sd, [s for _, s in moments], rtol=1e-5)
    test_inputs, test_targets = (np.concatenate(part) for part in zip(*tests))
    np.testing.assert_array_equal(found.test.inputs, test_inputs)
    np.testing.assert_array_equal(found.test.targets, test_targets)
    # The root's windows are some of the histories', each drawn once.
    clean, own = (np.concatenate(part) for part in zip(*histories))
    same = (found.root.inputs[:, None] == clean[None]).all(axis=(2, 3))
    assert same.sum(axis=1).tolist() == [1] * 9
    drawn = same.argmax(axis=1)
    assert len(set(drawn)) == 9
    np.testing.assert_array_equal(found.root.targets, own[drawn])


def steps_used(clients, id):
    """Rows of the pool in windows of a device, and those whose labels they tell."""
    rows, starts = np.asarray(clients.indices[id]), np.asarray(clients.mask[id])
    return {int(rows[j + t]) for j in np.flatnonzero(starts) for t in range(L + 1)}


@pytest.mark.parametrize("history", [None, 0.5])
def test_stretches_share_no_step(history):
    found = federate_series(make_vitals(*SERIES), length=L, history=history)
    parts = (found.history, found.clients, found.local_test)
    for part in parts:
        assert part.inputs is found.clients.inputs
        assert part.targets is found.clients.targets
    seen = set()
    for id, values in enumerate(SERIES):
        past, train, test = (steps_used(part, id) for part in parts)
        assert max(train) < min(test)
        assert past == train if history is None else max(past) < min(train)
        # Nor do devices.
        assert not seen & (past | train | test)
        seen |= past | train | test
        # Stretches follow one another, padding comes last and holds 0.
        end = round(0.7 * len(values))
        middle = 0 if history is None else round(history * end)
        offset = sum(map(len, SERIES[:id]))
        bounds = [(0, middle or end), (middle, end), (end, len(values))]
        for part, (first, last) in zip(parts, bounds):
            rows = np.asarray(part.indices[id])
            own = list(range(offset + first, offset + last))
            assert rows.tolist() == own + [0] * (len(rows) - len(own))
            assert not part.mask[id, len(own) :].any()


def test_form():
    found = federate_series(make_vitals(*SERIES), length=L)
    assert found.channels == CHANNELS
    assert found.features == (*CHANNELS, "hour", "day", "weekday")
    assert found.root is None
    assert found.left_out == {}
    assert found.edges == (-0.43, 0.43)
    clients = found.clients
    assert clients.inputs.shape == (151, 5)
    assert (clients.inputs.dtype, clients.targets.dtype) == (jnp.float32, jnp.int32)
    assert np.isfinite(clients.inputs).all()
    assert set(found.test.targets.tolist()) <= {0, 1, 2}
    bare = federate_series(
        make_vitals(*SERIES, start=None), length=L, calendar_features=False
    )
    assert bare.features == bare.channels == CHANNELS
    np.testing.assert_array_equal(bare.clients.inputs, clients.inputs[:, :2])
    np.testing.assert_array_equal(bare.clients.mask, clients.mask)


def test_the_calendar_goes_on_from_piece_to_piece():
    whole = make_vitals(SERIES[0], interval=3600.0)
    options = {"length": L, "train": 0.6, "skip_unusable": False, "max_gap": 9}
    inputs = [
        federate_series(vitals, **options).clients.inputs[:, 2:]
        for vitals in (whole, cut(whole, 2))
    ]
    np.testing.assert_array_equal(*inputs)


@pytest.mark.parametrize("history", [None, 0.5])
def test_what_is_tested_on_changes_nothing_before(history):
    def inputs(values):
        found = federate_series(make_vitals(values), length=L, history=history)
        return [
            np.asarray(part.gather(0).inputs)
            for part in (found.history, found.clients, found.local_test)
        ]

    values = walk(60, 3)
    values[41, 0] = NAN  # the last sample of training: its gap ends in the test
    values[20, 0] = NAN  # that of the history: it ends in the training
    before = inputs(values)
    later = values.copy()
    later[42:] = later[42:] * 3 + 5
    for part, old in zip(inputs(later)[:2], before):
        np.testing.assert_array_equal(part, old)
    assert (inputs(later)[2][:, :2] != before[2][:, :2]).all()
    # Not even of what comes after the history, with one.
    known = 21 if history else 42
    changed = values.copy()
    changed[known - 2] += 9
    for part, old in zip(inputs(changed), before):
        assert np.any(part[:, :2] != old[:, :2])
    if history:
        changed = values.copy()
        changed[known:] += 9
        np.testing.assert_array_equal(inputs(changed)[0], before[0])


def test_a_gap_over_the_border_is_not_filled():
    values = walk(40, 4, [(0, 26, 4)])  # two before, two after
    found = federate_series(make_vitals(values), length=L)
    assert max(steps_used(found.clients, 0)) == 25
    assert min(steps_used(found.local_test, 0)) == 30
    assert found.devices[0].filled == (0, 0)
    assert found.clients.inputs[26:30, 0].tolist() == [0.0] * 4
    # Nor over that of history and training, at 14.
    values = walk(40, 4, [(0, 12, 4)])
    found = federate_series(make_vitals(values), length=L, history=0.5)
    assert max(steps_used(found.history, 0)) == 11
    assert min(steps_used(found.clients, 0)) == 16
    assert found.devices[0].filled == (0, 0)
    inside = walk(40, 4, [(0, 20, 4)])
    found = federate_series(make_vitals(inside), length=L)
    assert max(steps_used(found.clients, 0)) == 27
    assert found.devices[0].filled == (4, 0)


def test_root_follows_from_the_seed():
    first, again, other = (
        federate_series(make_vitals(*SERIES), length=L, root_size=12, seed=seed).root
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first.inputs, again.inputs)
    assert not np.array_equal(first.inputs, other.inputs)
    every = sum(
        device.windows
        for device in federate_series(make_vitals(*SERIES), length=L).devices
    )
    root = federate_series(make_vitals(*SERIES), length=L, root_size=every).root
    assert len(root.targets) == every
    message = rf"root_size={every + 1}, but the histories have only {every} windows"
    with pytest.raises(ValueError, match=message):
        federate_series(make_vitals(*SERIES), length=L, root_size=every + 1)


# What is refused ----------------------------------------------------------------------

FLAT = walk(60)
FLAT[:, 1] = 18 + 0.05 * (-1.0) ** np.arange(60)
LATE = walk(60)  # flat where its scale is fitted on
LATE[:42, 0] = 80
EMPTY = walk(60, 0, [(1, 0, 60)])
UNUSABLE = {
    "flat": (FLAT, r"respiration_rate of r0 is flat: .* is 0.05 over the 42 samples"),
    "late": (LATE, r"heart_rate of r0 is flat: .* is 0 over the 42 samples .*flat=0.1"),
    "empty": (
        EMPTY,
        r"r0 has no window of 4 samples .* training stretch: 42 samples, 0 of them .*"
        "the most in a row 0. Shorten",
    ),
    "short": (walk(6), r"training stretch: 4 samples, 4 of them .* in a row 4\. Shor"),
    "short test": (walk(13), r"r0 has .* in its test stretch: 4 samples, 4 of them"),
    "gaps": (
        walk(60, 0, [(0, 42 + 4 * i, 1) for i in range(5)]),
        r"test stretch: 18 samples, 13 of them .* the most in a row 3\.",
    ),
}


@pytest.mark.parametrize(("values", "error"), UNUSABLE.values(), ids=UNUSABLE)
def test_records_that_cannot_be_used(values, error):
    options = {"length": L, "max_gap": 0}
    with pytest.raises(ValueError, match=error):
        federate_series(make_vitals(values), **options)
    vitals = make_vitals(values, *SERIES)
    found = federate_series(vitals, **options, skip_unusable=True)
    assert [device.name for device in found.devices] == ["r1", "r2", "r3"]
    assert list(found.left_out) == ["r0"]
    with pytest.raises(ValueError, match=error):
        raise ValueError(found.left_out["r0"])
    alone = federate_series(make_vitals(*SERIES), **options)
    jax.tree.map(np.testing.assert_array_equal, found.clients, alone.clients)
    first = error.partition(r"\.")[0].removesuffix(". Shorten")
    with pytest.raises(
        ValueError, match=f"none of the 1 records of hand can be used: .*{first}"
    ):
        federate_series(make_vitals(values), **options, skip_unusable=True)


def test_what_was_left_out_before_stays_so():
    vitals = make_vitals(FLAT, *SERIES)._replace(left_out={"x": "x is empty."})
    found = federate_series(vitals, length=L, skip_unusable=True)
    assert list(found.left_out) == ["x", "r0"]
    assert found.left_out["x"] == "x is empty."


@pytest.mark.parametrize("sample", [np.inf, -np.inf, 1e39])
def test_an_infinite_sample(sample):
    values = walk(60)
    values[3, 1] = sample
    record = Record("r0", "p0", START, values)
    vitals = make_vitals(*SERIES)._replace(records=(record,))
    with pytest.raises(
        ValueError, match=r"r0 has a sample of -?(inf|1e\+39): expected"
    ):
        federate_series(vitals, length=L)


def test_records_of_another_form():
    vitals = make_vitals(*SERIES)
    twice = vitals._replace(records=vitals.records + vitals.records[1:2])
    with pytest.raises(ValueError, match="names of their own; got 'r1' more than once"):
        federate_series(twice, length=L)
    narrow = vitals._replace(channels=("heart_rate",))
    with pytest.raises(ValueError, match=r"r0 must have a column for each of heart_r"):
        federate_series(narrow, length=L)
    line = vitals.records[0]._replace(values=np.ones(60))
    with pytest.raises(ValueError, match=r"got shape \(60,\)"):
        federate_series(vitals._replace(records=(line,)), length=L)


def test_flat_is_a_matter_of_its_limit():
    found = federate_series(make_vitals(FLAT), length=L, flat=0.04)
    np.testing.assert_allclose(found.devices[0].sd[1], 0.05, rtol=1e-3)
    constant = walk(60)
    constant[:, 1] = 18
    with pytest.raises(ValueError, match="respiration_rate of r0 is flat"):
        federate_series(make_vitals(constant), length=L, flat=0)


def test_a_history_without_a_window():
    with pytest.raises(ValueError, match="in its history stretch: 4 samples"):
        federate_series(make_vitals(walk(60)), length=L, history=0.1)
    with pytest.raises(ValueError, match="in its training stretch: 4 samples"):
        federate_series(make_vitals(walk(60)), length=L, history=0.9)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"length": 0}, "length must be an integer of at least 1; got 0"),
        ({"train": 0.0}, r"train must be a finite number in \(0, 1\); got 0"),
        ({"train": 1.0}, r"train must be .*; got 1"),
        ({"history": 0.0}, r"history must be a finite number in \(0, 1\); got 0"),
        ({"history": 1}, r"history must be .*; got 1"),
        ({"max_gap": -1}, "max_gap must be an integer of at least 0"),
        ({"flat": -0.1}, r"flat must be a finite number in \[0, inf\)"),
        ({"edges": ()}, r"edges must be one or more, increasing; got \(\)"),
        ({"edges": (0.5, -0.5)}, r"increasing; got \(0\.5, -0\.5\)"),
        ({"edges": (0.5, 0.5)}, r"increasing; got \(0\.5, 0\.5\)"),
        ({"edges": (0.5, NAN)}, "edges must be a finite number"),
        ({"root_size": -1}, "root_size must be an integer of at least 0"),
    ],
)
def test_refuses(options, error):
    with pytest.raises(ValueError, match=error):
        federate_series(make_vitals(*SERIES), **{"length": L, **options})


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"vitals": "generated"}, "vitals must be of type Vitals; got str. Load them"),
        ({"length": 4.0}, "length must be an integer"),
        ({"train": "0.7"}, "train must be a number"),
        ({"edges": ("low",)}, "edges must be a number"),
        ({"max_gap": 1.5}, "max_gap must be an integer"),
        ({"root_size": 1.5}, "root_size must be an integer"),
        ({"seed": 0.5}, "seed must be an integer"),
        ({"calendar_features": "no"}, "calendar_features must be of type bool"),
        ({"skip_unusable": 1}, "skip_unusable must be of type bool"),
    ],
)
def test_refuses_other_types(options, error):
    with pytest.raises(TypeError, match=error):
        federate_series(**{"vitals": make_vitals(*SERIES), "length": L, **options})


def test_no_calendar_without_a_start():
    vitals = make_vitals(*SERIES, start=None)
    message = r"3 records of hand do not say when .*first is r0.*calendar_features=Fal"
    with pytest.raises(ValueError, match=message):
        federate_series(vitals, length=L, skip_unusable=True)


# In a run -----------------------------------------------------------------------------


def test_a_run_on_series_is_one_on_their_windows():
    """With one step of all samples a client, in which their order does not matter."""
    vitals = make_vitals(*(walk(50, seed) for seed in range(3)))
    found = federate_series(vitals, length=L)
    own = [samples_of(found.clients, id) for id in range(3)]
    inputs, targets = (np.concatenate(part) for part in zip(*own))
    count = len(own[0][1])
    rows = np.arange(3 * count).reshape(3, count)
    assert len(targets) == 3 * count
    ordinary = fs.data.clients_from_indices(Examples(inputs, targets), rows)
    common = {
        "model": fs.models.mlp((L, 5), num_classes=3, hidden=()),
        "client_update": fs.local_sgd(optax.sgd(0.5), epochs=1, batch_size=count),
        "aggregator": fs.aggregators.fedavg(),
        "test": found.test,
    }
    key = jax.random.key(0)
    state, history = fs.Simulation(
        clients=found.clients, make_samples=windows(L), **common
    ).run(key, num_rounds=3)
    other, expected = fs.Simulation(clients=ordinary, **common).run(key, num_rounds=3)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(other.params)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(history.loss, expected.loss, rtol=1e-4)
    np.testing.assert_allclose(history.weights, 1 / 3, rtol=1e-6)
    assert history.train_loss[-1] < history.train_loss[0]


def test_a_series_is_not_held_out_at_random():
    vitals = fs.data.load_vitals("generated", patients=2, minutes=60, missing=0.0)
    devices = fs.data.federate_series(vitals, length=6)
    with pytest.raises(ValueError, match=r"Divide it in time: federate_series\(train"):
        fs.data.hold_out(devices.clients)
