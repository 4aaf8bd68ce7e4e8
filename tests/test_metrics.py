"""Accuracy and detection against plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim.metrics import Detection, accuracy, detection
from tests.references import attacks as reference


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
