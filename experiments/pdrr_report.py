"""What a run of pdrr says at its end: tables, plots, summary.md."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from rich.console import Console

import fedjax_sim as fs
from experiments import results, runner, specs
from experiments.pdrr_time import Times
from experiments.results import evaluated, tail
from fedjax_sim.report import mean_and_spread, mean_defined

BASES = {"krum": "Krum", "trimmed_mean": "trimmed mean", "median": "median"}
SCHEMES = {
    "none": "rule alone",
    "dagmm_detector": "DAGMM",
    "vae_detector": "VAE",
    "err": "ERR",
    "lfr": "LFR",
    "err_lfr": "ERR or LFR",
    "pdrr": "PDRR",
}
ROUNDS = (1, 20, 50, 100)
# The paper's tables 1 and 2: FAR and MAR at these rounds. It has none for the median.
PAPER: dict[str, dict[str, tuple[tuple[float, ...], tuple[float, ...]]]] = {
    "krum": {
        "dagmm_detector": ((0, 0.33, 0.5, 0.5), (0, 0.5, 0.75, 0.75)),
        "vae_detector": ((0.27, 0.4, 0.43, 0.3), (0.4, 0.6, 0.65, 0.45)),
        "err": ((0.43, 0.4, 0.43, 0.5), (0.65, 0.6, 0.65, 0.75)),
        "lfr": ((0, 0.1, 0.13, 0.2), (0, 0.15, 0.2, 0.3)),
        "pdrr": ((0, 0, 0, 0), (0, 0, 0, 0)),
    },
    "trimmed_mean": {
        "dagmm_detector": ((0.27, 0.3, 0.2, 0.37), (0.4, 0.45, 0.3, 0.55)),
        "vae_detector": ((0.4, 0.33, 0.4, 0.43), (0.6, 0.5, 0.6, 0.65)),
        "err": ((0.43, 0.5, 0.47, 0.5), (0.65, 0.75, 0.7, 0.75)),
        "lfr": ((0.27, 0.2, 0.3, 0.27), (0.4, 0.3, 0.45, 0.4)),
        "pdrr": ((0, 0, 0, 0), (0, 0, 0, 0)),
    },
}
# Its table 3, seconds on an RTX 2080 Ti; LFR takes "almost the same" as ERR.
PAPER_SECONDS = {
    "krum": {"dagmm_detector": 6.3, "vae_detector": 54.5, "err": 32.2, "pdrr": 0.42},
    "trimmed_mean": {
        "dagmm_detector": 7.8,
        "vae_detector": 56.7,
        "err": 32.7,
        "pdrr": 0.84,
    },
    "median": {"dagmm_detector": 6.8, "vae_detector": 56.8, "err": 35.8, "pdrr": 0.63},
}
GIVEN = (
    "All rules are told the number of attackers. DAGMM, VAE, ERR and LFR also remove "
    "as many clients (ERR or LFR: up to twice as many), as in the paper: without an "
    "attack they would remove as many honest ones. PDRR removes whoever reaches its q, "
    "measured by the largest index there is: on Krum and the trimmed mean at least one "
    "client in every round, with an attack or without."
)
LEGEND = (
    "FAR: false alarm rate, share of the honest clients that are flagged. MAR: missing "
    "alarm rate, share of the attackers that are not. full: attackers know all models, "
    "partial: their own."
)
ABOUT = (
    "PDRR: pre-aggregation, detection, removal, re-aggregation; ERR and LFR: rejection "
    "by error rate and by loss; VAE: variational autoencoder; DAGMM: deep autoencoding "
    "Gaussian mixture model. The paper: Lu, Li, Chen and Ma, Defense against local "
    "model poisoning attacks to Byzantine-robust federated learning, Frontiers of "
    "Computer Science 16, 2022: FEMNIST, 50 clients, 20 of them attackers, a network "
    "of 6.6 million parameters, 2,002 test images for those who need samples."
)
TABLE_NOTE = (
    "FAR and MAR in single rounds and as the mean of all. Every detector trains its "
    "own model from the first round on. Rows marked ↳ are the paper's, which has none "
    "for the median. *ties*: share of the rounds in which all clients that take part "
    "have one score, so that who is flagged depends on their numbers alone."
)
ERROR_NOTE = (
    f"Test error, mean of the last {results.TAIL} evaluations (of all, where there are "
    "fewer), by rule, under the attack made for it. *Full*: attackers know all models; "
    "otherwise their own. Bulyan needs 4f + 3 clients and assumes fewer attackers; it "
    "stands under Krum, whose attack it meets."
)
RANGE_NOTE = (
    "Thresholds q with which PDRR makes no mistake: above the largest score of an "
    "honest client, up to the smallest of an attacker, 0 to 1; with several seeds, in "
    "all of them. *all*: in every round of the run."
)
TIME_NOTE = (
    "One detection, removal and re-aggregation on the models of the first attacked "
    "round, median of five calls, compiled before; in brackets as a multiple of "
    "PDRR's. Pre-training is not counted. The paper's seconds are of an RTX 2080 "
    "Ti, on 6.6 million parameters."
)
ALARM_NOTE = (
    "PDRR under partial knowledge and without an attack; in brackets the test error of "
    "the same rule without it. Rates are means over the rounds. Where nobody attacks, "
    "whoever is flagged is a false alarm. Of runs that are longer for other tables, "
    "only as many rounds count as the others have."
)
COUNT_NOTE = (
    "PDRR and its rules go on assuming the same number of attackers, but for the last "
    "row, where the trimmed mean cuts fewer values than there are attackers. Rates are "
    "means over the rounds: FAR / MAR; then the test error, and in brackets that "
    "without PDRR. Of runs that are longer for other tables, only as many rounds count "
    "as the others have."
)
OTHER_NOTE = (
    "Attacks that PDRR was not made for, or was made for on another rule. FAR / MAR, "
    "means over the rounds; then the test error, and in brackets that without PDRR."
)


def write(
    config: Any,
    result: runner.Result,
    console: Console,
    *,
    cells: Mapping[str, Any],
    command: str,
    settings: str,
    times: Times,
) -> None:
    """Prints the tables and writes the plots, ``summary.json`` and ``summary.md``.

    Args:
        config: of ``experiments.pdrr``.
        result: its histories and seconds.
        console: where the tables go.
        cells: what each system is, by its name.
        command: what starts this run.
        settings: the run in a sentence.
        times: seconds of one detection.
    """
    by_cell = {cell: result.histories[name] for name, cell in cells.items()}
    beside_others = {"counts", "partitions"} & set(config.parts)
    least = config.sweep_rounds if beside_others else config.rounds
    early = {c: first_rounds(h, least) for c, h in by_cell.items()}
    tables: dict[str, tuple[fs.report.Table, str]] = {}
    for base, label in BASES.items():
        table = scheme_table(config, by_cell, base)
        if table.rows:
            tables[f"Attack on {label}"] = (table, TABLE_NOTE)
    for title, table, note in (
        ("Test error", error_table(by_cell), ERROR_NOTE),
        ("Thresholds without a mistake", range_table(config, by_cell), RANGE_NOTE),
        ("Time of one detection", time_table(times), TIME_NOTE),
        ("Partitions, and no attack", partition_table(early), ALARM_NOTE),
        ("Number of attackers", count_table(config, early), COUNT_NOTE),
        ("Other attacks", other_table(by_cell), OTHER_NOTE),
    ):
        if table.rows:
            tables[title] = (table, note)
    instead = "" if config.dataset == "femnist" else ", in place of FEMNIST"
    results.publish(
        config,
        result,
        console,
        title=f"PDRR: {config.dataset} by {config.partition}{instead}",
        command=command,
        settings=settings,
        tables=tables,
        plots=_plots(config, by_cell),
        remarks=[ABOUT, LEGEND, *([GIVEN] if "schemes" in config.parts else [])],
    )


def shown_rounds(config: Any) -> list[int]:
    """The paper's rounds that the run has, and its last."""
    return sorted({r for r in ROUNDS if r <= config.rounds} | {config.rounds})


