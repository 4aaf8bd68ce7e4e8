"""Evaluation of several systems on the test set, inside the compiled round."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap

from fedjax_sim.metrics import count_by_class, rate
from fedjax_sim.models import Model
from fedjax_sim.sharding import over_devices
from fedjax_sim.types import AnyArray, Array, Params

if TYPE_CHECKING:
    from fedjax_sim.simulation import Simulation

EVALUATION_BATCH = 500

Trigger = Callable[[Array, Array], tuple[Array, Array, Array]]


class Scores(NamedTuple):
    """What one evaluation measures; see ``History``."""

    accuracy: AnyArray
    loss: AnyArray
    class_recall: AnyArray


def batches(test: Any) -> Array:
    """``[batches, size]`` positions in the test set; those past its end are padding."""
    count = test.targets.shape[0]
    size = min(EVALUATION_BATCH, count)
    return jnp.arange(-(-count // size) * size).reshape(-1, size)


def make_evaluator(model: Model, num_classes: int, num_devices: int) -> Any:
    """``(params, test) -> Scores``, a fixed number of samples at a time."""

    def measure(shared: tuple[Params, Any], rows: Array) -> Any:
        params, test = shared
        count = test.targets.shape[0]

        def batch(rows: Array) -> tuple[Array, Array, Array, Array]:
            valid, rows = rows < count, jnp.minimum(rows, count - 1)
            outputs, targets = (
                model.apply(params, test.inputs[rows]),
                test.targets[rows],
            )
            correct = jnp.where(valid, outputs.argmax(axis=-1) == targets, False)
            return (
                correct.sum(),
                jnp.where(valid, model.loss(outputs, targets), 0.0).sum(),
                count_by_class(correct, targets, num_classes),
                count_by_class(valid, targets, num_classes),
            )

        return jax.lax.map(batch, rows)

    spread = over_devices(measure, num_devices)

    @sequential_vmap
    def evaluate(params: Params, test: Any) -> Scores:
        count = test.targets.shape[0]
        correct, loss, hits, totals = spread((params, test), batches(test))
        return Scores(
            correct.sum() / count,
            loss.sum() / count,
            rate(hits.sum(axis=0), totals.sum(axis=0)),
        )

    return evaluate


def make_success(model: Model, trigger: Trigger, num_devices: int) -> Any:
    """``(params, test) -> attack success``, a fixed number of samples at a time."""

    def measure(shared: tuple[Params, Any], rows: Array) -> tuple[Array, Array]:
        params, test = shared
        count = test.targets.shape[0]

        def batch(rows: Array) -> tuple[Array, Array]:
            valid, rows = rows < count, jnp.minimum(rows, count - 1)
            inputs, wanted, counts = trigger(test.inputs[rows], test.targets[rows])
            counts = valid & counts
            hit = counts & (model.apply(params, inputs).argmax(axis=-1) == wanted)
            return hit.sum(dtype=jnp.int32), counts.sum(dtype=jnp.int32)

        return jax.lax.map(batch, rows)

    spread = over_devices(measure, num_devices)

    @sequential_vmap
    def success(params: Params, test: Any) -> Array:
        hits, totals = spread((params, test), batches(test))
        return rate(hits.sum(), totals.sum())

    return success


def evaluate_systems(
    sims: Mapping[str, "Simulation"], params: Mapping[str, Params], test: Any
) -> dict[str, tuple[Scores, Array]]:
    """Scores and attack success of every system.

    One compiled pass over the test set serves all systems; and one for each distinct
    trigger the systems attacked with it.
    """
    first = next(iter(sims.values()))

    def stack(names: list[str]) -> Params:
        return jax.tree.map(lambda *x: jnp.stack(x), *(params[n] for n in names))

    evaluate = make_evaluator(first.model, first.num_classes, first.num_devices)
    scores = jax.lax.map(lambda p: evaluate(p, test), stack(list(sims)))
    success = dict.fromkeys(sims, jnp.full((), jnp.nan, jnp.float32))
    systems_of: dict[Trigger, list[str]] = {}
    for name, sim in sims.items():
        if sim.data_attack is not None and sim.data_attack.trigger is not None:
            systems_of.setdefault(sim.data_attack.trigger, []).append(name)
    for trigger, names in systems_of.items():
        measure = make_success(first.model, trigger, first.num_devices)
        found = jax.lax.map(lambda p, m=measure: m(p, test), stack(names))
        success |= {name: found[i] for i, name in enumerate(names)}
    return {
        name: (jax.tree.map(lambda x, i=i: x[i], scores), success[name])
        for i, name in enumerate(sims)
    }
