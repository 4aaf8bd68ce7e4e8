"""The recurrent networks against a loop over steps, and how they begin."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim.models import bilstm
from fedjax_sim.models.recurrent import Autoencoder
from tests.references import fedsecure as reference

L, F, H = 7, 3, 4
X = np.random.default_rng(0).normal(size=(5, L, F)).astype(np.float32)


def randomised(params, seed=1):
    """Other values everywhere: those of a fresh network have many zeros and ones."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: jnp.asarray(rng.normal(size=p.shape) * 0.7, jnp.float32), params
    )


def count(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def test_the_autoencoder_is_the_plain_loop():
    net = Autoencoder(H)
    params = randomised(net.init(jax.random.key(0), X)["params"])
    rebuilt = net.apply({"params": params}, X)
    assert (rebuilt.shape, rebuilt.dtype) == (X.shape, jnp.float32)
    expected = reference.autoencode(X, params)
    np.testing.assert_allclose(rebuilt, expected, rtol=1e-4, atol=1e-5)
    lstm = 4 * H * (F + H + 1)
    assert count(params) == 2 * lstm + 2 * H * F + F


def test_the_classifier_is_the_plain_loop():
    model = bilstm((L, F), num_classes=2, hidden=H)
    params = randomised(model.init(jax.random.key(0)))
    logits = jax.jit(model.apply)(params, X)
    expected = reference.bilstm(X, params)
    assert logits.shape == (5, 2)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    assert model.features is None
    lstm = 4 * H * (F + H + 1)
    assert count(params) == 2 * lstm + 2 * H * 2 + 2


def test_defaults():
    params = jax.eval_shape(bilstm().init, jax.random.key(0))
    assert count(params) == 2 * 64 * (5 + 16 + 1) + 32 * 3 + 3 == 2915
    net = Autoencoder()
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 60, 5)))
    assert count(shapes) == 2 * 256 * (5 + 64 + 1) + 128 * 5 + 5


def test_initialisation():
    params = bilstm((L, F), hidden=H).init(jax.random.key(3))["states"]
    forget = np.repeat([0, 1, 0, 0], H)
    np.testing.assert_array_equal(params["bias"], [forget, forget])
    assert params["kernel"].shape == (2, F + H, 4 * H)
    for kernel in np.asarray(params["kernel"], np.float64):
        own, recurrent = kernel[:F], kernel[F:]
        np.testing.assert_allclose(recurrent @ recurrent.T, np.eye(H), atol=1e-5)
        limit = np.sqrt(6 / (F + 4 * H))
        assert 0.8 * limit < np.abs(own).max() <= limit
    # Each direction has draws of its own.
    assert not np.allclose(params["kernel"][0], params["kernel"][1])


@pytest.mark.parametrize("shape", [(5,), (8, 8, 1)])
def test_inputs_that_are_no_windows(shape):
    with pytest.raises(ValueError, match=r"windows of shape \(steps, features\); got"):
        bilstm(shape)
