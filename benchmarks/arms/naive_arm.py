"""What a JAX user writes first: `vmap` of a Flax network with `nn.Conv` in a scan."""

import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from benchmarks import workloads
from benchmarks.workloads import BATCH, LEARNING_RATE, TRAINING


class Network(nn.Module):
    """FLTrust's network, and with ``small`` the one for 8x8 digits."""

    small: bool

    @nn.compact
    def __call__(self, x: Any) -> Any:
        padding = "SAME" if self.small else "VALID"
        for features in (8, 16) if self.small else (30, 50):
            x = nn.relu(nn.Conv(features, (3, 3), padding=padding)(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        if not self.small:
            x = nn.relu(nn.Dense(100)(x))
        return nn.Dense(10)(x)


class MLP(nn.Module):
    """One hidden layer."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = x.reshape(x.shape[0], -1)
        return nn.Dense(10)(nn.relu(nn.Dense(200)(x)))


def train(
    model: str, clients: int, samples: int, repeats: int = workloads.REPEATS_A_PASS
) -> dict[str, Any]:
    network = MLP() if model == "mlp" else Network(small=model == "digits_cnn")
    key = jax.random.key(0)
    shape = (clients, samples, *TRAINING[model]["shape"])
    inputs = jax.random.uniform(key, shape)
    targets = jax.random.randint(key, (clients, samples), 0, 10)
    params = network.init(key, inputs[0, :1])
    optimizer = optax.sgd(LEARNING_RATE)

    def loss(params: Any, x: Any, y: Any) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(
            network.apply(params, x), y
        ).mean()

    def one_client(key: Any, x: Any, y: Any) -> Any:
        order = jax.random.permutation(key, samples).reshape(-1, BATCH)

        def step(carry: Any, rows: Any) -> Any:
            params, state = carry
            grads = jax.grad(loss)(params, x[rows], y[rows])
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(params, updates), state), None

        (trained, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), order)
        return jax.tree.map(jnp.subtract, trained, params)

    args = (jax.random.split(key, clients), inputs, targets)
    start = time.perf_counter()
    compiled = jax.jit(jax.vmap(one_client)).lower(*args).compile()
    compile_seconds = time.perf_counter() - start
    found = workloads.measure(lambda: jax.block_until_ready(compiled(*args)), repeats)
    rate = clients * samples / found["median"]
    return {**found, "compile": compile_seconds, "rate": rate}


if __name__ == "__main__":
    workloads.main({"train": train})
