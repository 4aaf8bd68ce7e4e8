"""Which attack shows the source study's ordering? Short runs of fltrust_mnist.

Every cell is one run of ``experiments.fltrust_mnist`` in the source study's setting
with fewer local epochs and rounds, kept in its own folder under --out: a cell that is
finished is not run again, one that was stopped is resumed. At the end scan.md tables
all cells.

Example:
  python -m experiments.fltrust_scan --data-dir DIR --out runs/scan
"""

import dataclasses
import json
import sys
from pathlib import Path

import tyro
from rich.console import Console

import fedjax_sim as fs
from experiments import fltrust_mnist, results

# (attack, strength, fraction of attackers)
CELLS: tuple[tuple[str, float, float], ...] = (
    ("sign_flip", 1.0, 0.2),
    ("sign_flip", 5.0, 0.2),
    ("label_flip", 1.0, 0.2),
    ("alie", 1.5, 0.2),
    ("ipm", 2.0, 0.2),
    ("sign_flip", 5.0, 0.1),
    ("sign_flip", 5.0, 0.4),
    ("label_flip", 1.0, 0.4),
)
SYSTEMS = ("fedavg", "fltrust", "dual_system", "dual_system:gated_mean")


@dataclasses.dataclass(frozen=True)
class Config:
    """Short runs of fltrust_mnist over attacks, strengths and numbers of attackers."""

    data_dir: Path | None = None
    """As for fltrust_mnist."""
    out: Path = Path("runs/scan")
    """Folder for the cells and scan.md."""
    dataset: str = "mnist"
    """As for fltrust_mnist; with digits, the model is digits_cnn and training iid."""
    rounds: int = 20
    """Rounds of every cell."""
    epochs: int = 2
    """Local epochs (the source study has 5)."""
    seed: int = 0
    """Seed of every cell."""


def cell_config(config: Config, cell: tuple[str, float, float]) -> fltrust_mnist.Config:
    attack, strength, attackers = cell
    preset = "demo" if config.dataset == "digits" else "table"
    out = config.out / f"{attack}-{strength:g}-{attackers:g}"
    return dataclasses.replace(
        fltrust_mnist.PRESETS[preset],
        dataset=config.dataset,
        data_dir=config.data_dir,
        out=out,
        resume=(out / "config.json").exists(),
        rounds=config.rounds,
        epochs=config.epochs,
        seed=config.seed,
        eval_every=5,
        attack=attack,
        attack_strength=strength,
        attackers=attackers,
        aggregators=SYSTEMS,
    )


def finished(config: fltrust_mnist.Config) -> bool:
    """Whether this very cell is done, with at least the rounds asked for."""
    path = config.out / "summary.json"
    if not path.exists():
        return False
    summary = json.loads(path.read_text())
    done = min(s["rounds"] for s in summary["systems"].values())
    return summary["key"] == results.config_key(config) and done >= config.rounds


def scan_table(config: Config) -> str:
    """Final accuracy and the mean of the evaluations, a row per finished cell."""
    names = [fltrust_mnist.CLEAN, *SYSTEMS]
    rows = []
    for cell in CELLS:
        own = cell_config(config, cell)
        if not finished(own):
            continue
        systems = json.loads((own.out / "summary.json").read_text())["systems"]
        values = []
        for name in names:
            accuracy = systems[name]["accuracy"]
            values.append(f"{accuracy['final']:.3f} ({accuracy['mean_of_run']:.3f})")
        rows.append((f"{cell[0]} {cell[1]:g}", f"{cell[2]:.0%}", *values))
    return fs.report.markdown_table(("attack", "attackers", *names), rows)


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    console = Console(highlight=False)
    for number, cell in enumerate(CELLS, start=1):
        own = cell_config(config, cell)
        if finished(own):
            console.print(f"cell {number}/{len(CELLS)} {own.out.name}: done before")
            continue
        console.print(f"cell {number}/{len(CELLS)} {own.out.name}")
        try:
            fltrust_mnist.run(own, console)
        except (ValueError, FileNotFoundError) as error:
            sys.exit(f"error: {error}")
        text = (
            f"# Attacks in the source study's setting, {config.rounds} rounds of "
            f"{config.epochs} local epochs\n\nTest accuracy at the last round (in "
            "brackets: mean of all evaluations, every 5 rounds), "
            f"{config.dataset}, seed {config.seed}.\n\n{scan_table(config)}\n"
        )
        results.write_atomically(config.out / "scan.md", text)


if __name__ == "__main__":
    main()
