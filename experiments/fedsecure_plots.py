"""The figures of the FedSecure study: the paper's 8 to 11, and one of our own."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullFormatter

import fedjax_sim as fs
from fedjax_sim.client_defenses.reference_model import Training
from fedjax_sim.report import COLOURS, LINES, MARKERS, STYLE

DASHED: Any = {"color": "0.2", "linewidth": 0.8, "linestyle": (0, (3, 2))}
LEAST_SPAN = 0.1  # of an accuracy axis: one test window more or less is no event


def training_plot(training: Training, channels: Sequence[str]) -> Any:
    """The paper's figure 8: errors, losses, "accuracy" and a window rebuilt."""
    with mpl.rc_context(STYLE):
        figure, panels = fs.report.panels(2, 2, 4.0)
        (errors, losses), (same, example) = panels
        values = training.errors[training.errors > 0]
        bins = np.geomspace(values.min(), values.max() * 1.001, 50)
        errors.hist(values, bins=bins, color=COLOURS[0])
        errors.set_xscale("log")
        errors.set_xlabel("reconstruction error of a window")
        errors.set_ylabel("windows")
        epochs = np.arange(1, len(training.train_loss) + 1)
        for axes, curves, label in (
            (losses, (training.train_loss, training.val_loss), "mean squared error"),
            (
                same,
                (training.train_accuracy, training.val_accuracy),
                "same largest feature",
            ),
        ):
            names = ("trained on", "held out")
            for i, (name, curve) in enumerate(zip(names, curves, strict=True)):
                axes.plot(
                    epochs, curve, color=COLOURS[i], linestyle=LINES[i], label=name
                )
            axes.set_xlabel("epoch")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_ylabel(label)
            axes.legend()
        losses.set_yscale("log")
        window, rebuilt = training.example
        for c, name in enumerate(channels):
            example.plot(window[:, c], color=COLOURS[c], label=name.replace("_", " "))
            dotted: dict[str, Any] = {"color": "black", "linestyle": ":"}
            once = {} if c else {"label": "rebuilt"}
            example.plot(rebuilt[:, c], **dotted, **once)
        low, high = example.get_ylim()
        example.set_ylim(low, high + 0.3 * (high - low))  # room for the legend
        example.set_xlabel("step of a window held out")
        example.xaxis.set_major_locator(MaxNLocator(integer=True))
        example.set_ylabel("standard deviations")
        example.legend(ncols=len(channels) + 1, loc="upper center", handlelength=1.5)
        for axes, letter in zip(panels.flat, "abcd", strict=True):
            axes.set_title(f"({letter})", loc="left")
        return figure


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve; NaN where all labels are alike."""
    outputs = jnp.stack([jnp.zeros(len(scores)), jnp.asarray(scores)], axis=1)
    return float(fs.metrics.auc(outputs, jnp.asarray(labels, jnp.int32)))


def confusion(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """``[[TN, FP], [FN, TP]]`` of scores above 0.5."""
    from sklearn.metrics import confusion_matrix  # slow to import

    found: np.ndarray = confusion_matrix(labels, scores > 0.5, labels=[False, True])
    return found


def classifier_plot(training: Training) -> Any:
    """The paper's figure 9: confusion matrix and ROC curve of the classifier."""
    from sklearn.metrics import roc_curve  # slow to import

    with mpl.rc_context(STYLE):
        figure, ((matrix, curve),) = fs.report.panels(1, 2, 2.6)
        counts = confusion(training.scores, training.labels)
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        matrix.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for (row, column), count in np.ndenumerate(counts):
            dark = shares[row, column] > 0.5
            colour = "white" if dark else "black"
            matrix.text(column, row, str(count), ha="center", va="center", color=colour)
        words = ("normal", "anomalous")
        matrix.set_xticks([0, 1], words)
        matrix.set_yticks([0, 1], words, rotation=90, va="center")
        matrix.set_xlabel("classified as")
        matrix.set_ylabel("window is")
        matrix.grid(visible=False)
        area = auc(training.scores, training.labels)
        fpr, tpr, _ = roc_curve(training.labels, training.scores)
        curve.plot(fpr, tpr, color=COLOURS[0])
        curve.plot([0, 1], [0, 1], color="0.6", linewidth=0.6, linestyle=(0, (2, 2)))
        curve.set_xlabel("false positive rate")
        curve.set_ylabel("true positive rate")
        curve.set_title(f"AUC {area:.3f}")
        curve.set_aspect("equal")
        return figure


