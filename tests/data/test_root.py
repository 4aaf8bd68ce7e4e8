"""The root dataset is drawn as FLTrust draws it."""

import numpy as np
import pytest

from fedjax_sim.data.root import draw_root

TARGETS = np.repeat(np.arange(10), 500)


def draw(seed=0, **options):
    return draw_root(np.random.default_rng(seed), TARGETS, **options)


def test_without_bias_every_sample_is_equally_likely():
    counts = sum(
        np.bincount(TARGETS[draw(seed, size=100)], minlength=10) for seed in range(50)
    )
    assert ((counts - 500) ** 2 / 500).sum() < 9 + 5 * np.sqrt(18)


@pytest.mark.parametrize("bias", [0.0, 0.1, 0.35, 1.0])
def test_bias_is_the_share_of_one_class_and_the_others_are_alike(bias):
    counts = np.zeros(10)
    for seed in range(50):
        rows = draw(seed, size=100, bias=bias, biased_class=3)
        assert len(np.unique(rows)) == 100
        histogram = np.bincount(TARGETS[rows], minlength=10)
        assert histogram[3] == round(100 * bias)
        counts += histogram
    others = np.delete(counts, 3)
    mean = 50 * 100 * (1 - bias) / 9
    assert ((others - mean) ** 2).sum() <= mean * (8 + 5 * np.sqrt(16))


def test_rows_are_in_random_order():
    rows = draw(size=100, bias=0.5, biased_class=0)
    first = (TARGETS[rows] == 0)[:50].sum()
    assert 10 < first < 40


def test_size_zero_gives_none():
    assert draw(size=0).shape == (0,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": -1}, "root_size must be an integer of at least 0; got -1"),
        ({"size": 5000}, "root_size=5000 of 5000 samples"),
        ({"size": 9999}, "must leave training samples for the clients"),
        ({"size": 10, "bias": 1.5}, "root_bias=1.5"),
        ({"size": 10, "bias": np.nan}, "root_bias=nan"),
        (
            {"size": 600, "bias": 1.0},
            "needs 600 samples of class 1 and 0 of the others",
        ),
        ({"size": 4600, "bias": 0.0}, "got 500 and 4500 training samples"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        draw(**options)
