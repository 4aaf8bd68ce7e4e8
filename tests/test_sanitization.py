"""The sanitization study: from the command line to tables and plots."""

import dataclasses
import json
import os

import numpy as np
import pytest
from rich.console import Console

import fedjax_sim as fs
from benchmarks import defense_time
from experiments import runner, sanitization, sanitization_report
from experiments.sanitization import Cell, Config, cells, parse

TINY = (
    *("--preset", "demo", "--model", "mlp", "--rounds", "3", "--eval-every", "1"),
    *("--defenses", "foolsgold", "sanitization", "--attackers", "0.25", "0.5"),
    *("--attacks", "label_flip", "--clusters", "3"),
)


def play(config):
    with open(os.devnull, "w") as file:
        return sanitization.run(config, Console(file=file))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "tiny"
    config = parse([*TINY, "--out", str(out)])
    return config, play(config)


def test_a_run_writes_its_tables_plots_and_records(finished):
    config, result = finished
    text = (config.out / "summary.md").read_text()
    for title in ("Attacks by 25%", "Classes", "Share of attackers", "Samples left"):
        assert f"## {title}" in text
    assert "python -m experiments.sanitization --preset demo" in text
    assert "↳ paper" not in text  # its figures are of other data
    for name in ("label_flip_accuracy", "label_flip_attack_success"):
        assert (config.out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (config.out / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    found = json.loads((config.out / "summary.json").read_text())["systems"]
    assert list(found) == [cell.name for cell in cells(config)]
    attacked = found["label_flip(0.3) by 25% sanitization"]
    assert 0 <= attacked["attack_success"]["final"] <= 1
    assert 0.5 < attacked["auc"]["final"] <= 1
    records = np.load(config.out / "clients.npz")
    name = "label_flip(0.3) by 25% sanitization/defense_poisoned_left_out"
    assert records[name].shape == (3, 8)
    history = result.histories["label_flip(0.3) by 25% sanitization"]
    assert history.defense["clean_left_out"].sum() > 0
    assert not result.histories["label_flip(0.3) by 25% foolsgold"].defense


def test_shares_left_out_are_those_of_a_loop(finished):
    _, result = finished
    for name, history in result.histories.items():
        if "sanitization" not in name:
            continue
        found = sanitization_report.shares_left_out(history)
        parts = {"poisoned": [0, 0], "clean": [0, 0], "clean_attackers": [0, 0]}
        counts = {k: np.asarray(v) for k, v in history.defense.items()}
        for r, i in np.ndindex(counts["samples"].shape):
            bad, lost = (
                counts["poisoned_left_out"][r, i],
                counts["clean_left_out"][r, i],
            )
            clean = counts["samples"][r, i] + bad + lost - counts["poisoned"][r, i]
            parts["poisoned"][0] += bad
            parts["poisoned"][1] += counts["poisoned"][r, i]
            parts["clean"][0] += lost
            parts["clean"][1] += clean
            if history.byzantine[r, i]:
                parts["clean_attackers"][0] += lost
                parts["clean_attackers"][1] += clean
        for key, (part, whole) in parts.items():
            expected = part / whole if whole else np.nan
            assert found[key] == pytest.approx(expected, nan_ok=True)


def test_rounds_before_the_first_clustering_do_not_count():
    ones = np.ones((4, 2), int)
    late = np.array([[0, 0], [0, 0], [1, 1], [1, 1]])
    history = type("History", (), {})()
    history.byzantine = np.array([[True, False]] * 4)
    history.defense = {
        "samples": 10 * ones - late,
        "poisoned": ones * [2, 0],
        "poisoned_left_out": late * [1, 0],
        "clean_left_out": late * [0, 1],
    }
    found = sanitization_report.shares_left_out(history)
    assert found == {"poisoned": 0.5, "clean": 1 / 18, "clean_attackers": 0.0}


def test_the_paper_s_figures_stand_beside_ours_on_its_data(finished):
    config, result = finished
    config = dataclasses.replace(config, dataset="mnist")
    by_cell = {c: result.histories[c.name] for c in cells(config)}
    table = sanitization_report._attack_table(config, by_cell)
    rows = dict(zip([row[0] for row in table.rows], table.rows))
    assert [row[0] for row in table.rows].count("↳ paper") == 2
    assert table.rows[2] == ("↳ paper", "", "0.904 / 0.144")
    assert rows["↳ paper"] == ("↳ paper", "", "0.924 / 0.023")
    sweep = sanitization_report._sweep_table(
        config, by_cell, "attackers", config.attackers
    )
    assert ("↳ paper", "0.912 / 0.034", "0.891 / 0.042") in sweep.rows


def test_every_system_of_a_preset_has_a_name_of_its_own():
    for preset in sanitization.PRESETS.values():
        found = [cell.name for cell in cells(preset)]
        assert len(set(found)) == len(found)
    paper = cells(Config())
    assert Cell("badnets", 0.3, 0.75, "sanitization") in paper
    assert Cell("label_flip", 1.0, 0.25, "fedavg") in paper
    assert sum(cell.attack == "hybrid" for cell in paper) == 6


def test_attackers_are_rounded_up():
    counts = [sanitization.num_attackers(Config(), s) for s in (0.25, 0.3, 0.5, 0.75)]
    assert counts == [3, 3, 5, 8]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--attackers", "0.95"), "--attackers 0.95 of 10 clients, rounded up, is all"),
        (("--attackers", "0"), r"--attackers must be a finite number in \(0, 1\)"),
        (("--attackers", "0.25", "0.25000001"), "would be called 'label_flip"),
        (("--poisons", "0.3"), r"--poisons needs ratios other than --poison, each onc"),
        (("--poisons", "0.1", "0.1"), r"--poisons needs ratios other than --poison"),
        (("--poisons", "0.30000001"), "would be called 'label_flip"),
        (("--poison", "0"), r"--poison and --poisons must be .* in \(0, 1\]; got 0"),
        (("--poison", "nan"), "--poison and --poisons must be a finite number"),
        (("--defenses", "krum", "krum"), "--defenses needs one value or more, each"),
        (("--defenses", "sanitisation"), "unknown defense 'sanitisation'"),
        (("--defenses", "sanitization(vote='me')"), "unknown vote of sanitization"),
        (("--defenses", "krum+sanitization"), "unknown aggregator 'sanitization'"),
        (
            ("--defenses", "sanitization(start=20)"),
            "start=20 is after the run, .* 0 to 19",
        ),
        (("--source", "10"), "two different classes from 0 to 9"),
        (("--target", "10"), "badnets' target must be a class from 0 to 9"),
        (("--trigger", "9"), "square of 9 x 9 is larger than the images of 8 x 8"),
        (("--clusters", "0"), "num_clusters must be an integer of at least 2; got 0"),
        (("--clusters", "1"), "num_clusters must be an integer of at least 2; got 1"),
        (("--clusters", "150"), "num_clusters=150, and a client with 144"),
        (("--model", "resnet"), "unknown model 'resnet'. Did you mean 'resnet18'"),
        (("--cohort", "11"), "--cohort must be from 1 to --clients"),
    ],
)
def test_bad_options_are_refused_before_any_training(tmp_path, words, message):
    out = tmp_path / "bad"
    with pytest.raises(ValueError, match=message):
        play(parse(["--preset", "demo", *words, "--out", str(out)]))
    assert not out.exists()


