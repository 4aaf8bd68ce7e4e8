"""Merges the finished runs of a sweep into one table, by the hash of their options.

Each folder is the --out of one run of fltrust_mnist, mad_pneumonia, pdrr, sanitization
or fedsecure_vitals. Two folders with the same hash hold the same run: the longer one
counts. Folders without a finished run, such as of a task that was stopped, are left out
and named; running their command again with --resume finishes them.

Example, after the tasks of an array job have each made a folder in runs/sweep:
  python -m experiments.merge runs/sweep/* --out runs/sweep.csv
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro
from rich.console import Console

import fedjax_sim as fs
from experiments.results import METRICS, TAIL, WHERE, how_long, reading, write_csv

VALUES = ("final", f"mean_of_last_{TAIL}", "spread_over_seeds")


@dataclasses.dataclass(frozen=True)
class Config:
    """Merges the finished runs of a sweep into one table."""

    #: The --out folders of the runs.
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    #: The table: a row for every run, system and metric.
    out: Path = Path("sweep.csv")


class Unfinished(Exception):
    """A folder has no finished run; with why."""


class Run(NamedTuple):
    """A finished run.

    Attributes:
        folder: where it is.
        key: hash of its options, without how long and where it ran.
        options: all of them.
        systems: name to the summary of its history.
    """

    folder: Path
    key: str
    options: dict[str, Any]
    systems: dict[str, dict[str, Any]]

    @property
    def rounds(self) -> int:
        return max(int(system["rounds"]) for system in self.systems.values())


def read(folder: Path) -> Run:
    """The run of a folder.

    Raises:
        Unfinished: there is none that is finished.
        ValueError: it is damaged.
    """
    config, summary = folder / "config.json", folder / "summary.json"
    if not config.exists():
        raise Unfinished("no run of a study")
    if not summary.exists():
        raise Unfinished("not finished")
    with reading(f"the run in {folder}", "Leave it out, or run it again."):
        found, results = (json.loads(p.read_text()) for p in (config, summary))
        run = Run(folder, found["key"], {**found["config"]}, {**results["systems"]})
        if results["key"] != run.key:
            raise ValueError("summary.json is of another run")
        if results["how_long"] != how_long(run.options):
            raise Unfinished("extended, and not finished")
        for system in run.systems.values():
            int(system["rounds"])
            for metric in METRICS:
                if system.get(metric) is not None:
                    float(system[metric]["final"])
    return run


def merge(runs: Sequence[Run]) -> dict[str, Run]:
    """Each run once, by its hash; of two the longer."""
    merged: dict[str, Run] = {}
    for run in runs:
        if run.key not in merged or run.rounds > merged[run.key].rounds:
            merged[run.key] = run
    return merged


def varied(runs: Sequence[Run]) -> list[str]:
    """The options in which the runs differ."""
    names = dict.fromkeys(name for run in runs for name in run.options)
    return [
        name
        for name in names
        if name not in WHERE
        and len({json.dumps(run.options.get(name)) for run in runs}) > 1
    ]


def write(path: Path, runs: Sequence[Run], options: Sequence[str]) -> None:
    """``key,folder,(options),system,round,metric,final,...``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for run in runs:
        own = [run.options.get(name) for name in options]
        for system, summary in run.systems.items():
            for metric in METRICS:
                values = summary.get(metric)
                if values:
                    found = [values.get(name) for name in VALUES]
                    place = [run.key, run.folder, *own, system, summary["rounds"]]
                    rows.append([*place, metric, *found])
    header = ["key", "folder", *options, "system", "round", "metric", *VALUES]
    write_csv(path, header, rows)


def table(runs: Sequence[Run], options: Sequence[str]) -> fs.report.Table:
    """The final accuracy of every system, a row for every run."""
    systems = list(dict.fromkeys(name for run in runs for name in run.systems))
    rows = []
    for run in runs:
        found = []
        for name in systems:
            accuracy = run.systems.get(name, {}).get("accuracy")
            found.append(f"{accuracy['final']:.3f}" if accuracy else "")
        own = [str(run.options.get(name)) for name in options]
        rows.append((run.key, *own, str(run.rounds), *found))
    return fs.report.Table(("key", *options, "round", *systems), rows)


def main() -> None:
    config = tyro.cli(Config, description=__doc__, prog="python -m experiments.merge")
    console = Console(highlight=False, markup=False)
    try:
        if not config.runs:
            raise ValueError("name the --out folders of one or more runs")
        if config.out.is_dir():
            raise ValueError(f"--out {config.out} is a folder; name a file")
        found: list[Run] = []
        left_out: list[str] = []
        for folder in config.runs:
            try:
                found.append(read(folder))
            except Unfinished as reason:
                left_out.append(f"{reason}: {folder}")
        merged = list(merge(found).values())
        if not merged:
            raise ValueError("; ".join(["none of these is finished", *left_out]))
        options = varied(merged)
        write(config.out, merged, options)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    console.print(fs.report.rich_table(*table(merged, options), title="Final accuracy"))
    again = [run.folder for run in found if run not in merged]
    for line in [*left_out, *(f"the same run as another: {path}" for path in again)]:
        console.print(line, soft_wrap=True)
    console.print(f"{len(merged)} runs in {config.out}")


if __name__ == "__main__":
    main()
