"""The files of a run directory: what identifies a run, and what it found."""

import contextlib
import csv
import dataclasses
import hashlib
import importlib.metadata
import io
import json
import os
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

import fedjax_sim as fs
from fedjax_sim.sharding import usable_cores

# Options that do not change what a round computes, and so are not part of a run's key:
# where the run is, and (but for whether it forks) how long it is.
WHERE = (
    "out",
    "data_dir",
    "resume",
    "segment",
    "preset",
    "cores",
    "update_memory",
    "distributed",
)
HOW_LONG = ("rounds", "attack_rounds", "long_rounds", "sweep_rounds")
# Options with a default that is how runs were before they existed: no part of the key
# where they have it.
WHEN = {"attack_start": 0, "attack_stop": None, "attack_every": 1}
# Per-round scalars of a history that go to metrics.csv, in this order.
METRICS = (
    "accuracy",
    "loss",
    "auc",
    "balanced_accuracy",
    "attack_success",
    "train_loss",
    "aggregate_norm",
    "num_byzantine",
    "num_flagged",
    "num_nonfinite",
    "no_aggregate",
    "tpr",
    "fpr",
    "fnr",
)
CLIENT_RECORDS = ("client_ids", "byzantine", "weights", "flagged", "scores")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_DAMAGE = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, OSError)
TAIL = 5  # values in the reported mean over the last ones


