"""What attack_matrix keeps of a cell and says of all: CSV, tables, heat maps."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

import fedjax_sim as fs
from experiments import results, specs

# Per-seed numbers of a cell, as in its file and in matrix.csv.
MEASURES = (
    "accuracy",
    "final_accuracy",
    "loss",
    "attack_success",
    "lowest_recall",
    "tpr",
    "fpr",
    "no_weight_byzantine",
    "no_weight_honest",
    "num_flagged",
    "num_nonfinite",
    "no_aggregate",
)
MEASURE_NOTE = (
    f"Accuracy: test accuracy, mean of the last {results.TAIL} evaluations (of all, if "
    "there are fewer), mean over seeds, at the strength that hurts most. Attack "
    "success: share of the triggered test samples that the model takes for what the "
    "attacker wants, likewise, at the strength that succeeds most. A dash: the rule or "
    "the attack has no meaning there (too many attackers for it)."
)
DETECTION_NOTE = (
    "TPR and FPR: share of the Byzantine and of the honest clients that the rule "
    "rejected (a dash: nobody was), no weight: that had no say in the "
    "aggregate; not finite: updates per round left out for a NaN or infinity, as a "
    "model that diverged sends them; no update: share of rounds that left the model as "
    "it was. Mean over rounds, seeds and the attacks of the matrix (without *none*)."
)


def measure(history: fs.History) -> dict[str, Any]:
    """The results of one seed of a cell, as JSON values (None where undefined)."""
    known = ~np.isnan(history.accuracy)
    byzantine = np.asarray(history.byzantine, bool)
    silent = np.asarray(history.weights) == 0

    def tail(values: Any) -> float:
        values = np.asarray(values, np.float64)[known][-results.TAIL :]
        return float(values.mean()) if np.isfinite(values).all() else np.nan

    def share(rows: np.ndarray) -> float:
        return float(silent[rows].mean()) if rows.any() else np.nan

    recall = np.asarray(history.class_recall, np.float64)[known][-1]
    found = {
        "accuracy": tail(history.accuracy),
        "final_accuracy": float(np.asarray(history.accuracy)[known][-1]),
        "loss": tail(history.loss),
        "attack_success": tail(history.attack_success),
        "lowest_recall": float(np.nanmin(recall)),
        "tpr": _mean(history.tpr),
        "fpr": _mean(history.fpr),
        "no_weight_byzantine": share(byzantine),
        "no_weight_honest": share(~byzantine),
        "num_flagged": _mean(history.num_flagged),
        "num_nonfinite": _mean(history.num_nonfinite),
        "no_aggregate": _mean(history.no_aggregate),
    }
    return {
        **{name: _json(value) for name, value in found.items()},
        "class_recall": [_json(value) for value in recall],
        "curve": {
            "round": np.asarray(history.round)[known].tolist(),
            "accuracy": [_json(a) for a in np.asarray(history.accuracy)[known]],
        },
    }


def _mean(values: Any) -> float:
    values = np.asarray(values, np.float64)
    return float(np.nanmean(values)) if not np.isnan(values).all() else np.nan


def _json(value: float) -> float | None:
    return round(float(value), 6) if np.isfinite(value) else None


def by_strength(
    content: Mapping[str, Any], name: str
) -> dict[float | None, np.ndarray]:
    """Strength -> the seeds' values of a measure, NaN where undefined."""
    found: dict[float | None, list[float]] = {}
    for run in content["results"]:
        value = run[name]
        found.setdefault(run["strength"], []).append(np.nan if value is None else value)
    return {strength: np.array(values) for strength, values in found.items()}


def headline(
    content: Mapping[str, Any] | None, name: str = "accuracy", highest: bool = False
) -> tuple[float, float, float | None]:
    """Mean over seeds, spread, and strength, where the attacker does best.

    The strength is that of the lowest mean, or of the ``highest``. NaN where the cell
    is not there or does not have this measure.
    """
    if content is None:
        return np.nan, np.nan, None
    values = by_strength(content, name)
    means = {s: v.mean() for s, v in values.items() if not np.isnan(v).any()}
    if not means:
        return np.nan, np.nan, None
    strength = (max if highest else min)(means, key=lambda s: means[s])
    seeds = values[strength]
    spread = float(seeds.std(ddof=1)) if len(seeds) > 1 else np.nan
    return float(means[strength]), spread, strength


