"""Tables and figures from histories made by hand."""

import io
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import pytest
import rich.console

from fedjax_sim import report

NAN = float("nan")


class History(NamedTuple):
    """The fields that a report reads."""

    round: np.ndarray
    accuracy: np.ndarray
    attack_success: np.ndarray
    tpr: np.ndarray
    fpr: np.ndarray
    num_flagged: np.ndarray


def make_history(accuracy, tpr=None, fpr=None, num_flagged=None, success=None):
    accuracy = np.asarray(accuracy, np.float32)
    rounds = np.arange(1, accuracy.shape[-1] + 1, dtype=np.int32)

    def field(value):
        return np.zeros_like(accuracy) if value is None else np.asarray(value)

    return History(
        round=np.broadcast_to(rounds, accuracy.shape),
        accuracy=accuracy,
        attack_success=accuracy * NAN if success is None else np.asarray(success),
        tpr=field(tpr),
        fpr=field(fpr),
        num_flagged=field(num_flagged),
    )


ONE = make_history([NAN, 0.5, NAN, 0.75, NAN, 1.0])
SEEDS = make_history([[NAN, 0.25, NAN, 0.5], [NAN, 0.75, NAN, 1.0]])
EMPTY = make_history(np.zeros(0))
UNEVALUATED = make_history([NAN, NAN])


def test_figures_keep_their_style_when_saved_later(tmp_path):
    report.accuracy_plot({"median": ONE}, tmp_path / "a.pdf")
    report.accuracy_plot({"median": ONE}).savefig(tmp_path / "b.pdf")
    for name in ("a.pdf", "b.pdf"):
        # Type 3 fonts are what publishers refuse.
        content = (tmp_path / name).read_bytes()
        assert b"/Type0" in content
        assert b"/Type3" not in content


def test_accuracy_plot_draws_evaluated_rounds(tmp_path):
    path = tmp_path / "accuracy.png"
    figure = report.accuracy_plot({"median": ONE, "krum": SEEDS}, path, title="Attack")
    (axes,) = figure.axes
    assert axes.get_xlabel() == "communication round"
    assert axes.get_ylabel() == "test accuracy"
    assert axes.get_title() == "Attack"
    median, krum = axes.lines
    np.testing.assert_array_equal(median.get_xydata(), [[2, 0.5], [4, 0.75], [6, 1.0]])
    np.testing.assert_array_equal(krum.get_xydata(), [[2, 0.5], [4, 0.75]])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["median", "krum"]
    assert path.stat().st_size > 10_000
    pixels = mpl.image.imread(path)
    assert pixels.shape[1] == round(200 * report.COLUMN)


def test_band_spans_the_seeds():
    figure = report.accuracy_plot({"median": ONE, "krum": SEEDS})
    (band,) = figure.axes[0].collections  # none for a single seed
    corners = band.get_paths()[0].vertices
    for at, low, high in ((2, 0.25, 0.75), (4, 0.5, 1.0)):
        heights = corners[corners[:, 0] == at, 1]
        assert (heights.min(), heights.max()) == (low, high)


def test_systems_differ_without_colour():
    """No two of many lines share marker and line style."""
    histories = {f"system {i}": ONE for i in range(20)}
    lines = report.accuracy_plot(histories).axes[0].lines
    # get_linestyle calls every pattern "--".
    looks = {(line.get_marker(), str(line._unscaled_dash_pattern)) for line in lines}
    assert len(looks) == 20
    assert len({line.get_color() for line in lines[:7]}) == 7


def test_accepts_jax_arrays():
    history = History(*(jnp.asarray(x) for x in ONE))
    assert report.table({"a": history}, rounds=(4,)) == report.table(
        {"a": ONE}, rounds=(4,)
    )


def test_notebook_shows_the_figure():
    figure = report.accuracy_plot({"median": ONE})
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_plots_leave_matplotlib_as_it_was():
    before = dict(mpl.rcParams)
    report.accuracy_plot({"median": ONE})
    assert dict(mpl.rcParams) == before


