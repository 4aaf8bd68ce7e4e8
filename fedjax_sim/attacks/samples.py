"""What the data attacks share: which samples they poison, labels, checks of classes.

Targets are ``int [m]``, or ``int [m, L]`` of 0 and 1 (multilabel).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_sim.registry import check_count
from fedjax_sim.types import Array


def choose(key: Array, eligible: Array, fraction: float) -> Array:
    """``round(fraction * number eligible)`` of the eligible samples, ``bool [m]``.

    The choice follows from the key alone, and a larger fraction keeps what a smaller
    one chose. Half is rounded to even.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> eligible = jnp.array([True, False, True, True, True])
        >>> chosen = choose(jax.random.key(0), eligible, 0.5)
        >>> int(chosen.sum()), bool(chosen[1])
        (2, False)
    """
    if fraction == 1.0:
        return eligible
    draws = jnp.where(eligible, jax.random.uniform(key, eligible.shape), jnp.inf)
    ranks = jnp.argsort(jnp.argsort(draws))
    return ranks < jnp.round(fraction * jnp.sum(eligible))


def has_label(targets: Array, label: int) -> Array:
    """``bool [m]``: the samples that have the label, maybe beside others."""
    return targets == label if targets.ndim == 1 else targets[:, label] == 1


def relabel(
    targets: Array, chosen: Array, label: int, instead_of: int | None = None
) -> Array:
    """The targets with ``label`` on the chosen samples.

    Of multilabel targets it is the only label of a sample then, or, with
    ``instead_of``, takes the place of that one alone.

    Example:
        >>> import jax.numpy as jnp
        >>> y, chosen = jnp.array([[1, 1, 0], [1, 0, 0]]), jnp.array([True, False])
        >>> relabel(y, chosen, 2).tolist()
        [[0, 0, 1], [1, 0, 0]]
        >>> relabel(y, chosen, 2, instead_of=0).tolist()
        [[0, 1, 1], [1, 0, 0]]
    """
    if targets.ndim == 1:
        return jnp.where(chosen, label, targets).astype(targets.dtype)
    if instead_of is None:
        labelled = jnp.zeros_like(targets)
    else:
        labelled = targets.at[:, instead_of].set(0)
    return jnp.where(chosen[:, None], labelled.at[:, label].set(1), targets)


def class_indices(targets: Array, labels: Array | int) -> Array:
    """A label for every sample ``[m]``, in the type of targets ``[m]``, else int32."""
    dtype = targets.dtype if targets.ndim == 1 else jnp.int32
    return jnp.broadcast_to(jnp.asarray(labels, dtype), targets.shape[:1])


def check_class(what: str, value: Any, num_classes: int) -> int:
    """``value``, refused unless it is one of the classes.

    Raises:
        TypeError: not an integer.
        ValueError: not from 0 to ``num_classes - 1``.

    Example:
        >>> check_class("badnets' target", 10, 10)
        Traceback (most recent call last):
        ...
        ValueError: badnets' target must be a class from 0 to 9; got 10.
    """
    label = check_count(what, value, 0)
    if label >= num_classes:
        raise ValueError(
            f"{what} must be a class from 0 to {num_classes - 1}; got {label}."
        )
    return label


def made_for(who: str, num_classes: int) -> Callable[[int], None]:
    """The ``validate`` of an attack made for tasks of this many classes."""

    def validate(task_classes: int) -> None:
        if task_classes != num_classes:
            raise ValueError(
                f"{who} was made for num_classes={num_classes}; the task has "
                f"{task_classes}. Pass num_classes={task_classes}."
            )

    return validate