def write_csv(path: Path, contents: Iterable[Mapping[str, Any] | None]) -> None:
    """A row for every cell, strength and seed."""
    setting = ("partition", "attackers", "attack", "aggregator")
    rows = []
    for content in filter(None, contents):
        for run in content["results"]:
            cell, values = content["cell"], (run[name] for name in MEASURES)
            head = [cell[name] for name in setting]
            head += [content["max_byzantine"], content["rounds"]]
            rows.append([*head, run["strength"], run["seed"], *values])
    header = [*setting, "max_byzantine", "rounds", "strength", "seed", *MEASURES]
    results.write_csv(path, header, rows)


def labels(spec_list: Sequence[str]) -> dict[str, str]:
    """Spec -> its names without the options, where that still tells them apart."""
    short = {s: re.sub(r"\([^)]*\)", "", s) for s in spec_list}
    return {
        s: name if list(short.values()).count(name) == 1 else s
        for s, name in short.items()
    }


def write(
    config: Any,
    command: str,
    done: Mapping[Any, Mapping[str, Any] | None],
    why: Mapping[Any, str],
    console: Console,
) -> None:
    """Prints the tables and writes the CSV, heat maps, summary.json and summary.md.

    Args:
        config: of attack_matrix.
        command: what makes this matrix.
        done: cell -> its content, None where it cannot be.
        why: cell -> why it cannot be, "" where it can.
        console: where the tables go.
    """
    write_csv(config.out / "matrix.csv", done.values())
    for old in config.out.glob("heatmap*.p*"):  # of another list of rules and attacks
        old.unlink()
    rules, attacks = labels(config.aggregators), labels(config.attacks)
    parts = [
        f"# Aggregators against attacks: {config.dataset}",
        f"`{command}`",
        settings_line(config),
        "Aggregators: " + ", ".join(f"`{spec}`" for spec in config.aggregators) + ".",
        "Attacks: " + ", ".join(f"`{spec}`" for spec in config.attacks) + ".",
        versions_line(done.values()),
        MEASURE_NOTE,
    ]
    summary: list[dict[str, Any]] = []
    settings: dict[str, Mapping[tuple[str, str], Any]] = {}
    several = len(config.partitions) * len(config.attackers) > 1
    for partition in config.partitions:
        for attackers in config.attackers:
            here = {
                (c.aggregator, c.attack): content
                for c, content in done.items()
                if (c.partition, c.attackers) == (partition, attackers)
            }
            title = f"{partition}, {results.percent(attackers)} attackers"
            name = "heatmap" + (f"-{_slug(partition)}-{attackers:g}" if several else "")
            accuracy = grid(here, config)
            success = grid(here, config, "attack_success", highest=True)
            settings[title] = here
            table = worst_table(here, config)
            console.print(fs.report.rich_table(*table, title=f"Worst case: {title}"))
            parts += [f"## {title}", "### Worst case over the attacks"]
            parts += [fs.report.markdown_table(*table), "### Accuracy"]
            parts += [_markdown(accuracy, rules, attacks, config)]
            figures = {name: (accuracy, "test accuracy")}
            targeted = ~np.isnan(success).all(axis=0)
            if targeted.any():
                figures[f"{name}-success"] = (success[:, targeted], "attack success")
                own = [a for a, t in zip(config.attacks, targeted) if t]
                short = {a: attacks[a] for a in own}
                parts += [
                    "### Attack success",
                    _markdown(success[:, targeted], rules, short, config),
                ]
            for file, (values, what) in figures.items():
                columns = attacks if values is accuracy else short
                for suffix in ("png", "pdf"):
                    fs.report.heatmap(
                        values,
                        list(rules.values()),
                        list(columns.values()),
                        config.out / f"{file}.{suffix}",
                        label=what,
                        title=title,
                    )
                parts.append(f"![{what}: {title}]({file}.png)")
            parts += [
                "### Detection",
                fs.report.markdown_table(*detection_table(here, config)),
                DETECTION_NOTE,
            ]
            summary.append(
                {
                    "partition": partition,
                    "attackers": attackers,
                    "accuracy": _nested(accuracy, config),
                    "attack_success": _nested(success, config),
                }
            )
    if several:
        table = settings_table(settings, config)
        title = "Worst case in every setting"
        console.print(fs.report.rich_table(*table, title=title))
        parts += [f"## {title}", fs.report.markdown_table(*table)]
    reasons = sorted(
        {f"- {c.aggregator} x {c.attack}: {r}" for c, r in why.items() if r}
    )
    if reasons:
        parts += ["## Not possible", "\n".join(reasons)]
    content = {
        "command": command,
        "settings": summary,
        "versions": versions_line(done.values()),
    }
    results.write_atomically(
        config.out / "summary.json", json.dumps(content, indent=2) + "\n"
    )
    results.write_atomically(config.out / "summary.md", "\n\n".join(parts) + "\n")
    console.print(
        f"results in {config.out}: summary.md, summary.json, matrix.csv, heat maps"
    )


