"""A small simulation: two classes, eight clients and a root dataset."""

import jax.numpy as jnp
import numpy as np
import optax

import fedjax_sim as fs
from fedjax_sim.types import Clients, Examples

N, M, WIDTH = 8, 12, 6


def samples(count, seed):
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, 2, count).astype(np.int32)
    inputs = rng.normal(size=(count, WIDTH)) + (2 * targets[:, None] - 1)
    return Examples(inputs.astype(np.float32), targets)


def clients():
    pool = samples(N * M, seed=0)
    indices = np.arange(N * M, dtype=np.int32).reshape(N, M)
    mask = np.ones((N, M), bool)
    return Clients(*map(jnp.asarray, (*pool, indices, mask)))


# Systems of a comparison share these very objects.
SHARED = {
    "model": fs.models.mlp((WIDTH,), num_classes=2, hidden=()),
    "clients": clients(),
    "client_update": fs.local_sgd(optax.sgd(0.1), epochs=1, batch_size=4),
    "root": samples(30, seed=1),
    "test": samples(20, seed=2),
}
ATTACK = {"attack": fs.attacks.sign_flip(scale=5.0), "num_byzantine": 2}


def simulate(rule, **options):
    return fs.Simulation(aggregator=rule, **SHARED | options)