def test_detection_plot_smooths_and_leaves_out(tmp_path):
    path = tmp_path / "detection.pdf"
    flagging = make_history(
        [NAN] * 4,
        tpr=[1.0, NAN, 0.0, 1.0],
        fpr=[0.0, 0.5, 1.0, 1.0],
        num_flagged=[1, 1, 1, 1],
    )
    figure = report.detection_plot(
        {"fedavg": make_history([NAN] * 4), "krum": flagging}, path, window=2
    )
    upper, lower = figure.axes
    assert upper.get_ylabel() == "true positive rate"
    assert lower.get_ylabel() == "false positive rate"
    assert "running mean of 2" in lower.get_xlabel()
    (tpr,), (fpr,) = upper.lines, lower.lines
    np.testing.assert_array_equal(tpr.get_ydata(), [1.0, 1.0, 0.0, 0.5])
    np.testing.assert_array_equal(fpr.get_ydata(), [0.0, 0.25, 0.75, 1.0])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["krum"]
    assert path.read_bytes().startswith(b"%PDF")
    # The same look as in the other plot, where krum is the second system.
    in_accuracy = report.accuracy_plot({"fedavg": ONE, "krum": ONE}).axes[0].lines[1]
    assert tpr.get_color() == in_accuracy.get_color()
    assert tpr.get_marker() == in_accuracy.get_marker()


def test_detection_plot_without_any_attacker(tmp_path):
    """A clean run has false alarms but no true positive rate."""
    rounds = 3
    clean = make_history(
        np.full((2, rounds), NAN),
        tpr=np.full((2, rounds), NAN),
        fpr=np.array([[0.5, 0.0, 0.5], [0.0, 0.0, 1.0]]),
        num_flagged=np.ones((2, rounds)),
    )
    figure = report.detection_plot({"krum": clean}, tmp_path / "clean.png", window=1)
    upper, lower = figure.axes
    assert np.isnan(upper.lines[0].get_ydata()).all()
    np.testing.assert_array_equal(lower.lines[0].get_ydata(), [0.25, 0.0, 0.75])


def data_lines(axes):
    """Those of a panel but its marks."""
    return [line for line in axes.lines if line.get_label()[0] != "_"]


def mark_places(axes):
    marks = [line for line in axes.lines if line.get_label()[0] == "_"]
    return [line.get_xdata()[0] for line in marks]


def test_line_plot_draws_lines_gaps_and_marks(tmp_path):
    path = tmp_path / "losses.pdf"
    lines = {
        "never": ([1, 3, 5], [0.5, np.inf, 0.25]),
        "MAD": (jnp.array([2, 4]), jnp.array([0.75, NAN])),
    }
    figure = report.line_plot(lines, "loss", path, title="Two", marks=[2, 4])
    (axes,) = figure.axes
    assert axes.get_xlabel() == "communication round"
    assert axes.get_ylabel() == "loss"
    assert axes.get_title() == "Two"
    never, mad = data_lines(axes)
    np.testing.assert_array_equal(never.get_xydata(), [[1, 0.5], [3, NAN], [5, 0.25]])
    np.testing.assert_array_equal(mad.get_xydata(), [[2, 0.75], [4, NAN]])
    assert mark_places(axes) == [2, 4]
    assert not axes.collections  # no band of a single seed
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["never", "MAD"]
    assert path.read_bytes().startswith(b"%PDF")
    # As in accuracy_plot: the second system of both.
    other = report.accuracy_plot({"a": ONE, "b": ONE}).axes[0].lines[1]
    assert (mad.get_color(), mad.get_marker()) == (other.get_color(), "s")


def test_line_plot_of_several_seeds():
    values = np.array([[1.0, 2.0, NAN], [3.0, NAN, NAN], [8.0, 6.0, np.inf]])
    figure = report.line_plot({"a": ([1, 2, 3], values)}, "loss")
    (line,) = data_lines(figure.axes[0])
    np.testing.assert_array_equal(line.get_ydata(), [4.0, 4.0, NAN])
    (band,) = figure.axes[0].collections
    corners = band.get_paths()[0].vertices
    for at, low, high in ((1, 1.0, 8.0), (2, 2.0, 6.0)):
        heights = corners[corners[:, 0] == at, 1]
        assert (heights.min(), heights.max()) == (low, high)


@pytest.mark.parametrize(
    ("line", "shapes"),
    [
        (([1, 2], [0.5]), r"\(2,\) and \(1, 1\)"),
        (([[1, 2]], [[0.5, 0.5]]), r"\(1, 2\) and \(1, 2\)"),
        (([1, 2, 3], np.zeros((3, 2))), r"\(3,\) and \(3, 2\)"),
        (([1, 2], np.zeros((2, 2, 2))), r"\(2,\) and \(2, 2, 2\)"),
    ],
)
def test_line_plot_names_the_line_that_does_not_fit(line, shapes):
    message = r"rounds \[R\] and values \[R\] or \[seeds, R\]; 'b' has shapes " + shapes
    with pytest.raises(ValueError, match=message):
        report.line_plot({"a": ([1], [1.0]), "b": line}, "loss")


