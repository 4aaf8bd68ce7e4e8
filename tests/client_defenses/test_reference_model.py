"""FedSecure's reference model, classifier and thresholds, against NumPy."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim.client_defenses import adaptive_threshold, train_detector
from fedjax_sim.client_defenses.fedsecure import judge
from fedjax_sim.client_defenses.reference_model import (
    FOLDS,
    HELD_OUT,
    Scale,
    anomaly_scores,
    classify,
    error_limits,
    error_scale,
    reconstruction_errors,
    window_errors,
)
from fedjax_sim.data import windows
from fedjax_sim.types import ClientData
from tests.pages import EXAMPLES, check, inputs, options
from tests.references import fedsecure as reference

module = importlib.import_module("fedjax_sim.client_defenses.reference_model")
# Where the batches are.
sanitization_module = importlib.import_module("fedjax_sim.client_defenses.sanitization")
S, L, F = 60, 5, 2


# The worked examples ------------------------------------------------------------------


def test_windows_and_error_example():
    identifier = "fedsecure/windows_and_error"
    x, rebuilt = (jnp.array(inputs(identifier)[name]) for name in ("x", "recon"))
    length = options(identifier)["seq_len"]
    # One step more, without which the last window has none after it to tell.
    x = jnp.concatenate([x, jnp.zeros((1, 1))])
    series = ClientData(x, jnp.zeros(len(x), jnp.int32), jnp.ones(len(x), bool))
    samples = windows(length)(series)
    found = samples.inputs[samples.mask]
    check(identifier, windows=found, errors=reconstruction_errors(found, rebuilt))
    errors = [reference.error(*pair) for pair in zip(np.asarray(found), rebuilt)]
    check(identifier, errors=errors)


def test_score_and_flag_example():
    """Its classifier sees the errors as they are, and not relative to a device's."""
    identifier = "fedsecure/score_and_flag"
    given, settings = inputs(identifier), options(identifier)
    errors, W1, b1, W2 = (jnp.array(given[n]) for n in ("errors", "W1", "b1", "W2"))
    layers = [(W1[None], b1), (W2[:, None], jnp.array([given["b2"]]))]
    scores = classify(layers, errors[:, None])
    T, everything = settings["T"], jnp.ones(len(errors), bool)
    found = judge(scores, errors, everything, T, settings["phi"])
    check(
        identifier,
        scores=scores,
        flags=scores > T,
        fraction=found.flagged_share,
        exclude=found.excluded,
    )
    check(identifier, scores=reference.classify(layers, errors[:, None]))


def test_adaptive_threshold_example():
    identifier = "fedsecure/adaptive_threshold"
    scores = inputs(identifier)["calibration_scores"]
    given = dict(options(identifier))
    given |= {"low": given.pop("lo"), "high": given.pop("hi")}
    check(identifier, T=adaptive_threshold(jnp.array(scores), **given))
    check(identifier, T=reference.threshold(scores, **given))


def test_every_example_is_used():
    assert {i for i, e in EXAMPLES.items() if e["algorithm"] == "fedsecure"} == {
        "fedsecure/windows_and_error",
        "fedsecure/score_and_flag",
        "fedsecure/adaptive_threshold",
    }


# Thresholds and scales ----------------------------------------------------------------

FREE = {"low": -np.inf, "high": np.inf}
THRESHOLDS = {
    "default": {},
    "free": FREE,
    "median": {"k": 1.0, "percentile": 50.0, "mix": 0.2, **FREE},
    "largest": {"percentile": 100.0, "mix": 0.0, **FREE},
    "clipped": {"low": 0.7, "high": 0.8},
}


@functools.cache
def compiled_threshold(name):
    given = THRESHOLDS[name]
    return jax.jit(lambda scores, mask: adaptive_threshold(scores, mask, **given))


