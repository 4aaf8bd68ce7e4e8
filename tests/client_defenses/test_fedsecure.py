"""FedSecure: what devices find, who stays out and when, alone and in a run."""

import datetime
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_sim as fs
from fedjax_sim.client_defenses import (
    CLIENT_DEFENSES,
    Calibration,
    calibrate,
    clean_windows,
    fedsecure,
    train_detector,
)
from fedjax_sim.client_defenses.fedsecure import judge, screen
from fedjax_sim.data import federate_series, windows
from fedjax_sim.data.vitals import Record, Vitals
from fedjax_sim.state import TRAIN, stream
from fedjax_sim.types import ClientData, RoundContext
from tests.references import fedsecure as reference

L, N, C = 5, 4, 2
PHI = 0.2
MAKE = windows(L)
EVERYBODY = np.arange(N)


@functools.cache
def federation():
    """Four patients of unequal length who stay as they are, with gaps."""
    rng, records = np.random.default_rng(0), []
    for i, steps in enumerate((240, 200, 170, 220)):
        t = np.arange(steps)[:, None]
        values = np.sin(t / np.array([5.0, 7.0]) + i) + 0.3 * rng.normal(
            size=(steps, C)
        )
        values[rng.random((steps, C)) < 0.02] = np.nan
        start = datetime.datetime(2101, 1, 1 + i)
        values = (80 + 9 * values).astype(np.float32)
        records.append(Record(f"r{i}", f"p{i}", start, values))
    channels = ("heart_rate", "respiration_rate")
    vitals = Vitals("hand", tuple(records), channels, 60.0, "test", "none")
    return federate_series(vitals, length=L, train=0.9, history=0.6, max_gap=0)


@functools.cache
def detector():
    """A trained reference model, and a classifier of which the answers are known.

    ``a = sigmoid(3 max(0, z - 1) - max(0, -z) / 2 - 2)`` of errors at ``z``, from 0.12
    at 1 to 0.98 at 3, the most it is given.
    """
    trained, _ = train_detector(
        jax.random.key(0),
        *clean_windows(federation().history, MAKE),
        hidden=4,
        epochs=15,
        learning_rate=5e-3,
        layers=(4,),
    )
    first = jnp.array([[1.0, -1.0]]), jnp.array([-1.0, 0.0])
    second = jnp.array([[3.0], [-0.5]]), jnp.array([-2.0])
    return trained._replace(layers=(first, second), highest=jnp.float32(3.0))


@functools.cache
def calibration():
    return calibrate(detector(), federation().history, MAKE)


@functools.cache
def make(**options):
    return fedsecure(detector(), calibration(), **{"max_flagged": PHI, **options})


def series(scale=2.0, poisoned=(1,)):
    """What devices train on: inputs ``[N, T, F]``, labels and starts of windows."""
    x, y, starts = (np.array(a) for a in federation().clients.gather(jnp.arange(N)))
    for id in poisoned:
        x[id, :, :C] *= scale
    return x, y, starts


def play(defense, state, data, index=0, ids=EVERYBODY):
    """``data`` are series of all N devices."""
    data = [jnp.asarray(a) for a in data]

    def gather(id):
        return MAKE(ClientData(*(a[id] for a in data)))

    context = RoundContext(round=index, client_ids=ids)
    return defense.apply(gather, state, context)


@functools.cache
def compiled(defense):
    return jax.jit(functools.partial(play, defense))


def start(defense):
    return defense.init(jnp.ones((N, 9), bool))


def by_loop(data, id, limit, max_flagged=PHI):
    """What device ``id`` finds in its windows, by the reference."""
    x, y, starts = (a[id] for a in data)
    own = [window for _, window, _ in reference.windows(x, y, starts, L)]
    rebuilt = reference.autoencode(own, detector().autoencoder)
    errors = [reference.error(*pair) for pair in zip(own, rebuilt)]
    scale = [float(part[id]) for part in calibration().scale]
    scores = reference.scores(detector(), errors, *scale)
    share = sum(score > limit for score in scores) / len(scores)
    return {
        "excluded": share > max_flagged,
        "flagged_share": share,
        "score": np.mean(scores),
        "error": np.mean(errors),
        "score_change": abs(scores[-1] - scores[0]),
    }, scores