def test_line_plot_of_nothing():
    with pytest.raises(ValueError, match="line_plot needs at least one line; got none"):
        report.line_plot({}, "loss")


class Trusted(NamedTuple):
    """The fields that ``client_plot`` reads, of a cohort of two of the clients 0-3."""

    round: np.ndarray
    client_ids: np.ndarray
    byzantine: np.ndarray
    scores: np.ndarray
    details: dict


TRUSTED = Trusted(
    round=np.array([1, 2, 3]),
    client_ids=np.array([[0, 1], [3, 0], [1, 3]]),
    byzantine=np.array([[False, True], [False, False], [True, False]]),
    scores=np.array([[1.0, 2.0], [3.0, np.inf], [5.0, 6.0]]),
    details={"trust": np.array([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])},
)


def test_client_plot_draws_every_client_where_it_takes_part(tmp_path):
    path = tmp_path / "trust.png"
    figure = report.client_plot(
        TRUSTED, ["trust", "scores"], path, title="Trust", marks=[2]
    )
    upper, lower = figure.axes
    assert upper.get_title() == "Trust"
    assert (upper.get_ylabel(), lower.get_ylabel()) == ("trust", "scores")
    assert lower.get_xlabel() == "communication round"
    expected = {
        "trust": {0: [0.1, 0.4], 1: [0.2, 0.5], 3: [0.3, 0.6]},
        "scores": {0: [1, NAN], 1: [2, 5], 3: [3, 6]},
    }
    rounds = {0: [1, 2], 1: [1, 3], 3: [2, 3]}
    for axes, by_client in zip(figure.axes, expected.values()):
        lines = data_lines(axes)
        assert mark_places(axes) == [2]
        for line, (client, values) in zip(lines, by_client.items(), strict=True):
            np.testing.assert_array_equal(line.get_xdata(), rounds[client])
            np.testing.assert_array_equal(line.get_ydata(), values)
            assert line.get_marker() == "."  # it missed a round
            liar = client == 1
            assert line.get_label() == ("Byzantine" if liar else "honest") + " client"
            assert line.get_color() == report.COLOURS[liar]
            assert line.get_linestyle() == ("--" if liar else "-")
        assert lines[1].get_zorder() > max(lines[0].get_zorder(), lines[2].get_zorder())
    (legend,) = figure.legends  # each kind once
    texts = sorted(text.get_text() for text in legend.get_texts())
    assert texts == ["Byzantine client", "honest client"]
    assert path.read_bytes().startswith(b"\x89PNG")


def test_client_plot_of_what_is_not_there():
    message = r"no 'trusts' of shape \(3, 2\) in the history; its details are trust\."
    with pytest.raises(ValueError, match=message):
        report.client_plot(TRUSTED, ["trust", "trusts"])
    with pytest.raises(ValueError, match=r"no 'round' of shape .* details are none\."):
        report.client_plot(TRUSTED._replace(details={}), ["round"])
    with pytest.raises(ValueError, match="at least one field; got none"):
        report.client_plot(TRUSTED, [])
    seeds = jax.tree.map(lambda x: np.stack([x, x]), TRUSTED)
    with pytest.raises(ValueError, match=r"one seed; got .* shape \(2, 3\)\. Take one"):
        report.client_plot(seeds, ["trust"])


def bars(axes):
    """Place, bottom and top of every bar, and its colour."""
    return [
        (
            round(bar.get_x() + bar.get_width() / 2, 6),
            round(bar.get_y(), 6),
            round(bar.get_y() + bar.get_height(), 6),
            mpl.colors.to_hex(bar.get_facecolor()).upper(),
        )
        for bar in axes.patches
    ]


def test_score_plot_puts_the_attackers_first(tmp_path):
    path = tmp_path / "scores.png"
    honest, liar = report.COLOURS[0], report.COLOURS[1]
    figure = report.score_plot({"mad": TRUSTED, "krum": TRUSTED}, 1, path=path)
    upper, lower = figure.axes
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["mad", "krum"]
    # Clients 0 and 1, of which 1 is Byzantine.
    assert bars(upper) == [(1, 0, 2, liar), (2, 0, 1, honest)]
    assert lower.get_xlabel() == "client, the Byzantine ones first"
    assert path.read_bytes().startswith(b"\x89PNG")
    # Clients 3 and 0, by id; that of 0 is infinite and has no bar.
    figure = report.score_plot({"mad": TRUSTED}, 2)
    assert bars(figure.axes[0]) == [(2, 0, 3, honest)]
    assert len(figure.axes[0].texts) == 0
    figure = report.score_plot({"mad": TRUSTED}, 3, field="trust")
    assert bars(figure.axes[0]) == [(1, 0, 0.5, liar), (2, 0, 0.6, honest)]