def at_round(history: fs.History, field: str, number: int) -> np.ndarray:
    """A field in one round, ``[seeds]``."""
    values = np.atleast_2d(np.asarray(getattr(history, field), float))
    return values[:, np.atleast_2d(history.round)[0] == number][:, 0]


def over_rounds(history: fs.History, field: str) -> np.ndarray:
    """The mean of a field over the rounds in which it is defined, ``[seeds]``."""
    values = np.atleast_2d(np.asarray(getattr(history, field), float))
    return mean_defined(values, axis=1)


def first_rounds(history: fs.History, count: int) -> fs.History:
    """A history as its alarms and accuracy were after some rounds of its run."""
    fields = ("round", "accuracy", "fpr", "fnr")
    cut: dict[str, Any] = {
        name: np.asarray(getattr(history, name))[..., :count] for name in fields
    }
    return history._replace(**cut)


def error(history: fs.History | None, digits: int = 3) -> str:
    """The test error at the end; empty without a history."""
    if history is None:
        return ""
    return mean_and_spread(1.0 - tail(history.accuracy), digits)


def alarms(history: fs.History | None) -> str:
    """``FAR / MAR``, means over the rounds; the first alone without an attack."""
    if history is None:
        return ""
    rates = (mean_and_spread(over_rounds(history, f), 2) for f in ("fpr", "fnr"))
    return " / ".join(rate for rate in rates if rate != "-")


