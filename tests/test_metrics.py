"""Accuracy, attack success and detection against plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim.metrics import (
    Detection,
    accuracy,
    attack_success,
    auc,
    balanced_accuracy,
    class_recall,
    class_specificity,
    correct,
    detection,
    worst_case,
)
from tests.references import attacks as reference
from tests.references import poisoned


def test_accuracy_equals_a_loop():
    rng = np.random.default_rng(0)
    outputs, targets = rng.normal(size=(200, 5)), rng.integers(0, 5, 200)
    hits = sum(
        int(max(range(5), key=row.__getitem__) == y) for row, y in zip(outputs, targets)
    )
    got = jax.jit(accuracy)(jnp.asarray(outputs, jnp.float32), jnp.asarray(targets))
    assert got.dtype == jnp.float32
    assert got.shape == ()
    np.testing.assert_allclose(got, hits / 200, rtol=1e-6)


def test_accuracy_of_ties_and_nan():
    outputs = jnp.array([[1.0, 1.0], [0.0, jnp.nan], [jnp.nan, jnp.nan], [0.0, 1.0]])
    assert float(accuracy(outputs, jnp.array([0, 1, 0, 0]))) == 0.75


def test_accuracy_over_seeds():
    outputs = jnp.array([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]]])
    targets = jnp.array([0, 1])
    got = jax.vmap(accuracy, (0, None))(outputs, targets)
    np.testing.assert_array_equal(got, [1.0, 0.5])


@pytest.mark.parametrize("shapes", [((4, 3), (4, 1)), ((4, 3), (3,)), ((4,), (4,))])
def test_accuracy_refuses_shapes_that_would_broadcast(shapes):
    outputs, targets = (jnp.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=r"outputs \[s, classes\] and targets \[s\]"):
        accuracy(outputs, targets)


def predictions(seed=0):
    """Outputs ``[200, 5]``, the class each says, and labels without class 3."""
    rng = np.random.default_rng(seed)
    outputs = rng.normal(size=(200, 5)).astype(np.float32)
    said = [max(range(5), key=row.__getitem__) for row in outputs]
    targets = rng.choice([0, 1, 2, 4], 200)
    return jnp.asarray(outputs), said, jnp.asarray(targets)


def test_class_recall_equals_a_loop():
    outputs, said, targets = predictions()
    got = jax.jit(class_recall)(outputs, targets)
    assert got.dtype == jnp.float32
    expected = poisoned.class_recall(said, targets.tolist(), 5)
    assert np.isnan(expected[3])
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    counts = np.bincount(targets, minlength=5)
    weighted = np.nansum(np.asarray(got) * counts) / counts.sum()
    np.testing.assert_allclose(weighted, accuracy(outputs, targets), rtol=1e-6)


def test_class_specificity_and_balanced_accuracy_equal_loops():
    outputs, said, targets = predictions()
    got = jax.jit(class_specificity)(outputs, targets)
    for c in range(5):
        others = [p for p, y in zip(said, targets.tolist()) if y != c]
        assert float(got[c]) == pytest.approx(sum(p != c for p in others) / len(others))
    recalls = poisoned.class_recall(said, targets.tolist(), 5)
    expected = np.mean([r for r in recalls if r == r])
    np.testing.assert_allclose(
        jax.jit(balanced_accuracy)(outputs, targets), expected, rtol=1e-6
    )


def multilabel(seed=3):
    """Outputs and labels ``[200, 4]``; nobody has label 2."""
    rng = np.random.default_rng(seed)
    outputs = rng.normal(size=(200, 4)).astype(np.float32)
    targets = (rng.random((200, 4)) < [0.5, 0.1, 0.0, 0.9]).astype(np.int32)
    return jnp.asarray(outputs), jnp.asarray(targets)


def test_metrics_of_several_labels_equal_loops():
    outputs, targets = multilabel()
    said, truth = np.asarray(outputs) > 0, np.asarray(targets) == 1
    recalls, specificities = [], []
    for label in range(4):
        pairs = list(zip(said[:, label], truth[:, label]))
        yes = [p for p, y in pairs if y]
        no = [p for p, y in pairs if not y]
        recalls.append(sum(yes) / len(yes) if yes else np.nan)
        specificities.append(sum(not p for p in no) / len(no))
    np.testing.assert_allclose(jax.jit(class_recall)(outputs, targets), recalls, 1e-6)
    np.testing.assert_allclose(
        jax.jit(class_specificity)(outputs, targets), specificities, 1e-6
    )
    both = [(r + s) / 2 for r, s in zip(recalls, specificities) if r == r]
    np.testing.assert_allclose(
        balanced_accuracy(outputs, targets), np.mean(both), rtol=1e-6
    )
    right = [np.mean([p == y for p, y in zip(*row)]) for row in zip(said, truth)]
    np.testing.assert_allclose(jax.jit(correct)(outputs, targets), right, rtol=1e-6)
    np.testing.assert_allclose(accuracy(outputs, targets), np.mean(right), rtol=1e-6)
    wanted, counts = jnp.full(200, 1), targets[:, 1] == 0
    hits = [said[i, 1] for i in range(200) if not truth[i, 1]]
    got = attack_success(outputs, wanted, counts, multilabel=True)
    np.testing.assert_allclose(got, np.mean(hits), rtol=1e-6)


def area(scores, positive):
    """Over all pairs of one of each kind: ranked rightly 1, equal 1/2."""
    found = [
        (a > b) + (a == b) / 2
        for a in scores[positive]
        for b in scores[np.logical_not(positive)]
    ]
    return np.mean(found) if found else np.nan


@pytest.mark.parametrize("decimals", [6, 0])  # 0: most scores tie
def test_auc_of_several_labels_equals_all_pairs(decimals):
    outputs, targets = multilabel()
    outputs = jnp.round(outputs, decimals)
    columns = zip(np.asarray(outputs).T, np.asarray(targets).T)
    each = [area(scores, labels == 1) for scores, labels in columns]
    np.testing.assert_allclose(
        jax.jit(auc)(outputs, targets), np.nanmean(each), rtol=1e-5
    )


@pytest.mark.parametrize(("classes", "scale"), [(2, 30), (5, 30), (3, 300), (5, 3000)])
def test_auc_of_classes_ranks_by_log_odds(classes, scale):
    rng = np.random.default_rng(4)
    # Confident outputs: probabilities of 1 - 1e-30, or nearer, must not tie.
    outputs = rng.normal(scale=scale, size=(120, classes)).astype(np.float32)
    targets = rng.integers(0, classes, 120)
    outputs[np.arange(120), targets] += 20
    wide = outputs.astype(np.float64)
    each = []
    for c in range(classes):
        rest = np.delete(wide, c, axis=1)
        odds = wide[:, c] - np.logaddexp.reduce(rest, axis=1)
        each.append(area(odds, targets == c))
    got = jax.jit(auc)(jnp.asarray(outputs), jnp.asarray(targets))
    np.testing.assert_allclose(got, np.mean(each), rtol=1e-5)
    if classes == 2:
        np.testing.assert_allclose(each[0], each[1])


def test_auc_is_unknown_without_both_kinds_or_with_a_nan():
    outputs = jnp.array([[0.0, 1.0], [1.0, 0.0]])
    assert np.isnan(auc(outputs, jnp.array([1, 1])))
    assert float(auc(outputs, jnp.array([1, 0]))) == 1.0
    assert np.isnan(auc(outputs.at[0, 0].set(jnp.nan), jnp.array([1, 0])))


def test_attack_success_equals_a_loop():
    outputs, said, wanted = predictions(1)
    counts = jnp.asarray(np.random.default_rng(2).random(200) < 0.3)
    got = jax.jit(attack_success)(outputs, wanted, counts)
    assert (got.dtype, got.shape) == (jnp.float32, ())
    expected = poisoned.success(said, wanted.tolist(), counts.tolist())
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert np.isnan(attack_success(outputs, wanted, jnp.zeros(200, bool)))


@pytest.mark.parametrize("shape", [(4, 1), (3,)])
def test_class_metrics_refuse_shapes_that_would_broadcast(shape):
    outputs, targets = jnp.zeros((4, 3)), jnp.zeros(shape, jnp.int32)
    with pytest.raises(ValueError, match="class_recall needs outputs"):
        class_recall(outputs, targets)
    with pytest.raises(ValueError, match="attack_success needs outputs"):
        attack_success(outputs, targets, targets > 0)


def test_worst_case_equals_a_loop():
    rng = np.random.default_rng(0)
    found = {name: rng.integers(0, 6, (3, 40)) / 5 for name in ("b", "none", "a")}
    found["none"][1, :5] = np.nan
    worst = worst_case(found)
    assert worst.accuracy.shape == worst.attack.shape == (3, 40)
    for index in np.ndindex(3, 40):
        if np.isnan(found["none"][index]):
            assert np.isnan(worst.accuracy[index])
            assert worst.attack[index] == ""
            continue
        lowest, whose = 2.0, None
        for name, values in found.items():  # the first of those that tie
            if values[index] < lowest:
                lowest, whose = values[index], name
        assert (worst.accuracy[index], worst.attack[index]) == (lowest, whose)


def test_worst_case_of_single_numbers():
    worst = worst_case({"sign_flip": 0.5, "alie": jnp.float32(0.25)})
    assert (float(worst.accuracy), str(worst.attack)) == (0.25, "alie")


def test_worst_case_refuses_what_cannot_be_compared():
    with pytest.raises(ValueError, match="one attack at least"):
        worst_case({})
    with pytest.raises(ValueError, match=r"one shape; got .*'b': \(3,\)"):
        worst_case({"a": [0.5, 0.5], "b": [0.5] * 3})


def make_rounds():
    """Random rounds ``[50, 8]``; the first ones without Byzantine, honest or anyone."""
    rng = np.random.default_rng(1)
    flagged, byzantine, present = rng.random((3, 50, 8)) < [[[0.4]], [[0.3]], [[0.7]]]
    byzantine[0], byzantine[1], present[2] = False, True, False
    return flagged, byzantine, present


@pytest.mark.parametrize("everybody", [False, True])
def test_detection_equals_a_loop(everybody):
    flagged, byzantine, present = make_rounds()
    if everybody:
        present = np.ones_like(present)
        found = jax.jit(jax.vmap(detection))(flagged, byzantine)
    else:
        found = jax.jit(jax.vmap(detection))(flagged, byzantine, present)
    for i in range(len(flagged)):
        expected = reference.detection(flagged[i], byzantine[i], present[i])
        assert set(expected) == set(Detection._fields)
        for name, value in expected.items():
            np.testing.assert_allclose(getattr(found, name)[i], value, rtol=1e-6)


def test_detection_types():
    found = detection(jnp.array([True, False]), jnp.array([True, False]))
    counts, rates = found[:4], found[4:]
    assert all(x.dtype == jnp.int32 and x.shape == () for x in counts)
    assert all(x.dtype == jnp.float32 and x.shape == () for x in rates)


def test_undefined_rates_are_nan():
    flagged = jnp.array([True, False])
    clean = detection(flagged, jnp.zeros(2, bool))
    assert np.isnan(clean.tpr)
    assert np.isnan(clean.fnr)
    assert float(clean.fpr) == 0.5
    attackers_only = detection(flagged, jnp.ones(2, bool))
    assert float(attackers_only.tpr) == float(attackers_only.fnr) == 0.5
    assert np.isnan(attackers_only.fpr)


def test_detection_inside_a_scan():
    flagged, byzantine, present = map(jnp.asarray, make_rounds())

    def one_round(_, rows):
        return None, detection(*rows)

    _, scanned = jax.lax.scan(one_round, None, (flagged, byzantine, present))
    mapped = jax.vmap(detection)(flagged, byzantine, present)
    jax.tree.map(np.testing.assert_array_equal, scanned, mapped)
