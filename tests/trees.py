"""Trees of arrays side by side; PRNG keys are compared by their bits."""

import jax
import numpy as np

from fedjax_sim.sharding import is_key


def assert_equal(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(*_raw(x, y)), a, b)


def assert_close(a, b, **tolerance):
    tolerance = {"rtol": 2e-5, "atol": 1e-6, **tolerance}

    def near(x, y):
        np.testing.assert_allclose(*_raw(x, y), **tolerance)

    jax.tree.map(near, a, b)


def _raw(x, y):
    if hasattr(x, "dtype") and is_key(x):
        return jax.random.key_data(x), jax.random.key_data(y)
    return x, y
