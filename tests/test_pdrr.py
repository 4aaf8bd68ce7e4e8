"""The study of PDRR: from the command line to tables and plots."""

import dataclasses
import json
import os

import jax
import numpy as np
import pytest
from rich.console import Console

from experiments import pdrr, pdrr_report, pdrr_time
from experiments.pdrr import Cell, Config, cells, parse

SMALL = (
    *("--preset", "demo", "--model", "mlp", "--clients", "13", "--attackers", "4"),
    *("--rounds", "2", "--sweep-rounds", "1", "--eval-every", "1", "--batch-size", "4"),
    *("--root-size", "20", "--beta", "2", "--counts", "3", "--steps", "2"),
)
TINY = (*SMALL, "--parts", "schemes", "time", "--schemes", "err", "pdrr")


def play(config):
    with open(os.devnull, "w") as file:
        return pdrr.run(config, Console(file=file))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "tiny"
    config = parse([*TINY, "--out", str(out)])
    return config, play(config)


def test_a_run_writes_its_tables_plots_and_records(finished):
    config, _ = finished
    text = (config.out / "summary.md").read_text()
    assert text.startswith("# PDRR: digits by label_bias(q=0.5), in place of FEMNIST\n")
    for title in (
        "Attack on Krum",
        "Attack on trimmed mean",
        "Attack on median",
        "Test error",
        "Thresholds without a mistake",
        "Time of one detection",
        "Partitions, and no attack",
    ):
        assert f"\n## {title}" in text
    assert "told the number of attackers" in text
    for name in ("scores_krum", "error_median", "thresholds_trimmed_mean"):
        assert (config.out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (config.out / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    found = json.loads((config.out / "summary.json").read_text())["systems"]
    assert set(found) == {cell.name for cell in cells(config)}
    seconds = json.loads((config.out / pdrr_time.FILE).read_text())
    assert set(seconds) == set(pdrr.BASES)
    assert set(seconds["krum"]) == {"none", "err", "pdrr"}
    assert all(s > 0 for own in seconds.values() for s in own.values())
    records = np.load(config.out / "clients.npz")
    assert any(name.endswith("/index") for name in records.files)
    assert any(name.endswith("/error_impact") for name in records.files)


def test_reporting_again_measures_nothing_again(finished):
    config, _ = finished
    before = (config.out / "summary.md").read_text()
    play(dataclasses.replace(config, resume=True))
    assert (config.out / "summary.md").read_text() == before


@pytest.mark.parametrize("text", ["{", "[]", '{"krum": 3}', '{"krum": {"err": "x"}}'])
def test_damaged_times_are_measured_again(tmp_path, text, capsys):
    (tmp_path / pdrr_time.FILE).write_text(text)
    config = dataclasses.replace(Config(), out=tmp_path)
    assert pdrr_time.measure(config, {}, Console()) == {}
    assert f"{pdrr_time.FILE} is damaged" in capsys.readouterr().out.replace("\n", "")
    assert (tmp_path / pdrr_time.FILE).read_text() == "{}\n"
    assert pdrr_time.measure(config, {}, Console()) == {}
    assert capsys.readouterr().out == ""


def test_rates_in_the_tables_are_those_of_a_loop(finished):
    config, result = finished
    by_cell = {c: result.histories[c.name] for c in cells(config)}
    table = pdrr_report.scheme_table(config, by_cell, "median")
    rows = {row[0]: row[1:] for row in table.rows}
    rates = ("FAR 1", "2", "mean", "MAR 1", "2", "mean")
    assert table.header == ("scheme", *rates, "ties")
    (history,) = (
        h
        for c, h in by_cell.items()
        if (c.part, c.base, c.scheme, c.attack) == ("schemes", "median", "err", "fang")
    )
    far, mar = [], []
    for flagged, liar in zip(history.flagged, history.byzantine):
        far.append(np.mean([f for f, b in zip(flagged, liar) if not b]))
        mar.append(np.mean([not f for f, b in zip(flagged, liar) if b]))
    expected = [*far, np.mean(far), *mar, np.mean(mar)]
    tied = [np.ptp(scores) == 0 for scores in history.scores]
    assert rows["ERR"] == tuple(f"{x:.2f}" for x in [*expected, np.mean(tied)])


def test_thresholds_without_a_mistake_are_those_of_a_search(finished):
    config, result = finished
    for cell in cells(config):
        if cell.scheme != "pdrr" or cell.attack != "fang":
            continue
        history = result.histories[cell.name]
        low, high = pdrr_report.thresholds(history)
        for r, (scores, liar) in enumerate(zip(history.scores, history.byzantine)):
            for q in np.linspace(0, 1, 41)[1:]:
                perfect = np.array_equal(scores >= np.float32(q), liar)
                assert perfect == (low[r] < np.float32(q) <= high[r])


def test_thresholds_of_several_seeds_suit_all_of_them(finished):
    _, result = finished
    history = next(h for n, h in result.histories.items() if "pdrr, fang" in n)
    other = history._replace(scores=0.5 * np.asarray(history.scores))
    both = history._replace(
        **{
            field: np.stack([getattr(history, field), getattr(other, field)])
            for field in ("scores", "byzantine")
        }
    )
    one, two = pdrr_report.thresholds(history), pdrr_report.thresholds(other)
    low, high = pdrr_report.thresholds(both)
    np.testing.assert_array_equal(low, np.maximum(one[0], two[0]))
    np.testing.assert_array_equal(high, np.minimum(one[1], two[1]))


def test_the_paper_s_figures_stand_beside_ours(finished):
    config, result = finished
    by_cell = {c: result.histories[c.name] for c in cells(config)}
    rows = pdrr_report.scheme_table(config, by_cell, "trimmed_mean").rows
    assert rows[1] == ("↳ paper", "0.43", "", "", "0.65", "", "", "")
    times = {"krum": {"none": 0.02, "err": 3.0, "pdrr": 0.2}}
    rows = pdrr_report.time_table(times).rows
    assert rows[0] == ("rule alone", "20 ms (0.1)", "", "")
    assert rows[1] == ("ERR", "3 s (15)", "", "")
    assert rows[2] == ("↳ paper", "32.2 s (76.7)", "32.7 s (38.9)", "35.8 s (56.8)")


def test_longer_runs_are_shortened_where_they_stand_beside_others(finished):
    _, result = finished
    history = next(h for n, h in result.histories.items() if "pdrr, fang" in n)
    short = pdrr_report.first_rounds(history, 1)
    assert pdrr_report.error(history) != pdrr_report.error(short)
    assert pdrr_report.error(short) == f"{1 - history.accuracy[0]:.3f}"
    seeds = jax.tree.map(lambda x: np.stack([x, x]), history)
    assert pdrr_report.first_rounds(seeds, 1).fnr.shape == (2, 1)


def test_tables_of_the_other_parts(finished):
    """Whose cells are which: with histories that are told apart by their error."""
    _, result = finished
    some = next(h for n, h in result.histories.items() if "pdrr, fang" in n)
    rng = np.random.default_rng(0)
    config = dataclasses.replace(Config(), counts=(5,), others=("sign_flip",))
    config = dataclasses.replace(config, partitions=("iid",), rounds=2)
    by_cell = {
        c: some._replace(
            accuracy=np.full(2, rng.random()),
            fpr=np.full(2, rng.random()),
            fnr=np.full(2, rng.random() if c.attackers else np.nan),
        )
        for c in cells(config)
    }

    def of(scheme, **fields):
        (found,) = [
            history
            for cell, history in by_cell.items()
            if cell.base == "trimmed_mean"
            and cell.scheme == scheme
            and all(getattr(cell, name) == value for name, value in fields.items())
        ]
        return found

    def text(**fields):
        own, other = of("pdrr", **fields), of("none", **fields)
        rates = f"{own.fpr[0]:.2f} / {own.fnr[0]:.2f}".removesuffix(" / nan")
        errors = f"{1 - own.accuracy[0]:.3f} ({1 - other.accuracy[0]:.3f})"
        return rates, errors

    rows = {row[0]: row for row in pdrr_report.count_table(config, by_cell).rows}
    assert list(rows) == ["0", "5", "20", "20, 10 cut"]
    assert rows["5"][2] == "; ".join(text(part="counts", attackers=5))
    assert rows["20"][2] == "; ".join(text(part="schemes", attack="fang"))
    assert rows["20, 10 cut"][1:] == ("", "; ".join(text(part="counts", f=10)), "")

    (row,) = pdrr_report.other_table(by_cell).rows
    assert row[0] == "sign_flip"
    assert row[2] == "; ".join(text(part="others"))

    rows = {row[0]: row[1:] for row in pdrr_report.partition_table(by_cell).rows}
    assert next(iter(rows)) == "label_bias(q=0.5), Krum"
    for partition, part in (("label_bias(q=0.5)", "schemes"), ("iid", "partitions")):
        both = [text(part=part, attack=attack) for attack in ("none", "fang")]
        assert rows[f"{partition}, trimmed mean"] == (*both[0], *both[1])

    rows = {row[0]: row[1:] for row in pdrr_report.error_table(by_cell).rows}
    assert next(iter(rows)).startswith("no attack")
    full = of("pdrr", part="knowledge", knowledge="full")
    assert rows["full, PDRR"][1] == f"{1 - full.accuracy[0]:.3f}"
    assert rows["no attack, Bulyan (f = 11)"][1:] == ("-", "-")

    rows = {row[0]: row for row in pdrr_report.range_table(config, by_cell).rows}
    assert set(rows) == {
        f"{rule}, {knowledge}"
        for rule in ("Krum", "trimmed mean", "median")
        for knowledge in ("partial", "full")
    }


def test_every_system_of_a_preset_has_a_name_of_its_own():
    for preset in pdrr.PRESETS.values():
        found = [cell.name for cell in cells(preset)]
        assert len(set(found)) == len(found)
    home = Config().partition
    paper = cells(Config())
    assert Cell("schemes", "krum", "lfr", "fang", "partial", 20, 20, home) in paper
    assert Cell("knowledge", "median", "pdrr", "fang", "full", 20, 20, home) in paper
    assert Cell("schemes", "median", "pdrr", "none", "", 0, 20, home) in paper
    # Bulyan needs 4 f + 3 of 50 clients.
    assert Cell("schemes", "bulyan", "none", "fang", "partial", 20, 11, home) in paper
    # The paper's 2 beta = 20: fewer values cut than there are attackers.
    beta = ("counts", "trimmed_mean", "pdrr", "fang", "partial", 20, 10, home)
    assert Cell(*beta) in paper
    assert {c.attackers for c in paper if c.part == "counts"} == {5, 10, 15, 20, 24}


def test_presets_have_the_paper_s_constants():
    config = Config()
    assert (config.clients, config.attackers, config.stop, config.b) == (
        *(50, 20),
        *(1e-9, 1.05),
    )
    assert pdrr.OPTIONS["vae_detector"]["latent"] == 100
    (femnist,) = [p for p in pdrr.PRESETS.values() if p.dataset == "femnist"]
    assert (femnist.partition, femnist.model) == ("by_client", "leaf_cnn")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--attackers", "0"), "--attackers must be from 3, without which"),
        (("--attackers", "25"), "to 24, so that one of 25 clients is honest; got 25"),
        (("--attackers", "13", "--parts", "schemes"), r"needs cohort_size >= 2 \* max"),
        (("--counts", "5", "5"), "--counts needs each value once"),
        (
            ("--parts", "counts", "--counts", "10"),
            "--counts needs other numbers than --attackers, 10",
        ),
        (
            ("--parts", "counts", "--counts", "2"),
            "--counts must be from 3, without which .*; got 2",
        ),
        (("--parts", "schemes", "schemes"), "--parts needs each value once"),
        (("--parts", "time"), "--parts needs schemes where it has time; got time"),
        (
            ("--parts", "counts", "--beta", "10"),
            "--beta must be from 0 to 9, below the attackers",
        ),
        (("--q-krum", "1.5"), r"--q-krum must be a finite number in \[0, 1\]; got 1"),
        (("--q-trimmed-mean", "nan"), "--q-trimmed-mean must be a finite number"),
        (("--stop", "0"), r"--stop must be a finite number in \(0, inf\)"),
        (("--b", "1"), r"--b must be a finite number in \(1, inf\)"),
        (
            ("--parts", "others", "--others", "fltrust_adaptive", "--root-size", "4"),
            r"--root-size must be at least --batch-size \(5\), for fltrust_adaptive",
        ),
        (
            ("--parts", "partitions", "--partitions", "label_bias(q=0.5)"),
            "--partitions needs others than",
        ),
        (
            ("--parts", "partitions", "--partitions", "dirichlet"),
            "dirichlet: .*alpha",
        ),
        (("--partition", "by_client"), "digits does not say whose its samples are"),
        (("--root-size", "4"), r"--root-size must be at least --batch-size \(5\), for"),
        (("--root-size", "1442"), "root_size must leave training samples"),
        (("--sweep-rounds", "0"), "--sweep-rounds must be at least 1; got 0"),
        (("--steps", "0"), "--steps must be at least 1; got 0"),
        (("--parts", "others", "--others", "krum"), "unknown attack 'krum'"),
        (
            ("--parts", "others", "--others", "ipm(epsilon=[1, 2])"),
            "--others ipm.*: this study runs one strength",
        ),
        (("--model", "resnet"), "unknown model 'resnet'. Did you mean 'resnet18'"),
        (("--lr", "0"), "--lr must be a positive number"),
    ],
)
def test_bad_options_are_refused_before_any_training(tmp_path, words, message):
    out = tmp_path / "bad"
    with pytest.raises(ValueError, match=message):
        play(parse(["--preset", "demo", *words, "--out", str(out)]))
    assert not out.exists()


