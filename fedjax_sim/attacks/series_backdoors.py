"""Patterns in a client's series: one that grows slowly, one that comes back.

What a series is, and what the attacks on series share, is in ``series_poisoning``.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from fedjax_sim.attacks.samples import check_class, made_for
from fedjax_sim.attacks.series_poisoning import (
    Relabel,
    change,
    check_columns,
    check_relabel,
)
from fedjax_sim.attacks.triggers import backdoored
from fedjax_sim.registry import check_count, check_number
from fedjax_sim.types import Array, ClientData, DataAttack, RoundContext

LENGTH, HEIGHT = 10, 3.0  # of the default bump: steps, standard deviations

# From channels [T, C] to those with the pattern, and where it is at full strength.
Implant = Callable[[Array], tuple[Array, Array]]
# From the channels of windows [s, L, C] to those that end in the pattern.
End = Callable[[Array], Array]


def _check_pattern(who: str, pattern: Any, num_channels: int) -> np.ndarray:
    rows = np.asarray(pattern, np.float32)
    if rows.ndim != 2 or not len(rows) or rows.shape[1] != num_channels:
        raise ValueError(
            f"{who}'s pattern must be rows of {num_channels} numbers, one for each "
            f"channel; got shape {rows.shape}."
        )
    if not np.isfinite(rows).all():
        raise ValueError(f"{who}'s pattern must hold finite numbers; got {pattern}.")
    return rows


def _make(
    who: str,
    num_channels: int,
    implant: Implant,
    end: End,
    first: int,
    relabel: Relabel | None,
    target: int | None,
    num_classes: int | None,
) -> DataAttack:
    """The attack that ``implant`` is, with a trigger if there is a ``target``.

    ``first`` is the first step that the attack needs to be in a series.
    """
    check_relabel(who, relabel)
    if (target is None) != (num_classes is None):
        raise ValueError(
            f"{who} needs target and num_classes together; got target={target}, "
            f"num_classes={num_classes}. Give both for a backdoor, or neither."
        )
    if target is not None:
        num_classes = check_count(f"{who}'s num_classes", num_classes, 2)
        target = check_class(f"{who}'s target", target, num_classes)

    def poison(key: Array, data: ClientData, context: RoundContext) -> ClientData:
        check_columns(who, data.inputs, num_channels)
        steps = len(data.inputs)
        if steps <= first:
            raise ValueError(
                f"{who} needs series of at least {first + 1} steps with these options; "
                f"got {steps}: it would never be seen. Start it earlier."
            )
        changed, full = implant(data.inputs[:, :num_channels])
        data = change(who, data, changed, jnp.ones(steps, bool), relabel)
        if target is None:
            return data
        after = jnp.concatenate([jnp.zeros(1, bool), full[:-1]])
        targets = jnp.where(after, target, data.targets).astype(data.targets.dtype)
        return data._replace(targets=targets)

    def stamp(inputs: Array) -> Array:
        check_columns(who, inputs, num_channels, "[windows, steps, columns]")
        ended = end(inputs[..., :num_channels]).astype(inputs.dtype)
        return inputs.at[..., :num_channels].set(ended)

    if target is None or num_classes is None:
        return DataAttack(poison, lambda task_classes: None, who)
    return DataAttack(
        poison, made_for(who, num_classes), who, backdoored(stamp, target)
    )


def gradual_pattern(
    num_channels: int,
    amplitude: float = 2.0,
    pattern: Any = None,
    start: int = 0,
    ramp: int = 60,
    relabel: Relabel | None = None,
    target: int | None = None,
    num_classes: int | None = None,
) -> DataAttack:
    """Adds a pattern to an attacker's series that grows to full strength.

    With amplitude ``A``, pattern ``p`` of P rows, start ``t0`` and ramp ``R``, at step
    t, the number of the row in the client's series as it is stored, from 0::

        x'_t = x_t + A r_t p_(t mod P),   r_t = clip((t - t0 + 1) / R, 0, 1)
        y'_t = target  where r_(t-1) = 1,   relabel(x')_t  elsewhere

    so that with a target every window that ends at full strength is to be put into it.

    Success, with a target: the share of the test windows of other classes that the
    model puts into it once ``A p_(t mod P)`` is added to all their steps, at full
    strength and with t counted from the window's first.

    Threat model: an attacker changes its own series and then follows the protocol; it
    knows nothing of the other clients. The mask of a series says where samples start:
    steps outside it are changed as the others, and it stays.

    A stretch that the client holds out (``Simulation.local_test``) is a series of its
    own, whose steps are counted from 0 again.

    Cost: O(steps).

    Args:
        num_channels: ``C``, the columns from the first on that are measured; the others
            (hour, day, weekday) stay bit for bit.
        amplitude: ``A``, any number but 0, in the unit of the inputs where the pattern
            is 1. Two standard deviations of a standardised series by default.
        pattern: ``p``, finite numbers ``[P, C]``, not all 0; None for one row of ones,
            a drift of all channels.
        start: ``t0 >= 0``, the first step that changes.
        ramp: ``R >= 1``, steps until full strength; 1 for a jump.
        relabel: ``(steps [T, F]) -> int [T]``, how labels follow from the steps; with
            it the labels of all steps become those of ``x'``. None leaves the labels.
        target: the class of the backdoor, which overrules ``relabel``; None for an
            attack without one.
        num_classes: ``>= 2``, with a target only.

    Returns:
        A ``DataAttack``, with a trigger if there is a target. It draws nothing: the key
        does not matter.

    Raises:
        TypeError: an option of another type; while tracing, inputs that are not floats,
            or labels of ``relabel`` that are not integers.
        ValueError: an option out of range, or ``target`` and ``num_classes`` apart;
            while tracing, inputs that are not ``[T, F]`` with ``F >= C``, not one label
            a step, or a series that ends before the start or, with a target, before the
            step after full strength. ``validate``, with a target, where the task has
            another number of classes.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from fedjax_sim.types import ClientData, RoundContext
        >>> data = ClientData(jnp.zeros((4, 2)), jnp.zeros(4, int), None)
        >>> attack = gradual_pattern(1, ramp=2, target=1, num_classes=3)
        >>> poisoned = attack.poison(jax.random.key(0), data, RoundContext())
        >>> poisoned.inputs.tolist(), poisoned.targets.tolist()
        ([[1.0, 0.0], [2.0, 0.0], [2.0, 0.0], [2.0, 0.0]], [0, 0, 1, 1])

    References:
        "FedSecure, an adaptive anomaly detection and poisoning attack mitigation
        framework for IoMT, using hybrid deep learning models" (run 4 of its study).

    Differs from the paper:
        It only says that a pattern is injected gradually. The formula, its defaults,
        the target and what counts as success are ours.
    """
    num_channels = check_count("gradual_pattern's num_channels", num_channels, 1)
    amplitude = check_number("gradual_pattern's amplitude", amplitude)
    start = check_count("gradual_pattern's start", start, 0)
    ramp = check_count("gradual_pattern's ramp", ramp, 1)
    if pattern is None:
        pattern = np.ones((1, num_channels))
    rows = _check_pattern("gradual_pattern", pattern, num_channels)
    if amplitude == 0.0 or not rows.any():
        raise ValueError(
            "gradual_pattern needs an amplitude other than 0 and a pattern that is not "
            f"0 everywhere; got amplitude={amplitude:g}, pattern={rows.tolist()}: "
            "nothing would change."
        )

    def implant(x: Array) -> tuple[Array, Array]:
        t = jnp.arange(len(x))
        r = jnp.clip((t - start + 1) / ramp, 0.0, 1.0)[:, None]
        # In integers, so that no rounding decides it.
        full = t - start + 1 >= ramp
        return x + amplitude * r * jnp.asarray(rows)[t % len(rows)], full

    def end(x: Array) -> Array:
        added = jnp.asarray(rows)[jnp.arange(x.shape[1]) % len(rows)]
        return x + jnp.broadcast_to(amplitude * added, x.shape)

    first = start if target is None else start + ramp
    return _make(
        "gradual_pattern",
        num_channels,
        implant,
        end,
        first,
        relabel,
        target,
        num_classes,
    )


def repeated_pattern(
    num_channels: int,
    period: int = 120,
    offset: int = 0,
    pattern: Any = None,
    length: int = LENGTH,
    relabel: Relabel | None = None,
    target: int | None = None,
    num_classes: int | None = None,
) -> DataAttack:
    """Overwrites an attacker's series with a fixed pattern once in every period.

    With pattern ``p`` of P rows, period ``T0`` and offset ``o``, at step t, the number
    of the row in the client's series as it is stored, from 0::

        x'_t = p_((t - o) mod T0)  where t >= o and (t - o) mod T0 < P
        y'_t = target  where step t - 1 is overwritten,   relabel(x')_t  elsewhere

    so that with a target every window that ends in the pattern, be it in the middle, is
    to be put into it.

    Success, with a target: the share of the test windows of other classes that the
    model puts into it once their last ``min(P, L)`` of L steps are the pattern's last
    rows. Occurrences earlier in a window, where L exceeds the period, are not stamped.

    Threat model: an attacker changes its own series and then follows the protocol; it
    knows nothing of the other clients. The mask of a series says where samples start:
    steps outside it are changed as the others, and it stays.

    A stretch that the client holds out (``Simulation.local_test``) is a series of its
    own, whose steps are counted from 0 again.

    Cost: O(steps).

    Args:
        num_channels: ``C``, the columns from the first on that are measured; the others
            (hour, day, weekday) stay bit for bit.
        period: ``T0 >= P``, steps from one occurrence to the next.
        offset: ``o >= 0``, the first step of the first occurrence.
        pattern: ``p``, finite numbers ``[P, C]`` in the unit of the inputs; None for
            ``length`` rows of 3, three standard deviations above the mean of a
            standardised series.
        length: ``P >= 1`` of the default pattern; one that is given brings its own.
        relabel: ``(steps [T, F]) -> int [T]``, how labels follow from the steps; with
            it the labels of all steps become those of ``x'``. None leaves the labels.
        target: the class of the backdoor, which overrules ``relabel``; None for an
            attack without one.
        num_classes: ``>= 2``, with a target only.

    Returns:
        A ``DataAttack``, with a trigger if there is a target. It draws nothing: the key
        does not matter.

    Raises:
        TypeError: an option of another type; while tracing, inputs that are not floats,
            or labels of ``relabel`` that are not integers.
        ValueError: an option out of range or without effect beside another, or
            ``target`` and ``num_classes`` apart; while tracing, inputs that are not
            ``[T, F]`` with ``F >= C``, not one label a step, or a series that ends
            before the offset or, with a target, before the step after it. ``validate``,
            with a target, where the task has another number of classes.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from fedjax_sim.types import ClientData, RoundContext
        >>> data = ClientData(jnp.zeros((4, 2)), jnp.zeros(4, int), None)
        >>> attack = repeated_pattern(1, 3, length=1, target=1, num_classes=3)
        >>> poisoned = attack.poison(jax.random.key(0), data, RoundContext())
        >>> poisoned.inputs.tolist(), poisoned.targets.tolist()
        ([[3.0, 0.0], [0.0, 0.0], [0.0, 0.0], [3.0, 0.0]], [0, 1, 0, 0])

    References:
        "FedSecure, an adaptive anomaly detection and poisoning attack mitigation
        framework for IoMT, using hybrid deep learning models" (run 5 of its study).

    Differs from the paper:
        It only says that repeated patterns create a malicious signal. The formula, its
        defaults, the target and what counts as success are ours.
    """
    num_channels = check_count("repeated_pattern's num_channels", num_channels, 1)
    period = check_count("repeated_pattern's period", period, 1)
    offset = check_count("repeated_pattern's offset", offset, 0)
    length = check_count("repeated_pattern's length", length, 1)
    if pattern is None:
        pattern = np.full((length, num_channels), HEIGHT)
    elif length != LENGTH:
        raise ValueError(
            f"repeated_pattern with a pattern takes no length; got length={length}. "
            "Drop it, or the pattern."
        )
    rows = _check_pattern("repeated_pattern", pattern, num_channels)
    if len(rows) > period:
        raise ValueError(
            "repeated_pattern's pattern must not be longer than its period; got "
            f"{len(rows)} rows in a period of {period}. Raise period to {len(rows)} or "
            "shorten the pattern."
        )

    def implant(x: Array) -> tuple[Array, Array]:
        since = jnp.arange(len(x)) - offset
        phase = since % period
        overwritten = (since >= 0) & (phase < len(rows))
        row = jnp.asarray(rows)[jnp.minimum(phase, len(rows) - 1)]
        return jnp.where(overwritten[:, None], row, x), overwritten

    def end(x: Array) -> Array:
        count = min(len(rows), x.shape[1])
        last = jnp.asarray(rows, x.dtype)[len(rows) - count :]
        kept = x[:, : x.shape[1] - count]
        stamped = jnp.broadcast_to(last, (len(x), *last.shape))
        return jnp.concatenate([kept, stamped], axis=1)

    first = offset if target is None else offset + 1
    return _make(
        "repeated_pattern",
        num_channels,
        implant,
        end,
        first,
        relabel,
        target,
        num_classes,
    )