def versions_line(contents: Iterable[Mapping[str, Any] | None]) -> str:
    """The versions and devices that the cells were run with, all of them."""
    found: dict[str, list[str]] = {}
    for content in filter(None, contents):
        for name, version in content["versions"].items():
            known = found.setdefault(name, [])
            if version not in known:
                known.append(version)
    return "; ".join(f"{name} {' and '.join(v)}" for name, v in found.items())


def settings_line(config: Any) -> str:
    """The matrix in a sentence."""
    training = (
        f"{config.epochs} local epochs"
        if config.steps is None
        else f"{config.steps} local steps"
    )
    cohort = "all" if config.cohort == "all" else f"{config.cohort} sampled"
    seeds = f"seed {config.seed}"
    if config.num_seeds > 1:
        seeds += f" and the {config.num_seeds - 1} after it"
    return (
        f"{config.dataset}, {config.model}, {config.clients} clients ({cohort} in a "
        f"round), {config.rounds} rounds of {training}, batch {config.batch_size}, "
        f"rate {config.lr:g}, root dataset of {config.root_size}, {seeds}. What each "
        "rule assumed of the number of attackers is in matrix.csv."
    )


def grid(
    here: Mapping[tuple[str, str], Any],
    config: Any,
    name: str = "accuracy",
    highest: bool = False,
) -> np.ndarray:
    """``[aggregators, attacks]`` of a measure where the attacker does best."""
    return np.array(
        [
            [
                headline(here[rule, attack], name, highest)[0]
                for attack in config.attacks
            ]
            for rule in config.aggregators
        ]
    )


class Worst(NamedTuple):
    """A rule under the attack it withstands least, in one setting."""

    accuracy: float  # NaN where the rule has no meaning under any attack
    spread: float
    under: str  # the attack, with its strength
    mean: float  # accuracy over all attacks


def real_attacks(config: Any) -> list[str]:
    return [attack for attack in config.attacks if attack != specs.NO_ATTACK]


def worst(here: Mapping[tuple[str, str], Any], rule: str, config: Any) -> Worst:
    """The lowest accuracy of a rule over the attacks, at their strongest."""
    found = {a: headline(here[rule, a]) for a in real_attacks(config)}
    found = {a: f for a, f in found.items() if not np.isnan(f[0])}
    if not found:
        return Worst(np.nan, np.nan, "-", np.nan)
    accuracies = {attack: f[0] for attack, f in found.items()}
    attack = str(fs.metrics.worst_case(accuracies).attack)
    accuracy, spread, strength = found[attack]
    at = "" if strength is None else f" {strength:g}"
    mean = float(np.mean(list(accuracies.values())))
    return Worst(accuracy, spread, labels(config.attacks)[attack] + at, mean)


