"""What the backdoor attacks share: stamping a trigger on samples.

A trigger is a mask ``m`` and a pattern ``p`` with ``x' = (1 - m) x + m p``. Patterns
are shares of full scale, which is 255 for ``uint8`` inputs (models divide those by 255)
and 1 for floats, so that one trigger fits images stored either way.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from fedjax_sim.attacks.samples import class_indices, has_label, relabel
from fedjax_sim.pytrees import along
from fedjax_sim.registry import check_count, check_number, lookup
from fedjax_sim.types import Array, ClientData

Stamp = Callable[[Array], Array]  # samples [s, ...] to samples with the trigger

SIZE, CORNER, VALUE = 3, "bottom_right", 1.0
# Whether the square lies at the end of (rows, columns).
CORNERS = {
    "top_left": (False, False),
    "top_right": (False, True),
    "bottom_left": (True, False),
    "bottom_right": (True, True),
}


def blend(who: str, inputs: Array, mask: Array, pattern: np.ndarray) -> Array:
    """``(1 - m) x + m p`` with ``p`` in shares of full scale; the dtype stays.

    Args:
        who: the attack, for messages.
        inputs: ``[s, ...]``, ``uint8`` (results are rounded) or floats.
        mask: from 0 to 1, of the shape of a sample, or of a picture ``[h, w]`` for
            every channel of samples ``[h, w, c]``.
        pattern: of the mask's shape, or ``[]``.

    Raises:
        TypeError: inputs of another type.
        ValueError: a mask of another shape, or a pattern that ``uint8`` cannot hold.

    Example:
        >>> x = jnp.array([[100, 200]], jnp.uint8)
        >>> blend("mine", x, jnp.array([0.0, 0.5]), np.array([1.0, 0.5])).tolist()
        [[100, 164]]
    """
    if inputs.dtype == jnp.uint8:
        full = 255.0
        if pattern.min() < 0 or pattern.max() > 1:
            raise ValueError(
                f"{who} stamps shares of full scale, from 0 to 1, on uint8 inputs; got "
                f"values from {pattern.min():g} to {pattern.max():g}. Divide them by "
                "255."
            )
    elif jnp.issubdtype(inputs.dtype, jnp.floating):
        full = 1.0
    else:
        raise TypeError(
            f"{who} stamps uint8 or float inputs; got {inputs.dtype}, whose full scale "
            "is unknown."
        )
    sample = inputs.shape[1:]
    per_channel = mask.shape == sample
    if not per_channel and not (mask.ndim == 2 and mask.shape == sample[:-1]):
        raise ValueError(
            f"{who} has a mask of shape {mask.shape}, but the samples have shape "
            f"{sample}. Give the mask that shape, or [height, width] for images "
            "[height, width, channels]."
        )
    shape = (1, *mask.shape, *[1] * (len(sample) - mask.ndim))
    m = mask.reshape(shape)
    p = full * jnp.broadcast_to(jnp.asarray(pattern, jnp.float32), mask.shape)
    p = p.reshape(shape)
    x = inputs.astype(jnp.float32)
    # Not by the sum alone: an infinite x under a full mask would give 0 * inf.
    stamped = jnp.where(m == 1.0, p, (1.0 - m) * x + m * p)
    if full == 255.0:
        stamped = jnp.round(stamped)
    return jnp.where(m == 0.0, inputs, stamped.astype(inputs.dtype))


def image_shape(who: str, inputs: Array) -> tuple[int, int]:
    """Height and width of images ``[s, h, w]`` or ``[s, h, w, c]``.

    Raises:
        ValueError: the samples are no images.
    """
    sample = inputs.shape[1:]
    if len(sample) not in (2, 3):
        raise ValueError(
            f"{who} stamps images [height, width] or [height, width, channels]; got "
            f"samples of shape {sample}. Use badnets with mask= of that shape."
        )
    return sample[0], sample[1]


def make_stamp(
    who: str,
    size: int,
    corner: str,
    value: float,
    mask: Any,
    pattern: Any,
) -> Stamp:
    """The stamp of a square in a corner, or of the mask and pattern given.

    Raises:
        TypeError: ``size`` is not an integer, ``value`` not a number.
        ValueError: an option out of range, unknown, or without effect beside another.
    """
    if mask is None:
        if pattern is not None:
            raise ValueError(f"{who}'s pattern needs a mask; got none. Pass mask=.")
        return _square(who, size, corner, value)
    if size != SIZE or corner != CORNER:
        raise ValueError(
            f"{who} with a mask takes no size and corner; got size={size}, "
            f"corner={corner!r}. Drop them, or the mask."
        )
    if pattern is not None and value != VALUE:
        raise ValueError(
            f"{who} with a pattern takes no value; got value={value}. Drop it, or the "
            "pattern."
        )
    where = _numbers(f"{who}'s mask", mask)
    if pattern is None:
        what = np.asarray(check_number(f"{who}'s value", value), np.float32)
    else:
        what = _numbers(f"{who}'s pattern", pattern)
    if where.min() < 0 or where.max() > 1 or not where.any():
        raise ValueError(
            f"{who}'s mask must be from 0 to 1 and not 0 everywhere; got values from "
            f"{where.min():g} to {where.max():g}."
        )
    if pattern is not None and what.shape != where.shape:
        raise ValueError(
            f"{who}'s pattern must have the shape of its mask, {where.shape}; got "
            f"{what.shape}."
        )
    return lambda inputs: blend(who, inputs, jnp.asarray(where), what)


def _numbers(what: str, values: Any) -> np.ndarray:
    array = np.asarray(values, np.float32)
    if not array.size or not np.isfinite(array).all():
        raise ValueError(f"{what} must hold finite numbers; got {values}.")
    return array


def _square(who: str, size: int, corner: str, value: float) -> Stamp:
    size = check_count(f"{who}'s size", size, 1)
    bottom, right = lookup(f"corner of {who}", corner, CORNERS)
    what = np.asarray(check_number(f"{who}'s value", value), np.float32)

    def stamp(inputs: Array) -> Array:
        height, width = image_shape(who, inputs)
        if size > min(height, width):
            raise ValueError(
                f"{who}'s square of {size} x {size} is larger than the images of "
                f"{height} x {width}. Lower size to {min(height, width)} or less."
            )
        mask = np.zeros((height, width), np.float32)
        rows = slice(height - size, None) if bottom else slice(size)
        columns = slice(width - size, None) if right else slice(size)
        mask[rows, columns] = 1.0
        return blend(who, inputs, jnp.asarray(mask), what)

    return stamp


def implant(data: ClientData, chosen: Array, stamped: Array, target: int) -> ClientData:
    """The data with the chosen samples stamped and relabelled as ``target``."""
    return data._replace(
        inputs=jnp.where(along(chosen, stamped), stamped, data.inputs),
        targets=relabel(data.targets, chosen, target),
    )


def backdoored(stamp: Stamp, target: int) -> Callable[..., tuple[Array, Array, Array]]:
    """The ``trigger`` of a backdoor: all are stamped, those without the label count."""

    def trigger(inputs: Array, targets: Array) -> tuple[Array, Array, Array]:
        counts = ~has_label(targets, target)
        return stamp(inputs), class_indices(targets, target), counts

    return trigger
