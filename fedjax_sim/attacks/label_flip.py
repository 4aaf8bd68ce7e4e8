"""Label flip: train honestly on wrong labels."""

import jax
import jax.numpy as jnp

from fedjax_sim.attacks.samples import (
    choose,
    class_indices,
    has_label,
    made_for,
    relabel,
)
from fedjax_sim.registry import check_count, check_number, lookup
from fedjax_sim.types import Array, ClientData, DataAttack, RoundContext

MODES = {
    "symmetric": "y' = L - 1 - y",
    "shift": "y' = (y + 1) mod L",
    "targeted": "y' = target where y = source",
    "random": "y' uniform over the other classes",
}


def _class_pair(
    num_classes: int, mode: str, source: int | None, target: int | None
) -> tuple[int, int] | None:
    """``(source, target)`` of a targeted flip, None for every other mode."""
    if mode != "targeted":
        if source is not None or target is not None:
            raise ValueError(
                f"label_flip with mode={mode!r} takes no source and target; got "
                f"source={source}, target={target}. Drop them, or use mode='targeted'."
            )
        return None
    if source is None or target is None:
        raise ValueError(
            "label_flip with mode='targeted' needs both source and target; got "
            f"source={source}, target={target}."
        )
    source = check_count("label_flip's source", source, 0)
    target = check_count("label_flip's target", target, 0)
    if source == target or not {source, target} <= set(range(num_classes)):
        raise ValueError(
            f"label_flip needs two different classes from 0 to {num_classes - 1}; got "
            f"source={source}, target={target}."
        )
    return source, target


def label_flip(
    num_classes: int,
    mode: str = "symmetric",
    source: int | None = None,
    target: int | None = None,
    fraction: float = 1.0,
) -> DataAttack:
    """Relabels a share of an attacker's samples before it trains.

    With ``L`` classes, on the chosen samples::

        symmetric:  y' = L - 1 - y          (the middle class of an odd L stays)
        shift:      y' = (y + 1) mod L
        targeted:   y' = target  where y = source
        random:     y' uniform over the L - 1 other classes

    Success, of ``targeted`` alone: the share of the test samples of class ``source``
    that the model puts into ``target``. Of multilabel targets ``[m, L]``, ``targeted``
    takes the bit ``source`` of a sample away and sets the bit ``target``; for success,
    samples count that have the one and not the other.

    Threat model: an attacker changes its own labels and then follows the protocol; it
    knows nothing of the other clients. Padding is never touched (``mask=None``: there
    is none).

    Cost: O(samples).

    Args:
        num_classes: ``L >= 2``.
        mode: one of the above.
        source: class to relabel, ``targeted`` only.
        target: class to relabel as, ``targeted`` only.
        fraction: share of the attacker's samples (of its ``source`` samples if
            ``targeted``) that is relabelled, from 0 to 1. The number is rounded to the
            nearest integer, half to even.

    Returns:
        A ``DataAttack``, with a trigger if ``targeted``. Which samples are chosen, and
        the labels of ``random``, follow from the key alone: give a client the same key
        in every round for a data set that is poisoned once.

    Raises:
        TypeError: a class, or the number of them, is not an integer.
        ValueError: an option out of range, unknown, missing, or without effect in this
            mode. ``validate`` raises it where the task has another number of classes;
            ``poison``, while tracing, on multilabel targets unless ``targeted``.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from fedjax_sim.types import ClientData, RoundContext
        >>> y = jnp.array([0, 1, 5, 9])
        >>> data = ClientData(jnp.zeros((4, 1)), y, jnp.ones(4, bool))
        >>> attack = label_flip(num_classes=10)
        >>> attack.poison(jax.random.key(0), data, RoundContext()).targets.tolist()
        [9, 8, 4, 0]

    References:
        B. Biggio, B. Nelson and P. Laskov, "Support vector machines under adversarial
        label noise", ACML 2011.

        M. Fang, X. Cao, J. Jia and N. Z. Gong, "Local model poisoning attacks to
        Byzantine-robust federated learning", USENIX Security 2020 (symmetric).

        V. Tolpegin, S. Truex, M. E. Gursoy and L. Liu, "Data poisoning attacks against
        federated learning systems", ESORICS 2020 (targeted).
    """
    num_classes = check_count("label_flip's num_classes", num_classes, 2)
    lookup("mode of label_flip", mode, MODES)
    pair = _class_pair(num_classes, mode, source, target)
    fraction = check_number("label_flip's fraction", fraction, 0, 1, "[]")

    def flip(key: Array, y: Array) -> Array:
        if mode == "symmetric":
            return num_classes - 1 - y
        if mode == "shift":
            return (y + 1) % num_classes
        return (y + jax.random.randint(key, y.shape, 1, num_classes)) % num_classes

    def poison(key: Array, data: ClientData, context: RoundContext) -> ClientData:
        key_choice, key_label = jax.random.split(key)
        y = data.targets
        eligible = data.valid
        if pair is not None:
            chosen = choose(key_choice, eligible & has_label(y, pair[0]), fraction)
            return data._replace(targets=relabel(y, chosen, pair[1], pair[0]))
        if y.ndim != 1:
            raise ValueError(
                f"label_flip with mode={mode!r} needs one label a sample; got "
                f"multilabel targets of shape {y.shape}. Use mode='targeted', which "
                "moves one label to another."
            )
        chosen = choose(key_choice, eligible, fraction)
        flipped = flip(key_label, y).astype(y.dtype)
        return data._replace(targets=jnp.where(chosen, flipped, y))

    def trigger(inputs: Array, targets: Array) -> tuple[Array, Array, Array]:
        assert pair is not None
        source, target = pair
        counts = has_label(targets, source) & ~has_label(targets, target)
        return inputs, class_indices(targets, target), counts

    return DataAttack(
        poison,
        made_for("label_flip", num_classes),
        "label_flip",
        None if pair is None else trigger,
    )
