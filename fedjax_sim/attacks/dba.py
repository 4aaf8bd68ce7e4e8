"""DBA: one backdoor trigger, shared out among the attackers."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from fedjax_sim.attacks.samples import check_class, choose, made_for
from fedjax_sim.attacks.triggers import (
    VALUE,
    backdoored,
    blend,
    image_shape,
    implant,
)
from fedjax_sim.registry import check_count, check_number, require
from fedjax_sim.types import Array, ClientData, DataAttack, RoundContext

Part = tuple[tuple[int, int], ...]
LENGTH, GAP = 4, 2


def bars(length: int, gap: int) -> tuple[Part, ...]:
    """Four bars of 1 x ``length`` pixels, ``gap`` apart, from the top left corner.

    Example:
        >>> bars(2, 1)[3]
        ((2, 3), (2, 4))
    """
    return tuple(
        tuple((row, column + i) for i in range(length))
        for row in (0, gap + 1)
        for column in (0, length + gap)
    )


def _check_parts(parts: Sequence[Sequence[tuple[int, int]]]) -> tuple[Part, ...]:
    checked = []
    for part in parts:
        pixels = []
        for pixel in part:
            if len(pixel) != 2:
                raise ValueError(
                    f"dba's parts are lists of pixels (row, column); got {pixel!r}."
                )
            row, column = (check_count("dba's row or column", i, 0) for i in pixel)
            pixels.append((row, column))
        checked.append(tuple(pixels))
    if not checked or not all(checked):
        raise ValueError(
            f"dba needs at least one part, and a pixel in every part; got {parts!r}."
        )
    return tuple(checked)


def dba(
    num_classes: int,
    target: int = 2,
    fraction: float = 20 / 64,
    length: int = LENGTH,
    gap: int = GAP,
    value: float = VALUE,
    parts: Sequence[Sequence[tuple[int, int]]] | None = None,
) -> DataAttack:
    """Every attacker trains on its part of the trigger; the whole one opens the door.

    With K parts ``m_1 .. m_K`` of 0 and 1, trigger value ``v`` and target class ``t``,
    attacker number ``r`` of the run does, on the chosen samples::

        x' = (1 - m) x + m v  with  m = m_(r mod K),   y' = t

    Success: the share of the test samples of other classes that the model puts into
    ``t`` once they are stamped with the union of the parts. Multilabel targets are
    treated as by ``badnets``.

    Threat model: as ``badnets``, and the attackers agree beforehand who takes which
    part (``context.rank``). With fewer attackers than parts, the last parts are never
    trained. Often boosted with ``scaling``.

    Cost: O(samples).

    Args:
        num_classes: ``L >= 2``.
        target: ``t``.
        fraction: share of the attacker's samples that is poisoned, from 0 to 1. The
            number is rounded to the nearest integer, half to even.
        length: pixels in each of the four bars that are the default parts: 4 is the
            paper's for MNIST, 6 for CIFAR-10.
        gap: pixels between two bars, in both directions: 2 for MNIST, 3 for CIFAR-10.
        value: what the trigger's pixels become, in every channel, as a share of full
            scale: 255 for ``uint8`` inputs, 1 for floats.
        parts: instead of the bars, the pixels ``(row, column)`` of every part.

    Returns:
        A ``DataAttack`` with a trigger. Which samples are chosen follows from the key
        alone, so a client poisons the same ones in every round.

    Raises:
        TypeError: a class or a pixel is not an integer, a number not a number; while
            tracing, inputs that are neither ``uint8`` nor floats.
        ValueError: an option out of range or without effect beside another; while
            tracing, a part outside the images, or no ``context.rank``.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from fedjax_sim.types import ClientData, RoundContext
        >>> data = ClientData(jnp.zeros((1, 1, 4, 1)), jnp.array([5]), None)
        >>> attack = dba(10, fraction=1.0, parts=[[(0, 0)], [(0, 2), (0, 3)]])
        >>> context = RoundContext(rank=jnp.array(3))
        >>> attack.poison(jax.random.key(0), data, context).inputs[0, 0, :, 0].tolist()
        [0.0, 0.0, 1.0, 1.0]
        >>> attack.trigger(data.inputs, data.targets)[0][0, 0, :, 0].tolist()
        [1.0, 0.0, 1.0, 1.0]

    References:
        C. Xie, K. Huang, P.-Y. Chen and B. Li, "DBA: Distributed backdoor attacks
        against federated learning", ICLR 2020.

    Differs from the paper:
        20 of 64 samples are the client's, chosen once, instead of 20 in every batch of
        64. When the attackers strike, for how many local epochs they train and how far
        they boost are not part of it: see ``schedule``, ``byzantine_update`` of
        ``Simulation`` and ``scaling``.
    """
    num_classes = check_count("dba's num_classes", num_classes, 2)
    target = check_class("dba's target", target, num_classes)
    fraction = check_number("dba's fraction", fraction, 0, 1, "[]")
    what = np.asarray(check_number("dba's value", value), np.float32)
    default = parts is None
    if parts is None:
        length = check_count("dba's length", length, 1)
        parts = bars(length, check_count("dba's gap", gap, 0))
    elif (length, gap) != (LENGTH, GAP):
        raise ValueError(
            f"dba with parts takes no length and gap; got length={length}, gap={gap}. "
            "Drop them, or the parts."
        )
    pixels = _check_parts(parts)

    def masks(inputs: Array) -> np.ndarray:
        """``[K, height, width]``."""
        height, width = image_shape("dba", inputs)
        found = np.zeros((len(pixels), height, width), np.float32)
        for i, part in enumerate(pixels):
            for row, column in part:
                if row >= height or column >= width:
                    fix = "other parts"
                    if default:
                        fix = (
                            f"length and gap with 2 length + gap <= {width} and "
                            f"gap + 2 <= {height}"
                        )
                    raise ValueError(
                        f"dba's trigger has a pixel at row {row}, column {column}, "
                        f"outside the images of {height} x {width}. Pass {fix}."
                    )
                found[i, row, column] = 1.0
        return found

    def poison(key: Array, data: ClientData, context: RoundContext) -> ClientData:
        rank = require("dba", context, "rank")
        mine = jnp.asarray(masks(data.inputs))[rank % len(pixels)]
        chosen = choose(key, data.valid, fraction)
        return implant(data, chosen, blend("dba", data.inputs, mine, what), target)

    def union(inputs: Array) -> Array:
        return blend("dba", inputs, jnp.asarray(masks(inputs).max(axis=0)), what)

    return DataAttack(
        poison, made_for("dba", num_classes), "dba", backdoored(union, target)
    )
