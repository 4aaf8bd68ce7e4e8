"""What a run of fltrust_mnist says at its end: tables, plots, summary.md."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import fedjax_sim as fs
from experiments import results, runner

# How the plots call the systems.
LABELS = {
    "fedavg_clean": "FedAvg, no attack",
    "fedavg": "FedAvg, attacked",
    "fltrust": "FLTrust",
    "dual_system": "Dual-System",
}
# Section 4 of the source study (MNIST); the last figure is its column "final".
SOURCE_ROUNDS = (20, 40, 60, 80, 100)
SOURCE_TABLE = {
    "fedavg_clean": (0.6267, 0.8022, 0.8607, 0.8343, 0.8980, 0.89),
    "fedavg": (0.1945, 0.3078, 0.2882, 0.1135, 0.1010, 0.10),
    "fltrust": (0.2853, 0.5981, 0.5001, 0.7923, 0.7169, 0.71),
    "dual_system": (0.4468, 0.6424, 0.8284, 0.8433, 0.8958, 0.89),
}


SOURCE_NOTE = (
    "The rows marked ↳ are the source study's own figures. It does not say which "
    "attack it ran, how many clients were Byzantine, or what its rules assumed."
)
DETECTION_NOTE = (
    "Rejected share of the Byzantine clients (TPR) and of the honest ones (FPR, false "
    "alarms), mean over rounds; FNR, missing alarms, is 1 - TPR. FLTrust rejects a "
    "client of cosine <= 0 to the root update; the Dual-System whom Multi-Krum does "
    "not keep (it keeps n - f - 2 of n) and, in variants with a gate, who fails it. "
    "Whom it keeps but does not trust has no weight either: the columns *no "
    "weight* count everybody who had no say in the aggregate, and are what compares "
    "rules. A dash: nobody was rejected. Then: updates that were not finite, and "
    "rounds that left the model as it was."
)
# Rounds in a row until the end from which a model that stands still is remarked on.
STUCK = 5


def write(
    config: Any,
    result: runner.Result,
    console: Console,
    *,
    command: str,
    settings: str,
    comparable: bool,
) -> None:
    """Prints the tables and writes the plots, ``summary.json`` and ``summary.md``.

    Args:
        config: of ``fltrust_mnist``.
        result: its histories and seconds.
        console: where the tables go.
        command: what starts this run.
        settings: the run in a sentence.
        comparable: whether the source study's figures belong beside these.
    """
    histories = result.histories
    last = max(int(np.max(h.round)) for h in histories.values())
    at = [r for r in SOURCE_ROUNDS if r <= last] if comparable else None
    header, rows = fs.report.table(histories, rounds=at)
    if at is not None:
        whole = last == SOURCE_ROUNDS[-1]
        rows = [r for own in rows for r in (own, _source_row(own, len(at), whole)) if r]
    detection = _detection_rows(histories)
    detecting = any(_rejects(h) for h in histories.values())
    plots = {"accuracy": fs.report.accuracy_plot(_labelled(histories))}
    if detecting:
        # All systems, so that each looks as in the other plot; the plot itself leaves
        # out those that reject nobody.
        own = {
            n: h._replace(num_flagged=h.num_flagged - h.num_nonfinite)
            for n, h in histories.items()
        }
        plots["detection"] = fs.report.detection_plot(_labelled(own))
    results.publish(
        config,
        result,
        console,
        title=f"{_title(histories)}: {config.dataset}, {config.attack}",
        command=command,
        settings=settings,
        tables={
            "Test accuracy": (
                fs.report.Table(header, rows),
                SOURCE_NOTE if comparable else "",
            ),
            "Detection, whole run": (fs.report.Table(*detection), DETECTION_NOTE),
        },
        plots=plots,
        remarks=_remarks(histories),
    )


def _title(histories: dict[str, fs.History]) -> str:
    main = "fltrust" in histories and any(
        n.startswith("dual_system") for n in histories
    )
    return "FLTrust against the Dual-System" if main else "Systems under attack"


def _labelled(histories: dict[str, fs.History]) -> dict[str, fs.History]:
    return {_label(name): history for name, history in histories.items()}


def _label(name: str) -> str:
    base, _, variant = name.partition(":")
    return LABELS.get(base, base) + (f" ({variant})" if variant else "")


def _source_row(
    own: tuple[str, ...], columns: int, whole: bool
) -> tuple[str, ...] | None:
    """The source study's figures under the row of a system of this run."""
    if own[0] not in SOURCE_TABLE:
        return None
    *by_round, final = (f"{v:.4f}" for v in SOURCE_TABLE[own[0]])
    cells = [*by_round[:columns], final if whole else ""]
    return ("↳ source study", *cells, *[""] * (len(own) - len(cells) - 1))


def _rejects(history: fs.History) -> bool:
    """Whether the rule itself rejects clients, beyond non-finite updates."""
    return bool(np.sum(history.num_flagged) > np.sum(history.num_nonfinite))


def _remarks(histories: dict[str, fs.History]) -> list[str]:
    """A line for every system whose model stood still for long, until the end."""
    lines = []
    for name, history in histories.items():
        stuck = np.atleast_2d(history.no_aggregate)
        moving = np.flatnonzero(~stuck.all(axis=0))
        first = int(moving[-1]) + 1 if moving.size else 0
        if stuck.shape[1] - first >= STUCK:
            number = np.atleast_2d(history.round)[0, first]
            lines.append(
                f"{name}: no usable update from round {number} on (every one was "
                "non-finite or rejected), so its model stands still."
            )
    return lines


def _detection_rows(
    histories: dict[str, fs.History],
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    rows = []
    for name, history in histories.items():
        cohort = np.shape(history.byzantine)[-1]
        byzantine = jnp.reshape(history.byzantine, (-1, cohort))
        unheard = jnp.reshape(history.weights, (-1, cohort)) == 0
        silenced = jax.vmap(fs.metrics.detection)(unheard, byzantine)
        shares = (history.tpr, history.fpr, history.fnr, silenced.tpr, silenced.fpr)
        rates = [
            f"{np.nanmean(r):.3f}"
            if np.isfinite(r).any() and _rejects(history)
            else "-"
            for r in shares
        ]
        nonfinite = int(np.sum(history.num_nonfinite))
        stuck = int(np.sum(history.no_aggregate))
        rows.append((name, *rates, str(nonfinite), str(stuck)))
    header = (
        "system",
        "TPR",
        "FPR",
        "FNR",
        "no weight: Byz.",
        "no weight: honest",
        "not finite",
        "no update",
    )
    return header, rows
