"""The matrix of aggregators and attacks: cells, resume, reports, bad input."""

import csv
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

import fedjax_sim as fs
from experiments import attack_matrix, matrix_report, specs

ROOT = Path(__file__).parents[1]
TINY = {
    "model": "mlp",
    "rounds": 4,
    "eval_every": 2,
    "aggregators": ("fedavg", "median", "multi_krum"),
    "attacks": (
        "none",
        "ipm(epsilon=[0.1, 8])",
        "badnets(target=0, size=2)+model_replacement",
    ),
}


def config(out, **options):
    return dataclasses.replace(
        attack_matrix.Config(), **{**TINY, "out": out, **options}
    )


def run(out, **options):
    """What the terminal showed."""
    path = out.parent / f"{out.name}.txt"
    with path.open("w") as file:
        console = Console(file=file, width=200)
        attack_matrix.run(config(out, **options), console)
    return path.read_text()


def rows(out):
    with (out / "matrix.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished matrix that tests may read and must not change."""
    out = tmp_path_factory.mktemp("matrices") / "whole"
    return out, run(out)


def test_files(finished):
    out, text = finished
    names = {path.name for path in out.iterdir()}
    assert names == {
        "cells",
        "heatmap.pdf",
        "heatmap.png",
        "heatmap-success.pdf",
        "heatmap-success.png",
        "matrix.csv",
        "matrix.json",
        "summary.json",
        "summary.md",
    }
    assert len(list((out / "cells").iterdir())) == 9
    assert "9/9" in text
    assert "Worst case: iid, 20% attackers" in text
    summary = (out / "summary.md").read_text()
    assert "python -m experiments.attack_matrix --preset demo" in summary
    assert "![test accuracy: iid, 20% attackers](heatmap.png)" in summary


def test_rows(finished):
    out, _ = finished
    found = rows(out)
    # Three rules; two seeds; one strength, two strengths, one.
    assert len(found) == 3 * 2 * (1 + 2 + 1)
    assert {row["strength"] for row in found} == {"", "0.1", "8.0"}
    for row in found:
        assert 0 <= float(row["accuracy"]) <= 1
        targeted = row["attack"].startswith("badnets")
        assert (row["attack_success"] != "") == targeted
        assert (row["tpr"] != "") == (row["attack"] != "none")
    strong = [
        r for r in found if r["strength"] == "8.0" and r["aggregator"] == "fedavg"
    ]
    weak = [r for r in found if r["strength"] == "0.1" and r["aggregator"] == "fedavg"]
    assert all(float(s["loss"]) > float(w["loss"]) for s, w in zip(strong, weak))


def test_a_cell_is_the_simulation_it_says(finished):
    """Strength 8, second seed, of FedAvg under IPM, once more by itself."""
    out, _ = finished
    (row,) = [
        r
        for r in rows(out)
        if (r["aggregator"], r["strength"], r["seed"]) == ("fedavg", "8.0", "1")
    ]
    here = config(out)
    (setting,), _ = attack_matrix.load_settings(here)
    sim = fs.Simulation(
        aggregator=fs.aggregators.fedavg(),
        attack=fs.attacks.ipm(8.0),
        num_byzantine=4,
        **setting.shared,
    )
    _, history = sim.run(jax.random.key(1), num_rounds=4, eval_every=2)
    alone = matrix_report.measure(history)
    for name in ("accuracy", "final_accuracy", "loss", "tpr", "fpr"):
        value = "" if alone[name] is None else alone[name]
        assert row[name] == "" or float(row[name]) == pytest.approx(value, rel=1e-3)
        assert (row[name] == "") == (value == "")


def test_finished_cells_are_not_run_again(finished, monkeypatch):
    out, _ = finished
    before = {p.name: p.stat().st_mtime_ns for p in (out / "cells").iterdir()}

    def never(*args, **options):
        raise AssertionError("a finished cell was played again")

    monkeypatch.setattr(attack_matrix, "play", never)
    summary = (out / "summary.json").read_bytes()
    text = run(out)
    assert "9 of 9 cells done before" in text
    assert before == {p.name: p.stat().st_mtime_ns for p in (out / "cells").iterdir()}
    assert (out / "summary.json").read_bytes() == summary


def test_more_rules_add_cells(tmp_path):
    small = {"attacks": ("none",), "num_seeds": 1}
    run(tmp_path / "m", aggregators=("fedavg",), **small)
    text = run(tmp_path / "m", aggregators=("fedavg", "median"), **small)
    assert "1 of 2 cells done before" in text
    assert {row["aggregator"] for row in rows(tmp_path / "m")} == {"fedavg", "median"}
    other = run(tmp_path / "m", aggregators=("fedavg",), lr=0.05, **small)
    assert "0 of 1 cells done before" in other


COMMAND = [
    *(sys.executable, "-m", "experiments.attack_matrix"),
    *("--model", "mlp", "--rounds", "6", "--eval-every", "2", "--num-seeds", "1"),
    *("--side-by-side", "1", "--segment", "2"),
    *("--aggregators", "fedavg", "median", "--attacks", "none"),
]


def test_killed_in_the_middle_it_resumes(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    environment["FEDJAX_SIM_CACHE"] = str(tmp_path / "cache")
    # What is killed may leave half a program there.
    environment["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path / "compiled")
    out = tmp_path / "killed"
    command = [*COMMAND, "--out", str(out)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    deadline = time.monotonic() + 300
    while not list(out.glob("cells/*.json")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {p: p.stat().st_mtime_ns for p in (out / "cells").glob("*.json")}
    assert len(kept) == 1
    again = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert "1 of 2 cells done before" in again.stdout
    assert all(p.stat().st_mtime_ns == t for p, t in kept.items())
    assert not list(out.glob("checkpoints/*"))
    whole = tmp_path / "whole"
    subprocess.run(
        [*COMMAND, "--out", str(whole)], cwd=ROOT, env=environment, check=True
    )
    assert rows(out) == rows(whole)


def test_what_cannot_be_is_said_and_shown_as_a_dash(tmp_path):
    text = run(
        tmp_path / "m",
        aggregators=("fedavg", "bulyan"),
        attacks=("sign_flip",),
        attackers=(0.2, 0.3),
        num_seeds=1,
    )
    assert "not possible in 1 cells: bulyan needs" in text
    summary = (tmp_path / "m" / "summary.md").read_text()
    assert "| bulyan | - | - | - | - |" in summary
    assert "## Not possible" in summary
    _, _, overview = summary.partition("## Worst case in every setting")
    header, _, first, second = overview.strip().splitlines()[:4]
    assert header == "| aggregator | iid, 20% attackers | iid, 30% attackers |"
    # The rule that cannot be in one of them comes last.
    assert re.fullmatch(
        r"\| fedavg \| 0\.\d{3} sign_flip \| 0\.\d{3} sign_flip \|", first
    )
    assert re.fullmatch(r"\| bulyan \| 0\.\d{3} sign_flip \| - \|", second)
    assert len(rows(tmp_path / "m")) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aggregators": ()}, "--aggregators needs at least one"),
        ({"attacks": ("none", "none")}, "--attacks repeats a value"),
        ({"attackers": (1.0,)}, r"--attackers must be in \(0, 1\)"),
        ({"attackers": (0.01,)}, "at least one attacker"),
        ({"steps": 3}, "exactly one of --epochs and --steps"),
        ({"epochs": None}, "exactly one of --epochs and --steps"),
        ({"lr": float("nan")}, "--lr must be a positive number"),
        ({"side_by_side": 0}, "--side-by-side must be >= 1"),
        ({"rounds": 0}, "--rounds must be at least 1"),
        ({"cohort": 21}, "--cohort must be from 1 to"),
        ({"partitions": ("idd",)}, "Did you mean 'iid'"),
        ({"aggregators": ("bulyan(max_byzantine=9)",)}, "can run in no cell"),
        ({"attacks": ("badnets(target=10)",)}, "target"),
        ({"attacks": ("badnets(target=0, size=9)",)}, "size|image"),
        ({"attack_stop": 0}, "stop"),
        ({"attack_start": 4}, "would never be active in rounds 0 to 3"),
        ({"attacks": ("ipm(epsilon=[1, 1])",)}, "list of different numbers"),
        ({"root_size": 0, "aggregators": ("fltrust",)}, "root"),
    ],
)
def test_bad_options_before_any_training(tmp_path, options, message, monkeypatch):
    monkeypatch.setattr(attack_matrix, "play", None)
    with pytest.raises((ValueError, TypeError), match=message):
        run(tmp_path / "m", **options)
    assert not (tmp_path / "m" / "cells").exists()


def test_damaged_cell(tmp_path):
    options = {"aggregators": ("fedavg",), "attacks": ("none",), "num_seeds": 1}
    run(tmp_path / "m", **options)
    (cell,) = (tmp_path / "m" / "cells").iterdir()
    content = json.loads(cell.read_text())
    (first, *_) = content["results"]
    short = {**content, "results": [{"seed": 0}], "versions": {}}
    of_others = {name: first[name] for name in first if name != "lowest_recall"}
    old = {**content, "results": [of_others]}
    word = {**content, "results": [{**first, "accuracy": "x"}]}
    others = ({**content, "key": "0"}, short, old, word)
    for text in ("{", "[]", *map(json.dumps, others)):
        cell.write_text(text)
        with pytest.raises(ValueError, match=r"is damaged .*Delete it"):
            run(tmp_path / "m", **options)


def test_versions_of_all_cells_are_named(tmp_path):
    options = {"aggregators": ("fedavg",), "attacks": ("none",), "num_seeds": 1}
    run(tmp_path / "m", **options)
    (cell,) = (tmp_path / "m" / "cells").iterdir()
    content = json.loads(cell.read_text())
    content["versions"]["jax"] = "0.1"
    cell.write_text(json.dumps(content))
    run(tmp_path / "m", **{**options, "aggregators": ("fedavg", "median")})
    summary = (tmp_path / "m" / "summary.md").read_text()
    assert f"jax 0.1 and {jax.__version__}" in summary
    assert "heatmap-success" not in summary


def test_the_examples_of_the_help_can_be_run():
    help_text = " ".join(f"{attack_matrix.__doc__} {specs.__doc__}".split())
    quoted = re.findall(r"(?<=\s)'([^']+)'", attack_matrix.__doc__)
    assert "trimmed_mean(trim=0.1)" in quoted
    for text in (*quoted, "nnm+median", "dual_system:soft"):
        assert text in help_text
        name = text.split("(")[0].split(":")[0].split("+")[-1]
        if name in fs.aggregators.REGISTRY:
            specs.make_aggregator(text, 2)
        else:
            specs.make_attack(text, 10)


def test_folder_of_something_else(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="is not empty and holds no matrix"):
        run(tmp_path / "m")


def test_headline_is_where_the_attacker_does_best():
    runs = [
        {"strength": s, "seed": i, "accuracy": a, "attack_success": None}
        for s, values in {1.0: (0.9, 0.7), 2.0: (0.5, 0.6), 3.0: (0.1, 1.0)}.items()
        for i, a in enumerate(values)
    ]
    mean, spread, strength = matrix_report.headline({"results": runs})
    assert (mean, strength) == (pytest.approx(0.55), 2.0)
    assert spread == pytest.approx(np.std([0.5, 0.6], ddof=1))
    assert matrix_report.headline({"results": runs}, highest=True)[2] == 1.0
    assert np.isnan(matrix_report.headline({"results": runs}, "attack_success")[0])
    assert np.isnan(matrix_report.headline(None)[0])


def test_labels_leave_out_options_where_they_can():
    assert matrix_report.labels(["krum", "a(x=1)+b", "ipm(e=1)", "ipm(e=[2])"]) == {
        "krum": "krum",
        "a(x=1)+b": "a+b",
        "ipm(e=1)": "ipm(e=1)",
        "ipm(e=[2])": "ipm(e=[2])",
    }


def test_presets_name_what_there_is():
    for preset in attack_matrix.PRESETS.values():
        attack_matrix.check(preset)
        for text in preset.aggregators:
            attack_matrix.specs.make_aggregator(text, 2)
        for text in preset.attacks:
            attack_matrix.specs.make_attack(text, 10)
        for text in preset.partitions:
            attack_matrix.specs.make_partition(text)
