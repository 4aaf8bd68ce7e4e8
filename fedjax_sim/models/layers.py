"""Convolution as patches and one matrix product, and max pooling by slices.

XLA turns a vmapped convolution inside a loop into a grouped convolution with a naive
weight gradient on CPU (10-20 times slower than this file), so the zoo never calls
``lax.conv``. Parameters are those of ``flax.linen.Conv``, so weights move both ways.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedjax_sim.types import Array

# Float32 values in one vector register of a CPU with AVX-512.
LANES = 16


def patches(
    x: Array, height: int, width: int, strides: tuple[int, int] = (1, 1)
) -> Array:
    """Sliding windows of ``x [b, h, w, c]``: ``[b, h', w', height * width * c]``.

    ``h' = (h - height) // stride + 1``; the last axis runs over (row, column, channel),
    as the first three axes of a flax convolution kernel do. Built from shifted slices:
    ``lax.conv_general_dilated_patches`` is itself a convolution.

    Example:
        >>> patches(jnp.arange(9.0).reshape(1, 3, 3, 1), 2, 2)[0, 0, 0].tolist()
        [0.0, 1.0, 3.0, 4.0]
    """
    rows, columns = x.shape[1] - height + 1, x.shape[2] - width + 1
    down, right = strides
    windows = [
        x[:, i : i + rows : down, j : j + columns : right]
        for i in range(height)
        for j in range(width)
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


@jax.custom_vjp
def conv_pool(x: Array, kernel: Array, bias: Array) -> Array:
    """``relu(max_pool(x * K + b))``, stride 1 and no padding, in one piece.

    Pooling comes before bias and relu, which is the same function (both are monotone,
    and the bias is constant over a window) on a quarter of the elements. Only the
    positions that pooling keeps are computed: an odd edge is dropped beforehand.

    The gradient is written out, since the one XLA:CPU makes of this function is half as
    fast: pooling's is one broadcast comparison, and the kernel's is the matrix product
    whose output has its longer axis last. No forward-mode differentiation.

    Args:
        x: ``[b, h, w, c]``.
        kernel: ``[height, width, c, f]``.
        bias: ``[f]``.

    Returns:
        ``[b, (h - height + 1) // 2, (w - width + 1) // 2, f]``.

    Example:
        >>> image = jnp.arange(16.0).reshape(1, 4, 4, 1)
        >>> conv_pool(image, jnp.ones((3, 3, 1, 1)), jnp.ones(1)).ravel().tolist()
        [91.0]
    """
    return _conv_pool_forward(x, kernel, bias)[0]


def _conv_pool_forward(x: Array, kernel: Array, bias: Array) -> tuple[Array, tuple]:
    height, width, _, features = kernel.shape
    rows, columns = _kept(x.shape[1], height), _kept(x.shape[2], width)
    windows = patches(x[:, : rows + height - 1, : columns + width - 1], height, width)
    windows = windows.reshape(-1, windows.shape[-1])
    out = windows @ kernel.reshape(-1, features)
    out = out.reshape(-1, rows, columns, features)
    pooled = nn.relu(max_pool(out) + bias.reshape(1, 1, 1, -1))
    return pooled, (windows, out, pooled, kernel, x.shape)


def _conv_pool_backward(saved: tuple, grad: Array) -> tuple[Array, Array, Array]:
    windows, out, pooled, kernel, shape = saved
    height, width, channels, features = kernel.shape
    batch, rows, columns, _ = out.shape
    grad = jnp.where(pooled > 0, grad, 0.0)
    grad_bias = grad.sum(axis=(0, 1, 2))

    highest = max_pool(out)
    tied = sum(
        jnp.where(out[:, i::2, j::2] == highest, 1.0, 0.0)
        for i in (0, 1)
        for j in (0, 1)
    )
    pairs = out.reshape(batch, rows // 2, 2, columns // 2, 2, features)
    wins = pairs == highest[:, :, None, :, None]
    grad = jnp.where(wins, (grad / tied)[:, :, None, :, None], 0.0).reshape(
        -1, features
    )

    if windows.shape[-1] > features:
        # Without the barrier XLA folds the transposition back into the product.
        grad_kernel = jax.lax.optimization_barrier(grad.T @ windows).T
    else:
        grad_kernel = windows.T @ grad
    grad_windows = grad @ kernel.reshape(-1, features).T
    grad_windows = grad_windows.reshape(batch, rows, columns, height * width, channels)
    below, right = shape[1] - rows, shape[2] - columns
    grad_x = sum(
        jnp.pad(
            grad_windows[:, :, :, i * width + j],
            [(0, 0), (i, below - i), (j, right - j), (0, 0)],
        )
        for i in range(height)
        for j in range(width)
    )
    return jnp.asarray(grad_x), grad_kernel.reshape(kernel.shape), grad_bias


def worth_spare(features: int) -> bool:
    """Whether channels up to the next multiple of 16 add no more than an eighth.

    Example:
        >>> worth_spare(30), worth_spare(8), worth_spare(50)
        (True, False, False)
    """
    return 0 < -features % LANES <= features / 8


def _kept(size: int, kernel: int) -> int:
    """Positions of a convolution along one axis that 2x2 pooling keeps."""
    return (size - kernel + 1) // 2 * 2


def _same(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros before and after one axis, so that ``ceil(size / stride)`` windows fit."""
    windows = -(-size // stride)
    missing = max((windows - 1) * stride + kernel - size, 0)
    return missing // 2, missing - missing // 2


conv_pool.defvjp(_conv_pool_forward, _conv_pool_backward)


class Conv(nn.Module):
    """Convolution: ``y = sum_ij x[i, j] K[i, j] + b``, as one matrix product.

    A drop-in for ``flax.linen.Conv`` with the same arguments: the same parameter names,
    shapes and initialisation, equal outputs and gradients.

    With ``pool=True`` it computes ``relu(max_pool(x * K + b))``; see ``conv_pool``.

    Attributes:
        features: output channels.
        kernel_size: (height, width).
        padding: ``"VALID"`` or ``"SAME"``.
        pool: whether to end with 2x2 max pooling and relu.
        in_features: channels of the input that count; those after them must be zero.
            None for all.
        spare: append channels of zeros up to the next multiple of 16, for a following
            convolution that is told by ``in_features``. Whole vectors are faster, and
            as zeros meet zero weights, outputs and gradients are the same.
        strides: (down, right); (1, 1) where ``pool``.
        use_bias: whether there is a b.
    """

    features: int
    kernel_size: tuple[int, int] = (3, 3)
    padding: str = "VALID"
    pool: bool = False
    in_features: int | None = None
    spare: bool = False
    strides: tuple[int, int] = (1, 1)
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if self.padding not in ("VALID", "SAME"):
            raise ValueError(
                f"Conv padding is 'VALID' or 'SAME'; got {self.padding!r}."
            )
        if self.pool and self.strides != (1, 1):
            raise ValueError(
                f"Conv with pool=True has strides (1, 1); got {self.strides}. Leave "
                "out one of the two."
            )
        height, width = self.kernel_size
        channels = x.shape[-1] if self.in_features is None else self.in_features
        shape = (height, width, channels, self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        else:
            bias = jnp.zeros(self.features)
        if self.padding == "SAME":
            rows = _same(x.shape[1], height, self.strides[0])
            columns = _same(x.shape[2], width, self.strides[1])
            x = jnp.pad(x, [(0, 0), rows, columns, (0, 0)])
        more_out = -self.features % LANES if self.spare else 0
        more_in = x.shape[-1] - channels
        kernel = jnp.pad(kernel, [(0, 0), (0, 0), (0, more_in), (0, more_out)])
        bias = jnp.pad(bias, (0, more_out))
        if self.pool:
            return conv_pool(x, kernel, bias)
        windows = patches(x, height, width, self.strides)
        out = windows.reshape(-1, windows.shape[-1]) @ kernel.reshape(-1, len(bias))
        return out.reshape(*windows.shape[:3], -1) + bias.reshape(1, 1, 1, -1)


def to_float(x: Array) -> Array:
    """``uint8`` images to float32 in [0, 1]; anything else passes as it is."""
    return x.astype(jnp.float32) / 255.0 if x.dtype == jnp.uint8 else x


def check_images(name: str, shape: tuple[int, ...], smallest: int, use: str) -> None:
    """Refuses a shape that is not (height, width, channels), or too small a one.

    Raises:
        ValueError: with the smallest side of ``name`` and the model to ``use`` instead.

    Example:
        >>> check_images("cnn", (8, 8, 1), smallest=10, use="digits_cnn")
        Traceback (most recent call last):
        ...
        ValueError: cnn needs images (height, width, channels) of at least 10 by 10; \
got input_shape=(8, 8, 1). Use fs.models.digits_cnn.
    """
    if len(shape) != 3 or min(shape[:2]) < smallest:
        raise ValueError(
            f"{name} needs images (height, width, channels) of at least {smallest} by "
            f"{smallest}; got input_shape={tuple(shape)}. Use fs.models.{use}."
        )