def write_femnist(folder):
    """Small files in LEAF's format: 62 classes, writers of different size."""
    rng = np.random.default_rng(0)
    for part, least in (("train", 8), ("test", 2)):
        sizes = {f"writer{i}": least + i % 5 for i in range(14)}
        user_data = {
            user: {
                "x": (rng.integers(0, 256, (size, 784)) / 255).tolist(),
                "y": rng.integers(0, 62, size).tolist(),
            }
            for user, size in sizes.items()
        }
        file = folder / "leaf" / "femnist" / part / f"all_data_{part}.json"
        file.parent.mkdir(parents=True)
        content = {"users": list(sizes), "num_samples": list(sizes.values())}
        file.write_text(json.dumps(content | {"user_data": user_data}))


def test_femnist_from_files_to_tables(tmp_path):
    write_femnist(tmp_path)
    words = ("--preset", "femnist", "--data-dir", str(tmp_path), "--model", "mlp")
    few = ("--clients", "11", "--attackers", "3", "--sweep-rounds", "2", "--steps", "2")
    less = ("--batch-size", "4", "--parts", "counts", "--counts", "4", "--beta", "0")
    config = parse(
        [
            *(*words, *few, *less, "--partition", "by_client(min_size=5)"),
            *("--out", str(tmp_path / "run")),
        ]
    )
    result = play(config)
    text = (config.out / "summary.md").read_text()
    assert text.startswith("# PDRR: femnist by by_client(min_size=5)\n")
    assert "## Number of attackers" in text
    assert "Attack on" not in text
    assert "told the number" not in text  # none of those who are
    assert len(result.histories) == 6
    for history in result.histories.values():
        assert history.class_recall.shape == (2, 62)


def test_leaf_cnn_is_what_the_femnist_preset_trains(tmp_path):
    write_femnist(tmp_path)
    words = ("--preset", "femnist", "--data-dir", str(tmp_path), "--clients", "11")
    few = ("--attackers", "3", "--batch-size", "4", "--root-size", "8")
    (phase,), source = pdrr.make_phases(
        parse(
            [
                *(*words, *few, "--parts", "knowledge", "--beta", "0"),
                *("--partition", "by_client(min_size=5)", "--counts", "4"),
            ]
        )
    )
    sim = next(iter(phase.systems.values()))
    assert (sim.num_classes, sim.num_clients) == (62, 11)
    assert "LEAF JSON" in source
    assert sim.padded  # writers have different numbers of samples