def worst_table(here: Mapping[tuple[str, str], Any], config: Any) -> fs.report.Table:
    """Aggregators by their worst accuracy over the attacks, the best first."""
    rules, short = labels(config.aggregators), labels(config.attacks)
    clean = specs.NO_ATTACK in config.attacks
    lowest = {rule: worst(here, rule, config) for rule in config.aggregators}
    rows = []
    for rule in _best_first({rule: found.accuracy for rule, found in lowest.items()}):
        found = lowest[rule]
        success = {
            short[a]: headline(here[rule, a], "attack_success", highest=True)[0]
            for a in real_attacks(config)
        }
        success = {a: s for a, s in success.items() if not np.isnan(s)}
        row = [rules[rule]]
        if clean:
            row.append(_text(*headline(here[rule, specs.NO_ATTACK])[:2]))
        row += [_text(found.accuracy, found.spread), found.under]
        row.append(_text(found.mean, np.nan))
        if success:
            most = max(success, key=lambda a: success[a])
            of = f" ({most})" if len(success) > 1 else ""
            row.append(f"{success[most]:.3f}{of}")
        else:
            row.append("-")
        rows.append(tuple(row))
    header = ("aggregator", *(("no attack",) if clean else ()), "worst", "under")
    return fs.report.Table((*header, "mean", "attack success"), rows)


def settings_table(
    settings: Mapping[str, Mapping[tuple[str, str], Any]], config: Any
) -> fs.report.Table:
    """The worst case of every aggregator in every setting, side by side.

    Args:
        settings: title -> (aggregator, attack) -> content.
        config: of attack_matrix.
    """
    rules = labels(config.aggregators)
    found = {
        rule: [worst(here, rule, config) for here in settings.values()]
        for rule in config.aggregators
    }
    lowest = {rule: float(np.min([w.accuracy for w in found[rule]])) for rule in found}
    rows = []
    for rule in _best_first(lowest):
        texts = (
            "-" if np.isnan(w.accuracy) else f"{w.accuracy:.3f} {w.under}"
            for w in found[rule]
        )
        rows.append((rules[rule], *texts))
    return fs.report.Table(("aggregator", *settings), rows)


def _best_first(accuracies: Mapping[str, float]) -> list[str]:
    """Rules by accuracy, those without one last."""
    return sorted(accuracies, key=lambda rule: -np.nan_to_num(accuracies[rule], nan=-1))


def detection_table(
    here: Mapping[tuple[str, str], Any], config: Any
) -> fs.report.Table:
    """Whom each rule rejected and silenced, over all real attacks."""
    rules = labels(config.aggregators)
    rates = ("tpr", "fpr")
    shares = ("no_weight_byzantine", "no_weight_honest", "num_nonfinite")
    rows = []
    for rule in config.aggregators:
        cells = [here[rule, a] for a in config.attacks if a != specs.NO_ATTACK]
        runs = [run for cell in cells if cell for run in cell["results"]]
        row = [rules[rule]]
        rejects = any(run["num_flagged"] > run["num_nonfinite"] for run in runs)
        for name in (*rates, *shares, "no_aggregate"):
            values = [run[name] for run in runs if run[name] is not None]
            known = values and (rejects or name not in rates)
            row.append(f"{np.mean(values):.2f}" if known else "-")
        rows.append(tuple(row))
    header = ("aggregator", "TPR", "FPR", "no weight: Byz.", "no weight: honest")
    return fs.report.Table((*header, "not finite", "no update"), rows)


def _text(mean: float, spread: float) -> str:
    if np.isnan(mean):
        return "-"
    return f"{mean:.3f}" + ("" if np.isnan(spread) else f" ± {spread:.3f}")


def _markdown(
    values: np.ndarray,
    rules: Mapping[str, str],
    columns: Mapping[str, str],
    config: Any,
) -> str:
    rows = [
        (rules[rule], *(_text(v, np.nan) for v in row))
        for rule, row in zip(config.aggregators, values)
    ]
    return fs.report.markdown_table(("aggregator", *columns.values()), rows)


def _nested(values: np.ndarray, config: Any) -> dict[str, dict[str, float | None]]:
    return {
        rule: {a: _json(v) for a, v in zip(config.attacks, row)}
        for rule, row in zip(config.aggregators, values)
    }


def _slug(text: str) -> str:
    return re.sub(r"[^\w.]+", "_", text).strip("_")
