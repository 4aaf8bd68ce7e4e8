"""FedSecure's detector: a reference model of clean series, and a classifier.

The reference model rebuilds windows of a series; what it cannot rebuild is unusual. The
classifier turns the error of a window into a score from 0 to 1. Both are trained by the
server on clean windows before the federated run, and then handed to every device.
"""

import itertools
import numbers
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_sim.client_defenses.sanitization import in_batches
from fedjax_sim.models.recurrent import Autoencoder
from fedjax_sim.registry import check_count, check_number, check_type
from fedjax_sim.types import AnyArray, Array, PyTree

# A share of the windows, drawn at random, that the reference model is not trained on.
HELD_OUT = 0.2
FOLDS = 5
OnEpoch = Callable[[int, float, float], None]
DIVERGED = 10.0  # times the error of rebuilding every window as 0
# Errors that are all alike have none.
_LEAST_SPREAD = 1e-6


class Detector(NamedTuple):
    """A trained reference model and classifier: arrays only.

    Attributes:
        autoencoder: parameters of ``models.Autoencoder``.
        layers: of the classifier, ``(W [in, out], b [out])`` each; ReLU between them, a
            sigmoid after the last.
        highest: ``float32 []``, the largest input that the classifier was trained on.
    """

    autoencoder: PyTree
    layers: tuple[tuple[Array, Array], ...]
    highest: Array


class Scale(NamedTuple):
    """What is usual for a device: its clean errors' logarithm.

    Attributes:
        center: ``float32 []``, its mean.
        spread: ``float32 []``, its standard deviation.
    """

    center: Array
    spread: Array


class Fold(NamedTuple):
    """Accuracy and loss of a classifier on what it was trained on, and on the rest."""

    train_accuracy: AnyArray
    train_loss: AnyArray
    val_accuracy: AnyArray
    val_loss: AnyArray


class Training(NamedTuple):
    """How the training of a ``Detector`` went.

    Attributes:
        train_loss, val_loss: ``float32 [epochs]``, mean squared error per value after
            each epoch, on the windows trained on and on those held out.
        train_accuracy, val_accuracy: ``float32 [epochs]``, share of steps whose largest
            feature is the largest in the rebuilt step too; see ``train_detector``.
        errors: ``float32 [s]``, of all windows, by the final reference model.
        labels: ``bool [s]``, those that count as anomalous for the classifier.
        limits: ``float32 [D]``, the error above which, per device.
        device: ``int [s]``, whose each window is.
        folds: the classifier's five-fold cross-validation, ``[5]`` each.
        scores: ``float32 [s]``, of every window by the fold that was not trained on it.
        example: ``(window, rebuilt)`` of a window held out, ``[L, F]`` each.
    """

    train_loss: np.ndarray
    val_loss: np.ndarray
    train_accuracy: np.ndarray
    val_accuracy: np.ndarray
    errors: np.ndarray
    labels: np.ndarray
    limits: np.ndarray
    device: np.ndarray
    folds: Fold
    scores: np.ndarray
    example: tuple[np.ndarray, np.ndarray]


def reconstruction_errors(windows: Array, rebuilt: Array) -> Array:
    """Mean squared error of each window.

    ``E_j = 1 / (L F) sum_tk (s_jtk - s'_jtk)^2``.

    Args:
        windows: ``s [b, L, F]``.
        rebuilt: ``s'``, of the same shape.

    Returns:
        ``float32 [b]``.

    Example:
        >>> windows = jnp.array([[[1.0], [2.0]], [[2.0], [4.0]]])
        >>> rebuilt = jnp.array([[[1.0], [2.0]], [[2.0], [2.0]]])
        >>> reconstruction_errors(windows, rebuilt).tolist()
        [0.0, 2.0]
    """
    return jnp.mean(jnp.square(windows - rebuilt), axis=(1, 2))


