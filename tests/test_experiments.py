"""Whole runs through the command line's code: files, resume, kill, bad input."""

import csv
import dataclasses
import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from rich.console import Console

from experiments import fltrust_mnist, fltrust_report, fltrust_scan, results, runner
from fedjax_sim import checkpoint

ROOT = Path(__file__).parents[1]
TINY = {
    "preset": "demo",
    "model": "mlp",
    "clients": 20,
    "cohort": 8,
    "epochs": 1,
    "rounds": 4,
    "eval_every": 2,
    "segment": 2,
    "aggregators": ("fedavg", "dual_system"),
}
FILES = (
    "config.json",
    "metrics.csv",
    "summary.json",
    "summary.md",
    "accuracy.png",
    "accuracy.pdf",
    "detection.png",
    "detection.pdf",
    "clients.npz",
    "checkpoints",
    "model",
)


def config(out, **options):
    preset = fltrust_mnist.PRESETS["demo"]
    return dataclasses.replace(preset, **{**TINY, "out": out, **options})


def run(out, **options):
    console = Console(file=open(os.devnull, "w"), width=200)  # noqa: SIM115
    with console.file:
        return fltrust_mnist.run(config(out, **options), console)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished tiny run that tests may read and must not change."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, run(out)


def metrics(out):
    with (out / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_run_writes_every_file(finished):
    out, _ = finished
    assert {p.name for p in out.iterdir()} == set(FILES)
    assert not list(out.rglob("*.tmp"))


def test_metrics_csv(finished):
    out, result = finished
    rows = metrics(out)
    assert list(rows[0]) == ["system", "seed", "round", "metric", "value"]
    names = ["fedavg_clean", "fedavg", "dual_system"]
    assert list(dict.fromkeys(r["system"] for r in rows)) == names
    accuracy = [
        (int(r["round"]), float(r["value"]))
        for r in rows
        if r["system"] == "fedavg" and r["metric"] == "accuracy"
    ]
    history = result.histories["fedavg"]
    assert accuracy == [
        (2, pytest.approx(float(history.accuracy[1]))),
        (4, pytest.approx(float(history.accuracy[3]))),
    ]
    counts = {r["value"] for r in rows if r["metric"] == "num_byzantine"}
    assert counts <= {str(i) for i in range(7)}


def test_class_recalls_are_written_at_evaluations(finished):
    out, result = finished
    found = {
        (r["system"], int(r["round"]), r["metric"]): float(r["value"])
        for r in metrics(out)
        if r["metric"].startswith("recall_")
    }
    for name, history in result.histories.items():
        for number, class_ in ((2, 0), (4, 9)):
            expected = history.class_recall[number - 1, class_]
            assert found[name, number, f"recall_{class_}"] == pytest.approx(expected)
    assert len(found) == len(result.histories) * 2 * 10
    summary = json.loads((out / "summary.json").read_text())["systems"]
    recalls = summary["fedavg"]["class_recall"]
    assert recalls == pytest.approx(result.histories["fedavg"].class_recall[-1])


def test_a_backdoor_s_success_is_reported(tmp_path):
    out = tmp_path / "badnets"
    result = run(out, attack="badnets(target=0)", attack_strength=None, rounds=2)
    success = [r for r in metrics(out) if r["metric"] == "attack_success"]
    assert {r["system"] for r in success} == {"fedavg", "dual_system"}
    assert {int(r["round"]) for r in success} == {2}
    history = result.histories["fedavg"]
    assert float(success[0]["value"]) == pytest.approx(history.attack_success[-1])
    summary = json.loads((out / "summary.json").read_text())["systems"]
    assert summary["fedavg_clean"]["attack_success"] is None
    assert summary["fedavg"]["attack_success"]["final"] == pytest.approx(
        history.attack_success[-1]
    )
    text = (out / "summary.md").read_text()
    assert "| attack success |" in text


def test_measures_of_an_early_end_are_dropped():
    """A run of 3 rounds evaluated in round 3, then extended to 4."""
    values = np.array([np.nan, 0.5, 0.6, 0.7], np.float32)
    fields = ("accuracy", "loss", "auc", "balanced_accuracy", "attack_success")

    class History(SimpleNamespace):
        def _replace(self, **changes):
            return History(**{**vars(self), **changes})

    for seeds in (0, 2):
        shape = (seeds, 4) if seeds else (4,)
        own = np.broadcast_to(values, shape)
        history = History(
            round=np.broadcast_to([1, 2, 3, 4], shape),
            class_recall=np.stack([own] * 3, axis=-1),
            class_specificity=np.stack([own] * 3, axis=-1),
            local={"loss": np.stack([own] * 2, axis=-1)},
            **dict.fromkeys(fields, own),
        )
        shown = runner._drop_early_ends(history, SimpleNamespace(eval_every=2), 4)
        expected = np.array([False, True, False, True])
        for field in fields:
            got = np.isfinite(getattr(shown, field))
            np.testing.assert_array_equal(got, np.broadcast_to(expected, shape))
        got = np.isfinite(shown.class_recall)
        assert (got.sum(axis=-1) == 3 * expected).all()
        got = np.isfinite(shown.local["loss"])
        assert (got.sum(axis=-1) == 2 * expected).all()


def test_summary_and_client_records(finished):
    out, result = finished
    summary = json.loads((out / "summary.json").read_text())
    history = result.histories["dual_system"]
    found = summary["systems"]["dual_system"]
    assert found["rounds"] == 4
    assert found["accuracy"]["final"] == pytest.approx(float(history.accuracy[-1]))
    assert found["tpr"]["mean_of_run"] == pytest.approx(float(np.nanmean(history.tpr)))
    assert summary["systems"]["fedavg_clean"]["tpr"] is None
    assert summary["key"] == json.loads((out / "config.json").read_text())["key"]
    assert summary["versions"]["device"]
    assert summary["compile_seconds"] > 0 < summary["run_seconds"]
    records = np.load(out / "clients.npz")
    for field in ("client_ids", "byzantine", "weights", "flagged", "scores", "trust"):
        assert records[f"dual_system/{field}"].shape == (4, 8)
    np.testing.assert_array_equal(
        records["dual_system/byzantine"], records["fedavg/byzantine"]
    )
    text = (out / "summary.md").read_text()
    assert "| fedavg_clean" in text
    assert "python -m experiments.fltrust_mnist" in text
    assert (out / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_the_final_model_can_be_loaded(finished):
    out, _ = finished
    params = checkpoint.load_model(out, "dual_system")
    assert params["Dense_0"]["kernel"].shape == (64, 200)
    assert all(np.isfinite(x).all() for x in params["Dense_0"].values())
    with pytest.raises(ValueError, match=r"no system 'krum'; it has"):
        checkpoint.load_model(out, "krum")
    with pytest.raises(ValueError, match="holds no finished run"):
        checkpoint.load_model(out / "nowhere", "krum")


def test_the_same_seed_gives_the_same_file(finished, tmp_path):
    run(tmp_path / "again")
    again = (tmp_path / "again" / "metrics.csv").read_bytes()
    assert again == (finished[0] / "metrics.csv").read_bytes()


def test_a_run_extended_is_the_longer_run_bit_for_bit(finished, tmp_path):
    # 3 rounds end with an evaluation that the longer run does not have.
    run(tmp_path / "grown", rounds=3, segment=1)
    run(tmp_path / "grown", rounds=4, resume=True)
    for name in ("metrics.csv",):
        grown = (tmp_path / "grown" / name).read_bytes()
        assert grown == (finished[0] / name).read_bytes()
    with (
        np.load(tmp_path / "grown" / "clients.npz") as a,
        np.load(finished[0] / "clients.npz") as b,
    ):
        assert set(a) == set(b)
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
    # Nothing left to do: the results are written again.
    run(tmp_path / "grown", resume=True)
    assert (tmp_path / "grown" / "summary.md").exists()
    with pytest.raises(ValueError, match=r"already at round 4 .*ask for round 2"):
        run(tmp_path / "grown", rounds=2, resume=True)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_run_resumes_from_its_last_checkpoint(finished, tmp_path, number):
    out = tmp_path / "killed"
    arguments = ["--preset", "demo", "--out", str(out)]
    for name, value in TINY.items():
        if name == "preset":
            continue
        values = value if isinstance(value, tuple) else (value,)
        arguments += [f"--{name.replace('_', '-')}", *map(str, values)]
    # Many short segments, so that the kill falls between two of them.
    arguments[arguments.index("--rounds") + 1] = "400"
    arguments[arguments.index("--segment") + 1] = "1"
    command = [sys.executable, "-u", "-m", "experiments.fltrust_mnist", *arguments]
    # What is killed may leave half a program there. Bit for bit on as many devices.
    environment = {
        **os.environ,
        "JAX_NUM_CPU_DEVICES": str(jax.local_device_count()),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
    }
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        seen = []
        for line in process.stdout:
            seen.append(line)
            if line.startswith("round 2/400:"):
                process.send_signal(number)
                break
        seen.append(process.stdout.read())
    code = {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130}[number]
    assert process.returncode == code, "".join(seen)
    assert "Traceback" not in "".join(seen)
    assert ("--resume continues" in seen[-1]) == (number == signal.SIGINT)
    done = checkpoint.latest_round(out / "checkpoints" / "all")
    assert 1 <= done < 400
    assert not (out / "summary.json").exists()
    if done <= 4:
        run(out, resume=True)
        got = (out / "metrics.csv").read_bytes()
        assert got == (finished[0] / "metrics.csv").read_bytes()
    else:
        run(out, resume=True, rounds=done)
        rows = metrics(out)
        assert max(int(r["round"]) for r in rows) == done
        want = [r for r in metrics(finished[0]) if r["metric"] == "train_loss"]
        got = [r for r in rows if r["metric"] == "train_loss" and int(r["round"]) <= 4]
        assert got == want


def test_attack_rounds_fork_all_systems_from_the_clean_state(tmp_path):
    out = tmp_path / "paper"
    options = {"rounds": 3, "attack_rounds": 2, "eval_every": 1, "segment": 1}
    result = run(out, **options)
    clean, fedavg = (result.histories[n] for n in ("fedavg_clean", "fedavg"))
    assert clean.round.tolist() == [1, 2, 3]
    assert fedavg.round.tolist() == [4, 5]
    assert result.histories["dual_system"].round.tolist() == [4, 5]
    assert not clean.byzantine.any()
    # The clean part is the plain run's.
    plain = run(tmp_path / "plain", rounds=3, eval_every=1, aggregators=("fedavg",))
    np.testing.assert_allclose(
        clean.accuracy, plain.histories["fedavg_clean"].accuracy, atol=1e-6
    )
    # Extending the attacked part resumes it; the clean part is not run again.
    longer = run(out, **{**options, "attack_rounds": 3}, resume=True)
    assert longer.histories["fedavg"].round.tolist() == [4, 5, 6]
    np.testing.assert_array_equal(
        longer.histories["fedavg"].train_loss[:2], fedavg.train_loss
    )
    assert set(json.loads((out / "summary.json").read_text())["systems"]) == {
        "fedavg_clean",
        "fedavg",
        "dual_system",
    }


def test_seeds_are_the_single_runs(finished, tmp_path):
    result = run(tmp_path / "two", num_seeds=2)
    assert result.histories["fedavg"].accuracy.shape == (2, 4)
    rows = metrics(tmp_path / "two")
    assert {r["seed"] for r in rows} == {"0", "1"}
    first = [
        float(r["value"])
        for r in rows
        if (r["seed"], r["metric"]) == ("0", "train_loss")
    ]
    alone = [
        float(r["value"]) for r in metrics(finished[0]) if r["metric"] == "train_loss"
    ]
    np.testing.assert_allclose(first, alone, rtol=1e-4)
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    spread = summary["systems"]["fedavg"]["accuracy"]["spread_over_seeds"]
    finals = result.histories["fedavg"].accuracy[:, -1]
    assert spread == pytest.approx(float(np.std(finals, ddof=1)))


def test_a_corrupt_checkpoint_says_which_folder_to_delete(tmp_path):
    out = tmp_path / "corrupt"
    run(out)
    for file in (out / "checkpoints" / "all" / "4").rglob("*"):
        if file.is_file():
            file.write_bytes(b"\0")
    with pytest.raises(ValueError, match=r"checkpoints/all/4 cannot be read.*Delete"):
        run(out, resume=True, rounds=6)


def test_a_checkpoint_of_another_program_is_named(tmp_path):
    directory = tmp_path / "c"
    checkpoint.save(directory, 3, {"w": np.zeros(3, np.float32)})
    with pytest.raises(ValueError, match=r"\['w'\]: expected float32\[4\], found"):
        checkpoint.load(directory, 3, lambda round: {"w": np.zeros(4, np.float32)})
    loaded = checkpoint.load(directory, 3, lambda r: {"w": np.ones(r, np.float32)})
    assert not loaded["w"].committed  # or a resumed run would be compiled anew
    np.testing.assert_array_equal(loaded["w"], np.zeros(3))


def test_only_the_last_checkpoints_are_kept(tmp_path):
    for round in range(5):
        checkpoint.save(tmp_path / "c", round, {"w": np.zeros(1)})
    assert checkpoint.latest_round(tmp_path / "c") == 4
    kept = [p for p in (tmp_path / "c").iterdir() if p.name.isdigit()]
    assert len(kept) == checkpoint.KEEP


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, r"--rounds must be at least 1; got 0"),
        ({"eval_every": 0}, "--eval-every must be at least 1"),
        ({"segment": -1}, "--segment must be at least 1"),
        ({"num_seeds": 0}, "--num-seeds must be at least 1"),
        ({"seed": -1}, "--seed must be at least 0"),
        ({"seed": 2**32}, "--seed must be at most"),
        ({"seed": 2**32 - 1, "num_seeds": 2}, "--seed must be at most"),
        ({"rounds": 10**21}, "--rounds must be at most"),
        ({"epochs": 10**21}, "--epochs must be at most"),
        ({"aggregators": ()}, "--aggregators needs at least one"),
        ({"aggregators": (), "attack_rounds": 1}, "--aggregators needs at least one"),
        ({"aggregators": ("krum:",)}, "cannot read"),
        ({"attackers": 0.01}, "is 0 of them"),
        ({"attackers": 0.99}, "is 20 of them"),
        ({"alpha": 3.0}, "--alpha has no effect with --partition iid"),
        ({"root_bias": 0.5, "root_size": 0}, "--root-bias has no effect"),
        ({"root_size": 5}, "--root-size must be at least --batch-size"),
        ({"partition_seed": -1}, "--partition-seed must be >= 0"),
        ({"attack_rounds": -2}, "--attack-rounds must be >= 0"),
        ({"attack_start": -1}, "--attack-start must be >= 0; got -1"),
        ({"attack_every": 0}, "--attack-every must be at least 1; got 0"),
        ({"attack_start": 5, "attack_stop": 5}, r"above --attack-start \(5\); got 5"),
        ({"attack_start": 10**6}, "would never be active in rounds 0 to"),
        (
            {"rounds": 4, "attack_rounds": 6, "attack_stop": 4},
            "would never be active in rounds 4 to 9, those of the attacked systems",
        ),
        (
            {"rounds": 4, "attack_rounds": 6, "attack_every": 10},
            "would never be active in rounds 4 to 9",
        ),
        ({"attackers": 1.0}, r"--attackers must be in \[0, 1\); got 1.0"),
        ({"attackers": -0.1}, r"--attackers must be in \[0, 1\)"),
        ({"attackers": float("nan")}, r"--attackers must be in \[0, 1\)"),
        ({"lr": float("nan")}, "--lr must be a positive number"),
        ({"attack": "scaling", "attack_strength": None}, "needs --attack-strength"),
        ({"attack": "sign_flop"}, "Did you mean 'sign_flip'"),
        ({"partition": "shard"}, "Did you mean 'shards'"),
        ({"model": "cn"}, "Did you mean 'cnn'"),
        ({"dataset": "digit"}, "Did you mean 'digits'"),
        ({"aggregators": ("krumm",)}, "Did you mean 'krum'"),
        ({"aggregators": ("dual_system:softt",)}, "Did you mean 'soft'"),
        ({"aggregators": ("krum:soft",)}, "unexpected keyword argument 'variant'"),
        ({"aggregators": ("krum", "krum")}, "repeats a name"),
        (
            {"aggregators": ("dual_system", "dual_system:filter_then_trust")},
            "names one rule twice",
        ),
        ({"max_byzantine": 3}, r"dual_system needs.*cohort_size"),
        ({"cohort": 21}, r"--cohort must be from 1 to --clients \(20\)"),
        ({"cohort": 0}, "--cohort must be from 1"),
        ({"clients": 0}, "--clients must be at least 1"),
        ({"root_size": 5000}, "root"),
        ({"root_size": 0}, "--root-size must be at least"),
        ({"clients": 5000, "cohort": 8}, "client"),
        (
            {"batch_size": 200, "root_size": 200},
            "batch_size=200 is larger than the smallest client",
        ),
        ({"bias": 2.0, "partition": "label_bias"}, "label_bias"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(tmp_path, options, message):
    out = tmp_path / "bad"
    with pytest.raises(ValueError, match=message):
        run(out, **options)
    assert not out.exists()


def test_run_directories_are_protected(finished, tmp_path):
    out, _ = finished
    before = (out / "metrics.csv").read_bytes()
    with pytest.raises(ValueError, match=r"already holds a run\. Add --resume"):
        run(out)
    with pytest.raises(ValueError, match=r"another configuration.*lr: 0.1 -> 0.2"):
        run(out, lr=0.2, resume=True)
    assert (out / "metrics.csv").read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("do not touch")
    with pytest.raises(ValueError, match="not empty and holds no run"):
        run(tmp_path / "mine")
    (tmp_path / "mine" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not a run's configuration"):
        run(tmp_path / "mine", resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        run(tmp_path / "file" / "below")


def test_a_refused_resume_changes_nothing(finished, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(finished[0], out)
    before = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
    with pytest.raises(ValueError, match="already at round 4"):
        run(out, rounds=2, resume=True)
    with pytest.raises(ValueError, match="another configuration"):
        run(out, seed=3, resume=True)
    folder = os.open(out, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    try:
        with pytest.raises(ValueError, match="another process is running"):
            run(out, resume=True)
    finally:
        os.close(folder)
    shutil.move(out / "checkpoints", tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="its checkpoints are gone"):
        run(out, resume=True)
    assert before == {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_folder_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="cannot be written"):
        run(tmp_path / "out")


def test_resume_on_other_data_is_refused(finished, tmp_path, monkeypatch):
    make = fltrust_mnist.make_phases
    monkeypatch.setattr(
        fltrust_mnist, "make_phases", lambda config: (make(config)[0], "other pictures")
    )
    with pytest.raises(ValueError, match=r"started on other data.*other pictures"):
        run(finished[0], resume=True)


def test_command_line_presets_and_overrides():
    parsed = fltrust_mnist.parse(["--preset", "demo", "--lr", "0.5", "--cohort", "7"])
    assert (parsed.dataset, parsed.lr, parsed.cohort) == ("digits", 0.5, 7)
    assert fltrust_mnist.parse(["--preset=paper"]).attack_rounds == 200
    assert fltrust_mnist.parse([]) == fltrust_mnist.PRESETS["table"]
    # A preset's strength belongs to its own attack.
    assert fltrust_mnist.parse(["--attack", "alie"]).attack_strength is None
    strong = fltrust_mnist.parse(["--attack", "alie", "--attack-strength", "2"])
    assert strong.attack_strength == 2.0
    assert fltrust_mnist.parse(["--aggregators", "krum", "median"]).aggregators == (
        "krum",
        "median",
    )
    with pytest.raises(ValueError, match="Did you mean 'demo'"):
        fltrust_mnist.parse(["--preset", "demmo"])


def test_unknown_flags_and_help(capsys):
    with pytest.raises(SystemExit) as error:
        fltrust_mnist.parse(["--rouns", "3"])
    assert error.value.code == 2
    assert "--rounds" in capsys.readouterr().err
    with pytest.raises(SystemExit) as error:
        fltrust_mnist.parse(["--help"])
    assert error.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(fltrust_mnist.Config):
        assert f"--{field.name.replace('_', '-')}" in text


@pytest.mark.parametrize(
    ("options", "assumed"),
    [
        ({"clients": 100, "cohort": 10, "attackers": 0.2}, 3),
        ({"clients": 100, "cohort": "all", "attackers": 0.2}, 20),
        ({"clients": 100, "cohort": "all", "attackers": 0.6}, 60),
        ({"clients": 100, "cohort": 10, "attackers": 0.0}, 0),
        ({"clients": 100, "cohort": 10, "max_byzantine": 1}, 1),
    ],
)
def test_assumed_byzantine(tmp_path, options, assumed):
    assert fltrust_mnist.assumed_byzantine(config(tmp_path, **options)) == assumed


def test_a_line_of_progress_says_what_its_numbers_are():
    def of(accuracy):
        return SimpleNamespace(round=[1, 2], accuracy=[accuracy, np.nan])

    few = {"a": of(0.5), "b": of(0.25)}
    assert runner.latest_accuracies(few) == "a 0.500  b 0.250 (of round 1)"
    many = few | {f"c{i}": of(0.4) for i in range(7)}
    assert runner.latest_accuracies(many) == (
        "accuracy of 9 systems from 0.250 (b) to 0.500 (a), median 0.400 (of round 1)"
    )
    assert runner.latest_accuracies({"a": of(np.nan)}) == "not evaluated yet"


@pytest.mark.parametrize(
    ("rounds", "every", "segment"),
    [(100, 5, 5), (1000, 10, 50), (7, 5, 1), (20, 5, 1), (97, 5, 5)],
)
def test_default_segment_divides_the_run(rounds, every, segment):
    assert runner.default_segment(rounds, every) == segment


def test_long_runs_are_announced(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner, "WORTH_MEASURING", 0)
    monkeypatch.setattr(runner, "LONG", 0)
    fltrust_mnist.run(config(tmp_path / "long"), Console(width=200))
    text = capsys.readouterr().out
    assert "4 rounds of 3 systems: about" in text
    assert "on this device" in text
    assert "round 4/4" in text


def test_scan_runs_each_cell_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        fltrust_scan,
        "CELLS",
        (
            fltrust_scan.Cell("sign_flip", 1.0, 0.2),
            fltrust_scan.Cell("ipm", 2.0, 0.2, "iid", root_size=10, root_bias=0.8),
        ),
    )
    monkeypatch.setattr(fltrust_scan, "SYSTEMS", ("fedavg",))
    arguments = ["scan", "--dataset", "digits", "--rounds", "1", "--epochs", "1"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--out", str(tmp_path / "scan")])
    fltrust_scan.main()
    table = (tmp_path / "scan" / "scan.md").read_text()
    assert "sign_flip 1" in table
    assert "ipm 2" in table
    assert "10, 80% of one class" in table
    (tmp_path / "scan" / "scan.md").unlink()
    fltrust_scan.main()
    assert capsys.readouterr().out.count("done before") == 2
    assert (tmp_path / "scan" / "scan.md").read_text() == table

    (summary,) = (tmp_path / "scan").glob("ipm*/summary.json")
    assert "--attack ipm --attack-strength 2.0" in summary.read_text()
    for damaged in ("", "[]", "{}", '{"systems": {}}', '{"systems": 3}'):
        summary.write_text(damaged)
        with pytest.raises(SystemExit, match=r"ipm.*summary.json is damaged .* Delete"):
            fltrust_scan.main()


def test_scan_checks_its_options_first(tmp_path, monkeypatch):
    arguments = ["scan", "--rounds", "0", "--out", str(tmp_path / "scan")]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit, match="--rounds must be at least 1; got 0"):
        fltrust_scan.main()
    assert not (tmp_path / "scan").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "--preset demo",
        "--preset paper --cohort all --out runs/b",
        "--attack ipm",
        "--attack alie --attack-strength 5.0 --data-dir d --seed 3",
        "--preset demo --attack-strength 2.5 --root-bias 0.8",
        "--attack badnets --attack-start 3 --attack-stop 9 --attack-every 2",
        "--aggregators krum dual_system:soft --out 'a folder'",
    ],
)
def test_recorded_command_starts_the_same_run(arguments):
    first = fltrust_mnist.parse(shlex.split(arguments))
    words = shlex.split(fltrust_mnist.command(first))
    assert words[:3] == ["python", "-m", "experiments.fltrust_mnist"]
    assert fltrust_mnist.parse(words[3:]) == first


def test_config_key_ignores_where_and_how_long(tmp_path):
    base = results.config_key(config(tmp_path))
    assert base == results.config_key(
        config(tmp_path / "x", rounds=9, resume=True, segment=1, data_dir=tmp_path)
    )
    assert base != results.config_key(config(tmp_path, seed=1))
    assert base != results.config_key(config(tmp_path, lr=0.3))


def test_when_the_attack_is_active(tmp_path):
    plain, later = config(tmp_path), config(tmp_path, attack_start=3, attack_stop=9)
    assert "round" not in fltrust_mnist.make_attack(plain, 10).on_updates.needs
    assert "round" in fltrust_mnist.make_attack(later, 10).on_updates.needs
    assert "(sign_flip 3, every 1 rounds from 3 to 8)" in fltrust_mnist.settings(later)
    # The key of runs from before these options is that of their defaults.
    fields = results.as_json(plain)
    assert set(results.WHEN) <= set(fields)
    kept = [f for f in dataclasses.fields(plain) if f.name not in results.WHEN]
    before = dataclasses.make_dataclass("Before", [f.name for f in kept])
    before.STUDY = plain.STUDY
    old = before(*(getattr(plain, f.name) for f in kept))
    assert results.config_key(old) == results.config_key(plain)
    assert results.config_key(later) != results.config_key(plain)


@pytest.mark.parametrize("diverged", [np.nan, np.inf])
def test_summary_leaves_out_a_seed_that_diverged(diverged):
    values = np.array([[1.0, 2.0], [3.0, diverged]])
    fields = {name: np.zeros((2, 2)) for name in results.METRICS}
    history = SimpleNamespace(**{**fields, "round": np.array([[1, 2]] * 2)})
    history.class_recall = np.full((2, 2, 3), np.nan)
    history.class_specificity = history.class_recall
    history.loss = values
    history.accuracy = np.array([[0.5, 0.25], [0.5, 0.75]])
    summary = results.summarise(history)
    assert summary["loss"]["final"] == 2.0
    assert summary["loss"]["mean_of_run"] == 2.0
    assert summary["loss"]["spread_over_seeds"] is None
    assert summary["accuracy"]["final"] == 0.5
    np.testing.assert_allclose(summary["accuracy"]["spread_over_seeds"], 0.5**1.5)


@pytest.mark.parametrize("seeds", [0, 2])
def test_detection_counts_who_has_no_weight(seeds):
    weights = np.array([[0.0, 0.5, 0.5, 0.0], [0.0, 0.0, 0.0, 1.0]])
    byzantine = np.array([[True, False, False, False], [True, True, False, False]])
    one = np.array([1.0, 0.5])
    fields = {"tpr": one, "fpr": one, "fnr": one, "num_flagged": one}
    fields |= {"num_nonfinite": 0 * one, "no_aggregate": 0 * one}
    fields |= {"weights": weights, "byzantine": byzantine}
    if seeds:
        fields = {name: np.stack([value] * seeds) for name, value in fields.items()}
    header, rows = fltrust_report._detection_rows({"rule": SimpleNamespace(**fields)})
    shown = dict(zip(header, rows[0], strict=True))
    assert shown["TPR"] == "0.750"
    assert shown["no weight: Byz."] == "1.000"
    # One of three honest clients, then one of two.
    assert shown["no weight: honest"] == f"{(1 / 3 + 1 / 2) / 2:.3f}"


@pytest.mark.parametrize(("still", "remarks"), [(4, 0), (5, 1)])
def test_a_model_that_stands_still_is_remarked_on(still, remarks):
    stuck = np.array([True, False, *[True] * still])
    history = SimpleNamespace(no_aggregate=stuck, round=np.arange(1, len(stuck) + 1))
    found = fltrust_report._remarks({"rule": history})
    assert len(found) == remarks
    assert all("no usable update from round 3 on" in line for line in found)
