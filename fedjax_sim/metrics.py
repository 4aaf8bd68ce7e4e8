"""What is measured in a run: pure functions for inside the scan and for the user."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sim.types import Array


def accuracy(outputs: Array, targets: Array) -> Array:
    """Share of samples, or of their labels, that the model tells right.

    ``mean_i correct_i``; see ``correct``.

    Args:
        outputs: logits ``[s, L]``.
        targets: integers ``[s]``, or 0 and 1 ``[s, L]``.

    Returns:
        ``float32 []``; NaN without samples.

    Raises:
        ValueError: while tracing, where the shapes do not belong together.

    Example:
        >>> import jax.numpy as jnp
        >>> outputs = jnp.array([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0], [0.0, 1.0]])
        >>> float(accuracy(outputs, jnp.array([0, 1, 1, 1])))
        0.75
    """
    _check_shapes("accuracy", outputs, targets)
    return jnp.mean(correct(outputs, targets))


def correct(outputs: Array, targets: Array) -> Array:
    """How right the model is on each sample, from 0 to 1.

    With one label a sample, whether its largest output is that of its class,
    ``[argmax_c outputs_ic = y_i]``. Ties go to the lowest class, and a NaN counts as
    the largest output, so a diverged model scores about chance level. With any number
    of labels, the share of them told right, ``mean_l [(outputs_il > 0) = y_il]``.

    Args:
        outputs: logits ``[s, L]``.
        targets: integers ``[s]``, or 0 and 1 ``[s, L]``.

    Returns:
        ``float32 [s]``.

    Raises:
        ValueError: while tracing, where the shapes do not belong together.

    Example:
        >>> import jax.numpy as jnp
        >>> outputs = jnp.array([[2.0, -1.0], [0.0, 3.0]])
        >>> correct(outputs, jnp.array([0, 0])).tolist()
        [1.0, 0.0]
        >>> correct(outputs, jnp.array([[1, 1], [0, 1]])).tolist()
        [0.5, 1.0]
    """
    _check_shapes("correct", outputs, targets)
    if targets.ndim == 1:
        return (jnp.argmax(outputs, axis=-1) == targets).astype(jnp.float32)
    return jnp.mean((outputs > 0) == (targets > 0), axis=-1, dtype=jnp.float32)


def class_recall(outputs: Array, targets: Array) -> Array:
    """Share of the samples of each class that the model gives it: its sensitivity.

    ``recall_c = #{i: y_i = c, argmax_j outputs_ij = c} / #{i: y_i = c}``; where a
    sample has any number of labels, ``#{i: y_ic = 1, outputs_ic > 0} / #{i: y_ic =
    1}``. With one label a sample, its mean weighted with the samples of each class is
    the accuracy.

    Args:
        outputs: logits ``[s, L]``.
        targets: integers ``[s]``, or 0 and 1 ``[s, L]``.

    Returns:
        ``float32 [L]``; NaN for a class without samples.

    Raises:
        ValueError: while tracing, where the shapes do not belong together.

    Example:
        >>> import jax.numpy as jnp
        >>> outputs = jnp.array([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0], [0.0, 1.0]])
        >>> class_recall(outputs, jnp.array([0, 1, 1, 1])).tolist()
        [1.0, 0.6666666865348816]
    """
    _check_shapes("class_recall", outputs, targets)
    said, truth = _indicators(outputs, targets)
    return rate(_count(said & truth), _count(truth))


def class_specificity(outputs: Array, targets: Array) -> Array:
    """Share of the samples not of a class that the model does not give it.

    ``specificity_c = #{i: y_i != c, argmax_j outputs_ij != c} / #{i: y_i != c}``; where
    a sample has any number of labels, ``#{i: y_ic = 0, outputs_ic <= 0} / #{i: y_ic =
    0}``. Of two classes, that of one is the recall of the other.

    Args:
        outputs: logits ``[s, L]``.
        targets: integers ``[s]``, or 0 and 1 ``[s, L]``.

    Returns:
        ``float32 [L]``; NaN for a class that all samples have.

    Raises:
        ValueError: while tracing, where the shapes do not belong together.

    Example:
        >>> import jax.numpy as jnp
        >>> outputs = jnp.array([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0], [0.0, 1.0]])
        >>> class_specificity(outputs, jnp.array([0, 1, 1, 1])).tolist()
        [0.6666666865348816, 1.0]
    """
    _check_shapes("class_specificity", outputs, targets)
    said, truth = _indicators(outputs, targets)
    return rate(_count(~said & ~truth), _count(~truth))


def balanced_accuracy(outputs: Array, targets: Array) -> Array:
    """Accuracy with every class counting alike, however rare it is.

    With one label a sample, ``mean_c recall_c``; of two classes this is ``(sensitivity
    + specificity) / 2``. With any number of labels, ``mean_l (recall_l +
    specificity_l) / 2``. Saying the same of every sample gives ``1 / L``, or 1/2.

    Args:
        outputs: logits ``[s, L]``.
        targets: integers ``[s]``, or 0 and 1 ``[s, L]``.

    Returns:
        ``float32 []``. Classes that no sample has (and labels that all have) are left
        out; NaN where none is left.

    Raises:
        ValueError: while tracing, where the shapes do not belong together.

    Example:
        >>> import jax.numpy as jnp
        >>> outputs = jnp.array([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0], [0.0, 1.0]])
        >>> float(balanced_accuracy(outputs, jnp.array([0, 1, 1, 1])))
        0.8333333730697632

    References:
        Brodersen, Ong, Stephan, Buhmann, "The balanced accuracy and its posterior
        distribution", ICPR 2010.
    """
    _check_shapes("balanced_accuracy", outputs, targets)
    rates = class_recall(outputs, targets)
    if targets.ndim == 2:
        rates = (rates + class_specificity(outputs, targets)) / 2
    return jnp.nanmean(rates)


def auc(outputs: Array, targets: Array) -> Array:
    """Area under the ROC curve, each class against the rest, mean over classes.

    ``AUC_c = P(s_i > s_j) + P(s_i = s_j) / 2`` for a sample i of class c and a sample j
    of none: the probability that the model ranks them rightly. The score ``s`` is the
    log-odds of the class, ``outputs_c - log sum_{j != c} exp(outputs_j)``, or the
    output itself where a sample has any number of labels. It does not depend on a
    threshold, nor on how rare a class is. Of two classes both have the same AUC.

    Cost: O(L s log s).

    Args:
        outputs: logits ``[s, L]``.
        targets: integers ``[s]``, or 0 and 1 ``[s, L]``.

    Returns:
        ``float32 []``. Classes that no sample has, or all have, are left out of the
        mean; NaN where none is left, or where an output is not finite.

    Raises:
        ValueError: while tracing, where the shapes do not belong together.

    Example:
        >>> import jax.numpy as jnp
        >>> outputs = jnp.array([[0.0, 1.0], [0.0, 2.0], [0.0, 2.0], [0.0, 3.0]])
        >>> float(auc(outputs, jnp.array([0, 0, 1, 1])))
        0.875

    References:
        Fawcett, "An introduction to ROC analysis", Pattern Recognition Letters 2006.

        Hand and Till, "A simple generalisation of the area under the ROC curve for
        multiple class classification problems", Machine Learning 2001.
    """
    _check_shapes("auc", outputs, targets)
    _, truth = _indicators(outputs, targets)
    scores = outputs.astype(jnp.float32)
    if targets.ndim == 1 and scores.shape[-1] == 2:
        scores, truth = scores[:, 1:] - scores[:, :1], truth[:, 1:]
    elif targets.ndim == 1:
        scores = _log_odds(scores)
    each = jax.vmap(_auc_of_one, in_axes=1)(scores, truth)
    known = jnp.isfinite(each)
    mean = jnp.where(known, each, 0.0).sum() / jnp.maximum(known.sum(), 1)
    return jnp.where(known.any() & jnp.isfinite(outputs).all(), mean, jnp.nan)


def _log_odds(outputs: Array) -> Array:
    """``outputs_c - log sum_{j != c} exp(outputs_j)``, ``[s, L]``."""
    largest = outputs.max(axis=-1, keepdims=True)
    share = jnp.exp(outputs - largest)
    top = jnp.arange(outputs.shape[-1])[None] == jnp.argmax(outputs, axis=-1)[:, None]
    # The largest term is not subtracted from the sum, which would leave nothing but
    # rounding: the others are summed anew, beside the largest of them.
    below = jnp.where(top, -jnp.inf, outputs)
    of_top = jax.nn.logsumexp(below, axis=-1, keepdims=True)
    rest = jnp.where(top, 1.0, share.sum(axis=-1, keepdims=True) - share)
    return outputs - jnp.where(top, of_top, largest + jnp.log(rest))


def _auc_of_one(scores: Array, positive: Array) -> Array:
    """``P(s+ > s-) + P(s+ = s-) / 2`` of scores ``[s]``; NaN without either kind."""
    scores, positive = jax.lax.sort(
        (scores, positive.astype(jnp.float32)), num_keys=1, is_stable=False
    )
    # Negatives up to each place; float32 counts exactly up to 16 million samples.
    negatives = jnp.concatenate([jnp.zeros(1), jnp.cumsum(1.0 - positive)])
    below = negatives[jnp.searchsorted(scores, scores, side="left")]
    upto = negatives[jnp.searchsorted(scores, scores, side="right")]
    num_positive, num_negative = positive.sum(), negatives[-1]
    # A mean of shares: the number of pairs itself may exceed float32.
    share = (below + upto) / 2 / jnp.maximum(num_negative, 1.0)
    mean = (positive * share).sum() / jnp.maximum(num_positive, 1.0)
    return jnp.where((num_positive > 0) & (num_negative > 0), mean, jnp.nan)


def attack_success(
    outputs: Array, wanted: Array, counts: Array, multilabel: bool = False
) -> Array:
    """Share of the counted samples on which the model says what the attacker wants.

    ``mean_{i: counts_i} [argmax_c outputs_ic = wanted_i]``, with what a
    ``DataAttack.trigger`` gives: outputs on its inputs, its ``wanted`` and ``counts``.
    Where a sample may have any number of labels, ``[outputs_ic > 0]`` for ``c =
    wanted_i``.

    Args:
        outputs: logits ``[s, L]`` on the inputs with the trigger.
        wanted: integers ``[s]``.
        counts: ``bool [s]``, the samples that count.
        multilabel: whether a sample may have any number of labels.

    Returns:
        ``float32 []``; NaN where no sample counts.

    Raises:
        ValueError: while tracing, where the shapes do not belong together.

    Example:
        >>> import jax.numpy as jnp
        >>> outputs = jnp.array([[2.0, 1.0], [0.0, 3.0], [0.0, 1.0]])
        >>> wanted, counts = jnp.array([1, 1, 1]), jnp.array([True, True, False])
        >>> float(attack_success(outputs, wanted, counts))
        0.5
    """
    _check_shapes("attack_success", outputs, wanted)
    if multilabel:
        hit = jnp.take_along_axis(outputs, wanted[:, None], axis=1)[:, 0] > 0
    else:
        hit = jnp.argmax(outputs, axis=-1) == wanted
    return rate(_count(counts & hit), _count(counts))


class WorstCase(NamedTuple):
    """The lowest accuracy over attacks, ``float [...]``, and whose it is, names."""

    accuracy: np.ndarray
    attack: np.ndarray


def worst_case(accuracies: Mapping[str, Any]) -> WorstCase:
    """The lowest accuracy over attacks, and the attack it is under.

    ``min_a accuracy_a``, element by element. A rule is as good as it is under the
    attack it withstands least. For the user's results, not for inside jit.

    Args:
        accuracies: name of the attack -> array; all of one shape, such as rounds, or
            seeds and rounds.

    Returns:
        Arrays of that shape. Of attacks that tie, the first is named. Where an accuracy
        is NaN (not evaluated) the worst case is not known: NaN, and no name.

    Raises:
        ValueError: no attack, or arrays of different shape.

    Example:
        >>> worst = worst_case({"sign_flip": [0.9, 0.2], "alie": [0.5, 0.6]})
        >>> worst.accuracy.tolist(), worst.attack.tolist()
        ([0.5, 0.2], ['alie', 'sign_flip'])
    """
    if not accuracies:
        raise ValueError("worst_case needs the accuracies under one attack at least.")
    names = list(accuracies)
    arrays = [np.asarray(accuracies[name], np.float64) for name in names]
    shapes = {name: array.shape for name, array in zip(names, arrays)}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"worst_case needs arrays of one shape; got {shapes}.")
    stacked = np.stack(arrays)
    lowest = stacked.min(axis=0)
    attack = np.array(names)[stacked.argmin(axis=0)]
    return WorstCase(lowest, np.where(np.isnan(lowest), "", attack))


def _indicators(outputs: Array, targets: Array) -> tuple[Array, Array]:
    """Who the model says is of each class, and who is: both ``bool [s, L]``."""
    if targets.ndim == 2:
        return outputs > 0, targets > 0
    classes = jnp.arange(outputs.shape[-1])[None]
    said = jnp.argmax(outputs, axis=-1)[:, None] == classes
    return said, targets[:, None] == classes


def _count(chosen: Array) -> Array:
    return jnp.sum(chosen, axis=0, dtype=jnp.int32)


def _check_shapes(who: str, outputs: Array, targets: Array) -> None:
    one_label = outputs.ndim == 2 and targets.shape == outputs.shape[:1]
    if not one_label and not (outputs.ndim == 2 and targets.shape == outputs.shape):
        raise ValueError(
            f"{who} needs outputs [s, classes] and targets [s], or [s, classes] of 0 "
            f"and 1; got shapes {outputs.shape} and {targets.shape}."
        )


class Detection(NamedTuple):
    """How well a rule told Byzantine from honest clients in one round.

    Attributes:
        num_byzantine: ``int32 []``, Byzantine clients in the cohort.
        num_flagged: ``int32 []``, clients the rule rejected.
        true_positives: ``int32 []``, Byzantine clients rejected.
        false_positives: ``int32 []``, honest clients rejected.
        tpr: ``float32 []``, detection rate: rejected share of the Byzantine clients.
        fpr: ``float32 []``, **false alarm rate**: rejected share of the honest clients.
        fnr: ``float32 []``, **missing alarm rate**: share of the Byzantine clients that
            was not rejected, ``1 - tpr``.
    """

    num_byzantine: Array
    num_flagged: Array
    true_positives: Array
    false_positives: Array
    tpr: Array
    fpr: Array
    fnr: Array


def detection(
    flagged: Array, byzantine: Array, present: Array | None = None
) -> Detection:
    """Counts and rates of a rule's decisions in one round.

    ``tpr = TP / #byzantine``, ``fpr = FP / #honest`` (false alarm rate) and
    ``fnr = 1 - tpr`` (missing alarm rate). A rate is NaN where it is undefined: ``tpr``
    and ``fnr`` without a Byzantine client in the cohort, ``fpr`` without an honest one.

    Args:
        flagged: ``bool [k]``, clients the rule rejected.
        byzantine: ``bool [k]``, clients that are Byzantine.
        present: ``bool [k]``, clients that take part; all if None. The others are not
            counted anywhere.

    Returns:
        A ``Detection`` of scalars. Map it with ``jax.vmap`` over rounds or seeds.

    Example:
        >>> import jax.numpy as jnp
        >>> flagged = jnp.array([True, False, True, False])
        >>> byzantine = jnp.array([True, True, False, False])
        >>> found = detection(flagged, byzantine)
        >>> int(found.true_positives), float(found.tpr), float(found.fpr)
        (1, 0.5, 0.5)
    """
    if present is None:
        present = jnp.ones_like(byzantine)

    def count(rows: Array) -> Array:
        return jnp.sum(present & rows, dtype=jnp.int32)

    num_byzantine, num_honest = count(byzantine), count(~byzantine)
    true_positives, false_positives = (
        count(flagged & byzantine),
        count(flagged & ~byzantine),
    )
    return Detection(
        num_byzantine=num_byzantine,
        num_flagged=count(flagged),
        true_positives=true_positives,
        false_positives=false_positives,
        tpr=rate(true_positives, num_byzantine),
        fpr=rate(false_positives, num_honest),
        fnr=rate(num_byzantine - true_positives, num_byzantine),
    )


def rate(part: Array, whole: Array) -> Array:
    """``part / whole`` in float32, NaN where ``whole`` is 0."""
    share = part.astype(jnp.float32) / jnp.maximum(whole, 1).astype(jnp.float32)
    return jnp.where(whole > 0, share, jnp.nan)