def runs_plot(
    runs: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]],
    columns: Sequence[str],
) -> Any:
    """The paper's figure 10: loss and accuracy of devices and of the global model.

    Args:
        runs: run to column and ``loss`` or ``accuracy`` (``"device 2 loss"``) to rounds
            and values.
        columns: one to a panel.
    """
    with mpl.rc_context(STYLE):
        figure, panels = fs.report.panels(2, len(columns), 3.9)
        for axes, (row, column) in zip(
            panels.flat, [(r, c) for r in ("loss", "accuracy") for c in columns]
        ):
            for i, (name, lines) in enumerate(runs.items()):
                rounds, values = lines[f"{column} {row}"]
                axes.plot(
                    rounds,
                    values,
                    color=COLOURS[i % len(COLOURS)],
                    linestyle=LINES[i % len(LINES)],
                    marker=MARKERS[i % len(MARKERS)],
                    markevery=max(1, len(rounds) // 6),
                    label=name,
                )
            axes.set_ylabel(row)
            low, high = axes.get_ylim()
            if row == "accuracy" and high - low < LEAST_SPAN:
                middle = (low + high) / 2
                axes.set_ylim(middle - LEAST_SPAN / 2, middle + LEAST_SPAN / 2)
            if row == "loss":
                axes.set_title(column)
            else:
                axes.set_xlabel("round")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        handles, names = panels[0, 0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=3)
        return figure


def distribution_plot(
    found: Mapping[str, tuple[np.ndarray, np.ndarray]], threshold: float, device: str
) -> Any:
    """The paper's figure 11: scores (above) and errors (below) of a device, by run.

    Args:
        found: run to scores and errors of the device's windows.
        threshold: the device's.
        device: which one.
    """
    every = np.concatenate([errors for _, errors in found.values()])
    low, high = np.quantile(every[every > 0], [0.001, 0.999])
    high = max(high, 10 * low)  # so that there is a tick with a number
    with mpl.rc_context(STYLE):
        figure, panels = fs.report.panels(2, len(found), 3.0)
        for i, (name, (scores, errors)) in enumerate(found.items()):
            top, bottom = panels[:, i]
            top.hist(scores, bins=np.linspace(0, 1, 26), color=COLOURS[i > 0])
            top.axvline(threshold, label=f"threshold of {device}", **DASHED)
            top.set_xlim(0, 1)
            top.set_title(name, fontsize=6.5)
            shown = np.clip(errors, low, high)
            bottom.hist(shown, bins=np.geomspace(low, high, 26), color=COLOURS[i > 0])
            bottom.set_xscale("log")
            bottom.xaxis.set_minor_formatter(NullFormatter())
            top.set_xlabel("score")
            bottom.set_xlabel("error")
        panels[0, 0].set_ylabel("windows")
        panels[1, 0].set_ylabel("windows")
        figure.legend(
            *panels[0, 0].get_legend_handles_labels(), loc="outside lower center"
        )
        return figure


def strength_plot(
    found: Mapping[str, tuple[Sequence[float], np.ndarray]], limit: float
) -> Any:
    """How many windows devices flag in their own series, by strength of the attack.

    Args:
        found: name of an attack and its option, as ``"variability: amplitude"``, to
            strengths ``[S]`` and shares of flagged windows ``[S, N]``; the first
            strength, 0, is no attack.
        limit: the share above which a device stays out.
    """
    with mpl.rc_context(STYLE):
        figure, panels = fs.report.panels(1, len(found), 2.4)
        for axes, (name, (strengths, shares)) in zip(panels[0], found.items()):
            _strength_panel(axes, strengths, shares, limit)
            attack, _, option = name.rpartition(": ")
            axes.set_title(attack.replace("(", "\n("), fontsize=6.5)
            axes.set_xlabel(option)
            axes.label_outer()
        panels[0, 0].set_ylabel("windows flagged")
        handles, names = panels[0, 0].get_legend_handles_labels()
        figure.set_figheight(figure.get_figheight() + 0.16)
        figure.legend(handles, names, loc="outside lower center", ncols=len(names))
        return figure


def _strength_panel(
    axes: Axes, strengths: Sequence[float], shares: np.ndarray, limit: float
) -> None:
    places = np.arange(len(strengths))
    if shares.shape[1] <= 8:
        for device, values in enumerate(shares.T):
            axes.plot(
                places,
                values,
                color=COLOURS[device % len(COLOURS)],
                marker=MARKERS[device % len(MARKERS)],
                linewidth=0.8,
                label=f"device {device + 1}",
            )
    else:
        lows, middle, highs = np.quantile(shares, [0.1, 0.5, 0.9], axis=1)
        style: dict[str, Any] = {"color": COLOURS[0], "alpha": 0.2, "linewidth": 0}
        axes.fill_between(places, lows, highs, label="10 to 90 % of devices", **style)
        axes.plot(places, middle, color=COLOURS[0], marker=MARKERS[0], label="median")
    axes.axhline(limit, label="out above", **DASHED)
    labels = ["no", *(f"{strength:g}" for strength in strengths[1:])]
    axes.set_xticks(places, labels, fontsize=6)
    axes.set_ylim(-0.02, 1.02)
