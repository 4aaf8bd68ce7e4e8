"""The embedded table: what it holds, and how it is split."""

import numpy as np

from fedjax_sim.data import load


def test_breast_cancer_is_standardised_by_its_training_part():
    data = load("breast_cancer")
    assert data.train.inputs.shape == (456, 30)
    assert data.test.inputs.shape == (113, 30)
    assert (data.train.inputs.dtype, data.train.targets.dtype) == (np.float32, np.int32)
    assert np.bincount(data.train.targets).tolist() == [286, 170]
    assert np.bincount(data.test.targets).tolist() == [71, 42]
    np.testing.assert_allclose(data.train.inputs.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(data.train.inputs.std(axis=0), 1, rtol=1e-5)
    assert np.abs(data.test.inputs.mean(axis=0)).max() > 1e-3
    rows = {row.tobytes() for row in data.train.inputs}
    assert not rows & {row.tobytes() for row in data.test.inputs}


def test_malignant_is_the_positive_class():
    """Malignant nuclei are larger: feature 0 is the mean radius."""
    data = load("breast_cancer")
    assert data.class_names == ("benign", "malignant")
    radius, malignant = data.train.inputs[:, 0], data.train.targets == 1
    assert radius[malignant].mean() > 0.5 > -0.3 > radius[~malignant].mean()
