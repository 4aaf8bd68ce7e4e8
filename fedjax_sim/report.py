"""Tables and plots from histories.

A history is what ``Simulation.run`` returns: arrays with a leading round axis, or, with
several seeds, with a leading seed axis before it. Every function takes a dictionary
from the name of a system to its history. Read here: ``round`` (1-based), ``accuracy``
(NaN where not evaluated), ``attack_success`` (likewise, and where there is no targeted
attack), ``tpr``, ``fpr`` and ``num_flagged``.

Figures are made without pyplot, so nothing is global, no display is needed and nothing
has to be closed. A notebook shows a figure that is the last value of a cell.
"""

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import rich.box
import rich.table
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

Histories = Mapping[str, Any]

# Okabe and Ito's colour-blind-safe palette without its yellow, which is lost on white.
# The cycles have different lengths, so systems stay distinct beyond any one of them;
# in grey the marker and the line style tell them apart.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#000000", "#CC79A7", "#56B4E9", "#E69F00"]
MARKERS = ["o", "s", "^", "D", "v", "p", "<", ">"]
LINES = ["-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1))]

_NAME = 40  # characters from which a cell of a table is a sentence
COLUMN = 3.5  # inches, one column of a two-column paper
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "legend.handlelength": 3.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.1,
    "lines.markersize": 3.5,
    "pdf.fonttype": 42,  # publishers refuse the default, Type 3
}


class NotebookFigure(Figure):
    """A figure that a notebook can show although pyplot does not know of it."""

    def savefig(self, *args: Any, **options: Any) -> None:
        """As matplotlib's, in this module's style: it also decides when saving."""
        with mpl.rc_context(STYLE):
            super().savefig(*args, **options)

    def _repr_png_(self) -> bytes:
        image = io.BytesIO()
        self.savefig(image, format="png")
        return image.getvalue()


class Table(NamedTuple):
    """``header`` and ``rows`` of text; unpacks into ``markdown_table(*table)``."""

    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


