"""The built-in models, as flax linen modules behind one factory each."""

from collections.abc import Callable

import flax.linen as nn

from fedjax_sim.models.layers import LANES, Conv, check_images, worth_spare
from fedjax_sim.models.model import Model
from fedjax_sim.models.resnet import resnet18
from fedjax_sim.types import Array


class _CNN(nn.Module):
    channels: tuple[int, ...]
    hidden: tuple[int, ...]
    num_classes: int
    padding: str
    kernel_size: tuple[int, int] = (3, 3)

    @nn.compact
    def __call__(self, x: Array) -> Array:
        in_features = None
        for layer, features in enumerate(self.channels):
            spare = layer < len(self.channels) - 1 and worth_spare(features)
            x = Conv(
                features,
                self.kernel_size,
                self.padding,
                pool=True,
                in_features=in_features,
                spare=spare,
            )(x)
            in_features = features
        return _MLP(self.hidden, self.num_classes, name="head")(x)


class _SmallCNN(nn.Module):
    channels: tuple[int, int]
    num_classes: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.relu(Conv(self.channels[0])(x))
        x = Conv(self.channels[1], pool=True)(x)
        return nn.Dense(self.num_classes)(x.reshape(x.shape[0], -1))


class _MLP(nn.Module):
    hidden: tuple[int, ...]
    num_classes: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = x.reshape(x.shape[0], -1)
        for features in self.hidden:
            x = nn.relu(nn.Dense(features)(x))
        return nn.Dense(self.num_classes)(x)


def cnn(input_shape: tuple[int, ...] = (28, 28, 1), num_classes: int = 10) -> Model:
    """FLTrust's MNIST network: conv 30@3x3, pool, conv 50@3x3, pool, dense 100 and L.

    139,960 parameters for 28x28x1 images and ten classes. Pixels are divided by 255.
    Features: the first convolution after pooling and relu (13*13*30).

    Args:
        input_shape: (height, width, channels), at least 10 by 10.
        num_classes: L.

    Raises:
        ValueError: images too small for two valid convolutions with pooling.

    Example:
        >>> import jax
        >>> params = jax.eval_shape(cnn().init, jax.random.key(0))
        >>> sum(leaf.size for leaf in jax.tree.leaves(params))
        139960

    References:
        Cao, Fang, Liu, Gong. FLTrust: Byzantine-robust Federated Learning via Trust
        Bootstrapping. NDSS 2021.
    """
    check_images("cnn", input_shape, smallest=10, use="digits_cnn")
    return _pooled(_CNN((30, 50), (100,), num_classes, "VALID"), input_shape)


def digits_cnn(
    input_shape: tuple[int, ...] = (8, 8, 1), num_classes: int = 10
) -> Model:
    """A small network for 8x8 digits: conv 8@3x3, pool, conv 16@3x3, pool, dense L.

    1,898 parameters for 8x8x1 images and ten classes; "same" padding. Features: the
    first convolution after pooling and relu (4*4*8).

    Example:
        >>> import jax
        >>> params = jax.eval_shape(digits_cnn().init, jax.random.key(0))
        >>> sum(leaf.size for leaf in jax.tree.leaves(params))
        1898
    """
    check_images("digits_cnn", input_shape, smallest=4, use="mlp")
    return _pooled(_CNN((8, 16), (), num_classes, "SAME"), input_shape)


def leaf_cnn(
    input_shape: tuple[int, ...] = (28, 28, 1), num_classes: int = 62
) -> Model:
    """LEAF's FEMNIST network: conv 32@5x5, pool, conv 64@5x5, pool, dense 2048 and L.

    6,603,710 parameters for 28x28x1 images and 62 classes; "same" padding. Pixels are
    divided by 255. Features: the first convolution after pooling and relu (14*14*32).

    Args:
        input_shape: (height, width, channels), at least 4 by 4.
        num_classes: L.

    Raises:
        ValueError: images too small for two poolings.

    Example:
        >>> import jax
        >>> params = jax.eval_shape(leaf_cnn().init, jax.random.key(0))
        >>> sum(leaf.size for leaf in jax.tree.leaves(params))
        6603710

    References:
        Caldas, Duddu, Wu, Li, Konečný, McMahan, Smith, Talwalkar. LEAF: A Benchmark for
        Federated Settings. arXiv:1812.01097, 2018. The layers are those of its code.
    """
    check_images("leaf_cnn", input_shape, smallest=4, use="mlp")
    module = _CNN((32, 64), (2048,), num_classes, "SAME", kernel_size=(5, 5))
    return _pooled(module, input_shape)


def small_cnn(
    input_shape: tuple[int, ...] = (28, 28, 1), num_classes: int = 10
) -> Model:
    """Data sanitization's MNIST network: conv 8@3x3, conv 16@3x3, pool, dense L.

    24,298 parameters for 28x28x1 images and ten classes. Features: the first
    convolution after relu (26*26*8).

    Args:
        input_shape: (height, width, channels), at least 6 by 6.
        num_classes: L.

    Raises:
        ValueError: images too small for two valid convolutions and pooling.

    Example:
        >>> import jax
        >>> params = jax.eval_shape(small_cnn().init, jax.random.key(0))
        >>> sum(leaf.size for leaf in jax.tree.leaves(params))
        24298

    References:
        Chen, Gao, Shi, Huang. Try to Avoid Attacks: A Federated Data Sanitization
        Defense for Healthcare IoMT Systems. arXiv:2211.01592, 2022.

    Differs from the paper: it names the layers ("two convolution layers, a max-pooling
    layer, and a fully-connected layer") and no sizes; channels, kernels, valid padding
    and relu after the convolutions are our choice.
    """
    check_images("small_cnn", input_shape, smallest=6, use="mlp")
    module = _SmallCNN((8, 16), num_classes)
    return _then(nn.relu, Model.from_linen(module, input_shape, features="Conv_0"))


def mlp(
    input_shape: tuple[int, ...] = (28, 28, 1),
    num_classes: int = 10,
    hidden: tuple[int, ...] = (200,),
) -> Model:
    """A fully connected network with relu between its layers.

    Features: the first hidden layer after relu; none without hidden layers.

    Args:
        input_shape: shape of one input; flattened.
        num_classes: L.
        hidden: widths of the hidden layers; ``()`` is logistic regression.

    Example:
        >>> import jax
        >>> sorted(mlp(hidden=(32,)).init(jax.random.key(0)))
        ['Dense_0', 'Dense_1']
    """
    module = _MLP(tuple(hidden), num_classes)
    first = "Dense_0" if hidden else None
    return _then(nn.relu, Model.from_linen(module, input_shape, features=first))


def _pooled(module: _CNN, input_shape: tuple[int, ...]) -> Model:
    """The model with its first block as features, without the spare channels."""
    channels = module.channels[0]
    spare = -channels % LANES if worth_spare(channels) else 0

    def cut(x: Array) -> Array:
        x = x.reshape(x.shape[0], -1, channels + spare)
        return x[:, :, :channels].reshape(x.shape[0], -1)

    return _then(cut, Model.from_linen(module, input_shape, features="Conv_0"))


def _then(finish: Callable[[Array], Array], model: Model) -> Model:
    """The model with ``finish`` after its features, where it has any."""
    first = model.features
    if first is None:
        return model
    return model._replace(features=lambda params, x: finish(first(params, x)))


MODELS: dict[str, Callable[..., Model]] = {
    "cnn": cnn,
    "digits_cnn": digits_cnn,
    "leaf_cnn": leaf_cnn,
    "mlp": mlp,
    "resnet18": resnet18,
    "small_cnn": small_cnn,
}
