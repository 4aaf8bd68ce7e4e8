"""The FedSecure study: from the command line to tables and plots."""

import ast
import csv
import dataclasses
import datetime
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from rich.console import Console

import fedjax_sim as fs
from experiments import (
    fedsecure_detector,
    fedsecure_plots,
    fedsecure_report,
    fedsecure_vitals,
    rundir,
    specs,
)
from experiments.fedsecure_vitals import PRESETS, Cell, Config, cells, parse
from experiments.results import config_key

ATTACKS = ("pattern_scaling(scale=6)", "repeated_pattern(target=0)")
TINY = (
    *("--preset", "demo", "--source", "generated(patients=4, minutes=200)"),
    *("--devices", "4", "--window", "8", "--rounds", "2", "--eval-every", "1"),
    *("--detector-hidden", "4", "--detector-epochs", "12", "--batch-size", "8"),
    *("--hidden", "4", "--root-size", "0", "--history", "0"),
    *("--attacks", *ATTACKS, "--defenses", "fedsecure", "--later-defenses"),
)


def play(config):
    with open(os.devnull, "w") as file:
        return fedsecure_vitals.run(config, Console(file=file))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "tiny"
    config = parse([*TINY, "--out", str(out)])
    return config, play(config)


def by_cell(finished):
    config, result = finished
    return {cell: result.histories[cell.name] for cell in cells(config)}


def test_a_run_writes_its_tables_plots_and_records(finished):
    config, result = finished
    text = (config.out / "summary.md").read_text()
    for title in ("Devices", "Runs: same", "Defenses: same", "Screening: same"):
        assert f"## {title}" in text
    assert "the paper's table I" in text
    assert "later" not in text.split("## Devices")[1]
    assert "Data: generated: 4 patients, 200 minutes, seed 0" in text
    assert "a sample every 60 s" in text
    assert "Poisoned: 2 (generated_001). Every record could be used." in text
    assert "Mean of the last 2 evaluations." in text
    assert "python -m experiments.fedsecure_vitals --preset demo" in text
    for name in ("reference_model", "classifier", "runs", "scores", "strengths"):
        png = (config.out / f"same_{name}.png").read_bytes()
        assert png.startswith(b"\x89PNG")
    found = json.loads((config.out / "summary.json").read_text())["systems"]
    assert list(found) == [cell.name for cell in cells(config)]
    records = np.load(config.out / "clients.npz")
    name = f"same {ATTACKS[0]} fedsecure"
    assert records[f"{name}/defense_excluded"].shape == (2, 4)
    assert records[f"{name}/local_own_loss"].shape == (2, 4)
    history = result.histories[name]
    assert history.byzantine.tolist() == [[False, True, False, False]] * 2
    assert not result.histories[f"same {ATTACKS[0]} fedavg"].defense


def test_only_a_target_has_a_success(finished):
    found = by_cell(finished)
    plain = found[Cell("same", ATTACKS[0], "fedavg")]
    backdoor = found[Cell("same", ATTACKS[1], "fedavg")]
    assert np.isnan(plain.attack_success).all()
    assert np.isfinite(backdoor.attack_success).all()


def test_what_is_saved_is_what_excluded_devices_would_have_sent(finished):
    config, result = finished
    federation = devices_of(config)
    size = fedsecure_report._bytes(config, federation)
    params = result.histories and fs.checkpoint.load_model(
        config.out, cells(config)[0].name
    )
    assert size == 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
    table = fedsecure_report.run_table(config, by_cell(finished), "same", size)
    for row in table.rows:
        if not row[0].startswith("Run 6"):
            assert row[-3:] == ("", "", "")
            continue
        attack = row[0].removeprefix("Run 6, FedSecure: ")
        attack = specs.NO_ATTACK if attack == "no poisoning" else attack
        history = by_cell(finished)[Cell("same", attack, "fedsecure")]
        gone = 0
        for r, i in np.ndindex(2, 4):
            if history.defense["excluded"][r, i]:
                gone += 1
                assert history.weights[r, i] == 0
                assert history.defense["samples"][r, i] == 0
        assert row[-1] == f"{size * gone / 1e3:.1f} kB ({100 * gone / 8:.0f} %)"


