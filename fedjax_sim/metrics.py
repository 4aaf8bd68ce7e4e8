"""What is measured in a run: pure functions for inside the scan and for the user."""

from typing import NamedTuple

import jax.numpy as jnp

from fedjax_sim.types import Array


def accuracy(outputs: Array, targets: Array) -> Array:
    """Share of samples whose largest output is that of their class.

    ``mean_i [argmax_c outputs_ic = targets_i]``. Ties go to the lowest class, and a NaN
    counts as the largest output, so a diverged model scores about chance level.

    Args:
        outputs: ``[s, classes]``, logits or probabilities.
        targets: integers ``[s]``.

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
    if outputs.ndim != 2 or targets.shape != outputs.shape[:1]:
        raise ValueError(
            "accuracy needs outputs [s, classes] and targets [s]; got shapes "
            f"{outputs.shape} and {targets.shape}."
        )
    return jnp.mean(jnp.argmax(outputs, axis=-1) == targets, dtype=jnp.float32)


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
        tpr=_rate(true_positives, num_byzantine),
        fpr=_rate(false_positives, num_honest),
        fnr=_rate(num_byzantine - true_positives, num_byzantine),
    )


def _rate(part: Array, whole: Array) -> Array:
    """``part / whole`` in float32, NaN where ``whole`` is 0."""
    share = part.astype(jnp.float32) / jnp.maximum(whole, 1).astype(jnp.float32)
    return jnp.where(whole > 0, share, jnp.nan)