def classify(layers: Sequence[tuple[Array, Array]], x: Array) -> Array:
    """Scores of a fully connected network: ReLU between layers, a sigmoid at the end.

    ``h_j = max(0, W_j h_{j-1} + b_j)``, ``a = sigmoid(w h + b)``.

    Args:
        layers: ``(W [in, out], b [out])`` each; the last has one output.
        x: ``[s, in]``.

    Returns:
        ``float32 [s]`` in (0, 1).

    Example:
        >>> one = jnp.ones((1, 1)), jnp.zeros(1)
        >>> classify([one, one], jnp.array([[-5.0], [0.0]])).tolist()
        [0.5, 0.5]
    """
    return jax.nn.sigmoid(_logits(layers, x))


def _logits(layers: Sequence[tuple[Array, Array]], x: Array) -> Array:
    for i, (weights, bias) in enumerate(layers):
        # A sum of products would be a matrix product in tf32 on some devices.
        x = jnp.matmul(x, weights, precision=jax.lax.Precision.HIGHEST) + bias[None]
        if i < len(layers) - 1:
            x = jax.nn.relu(x)
    return x[:, 0]


def _hidden(autoencoder: PyTree) -> int:
    """Units of each direction, from the parameters."""
    return int(autoencoder["Dense_0"]["kernel"].shape[0]) // 2


def rebuild(detector: Detector, windows: Array) -> Array:
    """What the reference model makes of windows ``[b, L, F]``.

    Raises:
        ValueError: windows of another form, or number of features, than it learned.
    """
    features = detector.autoencoder["Dense_0"]["kernel"].shape[1]
    if windows.ndim != 3 or windows.shape[2] != features:
        raise ValueError(
            f"the reference model needs windows [b, L, {features}], of the features "
            f"that it was trained on; got shape {windows.shape}."
        )
    net = Autoencoder(_hidden(detector.autoencoder))
    rebuilt: Any = net.apply({"params": detector.autoencoder}, windows)
    return rebuilt


def window_errors(detector: Detector, windows: Array) -> Array:
    """Reconstruction errors ``float32 [s]`` of windows ``[s, L, F]``, in batches."""

    def errors(batch: Array) -> Array:
        return reconstruction_errors(batch, rebuild(detector, batch))

    return in_batches(errors, windows)[:, 0]


def error_scale(errors: Array, mask: Array | None = None) -> Scale:
    """Mean and standard deviation of the logarithm of a device's errors ``[s]``.

    Example:
        >>> found = error_scale(jnp.exp(jnp.array([1.0, 3.0])))
        >>> float(found.center), float(found.spread)
        (2.0, 1.0)
    """
    if mask is None:
        mask = jnp.ones(errors.shape, bool)
    logs, count = _log(errors), jnp.maximum(mask.sum(), 1)
    center = jnp.where(mask, logs, 0.0).sum() / count
    spread = jnp.sqrt(jnp.where(mask, jnp.square(logs - center), 0.0).sum() / count)
    return Scale(center, jnp.maximum(spread, _LEAST_SPREAD))


def anomaly_scores(detector: Detector, errors: Array, scale: Scale) -> Array:
    """The classifier's scores ``float32 [s]`` of a device's errors ``[s]``.

    It sees ``(log E - center) / spread``, at most what it was trained on: beyond, a
    network may answer anything. An error that is not finite scores 1.
    """
    x = jnp.minimum(_as_input(errors, scale), detector.highest)
    scores = classify(detector.layers, x)
    return jnp.where(jnp.isfinite(errors), scores, 1.0)


def highest_score(detector: Detector) -> float:
    """The largest score of the classifier, looked for on a fine grid of its inputs."""
    x = detector.highest - jnp.linspace(0.0, 20.0, 2001)
    return float(classify(detector.layers, x[:, None]).max())


def _log(errors: Array) -> Array:
    return jnp.log(jnp.maximum(errors, jnp.finfo(jnp.float32).tiny))


def _as_input(errors: Array, scale: Scale) -> Array:
    return ((_log(errors) - scale.center) / scale.spread)[:, None]


