"""Recurrent networks for windows of a series, as flax linen modules."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedjax_sim.models.model import Model
from fedjax_sim.types import Array


class _BiLSTM(nn.Module):
    """Hidden states of both directions at every step, ``[b, L, 2 * hidden]``.

    ``(i, f, g, o) = W (x_t, h) + b``, ``c <- sigmoid(f) c + sigmoid(i) tanh(g)``,
    ``h <- sigmoid(o) tanh(c)``. All gates of both directions are two arrays of
    parameters: flax's cell has twelve a direction, and a program of many systems takes
    the longer to compile the more there are. Initialised as by Keras.
    """

    hidden: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        gates = 4 * self.hidden
        kernel = self.param("kernel", _kernel, (2, x.shape[2] + self.hidden, gates))
        bias = self.param("bias", _forget_bias, (2, gates))

        def states(x: Array, direction: int) -> Array:
            def step(carry: tuple[Array, Array], own: Array) -> tuple[Any, Array]:
                h, c = carry
                z = jnp.concatenate([own, h], axis=1) @ kernel[direction]
                i, f, g, o = jnp.split(z + bias[direction][None], 4, axis=1)
                c = nn.sigmoid(f) * c + nn.sigmoid(i) * jnp.tanh(g)
                h = nn.sigmoid(o) * jnp.tanh(c)
                return (h, c), h

            zero = jnp.zeros((x.shape[1], self.hidden), x.dtype)
            return jax.lax.scan(step, (zero, zero), x)[1]

        steps = x.swapaxes(0, 1)
        backward = states(steps[::-1], 1)[::-1]
        found = jnp.concatenate([states(steps, 0), backward], axis=2)
        return found.swapaxes(0, 1)


def _kernel(key: Array, shape: tuple[int, ...]) -> Array:
    """Glorot's for what multiplies inputs, orthogonal for what multiplies states."""
    hidden = shape[2] // 4

    def one(key: Array) -> Array:
        own, recurrent = jax.random.split(key)
        init = nn.initializers
        return jnp.concatenate(
            [
                init.glorot_uniform()(own, (shape[1] - hidden, shape[2])),
                init.orthogonal()(recurrent, (hidden, shape[2])),
            ]
        )

    return jax.vmap(one)(jax.random.split(key, shape[0]))


def _forget_bias(key: Array, shape: tuple[int, ...]) -> Array:
    """1 for the forget gate, 0 for the others."""
    del key
    gate = jnp.arange(shape[1]) * 4 // shape[1]
    return jnp.broadcast_to((gate == 1).astype(jnp.float32), shape)


class _Classifier(nn.Module):
    hidden: int
    num_classes: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        states = _BiLSTM(self.hidden, name="states")(x)
        # Each direction's last state: the forward one's at the end of the window, the
        # backward one's at its beginning.
        last = [states[:, -1, : self.hidden], states[:, 0, self.hidden :]]
        return nn.Dense(self.num_classes)(jnp.concatenate(last, axis=1))


class Autoencoder(nn.Module):
    """A BiLSTM and a dense layer at every step: FedSecure's reference model.

    ``h_t = (LSTM_forward(x_1..x_t), LSTM_backward(x_L..x_t))`` and ``y_t = W h_t + b``,
    for windows ``[b, L, F]``; the output is of that shape too.

    Example:
        >>> import jax
        >>> windows = jnp.zeros((2, 60, 5))
        >>> net = Autoencoder(hidden=64)
        >>> net.apply(net.init(jax.random.key(0), windows), windows).shape
        (2, 60, 5)
    """

    hidden: int = 64

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return nn.Dense(x.shape[-1])(_BiLSTM(self.hidden)(x))


def bilstm(
    input_shape: tuple[int, ...] = (60, 5), num_classes: int = 3, hidden: int = 16
) -> Model:
    """A bidirectional LSTM over a window, and a dense layer on its two last states.

    2,915 parameters for windows of five features, three classes and 16 units in each
    direction. No shallow features.

    Args:
        input_shape: (steps, features) of a window.
        num_classes: L.
        hidden: units of each direction.

    Raises:
        ValueError: inputs that are no windows.

    Example:
        >>> import jax
        >>> params = jax.eval_shape(bilstm().init, jax.random.key(0))
        >>> sum(leaf.size for leaf in jax.tree.leaves(params))
        2915

    References:
        Schuster and Paliwal, "Bidirectional recurrent neural networks", IEEE
        Transactions on Signal Processing 1997.

        Hochreiter and Schmidhuber, "Long short-term memory", Neural Computation 1997.
    """
    if len(input_shape) != 2:
        raise ValueError(
            "bilstm takes windows of shape (steps, features); got input_shape="
            f"{input_shape}. Use cnn or mlp."
        )
    return Model.from_linen(_Classifier(hidden, num_classes), input_shape)