def write_chestmnist(folder):
    """A small file in the true format: 14 labels, most of them rarely set."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, size in {"train": 200, "val": 4, "test": 60}.items():
        labels = (rng.random((size, 14)) < 0.2).astype(np.uint8)
        arrays[f"{part}_images"] = rng.integers(0, 256, (size, 28, 28)).astype(np.uint8)
        arrays[f"{part}_labels"] = labels
    (folder / "medmnist").mkdir()
    np.savez_compressed(folder / "medmnist" / "chestmnist.npz", **arrays)


@pytest.mark.filterwarnings("ignore:.*not the official chestmnist file")
def test_chestmnist_from_file_to_tables(tmp_path):
    write_chestmnist(tmp_path)
    words = ("--preset", "chest", "--data-dir", str(tmp_path), "--rounds", "2")
    few = ("--attacks", "label_flip", "--attackers", "0.25", "--defenses", "krum")
    few = (*few, "sanitization", "--poisons", "--poison", "1", "--batch-size", "10")
    config = parse([*words, *few, "--model", "mlp", "--out", str(tmp_path / "run")])
    result = play(config)
    history = result.histories["label_flip(1) by 25% sanitization"]
    assert history.class_recall.shape == (2, 14)
    assert np.isfinite(history.attack_success).all()
    assert np.isfinite(history.auc).all()
    # Where hardly anybody has a label, denying all of them is right on most.
    assert history.accuracy[-1] > 0.6 > history.balanced_accuracy[-1]
    assert history.defense["poisoned"].sum() > 0
    text = (config.out / "summary.md").read_text()
    assert "0.874 / 0.043" in text  # the paper's own figure


@pytest.mark.filterwarnings("ignore:.*not the official chestmnist file")
def test_chestmnist_suits_resnet18(tmp_path):
    write_chestmnist(tmp_path)
    words = ["--preset", "chest", "--data-dir", str(tmp_path), "--batch-size", "10"]
    few = ["--attacks", "label_flip", "--attackers", "0.25", "--defenses"]
    (phase,), source = sanitization.make_phases(parse([*words, *few, "sanitization"]))
    assert "not the official" in source
    assert {sim.num_classes for sim in phase.systems.values()} == {14}


def test_a_client_defense_and_a_rule_are_one_spec():
    config = parse([*TINY, "--defenses", "sanitization+median"])
    (phase,), _ = sanitization.make_phases(config)
    sim = phase.systems["label_flip(0.3) by 25% sanitization+median"]
    assert sim.aggregator.name == "median"
    assert sim.client_defense.name == "sanitization"


def test_defense_time_measures_every_defense(finished):
    config, _ = finished
    (phase,), _ = sanitization.make_phases(config)
    cost = defense_time.measure(phase.systems["none sanitization"], rounds=2)
    assert cost.round > 0 <= cost.first
    # 8 of 10 clients, of which 8 have 18 batches of 8 samples and 2 have 19.
    assert cost.batches == round(8 * (8 * 18 + 2 * 19) / 10)
    assert isinstance(phase, runner.Phase)
    assert fs.client_defenses.CLIENT_DEFENSES.keys() == {"fedsecure", "sanitization"}