def _schemes(by_cell: Mapping[Any, fs.History], base: str) -> dict[str, fs.History]:
    """By scheme: on this rule, under its attack by attackers who know their own."""
    return {
        cell.scheme: history
        for cell, history in by_cell.items()
        if (cell.part, cell.base, cell.attack) == ("schemes", base, "fang")
    }


def scheme_table(
    config: Any, by_cell: Mapping[Any, fs.History], base: str
) -> fs.report.Table:
    """The paper's tables 1 and 2, and the same for the median."""
    rounds = shown_rounds(config)
    rows: list[tuple[str, ...]] = []
    for scheme, history in _schemes(by_cell, base).items():
        if scheme == "none":
            continue
        cells: list[str] = []
        for field in ("fpr", "fnr"):
            cells += [mean_and_spread(at_round(history, field, r), 2) for r in rounds]
            cells.append(mean_and_spread(over_rounds(history, field), 2))
        cells.append(f"{ties(history):.2f}")
        rows.append((SCHEMES[scheme], *cells))
        own = PAPER.get(base, {}).get(scheme)
        if own:
            paper: list[str] = []
            for rates in own:
                known = dict(zip(ROUNDS, rates, strict=True))
                paper += [f"{known[r]:.2f}" if r in known else "" for r in rounds]
                paper.append("")
            rows.append(("↳ paper", *paper, ""))
    header = ["scheme"]
    for rate in ("FAR", "MAR"):  # short, for a terminal of 80 columns
        header += [f"{rate} {rounds[0]}", *map(str, rounds[1:]), "mean"]
    return fs.report.Table((*header, "ties"), rows)


def ties(history: fs.History) -> float:
    """Share of the rounds in which all scores are equal."""
    scores = np.asarray(history.scores, float)
    low = np.where(np.isfinite(scores), scores, np.inf).min(axis=-1)
    high = np.where(np.isfinite(scores), scores, -np.inf).max(axis=-1)
    return float(np.mean(low >= high))


def error_table(by_cell: Mapping[Any, fs.History]) -> fs.report.Table:
    """The test error of every scheme on every rule."""
    found: dict[tuple[str, str], fs.History] = {}
    for cell, history in by_cell.items():
        if cell.part not in ("schemes", "knowledge"):
            continue
        base, name = cell.base, SCHEMES[cell.scheme]
        if base == "bulyan":
            base, name = "krum", f"Bulyan (f = {cell.f})"
        if cell.attack == specs.NO_ATTACK:
            name = f"no attack, {name}"
        elif cell.knowledge == "full":
            name = f"full, {name}"
        found[name, base] = history
    first = {"no attack": 0, "full": 2}
    names = sorted(
        dict.fromkeys(name for name, _ in found),
        key=lambda name: first.get(name.split(",")[0], 1),
    )
    rows = [(n, *(error(found.get((n, base))) or "-" for base in BASES)) for n in names]
    return fs.report.Table(("defense", *BASES.values()), rows)