# What devices find --------------------------------------------------------------------


def test_clean_windows_are_those_of_a_loop():
    history = federation().history
    found, device = clean_windows(history, MAKE)
    expected, whose = [], []
    for id in range(N):
        own = reference.windows(*(np.asarray(a) for a in history.gather(id)), L)
        expected += [window for _, window, _ in own]
        whose += [id] * len(own)
    np.testing.assert_array_equal(found, expected)
    assert device.tolist() == whose
    assert len({whose.count(id) for id in range(N)}) > 1


def test_a_threshold_that_no_score_is_above():
    history = federation().history
    with pytest.raises(
        ValueError, match=r"4 devices .*below .* score, 0\.982; got 0\.99"
    ):
        calibrate(detector(), history, MAKE, low=0.99)
    for options in ({"percentile": 101}, {"mix": -0.1}, {"low": 0.6, "high": 0.5}):
        name = next(iter(options))
        with pytest.raises(ValueError, match=f"adaptive_threshold's {name} must"):
            calibrate(detector(), history, MAKE, **options)
    with pytest.raises(TypeError, match="adaptive_threshold's k must be a number"):
        calibrate(detector(), history, MAKE, k="3")


@pytest.mark.parametrize("shape", [(9, L, 4), (9, 5)])
def test_windows_of_another_form_than_it_learned(shape):
    other = ClientData(jnp.zeros(shape), jnp.zeros(9, jnp.int32), None)
    own = jax.tree.map(lambda x: x[0], calibration().scale)
    with pytest.raises(ValueError, match=r"windows \[b, L, 5\], .* got shape \(9, "):
        screen(detector(), other, own)


@pytest.mark.parametrize("options", [{}, {"k": 1.0, "mix": 0.9, "low": 0.0}], ids=str)
def test_calibration_device_by_device(options):
    history = federation().history
    found = calibrate(detector(), history, MAKE, **options)
    for id in range(N):
        own = reference.windows(*(np.asarray(a) for a in history.gather(id)), L)
        own = [window for _, window, _ in own]
        rebuilt = reference.autoencode(own, detector().autoencoder)
        errors = [reference.error(*pair) for pair in zip(own, rebuilt)]
        center, spread = reference.scale(errors)
        np.testing.assert_allclose(found.scale.center[id], center, rtol=1e-3)
        np.testing.assert_allclose(found.scale.spread[id], spread, rtol=1e-3)
        scores = reference.scores(detector(), errors, center, spread)
        np.testing.assert_allclose(
            found.thresholds[id], reference.threshold(scores, **options), rtol=1e-3
        )
    assert found.thresholds.shape == (N,)


def test_screening_against_the_loop():
    data, defense = series(), make()
    keep, state, info = compiled(defense)(start(defense), data)
    limits = np.asarray(calibration().thresholds)
    for id in range(N):
        expected, scores = by_loop(data, id, limits[id])
        assert np.abs(np.array(scores) - limits[id]).min() > 1e-4  # no near miss
        for name, value in expected.items():
            np.testing.assert_allclose(info[name][id], value, rtol=2e-3, atol=1e-5)
    assert info["excluded"].tolist() == [False, True, False, False]
    assert 0 < info["flagged_share"][1] < 1
    np.testing.assert_array_equal(info["threshold"], limits)
    rows = data[1].shape[1]
    np.testing.assert_array_equal(keep, np.array([[1, 0, 1, 1]] * rows, bool).T)
    for name, value in state.last._asdict().items():
        np.testing.assert_array_equal(value, info[name])
    jax.tree.map(np.testing.assert_array_equal, state.own, calibration())


