"""The scaling study: what it measures, keeps and shows."""

import csv
import dataclasses
import json
import os

import jax
import pytest
from rich.console import Console

import fedjax_sim as fs
from experiments import client_scaling, results, scaling_point, scaling_report
from experiments.scaling_point import Found, Point, Work

MACHINE = {
    "flops": 1e11,
    "bytes": {"1000": 8e10, "1000000": 1e10},
    "devices": 2,
    "versions": {"device": "2 x cpu"},
}
TINY = {
    "series": ("clients", "rule"),
    "clients": (12, 20),
    "cohorts": (4,),
    "widths": (0,),
    "everyone": 9,
    "rules": ("median", "foolsgold"),
    "devices": (1,),
    "update_memory": 20_000,
    "rounds": 2,
    "repeats": 2,
}


def config(out, **options):
    return dataclasses.replace(
        client_scaling.Config(), **{**TINY, "out": out, **options}
    )


def found(**changes):
    usual = Found(
        params=650,
        round_seconds=0.02,
        fastest=0.01,
        slowest=0.03,
        compile_seconds=2.0,
        peak_bytes=110_000_000,
        told_bytes=100_000_000,
        parts={"data": 60_000_000, "work": 40_000_000},
        process_bytes=900_000_000,
        accuracy=0.9,
        work=Work(2e8, 1e6, 500.0, 5e5),
        versions={"jax": "1", "device": "1 x cpu"},
    )
    return usual._replace(**changes)


def run(out, monkeypatch, measure, here=MACHINE["versions"], **options):
    """Runs a study with this instead of measuring; what the terminal showed."""
    asked = []

    def apart(f, devices, *args):
        if f is scaling_point.machine:
            return MACHINE
        if f is results.versions:
            return here
        asked.append((devices, args[0]))
        return measure(*args)

    monkeypatch.setattr(client_scaling, "apart", apart)
    path = out.parent / "terminal.txt"
    with path.open("w") as file:
        client_scaling.run(config(out, **options), Console(file=file, width=150))
    return asked, path.read_text()


def rows(out):
    with (out / "points.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_point_is_measured(monkeypatch):
    told = {}
    memory = fs.Comparison.memory

    def spy(comparison, key, **options):
        told["total"] = memory(comparison, key, **options).total
        return memory(comparison, key, **options)

    monkeypatch.setattr(fs.Comparison, "memory", spy)
    (point, *_) = client_scaling.points(config(None, attackers=0.25), "clients")
    measured = scaling_point.measure(point, None)
    assert measured.params == 650
    assert 0 < measured.fastest <= measured.round_seconds <= measured.slowest
    assert measured.compile_seconds > 10 * measured.round_seconds
    assert measured.told_bytes == told["total"] == sum(measured.parts.values())
    assert 0 < measured.peak_bytes < measured.process_bytes
    # The accuracy is that of the simulation after the rounds of all runs.
    sim = scaling_point.simulate(point, fs.data.load("digits"))
    assert (sim.num_clients, sim.cohort_size, sim.num_byzantine) == (12, 4, 3)
    _, history = sim.run(jax.random.key(0), num_rounds=8, eval_every=8)
    assert measured.accuracy == pytest.approx(float(history.accuracy[-1]))


def test_least_work_by_hand():
    point = client_scaling.points(config(None, widths=(32,), rules=("krum",)), "rule")[
        0
    ]
    sim = scaling_point.simulate(point, fs.data.load("digits"))
    work = scaling_point.least_work(sim, batch_size=10)
    d, steps = 64 * 32 + 32 + 32 * 10 + 10, 9 * 2  # 9 clients, 20 samples of 10 a step
    dense = 10 * (4 * 64 * 32 + 6 * 32 * 10)
    assert work.flops == steps * dense + 2 * 9 * 9 * d
    assert work.train_bytes == steps * 24 * d
    assert work.rule_bytes == 4 * 9 * d


def test_the_bound_is_the_slower_of_operations_and_bytes():
    # 2e8 operations at 1e11 a second; 1e6 bytes of a small set, 5e5 of a large one.
    assert scaling_report.bound(Work(2e8, 1e6, 500.0, 5e5), MACHINE) == 2e-3
    slower = scaling_report.bound(Work(1e6, 8e7, 500.0, 5e6), MACHINE)
    assert slower == pytest.approx(8e7 / 8e10 + 5e6 / 1e10)


def test_rules_without_a_form_in_passes_are_measured_held_alone():
    rule = client_scaling.points(config(None, devices=(1, 2)), "rule")
    ways = {(p.aggregator, p.update_memory, p.devices) for p in rule}
    assert ways == {
        ("median", None, 1),
        ("median", None, 2),
        ("median", 20_000, 1),
        ("median", 20_000, 2),
        ("foolsgold", None, 1),
        ("foolsgold", None, 2),
    }
    assert all(p.clients == p.cohort == 9 for p in rule)


def test_what_is_measured_is_kept(tmp_path, monkeypatch):
    out = tmp_path / "scaling"
    asked, shown = run(out, monkeypatch, lambda point, data_dir: found())
    assert len(asked) == 2 + 3
    assert {devices for devices, _ in asked} == {1}
    assert "within 20 % of what was measured in 5 of the 5 points" in shown
    assert {p.suffix for p in out.iterdir()} == {"", ".csv", ".md", ".json", ".png"} | {
        ".pdf"
    }
    first = rows(out)[0]
    assert (first["clients"], first["aggregator"]) == ("12", "fltrust")
    assert float(first["rounds_per_second"]) == 50.0
    assert float(first["bound_seconds"]) == 2e-3
    assert first["told_data"] == "60000000"
    # A longer list adds points, and only those are measured.
    asked, _ = run(
        out, monkeypatch, lambda point, data_dir: found(), clients=(12, 20, 30)
    )
    # The other series have the last population, but rule has its own.
    assert [point.clients for _, point in asked] == [30]
    assert len(rows(out)) == 6


def test_what_does_not_fit_is_said_and_tried_again(tmp_path, monkeypatch):
    out = tmp_path / "scaling"

    def measure(point, data_dir):
        if point.clients == 20:
            raise MemoryError("this run would take 9 GB")
        return found()

    _, shown = run(out, monkeypatch, measure)
    assert "refused: this run would take 9 GB" in shown
    assert "does not fit" in (out / "summary.md").read_text()
    assert [row["refused"] for row in rows(out) if row["clients"] == "20"] == [
        "this run would take 9 GB"
    ]
    asked, _ = run(out, monkeypatch, lambda point, data_dir: found())
    assert [point.clients for _, point in asked] == [20]


def test_a_process_of_its_own():
    assert client_scaling.apart(jax.local_device_count, 2) == 2
    with pytest.raises(ValueError, match="invalid literal"):
        client_scaling.apart(int, 1, "many")
    with pytest.raises(MemoryError, match="ended without a word"):
        client_scaling.apart(os._exit, 1, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clients": (0, 10)}, "--clients must be at least 1; got 0"),
        ({"clients": ()}, "--clients must name one or more"),
        ({"cohorts": (4, 30)}, "a cohort cannot be larger"),
        ({"cohorts": (15, 4)}, "only 12 clients"),
        ({"batch_size": 21}, "--batch-size 21, but clients have --samples 20"),
        ({"dataset": "digit"}, "digit"),
        ({"devices": (1, 1)}, "--devices must name one or more, each once"),
        ({"lr": float("nan")}, "--lr must be a positive number"),
        ({"attackers": 0.5}, r"--attackers must be in \[0, 0.5\)"),
        ({"rules": ("kurm",)}, "Unknown aggregator"),
        ({"attack": "sign_filp"}, "Unknown attack"),
        ({"rules": ("krum",), "everyone": 3, "attackers": 0.4}, "krum"),
        ({"devices": (1, 3)}, "--devices 3, but there are 2"),
        ({"update_memory": 2599}, "at least one update, 2,600 bytes; got 2,599"),
    ],
)
def test_bad_options_before_anything_is_measured(
    options, message, tmp_path, monkeypatch
):
    def measure(point, data_dir):
        raise AssertionError

    with pytest.raises((ValueError, TypeError), match=f"(?i){message}"):
        run(tmp_path / "scaling", monkeypatch, measure, **options)