@pytest.mark.parametrize("count", [0, 1, 2, 3, 20, 21, 40])
@pytest.mark.parametrize("name", THRESHOLDS)
def test_adaptive_threshold_of_any_number_of_scores(name, count):
    rng = np.random.default_rng(count)
    scores = rng.uniform(size=40).astype(np.float32)
    mask = rng.permutation(40) < count
    chosen = scores[mask].astype(np.float64)
    scores[~mask] = np.nan  # what the mask hides counts for nothing
    found = compiled_threshold(name)(scores, mask)
    given = THRESHOLDS[name]
    np.testing.assert_allclose(found, reference.threshold(chosen, **given), rtol=1e-5)
    if count:
        alone = adaptive_threshold(jnp.asarray(chosen, jnp.float32), **given)
        np.testing.assert_allclose(alone, found, rtol=1e-5)


@pytest.mark.parametrize(("score", "expected"), [(0.1, 0.5), (1.0, 0.99), (0.8, 0.8)])
def test_thresholds_are_clipped(score, expected):
    found = adaptive_threshold(jnp.full(9, score, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_error_limits_are_each_device_s_own():
    rng = np.random.default_rng(0)
    errors, device = rng.exponential(size=50).astype(np.float32), rng.integers(0, 3, 50)
    errors[device == 2] *= 10
    expected = [reference.limit(errors[device == d]) for d in range(3)]
    found = error_limits(jnp.asarray(errors), jnp.asarray(device), 3)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert found[2] > 5 * found[0]


def test_error_scale():
    errors = np.random.default_rng(0).exponential(size=30).astype(np.float32)
    mask = np.arange(30) % 3 > 0
    expected = reference.scale(errors[mask])
    errors[~mask] = np.nan
    found = error_scale(jnp.asarray(errors), jnp.asarray(mask))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    # Errors all alike, one, none, and a window rebuilt exactly.
    for some, center in [([2.0, 2.0], np.log(2)), ([3.0], np.log(3)), ([0.0], -87.34)]:
        found = error_scale(jnp.array(some))
        np.testing.assert_allclose(found, (center, 1e-6), rtol=1e-4)
    nobody = error_scale(jnp.array([5.0, 9.0]), jnp.zeros(2, bool))
    np.testing.assert_allclose(nobody, (0.0, 1e-6), rtol=1e-6)


# Training -----------------------------------------------------------------------------

SETTINGS = {
    "hidden": 3,
    "epochs": 10,
    "batch_size": 8,
    "learning_rate": 5e-3,
    "layers": (8, 4),
    "classifier_epochs": 200,
}


def make_windows():
    """Sines with noise of two devices, the second of which is larger; four are odd."""
    rng = np.random.default_rng(0)
    t = np.arange(S)[:, None] * 0.9 + np.arange(L)[None] * 0.7
    x = np.stack([np.sin(t), np.cos(t)], axis=2) + 0.3 * rng.normal(size=(S, L, F))
    device = rng.permutation(S) % 2
    x[[5, 17, 29, 44]] *= 6
    return (x * (1 + device)[:, None, None]).astype(np.float32), device


@functools.cache
def trained(key=0):
    return train_detector(jax.random.key(key), *make_windows(), **SETTINGS)


def test_what_is_reported_is_so():
    x, device = make_windows()
    detector, training = trained()
    rebuilt = reference.autoencode(x, detector.autoencoder)
    errors = np.array([reference.error(*pair) for pair in zip(x, rebuilt)])
    np.testing.assert_allclose(training.errors, errors, rtol=1e-4)
    np.testing.assert_array_equal(training.device, device)
    limits = [reference.limit(training.errors[device == d]) for d in (0, 1)]
    np.testing.assert_allclose(training.limits, limits, rtol=1e-5)
    np.testing.assert_array_equal(training.labels, errors > np.array(limits)[device])
    own = [reference.scale(training.errors[device == d]) for d in (0, 1)]
    seen = [(np.log(e) - own[d][0]) / own[d][1] for e, d in zip(errors, device)]
    np.testing.assert_allclose(detector.highest, max(seen), rtol=1e-3)
    assert 0 < training.labels.sum() < S // 4
    # The last epoch's losses and accuracies are means over parts of all windows.
    held = round(HELD_OUT * S)
    assert held == 12
    same = rebuilt.argmax(axis=2) == x.argmax(axis=2)
    for name, expected in [("loss", errors.mean()), ("accuracy", same.mean())]:
        parts = [getattr(training, f"{part}_{name}") for part in ("train", "val")]
        assert [(p.shape, p.dtype) for p in parts] == [((10,), np.float32)] * 2
        found = ((S - held) * parts[0][-1] + held * parts[1][-1]) / S
        np.testing.assert_allclose(found, expected, rtol=1e-4)
    shown, again = training.example
    (row,) = np.flatnonzero((x == shown).all(axis=(1, 2)))
    np.testing.assert_allclose(again, rebuilt[row], rtol=1e-4, atol=1e-5)


def test_it_learns():
    training = trained()[1]
    assert training.train_loss[-1] < 0.7 * training.train_loss[0]
    assert training.val_loss[-1] < 0.7 * training.val_loss[0]


def test_scores_are_of_the_fold_that_was_not_trained_on_them():
    """A fifth each: so the means over folds are those over windows."""
    training = trained()[1]
    folds, scores, labels = training.folds, training.scores, training.labels
    assert all(part.shape == (FOLDS,) for part in folds)
    assert scores.shape == (S,)
    assert np.all((scores >= 0) & (scores <= 1))
    right = (scores > 0.5) == labels
    np.testing.assert_allclose(folds.val_accuracy.mean(), right.mean(), rtol=1e-5)
    losses = -np.log(np.where(labels, scores, 1 - scores.astype(float)))
    np.testing.assert_allclose(folds.val_loss.mean(), losses.mean(), rtol=1e-4)
    assert len(set(folds.train_loss.tolist())) == FOLDS


def test_the_classifier_tells_large_errors_from_small_ones():
    detector, training = trained()
    scale = error_scale(jnp.asarray(training.errors))
    given = [0.01, float(np.median(training.errors)), 100.0]
    scores = anomaly_scores(detector, jnp.array(given), scale)
    expected = reference.scores(detector, given, *map(float, scale))
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-6)
    # Beyond what it was trained on the answer is that at its end.
    assert anomaly_scores(detector, jnp.array([1e9]), scale)[0] == scores[2]
    assert scores[2] > 0.5 > 0.1 > max(scores[0], scores[1])
    unknown = jnp.array([np.nan, np.inf])
    assert anomaly_scores(detector, unknown, scale).tolist() == [1.0, 1.0]
    assert [W.shape for W, _ in detector.layers] == [(1, 8), (8, 4), (4, 1)]


def test_no_key_leaves_large_errors_without_a_score():
    """One in fifty is positive; from a first answer of a half some fail."""
    x = np.sort(np.random.default_rng(0).normal(size=250)).astype(np.float32)[:, None]
    labels, every = jnp.arange(250) >= 245, jnp.ones(250, bool)

    def one(key):
        layers = module._fit_classifier(key, x, labels, every, (32, 16), 500, 1e-3)
        return classify(layers, jnp.asarray(x[[0, 125, -1]]))

    scores = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 30))
    assert np.all(scores[:, :2] < 0.01)
    assert np.all(scores[:, 2] > 0.99)


