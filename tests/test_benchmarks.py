"""The benchmarks run; what they measure is read by people."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import client_chunk, gpu, report, run, workloads
from benchmarks.arms import fedjax_arm, naive_arm

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CORES = len(jax.devices("cpu"))


def test_client_chunk_trains_every_client():
    config = client_chunk.Config(clients=4, samples=20, cores=CORES)
    compile_seconds, rate = client_chunk.measure("digits_cnn", 2, config)
    assert compile_seconds > 0
    assert rate > 0


def test_the_naive_arm_trains_the_same_networks(monkeypatch):
    seen = {}

    def call(f, repeats):
        seen["updates"] = f()
        return {"median": 1.0}

    monkeypatch.setattr(naive_arm.workloads, "measure", call)
    found = naive_arm.train("digits_cnn", clients=2, samples=20)
    assert found["rate"] == 40
    sizes = [leaf.size for leaf in jax.tree.leaves(seen["updates"])]
    assert sum(sizes) == 2 * 1898  # the parameters of fs.models.digits_cnn


def test_the_arms_of_aggregation_cover_the_peer_s_rules():
    found = fedjax_arm.aggregate(workloads.LARGE, rows=12, columns=60, assumed=2)
    assert set(found["seconds"]) == set(workloads.LARGE)
    few = fedjax_arm.aggregate(workloads.FEW, rows=10, columns=20, assumed=2)
    assert all(seconds > 0 for seconds in few["seconds"].values())


def test_floating_point_operations_by_hand():
    # A dense layer: 2 in out forward, again for the kernel, and for all but the first
    # layer again for its input.
    assert workloads.MFLOP["mlp"] == (2 * 2 * 784 * 200 + 3 * 2 * 200 * 10) / 1e6
    assert 11.2 < workloads.MFLOP["cnn"] < 11.3


def test_a_missing_peer_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "ROOT", tmp_path)
    with pytest.raises(run.ArmError, match="run 'make bench-peers'"):
        run.arm("byzfl", "version")
    results = run.take_turns(
        {"ours": lambda: {"rate": 3.0}, "theirs": lambda: run.arm("torch", "train")}, 3
    )
    assert results["ours"] == {"rate": 3.0, "range": [3.0, 3.0]}
    assert "make bench-peers" in results["theirs"]["failed"]


def test_an_arm_that_fails_gives_its_reason():
    with pytest.raises(run.ArmError, match=r"fedjax train failed: KeyError: 'nothing'"):
        run.arm("fedjax", "train", model="nothing", cores=1)


def test_results_md_is_made_from_results_json(tmp_path):
    results = json.loads((BENCHMARKS / "results.json").read_text())
    report.write(results, tmp_path)
    written = (tmp_path / "RESULTS.md").read_text()
    assert written == (BENCHMARKS / "RESULTS.md").read_text()
    assert (tmp_path / "training.png").stat().st_size > 10_000
    # Without the peers the report has what there is.
    for workload in ("aggregation", "matrix", "flower"):
        results[workload] = {"failed": "no .venv-byzfl: run 'make bench-peers'"}
    report.write(results, tmp_path)
    assert "## Aggregation" not in (tmp_path / "RESULTS.md").read_text()


def test_bad_options_before_anything_runs(tmp_path):
    for options, message in (
        (["--cores", "0"], "--cores must be from 1 to"),
        (["--passes", "0"], "--passes must be at least 1"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.run", *options, "--out", tmp_path],
            cwd=BENCHMARKS.parent,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1
        assert message in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_readme_s_figures_are_those_measured():
    models = json.loads((BENCHMARKS / "results.json").read_text())["training"]["models"]
    readme = (BENCHMARKS.parent / "README.md").read_text()
    table = readme[readme.index("### Speed") : readme.index("### What to install")]
    for arms in models.values():
        ours = arms["fedjax_sim"]["rate"]
        theirs = report.best_pytorch(arms)
        assert f" {ours:,.0f} | {theirs:,.0f} ({ours / theirs:.1f}x) |" in table


def test_the_forms_of_a_convolution_on_a_gpu_agree():
    key = jax.random.key(0)
    x = jax.random.normal(key, (2, 7, 7, 3))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 3, 5))
    forms = (gpu.by_convolution, gpu.by_patches, gpu.by_both)
    expected, *others = (
        jax.jit(jax.value_and_grad(lambda *a, f=f: (f(*a) ** 2).sum(), (0, 1)))(
            x, kernel
        )
        for f in forms
    )
    for found in others:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3),
            found,
            expected,
        )


def test_the_gpu_s_command_line_refuses_before_it_measures(capsys, tmp_path):
    for args, words in (
        (["--steps", "0"], "--steps must be at least 1; got 0"),
        (["--data-dir", "x", "--clients", "9"], "must be at least 10; got 9"),
        (["--out", str(tmp_path)], "--out must be a file"),
    ):
        with pytest.raises(SystemExit):
            gpu.parse(args)
        assert words in capsys.readouterr().err
