"""``RESULTS.md`` and its plots, from what ``run`` measured."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.workloads import MFLOP
from fedjax_sim.report import markdown_table

NAMES = {
    "cnn": "FLTrust's CNN, 28x28",
    "mlp": "MLP 784-200-10",
    "digits_cnn": "small CNN, 8x8",
}
# What the project set out to reach: at least (or, for shares of time, at most).
PYTORCH = {"cnn": 3.0, "mlp": 4.0, "digits_cnn": 10.0}
NAIVE, SHARE, MATRIX, REST = 15.0, 0.40, 5.0, 0.10
COORDINATE_WISE = ("median", "trimmed_mean", "meamed")
NOT_MEASURED = "not measured"


def write(results: Mapping[str, Any], out: Path) -> None:
    """RESULTS.md, training.png and aggregation.png."""
    sections = [heading(results), targets(results)]
    writers = {
        "training": training,
        "aggregation": aggregation,
        "round": one_round,
        "matrix": matrix,
        "flower": flower,
        "demo": demo,
    }
    for name, writer in writers.items():
        if measured(results, name):
            sections.append(writer(results[name]))
    (out / "RESULTS.md").write_text("\n\n".join(sections) + "\n")
    if measured(results, "training"):
        plot_training(results["training"], out / "training.png")
    if measured(results, "aggregation"):
        plot_aggregation(results["aggregation"], out / "aggregation.png")


def measured(results: Mapping[str, Any], name: str) -> bool:
    return name in results and "failed" not in results[name]


def heading(results: Mapping[str, Any]) -> str:
    machine = results["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items())
    return (
        "# Speed beside the peers\n\n"
        "Written by `make bench` (`python -m benchmarks.run`) from `results.json`; the "
        "arms are in `arms/`, their sizes in `workloads.py`. Ratios of one run on one "
        "machine; compile time is apart unless it says otherwise.\n\n"
        f"Machine: {machine['processor']}, {machine['cores']} cores. {versions}. "
        "Random data, seed 0, where it is not MNIST."
    )


def best_pytorch(arms: Mapping[str, Any]) -> float | None:
    rates = [
        found["rate"]
        for name, found in arms.items()
        if name.startswith("PyTorch loop") and "rate" in found
    ]
    return max(rates, default=None)


class Target(NamedTuple):
    """One thing that was to be reached. ``met`` is None where it was not measured."""

    workload: str
    against: str
    wanted: str
    reached: str
    met: bool | None
    why_not: str = ""


def times(
    workload: str, against: str, wanted: float, ratio: float | None, why_not: str = ""
) -> Target:
    """A target that is a ratio."""
    if ratio is None:
        return Target(workload, against, f"{wanted:g}x", NOT_MEASURED, None)
    met = ratio >= wanted
    return Target(workload, against, f"{wanted:g}x", f"{ratio:.1f}x", met, why_not)


def targets(results: Mapping[str, Any]) -> str:
    """What the project set out to reach, what came, and why not more."""
    rows: list[Target] = []
    if measured(results, "training"):
        rows += training_targets(results["training"])
    if measured(results, "aggregation"):
        rows += aggregation_targets(results["aggregation"])
    if measured(results, "round"):
        systems = results["round"]["systems"].values()
        worst = max(s["rest"] / (s["rest"] + s["train"]) for s in systems)
        rows.append(
            Target(
                "attack, aggregation and server step",
                "the whole round, one local epoch of 600 samples",
                f"under {REST:.0%}",
                f"{worst:.1%} at most",
                worst < REST,
            )
        )
    if measured(results, "matrix"):
        found = results["matrix"]
        rows.append(
            times(
                f"MNIST, {len(found['rules'])} rules x {len(found['attacks'])} attacks",
                "ByzFL, compiling included",
                MATRIX,
                found["byzfl"]["total"] / found["fedjax_sim"]["total"],
                "a round has one step of ten samples, as in ByzFL's own loop, so that "
                "rules take as long as training, which alone is as much faster as the "
                "first row says; it trains all 100 clients where ByzFL trains the 80 "
                "honest ones; and a program is compiled for each attack.",
            )
        )
    if measured(results, "demo"):
        first = results["demo"]["first"]
        share = first["compile"] / first["wall"]
        rows.append(
            Target(
                "`make demo` with an empty cache",
                "compiling, of the wall clock",
                "under 50%",
                f"{share:.0%}",
                share < 0.5,
            )
        )
    rows.append(
        Target(
            "GPU, 1000 rounds of the source study",
            "PyTorch loop on the card; its roofline",
            "50x; a third; under 5 min",
            NOT_MEASURED,
            None,
            "No GPU could be had; `python -m benchmarks.gpu` makes the figures.",
        )
    )
    words = {True: "met", False: "not met", None: ""}
    table = [(*row[:4], words[row.met]) for row in rows]
    text = "## What was to be reached\n\n" + markdown_table(
        ("workload", "against", "wanted", "reached", ""), table
    )
    reasons = [
        f"- {row.workload}, against {row.against}: {row.why_not}"
        for row in rows
        if not row.met and row.why_not
    ]
    return text + "\n\nWhy not:\n\n" + "\n".join(reasons)


def training_targets(found: Mapping[str, Any]) -> list[Target]:
    rows = []
    for model, arms in found["models"].items():
        wanted = PYTORCH[model]
        theirs = best_pytorch(arms)
        ratio = arms["fedjax_sim"]["rate"] / theirs if theirs else None
        against = "PyTorch loop, best number of threads"
        rows.append(times(f"training, {NAMES[model]}", against, wanted, ratio))
    if "cnn" not in found["models"]:
        return rows
    arms = found["models"]["cnn"]
    name = f"training, {NAMES['cnn']}"
    rows.append(
        times(
            name,
            "naive vmap of flax convolutions in a scan",
            NAIVE,
            arms["fedjax_sim"]["rate"] / arms["naive vmap"]["rate"],
        )
    )
    share = sgemm_share(found, "cnn")
    against = "this machine's large matrix product, GFLOP/s"
    rows.append(Target(name, against, f"{SHARE:.0%}", f"{share:.0%}", share >= SHARE))
    return rows


def sgemm_share(found: Mapping[str, Any], model: str) -> float:
    rate = found["models"][model]["fedjax_sim"]["rate"]
    return float(rate * MFLOP[model] / 1e3 / largest_sgemm(found))


def largest_sgemm(found: Mapping[str, Any]) -> float:
    return max(v for v in found["sgemm"].values() if not isinstance(v, dict))


def training(found: Mapping[str, Any]) -> str:
    rows = []
    for model, arms in found["models"].items():
        ours = arms["fedjax_sim"]["rate"]
        for name, arm in arms.items():
            if "failed" in arm:
                rows.append((NAMES[model], name, arm["failed"], "", "", "", "", ""))
                continue
            low, high = arm["range"]
            flops = arm["rate"] * MFLOP[model] / 1e3
            rows.append(
                (
                    NAMES[model],
                    name,
                    f"{arm['rate']:,.0f}",
                    f"{low:,.0f} to {high:,.0f}",
                    f"{ours / arm['rate']:.1f}x",
                    f"{flops:.0f}",
                    f"{arm['compile']:.1f}" if "compile" in arm else "",
                    f"{arm['peak_mb']:,.0f}",
                )
            )
    header = (
        "model",
        "arm",
        "samples/s",
        "range",
        "ours against it",
        "GFLOP/s",
        "compile s",
        "peak MB",
    )
    return (
        "## Local training\n\n"
        "100 clients, one epoch of 100 samples (of 600 for the MLP) in batches of 10, "
        f"plain SGD; the median of {found['passes']} passes in which the arms take "
        "turns. GFLOP/s "
        "counts what the textbook network needs (forward and both gradients, none for "
        "the input of the first layer); a large matrix product reaches "
        f"{largest_sgemm(found):.0f} GFLOP/s here. On one device all cores share each "
        "operation; otherwise each trains its own clients. Naive `vmap` trains 20 "
        "clients of 20 samples of the large CNN.\n\n"
        f"{markdown_table(header, rows)}\n\n![](training.png)"
    )


def aggregation_targets(found: Mapping[str, Any]) -> list[Target]:
    rows = []
    for peer, label in (("byzfl", "ByzFL"), ("torch", "PyTorch in a line")):
        name = f"aggregation, n={found['size']['rows']}, d=1.6M"
        if "failed" in found[peer]:
            rows.append(Target(name, label, "", NOT_MEASURED, None))
            continue
        ratios = peer_ratios(found, peer)
        for which, wanted, why_not in (
            (
                "coordinate-wise",
                2.0,
                "the sort network is bound by a core's cache, and a rule on one device "
                "uses little more than one core.",
            ),
            (
                "every other rule",
                1.0,
                "a mean is one pass over memory. Ours reads the matrix twice, since no "
                "row that is not finite may reach the aggregate; steps before it write "
                "their rows to new memory and leave the input as it was, where ByzFL "
                "writes into its input.",
            ),
        ):
            coordinates = which == "coordinate-wise"
            part = {
                k: v for k, v in ratios.items() if (k in COORDINATE_WISE) == coordinates
            }
            least = min(part, key=lambda k, p=part: p[k])
            below = [f"{k} {v:.1f}x" for k, v in part.items() if v < wanted]
            reached = f"{part[least]:.1f}x or more"
            if below:
                reached = f"{len(part) - len(below)} of {len(part)}; {', '.join(below)}"
            rows.append(
                Target(
                    f"{name}, {which}",
                    label,
                    f"{wanted:g}x",
                    reached,
                    not below,
                    why_not,
                )
            )
    return rows


def peer_ratios(found: Mapping[str, Any], peer: str) -> dict[str, float]:
    """How many times faster each rule is here."""
    pairs = [(found["fedjax_sim"]["seconds"], found[peer]["seconds"])]
    if peer == "byzfl" and "failed" not in found["few"][peer]:
        few = found["few"]
        pairs.append((few["fedjax_sim"]["seconds"], few[peer]["seconds"]))
    return {
        rule: theirs[rule] / seconds
        for ours, theirs in pairs
        for rule, seconds in ours.items()
        if theirs.get(rule) is not None
    }


def aggregation(found: Mapping[str, Any]) -> str:
    rows = []
    for part in (found, found["few"]):
        n, d = part["size"]["rows"], part["size"]["columns"]
        for rule, seconds in part["fedjax_sim"]["seconds"].items():
            cells = [f"{rule}", f"{n} x {d / 1e6:g}M", f"{seconds * 1e3:,.0f}"]
            for peer in ("byzfl", "torch"):
                theirs = part.get(peer, {}).get("seconds", {})
                value = theirs.get(rule)
                if value is not None:
                    ratio = value / seconds
                    cells.append(f"{value * 1e3:,.0f} ({ratio:.1f}x)")
                else:
                    cells.append("out of memory" if rule in theirs else "")
            cells.append(f"{part['fedjax_sim']['compile'][rule]:.1f}")
            rows.append(tuple(cells))
    header = ("rule", "matrix", "fedjax_sim ms", "ByzFL ms", "PyTorch ms", "compile s")
    return (
        "## Aggregation\n\n"
        "Of a float32 matrix, on one device; the median of 3. Each of ours also looks "
        "for rows that are not finite and reports every client's weight, score and "
        "flag. Pre-aggregators are followed by the mean. PyTorch: `mean`, `median`, "
        "`sort` and a mean, `cdist` and `topk`.\n\n"
        f"{markdown_table(header, rows)}\n\n![](aggregation.png)"
    )


def one_round(found: Mapping[str, Any]) -> str:
    rows = [
        (
            name,
            f"{part['train']:.2f}",
            f"{part['rest']:.3f}",
            f"{part['rest'] / (part['rest'] + part['train']):.1%}",
        )
        for name, part in found["systems"].items()
    ]
    header = ("aggregator", "training s", "all the rest s", "share of the rest")
    return (
        "## A round, and what of it is not training\n\n"
        "FLTrust's CNN, 100 clients, 20 attackers with ALIE, one epoch of 600 samples "
        f"in batches of 10.\n\n{markdown_table(header, rows)}"
    )


def matrix(found: Mapping[str, Any]) -> str:
    ours, theirs = found["fedjax_sim"], found["byzfl"]
    rows = [
        (
            cell,
            f"{part['accuracy']:.3f}",
            f"{theirs['cells'][cell]['accuracy']:.3f}",
            f"{part['of another seed']:.3f}",
        )
        for cell, part in ours["cells"].items()
    ]
    apart = [
        abs(part["accuracy"] - theirs["cells"][cell]["accuracy"])
        for cell, part in ours["cells"].items()
    ]
    noise = [
        abs(part["accuracy"] - part["of another seed"])
        for part in ours["cells"].values()
    ]
    header = ("rule/attack", "fedjax_sim", "ByzFL", "fedjax_sim, seed 1")
    return (
        "## Rules x attacks on MNIST\n\n"
        f"{NAMES[found['model']]}, 100 clients, 20 attackers, IID, {found['rounds']} "
        "rounds of one step of 10 samples, seed 0, one run. ByzFL's own classes in its "
        "own loop, with the data in memory, from initial weights drawn as Flax does. "
        f"fedjax_sim {ours['total']:.0f} s, of which it compiles "
        f"{ours['compile']:.0f}; ByzFL {theirs['total']:.0f} s. Final accuracies of "
        f"the two differ by {sum(apart) / len(apart):.3f} on average over the cells, "
        f"those of two seeds here (whose second is not in the time) by "
        f"{sum(noise) / len(noise):.3f}. After 20 steps of rate 0.1 accuracies still "
        "swing from round to round.\n\n"
        f"{markdown_table(header, rows)}"
    )


def flower(found: Mapping[str, Any]) -> str:
    ours, theirs = found["fedjax_sim"], found["flower"]
    return (
        "## Flower\n\n"
        f"FedAvg, FLTrust's CNN, {found['clients']} clients, one epoch of "
        f"{found['samples']} samples: Flower's simulation {theirs['per_round']:.2f} s "
        f"a round after {theirs['start']:.0f} s with its first; local training here "
        f"{ours['median']:.2f} s after {ours['compile']:.1f} s of compiling, "
        f"{theirs['per_round'] / ours['median']:.1f} times as fast."
    )


def demo(found: Mapping[str, Any]) -> str:
    rows = [
        (name, *(f"{found[name][k]:.1f}" for k in ("wall", "compile", "run")))
        for name in ("first", "second")
    ]
    header = ("run", "wall clock s", "compiling s", "running s")
    return (
        "## `make demo`\n\n"
        "First with an empty cache of compiled programs, then again.\n\n"
        + markdown_table(header, rows)
    )


def plot_training(found: Mapping[str, Any], path: Path) -> None:
    """Samples a second, a panel per model."""
    models = found["models"]
    fig, axes = plt.subplots(1, len(models), figsize=(11, 2.8), layout="constrained")
    for ax, (model, arms) in zip(axes, models.items()):
        there = {k: v for k, v in arms.items() if "rate" in v}
        names = list(there)[::-1]
        rates = [there[n]["rate"] for n in names]
        ends = [
            [there[n]["rate"] - there[n]["range"][0] for n in names],
            [there[n]["range"][1] - there[n]["rate"] for n in names],
        ]
        colors = ["C0" if n.startswith("fedjax") else "0.65" for n in names]
        bars = ax.barh(names, rates, xerr=ends, color=colors)
        labels = [f" {rate:,.0f}" for rate in rates]
        ax.bar_label(bars, labels, fontsize=7)
        ax.set(title=NAMES[model], xlabel="samples/s", xlim=(0, 1.25 * max(rates)))
        ax.tick_params(labelsize=8)
        ax.xaxis.set_major_locator(plt.MaxNLocator(3))
        if ax is not axes[0]:
            ax.set_yticklabels([])
        ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def plot_aggregation(found: Mapping[str, Any], path: Path) -> None:
    """Seconds a rule, on a logarithmic axis."""
    ours = found["fedjax_sim"]["seconds"]
    arms = {"fedjax_sim": ours}
    for peer, label in (("byzfl", "ByzFL"), ("torch", "PyTorch")):
        if "failed" not in found[peer]:
            arms[label] = found[peer]["seconds"]
    fig, ax = plt.subplots(figsize=(9, 3), layout="constrained")
    width = 0.8 / len(arms)
    for position, (label, seconds) in enumerate(arms.items()):
        places = [i + (position - 1) * width for i in range(len(ours))]
        heights = [seconds.get(rule) or float("nan") for rule in ours]
        color = "C0" if position == 0 else ("0.45", "0.75")[position - 1]
        ax.bar(places, heights, width, label=label, color=color)
    ax.set_xticks(range(len(ours)), ours, rotation=35, ha="right", fontsize=8)
    ax.set(yscale="log", ylabel="seconds")
    ax.legend(frameon=False, fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(path, dpi=150)
    plt.close(fig)