def test_the_first_answer_is_the_share_of_positives():
    x, labels = jnp.zeros((8, 1)), jnp.arange(8) < 3
    weight = jnp.array([1, 1, 1, 1, 1, 1, 0, 0], bool)
    layers = module._fit_classifier(jax.random.key(0), x, labels, weight, (4,), 0, 1e-3)
    np.testing.assert_allclose(classify(layers, x), (3 + 1) / (6 + 2), rtol=1e-6)


def test_it_follows_from_the_key():
    again = train_detector(jax.random.key(0), *make_windows(), **SETTINGS)
    jax.tree.map(np.testing.assert_array_equal, trained(), again)
    assert not np.array_equal(trained()[1].errors, trained(1)[1].errors)


def test_every_epoch_is_told():
    told = []
    again = train_detector(
        jax.random.key(0),
        *make_windows(),
        **SETTINGS,
        on_epoch=lambda *values: told.append(values),
    )
    jax.tree.map(np.testing.assert_array_equal, trained(), again)
    curves = trained()[1]
    numbers, losses, held_out = zip(*told)
    assert list(numbers) == list(range(1, SETTINGS["epochs"] + 1))
    np.testing.assert_array_equal(np.float32(losses), curves.train_loss)
    np.testing.assert_array_equal(np.float32(held_out), curves.val_loss)