def devices_of(config, part="same"):
    return fedsecure_vitals.federate(config, fedsecure_vitals.load(config))[part]


def test_the_report_screens_as_the_run_did(finished):
    config, _ = finished
    devices, samples = devices_of(config), fs.data.windows(config.window)
    with open(os.devnull, "w") as file:
        kept = fedsecure_detector.load_or_train(
            config, "same", devices, samples, Console(file=file)
        )
    screened = fedsecure_report.screen_all(config, devices, kept, samples)
    for attack, found in screened.items():
        history = by_cell(finished)[Cell("same", attack, "fedsecure")]
        shares = history.defense["flagged_share"][0]
        poisoned = history.byzantine[0]
        np.testing.assert_allclose(found.flagged[poisoned], shares[poisoned], atol=1e-6)
        clean = screened[specs.NO_ATTACK].flagged
        np.testing.assert_allclose(clean[~poisoned], shares[~poisoned], atol=1e-6)
    assert screened[ATTACKS[0]].flagged.min() > 0.5


def test_a_run_resumes_with_the_detector_it_trained(finished, tmp_path):
    config, result = finished
    longer = dataclasses.replace(config, rounds=3, resume=True)
    before = (config.out / "detector-same.npz").stat().st_mtime_ns
    extended = play(longer)
    assert (config.out / "detector-same.npz").stat().st_mtime_ns == before
    name = f"same {ATTACKS[0]} fedsecure"
    assert extended.histories[name].round.tolist() == [1, 2, 3]
    np.testing.assert_array_equal(
        extended.histories[name].loss[:2], result.histories[name].loss
    )


def test_a_damaged_detector_is_trained_again(finished, tmp_path):
    config, _ = finished
    config = dataclasses.replace(config, out=tmp_path)
    devices, samples = devices_of(config), fs.data.windows(config.window)
    console = Console(file=open(os.devnull, "w"))  # noqa: SIM115
    (tmp_path / "detector-same.npz").write_bytes(b"no archive")
    first = fedsecure_detector.load_or_train(config, "same", devices, samples, console)
    again = fedsecure_detector.load_or_train(config, "same", devices, samples, console)
    console.file.close()
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    blank, key = fedsecure_detector.untrained(config, devices), config_key(config)
    path = tmp_path / "detector-same.npz"
    assert fedsecure_detector._load(path, blank, key) is not None
    assert fedsecure_detector._load(path, blank, "other") is None
    wider = dataclasses.replace(config, detector_hidden=5)
    wide = fedsecure_detector.untrained(wider, devices)
    assert fedsecure_detector._load(path, wide, key) is None
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert fedsecure_detector._load(path, blank, key) is None
    for a, b in zip(jax.tree.leaves(first.detector), jax.tree.leaves(blank.detector)):
        assert a.shape == b.shape


def test_auc_and_confusion_are_those_of_loops():
    rng = np.random.default_rng(0)
    labels = rng.random(60) < 0.3
    scores = np.round(rng.random(60) * 0.7 + 0.3 * labels, 1)  # with ties
    wins = [(a > b) + (a == b) / 2 for a in scores[labels] for b in scores[~labels]]
    assert fedsecure_plots.auc(scores, labels) == pytest.approx(np.mean(wins))
    counts = fedsecure_plots.confusion(scores, labels)
    said = [(bool(t), bool(s > 0.5)) for s, t in zip(scores, labels)]
    for truth in (False, True):
        for verdict in (False, True):
            assert counts[int(truth), int(verdict)] == said.count((truth, verdict))
    assert np.isnan(fedsecure_plots.auc(scores, np.ones(60, bool)))


def test_every_system_of_a_preset_has_a_name_of_its_own():
    for preset in PRESETS.values():
        fedsecure_vitals.check(preset)
        found = [cell.name for cell in cells(preset)]
        assert len(set(found)) == len(found)
    paper = cells(Config())
    assert Cell("later", "gradual_pattern", "fedsecure+dual_system") in paper
    assert Cell("later", "gradual_pattern", "fltrust") not in paper
    alone = dataclasses.replace(Config(), history=0.0)
    assert {cell.part for cell in cells(alone)} == {"same"}


