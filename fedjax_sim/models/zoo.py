"""The built-in models, as flax linen modules behind one factory each."""

from collections.abc import Callable

import flax.linen as nn

from fedjax_sim.models.layers import Conv, worth_spare
from fedjax_sim.models.model import Model
from fedjax_sim.types import Array


class _CNN(nn.Module):
    channels: tuple[int, ...]
    hidden: tuple[int, ...]
    num_classes: int
    padding: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        in_features = None
        for layer, features in enumerate(self.channels):
            spare = layer < len(self.channels) - 1 and worth_spare(features)
            x = Conv(
                features,
                (3, 3),
                self.padding,
                pool=True,
                in_features=in_features,
                spare=spare,
            )(x)
            in_features = features
        return _MLP(self.hidden, self.num_classes, name="head")(x)


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

    Args:
        input_shape: (height, width, channels), at least 10 by 10.
        num_classes: L.

    Raises:
        ValueError: images too small for two valid convolutions with pooling.

    Example:
        >>> import jax
        >>> params = cnn().init(jax.random.key(0))
        >>> sum(leaf.size for leaf in jax.tree.leaves(params))
        139960

    References:
        Cao, Fang, Liu, Gong. FLTrust: Byzantine-robust Federated Learning via Trust
        Bootstrapping. NDSS 2021.
    """
    _check_images("cnn", input_shape, smallest=10, use="digits_cnn")
    return Model.from_linen(_CNN((30, 50), (100,), num_classes, "VALID"), input_shape)


def digits_cnn(
    input_shape: tuple[int, ...] = (8, 8, 1), num_classes: int = 10
) -> Model:
    """A small network for 8x8 digits: conv 8@3x3, pool, conv 16@3x3, pool, dense L.

    1,898 parameters for 8x8x1 images and ten classes; "same" padding.

    Example:
        >>> import jax
        >>> params = digits_cnn().init(jax.random.key(0))
        >>> sum(leaf.size for leaf in jax.tree.leaves(params))
        1898
    """
    _check_images("digits_cnn", input_shape, smallest=4, use="mlp")
    return Model.from_linen(_CNN((8, 16), (), num_classes, "SAME"), input_shape)


def mlp(
    input_shape: tuple[int, ...] = (28, 28, 1),
    num_classes: int = 10,
    hidden: tuple[int, ...] = (200,),
) -> Model:
    """A fully connected network with relu between its layers.

    Args:
        input_shape: shape of one input; flattened.
        num_classes: L.
        hidden: widths of the hidden layers; ``()`` is logistic regression.

    Example:
        >>> import jax
        >>> sorted(mlp(hidden=(32,)).init(jax.random.key(0)))
        ['Dense_0', 'Dense_1']
    """
    return Model.from_linen(_MLP(tuple(hidden), num_classes), input_shape)


def _check_images(name: str, shape: tuple[int, ...], smallest: int, use: str) -> None:
    if len(shape) != 3 or min(shape[:2]) < smallest:
        raise ValueError(
            f"{name} needs images (height, width, channels) of at least {smallest} by "
            f"{smallest}; got input_shape={tuple(shape)}. Use fs.models.{use}."
        )


MODELS: dict[str, Callable[..., Model]] = {
    "cnn": cnn,
    "digits_cnn": digits_cnn,
    "mlp": mlp,
}
