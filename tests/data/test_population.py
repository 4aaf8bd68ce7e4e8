"""Populations: clients that draw their samples from one pool."""

import numpy as np
import pytest

import fedjax_sim as fs


@pytest.fixture(scope="module")
def digits():
    return fs.data.load("digits")


def test_a_client_does_not_depend_on_how_many_there_are(digits):
    few, root = fs.data.populate(digits, 5000, size=(3, 9), alpha=0.3, seed=4)
    many, same_root = fs.data.populate(digits, 9000, size=(3, 9), alpha=0.3, seed=4)
    np.testing.assert_array_equal(few.indices, many.indices[:5000])
    np.testing.assert_array_equal(few.mask, many.mask[:5000])
    np.testing.assert_array_equal(root.inputs, same_root.inputs)
    other, _ = fs.data.populate(digits, 5000, size=(3, 9), alpha=0.3, seed=5)
    assert (np.asarray(few.indices) != np.asarray(other.indices)).mean() > 0.5


def test_many_samples_of_a_client(digits):
    few, _ = fs.data.populate(digits, 2, size=400_000)
    many, _ = fs.data.populate(digits, 4, size=400_000)  # two are drawn at a time
    np.testing.assert_array_equal(few.indices, many.indices[:2])
    assert (np.asarray(many.indices[2]) != np.asarray(many.indices[0])).mean() > 0.9


def test_nothing_is_copied_and_nobody_has_the_root(digits):
    clients, root = fs.data.populate(digits, 50_000, size=8, root_size=200)
    assert clients.inputs.shape == digits.train.inputs.shape
    assert clients.indices.nbytes + clients.mask.nbytes == 50_000 * 8 * 5
    held = np.unique(clients.indices)
    # 400,000 draws of 1,242 samples: every one but the root's.
    assert len(held) == len(digits.train.targets) - 200
    rest = np.setdiff1d(np.arange(len(digits.train.targets)), held)
    np.testing.assert_array_equal(
        np.sort(digits.train.targets[rest]), np.sort(root.targets)
    )


def test_sizes_are_uniform_between_the_two(digits):
    clients, root = fs.data.populate(digits, 20_000, size=(2, 5), root_size=0)
    sizes = np.asarray(clients.sizes())
    assert root is None
    np.testing.assert_allclose(np.bincount(sizes)[2:] / 20_000, 0.25, atol=0.02)
    assert np.asarray(clients.indices)[~np.asarray(clients.mask)].max() == 0


@pytest.mark.parametrize(
    ("alpha", "share"), [(None, 0.225), (1000.0, 0.225), (0.5, 0.413), (1e-6, 1.0)]
)
def test_classes_of_a_client(digits, alpha, share):
    clients, _ = fs.data.populate(digits, 4000, size=20, alpha=alpha)
    classes = np.asarray(digits.train.targets)[np.asarray(clients.indices)]
    counts = np.stack([np.bincount(row, minlength=10) for row in classes])
    # The share of the largest class, whose mean was found by drawing 20,000 clients.
    assert abs(counts.max(axis=1).mean() / 20 - share) < 0.02
    np.testing.assert_allclose(counts.mean(axis=0) / 20, 0.1, atol=0.02)


def test_bad_numbers(digits):
    refused = {
        "alpha must be a finite number in": {"alpha": 0.0},
        "size must be an integer of at least 1; got 0": {"size": 0},
        "the smallest and the largest; got 9 and 3": {"size": (9, 3)},
        "num_clients must be an integer of at least 1": {"num_clients": 0},
        "root_size": {"root_size": len(digits.train.targets)},
        r"alpha must be a finite number in \(0, 1e\+100\)": {"alpha": 1e300},
        r"the smallest and the largest; got \(3,\)": {"size": (3,)},
        "seed must be an integer of at least 0; got -1": {"seed": -1},
    }
    for message, options in refused.items():
        with pytest.raises(ValueError, match=message):
            fs.data.populate(digits, **{"num_clients": 3} | options)
    data = digits._replace(task="multilabel")
    with pytest.raises(ValueError, match="alpha goes by class"):
        fs.data.populate(data, 3, alpha=1.0)