def adaptive_threshold(
    scores: Array,
    mask: Array | None = None,
    k: float = 3.0,
    percentile: float = 95.0,
    mix: float = 0.5,
    low: float = 0.5,
    high: float = 0.99,
) -> Array:
    """The threshold of one device: its mean, its spread and a percentile, mixed.

    ``T = clip(mix (mu + k sigma) + (1 - mix) P_q, low, high)`` of the scores of clean
    windows (sigma with ddof 0, percentiles interpolated linearly).

    Args:
        scores: ``[s]``.
        mask: ``bool [s]``, the scores that count; all if None.
        k: how many standard deviations.
        percentile: ``q`` in percent.
        mix: weight of the first term.
        low, high: bounds of T; ``-inf`` and ``inf`` for none.

    Returns:
        ``float32 []``; ``high`` without any score.

    Raises:
        TypeError, ValueError: an option that is no number, or out of range.

    Example:
        >>> scores = jnp.array([0.1, 0.2, 0.3, 0.4, 0.5])
        >>> round(float(adaptive_threshold(scores)), 6)
        0.602132
    """
    k = check_number("adaptive_threshold's k", k)
    percentile = check_number(
        "adaptive_threshold's percentile", percentile, 0, 100, "[]"
    )
    mix = check_number("adaptive_threshold's mix", mix, 0, 1, "[]")
    check_type("adaptive_threshold's low", low, numbers.Real)
    check_type("adaptive_threshold's high", high, numbers.Real)
    if not low <= high:
        raise ValueError(
            f"adaptive_threshold's low must be at most its high; got {low} and {high}."
        )
    if mask is None:
        mask = jnp.ones(scores.shape, bool)
    count = mask.sum()
    mean = jnp.where(mask, scores, 0.0).sum() / jnp.maximum(count, 1)
    square = jnp.where(mask, jnp.square(scores - mean), 0.0).sum()
    sigma = jnp.sqrt(square / jnp.maximum(count, 1))
    ordered = jnp.sort(jnp.where(mask, scores, jnp.inf))
    place = percentile / 100.0 * jnp.maximum(count - 1, 0)
    below = jnp.floor(place).astype(jnp.int32)
    above = jnp.minimum(below + 1, jnp.maximum(count - 1, 0))
    part = place - below
    share = ordered[below] + part * (ordered[above] - ordered[below])
    found = mix * (mean + k * sigma) + (1.0 - mix) * share
    return jnp.where(count > 0, jnp.clip(found, low, high), high)


def error_limits(errors: Array, device: Array, num_devices: int) -> Array:
    """Per device, the error above which a window counts as anomalous, ``[D]``.

    Its logarithm is ``(mu + 3 sigma) / 2 + P95 / 2`` of those of the device's errors:
    ``adaptive_threshold`` without bounds.
    """
    logs = _log(errors)

    def one(number: Array) -> Array:
        own = device == number
        return adaptive_threshold(logs, own, low=-jnp.inf, high=jnp.inf)

    return jnp.exp(jax.vmap(one)(jnp.arange(num_devices)))


def num_held_out(num_windows: int, batch_size: int) -> int:
    """How many windows ``train_detector`` keeps for validation.

    Raises:
        ValueError: too few are left for a batch.

    Example:
        >>> num_held_out(100, batch_size=32)
        20
    """
    held = round(HELD_OUT * num_windows)
    left = num_windows - held
    if held < 1 or left < max(batch_size, FOLDS):
        raise ValueError(
            f"train_detector needs more windows: {num_windows} leave {left} to train "
            f"on, with batch_size={batch_size}. Lower batch_size, shorten the windows "
            "or give more of the series."
        )
    return held


