"""The zoo, the patches convolution against flax's, and the adapters."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fedjax_sim import models
from fedjax_sim.models import Conv, Model, max_pool
from fedjax_sim.models.layers import conv_pool


def outputs_and_gradients(module, params, x):
    """What a module makes of ``x``, and gradients of a loss in params and ``x``."""

    def loss(params, x):
        outputs = module.apply(params, x)
        return jnp.sum(jnp.sin(outputs)), outputs

    gradients, outputs = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)
    return outputs, gradients


def assert_same(got, want):
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        got[1],
        want[1],
    )


@pytest.mark.parametrize(
    ("kernel", "padding", "more"),
    [
        ((3, 3), "VALID", {}),
        ((3, 3), "SAME", {}),
        ((2, 5), "VALID", {}),
        ((2, 5), "SAME", {}),
        ((1, 1), "SAME", {}),
        ((3, 3), "SAME", {"strides": (2, 2), "use_bias": False}),
        ((1, 1), "SAME", {"strides": (2, 2), "use_bias": False}),
        ((2, 5), "VALID", {"strides": (3, 2)}),
        ((4, 2), "SAME", {"strides": (2, 3)}),
    ],
)
def test_conv_equals_flax_in_outputs_and_gradients(kernel, padding, more):
    x = jax.random.normal(jax.random.key(0), (4, 9, 8, 3))
    target = nn.Conv(6, kernel, padding=padding, **more)
    ours = Conv(6, kernel, padding, **more)
    params = target.init(jax.random.key(1), x)
    # Interchangeable: the same names, shapes and initial values.
    jax.tree.map(np.testing.assert_array_equal, params, ours.init(jax.random.key(1), x))
    params = jax.tree.map(lambda p: p + 0.1, params)
    assert_same(
        outputs_and_gradients(ours, params, x), outputs_and_gradients(target, params, x)
    )


def test_conv_refuses_strides_where_it_pools():
    module = Conv(2, pool=True, strides=(2, 2))
    with pytest.raises(ValueError, match=r"strides \(1, 1\); got \(2, 2\)"):
        module.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))


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


@pytest.mark.parametrize(
    ("size", "padding"), [((9, 12), "SAME"), ((18, 15), "VALID"), ((17, 16), "VALID")]
)
def test_pooled_conv_equals_conv_relu_max_pool(size, padding):
    # A kernel with more rows than outputs, then one with fewer: both products.
    features = (30, 7)
    x = jax.random.normal(jax.random.key(0), (4, *size, 3))
    reference = stacked_reference(features, padding)
    initial = reference.init(jax.random.key(1), x)
    params = jax.tree.map(lambda p: p + 0.05, initial)
    want = outputs_and_gradients(reference, params, x)
    for spare in (False, True):
        ours = stacked_pooled(features, padding, spare)
        same = ours.init(jax.random.key(1), x)
        jax.tree.map(np.testing.assert_array_equal, initial, same)
        assert_same(outputs_and_gradients(ours, params, x), want)


def test_spare_channels_are_zeros_to_the_next_sixteen():
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 3))
    module = Conv(30, pool=True, spare=True)
    params = module.init(jax.random.key(1), x)
    out = jax.jit(module.apply)(params, x)
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
    params = jax.eval_shape(model.init, jax.random.key(0))
    image = jax.ShapeDtypeStruct((2, 12, 12, 1), jnp.uint8)

    def scaled(function):
        return lambda params, x: function(params, x.astype(jnp.float32) / 255)

    for function in (model.apply, model.features):
        program = str(jax.make_jaxpr(function)(params, image))
        assert program == str(jax.make_jaxpr(scaled(function))(params, image))
    assert jax.eval_shape(model.apply, params, image).shape == (2, 7)
    backward = jax.make_jaxpr(jax.grad(lambda p, x: model.apply(p, x).sum()))
    assert "conv_general_dilated" not in str(backward(params, image))


# References in plain NumPy, from the definitions.


def conv_reference(x, kernel, stride=1, same=False):
    """A convolution by its definition; "same" as many windows as strides fit."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    height, width = kernel.shape[:2]
    if same:
        out = [-(-size // stride) for size in x.shape[1:3]]
        total = [
            max((n - 1) * stride + k - size, 0)
            for n, k, size in zip(out, (height, width), x.shape[1:3])
        ]
        pads = [(t // 2, t - t // 2) for t in total]
        x = np.pad(x, [(0, 0), *pads, (0, 0)])
    rows = (x.shape[1] - height) // stride + 1
    columns = (x.shape[2] - width) // stride + 1
    y = np.zeros((len(x), rows, columns, kernel.shape[-1]))
    for i in range(rows):
        for j in range(columns):
            top, left = i * stride, j * stride
            window = x[:, top : top + height, left : left + width]
            y[:, i, j] = np.einsum("bhwc,hwcf->bf", window, kernel)
    return y


def pool_reference(x):
    rows, columns = x.shape[1] // 2, x.shape[2] // 2
    y = np.zeros((len(x), rows, columns, x.shape[3]))
    for i in range(rows):
        for j in range(columns):
            y[:, i, j] = x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].max(axis=(1, 2))
    return y


def group_norm_reference(x, scale, bias, groups):
    size = x.shape[-1] // groups
    y = np.zeros_like(x)
    for one in range(len(x)):
        for g in range(groups):
            part = x[one, :, :, g * size : (g + 1) * size]
            y[one, :, :, g * size : (g + 1) * size] = (part - part.mean()) / np.sqrt(
                part.var() + 1e-5
            )
    return y * scale + bias


def relu(x):
    return np.maximum(x, 0)


def conv_norm_reference(x, params, stride=1):
    norm = params["GroupNorm_0"]
    x = conv_reference(x, params["Conv_0"]["kernel"], stride, same=True)
    return group_norm_reference(x, norm["scale"], norm["bias"], groups=2)


def resnet_reference(x, params):
    """(outputs, features) of ResNet-18 as drawn in He et al., with GroupNorm."""
    x = relu(conv_norm_reference(x, params["stem"]))
    features = x.reshape(len(x), -1)
    for index, stride in enumerate([1, 1, 2, 1, 2, 1, 2, 1]):
        block = params[f"_Block_{index}"]
        y = relu(conv_norm_reference(x, block["_ConvNorm_0"], stride))
        y = conv_norm_reference(y, block["_ConvNorm_1"])
        if "shortcut" in block:
            x = conv_norm_reference(x, block["shortcut"], stride)
        x = relu(x + y)
    dense = params["Dense_0"]
    return x.mean(axis=(1, 2)) @ dense["kernel"] + dense["bias"], features


def random_params(model, seed=0):
    """Parameters in which every bias and scale counts."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(
        lambda leaf: rng.normal(0.2, 0.4, leaf.shape).astype(np.float32), shapes
    )


def apply_and_features(model, params, inputs):
    """Both in one program, compiled."""
    both = jax.jit(lambda p, x: (model.apply(p, x), model.features(p, x)))
    return both(params, inputs)


@pytest.mark.parametrize(
    ("name", "size"),
    [("cnn", 5 * 5 * 30), ("digits_cnn", 6 * 6 * 8), ("leaf_cnn", 6 * 6 * 32)],
)
def test_pooled_networks_and_their_features_by_definition(name, size):
    model = models.MODELS[name](input_shape=(12, 13, 2), num_classes=3)
    params = random_params(model)
    x = np.random.default_rng(1).integers(0, 256, (3, 12, 13, 2)).astype(np.uint8)

    def block(x, layer):
        y = conv_reference(x, layer["kernel"], same=name != "cnn")
        return pool_reference(relu(y + layer["bias"]))

    first = block(x / 255, params["Conv_0"])
    want = block(first, params["Conv_1"]).reshape(3, -1)
    head = params["head"]
    for place in range(len(head)):
        layer = head[f"Dense_{place}"]
        want = (relu(want) if place else want) @ layer["kernel"] + layer["bias"]
    outputs, features = apply_and_features(model, params, x)
    np.testing.assert_allclose(outputs, want, rtol=1e-4, atol=1e-3)
    assert features.shape == (3, size)
    np.testing.assert_allclose(features, first.reshape(3, -1), rtol=1e-4, atol=1e-5)


def test_leaf_cnn_has_the_layers_of_leafs():
    model = models.leaf_cnn()
    params, image = given(model)
    shapes = {
        "Conv_0": ((5, 5, 1, 32), (32,)),
        "Conv_1": ((5, 5, 32, 64), (64,)),
        "Dense_0": ((7 * 7 * 64, 2048), (2048,)),
        "Dense_1": ((2048, 62), (62,)),
    }
    layers = {"Conv_0": params["Conv_0"], "Conv_1": params["Conv_1"], **params["head"]}
    assert shapes == {
        name: (layer["kernel"].shape, layer["bias"].shape)
        for name, layer in layers.items()
    }
    assert jax.eval_shape(model.apply, params, image).shape == (1, 62)
    assert jax.eval_shape(model.features, params, image).shape == (1, 14 * 14 * 32)
    with pytest.raises(ValueError, match=r"at least 4 by 4.*mlp"):
        models.leaf_cnn(input_shape=(3, 28, 1))


def test_small_cnn_and_its_features_by_definition():
    model = models.small_cnn(input_shape=(9, 8, 2), num_classes=3)
    params = random_params(model)
    x = np.random.default_rng(1).normal(size=(3, 9, 8, 2)).astype(np.float32)
    one, two, dense = params["Conv_0"], params["Conv_1"], params["Dense_0"]
    first = relu(conv_reference(x, one["kernel"]) + one["bias"])
    second = relu(conv_reference(first, two["kernel"]) + two["bias"])
    want = pool_reference(second).reshape(3, -1) @ dense["kernel"] + dense["bias"]
    outputs, features = apply_and_features(model, params, x)
    np.testing.assert_allclose(outputs, want, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(features, first.reshape(3, -1), rtol=1e-4, atol=1e-5)
    paper = models.small_cnn()
    assert jax.eval_shape(paper.features, *given(paper)).shape == (1, 26 * 26 * 8)


def given(model, shape=(28, 28, 1)):
    """Shapes of parameters and of one input."""
    params = jax.eval_shape(model.init, jax.random.key(0))
    return params, jax.ShapeDtypeStruct((1, *shape), jnp.float32)


def test_features_of_mlp_are_the_first_hidden_layer_after_relu():
    model = models.mlp((4,), hidden=(5, 6))
    params = random_params(model)
    x = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)
    first = params["Dense_0"]
    np.testing.assert_allclose(
        model.features(params, x),
        relu(x @ first["kernel"] + first["bias"]),
        rtol=1e-5,
        atol=1e-6,
    )
    assert models.mlp((4,), hidden=()).features is None


def test_resnet18_by_definition_with_its_gradient():
    model = models.resnet18((9, 8, 1), num_classes=3, width=4)
    params = random_params(model)
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (2, 9, 8, 1)).astype(np.uint8)
    mix = rng.normal(size=(2, 3))
    way = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), params)

    # Half the time is saved by not optimising, and only values matter here.
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def found(params, image):
        def loss(params):
            outputs = model.apply(params, image)
            return jnp.sum(outputs * mix.astype(np.float32)), outputs

        gradient, outputs = jax.grad(loss, has_aux=True)(params)
        return outputs, gradient, model.features(params, image)

    def loss(step):
        moved = jax.tree.map(lambda leaf, v: leaf + step * v, params, way)
        return np.sum(resnet_reference(image / 255, moved)[0] * mix)

    outputs, gradient, features = found(params, image)
    want, shallow = resnet_reference(image / 255, params)
    np.testing.assert_allclose(outputs, want, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(features, shallow, rtol=1e-4, atol=1e-4)
    slope = sum(
        np.sum(np.asarray(g, np.float64) * v)
        for g, v in zip(jax.tree.leaves(gradient), jax.tree.leaves(way))
    )
    np.testing.assert_allclose(slope, (loss(1e-6) - loss(-1e-6)) / 2e-6, rtol=1e-2)


def test_resnet18_has_the_parameters_of_medmnists():
    model = models.resnet18()
    params, image = given(model)
    # A kernel of k x k from a to b channels, and the norm's scale and bias.
    sizes = [9 * 1 * 64 + 2 * 64]
    before = 64
    for after in (64, 128, 256, 512):
        sizes += [9 * before * after + 2 * after] + 3 * [9 * after**2 + 2 * after]
        sizes += [before * after + 2 * after] if before != after else []
        before = after
    sizes += [512 * 10 + 10]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == sum(sizes)
    assert jax.eval_shape(model.apply, params, image).shape == (1, 10)
    assert jax.eval_shape(model.features, params, image).shape == (1, 28 * 28 * 64)


def test_resnet18_refuses_what_it_cannot_halve():
    with pytest.raises(ValueError, match=r"at least 8 by 8.*mlp"):
        models.resnet18(input_shape=(7, 28, 1))
    with pytest.raises(ValueError, match=r"must be even.*got 5"):
        models.resnet18(width=5)


def test_sigmoid_cross_entropy_by_definition():
    rng = np.random.default_rng(0)
    outputs = rng.normal(0, 3, (5, 4)).astype(np.float32)
    targets = rng.integers(0, 2, (5, 4))
    want = np.zeros(5)
    for i in range(5):
        for label in range(4):
            p = 1 / (1 + np.exp(-float(outputs[i, label])))
            want[i] -= np.log(p if targets[i, label] else 1 - p) / 4
    for kind in (np.int32, np.uint8, np.float32):
        got = models.sigmoid_cross_entropy(jnp.array(outputs), targets.astype(kind))
        np.testing.assert_allclose(got, want, rtol=1e-5)
    # Sure and wrong by far: linear in the logit, not infinite.
    far = models.sigmoid_cross_entropy(jnp.array([[200.0, 0.0]]), jnp.array([[0, 1]]))
    np.testing.assert_allclose(far, [(200 + np.log(2)) / 2], rtol=1e-6)


def test_for_task_changes_the_loss_and_nothing_else():
    model = models.mlp((4,), num_classes=3)
    several = models.for_task(model, "multilabel")
    assert several.loss is models.sigmoid_cross_entropy
    assert several._replace(loss=model.loss) == model
    assert models.for_task(several, "classification") == model
    with pytest.raises(ValueError, match=r"'multi-label'.*Did you mean 'multilabel'"):
        models.for_task(model, "multi-label")


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


class _Inner(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.tanh(nn.Dense(4)(x))


class _Nested(nn.Module):
    """A layer, one within another module, and one that is called twice."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6, name="wide")(x)
        x = _Inner(name="inner")(x)
        twice = nn.Dense(4, name="twice")
        return twice(twice(x))


def test_linen_features_are_the_output_of_a_submodule():
    x = np.random.default_rng(0).normal(size=(5, 2, 3)).astype(np.float32)
    plain = Model.from_linen(_Nested(), (2, 3))
    initial = plain.init(jax.random.key(0))
    params = jax.tree.map(np.asarray, initial)
    assert plain.features is None

    def model(name):
        return Model.from_linen(_Nested(), (2, 3), features=name)

    def dense(x, layer):
        return x @ layer["kernel"] + layer["bias"]

    wide = dense(x, params["wide"])
    deep = dense(wide, params["inner"]["Dense_0"])
    want = {
        "wide": wide,
        "inner": np.tanh(deep),
        "inner/Dense_0": deep,
        "twice": dense(np.tanh(deep), params["twice"]),
    }
    for name, value in want.items():
        got = model(name)
        jax.tree.map(
            np.testing.assert_array_equal, got.init(jax.random.key(0)), initial
        )
        np.testing.assert_array_equal(got.apply(params, x), plain.apply(params, x))
        for features in (got.features, jax.jit(got.features)):
            np.testing.assert_allclose(
                features(params, x), value.reshape(5, -1), rtol=1e-5, atol=1e-6
            )
    over_clients = jax.vmap(model("wide").features, (None, 0))(params, x[:, None])
    np.testing.assert_allclose(
        over_clients, wide.reshape(5, 1, -1), rtol=1e-5, atol=1e-6
    )
    with pytest.raises(ValueError, match="unknown submodule of linen module _Nested"):
        model("narrow")
    with pytest.raises(ValueError, match=r"Valid: inner, inner/Dense_0, twice, wide"):
        model("Dense_0")


def test_compiled_features_leave_out_what_comes_after_them():
    model = models.mlp((4,), hidden=(8, 2000))
    params, inputs = given(model, (4,))

    def flops(function):
        compiled = jax.jit(function).lower(params, inputs).compile()
        return compiled.cost_analysis()["flops"]

    assert flops(model.features) < flops(model.apply) / 100


def test_nnx_features_are_what_a_function_of_the_module_gives():
    def build(rngs):
        return nnx.Sequential(nnx.Linear(4, 3, rngs=rngs), nnx.Linear(3, 2, rngs=rngs))

    def first(net, x):
        return nnx.relu(net.layers[0](x)).reshape(-1, 3, 1)

    model = Model.from_nnx(build, features=first)
    params = jax.tree.map(np.asarray, model.init(jax.random.key(0)))
    x = np.random.default_rng(0).integers(0, 256, (5, 4)).astype(np.uint8)
    layer = params["layers"][0]
    want = relu(x / 255 @ layer["kernel"] + layer["bias"])
    for features in (model.features, jax.jit(model.features)):
        np.testing.assert_allclose(features(params, x), want, rtol=1e-5, atol=1e-6)
    assert Model.from_nnx(build).features is None


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