def panels(rows: int, columns: int, height: float, width: float = 2 * COLUMN) -> Any:
    """A figure of several axes, of ``width`` x ``height`` inches and 200 dpi.

    Returns:
        The figure and its axes ``[rows, columns]``.

    Example:
        >>> figure, axes = panels(2, 3, height=4.0)
        >>> axes.shape, float(figure.get_figwidth())
        ((2, 3), 7.0)
    """
    figure = NotebookFigure(figsize=(width, height), dpi=200, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def accuracy_plot(
    histories: Histories,
    path: str | Path | None = None,
    title: str | None = None,
) -> Figure:
    """Test accuracy against communication rounds, one line per system.

    Only evaluated rounds are drawn. With several seeds the line is their mean and the
    band reaches from the lowest to the highest seed.

    Args:
        histories: system name to history.
        path: where to save the figure as well; the suffix decides the format.
        title: above the axes.

    Returns:
        The figure, one paper column wide, 200 dpi.

    Raises:
        ValueError: no history, or one without rounds or without any evaluation.

    Example:
        >>> from types import SimpleNamespace
        >>> history = SimpleNamespace(
        ...     round=[1, 2, 3], accuracy=[0.2, float("nan"), 0.6])
        >>> figure = accuracy_plot({"median": history})
        >>> figure.axes[0].lines[0].get_xdata().tolist()
        [1, 3]
    """
    _check_any(histories)
    lines = {name: _evaluated(name, history) for name, history in histories.items()}
    figure = line_plot(lines, "test accuracy", title=title)
    axes = figure.axes[0]
    axes.set_ylim(top=min(axes.get_ylim()[1], 1.02))
    return _save(figure, path)


def line_plot(
    lines: Mapping[str, tuple[Any, Any]],
    label: str,
    path: str | Path | None = None,
    title: str | None = None,
    marks: Sequence[int] = (),
) -> Figure:
    """Any number against communication rounds, in the style of ``accuracy_plot``.

    Args:
        lines: name to ``(rounds [R], values [R] or [seeds, R])``. A value that is not
            finite is a gap. With several seeds the line is their mean and the band
            reaches from the lowest to the highest.
        label: what the numbers are.
        path: where to save the figure as well; the suffix decides the format.
        title: above the axes.
        marks: rounds to mark with a thin vertical line.

    Returns:
        The figure, one paper column wide, 200 dpi.

    Raises:
        ValueError: no line, or one whose rounds and values do not belong together.

    Example:
        >>> figure = line_plot({"a": ([1, 2], [0.5, 0.4])}, "loss", marks=[2])
        >>> figure.axes[0].get_ylabel()
        'loss'
    """
    if not lines:
        raise ValueError("line_plot needs at least one line; got none.")
    with mpl.rc_context(STYLE):
        figure = NotebookFigure(figsize=(COLUMN, 2.4), dpi=200, layout="constrained")
        axes = figure.subplots()
        for mark in marks:
            axes.axvline(mark, color="0.6", linewidth=0.6, linestyle=(0, (2, 2)))
        for index, (name, (rounds, values)) in enumerate(lines.items()):
            rounds = np.asarray(rounds)
            values = np.atleast_2d(np.asarray(values, float))
            if rounds.ndim != 1 or values.shape[1:] != rounds.shape:
                raise ValueError(
                    "line_plot needs rounds [R] and values [R] or [seeds, R]; "
                    f"{name!r} has shapes {rounds.shape} and {values.shape}."
                )
            values = np.where(np.isfinite(values), values, np.nan)
            _draw(axes, index, name, rounds, values)
        _label_rounds(axes)
        axes.set_ylabel(label)
        _finish(figure, axes, title)
        return _save(figure, path)


def client_plot(
    history: Any,
    fields: Sequence[str],
    path: str | Path | None = None,
    title: str | None = None,
    marks: Sequence[int] = (),
) -> Figure:
    """What a rule thinks of each client against rounds: a line per client.

    Honest clients are drawn in one colour and Byzantine ones, dashed and on top, in
    another. A line joins the rounds in which its client took part, with a dot at each
    where it missed any.

    Args:
        history: of one system and one seed.
        fields: one to a panel, each ``[R, k]``: a name in ``history.details``, such as
            ``trust``, or a field, such as ``scores``.
        path: where to save the figure as well; the suffix decides the format.
        title: above the first panel.
        marks: rounds to mark with a thin vertical line.

    Returns:
        The figure, one paper column wide, 200 dpi.

    Raises:
        ValueError: no field, one that the history has not, or a history of several
            seeds.

    Example:
        >>> from types import SimpleNamespace
        >>> history = SimpleNamespace(
        ...     round=[1, 2], client_ids=np.array([[0, 1], [0, 1]]),
        ...     byzantine=np.array([[False, True], [False, True]]),
        ...     details={"trust": np.array([[0.9, 0.3], [1.0, 0.1]])})
        >>> figure = client_plot(history, ["trust"])
        >>> len(figure.axes[0].lines)
        2
    """
    rounds, ids = np.asarray(history.round), np.asarray(history.client_ids)
    if rounds.ndim != 1:
        raise ValueError(
            "client_plot draws one seed; got a history with round of shape "
            f"{rounds.shape}. Take one: jax.tree.map(lambda x: x[0], history)."
        )
    if not fields:
        raise ValueError("client_plot needs at least one field; got none.")
    found = {}
    for field in fields:
        values = history.details.get(field, getattr(history, field, None))
        if np.shape(values) != ids.shape:
            raise ValueError(
                f"client_plot finds no {field!r} of shape {ids.shape} in the history; "
                f"its details are {', '.join(history.details) or 'none'}."
            )
        found[field] = np.asarray(values, float)
    with mpl.rc_context(STYLE):
        height = 0.5 + 1.6 * len(found)
        figure = NotebookFigure(figsize=(COLUMN, height), dpi=200, layout="constrained")
        panels = figure.subplots(len(found), sharex=True, squeeze=False)[:, 0]
        for axes, (field, values) in zip(panels, found.items(), strict=True):
            for mark in marks:
                axes.axvline(mark, color="0.6", linewidth=0.6, linestyle=(0, (2, 2)))
            for client in np.unique(ids):
                own = ids == client
                liar = bool(np.asarray(history.byzantine)[own].any())
                line = np.where(own & np.isfinite(values), values, np.nan)
                there = own.any(axis=1)
                axes.plot(
                    rounds[there],
                    mean_defined(line, axis=1)[there],
                    color=COLOURS[liar],
                    linestyle="--" if liar else "-",
                    marker="" if there.all() else ".",
                    zorder=2 + liar,
                    label="Byzantine client" if liar else "honest client",
                )
            axes.set_ylabel(field)
        _label_rounds(panels[-1])
        handles, names = panels[0].get_legend_handles_labels()
        once = dict(zip(names, handles, strict=True))
        figure.set_figheight(figure.get_figheight() + 0.16)
        figure.legend(
            list(once.values()), list(once), loc="outside lower center", ncols=len(once)
        )
        if title is not None:
            panels[0].set_title(title)
        return _save(figure, path)


def score_plot(
    histories: Histories,
    at: int,
    field: str = "scores",
    path: str | Path | None = None,
    title: str | None = None,
    marks: Mapping[str, float] | None = None,
) -> Figure:
    """What rules think of each client in one round: a panel per rule, a bar per client.

    Byzantine clients stand on the left, in a colour of their own; within either group
    clients are ordered by id. A panel in which all clients have the same says so.

    Args:
        histories: system name to history of one seed.
        at: the round, from 1.
        field: ``scores``, or a name in ``history.details``, such as ``index``. A value
            that is not finite has no bar.
        path: where to save the figure as well; the suffix decides the format.
        title: above the first panel.
        marks: system name to a value to mark with a thin line, such as a threshold.

    Returns:
        The figure, one paper column wide, 200 dpi.

    Raises:
        ValueError: no history, one of several seeds, one without that round, or without
            the field.

    Example:
        >>> from types import SimpleNamespace
        >>> history = SimpleNamespace(
        ...     round=[1, 2], client_ids=np.array([[0, 1], [0, 1]]),
        ...     byzantine=np.array([[False, True], [False, True]]),
        ...     scores=np.array([[0.1, 0.9], [0.2, 0.8]]), details={})
        >>> figure = score_plot({"pdrr": history}, at=2)
        >>> [float(bar.get_height()) for bar in figure.axes[0].patches]
        [0.8, 0.2]
    """
    _check_any(histories)
    with mpl.rc_context(STYLE):
        height = 0.45 + 0.85 * len(histories)
        figure = NotebookFigure(figsize=(COLUMN, height), dpi=200, layout="constrained")
        panels = figure.subplots(len(histories), sharex=True, squeeze=False)[:, 0]
        for axes, (name, history) in zip(panels, histories.items(), strict=True):
            rounds = np.asarray(history.round)
            if rounds.ndim != 1 or at not in rounds:
                raise ValueError(
                    f"score_plot draws one round of one seed; {name!r} has round of "
                    f"shape {rounds.shape}, and was asked for round {at}."
                )
            row = int(np.flatnonzero(rounds == at)[0])
            values = history.details.get(field, getattr(history, field, None))
            if np.shape(values) != np.shape(history.client_ids):
                raise ValueError(
                    f"score_plot finds no {field!r} in the history of {name!r}; its "
                    f"details are {', '.join(history.details) or 'none'}."
                )
            liar = np.asarray(history.byzantine)[row]
            order = np.lexsort((np.asarray(history.client_ids)[row], ~liar))
            heights = np.asarray(values, float)[row][order]
            places = np.arange(1, len(order) + 1)
            shown = np.isfinite(heights)
            axes.bar(
                places[shown],
                heights[shown],
                width=0.8,
                color=[COLOURS[int(x)] for x in liar[order][shown]],
            )
            axes.set_xlim(0.4, len(order) + 0.6)
            axes.grid(visible=False, axis="x")
            axes.set_title(name, loc="left", pad=2)
            if marks and name in marks:
                _threshold(axes, marks[name])
            if shown.sum() > 1 and np.ptp(heights[shown]) == 0:
                axes.text(
                    0.98,
                    0.8,
                    f"all {heights[shown][0]:.3g}",
                    ha="right",
                    va="center",
                    fontsize=7,
                    transform=axes.transAxes,
                )
        figure.supylabel("score" if field == "scores" else field, fontsize=8)
        panels[-1].set_xlabel("client, the Byzantine ones first")
        colours = [Patch(color=COLOURS[i]) for i in (0, 1)]
        figure.set_figheight(figure.get_figheight() + 0.16)
        names = ["honest client", "Byzantine client"]
        figure.legend(colours, names, loc="outside lower center", ncols=2)
        if title is not None:
            figure.suptitle(title, fontsize=8)
        return _save(figure, path)


def range_plot(
    ranges: Mapping[str, tuple[Any, Any, Any]],
    label: str,
    path: str | Path | None = None,
    title: str | None = None,
    mark: float | None = None,
) -> Figure:
    """Ranges of a number by round, side by side for each name: floating bars.

    Args:
        ranges: name to ``(rounds [R], low [R], high [R])``, the same rounds for all.
            Where ``low`` is not below ``high``, or either is not finite, there is no
            bar.
        label: what the number is.
        path: where to save the figure as well; the suffix decides the format.
        title: above the axes.
        mark: a value of the number to mark with a thin line.

    Returns:
        The figure, one paper column wide, 200 dpi.

    Raises:
        ValueError: nothing to draw, or rounds that differ.

    Example:
        >>> figure = range_plot({"full": ([1, 50], [0.2, 0.3], [1.0, 0.9])}, "q")
        >>> [round(float(bar.get_height()), 1) for bar in figure.axes[0].patches]
        [0.8, 0.6]
    """
    if not ranges:
        raise ValueError("range_plot needs at least one name; got none.")
    rounds = [list(map(int, at)) for at, _, _ in ranges.values()]
    if any(at != rounds[0] for at in rounds):
        raise ValueError(f"range_plot needs the same rounds for all; got {rounds}.")
    with mpl.rc_context(STYLE):
        figure = NotebookFigure(figsize=(COLUMN, 2.0), dpi=200, layout="constrained")
        axes = figure.subplots()
        width = 0.8 / len(ranges)
        for index, (name, (_, low, high)) in enumerate(ranges.items()):
            low, high = np.asarray(low, float), np.asarray(high, float)
            there = np.isfinite(low) & np.isfinite(high) & (low < high)
            places = np.arange(len(low)) + (index - (len(ranges) - 1) / 2) * width
            axes.bar(
                places[there],
                (high - low)[there],
                bottom=low[there],
                width=0.85 * width,
                # Not the colours that elsewhere stand for honest and Byzantine, and
                # light, so that a line across can be seen.
                color=COLOURS[(index + 4) % len(COLOURS)],
                label=name,
            )
        if mark is not None:
            _threshold(axes, mark)
        axes.set_xticks(range(len(rounds[0])), [str(at) for at in rounds[0]])
        axes.grid(visible=False, axis="x")
        axes.set_xlabel("communication round")
        axes.set_ylabel(label)
        _finish(figure, axes, title)
        return _save(figure, path)


def detection_plot(
    histories: Histories,
    path: str | Path | None = None,
    title: str | None = None,
    window: int = 10,
) -> Figure:
    """Detection and false alarm rates against rounds, for systems that reject clients.

    The counts of a single round are small, so each point is the mean over the last
    ``window`` rounds, without those in which the rate is undefined. Systems that never
    flag a client are left out. With several seeds the line is their mean and the band
    reaches from the lowest to the highest seed.

    Args:
        histories: system name to history.
        path: where to save the figure as well; the suffix decides the format.
        title: above the axes.
        window: rounds of the running mean, at least 1; 1 shows the rates as they are.

    Returns:
        The figure: true positive rate above, false positive rate below.

    Raises:
        ValueError: no history, one without rounds, none that flags anything, or
            ``window < 1``.

    Example:
        >>> from types import SimpleNamespace
        >>> history = SimpleNamespace(
        ...     round=[1, 2], tpr=[0.0, 1.0], fpr=[0.5, 0.0], num_flagged=[1, 1])
        >>> figure = detection_plot({"krum": history}, window=2)
        >>> figure.axes[0].lines[0].get_ydata().tolist()
        [0.0, 0.5]
    """
    _check_any(histories)
    if window < 1:
        raise ValueError(f"detection_plot needs window >= 1; got window={window}.")
    flagging = {
        # The index comes from all systems, so that each looks as in accuracy_plot.
        name: (index, history)
        for index, (name, history) in enumerate(histories.items())
        if _series(name, history, "num_flagged")[1].sum() > 0
    }
    if not flagging:
        raise ValueError(
            f"detection_plot found no system that flagged a client among "
            f"{', '.join(histories)}. Leave the plot out: their rates are all zero."
        )
    with mpl.rc_context(STYLE):
        figure = NotebookFigure(figsize=(COLUMN, 3.6), dpi=200, layout="constrained")
        upper, lower = figure.subplots(2, sharex=True)
        for axes, field in ((upper, "tpr"), (lower, "fpr")):
            for name, (index, history) in flagging.items():
                rounds, rate = _series(name, history, field)
                _draw(axes, index, name, rounds, _running_mean(rate, window))
            axes.set_ylim(-0.03, 1.03)
        upper.set_ylabel("true positive rate")
        lower.set_ylabel("false positive rate")
        _label_rounds(lower)
        if window > 1:
            lower.set_xlabel(f"communication round (running mean of {window})")
        _finish(figure, upper, title)
        return _save(figure, path)


def heatmap(
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    path: str | Path | None = None,
    label: str = "test accuracy",
    title: str | None = None,
) -> Figure:
    """A matrix of shares as a map, every value written into its cell.

    Args:
        values: ``[rows, columns]`` from 0 to 1; NaN, drawn white with a dash, where
            there is none.
        rows: their names, the first on top.
        columns: their names.
        path: where to save the figure as well; the suffix decides the format.
        label: what the values are.
        title: above the map.

    Returns:
        The figure, as large as its cells and names need, 200 dpi.

    Raises:
        ValueError: the shapes do not belong together.

    Example:
        >>> figure = heatmap(np.array([[0.9, 0.1]]), ["median"], ["alie", "ipm"])
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['.90', '.10']
    """
    values = np.asarray(values, float)
    if values.shape != (len(rows), len(columns)) or values.size == 0:
        raise ValueError(
            f"heatmap needs values of shape [rows, columns]; got {values.shape} with "
            f"{len(rows)} rows and {len(columns)} columns."
        )
    # In inches, about. The layout leaves room for the names, but would let the title
    # and the label of the colours reach over the edge of a small map.
    width = 0.075 * max(map(len, rows))
    width += max(0.38 * len(columns) + 0.8, 0.06 * len(title or ""))
    height = 0.2 * max(len(rows), 3) + 0.055 * max(map(len, columns)) + 0.4
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        figure = NotebookFigure(figsize=(width, height), dpi=200, layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(
            np.ma.masked_invalid(values), cmap="cividis", vmin=0, vmax=1, aspect="auto"
        )
        axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
        axes.set_yticks(range(len(rows)), rows)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        for i, j in np.ndindex(values.shape):
            value = values[i, j]
            text = "–" if np.isnan(value) else f"{value:.2f}".removeprefix("0")
            dark = np.isnan(value) or value > 0.55
            axes.text(
                j,
                i,
                text,
                ha="center",
                va="center",
                fontsize=6,
                color="black" if dark else "white",
            )
        bar = figure.colorbar(image, ax=axes, label=label, fraction=0.05, pad=0.02)
        bar.outline.set_visible(False)
        if title is not None:
            axes.set_title(title)
        return _save(figure, path)


def table(
    histories: Histories,
    rounds: Sequence[int] | None = None,
    tail: int = 5,
    digits: int = 4,
) -> Table:
    """Test accuracy at fixed rounds, at the end, and averaged over the end.

    Where a targeted attack runs, a last column has its success at the end, ``-`` for a
    system without. With several seeds every cell is the mean and, after ``±``, the
    standard deviation over the seeds (ddof 1).

    Args:
        histories: system name to history.
        rounds: rounds to show; ``-`` where a system was not evaluated in exactly that
            round. By default up to four evenly spaced evaluations before the last,
            with several seeds one.
        tail: number of last evaluations in the mean of the last column; ``-`` where
            there are fewer.
        digits: decimals.

    Returns:
        A ``Table`` of text. The best round of a run is not among the columns: choosing
        it by test accuracy flatters.

    Raises:
        ValueError: no history, one without rounds or without any evaluation, or
            ``tail < 1``.

    Example:
        >>> from types import SimpleNamespace
        >>> nan = float("nan")
        >>> history = SimpleNamespace(
        ...     round=[1, 2, 3], accuracy=[0.2, nan, 0.6], attack_success=[nan] * 3)
        >>> header, rows = table({"median": history}, rounds=(1, 2), tail=2, digits=2)
        >>> header
        ('system', 'round 1', 'round 2', 'final (round 3)', 'mean of last 2')
        >>> rows
        [('median', '0.20', '-', '0.60', '0.40')]
    """
    _check_any(histories)
    if tail < 1:
        raise ValueError(f"table needs tail >= 1; got tail={tail}.")
    evaluated = {name: _evaluated(name, h) for name, h in histories.items()}
    last = {int(at[-1]) for at, _ in evaluated.values()}
    same_end = len(last) == 1

    if rounds is None:
        at, accuracy = max(evaluated.values(), key=lambda found: found[0][-1])
        step = -(-len(at) // (5 if len(accuracy) == 1 else 2))
        rounds = [int(number) for number in at[step - 1 : -1 : step]]

    cell = partial(mean_and_spread, digits=digits)
    success = {
        name: _series(name, history, "attack_success")[1]
        for name, history in histories.items()
    }
    targeted = any(np.isfinite(values).any() for values in success.values())

    rows = []
    for name, (at, accuracy) in evaluated.items():
        shown = [
            cell(accuracy[:, at == wanted][:, 0]) if wanted in at else "-"
            for wanted in rounds
        ]
        final = cell(accuracy[:, -1]) + ("" if same_end else f" (round {at[-1]})")
        enough = accuracy.shape[1] >= tail
        tail_mean = cell(accuracy[:, -tail:].mean(axis=1)) if enough else "-"
        row = (name, *shown, final, tail_mean)
        rows.append((*row, _last_success(success[name], cell)) if targeted else row)

    header = (
        "system",
        *(f"round {wanted}" for wanted in rounds),
        f"final (round {last.pop()})" if same_end else "final",
        f"mean of last {tail}",
        *(["attack success"] if targeted else []),
    )
    return Table(header, rows)


def _last_success(values: np.ndarray, cell: Callable[[np.ndarray], str]) -> str:
    """The last evaluation of ``values [seeds, R]`` as a cell; ``-`` without any."""
    done = np.flatnonzero(~np.isnan(values).any(axis=0))
    return cell(values[:, done[-1]]) if done.size else "-"


def _to_the_left(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[bool]:
    """Of every column: whether it is the first, or holds sentences."""
    longest = [
        max((len(str(r[i])) for r in rows), default=0) for i in range(len(header))
    ]
    return [i == 0 or length > _NAME for i, length in enumerate(longest)]


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A GitHub table: the first column and those of text to the left.

    Example:
        >>> print(markdown_table(("system", "final"), [("median", 0.95)]))
        | system | final |
        |:---|---:|
        | median | 0.95 |
    """
    rows = [tuple(row) for row in rows]
    alignment = [":---" if left else "---:" for left in _to_the_left(header, rows)]
    lines = ["| " + " | ".join(_escape(cell) for cell in header) + " |"]
    lines.append("|" + "|".join(alignment) + "|")
    for row in rows:
        lines.append("| " + " | ".join(_escape(cell) for cell in row) + " |")
    return "\n".join(lines)


def rich_table(
    header: Sequence[str],
    rows: Iterable[Sequence[object]],
    title: str | None = None,
) -> rich.table.Table:
    """A table for the terminal: ``rich.print(rich_table(*table(histories)))``.

    Example:
        >>> rich_table(("system", "final"), [("median", 0.95)]).row_count
        1
    """
    rows = [tuple(row) for row in rows]
    # Narrow, so that six rounds and a long name fit a terminal of 80 columns.
    result = rich.table.Table(
        title=title, box=rich.box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0)
    )
    names = max((len(str(row[0])) for row in rows), default=0) <= _NAME
    for index, left in enumerate(_to_the_left(header, rows)):
        result.add_column(
            header[index],
            justify="left" if left else "right",
            no_wrap=index == 0 and names,
            overflow="fold",
        )
    for row in rows:
        result.add_row(*(str(cell) for cell in row))
    return result


def _check_any(histories: Histories) -> None:
    if not histories:
        raise ValueError(
            "a report needs at least one history; got none. Pass {name: history}."
        )


def _series(name: str, history: Any, field: str) -> tuple[np.ndarray, np.ndarray]:
    """``(rounds [R], values float [seeds, R])`` of one field."""
    rounds = np.atleast_2d(np.asarray(history.round))
    values = np.atleast_2d(np.asarray(getattr(history, field), dtype=float))
    if values.size == 0:
        raise ValueError(
            f"the history of {name!r} holds no round. Run at least one round."
        )
    if values.ndim != 2 or rounds.shape[-1] != values.shape[-1]:
        raise ValueError(
            f"the history of {name!r} needs round and {field} of shape [rounds] or "
            f"[seeds, rounds]; got {np.shape(history.round)} and "
            f"{np.shape(getattr(history, field))}."
        )
    return rounds[0], values


def _evaluated(name: str, history: Any) -> tuple[np.ndarray, np.ndarray]:
    """The rounds evaluated and their accuracies ``[seeds, evaluations]``."""
    rounds, accuracy = _series(name, history, "accuracy")
    done = ~np.isnan(accuracy).any(axis=0)
    if not done.any():
        raise ValueError(
            f"the history of {name!r} holds no evaluation: its accuracy is NaN in all "
            f"{len(rounds)} rounds. Lower eval_every to {len(rounds)} or less."
        )
    return rounds[done], accuracy[:, done]


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the defined values in the last ``window`` rounds, ``[seeds, R]``."""
    padded = np.pad(values, ((0, 0), (window - 1, 0)), constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, window, axis=1)
    return mean_defined(windows, axis=-1)


def mean_defined(values: np.ndarray, axis: int) -> np.ndarray:
    """Mean of the values that are not NaN; NaN where there is none.

    Example:
        >>> nan = float("nan")
        >>> mean_defined(np.array([[1.0, nan, 3.0], [nan, nan, nan]]), axis=1).tolist()
        [2.0, nan]
    """
    defined = ~np.isnan(values)
    count = defined.sum(axis)
    total = np.where(defined, values, 0.0).sum(axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def mean_and_spread(per_seed: np.ndarray, digits: int = 3) -> str:
    """The mean over seeds and, of several, the standard deviation (ddof 1).

    Seeds without a value (NaN) are left out; ``-`` where none has one.

    Example:
        >>> mean_and_spread(np.array([0.5])), mean_and_spread(np.array([0.5, 0.7]))
        ('0.500', '0.600 ± 0.141')
    """
    per_seed = per_seed[~np.isnan(per_seed)]
    if not per_seed.size:
        return "-"
    mean = f"{per_seed.mean():.{digits}f}"
    if len(per_seed) == 1:
        return mean
    return f"{mean} ± {per_seed.std(ddof=1):.{digits}f}"


def _draw(
    axes: Axes, index: int, name: str, rounds: np.ndarray, values: np.ndarray
) -> None:
    colour = COLOURS[index % len(COLOURS)]
    spacing = max(1, len(rounds) // 8)
    axes.plot(
        rounds,
        mean_defined(values, axis=0),
        label=name,
        color=colour,
        linestyle=LINES[index % len(LINES)],
        marker=MARKERS[index % len(MARKERS)],
        # Staggered, so that the markers of lines that coincide stay visible.
        markevery=(index * spacing // 3 % spacing, spacing),
        markerfacecolor="white",
        markeredgewidth=0.9,
    )
    if len(values) > 1:
        # fmin and fmax pass over NaN.
        low, high = np.fmin.reduce(values), np.fmax.reduce(values)
        axes.fill_between(rounds, low, high, color=colour, alpha=0.18, linewidth=0)


def _threshold(axes: Axes, value: float) -> None:
    axes.axhline(value, color="black", linewidth=0.6, linestyle=(0, (4, 2)))


def _label_rounds(axes: Axes) -> None:
    axes.set_xlabel("communication round")
    locator = MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True, min_n_ticks=1)
    axes.xaxis.set_major_locator(locator)


def _finish(figure: Figure, axes: Axes, title: str | None) -> None:
    """Title above, and a legend below the axes, where it hides no line."""
    if title is not None:
        axes.set_title(title)
    handles, names = axes.get_legend_handles_labels()
    longest = max(len(name) for name in names)
    columns = min(1 if longest > 26 else 2 if longest > 13 else 3, len(names))
    legend_rows = -(-len(names) // columns)
    figure.set_figheight(figure.get_figheight() + 0.16 * legend_rows)
    figure.legend(handles, names, loc="outside lower center", ncols=columns)


def _save(figure: Figure, path: str | Path | None) -> Figure:
    if path is not None:
        figure.savefig(path)
    return figure


def _escape(cell: object) -> str:
    return str(cell).replace("|", "\\|")