def train_detector(
    key: Array,
    windows: AnyArray,
    device: AnyArray,
    *,
    hidden: int = 64,
    epochs: int = 31,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    layers: Sequence[int] = (32, 16),
    classifier_epochs: int = 500,
    on_epoch: OnEpoch | None = None,
) -> tuple[Detector, Training]:
    """Trains the reference model, then the classifier on its errors.

    1. A fifth of the windows, drawn at random, is held out. A BiLSTM ``Autoencoder`` is
       trained on the others by Adam to the smallest mean squared error.
    2. The errors ``E`` of all windows. Per device, those whose logarithm is above
       ``(mu + 3 sigma) / 2 + P95 / 2`` of its errors' logarithms are the positives.
    3. A classifier of dense layers learns to tell them from ``(log E - center) /
       spread``, per device, by binary cross-entropy (Adam, full batches), from their
       share as its first answer: in five folds, and then on all.

    Windows overlap, so that a window held out shares all but one step with some that
    are not: validation loss says that the optimizer works, and nothing about another
    day. The same goes for the folds, and their task is easy besides: a positive is
    defined by the very error that the classifier sees.

    Args:
        key: a typed PRNG key.
        windows: clean ones, ``float32 [s, L, F]``.
        device: ``int [s]``, whose each is, from 0.
        hidden: units of each direction.
        epochs: of the reference model; the paper's figure 8 has 31.
        batch_size: windows a step, at most those trained on.
        learning_rate: of the reference model; the classifier's is ten times it.
        layers: widths of the classifier's hidden layers.
        classifier_epochs: its steps.
        on_epoch: called after each of the reference model's epochs with its number,
            from 1, and the losses of the windows trained on and of those held out.

    Returns:
        The ``Detector``, and the ``Training`` as NumPy arrays. Its accuracies are the
        share of steps at which the largest feature of the window is the largest of the
        rebuilt one: what Keras reports as "accuracy" of outputs with several features,
        and so perhaps the paper's 95 %.

    Raises:
        TypeError, ValueError: an option out of range, windows that are not finite
            ``[s, L, F]``, too large or too few, a training that diverged, no window
            that stands out, or a classifier that has not learned to tell any.

    Example:
        >>> windows = np.random.default_rng(0).normal(size=(50, 6, 1))
        >>> detector, training = train_detector(
        ...     jax.random.key(0), windows.astype(np.float32), np.zeros(50, int),
        ...     hidden=4, epochs=2)
        >>> scale = error_scale(jnp.asarray(training.errors))
        >>> anomaly_scores(detector, jnp.array([0.1, 9.0]), scale).shape
        (2,)
        >>> training.val_loss.shape, training.folds.val_accuracy.shape
        ((2,), (5,))

    References:
        "FedSecure, an adaptive anomaly detection and poisoning attack mitigation
        framework for IoMT, using hybrid deep learning models", sections V and VII.

    Differs from the paper: it gives no layer sizes, rates or batch, and defines the
    error both as a norm and as a mean over features; here it is the mean over the
    window. Positives are by its "integrated" limit of mean, standard deviation and
    percentile, whose formula it does not give; here of logarithms. Errors have long
    tails, so that a limit on the errors themselves lies far out for some devices and
    not for others: what is anomalous for one is then normal for another at the same
    distance from the usual, and the classifier let gross poisoning pass. It says that
    the classifier adapts to each device and not how; here it sees the error relative
    to the device's own.
    """
    hidden = check_count("hidden", hidden, 1)
    epochs = check_count("epochs", epochs, 1)
    batch_size = check_count("batch_size", batch_size, 1)
    learning_rate = check_number("learning_rate", learning_rate, 0)
    widths = [check_count("layers", width, 1) for width in layers]
    classifier_epochs = check_count("classifier_epochs", classifier_epochs, 1)
    x = jnp.asarray(windows, jnp.float32)
    device = np.asarray(device)
    whole = np.issubdtype(device.dtype, np.integer) and (device >= 0).all()
    if x.ndim != 3 or device.shape != x.shape[:1] or not whole:
        raise ValueError(
            "train_detector needs windows [s, L, F] and a device [s] for each, "
            f"numbered from 0; got shapes {x.shape} and {device.shape} {device.dtype}."
        )
    if not np.isfinite(np.asarray(x)).all():
        raise ValueError(
            "train_detector needs finite windows; got a NaN or infinity. Leave out the "
            "windows with samples that are missing."
        )
    size = float(jnp.square(x).mean(axis=(1, 2)).max())
    if not np.isfinite(size):
        raise ValueError(
            "the mean square of some windows is beyond float32. Standardise the series "
            "that they are cut from."
        )
    split_key, net_key, fit_key, fold_key, final_key = jax.random.split(key, 5)
    order = jax.random.permutation(split_key, len(x))
    held = num_held_out(len(x), batch_size)
    val, train = x[order[:held]], x[order[held:]]
    params, curves = _fit_autoencoder(
        *(net_key, fit_key, train, val, hidden, epochs, batch_size, learning_rate),
        on_epoch,
    )
    errors = jax.jit(window_errors)(Detector(params, (), jnp.zeros(())), x)
    worst = float(errors.max())
    # To rebuild everything as 0 would be an error of ``size`` at most.
    if not worst <= DIVERGED * max(size, 1.0):
        raise ValueError(
            f"the reference model diverged: its largest error is {worst:g}, of windows "
            f"with a mean square of {size:g} at most, with learning_rate="
            f"{learning_rate:g}. Lower learning_rate."
        )
    num_devices = int(device.max()) + 1
    limits = error_limits(errors, jnp.asarray(device), num_devices)
    labels = errors > limits[device]
    if not labels.any():
        raise ValueError(
            f"none of the {len(x)} windows stands out from the others of its device, "
            "so that the classifier has nothing to learn and would flag nobody: they "
            "are all alike, or too few, or rebuilt too badly. Give more of the series, "
            "or train for more epochs."
        )
    own = jax.vmap(lambda d: error_scale(errors, jnp.asarray(device) == d))
    scales = own(jnp.arange(num_devices))
    inputs = _as_input(errors, jax.tree.map(lambda x: x[device], scales))

    fold = np.arange(len(x)) % FOLDS
    fold = np.asarray(jax.random.permutation(fold_key, jnp.asarray(fold)))
    settings = (tuple(widths), classifier_epochs, learning_rate)
    # The last one is trained on all.
    used = jnp.asarray(fold[None] != np.arange(FOLDS + 1)[:, None])

    @jax.jit
    def classifiers(keys: Array) -> Any:
        def one(key: Array, weight: Array) -> Any:
            layers = _fit_classifier(key, inputs, labels, weight, *settings)
            return layers, _judge(layers, inputs, labels, weight)

        return jax.vmap(one)(keys, used)

    trained, judged = classifiers(jax.random.split(final_key, FOLDS + 1))
    final = jax.tree.map(lambda x: x[FOLDS], trained)
    folds, scores = jax.tree.map(lambda x: x[:FOLDS], judged)
    # Scores that are NaN would be above no threshold: nobody would ever be flagged.
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(final)):
        raise ValueError(
            "the classifier diverged: its parameters are not finite, with "
            f"learning_rate={learning_rate:g}. Lower learning_rate."
        )
    detector = Detector(params, final, inputs.max())
    if not highest_score(detector) > 0.5:
        raise ValueError(
            f"the classifier scores no error above {highest_score(detector):.3g}, so "
            "that nobody would ever be flagged: it has not learned to tell the "
            f"{int(labels.sum())} of {len(x)} windows that are anomalous, with "
            f"classifier_epochs={classifier_epochs} and ten times learning_rate="
            f"{learning_rate:g}. Raise classifier_epochs, or change learning_rate."
        )
    shown = val[:1]
    training = Training(
        **curves,
        errors=np.asarray(errors),
        labels=np.asarray(labels),
        limits=np.asarray(limits),
        device=device,
        folds=jax.tree.map(np.asarray, folds),
        scores=np.asarray(scores)[fold, np.arange(len(x))],
        example=(np.asarray(shown[0]), np.asarray(rebuild(detector, shown)[0])),
    )
    return detector, training


