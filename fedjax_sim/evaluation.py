"""Evaluation of several systems, inside the compiled round."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap

from fedjax_sim import metrics
from fedjax_sim.cohorts import Row, cohort_rows, data_attacks, join, own_data, split
from fedjax_sim.models import Model
from fedjax_sim.pytrees import unraveler
from fedjax_sim.sharding import over_devices
from fedjax_sim.state import RoundState
from fedjax_sim.training import over_rows
from fedjax_sim.types import AnyArray, Array, Clients, Params

if TYPE_CHECKING:
    from fedjax_sim.simulation import Simulation

EVALUATION_BATCH = 500
# Samples whose activations stay in a CPU's cache: convolutions take half as long.
_CPU_BATCH = 50

Trigger = Callable[[Array, Array], tuple[Array, Array, Array]]


class Scores(NamedTuple):
    """What one evaluation on the test set measures; see ``History``."""

    accuracy: AnyArray
    loss: AnyArray
    auc: AnyArray
    balanced_accuracy: AnyArray
    class_recall: AnyArray
    class_specificity: AnyArray


def batches(test: Any) -> Array:
    """``[batches, size]`` positions in the test set; those past its end are padding."""
    count = test.targets.shape[0]
    size = min(EVALUATION_BATCH, count)
    if jax.default_backend() == "cpu":
        size = min(size, _CPU_BATCH)
    return jnp.arange(-(-count // size) * size).reshape(-1, size)


def in_batches(
    f: Callable[[Params, Array, Array], Any], num_devices: int
) -> Callable[[Params, Any], Any]:
    """``f(params, inputs, targets)`` of the test set, a fixed number at a time.

    What it returns has a leading sample axis, of the whole test set in the end.
    """

    def part(shared: tuple[Params, Any], rows: Array) -> Any:
        params, test = shared

        def batch(rows: Array) -> Any:
            rows = jnp.minimum(rows, test.targets.shape[0] - 1)
            return f(params, test.inputs[rows], test.targets[rows])

        return jax.lax.map(batch, rows)

    spread = over_devices(part, num_devices)

    def whole(params: Params, test: Any) -> Any:
        count = test.targets.shape[0]
        out = spread((params, test), batches(test))
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], out)

    return whole


def make_evaluator(model: Model, num_devices: int) -> Any:
    """``(params, test) -> Scores``."""
    predict = in_batches(lambda params, x, y: model.apply(params, x), num_devices)

    @sequential_vmap
    def evaluate(params: Params, test: Any) -> Scores:
        outputs = predict(params, test)
        return Scores(
            metrics.accuracy(outputs, test.targets),
            model.loss(outputs, test.targets).mean(),
            metrics.auc(outputs, test.targets),
            metrics.balanced_accuracy(outputs, test.targets),
            metrics.class_recall(outputs, test.targets),
            metrics.class_specificity(outputs, test.targets),
        )

    return evaluate


def make_root_scores(
    model: Model, root: Clients
) -> Callable[[Params], tuple[Array, Array]]:
    """``params -> (loss, error rate)`` on the root dataset, on one device.

    A sample on which an output is not finite counts as wrong, so that nobody gains by
    breaking the model.
    """
    predict = in_batches(lambda params, x, y: model.apply(params, x), 1)

    def scores(params: Params) -> tuple[Array, Array]:
        outputs = predict(params, root)
        loss = model.loss(outputs, root.targets).mean()
        told = jnp.isfinite(outputs).all(axis=-1)
        right = jnp.where(told, metrics.correct(outputs, root.targets), 0.0)
        return loss, 1.0 - right.mean()

    return scores


def make_success(model: Model, trigger: Trigger, num_devices: int) -> Any:
    """``(params, test) -> attack success``."""

    def attack(params: Params, inputs: Array, targets: Array) -> Any:
        inputs, wanted, counts = trigger(inputs, targets)
        return model.apply(params, inputs), wanted, counts

    predict = in_batches(attack, num_devices)

    @sequential_vmap
    def success(params: Params, test: Any) -> Array:
        outputs, wanted, counts = predict(params, test)
        return metrics.attack_success(outputs, wanted, counts, test.targets.ndim == 2)

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

    evaluate = make_evaluator(first.model, first.num_devices)
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


def evaluate_clients(
    sims: Mapping[str, "Simulation"],
    states: Mapping[str, RoundState],
    params: Mapping[str, Params],
    trained: Mapping[str, Array],
    held_out: Clients,
) -> dict[str, dict[str, Array]]:
    """Loss and accuracy ``[k]`` of every system's model on its cohort's own samples.

    And, as ``own_loss`` and ``own_accuracy``, of the model that each client had after
    its local training: ``trained`` are the updates ``[k, d]`` of the cohorts.
    ``states`` are those before the round, which say who is in the cohort. An attacker
    evaluates on poisoned samples, as it trains on them.
    """
    first = next(iter(sims.values()))
    attacks = data_attacks(sims)

    def evaluate(clients: Clients, params: Params, row: Row) -> dict[str, Array]:
        data, _ = own_data(clients, row, attacks, True, first.make_samples)
        outputs = first.model.apply(params, data.inputs)

        def mean(values: Array) -> Array:
            return jnp.where(data.valid, values, 0.0).sum() / data.valid.sum()

        return {
            "loss": mean(first.model.loss(outputs, data.targets)),
            "accuracy": mean(metrics.correct(outputs, data.targets)),
        }

    def own(name: str) -> Params:
        start = states[name].params
        moved = jax.vmap(unraveler(start))(trained[name])
        return jax.tree.map(lambda p, u: p[None] + u, start, moved)

    rows = cohort_rows(sims, states)
    joined = join(rows)
    run = over_rows(evaluate, first.client_chunk, first.num_devices)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *(params[n] for n in sims))
    found = run(held_out, stacked, joined)
    own_models = jax.tree.map(lambda *x: jnp.concatenate(x), *(own(n) for n in sims))
    places = jnp.arange(len(joined.system), dtype=joined.system.dtype)
    of_own = run(held_out, own_models, joined._replace(system=places))
    found |= {f"own_{field}": values for field, values in of_own.items()}
    return split(found, rows)
