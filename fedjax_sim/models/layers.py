"""Convolution as patches and one matrix product, and max pooling by slices.

XLA turns a vmapped convolution inside a loop into a grouped convolution with a naive
weight gradient on CPU (10-20 times slower than this file), so the zoo never calls
``lax.conv``. Parameters are those of ``flax.linen.Conv``, so weights move both ways.
"""

import flax.linen as nn
import jax.numpy as jnp

from fedjax_sim.types import Array


def patches(x: Array, height: int, width: int) -> Array:
    """Sliding windows of ``x [b, h, w, c]``: ``[b, h', w', height * width * c]``.

    ``h' = h - height + 1``; the last axis runs over (row, column, channel), as the
    first three axes of a flax convolution kernel do. Built from shifted slices:
    ``lax.conv_general_dilated_patches`` is itself a convolution.

    Example:
        >>> patches(jnp.arange(9.0).reshape(1, 3, 3, 1), 2, 2)[0, 0, 0].tolist()
        [0.0, 1.0, 3.0, 4.0]
    """
    rows, columns = x.shape[1] - height + 1, x.shape[2] - width + 1
    windows = [
        x[:, i : i + rows, j : j + columns] for i in range(height) for j in range(width)
    ]
    return jnp.concatenate(windows, axis=-1)


def max_pool(x: Array) -> Array:
    """Maximum over disjoint 2x2 windows of ``x [b, h, w, c]``; an odd edge is dropped.

    The values of ``flax.linen.max_pool(x, (2, 2), (2, 2))``. Where several entries of a
    window tie, the gradient is shared between them; ``reduce_window`` gives it all to
    the first.

    Example:
        >>> max_pool(jnp.arange(16.0).reshape(1, 4, 4, 1)).ravel().tolist()
        [5.0, 7.0, 13.0, 15.0]
    """
    x = x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]
    top = jnp.maximum(x[:, ::2, ::2], x[:, ::2, 1::2])
    bottom = jnp.maximum(x[:, 1::2, ::2], x[:, 1::2, 1::2])
    return jnp.maximum(top, bottom)


class Conv(nn.Module):
    """Stride-1 convolution: ``y = sum_ij x[i, j] K[i, j] + b``, as one matrix product.

    A drop-in for ``flax.linen.Conv(features, kernel_size, padding=padding)``: the same
    parameter names, shapes and initialisation, equal outputs and gradients.

    With ``pool=True`` it computes ``relu(max_pool(x * K + b))`` with the pooling moved
    in front of bias and relu, which is the same function (both are monotone, and the
    bias is constant over a window) on a quarter of the elements.

    Attributes:
        features: output channels.
        kernel_size: (height, width).
        padding: ``"VALID"`` or ``"SAME"``.
        pool: whether to end with 2x2 max pooling and relu.
    """

    features: int
    kernel_size: tuple[int, int] = (3, 3)
    padding: str = "VALID"
    pool: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if self.padding not in ("VALID", "SAME"):
            raise ValueError(
                f"Conv padding is 'VALID' or 'SAME'; got {self.padding!r}."
            )
        height, width = self.kernel_size
        shape = (height, width, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        if self.padding == "SAME":
            above, left = (height - 1) // 2, (width - 1) // 2
            pads = [(0, 0), (above, height - 1 - above), (left, width - 1 - left)]
            x = jnp.pad(x, [*pads, (0, 0)])
        windows = patches(x, height, width)
        out = windows.reshape(-1, windows.shape[-1]) @ kernel.reshape(-1, self.features)
        out = out.reshape(*windows.shape[:3], self.features)
        bias = bias.reshape(1, 1, 1, -1)
        return nn.relu(max_pool(out) + bias) if self.pool else out + bias


def to_float(x: Array) -> Array:
    """``uint8`` images to float32 in [0, 1]; anything else passes as it is."""
    return x.astype(jnp.float32) / 255.0 if x.dtype == jnp.uint8 else x