def _fit_autoencoder(
    net_key: Array,
    key: Array,
    train: Array,
    val: Array,
    hidden: int,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    on_epoch: OnEpoch | None,
) -> tuple[PyTree, dict[str, np.ndarray]]:
    """Parameters, and losses and accuracies of the ``epochs``, one program for each."""
    net, optimizer = Autoencoder(hidden), optax.adam(learning_rate)
    steps = len(train) // batch_size

    def loss_of(params: PyTree, windows: Array) -> Array:
        rebuilt: Any = net.apply({"params": params}, windows)
        return reconstruction_errors(windows, rebuilt).mean()

    def measure(params: PyTree, windows: Array) -> tuple[Array, Array]:
        def batch(chosen: Array) -> Array:
            rebuilt: Any = net.apply({"params": params}, chosen)
            same = jnp.argmax(rebuilt, axis=2) == jnp.argmax(chosen, axis=2)
            errors = reconstruction_errors(chosen, rebuilt)
            return jnp.stack([errors, same.mean(axis=1)], axis=1)

        loss, same = in_batches(batch, windows).mean(axis=0)
        return loss, same

    @jax.jit
    def epoch(
        carry: PyTree, key: Array, train: Array, val: Array
    ) -> tuple[PyTree, dict[str, Array]]:
        order = jax.random.permutation(key, len(train))[: steps * batch_size]

        def step(carry: PyTree, rows: Array) -> tuple[PyTree, None]:
            params, state = carry
            grad = jax.grad(loss_of)(params, train[rows])
            moved, state = optimizer.update(grad, state)
            return (optax.apply_updates(params, moved), state), None

        carry, _ = jax.lax.scan(step, carry, order.reshape(steps, batch_size))
        found: dict[str, Array] = {}
        for name, windows in (("train", train), ("val", val)):
            loss, same = measure(carry[0], windows)
            found |= {f"{name}_loss": loss, f"{name}_accuracy": same}
        return carry, found

    params = jax.jit(net.init)(net_key, train[:1])["params"]
    carry, curves = (params, optimizer.init(params)), []
    for number, own in enumerate(jax.random.split(key, epochs), start=1):
        carry, found = epoch(carry, own, train, val)
        curves.append(jax.tree.map(np.asarray, found))
        if on_epoch is not None:
            on_epoch(number, *(float(found[f"{n}_loss"]) for n in ("train", "val")))
    return carry[0], {name: np.stack([c[name] for c in curves]) for name in curves[0]}


