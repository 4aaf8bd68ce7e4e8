"""The zoo, the patches convolution against flax's, and the adapters."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fedjax_sim import models
from fedjax_sim.models import Conv, Model, max_pool
from fedjax_sim.models.layers import conv_pool


@pytest.mark.parametrize("padding", ["VALID", "SAME"])
@pytest.mark.parametrize("kernel", [(3, 3), (2, 5), (1, 1)])
def test_conv_equals_flax_in_outputs_and_gradients(padding, kernel):
    x = jax.random.normal(jax.random.key(0), (4, 9, 8, 3))
    target = nn.Conv(6, kernel, padding=padding)
    ours = Conv(6, kernel, padding)
    params = target.init(jax.random.key(1), x)
    # Interchangeable: the same names, shapes and initial values.
    jax.tree.map(np.testing.assert_array_equal, params, ours.init(jax.random.key(1), x))
    params = jax.tree.map(lambda p: p + 0.1, params)

    def loss(module, params, x):
        return jnp.sum(jnp.sin(module.apply(params, x)))

    np.testing.assert_allclose(
        ours.apply(params, x), target.apply(params, x), rtol=1e-5, atol=1e-5
    )
    got = jax.grad(loss, argnums=(1, 2))(ours, params, x)
    want = jax.grad(loss, argnums=(1, 2))(target, params, x)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want
    )


def stacked_reference(features, padding):
    """Flax's own layers: convolution, relu, pooling, once for each entry."""

    class Reference(nn.Module):
        @nn.compact
        def __call__(self, x):
            for count in features:
                x = nn.relu(nn.Conv(count, (3, 3), padding=padding, name=f"{count}")(x))
                x = nn.max_pool(x, (2, 2), (2, 2))
            return x

    return Reference()


def stacked_pooled(features, padding, spare):
    """The same of this library's, with or without spare channels in between."""

    class Ours(nn.Module):
        @nn.compact
        def __call__(self, x):
            known = None
            for place, count in enumerate(features):
                more = spare and place < len(features) - 1
                options = {"pool": True, "in_features": known, "spare": more}
                x = Conv(count, (3, 3), padding, name=f"{count}", **options)(x)
                known = count
            return x

    return Ours()


@pytest.mark.parametrize("spare", [False, True])
@pytest.mark.parametrize(
    ("size", "padding"), [((9, 12), "SAME"), ((18, 15), "VALID"), ((17, 16), "VALID")]
)
def test_pooled_conv_equals_conv_relu_max_pool(size, padding, spare):
    # A kernel with more rows than outputs, then one with fewer: both products.
    features = (30, 7)
    x = jax.random.normal(jax.random.key(0), (4, *size, 3))
    reference = stacked_reference(features, padding)
    ours = stacked_pooled(features, padding, spare)
    params = reference.init(jax.random.key(1), x)
    jax.tree.map(np.testing.assert_array_equal, params, ours.init(jax.random.key(1), x))
    params = jax.tree.map(lambda p: p + 0.05, params)

    def loss(module, params, x):
        return jnp.sum(jnp.sin(module.apply(params, x)))

    np.testing.assert_allclose(
        ours.apply(params, x), reference.apply(params, x), rtol=1e-5, atol=1e-5
    )
    got = jax.grad(loss, argnums=(1, 2))(ours, params, x)
    want = jax.grad(loss, argnums=(1, 2))(reference, params, x)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want
    )


def test_spare_channels_are_zeros_to_the_next_sixteen():
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 3))
    module = Conv(30, pool=True, spare=True)
    params = module.init(jax.random.key(1), x)
    out = module.apply(params, x)
    assert out.shape == (2, 2, 2, 32)
    np.testing.assert_array_equal(out[..., 30:], 0.0)
    assert params["params"]["kernel"].shape == (3, 3, 3, 30)


