"""Where does the source study's ordering hold? Short runs of fltrust_mnist.

Every cell is one run of ``experiments.fltrust_mnist`` in the source study's setting
with fewer local epochs and rounds, and another attack, number of attackers, partition
or root dataset. Each is kept in its own folder under --out: a cell that is finished is
not run again, one that was stopped is resumed. After each, scan.md tables all that are
finished.

Example:
  python -m experiments.fltrust_scan --data-dir DIR --out runs/scan
"""

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tyro
from rich.console import Console

import fedjax_sim as fs
from experiments import fltrust_mnist, results, runner


class Cell(NamedTuple):
    """What a cell varies; the rest is the source study's setting.

    Clients are ``"shards"`` (two label shards each) or ``"iid"``. ``root_bias`` is the
    share of class 1 in the server's root dataset, None for no bias.
    """

    attack: str
    strength: float
    attackers: float
    clients: str = "shards"
    root_size: int = 100
    root_bias: float | None = None


CELLS: tuple[Cell, ...] = (
    Cell("sign_flip", 5.0, 0.2, "iid", root_bias=1.0),
    Cell("sign_flip", 5.0, 0.2, "iid", root_size=10, root_bias=0.8),
    Cell("sign_flip", 5.0, 0.2, "iid"),
    Cell("sign_flip", 5.0, 0.2),
    Cell("sign_flip", 5.0, 0.2, root_size=10, root_bias=0.8),
    Cell("sign_flip", 5.0, 0.1),
    Cell("sign_flip", 5.0, 0.4),
    Cell("sign_flip", 1.0, 0.2),
    Cell("label_flip", 1.0, 0.2),
    Cell("label_flip", 1.0, 0.4),
    Cell("alie", 1.5, 0.2),
    Cell("ipm", 2.0, 0.2),
)
SYSTEMS = ("fedavg", "fltrust", "dual_system", "dual_system:gated_mean")


@dataclasses.dataclass(frozen=True)
class Config:
    """Short runs of fltrust_mnist over attacks, clients' data and root datasets."""

    #: As for fltrust_mnist.
    data_dir: Path | None = None
    #: Folder for the cells and scan.md.
    out: Path = Path("runs/scan")
    #: As for fltrust_mnist; with digits, the model is digits_cnn, the rate 0.1, and all
    #: clients train each round.
    dataset: str = "mnist"
    #: Rounds of every cell.
    rounds: int = 20
    #: Local epochs (the source study has 5).
    epochs: int = 2
    #: Seed of every cell.
    seed: int = 0
    #: Run seeds seed, seed+1, ... of every cell side by side.
    num_seeds: int = 1


def cell_config(config: Config, cell: Cell) -> fltrust_mnist.Config:
    preset = "demo" if config.dataset == "digits" else "table"
    root = f"root{cell.root_size}"
    if cell.root_bias is not None:
        root += f"-bias{cell.root_bias:g}"
    what = f"{cell.attack}-{cell.strength:g}-{cell.attackers:g}"
    out = config.out / f"{what}-{cell.clients}-{root}"
    return dataclasses.replace(
        fltrust_mnist.PRESETS[preset],
        dataset=config.dataset,
        data_dir=config.data_dir,
        out=out,
        resume=True,
        rounds=config.rounds,
        epochs=config.epochs,
        seed=config.seed,
        num_seeds=config.num_seeds,
        eval_every=5,
        partition=cell.clients,
        root_size=cell.root_size,
        root_bias=cell.root_bias,
        attack=cell.attack,
        attack_strength=cell.strength,
        attackers=cell.attackers,
        aggregators=SYSTEMS,
    )


def found(config: fltrust_mnist.Config) -> dict[str, Any] | None:
    """The results of every system of this very cell; None where it is not done.

    Raises:
        ValueError: its summary cannot be read.
    """
    path = config.out / "summary.json"
    if not path.exists():
        return None
    with results.reading(path, f"Delete {config.out} to run this cell again."):
        summary = json.loads(path.read_text())
        systems: dict[str, Any] = summary["systems"]
        done = min(system["rounds"] for system in systems.values())
        same = summary["key"] == results.config_key(config)
    return systems if same and done == config.rounds else None


def scan_table(cells: Mapping[Cell, dict[str, Any]]) -> str:
    """Final accuracy and the mean of the evaluations, a row per finished cell."""
    names = [fltrust_mnist.CLEAN, *SYSTEMS]
    rows = []
    for cell, systems in cells.items():
        values = []
        for name in names:
            accuracy = systems[name]["accuracy"]
            values.append(f"{accuracy['final']:.3f} ({accuracy['mean_of_run']:.3f})")
        root = f"{cell.root_size}"
        if cell.root_bias is not None:
            root += f", {results.percent(cell.root_bias)} of one class"
        attack, attackers = (
            f"{cell.attack} {cell.strength:g}",
            results.percent(cell.attackers),
        )
        rows.append((attack, attackers, cell.clients, root, *values))
    header = ("attack", "attackers", "clients", "root samples", *names)
    return fs.report.markdown_table(header, rows)


def scan(config: Config, console: Console) -> None:
    """Runs every cell that is not done, and writes scan.md after each.

    Raises:
        ValueError: a bad option, or a damaged cell; both before any training.
    """
    cells = {cell: cell_config(config, cell) for cell in CELLS}
    done = {}
    for cell, own in cells.items():
        fltrust_mnist.check(own)
        done[cell] = found(own)
    seeds = f"seed {config.seed}"
    if config.num_seeds > 1:
        seeds = f"mean of seeds {config.seed} to {config.seed + config.num_seeds - 1}"
    for number, (cell, own) in enumerate(cells.items(), start=1):
        what = f"cell {number}/{len(cells)} {own.out.name}"
        if done[cell] is not None:
            console.print(f"{what}: done before")
        else:
            console.print(what)
            fltrust_mnist.run(own, console)
            done[cell] = found(own)
        table = scan_table({c: systems for c, systems in done.items() if systems})
        text = (
            f"# Variations of the source study's setting, {config.rounds} rounds of "
            f"{config.epochs} local epochs\n\nTest accuracy at the last round (in "
            "brackets: mean of all evaluations, every 5 rounds), "
            f"{config.dataset}, {seeds}.\n\n{table}\n"
        )
        results.write_atomically(config.out / "scan.md", text)


def main() -> None:
    prog = "python -m experiments.fltrust_scan"
    config = tyro.cli(Config, description=__doc__, prog=prog)
    try:
        scan(config, Console(highlight=False, markup=False))
    except (ValueError, OSError, OverflowError, MemoryError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    runner.exit_on_interrupt("the same command continues")
    main()
