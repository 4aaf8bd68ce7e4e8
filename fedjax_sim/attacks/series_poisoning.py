"""Noise and scale in a client's series, and what the attacks on series share.

A series is a client's steps in time order: inputs ``float [T, F]`` of which the first C
columns are measured channels, targets ``int [T]``, and a mask that says which steps
start a training sample. It is poisoned before it is cut into windows, at every step
whatever the mask says.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sim.attacks.samples import choose
from fedjax_sim.pytrees import along
from fedjax_sim.registry import check_count, check_number
from fedjax_sim.types import Array, ClientData, DataAttack, RoundContext

Relabel = Callable[[Array], Array]  # steps [T, F] to their labels, int [T]


def check_columns(
    who: str, inputs: Array, num_channels: int, form: str = "[steps, columns]"
) -> None:
    """Refuses inputs that are not floats of this form with C columns or more.

    Raises:
        TypeError: not floats.
        ValueError: other axes, or fewer columns than channels.

    Example:
        >>> check_columns("variability", jnp.zeros((9, 1)), 2)
        Traceback (most recent call last):
        ...
        ValueError: variability changes the first 2 columns; got series of 1. Lower \
num_channels to 1 or less.
    """
    if inputs.ndim != form.count(",") + 1:
        raise ValueError(
            f"{who} needs inputs {form}; got shape {inputs.shape}. Attacks on series "
            "do not fit other data: use one of attacks.DATA_ATTACKS."
        )
    if not jnp.issubdtype(inputs.dtype, jnp.floating):
        raise TypeError(
            f"{who} needs inputs of floats; got {inputs.dtype}. Standardise the series."
        )
    columns = inputs.shape[-1]
    if columns < num_channels:
        raise ValueError(
            f"{who} changes the first {num_channels} columns; got series of {columns}. "
            f"Lower num_channels to {columns} or less."
        )


def check_relabel(who: str, relabel: Any) -> None:
    """Refuses what cannot be called.

    Raises:
        TypeError: neither None nor callable.
    """
    if relabel is not None and not callable(relabel):
        raise TypeError(
            f"{who}'s relabel must be a function of the steps [T, F] that returns "
            f"their labels, int [T], or None; got {type(relabel).__name__}."
        )


def per_channel(
    what: str,
    values: Any,
    num_channels: int,
    low: float = -np.inf,
    high: float = np.inf,
    closed: str = "()",
) -> np.ndarray:
    """One number for all channels or one for each, as ``float32 [C]``.

    Raises:
        TypeError: not numbers.
        ValueError: not finite, outside the bounds (see ``check_number``), or of another
            length.

    Example:
        >>> per_channel("variability's sd", 2, 3).tolist()
        [2.0, 2.0, 2.0]
    """
    shape = np.shape(values)
    if shape not in ((), (num_channels,)):
        raise ValueError(
            f"{what} must be one number or a sequence of {num_channels}, one for each "
            f"channel; got shape {shape}."
        )
    each = np.asarray(values) if shape else [values] * num_channels
    numbers = [check_number(what, value, low, high, closed) for value in each]
    return np.asarray(numbers, np.float32)


def change(
    who: str,
    data: ClientData,
    changed: Array,
    chosen: Array,
    relabel: Relabel | None,
) -> ClientData:
    """The data with the chosen steps' channels changed, and the labels that follow.

    Args:
        who: the attack, for messages.
        data: a series of one client.
        changed: ``[T, C]``, what the first C columns become.
        chosen: ``bool [T]``.
        relabel: how the labels of all steps follow from them; None leaves them.

    Raises:
        TypeError: labels that are not integers.
        ValueError: not one label a step.
    """
    num_channels = changed.shape[1]
    inputs = data.inputs.at[:, :num_channels].set(changed.astype(data.inputs.dtype))
    inputs = jnp.where(along(chosen, inputs), inputs, data.inputs)
    steps = inputs.shape[:1]
    if data.targets.shape != steps:
        raise ValueError(
            f"{who} needs one label a step, targets {steps}; got {data.targets.shape}."
        )
    if relabel is None:
        return data._replace(inputs=inputs)
    labels = jnp.asarray(relabel(inputs))
    if labels.shape != steps:
        raise ValueError(
            f"{who}'s relabel must return one label a step, {steps}; got shape "
            f"{labels.shape}."
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"{who}'s relabel must return integers; got {labels.dtype}.")
    return data._replace(inputs=inputs, targets=labels.astype(data.targets.dtype))


def step_noise(key: Array, num_steps: int, num_channels: int) -> Array:
    """Independent standard normal values ``[T, C]``, float32.

    The draw of a step depends on the key and its number alone, so that a longer series
    begins with the same noise.

    Example:
        >>> key = jax.random.key(0)
        >>> bool(jnp.all(step_noise(key, 9, 2)[:4] == step_noise(key, 4, 2)))
        True
    """
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(num_steps))
    return jax.vmap(lambda k: jax.random.normal(k, (num_channels,), jnp.float32))(keys)


def add_noise(
    x: Array, noise: Array, amplitude: float, sd: float | Sequence[float] | np.ndarray
) -> Array:
    """``x + a sd_k xi`` for channels ``x [T, C]`` and noise ``xi [T, C]``.

    Example:
        >>> x, noise = jnp.array([[60.0, 10.0]]), jnp.array([[1.0, -1.0]])
        >>> add_noise(x, noise, 0.5, [4.0, 2.0]).tolist()
        [[62.0, 9.0]]
    """
    spread = jnp.broadcast_to(jnp.asarray(sd, jnp.float32), noise.shape)
    return x + amplitude * spread * noise


def variability(
    num_channels: int,
    amplitude: float = 0.5,
    sd: float | Sequence[float] = 1.0,
    fraction: float = 1.0,
    relabel: Relabel | None = None,
) -> DataAttack:
    """Adds Gaussian noise to the channels of a share of an attacker's steps.

    With amplitude ``a``, spread ``sd_k`` of channel k and ``xi`` standard normal, on
    the chosen steps::

        x' = x + a sd_k xi,   y' = relabel(x')

    Threat model: untargeted; an attacker changes its own series and then follows the
    protocol; it knows nothing of the other clients. The mask of a series says where
    samples start: steps outside it are changed as the others, and it stays.

    Cost: O(steps).

    Args:
        num_channels: ``C``, the columns from the first on that are measured; the others
            (hour, day, weekday) stay bit for bit.
        amplitude: ``a > 0``.
        sd: ``sd_k >= 0`` in the unit of the inputs, one for all channels or one for
            each, not all 0. 1 suits standardised series.
        fraction: share of all T steps that is changed, padding included, from 0 to 1.
            The number is rounded to the nearest integer, half to even.
        relabel: ``(steps [T, F]) -> int [T]``, how labels follow from the steps; with
            it the labels of all steps, unchanged ones too, become those of ``x'``. None
            leaves the labels.

    Returns:
        A ``DataAttack`` without a trigger. Noise and choice follow from the key alone,
        so a client has the same series in every round. The noise of a step depends on
        its number, and not on T; the choice of ``fraction < 1`` depends on T too.

    Raises:
        TypeError: an option of another type; while tracing, inputs that are not floats,
            or labels of ``relabel`` that are not integers.
        ValueError: an option out of range; while tracing, inputs that are not ``[T,
            F]`` with ``F >= C``, or not one label a step.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from fedjax_sim.types import ClientData, RoundContext
        >>> data = ClientData(jnp.zeros((2, 3)), jnp.array([0, 1]), None)
        >>> attack = variability(num_channels=2)
        >>> poisoned = attack.poison(jax.random.key(0), data, RoundContext())
        >>> (poisoned.inputs != data.inputs).tolist()
        [[True, True, False], [True, True, False]]

    References:
        "FedSecure, an adaptive anomaly detection and poisoning attack mitigation
        framework for IoMT, using hybrid deep learning models" (run 2 of its study).

    Differs from the paper:
        It only says that variability is introduced in data patterns. The noise, its
        default strength and that labels follow the poisoned steps are ours.
    """
    num_channels = check_count("variability's num_channels", num_channels, 1)
    amplitude = check_number("variability's amplitude", amplitude, low=0)
    spread = per_channel("variability's sd", sd, num_channels, low=0, closed="[)")
    if not spread.any():
        raise ValueError(
            f"variability's sd must not be 0 in every channel; got {sd}: nothing would "
            "change."
        )
    fraction = check_number("variability's fraction", fraction, 0, 1, "[]")
    check_relabel("variability", relabel)

    def poison(key: Array, data: ClientData, context: RoundContext) -> ClientData:
        check_columns("variability", data.inputs, num_channels)
        key_choice, key_noise = jax.random.split(key)
        x = data.inputs[:, :num_channels]
        noisy = add_noise(x, step_noise(key_noise, *x.shape), amplitude, spread)
        chosen = choose(key_choice, jnp.ones(len(x), bool), fraction)
        return change("variability", data, noisy, chosen, relabel)

    return DataAttack(poison, lambda num_classes: None, "variability")


def pattern_scaling(
    num_channels: int,
    scale: float = 1.5,
    mean: float | Sequence[float] = 0.0,
    fraction: float = 1.0,
    relabel: Relabel | None = None,
) -> DataAttack:
    """Stretches the channels of a share of an attacker's steps about their mean.

    With scale ``s`` and mean ``mu_k`` of channel k, on the chosen steps::

        x' = mu_k + s (x - mu_k),   y' = relabel(x')

    Threat model: untargeted; an attacker changes its own series and then follows the
    protocol; it knows nothing of the other clients. The mask of a series says where
    samples start: steps outside it are changed as the others, and it stays.

    Cost: O(steps).

    Args:
        num_channels: ``C``, the columns from the first on that are measured; the others
            (hour, day, weekday) stay bit for bit.
        scale: ``s``, any number but 1: below 1 it flattens, below 0 it mirrors. 2 is a
            strong attack.
        mean: ``mu_k`` in the unit of the inputs, one for all channels or one for each.
            0 suits standardised series.
        fraction: share of all T steps that is changed, padding included, from 0 to 1.
            The number is rounded to the nearest integer, half to even.
        relabel: ``(steps [T, F]) -> int [T]``, how labels follow from the steps; with
            it the labels of all steps, unchanged ones too, become those of ``x'``. None
            leaves the labels.

    Returns:
        A ``DataAttack`` without a trigger. Which steps are chosen follows from the key
        and T alone, so a client has the same series in every round.

    Raises:
        TypeError: an option of another type; while tracing, inputs that are not floats,
            or labels of ``relabel`` that are not integers.
        ValueError: an option out of range; while tracing, inputs that are not ``[T,
            F]`` with ``F >= C``, or not one label a step.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from fedjax_sim.types import ClientData, RoundContext
        >>> data = ClientData(jnp.array([[60.0, 8.0]]), jnp.array([0]), None)
        >>> attack = pattern_scaling(num_channels=1, mean=64.0)
        >>> attack.poison(jax.random.key(0), data, RoundContext()).inputs.tolist()
        [[58.0, 8.0]]

    References:
        "FedSecure, an adaptive anomaly detection and poisoning attack mitigation
        framework for IoMT, using hybrid deep learning models" (run 3 of its study).

    Differs from the paper:
        It only says that patterns are scaled to alter data distributions. The centre,
        the default scale and that labels follow the poisoned steps are ours.
    """
    num_channels = check_count("pattern_scaling's num_channels", num_channels, 1)
    scale = check_number("pattern_scaling's scale", scale)
    if scale == 1.0:
        raise ValueError(
            "pattern_scaling's scale must not be 1: nothing would change. Pass another "
            "number, such as 1.5."
        )
    centre = per_channel("pattern_scaling's mean", mean, num_channels)
    fraction = check_number("pattern_scaling's fraction", fraction, 0, 1, "[]")
    check_relabel("pattern_scaling", relabel)

    def poison(key: Array, data: ClientData, context: RoundContext) -> ClientData:
        check_columns("pattern_scaling", data.inputs, num_channels)
        x = data.inputs[:, :num_channels]
        mu = jnp.broadcast_to(jnp.asarray(centre), x.shape)
        chosen = choose(key, jnp.ones(len(x), bool), fraction)
        scaled = mu + scale * (x - mu)
        return change("pattern_scaling", data, scaled, chosen, relabel)

    return DataAttack(poison, lambda num_classes: None, "pattern_scaling")
