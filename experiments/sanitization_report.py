"""What a run of sanitization says at its end: tables, plots, summary.md."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.console import Console

import fedjax_sim as fs
from experiments import results, runner, specs
from experiments.results import evaluated, tail
from fedjax_sim.report import mean_and_spread

LABELS = {
    "label_flip": "label flip",
    "badnets": "backdoor",
    "hybrid": "hybrid",
}
# The paper's tables I and II, accuracy and attack success; the row of its own method
# stands beside both of our votes, since it does not say whose labels are counted.
PAPER: dict[str, dict[str, dict[str, tuple[float, float]]]] = {
    "mnist": {
        "auror": {
            "label_flip": (0.8846, 0.3530),
            "badnets": (0.8013, 0.2248),
            "hybrid": (0.8253, 0.4136),
        },
        "foolsgold": {
            "label_flip": (0.9043, 0.1439),
            "badnets": (0.8261, 0.1854),
            "hybrid": (0.8422, 0.1476),
        },
        "krum": {
            "label_flip": (0.9067, 0.1142),
            "badnets": (0.8154, 0.0347),
            "hybrid": (0.8446, 0.0967),
        },
        "sanitization": {
            "label_flip": (0.9243, 0.0232),
            "badnets": (0.8623, 0.0433),
            "hybrid": (0.8735, 0.0524),
        },
    },
    "chestmnist": {
        "auror": {
            "label_flip": (0.8221, 0.4329),
            "badnets": (0.7613, 0.2473),
            "hybrid": (0.8025, 0.4681),
        },
        "foolsgold": {
            "label_flip": (0.8543, 0.1839),
            "badnets": (0.8449, 0.1972),
            "hybrid": (0.8309, 0.1842),
        },
        "krum": {
            "label_flip": (0.8467, 0.1642),
            "badnets": (0.8265, 0.0547),
            "hybrid": (0.8216, 0.1167),
        },
        "sanitization": {
            "label_flip": (0.8743, 0.0432),
            "badnets": (0.8576, 0.0772),
            "hybrid": (0.8429, 0.0687),
        },
    },
}
# Its table III: MNIST, its own method, by the share of attackers.
PAPER_RATIOS = {
    "label_flip": {
        0.25: (0.9123, 0.0342),
        0.5: (0.8914, 0.0421),
        0.75: (0.8714, 0.0721),
    },
    "badnets": {0.25: (0.8423, 0.0534), 0.5: (0.8245, 0.0742), 0.75: (0.8067, 0.0936)},
}
PAPER_NOTE = (
    "The rows marked ↳ are the paper's own figures. It does not say how many clients "
    "were attackers in its tables I and II, which share of their samples was "
    "poisoned, what the trigger was, nor the network's sizes, rounds, rate and batch."
)
ATTACK_NOTE = (
    f"Test accuracy / attack success, mean of the last {results.TAIL} evaluations (of "
    "all, where there are fewer). "
    "Success is the share of the source class that is taken for the flip's target, "
    "and of the stamped images of other classes that are taken for the trigger's. "
    "Without an attack: accuracy alone, of what may be run by clients that nobody "
    "attacks."
)
SWEEP_NOTE = (
    "As in the first table. The hybrid attack, which is both of these at once, is not "
    "varied, as in the paper's table III."
)
CLASS_NOTE = (
    "*AUC*, *balanced* accuracy, and the *worst class*: the lowest recall of a "
    "class, and which class it is, in the last evaluation."
)
SAMPLES_NOTE = (
    "What sanitization left out of the data of the clients of a round, from the "
    "first round that leaves out any: of the poisoned samples, and of the clean ones "
    "at everybody and at the attackers."
)


def write(
    config: Any,
    result: runner.Result,
    console: Console,
    *,
    cells: Mapping[str, Any],
    command: str,
    settings: str,
) -> None:
    """Prints the tables and writes the plots, ``summary.json`` and ``summary.md``.

    Args:
        config: of ``experiments.sanitization``.
        result: its histories and seconds.
        console: where the tables go.
        cells: what each system is, by its name.
        command: what starts this run.
        settings: the run in a sentence.
    """
    histories = result.histories
    by_cell = {cell: histories[name] for name, cell in cells.items()}
    compared = config.dataset in PAPER
    note = ATTACK_NOTE + (f" {PAPER_NOTE}" if compared else "")
    share = results.percent(config.attackers[0])
    tables = {
        f"Attacks by {share} of the clients, poisoning ratio {config.poison:g}": (
            _attack_table(config, by_cell),
            note,
        ),
        "Classes": (_class_table(config, by_cell), CLASS_NOTE),
    }
    ratios = _sweep_table(config, by_cell, "attackers", config.attackers)
    poisons = (config.poison, *config.poisons)
    if ratios.rows and len(config.attackers) > 1:
        tables["Share of attackers"] = (ratios, SWEEP_NOTE)
    if len(poisons) > 1:
        title = f"Poisoning ratio, {share} attackers"
        poisoned = _sweep_table(config, by_cell, "poison", sorted(poisons))
        if poisoned.rows:
            tables[title] = (poisoned, SWEEP_NOTE)
    samples = _samples_table(by_cell)
    if samples.rows:
        tables["Samples left out"] = (samples, SAMPLES_NOTE)
    results.publish(
        config,
        result,
        console,
        title=f"Sanitization: {config.dataset}",
        command=command,
        settings=settings,
        tables=tables,
        plots=_plots(config, by_cell),
    )


def _own_rule(defense: str) -> str:
    """The rule of a defense, without its options; empty where it is several."""
    first, *others = specs.parse(defense)
    return "" if others else first.name


def _both(history: fs.History) -> str:
    """``accuracy / attack success``."""
    fields = (history.accuracy, history.attack_success)
    found = [mean_and_spread(tail(values)) for values in fields]
    return " / ".join(text for text in found if text != "-")


def _paper(pair: tuple[float, float] | None) -> str:
    return "" if pair is None else f"{pair[0]:.3f} / {pair[1]:.3f}"


def _attack_table(config: Any, by_cell: Mapping[Any, fs.History]) -> fs.report.Table:
    share, poison = config.attackers[0], config.poison
    main = {
        (c.defense, c.attack): h
        for c, h in by_cell.items()
        if c.attack == specs.NO_ATTACK or (c.attackers, c.poison) == (share, poison)
    }
    columns = (specs.NO_ATTACK, *config.attacks)
    paper = PAPER.get(config.dataset, {})
    rows: list[tuple[str, ...]] = []
    for defense in dict.fromkeys(("fedavg", *config.defenses)):
        cells = [main.get((defense, attack)) for attack in columns]
        name = "no defense" if defense == "fedavg" else defense
        rows.append((name, *("-" if h is None else _both(h) for h in cells)))
        own = paper.get(_own_rule(defense))
        if own:
            rows.append(("↳ paper", *(_paper(own.get(a)) for a in columns)))
    header = ("defense", "no attack", *(LABELS[a] for a in config.attacks))
    return fs.report.Table(header, rows)


def _class_table(config: Any, by_cell: Mapping[Any, fs.History]) -> fs.report.Table:
    share, poison = config.attackers[0], config.poison
    rows: list[tuple[str, ...]] = []
    for cell, history in by_cell.items():
        own = (cell.attackers, cell.poison) == (share, poison)
        if cell.attack != specs.NO_ATTACK and not own:
            continue
        recall = np.asarray(history.class_recall, float)
        recall = recall.reshape(-1, *recall.shape[-2:])
        last = np.flatnonzero(~np.isnan(recall).all(axis=(0, 2)))[-1]
        final = recall[:, last].mean(axis=0)
        worst = int(np.nanargmin(final))
        attack = LABELS.get(cell.attack, "none")
        rows.append(
            (
                "no defense" if cell.defense == "fedavg" else cell.defense,
                attack,
                mean_and_spread(tail(history.auc)),
                mean_and_spread(tail(history.balanced_accuracy)),
                f"{final[worst]:.3f} ({worst})",
            )
        )
    header = ("defense", "attack", "AUC", "balanced", "worst class")
    return fs.report.Table(header, rows)


def _sweep_table(
    config: Any, by_cell: Mapping[Any, fs.History], field: str, values: Any
) -> fs.report.Table:
    """Attack and defense by the share of attackers, or by the poisoning ratio."""
    other = "poison" if field == "attackers" else "attackers"
    usual = config.poison if other == "poison" else config.attackers[0]
    rows: list[tuple[str, ...]] = []
    for attack in config.attacks:
        found = {
            (c.defense, getattr(c, field)): h
            for c, h in by_cell.items()
            if c.attack == attack and getattr(c, other) == usual
        }
        defenses = [d for d, _ in found]
        for defense in dict.fromkeys(d for d in defenses if defenses.count(d) > 1):
            cells = [found.get((defense, value)) for value in values]
            name = "no defense" if defense == "fedavg" else defense
            label = f"{LABELS[attack]}, {name}"
            rows.append((label, *("" if h is None else _both(h) for h in cells)))
            own = PAPER_RATIOS.get(attack, {})
            if (field, config.dataset) == ("attackers", "mnist") and (
                _own_rule(defense) == "sanitization"
            ):
                rows.append(("↳ paper", *(_paper(own.get(v)) for v in values)))
    shown = [results.percent(v) if field == "attackers" else f"{v:g}" for v in values]
    return fs.report.Table(("attack, defense", *shown), rows)


def shares_left_out(history: fs.History) -> dict[str, float]:
    """Which shares of the samples a client defense left out, from the first it did.

    ``poisoned``: of the poisoned samples; ``clean``: of the others;
    ``clean_attackers``: of the others at Byzantine clients. NaN where there are none.
    """
    counts = {k: np.asarray(v, float) for k, v in history.defense.items()}
    removed = counts["poisoned_left_out"] + counts["clean_left_out"]
    rounds = removed.shape[-2]
    by_round = removed.sum(axis=-1).reshape(-1, rounds).sum(axis=0)
    begun = np.arange(rounds) >= (np.argmax(by_round > 0) if by_round.any() else rounds)
    liars = np.asarray(history.byzantine)
    clean = counts["samples"] + removed - counts["poisoned"]

    def share(part: np.ndarray, whole: np.ndarray, who: np.ndarray) -> float:
        chosen = who & begun[:, None]
        total = whole[chosen].sum()
        return float(part[chosen].sum() / total) if total else float("nan")

    everybody = np.ones_like(liars)
    return {
        "poisoned": share(counts["poisoned_left_out"], counts["poisoned"], everybody),
        "clean": share(counts["clean_left_out"], clean, everybody),
        "clean_attackers": share(counts["clean_left_out"], clean, liars),
    }


def _samples_table(by_cell: Mapping[Any, fs.History]) -> fs.report.Table:
    rows: list[tuple[str, ...]] = []
    for cell, history in by_cell.items():
        if not history.defense:
            continue
        attack = LABELS.get(cell.attack, "none")
        if cell.attack in LABELS:
            attack += f" {cell.poison:g} by {results.percent(cell.attackers)}"
        found = shares_left_out(history).values()
        cells = ("-" if np.isnan(v) else f"{100 * v:.1f} %" for v in found)
        rows.append((cell.defense, attack, *cells))
    header = ("defense", "attack", "poisoned", "clean", "clean, attackers")
    return fs.report.Table(header, rows)


def _plots(config: Any, by_cell: Mapping[Any, fs.History]) -> dict[str, Any]:
    share, poison = config.attackers[0], config.poison
    plots = {}
    for attack in config.attacks:
        systems = {
            "no defense" if c.defense == "fedavg" else c.defense: h
            for c, h in by_cell.items()
            if (c.attack, c.attackers, c.poison) == (attack, share, poison)
        }
        for field, label in (
            ("accuracy", "test accuracy"),
            ("attack_success", "attack success rate"),
        ):
            lines = {n: evaluated(h, getattr(h, field)) for n, h in systems.items()}
            title = LABELS[attack]
            plots[f"{attack}_{field}"] = fs.report.line_plot(lines, label, title=title)
    return plots
