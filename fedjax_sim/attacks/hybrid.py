"""Hybrid: flip the labels of one class and implant a backdoor in the rest."""

from typing import Any

import jax.numpy as jnp

from fedjax_sim.attacks.samples import (
    check_class,
    choose,
    class_indices,
    has_label,
    made_for,
    relabel,
)
from fedjax_sim.attacks.triggers import CORNER, SIZE, VALUE, implant, make_stamp
from fedjax_sim.pytrees import along
from fedjax_sim.registry import check_count, check_number, lookup, require
from fedjax_sim.types import Array, ClientData, DataAttack, RoundContext

ASSIGNMENTS = {
    "both": "every attacker flips and stamps",
    "half_clients": "attackers of even rank flip, those of odd rank stamp",
}


def hybrid(
    num_classes: int,
    source: int,
    flip_target: int,
    target: int,
    fraction: float = 0.32,
    assignment: str = "both",
    size: int = SIZE,
    corner: str = CORNER,
    value: float = VALUE,
    mask: Any = None,
    pattern: Any = None,
) -> DataAttack:
    """A targeted label flip and a pixel trigger, on disjoint samples of an attacker.

    With source class ``s``, flip target ``c``, backdoor target ``t``, mask ``m`` and
    pattern ``p``::

        y = s:                          y' = c
        a share rho of the others:      x' = (1 - m) x + m p,   y' = t

    Success: the share, among the test samples of class ``s`` as they are and those of
    other classes than ``t`` stamped, that the model puts into ``c`` and ``t``. Of
    multilabel targets ``[m, L]``, the flip moves the bit ``s`` to ``c``, the others are
    the samples without ``s``, and ``t`` becomes a stamped one's only label; for
    success, samples count that do not have the label wanted of them.

    Threat model: an attacker changes its own samples and then follows the protocol; it
    knows nothing of the other clients. Padding is never touched (``mask=None`` in the
    data: there is none).

    Cost: O(samples).

    Args:
        num_classes: ``L >= 2``.
        source: ``s``; all its samples are relabelled.
        flip_target: ``c``, another class.
        target: ``t``.
        fraction: ``rho``, share of the samples of other classes than ``s`` that is
            stamped, from 0 to 1. The number is rounded to the nearest integer, half to
            even.
        assignment: ``both`` (every attacker does both) or ``half_clients`` (attackers
            number 0, 2, 4, ... of the run flip, the others stamp).
        size, corner, value, mask, pattern: the trigger, as for ``badnets``.

    Returns:
        A ``DataAttack`` with a trigger. Which samples are chosen follows from the key
        alone, so a client poisons the same ones in every round.

    Raises:
        TypeError: a class is not an integer, a number not a number; while tracing,
            inputs that are neither ``uint8`` nor floats.
        ValueError: an option out of range, unknown, or without effect beside another;
            while tracing, a trigger that does not fit the samples, or no
            ``context.rank`` for ``half_clients``.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from fedjax_sim.types import ClientData, RoundContext
        >>> data = ClientData(jnp.zeros((3, 2, 2, 1)), jnp.array([3, 3, 7]), None)
        >>> attack = hybrid(10, source=3, flip_target=2, target=0, fraction=1.0, size=1)
        >>> poisoned = attack.poison(jax.random.key(0), data, RoundContext())
        >>> poisoned.targets.tolist(), poisoned.inputs[:, 1, 1, 0].tolist()
        ([2, 2, 0], [0.0, 0.0, 1.0])

    References:
        C. Chen, Y. Gao, L. Shi and S. Huang, "Try to avoid attacks: A federated data
        sanitization defense for healthcare IoMT systems", arXiv:2211.01592, 2022.

    Differs from the paper:
        It only says that the two poisoned data are mixed. How they share a client's
        samples, or the clients, is ours, and so is what counts as success.
    """
    num_classes = check_count("hybrid's num_classes", num_classes, 2)
    source = check_class("hybrid's source", source, num_classes)
    flip_target = check_class("hybrid's flip_target", flip_target, num_classes)
    target = check_class("hybrid's target", target, num_classes)
    if source == flip_target:
        raise ValueError(
            f"hybrid needs a flip_target other than source; got {source} for both."
        )
    fraction = check_number("hybrid's fraction", fraction, 0, 1, "[]")
    lookup("assignment of hybrid", assignment, ASSIGNMENTS)
    stamp = make_stamp("hybrid", size, corner, value, mask, pattern)

    def poison(key: Array, data: ClientData, context: RoundContext) -> ClientData:
        valid = data.valid
        has_source = has_label(data.targets, source)
        flipped = valid & has_source
        stamped = choose(key, valid & ~has_source, fraction)
        if assignment == "half_clients":
            flips = require("hybrid", context, "rank") % 2 == 0
            flipped, stamped = flipped & flips, stamped & ~flips
        data = implant(data, stamped, stamp(data.inputs), target)
        labels = relabel(data.targets, flipped, flip_target, instead_of=source)
        return data._replace(targets=labels)

    def trigger(inputs: Array, targets: Array) -> tuple[Array, Array, Array]:
        flips = has_label(targets, source)
        seen = jnp.where(along(flips, inputs), inputs, stamp(inputs))
        wanted = class_indices(targets, jnp.where(flips, flip_target, target))
        has_wanted = jnp.where(
            flips, has_label(targets, flip_target), has_label(targets, target)
        )
        return seen, wanted, ~has_wanted

    return DataAttack(poison, made_for("hybrid", num_classes), "hybrid", trigger)