def thresholds(history: fs.History) -> tuple[np.ndarray, np.ndarray]:
    """Between which q, ``[R]`` each, PDRR makes no mistake, with any seed.

    Above the first and up to the second; where the first is not lower there is none.
    """
    scores = np.asarray(history.scores, float)
    liar = np.asarray(history.byzantine)
    scores = scores.reshape(-1, *scores.shape[-2:])
    liar = liar.reshape(-1, *liar.shape[-2:])
    low = np.where(liar, -np.inf, scores).max(axis=(0, 2))
    high = np.where(liar, scores, np.inf).min(axis=(0, 2))
    return np.maximum(low, 0.0), np.minimum(high, 1.0)


def _by_knowledge(
    by_cell: Mapping[Any, fs.History], base: str
) -> dict[str, fs.History]:
    return {
        cell.knowledge: history
        for cell, history in by_cell.items()
        if (cell.base, cell.scheme, cell.attack) == (base, "pdrr", "fang")
        and cell.part in ("schemes", "knowledge")
    }


def range_table(config: Any, by_cell: Mapping[Any, fs.History]) -> fs.report.Table:
    """The paper's figure 11 in numbers."""
    rounds = shown_rounds(config)
    rows: list[tuple[str, ...]] = []
    for base, label in BASES.items():
        for knowledge, history in _by_knowledge(by_cell, base).items():
            low, high = thresholds(history)
            at = np.atleast_2d(history.round)[0]
            cells = [_interval(low[at == r].max(), high[at == r].min()) for r in rounds]
            cells.append(_interval(low.max(), high.min()))
            rows.append((f"{label}, {knowledge}", *cells))
    header = ("attack, knowledge", *(f"round {r}" for r in rounds), "all")
    return fs.report.Table(header, rows)


def _interval(low: float, high: float) -> str:
    return f"{low:.2f} to {high:.2f}" if low < high else "none"


def time_table(times: Times) -> fs.report.Table:
    """The paper's table 3."""
    schemes = dict.fromkeys(s for own in times.values() for s in own)
    rows: list[tuple[str, ...]] = []
    for scheme in schemes:
        cells, paper = [], []
        for base in BASES:
            own, theirs = times.get(base, {}), PAPER_SECONDS[base]
            cells.append(_multiple(own.get(scheme), own.get("pdrr")))
            paper.append(_multiple(theirs.get(scheme), theirs["pdrr"]))
        rows.append((SCHEMES[scheme], *cells))
        if any(paper):
            rows.append(("↳ paper", *paper))
    return fs.report.Table(("scheme", *BASES.values()), rows)


def _multiple(seconds: float | None, unit: float | None) -> str:
    if seconds is None:
        return ""
    text = f"{1000 * seconds:.3g} ms" if seconds < 0.1 else f"{seconds:.3g} s"
    return text if unit is None else f"{text} ({seconds / unit:.3g})"


def partition_table(by_cell: Mapping[Any, fs.History]) -> fs.report.Table:
    """PDRR by division of the data, with and without its attack."""
    home = next((c.partition for c in by_cell if c.part == "schemes"), None)
    found = {
        (c.partition, c.base, c.attack, c.scheme): history
        for c, history in by_cell.items()
        if c.base in BASES
        and c.scheme in ("none", "pdrr")
        and c.part in ("schemes", "partitions")
    }
    rows: list[tuple[str, ...]] = []
    for partition in dict.fromkeys([*([home] if home else []), *(k[0] for k in found)]):
        for base, label in BASES.items():

            def cell(attack: str, base: str = base, at: str = partition) -> list[str]:
                own = found.get((at, base, attack, "pdrr"))
                return [alarms(own), _pair(own, found.get((at, base, attack, "none")))]

            row = (f"{partition}, {label}", *cell(specs.NO_ATTACK), *cell("fang"))
            if any(row[1:]):
                rows.append(row)
    header = (
        "partition, rule",
        "FAR, no attack",
        "error, no attack",
        "FAR / MAR",
        "error",
    )
    return fs.report.Table(header, rows)