def test_windows_in_batches(monkeypatch):
    x, (detector, training) = make_windows()[0], trained()
    for size in (7, S, S + 1):
        monkeypatch.setattr(sanitization_module, "_BATCH", size)
        found = window_errors(detector, jnp.asarray(x))
        np.testing.assert_allclose(found, training.errors, rtol=1e-5)
    huge = jnp.asarray(x).at[3].set(np.nan)
    assert np.flatnonzero(np.isnan(window_errors(detector, huge))).tolist() == [3]


# What is refused ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"hidden": 0}, "hidden must be an integer of at least 1; got 0"),
        ({"epochs": 0}, "epochs must be"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"learning_rate": 0.0}, r"learning_rate must be .*\(0, inf\)"),
        ({"layers": (4, 0)}, "layers must be an integer of at least 1; got 0"),
        ({"classifier_epochs": 0}, "classifier_epochs must be"),
        ({"windows": np.zeros((S, L))}, r"got shapes \(60, 5\) and \(60,\)"),
        ({"device": np.zeros(S - 1, int)}, r"\(60, 5, 2\) and \(59,\)"),
        ({"device": np.zeros((S, 1), int)}, r"\(60, 5, 2\) and \(60, 1\)"),
        ({"windows": np.full((S, L, F), np.nan)}, "finite windows; got a NaN"),
        ({"windows": np.full((S, L, F), np.inf)}, "finite windows; got a NaN or inf"),
        ({"batch_size": 49}, "more windows: 60 leave 48 to train on, with batch_size="),
        ({"windows": np.ones((S, L, F))}, "none of the 60 windows stands out"),
        (
            {"windows": np.full((S, L, F), 1e30)},
            "mean square of some windows is beyond",
        ),
        (
            {"learning_rate": 1e18},
            r"diverged: its largest error is .*mean square of 61\.99",
        ),
        (
            {"classifier_epochs": 1},
            r"scores no error above 0\..*classifier_epochs=1 and ten times learning_ra",
        ),
        ({"device": np.full(S, -1)}, "numbered from 0"),
        ({"device": np.zeros(S)}, "numbered from 0; got .* float64"),
        ({"learning_rate": 1e30}, r"reference model diverged.*learning_rate=1e\+30"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refusals(changes, error):
    x, device = make_windows()
    given = {"windows": x, "device": device, **SETTINGS, "epochs": 1, **changes}
    with pytest.raises(ValueError, match=error):
        train_detector(jax.random.key(0), **given)


def test_too_few_windows():
    x, device = (part[:5] for part in make_windows())
    with pytest.raises(ValueError, match="5 leave 4 to train on, with batch_size=1"):
        train_detector(jax.random.key(0), x, device, **{**SETTINGS, "batch_size": 1})


@pytest.mark.parametrize("name", ["hidden", "epochs", "learning_rate"])
def test_refuses_other_types(name):
    with pytest.raises(TypeError, match=f"{name} must be"):
        train_detector(jax.random.key(0), *make_windows(), **{**SETTINGS, name: "two"})


def test_an_unusual_error_scale_does_not_break_scores():
    """Of a device with errors all alike, another one is infinitely far away."""
    detector = trained()[0]
    alike = Scale(jnp.float32(0.0), jnp.float32(1e-6))
    scores = anomaly_scores(detector, jnp.array([1.0, 2.0, 1e-30]), alike)
    assert np.all((scores >= 0) & (scores <= 1))
    assert scores[1] > scores[0] + 0.5


def test_a_classifier_that_diverged_is_refused(monkeypatch):
    def diverged(key, x, labels, weight, widths, epochs, learning_rate):
        return ((jnp.full((1, 1), jnp.nan), jnp.zeros(1)),)

    monkeypatch.setattr(module, "_fit_classifier", diverged)
    x, device = make_windows()
    x[7] *= 20.0
    with pytest.raises(ValueError, match="the classifier diverged"):
        train_detector(jax.random.key(0), x, device, **SETTINGS)