def test_damaged_files(tmp_path, monkeypatch):
    out = tmp_path / "scaling"
    run(out, monkeypatch, lambda point, data_dir: found(), series=("clients",))
    file = next((out / "points").iterdir())
    content = json.loads(file.read_text())
    del content["found"]["params"]
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"{file.name} is damaged"):
        run(out, monkeypatch, lambda point, data_dir: found(), series=("clients",))
    others = json.loads(next(p for p in file.parent.iterdir() if p != file).read_text())
    file.write_text(json.dumps(others))
    with pytest.raises(ValueError, match=r"is damaged .*it is of another point"):
        run(out, monkeypatch, lambda point, data_dir: found(), series=("clients",))
    content["found"]["params"] = 650
    for value in (0, "abc", None, float("nan"), -1):
        content["found"]["round_seconds"] = value
        file.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=f"{file.name} is damaged"):
            run(out, monkeypatch, lambda point, data_dir: found(), series=("clients",))
    file.unlink()
    (out / "machine.json").write_text("{}")
    with pytest.raises(ValueError, match=r"machine\.json is damaged"):
        run(out, monkeypatch, lambda point, data_dir: found(), series=("clients",))


def test_what_was_measured_before_stays_in_the_reports(tmp_path, monkeypatch):
    out = tmp_path / "scaling"
    run(out, monkeypatch, lambda point, data_dir: found(), series=("clients",))
    assert not (out / "rule.png").exists()
    run(out, monkeypatch, lambda point, data_dir: found(), series=("rule",))
    assert {row["clients"] for row in rows(out)} == {"12", "20", "9"}
    # Of other clients nothing is left to draw.
    run(out, monkeypatch, None, series=("rule",), clients=(30, 40), cohorts=(5,))
    assert {row["clients"] for row in rows(out)} == {"9"}
    assert not (out / "clients.png").exists()


def test_two_machines_do_not_mix(tmp_path, monkeypatch):
    out = tmp_path / "scaling"
    run(out, monkeypatch, lambda point, data_dir: found(), series=("clients",))
    here = {"device": "1 x H200"}
    message = "was measured with device 2 x cpu; here it would be device 1 x H200"
    with pytest.raises(ValueError, match=message):
        run(out, monkeypatch, None, here=here, series=("clients",))


def test_presets_can_be_run():
    for preset in client_scaling.PRESETS.values():
        client_scaling.check(preset)
        for point in client_scaling.all_points(preset):
            assert isinstance(point, Point)
    assert max(client_scaling.PRESETS["full"].clients) == 1_000_000
    assert max(client_scaling.PRESETS["demo"].clients) == 100_000