def test_score_plot_marks_thresholds_and_says_where_all_scores_tie():
    tied = TRUSTED._replace(scores=np.full_like(TRUSTED.scores, 0.25))
    figure = report.score_plot({"a": TRUSTED, "b": tied}, 1, marks={"a": 0.5, "c": 1})
    one, other = figure.axes
    assert [line.get_ydata() for line in one.lines] == [[0.5, 0.5]]
    assert (len(other.lines), len(one.texts)) == (0, 0)
    assert [text.get_text() for text in other.texts] == ["all 0.25"]
    assert figure.get_supylabel() == "score"


def test_score_plot_of_what_is_not_there():
    with pytest.raises(
        ValueError, match=r"'a' has round of shape \(3,\), .* round 4\."
    ):
        report.score_plot({"a": TRUSTED}, 4)
    with pytest.raises(ValueError, match=r"no 'index' in the history of 'a'; .* trust"):
        report.score_plot({"a": TRUSTED}, 1, field="index")
    with pytest.raises(ValueError, match="at least one history; got none"):
        report.score_plot({}, 1)
    seeds = jax.tree.map(lambda x: np.stack([x, x]), TRUSTED)
    with pytest.raises(ValueError, match=r"has round of shape \(2, 3\)"):
        report.score_plot({"a": seeds}, 1)


def test_range_plot_draws_what_is_a_range(tmp_path):
    ranges = {
        "partial": ([1, 20, 50], [0.1, 0.5, NAN], [1.0, 0.5, 1.0]),
        "full": ([1, 20, 50], [0.2, 0.3, 0.4], [0.9, 0.8, 0.7]),
    }
    path = tmp_path / "ranges.pdf"
    axes = report.range_plot(ranges, "q", path, title="Krum", mark=0.6).axes[0]
    assert [line.get_ydata() for line in axes.lines] == [[0.6, 0.6]]
    one, two = report.COLOURS[4:6]
    assert bars(axes) == [
        (-0.2, 0.1, 1.0, one),
        (0.2, 0.2, 0.9, two),
        (1.2, 0.3, 0.8, two),
        (2.2, 0.4, 0.7, two),
    ]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "20", "50"]
    assert (axes.get_ylabel(), axes.get_title()) == ("q", "Krum")
    assert path.read_bytes().startswith(b"%PDF")
    with pytest.raises(ValueError, match="at least one name; got none"):
        report.range_plot({}, "q")
    with pytest.raises(ValueError, match=r"same rounds for all; got \[\[1\], \[2\]\]"):
        report.range_plot({"a": ([1], [0], [1]), "b": ([2], [0], [1])}, "q")


@pytest.mark.parametrize(
    "name", ["krum", "mine.root_only", "clipping+geometric_median"]
)
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 9), (12, 4)])
def test_everything_on_a_heatmap_is_inside_the_figure(shape, name):
    figure = report.heatmap(
        np.full(shape, 0.5),
        [name] * shape[0],
        ["badnets"] * shape[1],
        label="attack success",
        title="dirichlet(alpha=0.3), 20% attackers",
    )
    figure.draw_without_rendering()
    width, height = figure.get_size_inches()
    box = figure.get_tightbbox()
    assert min(box.x0, box.y0) >= 0
    assert box.x1 <= width
    assert box.y1 <= height


@pytest.mark.parametrize("window", [1, 3, 10])
def test_running_mean_equals_a_loop(window):
    rng = np.random.default_rng(0)
    values = np.where(rng.random((2, 25)) < 0.3, NAN, rng.random((2, 25)))
    values[:, :2] = NAN
    got = report._running_mean(values, window)
    for seed in range(2):
        for i in range(25):
            part = [v for v in values[seed, max(0, i - window + 1) : i + 1] if v == v]
            expected = sum(part) / len(part) if part else NAN
            np.testing.assert_allclose(got[seed, i], expected, rtol=1e-12)


def test_table_of_one_seed():
    table = report.table({"median": ONE}, rounds=(2, 3, 6, 100), tail=2, digits=3)
    assert table.header == (
        "system",
        "round 2",
        "round 3",
        "round 6",
        "round 100",
        "final (round 6)",
        "mean of last 2",
    )
    assert table.rows == [("median", "0.500", "-", "1.000", "-", "1.000", "0.875")]


