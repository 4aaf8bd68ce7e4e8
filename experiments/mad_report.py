"""What a run of mad_pneumonia says at its end: tables, plots, summary.md."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

import fedjax_sim as fs
from experiments import results, runner, specs
from experiments.results import evaluated, tail
from fedjax_sim.report import mean_and_spread

EXCLUSION_NOTE = (
    "How many clients MAD excluded for good, over all seeds, and in which rounds, by "
    "the round in which it was engaged. "
    "Distances are scaled from the nearest to the farthest client of each round, so "
    "the farthest of those who are left is at distance 1 whatever the others do."
)
CLIENTS_NOTE = (
    "Loss and accuracy of the server's model on the samples that clients keep for "
    "evaluation, mean over clients and over the last {tail} evaluations (over all, "
    "where there are fewer). The first of each two columns is of the participants, "
    "those not excluded so far, which is what the paper's figure 3(a, b) averages: an "
    "attacker among them evaluates on flipped labels, and its leaving changes that "
    "mean even where the model stays as it is; in the end one or two clients may be "
    "left. *Honest* clients are the same at all times, excluded or not. *never* is "
    "FedAvg, which weighs clients by their samples; MAD weighs those it keeps alike, "
    "before it is engaged as well."
)
METRICS_NOTE = (
    "Mean of the last {tail} evaluations (of all, where there are fewer). Sensitivity "
    "and specificity are those of class 1, the disease; *balanced* is their mean. "
    "*att. out* and *hon. out*: of the attackers and of the honest clients, the share "
    "that MAD excluded for good; for other rules, which decide anew in every round, "
    "the share of their updates that was rejected in the whole run, those that were "
    "not finite among them; a dash where nobody was. mad@{start} is engaged in round "
    "{start}."
)
CLAIMS_NOTE = (
    "The paper shows curves without numbers, so its claims stand here beside what "
    "this run measured, over all rounds of engagement and seeds together. *At once* "
    "is the mean of the last evaluation before the last attacker leaves, to that of "
    "the first after. It does not give its network, learning rate, batch size, local "
    "epochs, the threshold under which a client is excluded, or its number of runs."
)

FIELDS = ("loss", "accuracy")  # what clients measure on their own samples


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
        config: of ``mad_pneumonia``.
        result: its histories and seconds.
        console: where the tables go.
        cells: what each system is, by its name.
        command: what starts this run.
        settings: the run in a sentence.
    """
    histories = {name: _with_seeds(h) for name, h in result.histories.items()}
    engagement = _engagement(config, cells)
    setting = f"{config.attacks[0]}, {config.partitions[0]}"
    tables = {
        f"Exclusion: {setting}": (
            _exclusion_table(engagement, histories),
            EXCLUSION_NOTE,
        ),
        f"The clients' own samples: {setting}": (
            _client_table(engagement, histories),
            CLIENTS_NOTE.format(tail=results.TAIL),
        ),
    }
    note = METRICS_NOTE.format(tail=results.TAIL, start=config.engage[0])
    for partition in config.partitions:
        for attack in config.attacks:
            systems = _systems(cells, partition, attack)
            table = _metrics_table(systems, cells, histories)
            tables[f"Test set: {attack}, {partition}"] = (table, note)
            note = ""
    claims = _claims(config, cells, engagement, histories)
    if claims:
        tables["The paper's claims"] = (claims, CLAIMS_NOTE)
    results.publish(
        config,
        result,
        console,
        title=f"MAD: {config.dataset}",
        command=command,
        settings=settings,
        tables=tables,
        plots=_plots(config, cells, engagement, histories),
    )


def _with_seeds(history: fs.History) -> fs.History:
    """The history with a leading seed axis, also of a run without one."""
    if np.ndim(history.round) == 2:
        return history
    return jax.tree.map(lambda x: np.asarray(x)[None], history)


def _engagement(config: Any, cells: Mapping[str, Any]) -> dict[str, str]:
    """Label to system, of the part engagement: no attack, never, then MAD."""
    first = (config.partitions[0], config.attacks[0])
    found = {}
    for name, cell in cells.items():
        if cell.part != "settings" or cell.partition != first[0]:
            continue
        if cell.attack == specs.NO_ATTACK:
            found["no attack"] = name
        elif cell.attack == first[1] and cell.rule == "fedavg":
            found["never"] = name
    for name, cell in cells.items():
        same = (cell.part, cell.partition, cell.attack) == ("settings", *first)
        if same and cell.start is not None and cell.rule == config.mad[0]:
            found[f"MAD from {cell.start}"] = name
    return found