def test_jit_is_eager():
    data, defense = series(), make(adapt=0.5)
    eager = play(defense, start(defense), data)
    jitted = compiled(defense)(start(defense), data)
    for a, b in zip(jax.tree.leaves(eager), jax.tree.leaves(jitted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_cohort_is_screened_alone():
    data, defense = series(), make()
    _, everybody, whole = compiled(defense)(start(defense), data)
    ids = np.array([3, 1])
    keep, state, info = compiled(defense)(start(defense), data, 7, ids)
    assert keep[:, 0].tolist() == [True, False]
    for name, value in info.items():
        np.testing.assert_allclose(value, whole[name][ids], rtol=1e-5)
    for value, known in zip(state.last, everybody.last):
        assert value[np.array([0, 2])].tolist() == [0, 0]
        np.testing.assert_allclose(value[ids], known[ids], rtol=1e-5)


@pytest.mark.parametrize("count", [1, 3, 7, 10, 30])
def test_a_share_of_exactly_phi_stays(count):
    """Of so many windows any number may be flagged; beside them is padding."""
    mask = jnp.arange(40) < count
    judged = jax.jit(functools.partial(judge, errors=jnp.ones(40), mask=mask))
    for flagged in range(count):
        scores = jnp.where(jnp.arange(40) < flagged, 0.9, 0.5)
        scores = jnp.where(mask, scores, 1.0)
        phi = flagged / count
        at = judged(scores, threshold=0.5, max_flagged=phi)
        assert not at.excluded
        np.testing.assert_allclose(at.flagged_share, phi, rtol=1e-6)
        one_more = jnp.where(jnp.arange(40) <= flagged, 0.9, scores)
        assert judged(one_more, threshold=0.5, max_flagged=phi).excluded


def test_what_is_reported_of_scores_with_holes():
    nan = jnp.nan
    mask = jnp.array([False, True, False, True, True, False])
    scores = jnp.array([nan, 0.25, 0.9, 0.75, 0.5, nan])
    errors = jnp.array([nan, 1.0, 7.0, 2.0, 6.0, nan])
    found = judge(scores, errors, mask, 0.4, 0.7)
    expected = {
        "excluded": False,
        "flagged_share": 2 / 3,
        "score": 0.5,
        "error": 3.0,
        "score_change": 0.25,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(found, name), value, rtol=1e-6)


def test_one_window_is_enough_for_phi_of_0():
    x, y, starts = series(poisoned=())
    scores = [by_loop((x, y, starts), id, 0.5)[1] for id in range(N)]
    limits = np.array([max(own) + 1e-4 for own in scores])
    assert limits.max() < 1
    defense = fedsecure(detector(), calibration()._replace(thresholds=limits), 0.0)
    info = compiled(defense)(start(defense), (x, y, starts))[2]
    assert not info["flagged_share"].any()
    assert not info["excluded"].any()
    last = np.flatnonzero(starts[2])[-1]
    x[2, last + L - 1, 0] = np.nan  # in the last window alone
    starts[2, last - L + 1 : last] = False
    info = compiled(defense)(start(defense), (x, y, starts))[2]
    assert info["excluded"].tolist() == [False, False, True, False]
    share = 1 / starts[2].sum()
    np.testing.assert_allclose(info["flagged_share"][2], share, rtol=1e-6)


def test_a_device_without_windows_is_not_excluded():
    x, y, starts = series(poisoned=(0, 1))
    starts = starts & (np.arange(N) != 1)[:, None]
    defense = make(adapt=1.0, max_flagged=0.0)
    keep, state, info = compiled(defense)(start(defense), (x, y, starts))
    assert info["excluded"][0]
    assert not info["excluded"][1]
    assert keep[1].all()
    for name in ("flagged_share", "score", "error"):
        assert info[name][1] == 0
    assert state.own.thresholds[1] == calibration().thresholds[1]


def test_what_is_not_measured_is_flagged():
    x, y, starts = series(poisoned=())
    before = compiled(make())(start(make()), (x, y, starts))[2]
    broken = x.copy()
    step = np.flatnonzero(starts[2])[10] + L - 1
    broken[2, step, 0] = np.nan
    after = compiled(make())(start(make()), (broken, y, starts))[2]
    touched = [j for j in np.flatnonzero(starts[2]) if j <= step < j + L]
    limits = calibration().thresholds
    scores = np.array(by_loop((x, y, starts), 2, limits[2])[1])
    rows = np.isin(np.flatnonzero(starts[2]), touched)
    flagged = (scores > float(limits[2])) | rows
    np.testing.assert_allclose(after["flagged_share"][2], flagged.mean(), rtol=1e-5)
    expected = np.where(rows, 1.0, scores).mean()
    np.testing.assert_allclose(after["score"][2], expected, rtol=1e-3)
    assert after["flagged_share"][2] > before["flagged_share"][2]
    others = np.array([0, 1, 3])
    for name in before:
        np.testing.assert_array_equal(after[name][others], before[name][others])
    broken[2] = np.nan
    after = compiled(make())(start(make()), (broken, y, starts))[2]
    assert after["excluded"].tolist() == [False, False, True, False]
    assert after["flagged_share"][2] == after["score"][2] == 1


# Rounds -------------------------------------------------------------------------------


@pytest.mark.parametrize("adapt", [0.3, 1.0])
def test_thresholds_of_those_included_adapt(adapt):
    data, defense = series(), make(adapt=adapt)
    old = np.asarray(calibration().thresholds)
    _, state, info = compiled(defense)(start(defense), data)
    limits = np.asarray(state.own.thresholds)
    for id in range(N):
        moved = reference.threshold(by_loop(data, id, old[id])[1])
        expected = old[id] if id == 1 else (1 - adapt) * old[id] + adapt * moved
        np.testing.assert_allclose(limits[id], expected, rtol=1e-3)
    assert limits[1] == old[1]
    assert np.all(limits[[0, 2, 3]] != old[[0, 2, 3]])
    np.testing.assert_array_equal(info["threshold"], old)
    again = compiled(defense)(state, data, 1)[2]
    np.testing.assert_array_equal(again["threshold"], limits)


@pytest.mark.parametrize("every", [None, 3])
def test_rounds_of_screening(every):
    defense, always = make(every=every), make()
    clean, poisoned = series(poisoned=()), series()
    state = start(defense)
    excluded = []
    for index in range(5):
        data = clean if index == 0 else poisoned
        keep, state, info = compiled(defense)(state, data, index, np.array([1, 0]))
        excluded.append(bool(info["excluded"][0]))
        np.testing.assert_array_equal(keep[:, 0], ~info["excluded"])
        if index == 0:  # everybody is, and not the cohort alone
            expected = compiled(always)(start(always), clean)[1]
            for a, b in zip(state.last, expected.last):
                np.testing.assert_allclose(a, b, rtol=1e-5)
    late = every is not None
    assert excluded == [False, False, False, late, late]
    assert compiled(defense)._cache_size() == 1


@pytest.mark.parametrize("every", [None, 3])
def test_on_series_that_stay_it_does_not_matter_how_often(every):
    often, seldom = make(), make(every=every)
    states = [start(often), start(seldom)]
    for index in range(5):
        results = [
            compiled(defense)(state, series(), index, np.arange(N))
            for defense, state in zip((often, seldom), states)
        ]
        states = [state for _, state, _ in results]
        (keep, _, info), (other, _, found) = results
        np.testing.assert_array_equal(keep, other)
        for name, value in info.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-5)


# In a run -----------------------------------------------------------------------------


def simulation(defense, attack=None, aggregator=None, **options):
    return fs.Simulation(
        clients=shared().clients,
        model=shared().model,
        client_update=shared().client_update,
        make_samples=MAKE,
        aggregator=aggregator or fs.aggregators.fedavg(),
        data_attack=attack or fs.attacks.pattern_scaling(C, scale=4.0),
        byzantine_clients=(1,),
        client_defense=defense,
        **options,
    )


@functools.cache
def shared():
    return fs.Simulation(
        clients=federation().clients,
        model=fs.models.bilstm((L, 5), hidden=3),
        client_update=fs.local_sgd(optax.sgd(0.3), epochs=1, batch_size=16),
        make_samples=MAKE,
        aggregator=fs.aggregators.fedavg(),
    )


@functools.cache
def runs():
    """Systems side by side, of one program, for four rounds."""
    late = fs.attacks.schedule(fs.attacks.pattern_scaling(C, scale=4.0), start=2)
    low = calibration()._replace(thresholds=np.full(N, -1.0))
    systems = {
        "attacked": simulation(make()),
        "late": simulation(make(), late),
        "late, once": simulation(make(every=None), late),
        "all out": simulation(fedsecure(detector(), low)),
    }
    keys = jax.random.split(jax.random.key(0), 2)
    compared = fs.compare(systems)
    return systems, keys, compared.run(keys, num_rounds=4)


def test_a_poisoned_device_is_left_out():
    _, _, (_, histories) = runs()
    history = histories["attacked"]
    out = np.array([False, True, False, False])
    np.testing.assert_array_equal(history.defense["excluded"], np.tile(out, (2, 4, 1)))
    np.testing.assert_array_equal(history.flagged, history.defense["excluded"])
    assert np.all(history.weights[..., 1] == 0)
    sizes = np.asarray(federation().clients.sizes()) * ~out
    expected = np.broadcast_to(sizes / sizes.sum(), (2, 4, N))
    np.testing.assert_allclose(history.weights, expected, rtol=1e-6)
    assert set(history.defense) == {
        *("samples", "poisoned", "poisoned_left_out", "clean_left_out"),
        *("excluded", "flagged_share", "score", "error", "score_change", "threshold"),
    }
    assert np.all(history.defense["samples"] == sizes)
    count = int(federation().clients.sizes()[1])
    left = history.defense["poisoned_left_out"]
    np.testing.assert_array_equal(left, np.tile(out * count, (2, 4, 1)))
    assert np.all(history.tpr == 1)
    assert np.all(history.fpr == 0)
    for name in ("flagged_share", "error"):
        assert np.all(history.defense[name][..., 1] > 2 * history.defense[name][..., 0])


def test_its_update_has_no_influence():
    """The aggregate is the mean of the others' updates, each trained alone."""
    sim, clients = simulation(make()), federation().clients
    state = sim.init(jax.random.key(3))
    after, _ = sim.step(state)
    update = jax.jit(functools.partial(sim.client_update.apply, sim.model))
    total, whole = None, 0
    for id in (0, 2, 3):
        data = MAKE(clients.gather(jnp.int32(id)))
        key = jax.random.fold_in(stream(state, TRAIN), id)
        own = update(key, state.params, data, (), jnp.int32(0))[0]
        size = int(data.mask.sum())
        own = jax.tree.map(lambda u, size=size: size * np.asarray(u, float), own)
        total = own if total is None else jax.tree.map(np.add, total, own)
        whole += size
    aggregate = after.previous_aggregate
    jax.tree.map(
        lambda found, u: np.testing.assert_allclose(found, u / whole, atol=2e-6),
        aggregate,
        total,
    )
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(aggregate)) > 1e-3


