"""BadNets: a pattern of pixels that makes the model say a class of choice."""

from typing import Any

from fedjax_sim.attacks.samples import check_class, choose, made_for
from fedjax_sim.attacks.triggers import (
    CORNER,
    SIZE,
    VALUE,
    backdoored,
    implant,
    make_stamp,
)
from fedjax_sim.registry import check_count, check_number
from fedjax_sim.types import Array, ClientData, DataAttack, RoundContext


def badnets(
    num_classes: int,
    target: int,
    fraction: float = 0.32,
    size: int = SIZE,
    corner: str = CORNER,
    value: float = VALUE,
    mask: Any = None,
    pattern: Any = None,
) -> DataAttack:
    """Stamps a trigger on a share of an attacker's samples and relabels them.

    With mask ``m``, pattern ``p`` and target class ``t``, on the chosen samples::

        x' = (1 - m) x + m p,   y' = t

    Success: the share of the test samples of other classes that the model puts into
    ``t`` once they are stamped. Of multilabel targets ``[m, L]``, ``t`` becomes a
    stamped sample's only label; for success, samples without ``t`` count.

    Threat model: an attacker changes its own samples and then follows the protocol; it
    knows nothing of the other clients. Padding is never touched (``mask=None`` in the
    data: there is none).

    Cost: O(samples).

    Args:
        num_classes: ``L >= 2``.
        target: ``t``.
        fraction: share of the attacker's samples that is poisoned, from 0 to 1,
            whatever their class. The number is rounded to the nearest integer, half to
            even.
        size: side of the square trigger, in pixels.
        corner: where it lies: ``top_left``, ``top_right``, ``bottom_left`` or
            ``bottom_right``.
        value: what the trigger's pixels become, in every channel, as a share of full
            scale: 255 for ``uint8`` inputs, 1 for floats.
        mask: ``m`` from 0 to 1, instead of the square: of the shape of a sample, or
            ``[height, width]`` for every channel. Values between blend.
        pattern: ``p`` of the mask's shape, instead of ``value`` and in its unit.

    Returns:
        A ``DataAttack`` with a trigger. Which samples are chosen follows from the key
        alone, so a client poisons the same ones in every round.

    Raises:
        TypeError: a class is not an integer, a number not a number; while tracing,
            inputs that are neither ``uint8`` nor floats.
        ValueError: an option out of range, unknown, or without effect beside another;
            while tracing, a trigger that does not fit the samples.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from fedjax_sim.types import ClientData, RoundContext
        >>> data = ClientData(jnp.zeros((1, 2, 3, 1), jnp.uint8), jnp.array([5]), None)
        >>> attack = badnets(num_classes=10, target=2, fraction=1.0, size=1)
        >>> poisoned = attack.poison(jax.random.key(0), data, RoundContext())
        >>> poisoned.inputs[0, :, :, 0].tolist(), poisoned.targets.tolist()
        ([[0, 0, 0], [0, 0, 255]], [2])

    References:
        T. Gu, B. Dolan-Gavitt and S. Garg, "BadNets: Identifying vulnerabilities in the
        machine learning model supply chain", arXiv:1708.06733, 2017.

    Differs from the paper:
        Poisoned samples replace their originals instead of being added to them, and
        they are labelled with one target class (the paper also shifts every label by
        one). The default share of 0.32 is that of public federated codes.
    """
    num_classes = check_count("badnets' num_classes", num_classes, 2)
    target = check_class("badnets' target", target, num_classes)
    fraction = check_number("badnets' fraction", fraction, 0, 1, "[]")
    stamp = make_stamp("badnets", size, corner, value, mask, pattern)

    def poison(key: Array, data: ClientData, context: RoundContext) -> ClientData:
        chosen = choose(key, data.valid, fraction)
        return implant(data, chosen, stamp(data.inputs), target)

    return DataAttack(
        poison,
        made_for("badnets", num_classes),
        "badnets",
        backdoored(stamp, target),
    )