class Exclusions(NamedTuple):
    """What MAD did with every client, ``[seeds, N]``; N from those ever drawn.

    Attributes:
        since: the round in which it was excluded for good, 0 for never.
        byzantine: whether it is an attacker.
        honest: whether it is not. Neither, where the client was never drawn.
    """

    since: np.ndarray
    byzantine: np.ndarray
    honest: np.ndarray


def exclusions(history: fs.History) -> Exclusions:
    """When MAD excluded each client.

    A client has a finite score in the rounds in which MAD judges it, the last of them
    being that of its exclusion. A client whose update is not finite is rejected in
    that round, but not judged, and not excluded.
    """
    ids = np.asarray(history.client_ids)
    rounds, places = np.broadcast_arrays(np.asarray(history.round)[..., None], ids)
    seeds = np.broadcast_to(np.arange(len(ids))[:, None, None], ids.shape)
    shape = (len(ids), int(ids.max()) + 1)
    since, byzantine = np.zeros(shape, int), np.zeros(shape, bool)
    honest = np.zeros(shape, bool)
    out = np.asarray(history.flagged) & np.isfinite(np.asarray(history.scores))
    since[seeds[out], places[out]] = rounds[out]
    liar = np.asarray(history.byzantine)
    byzantine[seeds[liar], places[liar]] = True
    honest[seeds[~liar], places[~liar]] = True
    return Exclusions(since, byzantine, honest)


