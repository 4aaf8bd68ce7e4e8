"""Memory told before a run: within a fifth of XLA's own word, and what is refused."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

import fedjax_sim as fs
from fedjax_sim import buffers, memory


@pytest.mark.slow
def test_memory_is_told_within_a_fifth():
    # How the suite has XLA compile takes other buffers than what users run.
    suite = ("JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS", "JAX_NUM_CPU_DEVICES")
    environment = {k: v for k, v in os.environ.items() if k not in suite}
    done = subprocess.run(
        [sys.executable, "-m", "tests.memory_told"],
        cwd=Path(__file__).parents[1],
        env=environment | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "told within a fifth"


@pytest.mark.parametrize(
    ("program", "held"),
    [
        # Fused into the sum; read as a whole by the product; both at once.
        (lambda x: jnp.exp(x).max(), 1),
        (lambda x: (jnp.exp(x) @ x).max(), 2e4 + 1),
        # The product of one step is there when the next begins.
        (lambda x: (x @ x @ x).max(), 2e4 + 1),
        (lambda x: (x @ x + x @ x.T).max(), 2e4 + 1),
        # A carry is overwritten, a stack of results is not.
        (lambda x: jax.lax.fori_loop(0, 9, lambda i, c: c @ x, x), 2e4),
        (lambda x: jax.lax.scan(lambda c, _: (c, x @ x), 0.0, None, 9)[1], 1e5 + 1),
        # Of two branches, the one that takes more.
        (
            lambda x: jax.lax.cond(
                x[0, 0] > 0, lambda: (x @ x @ x).max(), lambda: x.max()
            ),
            2e4 + 1,
        ),
    ],
)
def test_peak(program, held):
    x = jax.ShapeDtypeStruct((100, 100), jnp.float32)
    found = buffers.peak_of(jax.make_jaxpr(program)(x))
    assert found == pytest.approx(4 * held, abs=40)


@pytest.fixture(scope="module")
def systems():
    data = fs.data.load("digits")
    clients, _ = fs.data.populate(data, 40, size=10)

    def make(aggregator, **options):
        sim = fs.Simulation(
            model=fs.models.mlp((8, 8, 1), hidden=()),
            clients=clients,
            test=data.test,
            client_update=fs.local_sgd(optax.sgd(0.1), steps=1, batch_size=10),
            aggregator=aggregator,
            num_devices=1,
            **options,
        )
        return fs.compare({"system": sim})

    return make


def test_a_run_that_does_not_fit_is_refused_before_it_is_compiled(systems, monkeypatch):
    comparison = systems(fs.aggregators.fedavg())
    states = comparison.init(jax.random.key(0))
    needed = comparison.memory(jax.random.key(0), num_rounds=2)
    assert needed.updates == 40 * 650 * 4
    assert needed.data == pytest.approx(1797 * 68 + 40 * 10 * 5, rel=0.01)

    def free(size):
        monkeypatch.setattr(memory, "free_memory", lambda: size)

    free(needed.updates)
    with pytest.raises(MemoryError, match=r"0 MB are free.*cohort_size.*update_memory"):
        comparison.run(states=states, num_rounds=2)
    assert comparison._scan._cache_size() == 0
    comparison.run(states=states, num_rounds=2, check_memory=False)
    free(None)
    comparison.run(states=states, num_rounds=2)


def test_what_a_rule_remembers_is_checked_before_it_is_made(systems, monkeypatch):
    comparison = systems(fs.aggregators.foolsgold(), cohort_size=4)
    monkeypatch.setattr(memory, "free_memory", lambda: 40 * 650 * 4)
    with pytest.raises(MemoryError, match="does not remember all 40 clients"):
        comparison.init(jax.random.key(0))


def test_free_memory_is_that_of_the_machine():
    free = memory.free_memory()
    assert free is None or 2**20 < free < 2**50
