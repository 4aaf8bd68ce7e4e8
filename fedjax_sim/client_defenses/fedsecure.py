"""FedSecure: a device whose own series looks poisoned stays out of the round."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sim.client_defenses.reference_model import (
    Detector,
    Scale,
    adaptive_threshold,
    anomaly_scores,
    error_scale,
    highest_score,
    window_errors,
)
from fedjax_sim.registry import check_count, check_number, check_type, require
from fedjax_sim.types import (
    AnyArray,
    Array,
    ClientData,
    ClientDefense,
    Clients,
    MakeSamples,
    RoundContext,
)

# Relative: a quotient may be off by a few units in its last place, on a GPU above all,
# and a share of exactly phi must stay.
_ROUNDING = 1e-6


class Calibration(NamedTuple):
    """What every device knows of itself, from clean data.

    Attributes:
        scale: of its errors, ``float32 [N]`` each.
        thresholds: ``T_i``, ``float32 [N]``.
    """

    scale: Scale
    thresholds: Array


class Screening(NamedTuple):
    """What a device finds in its own windows.

    Attributes:
        excluded: ``bool []``, whether it stays out.
        flagged_share: ``float32 []``, of its windows, those above its threshold.
        score: ``float32 []``, mean anomaly score.
        error: ``float32 []``, mean reconstruction error.
        score_change: ``float32 []``, between its first and its last window.
    """

    excluded: Array
    flagged_share: Array
    score: Array
    error: Array
    score_change: Array


class FedSecureState(NamedTuple):
    """What the devices know: the detector, and what is their own.

    Attributes:
        detector: the same for all.
        own: ``[N]``.
        last: what the last screening found, ``[N]`` each.
    """

    detector: Detector
    own: Calibration
    last: Screening


def fedsecure(
    detector: Detector,
    calibration: Calibration,
    max_flagged: float = 0.1,
    every: int | None = 1,
    adapt: float = 0.0,
) -> ClientDefense:
    """Devices screen their own series; one with too many odd windows stays out.

    Device i has windows ``s_j`` (of ``Simulation.make_samples``), a reference model
    that rebuilds them as ``s'_j``, a classifier and its own threshold ``T_i``::

        E_j = mean (s_j - s'_j)^2,   z_j = min((log E_j - center_i) / spread_i, z_max)
        a_j = classifier(z_j),       or 1 where E_j is not finite
        A_j = [a_j > T_i]
        device i is excluded from the round  iff  mean_j A_j > phi

    with ``z_max`` the largest that the classifier was trained on, and ``phi`` the
    ``max_flagged``. An excluded device trains on nothing and sends nothing, which saves
    its update's bytes. A device without any window is not excluded, and has no part
    either.

    Threat model: attackers poison their own series and then follow the protocol; the
    screening runs on the device, so that an attacker who does not let it run is not
    stopped. Nothing is learned from other devices, and the server needs no data in the
    run; the reference model, the classifier and the thresholds come from clean data
    before it (``train_detector``, ``calibrate``).

    Cost: O(T network) per screened device of T windows. Memory: its windows, and the
    states of 500 of them, for one device at a time.

    Args:
        detector: from ``train_detector``.
        calibration: of every device, from ``calibrate``.
        max_flagged: ``phi`` in [0, 1): the share of windows above which a device is
            excluded. 0: a single window is enough.
        every: screen anew every so many rounds; None for once, in round 0, which finds
            the same where neither series nor thresholds change. A run forked later has
            no round 0: leave it at 1 there. With 1 the devices of the round are
            screened, else all N.
        adapt: in [0, 1]: how far a device that was not excluded moves its threshold,
            after each screening, to that of its present scores (``T_i <- (1 - adapt)
            T_i + adapt T(a)``, by the defaults of ``adaptive_threshold``). 0 leaves
            the thresholds as they are. A patient attacker can lead a threshold that
            adapts.

    Returns:
        A ``ClientDefense``. Info: the fields of ``Screening`` and ``threshold``, the
        one that was applied. State: ``FedSecureState``.

    Raises:
        TypeError: ``detector`` is none, or an option of another type.
        ValueError: an option out of range; a calibration that is not finite, of unequal
            lengths or with a spread of 0; in ``validate``, one of another number of
            clients.

    Example:
        >>> windows = np.random.default_rng(0).normal(size=(40, 6, 1))
        >>> windows[7] *= 9.0  # one that stands out
        >>> from fedjax_sim.client_defenses import train_detector
        >>> detector, _ = train_detector(
        ...     jax.random.key(0), windows, np.zeros(40, int), hidden=4, epochs=30)
        >>> own = Scale(jnp.zeros(1), jnp.ones(1)), jnp.array([0.9])
        >>> defense = fedsecure(detector, Calibration(*own))
        >>> far = ClientData(jnp.asarray(windows) + 9.0, jnp.zeros(40, int), None)
        >>> state = defense.init(jnp.ones((1, 40), bool))
        >>> round_0 = RoundContext(round=0, client_ids=jnp.arange(1))
        >>> keep, _, info = defense.apply(lambda id: far, state, round_0)
        >>> bool(keep.any()), info["excluded"].tolist()
        (False, [True])

    References:
        "FedSecure, an adaptive anomaly detection and poisoning attack mitigation
        framework for IoMT, using hybrid deep learning models", algorithm 1.

    Differs from the paper: its algorithm excludes a device above a share of flagged
    windows that it does not give, its text at the first flagged window
    (``max_flagged=0``). How its thresholds follow from mean, standard deviation and
    percentile it does not say: see ``adaptive_threshold``. What the classifier sees and
    which windows count as anomalous for it are ours: see ``train_detector``. Its third
    statistic, the difference of first and last score, is reported and decides nothing.
    """
    check_type("detector", detector, Detector, "Train one: train_detector(...).")
    check_type("calibration", calibration, Calibration, "Make it: calibrate(...).")
    own = jax.tree.map(lambda x: np.asarray(x, np.float32), calibration)
    num_devices = np.size(own.thresholds)
    for path, values in jax.tree_util.tree_leaves_with_path(own):
        if values.shape != (num_devices,) or not np.isfinite(values).all():
            raise ValueError(
                "fedsecure's calibration must have a finite number for each client; "
                f"got {jax.tree_util.keystr(path)} of shape {values.shape}, "
                f"{int((~np.isfinite(values)).sum())} of them not finite. Take it from "
                "calibrate."
            )
    if not (own.scale.spread > 0).all():
        raise ValueError(
            "fedsecure's calibration must have a scale above 0 for each client; got "
            f"{own.scale.spread.min():g}. Take it from calibrate."
        )
    max_flagged = check_number("fedsecure's max_flagged", max_flagged, 0, 1, "[)")
    every = None if every is None else check_count("fedsecure's every", every, 1)
    adapt = check_number("fedsecure's adapt", adapt, 0, 1, "[]")

    def init(mask: Array) -> FedSecureState:
        zeros = jnp.zeros(len(mask), jnp.float32)
        nothing = Screening(jnp.zeros(len(mask), bool), zeros, zeros, zeros, zeros)
        return FedSecureState(detector, jax.tree.map(jnp.asarray, own), nothing)

    def validate(sizes: np.ndarray, targets: np.ndarray, num_classes: int) -> None:
        if len(sizes) != num_devices:
            raise ValueError(
                f"fedsecure is calibrated for {num_devices} clients; the run has "
                f"{len(sizes)}. Calibrate it on the devices of the run."
            )

    def screen_all(
        gather: Callable[[Array], ClientData], state: FedSecureState, ids: Array
    ) -> FedSecureState:
        def one(id: Array) -> tuple[Screening, Array]:
            data, known = gather(id), jax.tree.map(lambda x: x[id], state.own)
            limit = known.thresholds
            scores, errors = screen(state.detector, data, known.scale)
            found = judge(scores, errors, data.valid, limit, max_flagged)
            moved = limit
            if adapt:
                present = adaptive_threshold(scores, data.valid)
                moved = (1.0 - adapt) * limit + adapt * present
            stays = found.excluded | ~data.valid.any()
            return found, jnp.where(stays, limit, moved)

        found, moved = jax.lax.map(one, ids)
        last = jax.tree.map(lambda x, new: x.at[ids].set(new), state.last, found)
        limits = state.own.thresholds.at[ids].set(moved)
        return state._replace(own=state.own._replace(thresholds=limits), last=last)

    def apply(
        gather: Callable[[Array], ClientData],
        state: FedSecureState,
        context: RoundContext,
    ) -> tuple[Array, FedSecureState, dict[str, Array]]:
        round = require("fedsecure", context, "round")
        ids = require("fedsecure", context, "client_ids")
        before = state.own.thresholds[ids]
        if every == 1:
            state = screen_all(gather, state, ids)
        else:
            due = round == 0 if every is None else round % every == 0
            everybody = jnp.arange(num_devices)
            state = jax.lax.cond(
                due, lambda s: screen_all(gather, s, everybody), lambda s: s, state
            )
        found = jax.tree.map(lambda x: x[ids], state.last)
        rows = jax.eval_shape(gather, jax.ShapeDtypeStruct((), jnp.int32)).targets
        keep = jnp.broadcast_to(~found.excluded[:, None], (len(ids), rows.shape[0]))
        return keep, state, {**found._asdict(), "threshold": before}

    needs = frozenset({"round", "client_ids"})
    return ClientDefense(init, apply, needs, "fedsecure", validate)


def screen(detector: Detector, data: ClientData, scale: Scale) -> tuple[Array, Array]:
    """Scores and reconstruction errors ``float32 [T]`` of a device's windows."""
    errors = window_errors(detector, data.inputs)
    return anomaly_scores(detector, errors, scale), errors


def too_many(flagged_share: AnyArray, max_flagged: float) -> Any:
    """Whether a device with this share of flagged windows stays out.

    Example:
        >>> too_many(jnp.array([0.1, 0.11]), 0.1).tolist()
        [False, True]
    """
    return flagged_share > max_flagged * (1.0 + _ROUNDING)


def judge(
    scores: Array, errors: Array, mask: Array, threshold: Array, max_flagged: float
) -> Screening:
    """What a device concludes from its scores.

    Args:
        scores: ``[T]``.
        errors: ``[T]``.
        mask: ``bool [T]``, the windows there are.
        threshold: ``T_i``.
        max_flagged: ``phi``.

    Example:
        >>> scores = jnp.array([0.12, 0.73, 0.27, 0.99])
        >>> found = judge(scores, scores, jnp.ones(4, bool), 0.6, 0.2)
        >>> float(found.flagged_share), bool(found.excluded)
        (0.5, True)
    """
    count = jnp.maximum(mask.sum(), 1)
    share = (mask & (scores > threshold)).sum() / count
    first, last = jnp.argmax(mask), len(mask) - 1 - jnp.argmax(mask[::-1])
    return Screening(
        excluded=too_many(share, max_flagged),
        flagged_share=share,
        score=jnp.where(mask, scores, 0.0).sum() / count,
        error=jnp.where(mask, errors, 0.0).sum() / count,
        score_change=jnp.where(mask.any(), jnp.abs(scores[last] - scores[first]), 0.0),
    )


def calibrate(
    detector: Detector,
    history: Clients,
    make_samples: MakeSamples,
    **options: float,
) -> Calibration:
    """What is usual for every device, and its threshold, from its own clean windows.

    Args:
        detector: from ``train_detector``.
        history: the clean series, from ``fs.data.federate_series``.
        make_samples: of the run, such as ``fs.data.windows(60)``.
        options: of ``adaptive_threshold``, which is applied to the scores.

    Returns:
        A ``Calibration`` of all devices.

    Raises:
        TypeError, ValueError: a bad option, windows of other features than the detector
            learned, or a threshold that no score of the classifier is above.
    """
    check_type("detector", detector, Detector, "Train one: train_detector(...).")

    @jax.jit
    def every_device(history: Clients, detector: Detector) -> Calibration:
        def one(id: Array) -> Calibration:
            data = make_samples(history.gather(id))
            errors = window_errors(detector, data.inputs)
            scale = error_scale(errors, data.mask)
            scores = anomaly_scores(detector, errors, scale)
            return Calibration(scale, adaptive_threshold(scores, data.mask, **options))

        return jax.lax.map(one, jnp.arange(history.num_clients))

    found = every_device(history, detector)
    most = highest_score(detector)
    deaf = np.flatnonzero(~(np.asarray(found.thresholds) < most))
    if len(deaf):
        raise ValueError(
            f"{len(deaf)} devices (the first is client {deaf[0]}) would never flag a "
            f"window: their thresholds must be below the classifier's largest score, "
            f"{most:.3g}; got {float(found.thresholds[deaf[0]]):.3g}. Train the "
            "classifier for longer, or lower k, percentile, low or high."
        )
    return found


def clean_windows(
    history: Clients, make_samples: MakeSamples
) -> tuple[np.ndarray, np.ndarray]:
    """All windows ``[s, L, F]`` of the devices' histories, and whose each is ``[s]``.

    For ``train_detector``.
    """
    found, device = [], []
    gather = jax.jit(lambda id, clients: make_samples(clients.gather(id)))
    for id in range(history.num_clients):
        data = gather(id, history)
        chosen = np.asarray(data.inputs)[np.asarray(data.valid)]
        found.append(chosen)
        device.append(np.full(len(chosen), id, np.int32))
    return np.concatenate(found), np.concatenate(device)