def test_an_attack_that_begins_late():
    _, _, (_, histories) = runs()
    found = {n: histories[n].defense["excluded"] for n in ("late", "late, once")}
    assert not found["late, once"].any()
    assert found["late"][..., 1].tolist() == [[False, False, True, True]] * 2
    assert not found["late"][..., [0, 2, 3]].any()
    np.testing.assert_array_equal(found["late"], histories["late"].flagged)


def test_nobody_left():
    systems, keys, (states, histories) = runs()
    history = histories["all out"]
    assert history.defense["excluded"].all()
    assert history.flagged.all()
    assert history.no_aggregate.all()
    assert not history.weights.any()
    assert np.all(history.aggregate_norm == 0)
    params = systems["all out"].init(keys).params
    jax.tree.map(np.testing.assert_array_equal, states["all out"].params, params)
    assert not histories["attacked"].no_aggregate.any()


def test_seeds_side_by_side_are_each_alone():
    systems, keys, (states, histories) = runs()
    for i in (0, 1):
        state, history = systems["attacked"].run(keys[i], num_rounds=4)
        for a, b in zip(
            jax.tree.leaves((state.params, history)),
            jax.tree.leaves((states["attacked"].params, histories["attacked"])),
            strict=True,
        ):
            np.testing.assert_allclose(a, b[i], rtol=1e-4, atol=1e-5)
    losses = histories["attacked"].train_loss
    assert not np.allclose(losses[0], losses[1])