def test_the_names_of_the_paper_s_runs():
    name = fedsecure_report.run_name
    assert name("none", "fedavg") == "Run 1, no poisoning"
    assert name("pattern_scaling( scale=2 )", "fedavg") == "Run 3, data poisoning 2"
    # At other strengths, and with a target, they are not the paper's.
    for attack in ("pattern_scaling", "repeated_pattern(target=0)", "mine.noise"):
        assert name(attack, "fedavg") == attack
    assert name("gradual_pattern", "fedsecure") == "Run 6, FedSecure: gradual_pattern"
    assert name("none", "fedsecure+median") == "fedsecure+median: no poisoning"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--attacks", "none"], "always there"),
        (["--attacks", "variability(sd=2)", "variability( sd=2 )"], "has one twice"),
        (["--defenses", "fedsecure", "fedsecure()"], "--defenses has one twice"),
        (["--channels", "spo2", "spo2"], "--channels has one twice: spo2 and spo2"),
        (["--attacks"], "--attacks needs one value or more; got none"),
        (["--attacks", "gradual_pattern(start=200)"], "at least 201 steps"),
        (
            ["--attacks", "gradual_pattern(start=61)"],
            "local_test, what clients hold out .* at least 62 steps .* got 60",
        ),
        (["--attacks", "variability(num_channels=5)"], "num_channels follows from"),
        (["--defenses", "fedsecure(detector=3)"], "detector is trained by the study"),
        (["--defenses", "fltrust"], "needs a root dataset.* Raise --root-size.$"),
        (["--source", "generated(data_dir='x')"], "Give --data-dir"),
        (["--attacks", "variabilty"], "Did you mean 'variability'"),
        (["--attacks", "variability(strength=2)"], "Its options"),
        (["--attacks", "repeated_pattern(target=3)"], "a class from 0 to 2"),
        (["--attacks", "label_flip"], "attack on series"),
        (["--defenses", "fedsecur"], "Did you mean 'fedsecure'"),
        (["--defenses", "fedsecure(max_flagged=1)"], "max_flagged"),
        (["--poisoned", "9"], "from 1 to 4; got 9. Records left out have none: 0"),
        (["--attacks", "variability(size=2)"], r"^--attacks variability\(size=2\): "),
        (["--source", "generated(patients=1)", "--devices", "1"], "two devices at le"),
        (["--poisoned", "1", "1"], "twice"),
        (["--poisoned", "1", "2", "3", "4"], "names all 4 devices: leave at least one"),
        (["--defenses", "sanitization(num_clusters=2)"], "leaves out samples, and not"),
        (["--poisoned", "--attackers", "0.01"], "at least one poisoned"),
        (["--poisoned", "--attackers", "1.5"], "--attackers"),
        (["--train", "1"], "--train"),
        (["--history", "1"], "--history"),
        (["--lr", "0"], "--lr"),
        (["--max-flagged", "1"], "--max-flagged"),
        (["--window", "0"], "--window"),
        (["--window", "500"], "no window of 500 samples .* in its training stretch"),
        (["--devices", "3"], "--devices: the number of devices must be from"),
        (["--source", "generated+bidmc"], "takes one source"),
        (["--source", "generate"], "Did you mean 'generated'"),
        (["--source", "generated(people=3)"], "people"),
        (["--source", "csv"], "path"),
        (["--channels", "pulse_rate"], "pulse"),
        (["--root-size", "-1"], "must not be negative"),
        (["--root-size", "100000"], "^--root-size 100000, but .* Lower --root-size.$"),
        (["--history", "0.5", "--later-defenses", "krum"], "--later-defenses"),
        (
            ["--batch-size", "300"],
            "^--batch-size 300 is larger .* Lower --batch-size to",
        ),
        (["--batch-size", "500"], "on, with --batch-size 500. Lower --batch-size, sho"),
        (["--seed", "-1"], "--seed"),
    ],
)
def test_bad_options_are_refused_before_any_training(options, message, tmp_path):
    config = parse([*TINY, *options, "--out", str(tmp_path / "out")])
    with pytest.raises(ValueError, match=message):
        play(config)
    assert not (tmp_path / "out").exists()