def config_key(config: Any) -> str:
    """Hash of everything that changes the numbers of a run's rounds."""
    fields = {k: v for k, v in as_json(config).items() if k not in WHERE + HOW_LONG}
    fields = {k: v for k, v in fields.items() if k not in WHEN or v != WHEN[k]}
    fields["forked"] = getattr(config, "attack_rounds", 0) > 0
    text = json.dumps({"study": config.STUDY, **fields}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def how_long(options: Mapping[str, Any]) -> dict[str, Any]:
    """How many rounds a run is to have, of its options."""
    return {name: options[name] for name in HOW_LONG if name in options}


def as_json(config: Any) -> dict[str, Any]:
    """The configuration as JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "fedjax-sim": fs.__version__}
    found |= {package: importlib.metadata.version(package) for package in PACKAGES}
    device = jax.devices()[0]
    found["device"] = f"{len(jax.devices())} x {device.device_kind}"
    # The cores this process may use: on CPU the rounding of a matrix product depends on
    # the number of threads.
    found["machine"] = f"{platform.machine()}, {usable_cores()} cores"
    return found


@contextlib.contextmanager
def reading(what: Path | str, cure: str) -> Iterator[None]:
    """What is wrong with a kept file, or missing in it, becomes one clear error.

    Raises:
        ValueError: it is damaged; with the ``cure``.
    """
    try:
        yield
    except _DAMAGE as error:
        raise ValueError(f"{what} is damaged ({error!r}). {cure}") from None


def write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_csv(path: Path, header: Sequence[Any], rows: Iterable[Sequence[Any]]) -> None:
    """A table for other programs, with ``\\n`` at the end of every line."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_atomically(path, file.getvalue())


def percent(share: float) -> str:
    """A share as the reports name it.

    Example:
        >>> percent(0.2), percent(0.125)
        ('20%', '12.5%')
    """
    return f"{100 * share:.6g}%"


def by_class(history: fs.History, field: str) -> np.ndarray:
    """``[seeds, rounds, classes]`` of a field, also of a run without a seed axis."""
    values = np.asarray(getattr(history, field))
    return values.reshape(*np.atleast_2d(history.round).shape, values.shape[-1])


def write_metrics(path: Path, histories: dict[str, fs.History], seed: int) -> None:
    """``system,seed,round,metric,value``; a row per value that exists (no NaN rows).

    The metrics are ``METRICS`` and, at evaluations, for each class ``recall_0`` (its
    sensitivity), ``specificity_0`` and so on.
    """
    rows = []
    for system, history in histories.items():
        # [seeds, rounds], also of a run without a seed axis.
        rounds = np.atleast_2d(history.round)
        columns = {m: np.atleast_2d(getattr(history, m)) for m in METRICS}
        for name in ("recall", "specificity"):
            values = np.moveaxis(by_class(history, f"class_{name}"), -1, 0)
            columns |= {f"{name}_{c}": x for c, x in enumerate(values)}
        for s in range(len(rounds)):
            for r, number in enumerate(rounds[s]):
                for metric, values in columns.items():
                    value = float(values[s, r])
                    if not np.isnan(value):
                        rows.append([system, seed + s, number, metric, f"{value:.9g}"])
    write_csv(path, ["system", "seed", "round", "metric", "value"], rows)


def write_clients(path: Path, histories: dict[str, fs.History]) -> None:
    """Per-client records, ``system/field`` -> ``[(seeds,) rounds, cohort]``.

    What a client measured on its own samples is ``local_loss`` and ``local_accuracy``,
    and of the model it had trained itself ``local_own_loss``, ``local_own_accuracy``;
    what its defense did, ``defense_samples`` and so on.
    """
    arrays: dict[str, Any] = {}
    for system, history in histories.items():
        for field in CLIENT_RECORDS:
            arrays[f"{system}/{field}"] = np.asarray(getattr(history, field))
        for field, values in history.details.items():
            arrays[f"{system}/{field}"] = np.asarray(values)
        for group in ("local", "defense"):
            for field, values in getattr(history, group).items():
                arrays[f"{system}/{group}_{field}"] = np.asarray(values)
    temporary = path.with_name("tmp-" + path.name)
    np.savez_compressed(temporary, **arrays)
    os.replace(temporary, path)


def summarise(history: fs.History) -> dict[str, Any]:
    """Final value, means, and standard deviation over seeds (ddof 1), per metric.

    A seed whose value is undefined or infinite (a loss that diverged) is left out of
    that value. ``mean_of_last_5`` is over the last five values there are: evaluations
    for accuracy, loss and attack success, rounds for the others; None where there are
    fewer. ``class_recall`` and ``class_specificity`` have the last evaluation's mean
    over seeds, class by class: None for a class without test samples.
    """
    summary: dict[str, Any] = {"rounds": int(np.max(history.round))}
    for metric in METRICS:
        values = np.atleast_2d(getattr(history, metric)).astype(np.float64)
        values = np.where(np.isfinite(values), values, np.nan)
        known = values[:, ~np.isnan(values).all(axis=0)]
        if not known.size:
            summary[metric] = None
            continue
        last = known[~np.isnan(known[:, -1]), -1]
        tail = float(np.nanmean(known[:, -TAIL:])) if known.shape[1] >= TAIL else None
        summary[metric] = {
            "final": float(last.mean()),
            f"mean_of_last_{TAIL}": tail,
            "mean_of_run": float(np.nanmean(known)),
            "spread_over_seeds": float(np.std(last, ddof=1)) if last.size > 1 else None,
        }
    for field in ("class_recall", "class_specificity"):
        rates = by_class(history, field)
        evaluated = np.flatnonzero(~np.isnan(rates).all(axis=(0, 2)))
        if evaluated.size:
            final = rates[:, evaluated[-1]].mean(axis=0)
            summary[field] = [None if np.isnan(x) else float(x) for x in final]
    return summary


def tail(values: Any) -> np.ndarray:
    """Every seed's mean of its last values, ``[seeds]``; NaN where there is none.

    Args:
        values: ``[R]`` or ``[seeds, R]``, NaN where a round was not evaluated.
    """
    values = np.atleast_2d(np.asarray(values, float))
    last = values[:, ~np.isnan(values).all(axis=0)][:, -TAIL:]
    return fs.report.mean_defined(last, axis=1)


def evaluated(history: fs.History, values: Any) -> tuple[np.ndarray, np.ndarray]:
    """Rounds ``[E]`` in which there is any value, and the values ``[seeds, E]`` there.

    Args:
        history: of one seed or several.
        values: ``[R]`` or ``[seeds, R]``, not finite where a round was not evaluated.
    """
    values = np.atleast_2d(np.asarray(values, float))
    known = np.isfinite(values).any(axis=0)
    return np.atleast_2d(history.round)[0][known], values[:, known]


def publish(
    config: Any,
    result: Any,
    console: Console,
    *,
    title: str,
    command: str,
    settings: str,
    tables: Mapping[str, tuple[fs.report.Table, str]],
    plots: Mapping[str, Figure],
    remarks: Sequence[str] = (),
) -> None:
    """Prints the tables; writes plots (PNG, PDF), ``summary.json``, ``summary.md``.

    Args:
        config: the study's options.
        result: a ``runner.Result``.
        console: where the tables go.
        title: of ``summary.md``.
        command: what starts this run.
        settings: the run in a sentence.
        tables: title to a table and what is to be said of it, which may be nothing.
        plots: file name to figure.
        remarks: what is to be said of the run as a whole.
    """
    for name, (table, _) in tables.items():
        console.print(fs.report.rich_table(*table, title=name))
    for remark in remarks:
        console.print(remark)
    for name, figure in plots.items():
        for suffix in ("png", "pdf"):  # to look at; for a paper
            figure.savefig(config.out / f"{name}.{suffix}")
    summary = {
        "key": config_key(config),
        "how_long": how_long(as_json(config)),
        "systems": {n: summarise(h) for n, h in result.histories.items()},
        "versions": versions(),
        "compile_seconds": round(result.compile_seconds, 3),
        "run_seconds": round(result.run_seconds, 3),
        "command": command,
        "settings": settings,
    }
    write_atomically(config.out / "summary.json", json.dumps(summary, indent=2) + "\n")
    earlier = json.loads((config.out / "config.json").read_text()).get("earlier", [])
    for other in earlier:
        was = "; ".join(f"{k} {v}" for k, v in other.items())
        remarks = [*remarks, f"Some of the rounds were run with other versions: {was}."]
    if config.num_seeds > 1:
        remarks = ["± is the standard deviation over the seeds (ddof 1).", *remarks]
    parts = [
        f"# {title}",
        f"`{command}`",
        f"{settings} {result.compile_seconds:.0f} s compiling, "
        f"{result.run_seconds:.0f} s running the rounds.",
        "; ".join(f"{k} {v}" for k, v in versions().items()),
        *remarks,
    ]
    for name, (table, note) in tables.items():
        parts += [f"## {name}", *([note] if note else [])]
        parts.append(fs.report.markdown_table(*table))
    parts += [f"![{name}]({name}.png)" for name in plots]
    write_atomically(config.out / "summary.md", "\n\n".join(parts) + "\n")
    figures = "".join(f"{name}.png, " for name in plots)
    also = " (plots also as pdf)" if plots else ""
    console.print(
        f"results in {config.out}: summary.md, {figures}metrics.csv, clients.npz{also}"
    )
