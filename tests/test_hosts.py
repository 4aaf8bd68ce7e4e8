"""Several processes on this machine run one simulation together."""

import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fedjax_sim as fs
from experiments import launch
from tests import many_hosts

ROOT = Path(__file__).parents[1]


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def together(count, folder, rounds, names=many_hosts.RUNS):
    """``many_hosts`` in some processes, to a round; what process 0 found."""
    port, command = free_port(), [sys.executable, "-m", "tests.many_hosts"]
    processes = [
        subprocess.Popen(
            [*command, f"localhost:{port},{count},{i}", folder, str(rounds), *names],
            cwd=ROOT,
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
    two = together(2, tmp_path, rounds=2)
    # From the checkpoints of the two.
    four = together(4, tmp_path, rounds=4, names=("all", "passes"))
    assert set(two) == set(alone)
    assert set(four) == {name for name in alone if not name.startswith("sampled")}
    for name, wanted in alone.items():
        if "[1]" in name:  # a history: of two seeds, or else with the rounds first
            seeds = name.startswith("sampled")
            first, last = (wanted[:, :2], None) if seeds else (wanted[:2], wanted[2:])
            np.testing.assert_allclose(two[name], first, 1e-4, 1e-5, err_msg=name)
        else:
            last = wanted
        if name in four:
            np.testing.assert_allclose(four[name], last, 1e-4, 1e-5, err_msg=name)
