"""What detectors learn before the first round: how models look that nobody crafted.

The server trains the model alone, on its root dataset, and keeps some coordinates of
what it has after each local training. A network learns these vectors; in a round it is
asked how well it knows each client's.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_sim.aggregators.common import assumed_counts, check_cohort
from fedjax_sim.aggregators.dnc import draw_columns
from fedjax_sim.aggregators.reaggregation import (
    BASES,
    aggregate_kept,
    base_distances,
    check_base,
    validate_base,
)
from fedjax_sim.distances import lowest
from fedjax_sim.pytrees import participants, ravel, unraveler
from fedjax_sim.registry import check_count, check_number, lookup, require
from fedjax_sim.types import (
    Aggregator,
    AggregatorInfo,
    Array,
    Params,
    PyTree,
    RoundContext,
    Train,
)

SPACES = {"weights": "models, w + u", "update": "updates, u"}
# A coordinate that hardly moved in pre-training is divided by this part of the mean
# standard deviation, so that it does not outweigh all others.
LEAST_SCALE = 0.1


class View(NamedTuple):
    """What a detector sees of a vector ``[d]``: some coordinates, standardised.

    Attributes:
        columns: ``int32 [c]``.
        mean: ``[c]``, of the pre-training vectors.
        scale: ``[c]``, their standard deviation, or ``LEAST_SCALE`` of its mean.
    """

    columns: Array
    mean: Array
    scale: Array


def check_pretraining(
    rule: str,
    max_byzantine: int,
    base: str,
    space: str,
    reject: str,
    rejects: dict[str, str],
    **counts: int,
) -> None:
    """Checks the options that the detectors have in common.

    Raises:
        ValueError: one of them is out of range or unknown.
    """
    check_base(rule, base, max_byzantine, BASES)
    lookup(f"space of {rule}", space, SPACES)
    lookup(f"reject of {rule}", reject, rejects)
    for name, value in counts.items():
        # One vector has no spread.
        check_count(f"{rule}'s {name}", value, 2 if name == "num_snapshots" else 1)


def detector(
    rule: str,
    max_byzantine: int,
    base: str,
    space: str,
    state_type: Any,
    pretrain: Callable[[Params, Array, Train], PyTree],
    judge: Callable[..., tuple[Array, Array]],
    needs: frozenset[str] = frozenset(),
) -> Aggregator:
    """The rule that removes whom a learned network does not know.

    Args:
        rule: its name.
        max_byzantine: f.
        base: for those who are left.
        space: what the network looks at.
        state_type: of what was learned, which has a ``view``.
        pretrain: as of an ``Aggregator``.
        judge: ``(state, x [n, c], mask, f, context) -> (scores [n], removed bool
            [n])``; f is what is left of it where rows were left out.
        needs: context fields besides those of the space.
    """
    untrained = (
        f"{rule} has to be pre-trained: its state comes from pretrain(params, key, "
        "train), which Simulation calls with the server's root dataset, and not from "
        "init."
    )

    def init(params: Params, num_clients: int) -> PyTree:
        raise ValueError(untrained)

    def validate(cohort_size: int) -> None:
        validate_base(rule, base, cohort_size, max_byzantine)
        # Whoever is removed, somebody is left.
        check_cohort(rule, cohort_size, max_byzantine, factor=1, more=1)

    def apply(
        updates: PyTree, state: Any, context: RoundContext
    ) -> tuple[PyTree, PyTree, AggregatorInfo]:
        if not isinstance(state, state_type):
            raise ValueError(untrained)
        U, mask, unravel = participants(updates, context, zero=False)
        validate(len(U))
        _, f = assumed_counts(mask, max_byzantine)
        x = look(rule, state.view, U, mask, context, space)
        scores, removed = judge(state, x, mask, f, context)
        keep = mask & ~removed
        distances = base_distances(base, U, mask)
        aggregate, weights = aggregate_kept(
            base, U, keep, max_byzantine, distances, context
        )
        info = AggregatorInfo(weights, ~keep, jnp.where(mask, scores, jnp.inf))
        return unravel(aggregate), state, info

    needs |= {"params"} if space == "weights" else set()
    return Aggregator(init, apply, validate, needs, rule, pretrain)


def snapshots(
    params: Params, key: Array, train: Train, count: int, columns: Array, space: str
) -> Array:
    """``[count, c]``: some coordinates after each of ``count`` local trainings.

    One training starts where the last one ended. In ``update`` space: what each added.
    """
    unravel = unraveler(params)

    def one(w: Array, key: Array) -> tuple[Array, Array]:
        update = ravel(train(key, unravel(w)))
        seen = update if space == "update" else w + update
        return w + update, seen[columns]

    return jax.lax.scan(one, ravel(params), jax.random.split(key, count))[1]


def learn_view(
    params: Params,
    key: Array,
    train: Train,
    num_snapshots: int,
    num_coordinates: int,
    space: str,
) -> tuple[View, Array]:
    """The view, and the pre-training vectors ``[num_snapshots, c]`` as it shows them.

    The coordinates are drawn from the key, or all where there are no more.
    """
    draw, run = jax.random.split(key)
    size = len(ravel(params))
    columns = jnp.arange(size)
    if num_coordinates < size:
        columns = jnp.sort(draw_columns(draw, size, num_coordinates))
    found = snapshots(params, run, train, num_snapshots, columns, space)
    spread = found.std(axis=0)
    least = LEAST_SCALE * spread.mean()
    scale = jnp.maximum(spread, jnp.where(least > 0, least, 1.0))
    view = View(columns, found.mean(axis=0), scale)
    return view, (found - view.mean[None]) / view.scale[None]


def look(
    rule: str, view: View, U: Array, mask: Array, context: RoundContext, space: str
) -> Array:
    """The view ``[n, c]`` of every client's model or update; 0 of who is left out."""
    seen = jnp.where(mask[:, None], U[:, view.columns], 0.0)
    if space == "weights":
        params = ravel(require(rule, context, "params"))
        seen = seen + params[view.columns][None]
    seen = (seen - view.mean[None]) / view.scale[None]
    # So far away that its square would leave float32: as far as can be told.
    return jnp.where(mask[:, None], jnp.clip(seen, -1e15, 1e15), 0.0)


def fit(
    loss: Callable[[PyTree, Array], Array],
    params: Any,
    key: Array,
    num_steps: int,
    learning_rate: float,
) -> Any:
    """``num_steps`` steps of Adam on ``loss(params, key)``; every step has its key."""
    optimizer = optax.adam(learning_rate)

    def step(carry: Any, key: Array) -> tuple[Any, None]:
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, key), state, params)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(key, num_steps)
    return jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0]


def highest(scores: Array, mask: Array, count: Array | int) -> Array:
    """``bool [n]``: the ``count`` highest participants, ties to the lowest index."""
    return lowest(jnp.where(mask, -scores, jnp.inf), count)


def finite_scores(scores: Array) -> Array:
    """Scores that sums can be taken of; what is no number counts as the highest."""
    cap = jnp.finfo(scores.dtype).max / (4 * len(scores))
    return jnp.clip(jnp.where(jnp.isnan(scores), cap, scores), -cap, cap)


def check_rate(rule: str, learning_rate: float) -> float:
    """A positive learning rate."""
    return check_number(f"{rule}'s learning_rate", learning_rate, low=0)