def test_every_way_out_is_one_that_the_library_names():
    """A message that is worded anew needs its flag anew."""
    said = [
        node.value
        for path in Path(fs.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    for name in fedsecure_vitals.FLAGS:
        assert any(name in text for text in said), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"learning_rate": 1e30},
            r"learning_rate=1e\+30\. Give it other or longer ser",
        ),
        ({"classifier_epochs": 1}, "Give more of the series, or raise --detector-epo"),
        ({"windows": np.ones((60, 4, 1))}, "of the series, or raise --detector-epochs"),
        (
            {"batch_size": 49},
            r"Lower --batch-size, shorten the windows \(--window\) or",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_detector_that_failed_names_flags(options, message):
    windows = np.random.default_rng(0).normal(size=(60, 4, 1)).astype(np.float32)
    windows[::20] *= 5
    given = {"windows": windows, "batch_size": 8, "hidden": 2, "epochs": 1, **options}
    with pytest.raises(ValueError, match=message), fedsecure_vitals.in_flags():
        fs.client_defenses.train_detector(
            jax.random.key(0), device=np.zeros(60, int), **given
        )


def patients(*lengths, flat=()):
    """Wandering heart rates; the first third of those that are ``flat`` does not."""
    rng, records = np.random.default_rng(0), []
    for i, steps in enumerate(lengths):
        values = 80 + rng.normal(size=(steps, 2)).cumsum(axis=0)
        if i in flat:
            values[: steps // 3] = 80
        start = datetime.datetime(2101, 1, 1)
        records.append(fs.data.Record(f"r{i}", f"p{i}", start, np.float32(values)))
    channels = ("heart_rate", "respiration_rate")
    return fs.data.Vitals("hand", tuple(records), channels, 60.0, "test", "none")


def test_a_device_is_in_all_parts_or_in_none(tmp_path):
    """Of record r1 the history is flat, and the whole training stretch is not."""
    config = dataclasses.replace(parse([*TINY]), history=0.4, poisoned=(2,))
    vitals = patients(200, 200, 200, 200, flat=[1])
    ways_out = "Ask for other --channels, or leave the record out with --skip-unusable"
    with pytest.raises(ValueError, match=rf"r1 is flat: .* {ways_out}"):
        fedsecure_vitals.federate(config, vitals)
    config = dataclasses.replace(config, skip_unusable=True)
    found = fedsecure_vitals.federate(config, vitals)
    assert list(found) == ["same", "later"]
    for devices in found.values():
        assert [device.name for device in devices.devices] == ["r0", "r2", "r3"]
        assert list(devices.left_out) == ["r1"]
        note = fedsecure_report.who(config, devices)
        assert note.startswith(
            "Poisoned: 2 (r2). Left out (1): heart_rate of r1 is flat"
        )
    fedsecure_report.write_devices(tmp_path / "devices.csv", found)
    with (tmp_path / "devices.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["part"], r["device"], r["name"], r["patient"]) for r in rows[:4]] == [
        *(("same", str(i + 1), f"r{n}", f"p{n}") for i, n in enumerate((0, 2, 3))),
        ("same", "", "r1", ""),
    ]
    assert "flat" in rows[3]["left_out"]
    assert {row["part"] for row in rows[4:]} == {"later"}
    for row, device in zip(rows, found["same"].devices):
        assert int(row["windows"]) == device.windows
        assert float(row["sd_respiration_rate"]) == device.sd[1]
    bare = vitals._replace(
        records=tuple(r._replace(start=None) for r in vitals.records)
    )
    with pytest.raises(
        ValueError, match=r"no hour, day and weekday. Add --no-calendar"
    ):
        fedsecure_vitals.federate(config, bare)
    alone = dataclasses.replace(config, history=0.0)
    assert len(fedsecure_vitals.federate(alone, vitals)["same"].devices) == 4
    with pytest.raises(ValueError, match=r"none of the 2 records .* r0 is .*; .* r1"):
        fedsecure_vitals.federate(config, patients(200, 200, flat=[0, 1]))
    with pytest.raises(ValueError, match="from 1 to 3; got 4"):
        fedsecure_vitals.federate(dataclasses.replace(config, poisoned=(4,)), vitals)


def test_an_attack_that_reaches_nobody():
    """Device 2 trains on 70 steps, and device 1 on 140."""
    late = "gradual_pattern(start=80, ramp=10)"
    backdoor = "repeated_pattern(target=0, offset=69, period=99, length=8)"
    config = dataclasses.replace(
        parse([*TINY]), devices=2, poisoned=(1,), attacks=(late, backdoor)
    )
    found = fedsecure_vitals.federate(config, patients(200, 100))
    make = fs.data.windows(config.window)
    remark = fedsecure_vitals.check_reach(config, found, make)
    assert f"{late} (same) would leave 1 of 2 devices as they are" in remark
    assert f"{backdoor} (same) would leave 1 of 2" in remark
    early = dataclasses.replace(config, attacks=("variability", "repeated_pattern"))
    assert not fedsecure_vitals.check_reach(early, found, make)
    for attack in (late, backdoor):
        other = dataclasses.replace(config, poisoned=(2,), attacks=(attack,))
        with pytest.raises(ValueError, match="none of the 62 windows of device 2"):
            fedsecure_vitals.check_reach(other, found, make)
        # Of those that are drawn it is enough that it reaches some.
        drawn = dataclasses.replace(other, poisoned=())
        assert fedsecure_vitals.check_reach(drawn, found, make)


def test_what_failed_is_not_in_the_way(tmp_path, monkeypatch):
    config = parse([*TINY, "--out", str(tmp_path / "out")])
    config = dataclasses.replace(config, attacks=ATTACKS[:1])

    def failed(*args, **options):
        raise ValueError("the reference model diverged")

    with monkeypatch.context() as patch:
        patch.setattr(fs.client_defenses, "train_detector", failed)
        with pytest.raises(ValueError, match="diverged"):
            play(config)
    assert list(config.out.iterdir()) == []
    rundir.check_out(config)


def test_strengths_keep_the_other_options(monkeypatch):
    config = dataclasses.replace(
        parse([*TINY]),
        attacks=(
            *("variability(amplitude=1, fraction=0.5)", "gradual_pattern(ramp=5)"),
            *("repeated_pattern(target=0, period=30, length=4)", "gradual_pattern"),
            *("repeated_pattern(period=30, length=4)", "repeated_pattern"),
            "repeated_pattern(pattern=[[1, 1]])",
        ),
    )
    asked = []

    def screened(config, devices, trained, make_samples, attack):
        return SimpleNamespace(flagged=np.full(4, len(asked) / 100))

    monkeypatch.setattr(fedsecure_report, "screen_devices", screened)
    monkeypatch.setattr(specs, "make_series_attack", lambda *a: asked.append(a[0]))
    clean = np.zeros(4)
    found = fedsecure_report.strengths(config, devices_of(config), None, None, clean)
    assert list(found) == [
        "variability(fraction=0.5): amplitude",
        "gradual_pattern(ramp=5): amplitude",
        "repeated_pattern(period=30, length=4): height",
        "gradual_pattern: amplitude",
        "repeated_pattern: height",
    ]
    assert asked[0] == "variability(fraction=0.5, amplitude=0.25)"
    four = [[2.0, 2.0]] * 4
    assert asked[11] == f"repeated_pattern(period=30, pattern={four})"
    assert asked[-1] == f"repeated_pattern(pattern={[[6.0, 6.0]] * 10})"
    strengths, shares = found["gradual_pattern(ramp=5): amplitude"]
    assert strengths == [0.0, 0.5, 1, 2, 4, 8]
    np.testing.assert_allclose(shares[:, 0], [0.0, 0.06, 0.07, 0.08, 0.09, 0.1])


def test_rounds_without_anybody_are_named(finished):
    config, _ = finished
    found = by_cell(finished)
    cell = Cell("same", ATTACKS[0], "fedsecure")
    for idle, mark in (
        ([True, True], " (idle 100 %)"),
        ([False, True], " (idle 50 %)"),
    ):
        history = found[cell]._replace(no_aggregate=np.array(idle))
        changed = {**found, cell: history}
        table = fedsecure_report.defense_table(config, changed, "same")
        marked = [cell for row in table.rows for cell in row if "idle" in cell]
        assert [text[5:] for text in marked] == [mark]
        runs = fedsecure_report.run_table(config, changed, "same", 9)
        assert [row[0] for row in runs.rows if "idle" in row[1]] == [
            f"Run 6, FedSecure: {ATTACKS[0]}"
        ]


def test_several_seeds_are_averaged(finished):
    config, _ = finished
    found = by_cell(finished)
    cell = Cell("same", ATTACKS[0], "fedsecure")
    one = found[cell]
    nobody = {**one.defense, "excluded": np.zeros((2, 4), bool)}
    some = {**nobody, "excluded": np.array([[False, True, True, False]] * 2)}
    seeds = [one._replace(defense=nobody), one._replace(defense=some)]
    both = jax.tree.map(lambda *x: np.stack(x), *seeds)
    history = {**found, cell: both}
    table = fedsecure_report.run_table(config, history, "same", 1000)
    (row,) = [row for row in table.rows if row[0].endswith(f"FedSecure: {ATTACKS[0]}")]
    assert row[-3:] == ("50 ± 71 %", "17 ± 24 %", "2.0 ± 2.8 kB (25 ± 35 %)")


def test_defenses_of_other_limits_have_a_row(finished):
    config, _ = finished
    history = next(h for h in by_cell(finished).values() if h.defense)
    names = ("fedsecure", "fedsecure(max_flagged=0)", "fedsecure+median")
    cells_of = {Cell("same", "none", name): history for name in names}
    assert fedsecure_report.limits(config, cells_of) == [0.1, 0]


def test_a_damaged_table_is_refused_before_any_training(tmp_path):
    path = tmp_path / "vitals.csv"
    path.write_text("patient,time,heart_rate\na,0,71\na,60,fast\n")
    source = f"csv(path={str(path)!r})"
    config = parse(
        [
            *TINY,
            "--source",
            source,
            "--channels",
            "heart_rate",
            "--out",
            str(tmp_path / "o"),
        ]
    )
    with pytest.raises(ValueError, match="fast"):
        play(config)


def test_other_studies_say_where_fedsecure_is():
    with pytest.raises(ValueError, match=r"python -m experiments\.fedsecure_vitals"):
        specs.make_defense("fedsecure+median", 1, {"num_clusters": 3})


def test_the_devices_of_the_real_records(data_dir):
    config = dataclasses.replace(Config(), data_dir=data_dir)
    devices = fedsecure_vitals.federate(config, fedsecure_vitals.load(config))
    names = [device.name for device in devices["same"].devices]
    assert names == [
        *(f"s00001-2896-10-10-00-31n {i}/3" for i in (1, 2, 3)),
        *(f"p000020-2183-04-28-17-47n {i}/2" for i in (1, 2)),
    ]
    assert {d.patient for d in devices["same"].devices} == {"s00001", "p000020"}
    assert [d.windows for d in devices["same"].devices] == [390, 391, 312, 400, 401]
    assert devices["later"].history.num_clients == 5


def test_the_many_patients(data_dir):
    config = dataclasses.replace(PRESETS["many"], data_dir=data_dir)
    found = fedsecure_vitals.federate(config, fedsecure_vitals.load(config))
    for part, devices in found.items():
        assert len(devices.devices) + len(devices.left_out) == 351, part
        assert len(devices.devices) > 300


def test_help_explains_every_option():
    command = [sys.executable, "-m", "experiments.fedsecure_vitals", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for field in dataclasses.fields(Config):
        flag = field.name.replace("_", "-")
        assert f"--{flag}" in text or f"--no-{flag}" in text