@pytest.mark.parametrize(
    ("last", "every", "seeds", "expected"),
    [
        (100, 5, 1, [20, 40, 60, 80]),
        (40, 5, 1, [10, 20, 30]),
        (20, 5, 1, [5, 10, 15]),
        (3, 3, 1, []),
        (100, 5, 5, [50]),
        (23, 10, 1, [10, 20]),
    ],
)
def test_table_chooses_evenly_spaced_rounds(last, every, seeds, expected):
    rounds = np.arange(1, last + 1)
    evaluated = (rounds % every == 0) | (rounds == last)
    accuracy = np.where(evaluated, 0.5, NAN)
    if seeds > 1:
        rounds, accuracy = (np.tile(x, (seeds, 1)) for x in (rounds, accuracy))
    early = make_history([0.1])
    success = np.full_like(accuracy, NAN)
    history = ONE._replace(round=rounds, accuracy=accuracy, attack_success=success)
    header, _ = report.table({"early": early, "late": history})
    assert header[1:-2] == tuple(f"round {number}" for number in expected)


def test_table_of_several_seeds():
    _, rows = report.table({"krum": SEEDS}, rounds=(2,), tail=2, digits=3)
    # Seeds 0.25 and 0.75, then 0.5 and 1, and tail means 0.375 and 0.875.
    assert rows == [("krum", "0.500 ± 0.354", "0.750 ± 0.354", "0.625 ± 0.354")]


def test_table_says_where_each_system_ended():
    header, rows = report.table({"a": ONE, "b": SEEDS}, rounds=(), tail=3, digits=2)
    assert header == ("system", "final", "mean of last 3")
    assert rows[0] == ("a", "1.00 (round 6)", "0.75")
    assert rows[1] == ("b", "0.75 ± 0.35 (round 4)", "-")


def test_markdown_table():
    text = report.markdown_table(("system", "x"), [("a|b", 1), ("c", "±")])
    assert text.splitlines() == [
        "| system | x |",
        "|:---|---:|",
        "| a\\|b | 1 |",
        "| c | ± |",
    ]


def test_rich_table_prints_every_cell():
    table = report.rich_table(*report.table({"median": ONE}, rounds=(2,)), title="All")
    console = rich.console.Console(width=100, file=io.StringIO())
    console.print(table)
    text = console.file.getvalue()
    for word in ("All", "median", "0.5000", "1.0000", "final (round 6)"):
        assert word in text


def test_table_has_attack_success_where_a_targeted_attack_runs():
    """The last evaluation of each system, whether it is the run's end or not."""
    attacked = make_history(ONE.accuracy, success=[NAN, 0.1, NAN, 0.8, NAN, 0.9])
    early = make_history(ONE.accuracy, success=[NAN, 0.1, NAN, 0.25, NAN, NAN])
    both = {"clean": ONE, "attacked": attacked, "early": early}
    header, rows = report.table(both, digits=2)
    assert header[-1] == "attack success"
    assert [row[-1] for row in rows] == ["-", "0.90", "0.25"]
    assert all(len(row) == len(header) for row in rows)
    assert "attack success |" in report.markdown_table(header, rows)
    assert report.table({"clean": ONE}).header[-1] == "mean of last 5"
    seeds = make_history(SEEDS.accuracy, success=[[NAN, 0, NAN, 1], [NAN, 0, NAN, 0.5]])
    assert report.table({"a": seeds}, digits=2).rows[0][-1] == "0.75 ± 0.35"


REPORTS = [report.accuracy_plot, report.detection_plot, report.table]


@pytest.mark.parametrize("make", REPORTS)
def test_no_history(make):
    with pytest.raises(ValueError, match="at least one history"):
        make({})


@pytest.mark.parametrize("make", REPORTS)
def test_history_without_rounds_is_named(make):
    with pytest.raises(ValueError, match="history of 'krum' holds no round"):
        make({"krum": EMPTY})


@pytest.mark.parametrize("make", [report.accuracy_plot, report.table])
def test_history_without_evaluation_is_named(make):
    with pytest.raises(ValueError, match=r"'krum' holds no evaluation.*all 2 rounds"):
        make({"median": ONE, "krum": UNEVALUATED})


def test_mismatched_rounds_are_refused():
    with pytest.raises(ValueError, match="'krum' needs round and accuracy of shape"):
        report.table({"krum": ONE._replace(round=np.arange(3))})


def test_nobody_flags():
    with pytest.raises(
        ValueError, match="no system that flagged a client among median"
    ):
        report.detection_plot({"median": ONE})


def test_window_and_tail_are_checked():
    with pytest.raises(ValueError, match="window >= 1; got window=0"):
        report.detection_plot({"median": ONE}, window=0)
    with pytest.raises(ValueError, match="tail >= 1; got tail=0"):
        report.table({"median": ONE}, tail=0)
