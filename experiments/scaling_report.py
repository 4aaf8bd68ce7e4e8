"""Tables, CSV and plots of the scaling study."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter
from rich.console import Console

import fedjax_sim as fs
from experiments import results
from experiments.scaling_point import Found, Point, Result, Work
from fedjax_sim.memory import gigabytes
from fedjax_sim.report import COLOURS, COLUMN, LINES, MARKERS, STYLE, panels

TITLES = {
    "clients": "Clients of the population",
    "cohort": "Clients of the cohort",
    "width": "Size of the network",
    "rule": "Rules, all clients taking part",
}
# Below, what libraries and threads take for themselves counts.
LARGE = 10_000_000
TOLERANCE = 0.2


def write(
    config: Any,
    command: str,
    machine: Mapping[str, Any],
    series: Mapping[str, Sequence[Result]],
    console: Console,
) -> None:
    """Prints the tables; writes points.csv, summary.md and the plots."""
    everything = list({r.point: r for own in series.values() for r in own}.values())
    write_csv(config.out / "points.csv", everything, machine)
    tables = {TITLES[n]: table(n, own, machine) for n, own in series.items()}
    plots = {
        name: series_plot(name, own, machine)
        for name, own in series.items()
        if name != "rule" and done(own)
    }
    measured = [found for _, found in done(everything)]
    if done(series.get("rule", ())):
        plots["rule"] = rule_plot(series["rule"])
    if measured:
        plots["roofline"] = roofline_plot(series, machine)
        plots["memory"] = memory_plot(series)
    for title, own in tables.items():
        console.print(fs.report.rich_table(*own, title=title))
    remarks = [memory_remark(measured), machine_remark(machine)]
    for remark in remarks:
        console.print(remark)
    for name in (*TITLES, "roofline", "memory"):
        for suffix in ("png", "pdf"):  # to look at; for a paper
            path = config.out / f"{name}.{suffix}"
            path.unlink(missing_ok=True)
            if name in plots:
                plots[name].savefig(path)
    versions = measured[0].versions if measured else machine["versions"]
    parts = [
        "# Scaling",
        f"`{command}`",
        settings(config),
        "; ".join(f"{k} {v}" for k, v in versions.items() if k != "device")
        + f"; {machine['versions']['device']}",
        *remarks,
    ]
    for title, own in tables.items():
        parts += [f"## {title}", fs.report.markdown_table(*own)]
    parts += [f"![{name}]({name}.png)" for name in plots]
    results.write_atomically(config.out / "summary.md", "\n\n".join(parts) + "\n")
    figures = "".join(f"{name}.png, " for name in plots)
    console.print(
        f"results in {config.out}: summary.md, {figures}points.csv (plots also as pdf)"
    )


def done(points: Sequence[Result]) -> list[tuple[Point, Found]]:
    """Those that could be measured."""
    return [(r.point, r.found) for r in points if r.found is not None]


def settings(config: Any) -> str:
    """The study in a few sentences."""
    return (
        f"Clients hold {config.samples} samples each of {config.dataset} and train one "
        f"epoch of batch {config.batch_size} a round; {100 * config.attackers:g} % of "
        f"them attack ({config.attack}). Each point is a process of its own: the "
        f"program is compiled, run once, {config.repeats} times more for its time and "
        "once for its memory. The time is the median (bands, and points.csv: the "
        "fastest and the slowest); compiling is that of the initial states and of the "
        "rounds, tracing apart. "
        "The memory is the most that the arrays of that run took (points.csv: and the "
        "process, with Python and the compiler), and what had been told before "
        "compiling. The accuracy is "
        f"that after {config.rounds * (config.repeats + 2)} rounds "
        f"({config.rule_rounds * (config.repeats + 2)} of series rule). The bound is "
        "how much of the time the machine would need at least, for the operations or "
        "for the bytes that must be moved."
    )


def bound(work: Work, machine: Mapping[str, Any]) -> float:
    """The least seconds of a round: ``max(FLOPs / F, bytes / B)``.

    ``B`` is the speed of the memory, or cache, that holds what is worked on.
    """
    moved = work.train_bytes / bandwidth(work.train_set, machine)
    moved += work.rule_bytes / bandwidth(work.rule_bytes, machine)
    return max(work.flops / machine["flops"], moved)


def bandwidth(working_set: float, machine: Mapping[str, Any]) -> float:
    """Bytes a second for a set of that size: of the next larger one that was probed."""
    speeds = by_set(machine)
    fitting = [size for size in sorted(speeds) if size >= working_set]
    return float(speeds[fitting[0] if fitting else max(speeds)])


def by_set(machine: Mapping[str, Any]) -> dict[int, float]:
    """Bytes a second, by the bytes of the set that was probed."""
    return {int(size): speed for size, speed in machine["bytes"].items()}


def share_of_bound(found: Found, machine: Mapping[str, Any]) -> float:
    return bound(found.work, machine) / found.round_seconds


def write_csv(path: Path, points: Sequence[Result], machine: Mapping[str, Any]) -> None:
    """A row for every point; those that did not fit have the reason."""
    rows = []
    for point, found, refused in points:
        row: dict[str, Any] = dataclasses.asdict(point)
        if found is not None:
            row |= found._asdict()
            del row["versions"]
            row |= {f"told_{name}": size for name, size in row.pop("parts").items()}
            row |= row.pop("work")._asdict()
            row["rounds_per_second"] = 1 / found.round_seconds
            row["bound_seconds"] = bound(found.work, machine)
        row["refused"] = refused
        rows.append(row)
    fields = list(dict.fromkeys(field for row in rows for field in row))
    results.write_csv(path, fields, [[row.get(f, "") for f in fields] for row in rows])


def table(
    name: str, points: Sequence[Result], machine: Mapping[str, Any]
) -> fs.report.Table:
    """A row for every point of a series, with what varies in it."""
    first: dict[str, Callable[[Point], str]] = {
        "clients": lambda p: f"{p.clients:,}",
        "cohort": lambda p: f"{p.cohort:,}",
        "width": lambda p: f"{p.width:,}",
        "rule": lambda p: (
            "all" if p.update_memory is None else gigabytes(p.update_memory)
        ),
    }
    heads = {"clients": "clients", "cohort": "cohort", "width": "width", "rule": "held"}
    header = ["rule", heads[name]]
    header += ["params"] if name == "width" else []
    header += ["devices"] if name == "rule" else []
    header += ["rounds/s", "ms a round", "bound", "memory", "told", "compile"]
    header += ["accuracy"]
    rows = []
    for point, found, _ in points:
        row = [point.aggregator, first[name](point)]
        if found is None:
            row += ["-"] * (name in ("width", "rule"))
            rows.append((*row, "does not fit", *["-"] * 6))
            continue
        row += [f"{found.params:,}"] if name == "width" else []
        row += [str(point.devices)] if name == "rule" else []
        row += [
            f"{1 / found.round_seconds:.3g}",
            _ms(found.round_seconds),
            f"{100 * share_of_bound(found, machine):.2g} %",
            gigabytes(found.peak_bytes),
            gigabytes(found.told_bytes),
            f"{found.compile_seconds:.1f} s",
            f"{found.accuracy:.3f}",
        ]
        rows.append(tuple(row))
    return fs.report.Table(tuple(header), rows)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:,.0f}"


def memory_remark(measured: Sequence[Found]) -> str:
    """How well the memory was told, of the points that take much, or were to."""
    large = [f for f in measured if max(f.peak_bytes, f.told_bytes) >= LARGE]
    if not large:
        return f"No point took {gigabytes(LARGE)} or more, or was to."
    off = [abs(f.told_bytes / f.peak_bytes - 1) for f in large]
    within = sum(x <= TOLERANCE for x in off)
    return (
        f"Memory told within {100 * TOLERANCE:.0f} % of what was measured in {within} "
        f"of the {len(large)} points that took {gigabytes(LARGE)} and more, or were to "
        f"(at most {100 * max(off):.0f} % off)."
    )


def machine_remark(machine: Mapping[str, Any]) -> str:
    speeds = by_set(machine)
    return (
        f"This machine: {machine['flops'] / 1e9:.0f} GFLOP/s (float32 matrix product), "
        f"{speeds[max(speeds)] / 1e9:.0f} GB/s of memory, "
        f"{max(speeds.values()) / 1e9:.0f} GB/s of cache, measured with JAX."
    )


def _style(i: int) -> dict[str, Any]:
    return {
        "color": COLOURS[i % len(COLOURS)],
        "linestyle": LINES[i % len(LINES)],
        "marker": MARKERS[i % len(MARKERS)],
    }


def _decades(axes: Axes, which: str) -> None:
    """A logarithmic axis of whole decades, so that it has numbers to read."""
    axis = getattr(axes, f"{which}axis")
    getattr(axes, f"set_{which}scale")("log")
    low, high = axis.get_data_interval()
    low, high = (
        10.0 ** round_(np.log10(x)) for round_, x in ((np.floor, low), (np.ceil, high))
    )
    getattr(axes, f"set_{which}lim")(low / 1.1, high * 1.1)
    axis.set_major_formatter(FuncFormatter(lambda x, place: _short(x)))
    axis.set_minor_formatter(NullFormatter())


def _short(x: float) -> str:
    if x >= 1e6:
        return f"{x / 1e6:g}M"
    return f"{x / 1e3:g}k" if x >= 1e4 else f"{x:,.10g}"


FAINT: dict[str, Any] = {
    "linewidth": 0.8,
    "linestyle": ":",
    "marker": ".",
    "markersize": 3,
}


def series_plot(name: str, points: Sequence[Result], machine: Mapping[str, Any]) -> Any:
    """Time, memory, compiling and accuracy against what the series varies."""
    labels = {
        "clients": "clients of the population",
        "cohort": "clients of the cohort",
        "width": "parameters",
    }
    lines: dict[str, list[tuple[float, Found]]] = {}
    for point, found in done(points):
        x = found.params if name == "width" else getattr(point, name)
        lines.setdefault(point.aggregator, []).append((x, found))
    with mpl.rc_context(STYLE):
        figure, axes_of = panels(2, 2, 4.2)
        (times, memory), (compiling, accuracy) = axes_of
        for i, (rule, own) in enumerate(lines.items()):
            x = [at for at, _ in own]
            style = _style(i)

            def draw(axes: Axes, f: Callable[[Found], float], **kw: Any) -> None:
                axes.plot(x, [f(found) for _, found in own], **kw)  # noqa: B023

            draw(times, lambda f: 1e3 * f.round_seconds, label=rule, **style)
            times.fill_between(
                x,
                [1e3 * f.fastest for _, f in own],
                [1e3 * f.slowest for _, f in own],
                color=style["color"],
                alpha=0.15,
                linewidth=0,
            )
            draw(memory, lambda f: f.peak_bytes / 1e6, label=rule, **style)
            draw(memory, lambda f: f.told_bytes / 1e6, color=style["color"], **FAINT)
            draw(compiling, lambda f: f.compile_seconds, label=rule, **style)
            draw(accuracy, lambda f: f.accuracy, label=rule, **style)
        own = next(iter(lines.values()))
        least = [1e3 * bound(f.work, machine) for _, f in own]
        times.plot(
            [at for at, _ in own], least, color="0.4", label="bound of (a)", **FAINT
        )
        memory.plot([], [], color="0.4", label="told before, of (b)", **FAINT)
        _decades(times, "y")
        _decades(memory, "y")
        compiling.set_ylim(0, 1.2 * compiling.get_ylim()[1])
        accuracy.set_ylim(0, 1.02)
        for axes, label, letter in (
            (times, "ms a round", "a"),
            (memory, "memory (MB)", "b"),
            (compiling, "compiling (s)", "c"),
            (accuracy, "test accuracy", "d"),
        ):
            _decades(axes, "x")
            axes.set_xlabel(labels[name])
            axes.set_ylabel(label)
            axes.set_title(f"({letter})", loc="left")
        named = {
            label: handle
            for axes in (times, memory)
            for handle, label in zip(*axes.get_legend_handles_labels())
        }
        figure.legend(named.values(), named.keys(), loc="outside upper center", ncols=3)
        return figure


def rule_plot(points: Sequence[Result]) -> Any:
    """Time and memory of every rule: held or in passes, on one device or more."""
    rules = list(dict.fromkeys(r.point.aggregator for r in points))
    ways: dict[str, list[tuple[int, Found]]] = {}
    for point, found in done(points):
        held = "in passes" if point.update_memory else "all updates held"
        plural = "device" if point.devices == 1 else "devices"
        way = f"{held}, {point.devices} {plural}"
        ways.setdefault(way, []).append((rules.index(point.aggregator), found))
    with mpl.rc_context(STYLE):
        height = 0.9 + 0.28 * len(rules)
        figure, ((times, memory),) = panels(1, 2, height)
        for i, way in enumerate(sorted(ways)):
            own = ways[way]
            y = [place + 0.14 * (i - (len(ways) - 1) / 2) for place, _ in own]
            style = {**_style(i), "linestyle": "none"}
            times.plot([f.round_seconds for _, f in own], y, label=way, **style)
            memory.plot([f.peak_bytes / 1e6 for _, f in own], y, **style)
        times.set_xlabel("seconds a round")
        memory.set_xlabel("memory (MB)")
        times.set_yticks(range(len(rules)), rules)
        memory.set_yticks(range(len(rules)), [""] * len(rules))
        for axes in (times, memory):
            _decades(axes, "x")
            axes.set_ylim(len(rules) - 0.5, -0.5)
        figure.legend(loc="outside upper center", ncols=2)
        return figure


def roofline_plot(
    series: Mapping[str, Sequence[Result]], machine: Mapping[str, Any]
) -> Any:
    """Operations a second against operations a byte, under what the machine can do."""
    with mpl.rc_context(STYLE):
        figure, ((axes,),) = panels(1, 1, 2.8, COLUMN)
        reached = []
        for i, (name, points) in enumerate(series.items()):
            measured = [found for _, found in done(points)]
            moved = [f.work.train_bytes + f.work.rule_bytes for f in measured]
            x = [f.work.flops / m for f, m in zip(measured, moved, strict=True)]
            y = [f.work.flops / f.round_seconds / 1e9 for f in measured]
            style = {**_style(i), "linestyle": "none"}
            axes.plot(x, y, label=f"series {name}", **style)
            reached += x
        ends = np.array([min(reached) / 3, max(reached) * 10])
        speeds = by_set(machine)
        grid = np.geomspace(ends[0], ends[1], 200)
        for label, speed, line in (
            ("memory", speeds[max(speeds)], "-"),
            ("cache", max(speeds.values()), "--"),
        ):
            roof = np.minimum(grid * speed, machine["flops"]) / 1e9
            axes.plot(grid, roof, color="0.3", linestyle=line, label=f"roof, {label}")
        _decades(axes, "x")
        _decades(axes, "y")
        axes.set_xlabel("operations a byte")
        axes.set_ylabel("GFLOP/s")
        figure.legend(loc="outside upper center", ncols=3, handlelength=1.5)
        return figure


def memory_plot(series: Mapping[str, Sequence[Result]]) -> Any:
    """Memory told before compiling against memory measured."""
    with mpl.rc_context(STYLE):
        figure, ((axes,),) = panels(1, 1, 2.8, COLUMN)
        sizes: list[float] = []
        for i, (name, points) in enumerate(series.items()):
            measured = [found for _, found in done(points)]
            x = [f.told_bytes / 1e6 for f in measured]
            y = [f.peak_bytes / 1e6 for f in measured]
            style = {**_style(i), "linestyle": "none"}
            axes.plot(x, y, label=f"series {name}", **style)
            sizes += x + y
        ends = np.array([min(sizes) / 2, max(sizes) * 2])
        axes.plot(ends, ends, color="0.3", linewidth=0.8)
        low, high = ends * (1 - TOLERANCE), ends * (1 + TOLERANCE)
        axes.fill_between(ends, low, high, color="0.5", alpha=0.2, linewidth=0)
        _decades(axes, "x")
        _decades(axes, "y")
        axes.set_xlabel("told before compiling (MB)")
        axes.set_ylabel("measured (MB)")
        axes.legend(loc="upper left")
        return figure