# What is refused ----------------------------------------------------------------------


def test_contract():
    assert CLIENT_DEFENSES["fedsecure"] is fedsecure
    defense = make()
    assert defense.name == "fedsecure"
    assert defense.needs == {"round", "client_ids"}
    for field in defense.needs:
        context = RoundContext(round=0, client_ids=np.arange(N))
        with pytest.raises(ValueError, match=rf"fedsecure needs context\.{field}"):
            defense.apply(None, start(defense), context._replace(**{field: None}))


def test_a_calibration_of_other_devices():
    make().validate(np.ones(N), np.zeros(9, int), 3)
    message = "fedsecure is calibrated for 3 clients; the run has 4. Calibrate it"
    three = jax.tree.map(lambda x: x[:3], calibration())
    with pytest.raises(ValueError, match=message):
        simulation(fedsecure(detector(), three))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"max_flagged": 1.0}, r"max_flagged must be a finite number in \[0, 1\)"),
        ({"max_flagged": -0.1}, r"fedsecure's max_flagged must be .*; got -0\.1"),
        ({"every": 0}, "fedsecure's every must be an integer of at least 1; got 0"),
        ({"adapt": 1.1}, r"fedsecure's adapt must be a finite number in \[0, 1\]"),
        ({"thresholds": [0.5, np.nan, 0.5, 0.5]}, r"thresholds.*\(4,\), 1 of them not"),
        ({"thresholds": [[0.5] * N]}, r"of shape \(1, 4\), 0 of them not finite"),
        ({"thresholds": [0.5] * 3}, r"scale.center of shape \(4,\), 0"),
        ({"spread": [1.0, 0.0, 1.0, 1.0]}, "a scale above 0 for each client; got 0"),
    ],
    ids=str,
)
def test_refuses(changes, error):
    own = calibration()
    if "spread" in changes:
        scale = own.scale._replace(spread=np.array(changes["spread"]))
        own, changes = own._replace(scale=scale), {}
    if "thresholds" in changes:
        own, changes = Calibration(own.scale, np.array(changes["thresholds"])), {}
    with pytest.raises(ValueError, match=error):
        fedsecure(detector(), own, **changes)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"detector": None}, "detector must be of type Detector; got NoneType. Train"),
        ({"calibration": 0.9}, "calibration must be of type Calibration; got float"),
        ({"max_flagged": "0.1"}, "max_flagged must be a number"),
        ({"every": 1.5}, "every must be an integer"),
        ({"adapt": None}, "adapt must be a number"),
    ],
    ids=str,
)
def test_refuses_other_types(changes, error):
    given = {"detector": detector(), "calibration": calibration(), **changes}
    with pytest.raises(TypeError, match=error):
        fedsecure(**given)
