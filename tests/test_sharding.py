"""Clients spread over devices: the same numbers, whatever the number of devices."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

import fedjax_sim as fs
from fedjax_sim import sharding

HERE = Path(__file__).parent


# Devices are what JAX must be told of before it starts: processes of their own.
@pytest.mark.slow
@pytest.mark.parametrize("number", ["two", "four"])
def test_more_devices_give_what_one_gives(number):
    count = {"two": "2", "four": "4"}[number]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": count, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", f"tests.{number}_devices"],
        cwd=HERE.parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == f"the same on one and {number} devices"


def test_use_cores_refuses_what_comes_too_late():
    there = len(jax.devices("cpu"))
    assert fs.use_cores(there) == there
    with pytest.raises(RuntimeError, match=f"too late: JAX has started with {there} "):
        fs.use_cores(there + 1)
    with pytest.raises(ValueError, match="at least 1"):
        fs.use_cores(0)


def test_use_cores_before_jax_starts():
    code = (
        "import fedjax_sim as fs, jax; n = fs.use_cores(3); "
        "print(n, len(jax.devices('cpu')), fs.use_cores())"
    )
    environment = {k: v for k, v in os.environ.items() if k != "JAX_NUM_CPU_DEVICES"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"PYTHONPATH": str(HERE.parent)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["3", "3", "3"], done.stderr


def test_one_device_adds_nothing():
    f = lambda shared, rows: shared * rows  # noqa: E731
    assert sharding.over_devices(f, 1) is f
    tree = {"a": jnp.ones(3)}
    assert sharding.replicate(tree, 1) is tree
    calls = {"a": lambda x: x + 1, "b": lambda x: x + 2}
    found = sharding.share_out(calls, {"a": (1,), "b": (1,)}, 1, most_sent=0)
    assert found == {"a": 2, "b": 3}


def test_more_devices_than_there_are():
    data = fs.data.load("digits")
    clients, _ = fs.data.federate(data, num_clients=4, partition=fs.data.iid())
    there = jax.local_device_count()
    options = {
        "model": fs.models.mlp((8, 8, 1), hidden=()),
        "clients": clients,
        "client_update": fs.local_sgd(optax.sgd(0.1), steps=1, batch_size=2),
        "aggregator": fs.aggregators.fedavg(),
    }
    assert fs.Simulation(**options).num_devices == there
    with pytest.raises(ValueError, match=f"num_devices={there + 1}, but .*use_cores"):
        fs.Simulation(**options, num_devices=there + 1)
    with pytest.raises(ValueError, match="num_devices must be an integer of at least"):
        fs.Simulation(**options, num_devices=0)