def test_pooled_conv_shares_the_gradient_of_ties():
    # Four equal values: each has a quarter, and the sum is that of one.
    x = jnp.ones((1, 4, 4, 1))
    got = jax.grad(lambda x: conv_pool(x, jnp.ones((3, 3, 1, 1)), jnp.ones(1)).sum())(x)
    np.testing.assert_allclose(got[0, :, :, 0].sum(), 9.0)
    np.testing.assert_allclose(got[0, 0, 0, 0], 0.25)
    np.testing.assert_allclose(got[0, 1, 1, 0], 1.0)


def test_max_pool_drops_an_odd_edge_like_flax():
    x = jax.random.normal(jax.random.key(0), (2, 5, 7, 3))
    np.testing.assert_array_equal(max_pool(x), nn.max_pool(x, (2, 2), (2, 2)))


@pytest.mark.parametrize("name", sorted(models.MODELS))
def test_zoo_scales_uint8_and_has_no_convolution_in_its_program(name):
    model = models.MODELS[name](input_shape=(12, 12, 1), num_classes=7)
    params = model.init(jax.random.key(0))
    image = jnp.arange(2 * 144, dtype=jnp.int32).reshape(2, 12, 12, 1) % 256
    raw = model.apply(params, image.astype(jnp.uint8))
    assert raw.shape == (2, 7)
    np.testing.assert_allclose(
        raw, model.apply(params, image.astype(jnp.float32) / 255), rtol=1e-5, atol=1e-6
    )
    program = jax.make_jaxpr(jax.grad(lambda p: model.apply(p, image / 255).sum()))
    assert "conv_general_dilated" not in str(program(params))


def test_cross_entropy_by_hand():
    got = models.softmax_cross_entropy(jnp.array([[0.0, 0.0]]), jnp.array([1]))
    np.testing.assert_allclose(got, [np.log(2)], rtol=1e-6)


@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 28), (784,)])
def test_cnn_refuses_images_it_cannot_convolve(shape):
    with pytest.raises(ValueError, match=r"at least 10 by 10.*digits_cnn"):
        models.cnn(input_shape=shape)


def test_linen_and_nnx_adapters_give_the_same_network():
    linen = Model.from_linen(nn.Dense(3), input_shape=(4,))
    other = Model.from_nnx(lambda rngs: nnx.Linear(4, 3, rngs=rngs))
    x = jax.random.normal(jax.random.key(0), (5, 4))
    params = linen.init(jax.random.key(1))
    assert jax.tree.structure(other.init(jax.random.key(1))) == jax.tree.structure(
        params
    )
    np.testing.assert_allclose(
        other.apply(params, x), linen.apply(params, x), rtol=1e-6
    )
    one, two = other.init(jax.random.key(1)), other.init(jax.random.key(2))
    assert not np.allclose(one["kernel"], two["kernel"])


class _LinenWith(nn.Module):
    layer: str

    @nn.compact
    def __call__(self, x):
        if self.layer == "dropout":
            return nn.Dropout(0.5, deterministic=True)(nn.Dense(2)(x))
        if self.layer == "batch_norm":
            return nn.BatchNorm(use_running_average=False)(nn.Dense(2)(x))
        self.variable("cache", "seen", lambda: jnp.zeros(()))
        return nn.Dense(2)(x)


class _NnxWith(nnx.Module):
    def __init__(self, layer, rngs):
        self.dense = nnx.Linear(4, 2, rngs=rngs)
        if layer == "dropout":
            self.extra = nnx.Dropout(0.5, rngs=rngs)
        elif layer == "batch_norm":
            self.extra = nnx.BatchNorm(2, rngs=rngs)
        else:
            self.extra = nnx.Cache(jnp.zeros(()))

    def __call__(self, x):
        return self.dense(x)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [("dropout", "Dropout"), ("batch_norm", "GroupNorm"), ("cache", "lost between")],
)
def test_adapters_refuse_what_is_not_a_parameter(layer, reason):
    with pytest.raises(ValueError, match=reason):
        Model.from_linen(_LinenWith(layer), input_shape=(4,))
    with pytest.raises(ValueError, match=reason):
        Model.from_nnx(lambda rngs: _NnxWith(layer, rngs))
