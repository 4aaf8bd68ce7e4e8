"""Local training, written for one client."""

import contextlib
import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_sim.models import Model
from fedjax_sim.registry import check_count, lookup
from fedjax_sim.types import Array, ClientData, ClientInfo, ClientUpdate, Params, PyTree

Optimizer: TypeAlias = optax.GradientTransformation | Callable[[Array], Any]


# JAX's names for how a GPU multiplies float32 matrices.
_PRECISION = {
    "float32": "highest",
    "tf32": "TF32_TF32_F32",
    "bf16": "BF16_BF16_F32",
}


def local_sgd(
    optimizer: Optimizer,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int,
    precision: str = "float32",
) -> ClientUpdate:
    """Minibatch training from the server's parameters, on the client's own samples.

    ``w <- optimizer(w, grad 1/|B| sum_{i in B} loss(w; x_i, y_i))`` for every minibatch
    B; the update is the final ``w`` minus the server's. Each epoch is a fresh
    permutation of the client's samples cut into ``ceil(size / batch_size)`` batches
    (the last may be smaller), so a client with fewer samples takes fewer steps. The
    optimizer starts afresh every round: a schedule counts local steps.

    Args:
        optimizer: any optax transformation; or a function from the round (``int32 []``,
            from 0) to one, for a rate that decays over rounds.
        epochs: passes over the client's data. Give this or ``steps``.
        steps: exact number of local steps, whatever the client's size.
        batch_size: samples per step, at most the smallest client's number of samples. A
            client that a ``ClientDefense`` leaves fewer trains on those in one step.
        precision: of the matrix products of training, on a GPU: ``"float32"``,
            ``"tf32"`` (inputs rounded to 10 bits) or ``"bf16"`` (to 7); sums are
            float32. Whether accuracy bears it is to be tried. CPUs have float32 only.

    Raises:
        ValueError: not exactly one of ``epochs`` and ``steps``, or one below 1; an
            unknown precision, or, while tracing, one that the device does not have.

    Example:
        >>> update = local_sgd(optax.sgd(0.01), epochs=5, batch_size=10)
        >>> update.num_steps(np.array([600, 595, 20])).tolist()
        [300, 300, 10]

    References:
        McMahan, Moore, Ramage, Hampson, Agueera y Arcas. Communication-Efficient
        Learning of Deep Networks from Decentralized Data. AISTATS 2017.
    """
    if (epochs is None) == (steps is None):
        raise ValueError(
            "local_sgd needs exactly one of epochs and steps; got "
            f"epochs={epochs}, steps={steps}. Drop one of them."
        )
    counts = {"epochs": epochs, "steps": steps, "batch_size": batch_size}
    for name, value in counts.items():
        if value is not None:
            check_count(f"local_sgd's {name}", value, 1)
    _check_optimizer(optimizer)
    algorithm = lookup("precision", precision, _PRECISION)

    def num_steps(sizes: np.ndarray) -> np.ndarray:
        sizes = np.asarray(sizes)
        if steps is not None:
            return np.full(sizes.shape, steps)
        return epochs * -(-sizes // batch_size)

    def validate(sizes: np.ndarray) -> None:
        smallest = int(np.min(sizes))
        if batch_size > smallest:
            raise ValueError(
                f"batch_size={batch_size} is larger than the smallest client "
                f"({smallest} samples). Lower batch_size to {smallest}, or give "
                "clients more data (dirichlet: min_size; fewer clients)."
            )

    def apply(
        model: Model,
        key: Array,
        params: Params,
        data: ClientData,
        state: PyTree,
        round: Array,
    ) -> tuple[Params, PyTree, ClientInfo]:
        transform = optimizer(round) if callable(optimizer) else optimizer
        padded = data.targets.shape[0]
        # Without padding the size, and so every loop below, is static.
        size = padded if data.mask is None else data.mask.sum(dtype=jnp.int32)
        batches = -(-size // batch_size)  # 0 where a defense left nothing: no step
        num_epochs: int | Array
        total: int | Array
        if steps is None:
            assert epochs is not None
            num_epochs, total = epochs, epochs * batches
        elif data.mask is None:
            num_epochs, total = -(-steps // batches), steps
        else:
            num_epochs = -(-steps // jnp.maximum(batches, 1))
            total = jnp.where(size > 0, steps, 0)
        whole = data.mask is None and padded % batch_size == 0
        drawn = padded if steps is None else min(padded, steps * batch_size)

        def loss_of(params: Params, rows: Array, valid: Array | None) -> Array:
            losses = model.loss(
                model.apply(params, data.inputs[rows]), data.targets[rows]
            )
            if valid is None:
                return losses.mean()
            return jnp.where(valid, losses, 0.0).sum() / valid.sum()

        def epoch(e: Array, carry: PyTree) -> PyTree:
            draws = jax.random.uniform(jax.random.fold_in(key, e), (padded,))
            if data.mask is not None:
                draws = jnp.where(data.mask, draws, jnp.inf)
            # Of equal draws both take the first; sorting all of many takes far longer.
            order = (
                jnp.argsort(draws)
                if drawn == padded
                else jax.lax.top_k(-draws, drawn)[1]
            )
            order = jnp.pad(order, (0, -drawn % batch_size))

            def step(b: Array, carry: PyTree) -> PyTree:
                params, opt_state, total_loss = carry
                start = b * batch_size
                rows = jax.lax.dynamic_slice(order, (start,), (batch_size,))
                valid = None
                if not whole:
                    valid = start + jnp.arange(batch_size) < size
                    # What a mask hides has a gradient of 0 times it: of NaN, NaN.
                    rows = jnp.where(valid, rows, order[0])
                with _products_in(algorithm):
                    loss, grads = jax.value_and_grad(loss_of)(params, rows, valid)
                updates, opt_state = transform.update(grads, opt_state, params)
                params = optax.apply_updates(params, updates)
                return params, opt_state, total_loss + loss

            left = total - e * batches
            return jax.lax.fori_loop(0, jnp.minimum(batches, left), step, carry)

        carry = (params, transform.init(params), jnp.zeros(()))
        trained, _, total_loss = jax.lax.fori_loop(0, num_epochs, epoch, carry)
        update = jax.tree.map(jnp.subtract, trained, params)
        return update, state, ClientInfo(loss=total_loss / total)

    return ClientUpdate(
        init=lambda params: (),
        apply=apply,
        num_steps=num_steps,
        with_steps=lambda n: local_sgd(
            optimizer, steps=n, batch_size=batch_size, precision=precision
        ),
        validate=validate,
    )


def _products_in(algorithm: str) -> contextlib.AbstractContextManager:
    """Matrix products traced in this context are computed by ``algorithm``."""
    if jax.default_backend() != "cpu":
        return jax.default_matmul_precision(algorithm)
    if algorithm != _PRECISION["float32"]:
        raise ValueError(
            f"local_sgd's precision {algorithm} is for GPUs, but JAX runs on the CPU, "
            'which multiplies float32 only. Pass precision="float32".'
        )
    return contextlib.nullcontext()


def _check_optimizer(optimizer: Optimizer) -> None:
    if isinstance(optimizer, optax.GradientTransformation):
        return
    if not callable(optimizer) or len(inspect.signature(optimizer).parameters) != 1:
        name = getattr(optimizer, "__name__", type(optimizer).__name__)
        raise TypeError(
            "local_sgd needs an optax transformation, such as optax.sgd(0.01), or a "
            f"function of the round that returns one; got {name}. Did you forget to "
            "call it?"
        )