def client_means(history: fs.History, field: str, who: str) -> np.ndarray:
    """``[seeds, R]``: mean of a local measurement over ``participants`` or ``honest``.

    NaN where the round was not evaluated, or nobody is left.
    """
    values = np.asarray(history.local[field], float)
    chosen = ~np.asarray(history.byzantine if who == "honest" else history.flagged)
    known = chosen & np.isfinite(values)
    count = known.sum(axis=-1)
    total = np.where(known, values, 0.0).sum(axis=-1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _when(rounds: np.ndarray) -> str:
    """The rounds of exclusion of several clients and seeds, 0 for never."""
    out = np.sort(rounds[rounds > 0])
    share = f"{len(out)} of {rounds.size}"
    if not out.size:
        return share
    span = f"{out[0]}" if out[0] == out[-1] else f"{out[0]}-{out[-1]}"
    return f"{share}, round {span}"


def _systems(cells: Mapping[str, Any], partition: str, attack: str) -> dict[str, str]:
    """Rule to system, of one setting of the part settings; first without an attack."""
    found = {}
    for name, cell in cells.items():
        if (cell.part, cell.partition) != ("settings", partition):
            continue
        if cell.attack == specs.NO_ATTACK:
            found["fedavg, no attack"] = name
        elif cell.attack == attack:
            found[cell.label] = name
    return found


def _exclusion_table(
    engagement: Mapping[str, str], histories: Mapping[str, fs.History]
) -> fs.report.Table:
    rows: list[tuple[str, ...]] = []
    for label, name in engagement.items():
        since, byzantine, honest = exclusions(histories[name])
        if label.startswith("MAD"):
            rows.append((label, _when(since[byzantine]), _when(since[honest])))
    return fs.report.Table(("engaged", "attackers excluded", "honest excluded"), rows)


def _client_table(
    engagement: Mapping[str, str], histories: Mapping[str, fs.History]
) -> fs.report.Table:
    rows = []
    for label, name in engagement.items():
        measured = [
            mean_and_spread(tail(client_means(histories[name], field, who)))
            for field in FIELDS
            for who in ("participants", "honest")
        ]
        rows.append((label, *measured))
    header = ("engaged", "loss", "loss, honest", "accuracy", "accuracy, honest")
    return fs.report.Table(header, rows)


def _metrics_table(
    systems: Mapping[str, str],
    cells: Mapping[str, Any],
    histories: Mapping[str, fs.History],
) -> fs.report.Table:
    rows = []
    for label, name in systems.items():
        history = histories[name]
        measured = {
            "accuracy": history.accuracy,
            "balanced": history.balanced_accuracy,
            "auc": history.auc,
            "sensitivity": np.asarray(history.class_recall)[..., 1],
            "specificity": np.asarray(history.class_specificity)[..., 1],
        }
        if cells[name].start is None:
            out, byzantine = np.asarray(history.flagged), np.asarray(history.byzantine)
            honest = ~byzantine
        else:
            since, byzantine, honest = exclusions(history)
            out = since > 0
        shares = ["-", "-"]
        if out.any():
            shares = [
                f"{100 * out[who].mean():.3g}%" if who.any() else "-"
                for who in (byzantine, honest)
            ]
        values = [
            mean_and_spread(tail(np.asarray(v, float))) for v in measured.values()
        ]
        rows.append((label, *values, *shares))
    header = (
        "rule",
        "accuracy",
        "balanced",
        "AUC",
        "sensit.",
        "specif.",
        "att. out",
        "hon. out",
    )
    return fs.report.Table(header, rows)


def _around(
    history: fs.History, values: np.ndarray, at: np.ndarray
) -> tuple[list[float], list[float]]:
    """The evaluations last before and first from each seed's round ``at``."""
    before, after = [], []
    for seed, when in enumerate(at):
        rounds = np.asarray(history.round)[seed]
        known = np.isfinite(values[seed])
        earlier = values[seed][known & (rounds < when)]
        later = values[seed][known & (rounds >= when)]
        if when > 0 and earlier.size and later.size:
            before.append(float(earlier[-1]))
            after.append(float(later[0]))
    return before, after


class _Effects(NamedTuple):
    """What MAD did, over all its systems and seeds.

    Attributes:
        caught: attackers that were excluded, of ``attackers``.
        alarms: honest clients that were excluded, of ``honest``.
        all_gone: runs in which every attacker was excluded in the end.
        moved: ``field who`` (see ``client_means``) to the evaluations last before and
            first after the last attacker's exclusion, one for each of those runs.
    """

    caught: int
    attackers: int
    alarms: int
    honest: int
    all_gone: int
    moved: dict[str, tuple[list[float], list[float]]]

    def change(self, key: str) -> str:
        before, after = self.moved[key]
        if before:
            return f"{np.mean(before):.3f} to {np.mean(after):.3f}"
        if self.all_gone:
            return "not evaluated both before and after"
        return "not known: attackers were left in every run"


def _effects(systems: Sequence[fs.History]) -> _Effects:
    caught, attackers, alarms, honest, all_gone = 0, 0, 0, 0, 0
    moved: dict[str, tuple[list[float], list[float]]] = {}
    for history in systems:
        since, byzantine, innocent = exclusions(history)
        caught += int((since[byzantine] > 0).sum())
        attackers += int(byzantine.sum())
        alarms += int((since[innocent] > 0).sum())
        honest += int(innocent.sum())
        # The round from which nobody of the attackers takes part.
        gone = [
            own[liars].max() if liars.any() and (own[liars] > 0).all() else 0
            for own, liars in zip(since, byzantine)
        ]
        all_gone += sum(when > 0 for when in gone)
        for field, who in itertools.product(FIELDS, ("participants", "honest")):
            values = client_means(history, field, who)
            pair = _around(history, values, np.array(gone))
            old = moved.setdefault(f"{field} {who}", ([], []))
            old[0].extend(pair[0])
            old[1].extend(pair[1])
    return _Effects(caught, attackers, alarms, honest, all_gone, moved)


def _course(history: fs.History, who: str) -> str:
    """Where the loss was lowest, and where it ended: mean over seeds that stay finite.

    Of one that diverged in every seed, the first seed's.
    """
    by_seed = client_means(history, "loss", who)
    known = np.isfinite(by_seed)
    whole = known.all(axis=1, where=known.any(axis=0))
    values = by_seed[whole].mean(axis=0) if whole.any() else by_seed[0]
    rounds = np.asarray(history.round)[0]
    at = np.flatnonzero(np.isfinite(values))
    if not at.size:
        return "diverged"
    lowest = at[np.argmin(values[at])]
    return (
        f"lowest {values[lowest]:.3f} in round {rounds[lowest]}, "
        f"{values[at[-1]]:.3f} in round {rounds[at[-1]]}"
    )


def _claims(
    config: Any,
    cells: Mapping[str, Any],
    engagement: Mapping[str, str],
    histories: Mapping[str, fs.History],
) -> fs.report.Table | None:
    """What the paper says of its figure 3, and the numbers of this run."""
    mad = [histories[v] for k, v in engagement.items() if k.startswith("MAD")]
    if not mad or "never" not in engagement:
        return None
    did = _effects(mad)
    never = histories[engagement["never"]]
    rows: list[tuple[str, ...]] = [
        (
            "MAD excluded both attackers in every simulation",
            f"{did.caught} of {did.attackers} attackers, and {did.alarms} of "
            f"{did.honest} honest clients",
        ),
        (
            "exclusion at once lowers the loss",
            f"participants {did.change('loss participants')}, "
            f"honest {did.change('loss honest')}",
        ),
        (
            "exclusion at once raises the accuracy",
            f"participants {did.change('accuracy participants')}, "
            f"honest {did.change('accuracy honest')}",
        ),
        (
            "without exclusion the loss does not converge but rises slightly",
            f"participants: {_course(never, 'participants')}; "
            f"honest: {_course(never, 'honest')}",
        ),
    ]
    rows += _long_claims(config, cells, histories)
    return fs.report.Table(("the paper", "here"), rows)


def _long_claims(
    config: Any, cells: Mapping[str, Any], histories: Mapping[str, fs.History]
) -> list[tuple[str, str]]:
    """Honest clients' accuracy in the part long, before and after the last start."""
    long = {c.start: histories[n] for n, c in cells.items() if c.part == "long"}
    if len(long) < 2:
        return []
    late = max(long)
    parts = []
    for start, history in sorted(long.items()):
        values = client_means(history, "accuracy", "honest")
        rounds = np.asarray(history.round)[0]
        known = np.isfinite(values).all(axis=0)
        while_in = known & (rounds > late // 2) & (rounds < late)
        after = known & (rounds > late)
        text = f"engaged at {start}:"
        for label, span in (("before", while_in), ("from", after)):
            if span.any():
                mean, spread = (
                    values[:, span].mean(),
                    values[:, span].std(axis=1).mean(),
                )
                text += f" {label} round {late} {mean:.3f} (spread {spread:.3f}),"
        parts.append(text.rstrip(","))
    claim = (
        "attackers lower benign clients' accuracy and make it fluctuate until excluded"
    )
    return [(claim, "; ".join(parts))]


def _plots(
    config: Any,
    cells: Mapping[str, Any],
    engagement: Mapping[str, str],
    histories: Mapping[str, fs.History],
) -> dict[str, Any]:
    def lines(systems: Mapping[str, str], field: str, who: str) -> dict[str, Any]:
        return {
            label: evaluated(histories[name], client_means(histories[name], field, who))
            for label, name in systems.items()
        }

    draw: Callable[..., Any] = fs.report.line_plot
    starts = [c.start for n, c in cells.items() if n in engagement.values() and c.start]
    setting = f"{config.attacks[0]}, {config.partitions[0]}"
    plots = {
        "client_loss": draw(
            lines(engagement, "loss", "participants"),
            "loss of participants",
            title=setting,
            marks=starts,
        ),
        "client_accuracy": draw(
            lines(engagement, "accuracy", "participants"),
            "accuracy of participants",
            title=setting,
            marks=starts,
        ),
        "honest_accuracy": draw(
            lines(engagement, "accuracy", "honest"),
            "accuracy of honest clients",
            title=setting,
            marks=starts,
        ),
    }
    long = {f"MAD from {c.start}": n for n, c in cells.items() if c.part == "long"}
    if long:
        plots["honest_accuracy_long"] = draw(
            lines(long, "accuracy", "honest"),
            "accuracy of honest clients",
            title=setting,
            marks=list(config.engage_long),
        )
    first = next(n for k, n in engagement.items() if k.startswith("MAD"))
    one_seed = jax.tree.map(lambda x: np.asarray(x)[0], histories[first])
    plots["trust"] = fs.report.client_plot(
        one_seed,
        ["reputation", "trust"],
        title=f"{setting}, MAD from {cells[first].start}, seed {config.seed}",
        marks=[cells[first].start],
    )
    return plots