def _pair(own: fs.History | None, without: fs.History | None) -> str:
    """``error (error without PDRR)``."""
    if own is None:
        return ""
    return error(own) + (f" ({error(without)})" if without is not None else "")


def count_table(config: Any, by_cell: Mapping[Any, fs.History]) -> fs.report.Table:
    """PDRR by number of attackers."""
    usual = [c.f for c in by_cell if c.part == "counts" and c.base == "krum"]
    if not usual:
        return fs.report.Table((), [])
    found = {
        (c.attackers, c.f, c.base, c.scheme): history
        for c, history in by_cell.items()
        if c.part == "counts"
        or (c.part == "schemes" and c.attack in ("fang", specs.NO_ATTACK))
    }
    rows: list[tuple[str, ...]] = []
    for count in sorted({key[0] for key in found if key[1] == usual[0]}):
        rows.append(_count_row(str(count), found, count, usual[0]))
    if config.beta:
        name = f"{config.attackers}, {config.beta} cut"
        rows.append(_count_row(name, found, config.attackers, config.beta))
    return fs.report.Table(("attackers", *BASES.values()), rows)


def _count_row(
    name: str, found: Mapping[Any, fs.History], count: int, f: int
) -> tuple[str, ...]:
    cells = []
    for base in BASES:
        own = found.get((count, f, base, "pdrr"))
        pair = _pair(own, found.get((count, f, base, "none")))
        cells.append(f"{alarms(own)}; {pair}" if own is not None else "")
    return (name, *cells)


def other_table(by_cell: Mapping[Any, fs.History]) -> fs.report.Table:
    """PDRR under other attacks."""
    found = {
        (c.attack, c.base, c.scheme): history
        for c, history in by_cell.items()
        if c.part == "others"
    }
    rows: list[tuple[str, ...]] = []
    for attack in dict.fromkeys(key[0] for key in found):
        cells = []
        for base in BASES:
            own = found[attack, base, "pdrr"]
            pair = _pair(own, found[attack, base, "none"])
            cells.append(f"{alarms(own)}; {pair}")
        rows.append((attack, *cells))
    return fs.report.Table(("attack", *BASES.values()), rows)


def _plots(config: Any, by_cell: Mapping[Any, fs.History]) -> dict[str, Any]:
    plots: dict[str, Any] = {}
    for base, label in BASES.items():
        q = getattr(config, f"q_{base}")
        schemes = _schemes(by_cell, base)
        detectors = {
            SCHEMES[scheme]: _first_seed(history)
            for scheme, history in schemes.items()
            if scheme != "none"
        }
        if detectors:
            plots[f"scores_{base}"] = fs.report.score_plot(
                detectors,
                at=1,
                title=f"attack on {label}, round 1",
                marks={SCHEMES["pdrr"]: q},
            )
            shown = {SCHEMES[s]: h for s, h in schemes.items()} | {
                f"no attack, {SCHEMES['none']}": h
                for c, h in by_cell.items()
                if (c.part, c.base, c.scheme, c.attack)
                == ("schemes", base, "none", specs.NO_ATTACK)
            }
            lines = {
                name: evaluated(h, 1.0 - np.asarray(h.accuracy, float))
                for name, h in shown.items()
            }
            plots[f"error_{base}"] = fs.report.line_plot(
                lines, "test error", title=f"attack on {label}"
            )
        ranges = {}
        for knowledge, history in _by_knowledge(by_cell, base).items():
            low, high = thresholds(history)
            rounds = np.atleast_2d(history.round)[0]
            at = np.isin(rounds, shown_rounds(config))
            ranges[f"{knowledge} knowledge"] = (rounds[at], low[at], high[at])
        if ranges:
            figure = fs.report.range_plot(
                ranges, "q without a mistake", title=f"attack on {label}", mark=q
            )
            figure.axes[0].set_ylim(0.0, 1.03)
            plots[f"thresholds_{base}"] = figure
    return plots


def _first_seed(history: fs.History) -> fs.History:
    if np.ndim(history.round) == 1:
        return history
    return jax.tree.map(lambda x: x[0], history)
