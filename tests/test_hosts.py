"""Several processes on this machine run one simulation together."""

import csv
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from rich.console import Console

import fedjax_sim as fs
from experiments import fltrust_mnist, launch
from fedjax_sim import checkpoint
from tests import many_hosts
from tests.trees import assert_close

ROOT = Path(__file__).parents[1]


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def slurm(count, i):
    """What SLURM tells a task."""
    return {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": str(count),
        "SLURM_PROCID": str(i),
        "SLURM_LOCALID": str(i),
    }


def open_mpi(count, i):
    """What Open MPI tells a process."""
    return {
        "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911",
        "OMPI_COMM_WORLD_SIZE": str(count),
        "OMPI_COMM_WORLD_RANK": str(i),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(i),
    }


def together(count, told_by, folder, rounds, names):
    """``many_hosts`` in some processes, to a round; what process 0 found.

    A batch system tells them who is who.
    """
    port = {"JAX_COORDINATOR_PORT": str(free_port())}
    command = [sys.executable, "-m", "tests.many_hosts", "auto"]
    processes = [
        subprocess.Popen(
            [*command, folder, str(rounds), *names],
            cwd=ROOT,
            env=os.environ | port | told_by(count, i),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for i in range(count)
    ]
    try:
        for i, process in enumerate(processes):
            said = process.communicate(timeout=300)[0]
            assert f"process {i} of {count} is done" in said, said
    finally:
        launch.end(processes)
    with np.load(folder / "found.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Four rounds in this process, with all clients in one place."""
    data = fs.data.load("digits")
    clients, root = fs.data.federate(
        data,
        num_clients=many_hosts.CLIENTS,
        partition=fs.data.dirichlet(1.0, min_size=10),
        root_size=50,
    )
    folder = tmp_path_factory.mktemp("alone")
    return many_hosts.as_arrays(
        many_hosts.run(clients, root, data.test, folder, rounds=4)
    )


def test_processes_find_what_one_finds_and_go_on_where_others_stopped(alone, tmp_path):
    two = together(2, slurm, tmp_path, 2, names=("all", "sampled"))
    # Of all from the checkpoint of the two, in passes from the start.
    four = together(4, open_mpi, tmp_path, 4, names=("all", "passes"))
    assert set(two) | set(four) == set(alone)
    for name, wanted in alone.items():
        if name in two and "[1]" in name:  # a history, of two seeds or of one
            axis = 1 if name.startswith("sampled") else 0
            first, last = np.split(wanted, [2], axis=axis)
            np.testing.assert_allclose(two[name], first, 1e-4, 1e-5, err_msg=name)
        else:
            last = wanted
        if name in four:
            np.testing.assert_allclose(four[name], last, 1e-4, 1e-5, err_msg=name)


def test_auto_without_a_batch_system():
    outside = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    done = subprocess.run(
        [sys.executable, "-c", "import fedjax_sim; fedjax_sim.hosts.start()"],
        env=outside | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    said = "RuntimeError: the environment does not say which processes there are"
    assert said in done.stderr


def test_own_clients_are_cut_without_gaps(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 6)
    monkeypatch.setattr(jax, "local_device_count", lambda: 2)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    found = []
    for index in range(3):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        found.append(fs.hosts.own_clients(20))
    assert found == [range(8), range(8, 16), range(16, 20)]  # four a device
    with pytest.raises(ValueError, match="leave one of 3 processes without any"):
        fs.hosts.own_clients(8)


def test_one_process_may_share_too():
    data = fs.data.load("digits")
    clients, _ = fs.data.federate(
        data, num_clients=6, partition=fs.data.dirichlet(1.0, min_size=10)
    )
    shared = {
        "model": fs.models.mlp((8, 8, 1), hidden=()),
        "test": data.test,
        "client_update": fs.local_sgd(optax.sgd(0.1), steps=1, batch_size=5),
        "aggregator": fs.aggregators.median(),
        "cohort_size": 4,
    }
    joined = fs.hosts.share(clients)
    assert joined.padded == clients.padded
    sims = [fs.Simulation(clients=c, **shared) for c in (clients, joined)]
    (_, one), (_, other) = (
        sim.run(jax.random.key(0), num_rounds=2, eval_every=2) for sim in sims
    )
    assert_close(other, one, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"num_devices=9, but .* Leave it out"):
        fs.Simulation(clients=joined, num_devices=9, **shared)


def test_what_processes_cannot_share_is_refused():
    data = fs.data.load("digits")
    clients, _ = fs.data.federate(data, num_clients=6, partition=fs.data.iid())
    own, held_out = fs.data.hold_out(clients, 0.2)
    joined = fs.hosts.share(own)
    options = {
        "model": fs.models.mlp((8, 8, 1), hidden=()),
        "client_update": fs.local_sgd(optax.sgd(0.1), steps=1, batch_size=5),
        "aggregator": fs.aggregators.fedavg(),
        "clients": joined,
    }
    for more in (
        {"local_test": held_out},
        {"client_defense": fs.client_defenses.sanitization(3)},
    ):
        (field,) = more
        with pytest.raises(ValueError, match=f"{field} looks at the samples"):
            fs.Simulation(**options, **more)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected a study after --"),
        (["--processes", "2", "--", "--rounds"], "expected a study after --"),
        (["--", "experiments/fltrust_mnist.py"], "there is no module"),
        (["--processes", "0", "--", "experiments.pdrr"], "must be at least 1"),
        (
            ["--processes", "2", "--distributed", "auto", "--", "experiments.pdrr"],
            "drop it",
        ),
    ],
)
def test_launch_says_what_it_needs(arguments, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["launch", *arguments])
    with pytest.raises(SystemExit, match=message):
        launch.main()


@pytest.mark.skipif(sys.platform != "linux", reason="a service of Linux")
def test_what_was_started_ends_with_its_parent():
    code = (
        "import os, signal, subprocess; from experiments import launch; "
        "child = subprocess.Popen(['sleep', '60'], preexec_fn=launch.end_with_parent); "
        "print(child.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert done.returncode == -signal.SIGKILL
    process = Path("/proc") / done.stdout.strip()
    for _ in range(50):
        # Gone, or waiting for init to read how it ended.
        if not process.exists() or ") Z " in (process / "stat").read_text():
            return
        time.sleep(0.1)
    raise AssertionError(f"process {done.stdout.strip()} is still there")


def test_a_process_that_dies_ends_the_job_and_the_run_resumes(tmp_path):
    out = tmp_path / "run"
    options = ["--preset", "demo", "--model", "mlp", "--aggregators", "median"]
    options += ["--clients", "6", "--attackers", "0.2", "--epochs", "1"]
    options += ["--eval-every", "1", "--segment", "1", "--out", str(out)]
    study = ["experiments.fltrust_mnist", *options, "--rounds", "100000"]
    study += ["--cores", "1"]
    commands = launch.commands(launch.Config(processes=2), study)
    log = tmp_path / "said.txt"
    with log.open("w") as said:
        job = [
            subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=said)
            for command in commands
        ]
        try:
            deadline = time.monotonic() + 200
            while (checkpoint.latest_round(out / "checkpoints" / "all") or 0) < 2:
                assert time.monotonic() < deadline, log.read_text()
                assert not any(p.poll() for p in job), log.read_text()
                time.sleep(0.5)
            job[1].kill()
            start = time.monotonic()
            assert launch.wait(job) == 1
        finally:
            launch.end(job)
    assert time.monotonic() - start < 30
    # Which waited for the other; a batch system ends it the same way.
    assert job[0].returncode == -signal.SIGTERM
    assert "process 1 of 2 was ended by SIGKILL" in launch.why(1, 2, job[1].returncode)
    last = checkpoint.latest_round(out / "checkpoints" / "all") + 2
    config = fltrust_mnist.parse([*options, "--rounds", str(last), "--resume"])
    with (tmp_path / "resumed.txt").open("w") as file:
        fltrust_mnist.run(config, Console(file=file, width=150))
    assert f"resumed all at round {last - 2}" in (tmp_path / "resumed.txt").read_text()
    with (out / "metrics.csv").open() as file:
        rounds = {
            int(row["round"])
            for row in csv.DictReader(file)
            if row["system"] == "median" and row["metric"] == "accuracy"
        }
    assert rounds == set(range(1, last + 1))