def _fit_classifier(
    key: Array,
    x: Array,
    labels: Array,
    weight: Array,
    widths: tuple[int, ...],
    epochs: int,
    learning_rate: float,
) -> tuple[tuple[Array, Array], ...]:
    """A classifier trained on the samples where ``weight`` is True."""
    optimizer = optax.adam(10 * learning_rate)
    sizes = [x.shape[1], *widths, 1]
    keys = jax.random.split(key, len(sizes) - 1)
    he = jax.nn.initializers.he_normal()
    # The first answer to everything is the share of positives, which are few. From 0
    # all layers would be driven down to it, and ReLUs that die on the way leave some
    # keys with one score near 0.5 for every large error.
    share = (jnp.where(weight, labels, False).sum() + 1) / (weight.sum() + 2)
    biases = [*map(jnp.zeros, widths), jax.scipy.special.logit(share)[None]]
    layers = tuple(
        (he(k, shape), bias)
        for k, shape, bias in zip(keys, itertools.pairwise(sizes), biases)
    )

    def step(carry: PyTree, _: None) -> tuple[PyTree, None]:
        layers, state = carry
        grad = jax.grad(_cross_entropy)(layers, x, labels, weight)
        moved, state = optimizer.update(grad, state)
        return (optax.apply_updates(layers, moved), state), None

    carry = layers, optimizer.init(layers)
    (layers, _), _ = jax.lax.scan(step, carry, None, length=epochs)
    return layers


def _cross_entropy(layers: PyTree, x: Array, labels: Array, weight: Array) -> Array:
    losses = optax.sigmoid_binary_cross_entropy(_logits(layers, x), labels)
    return jnp.where(weight, losses, 0.0).sum() / jnp.maximum(weight.sum(), 1)


def _judge(layers: PyTree, x: Array, labels: Array, used: Array) -> tuple[Fold, Array]:
    scores = classify(layers, x)
    right = ((scores > 0.5) == labels).astype(jnp.float32)

    def accuracy(weight: Array) -> Array:
        return jnp.where(weight, right, 0.0).sum() / jnp.maximum(weight.sum(), 1)

    parts = []
    for weight in (used, ~used):
        parts += [accuracy(weight), _cross_entropy(layers, x, labels, weight)]
    return Fold(*parts), scores
