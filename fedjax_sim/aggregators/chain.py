"""Rules with steps before them: nearest neighbour mixing, bucketing, clipping."""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_sim.aggregators.common import weighted_sum
from fedjax_sim.pytrees import participants, ravel, unraveler
from fedjax_sim.registry import check_type
from fedjax_sim.types import (
    Aggregator,
    AggregatorInfo,
    Array,
    Params,
    PreAggregator,
    PyTree,
    RoundContext,
    Train,
)


def chain(*steps: PreAggregator | Aggregator) -> Aggregator:
    """A rule after steps that mix, group or shorten the updates.

    ``aggregate = rule(pre_m(... pre_1(U)))``

    Assumptions: those of every step on the rows it sees: after ``bucketing(s)`` these
    are ``ceil(n / s)``. The f a step assumes is its own and is not passed on. Updates
    are flat vectors to all of them.

    Args:
        *steps: pre-aggregators in the order they are applied, then the rule.

    Returns:
        An ``Aggregator`` with the rule's memory, named as in ``"nnm+krum"``. What the
        rule says of its rows goes back to the clients by their shares in these rows:
        weights are summed; a client is flagged if every row with a part of it is, so
        that a detector behind ``nnm`` or ``bucketing`` flags few; its
        score is the lowest of these rows; details are averaged. A row's
        ``num_samples`` is the data behind it, each client's being divided among its
        rows; where every row belongs to a client it is the client's own.

    Raises:
        TypeError: a step is neither a pre-aggregator nor a rule.
        ValueError: the last step is no rule, or another one is; the rule remembers
            clients but rows no longer belong to one; from ``validate``, where a step
            cannot work on the number of rows it sees.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedjax_sim import aggregators as rules
        >>> rule = chain(rules.nnm(max_byzantine=1), rules.median())
        >>> U = jnp.array([[1.0], [2.0], [3.0], [90.0]])
        >>> rule.name, rule.apply(U, rule.init(U[0], 4), RoundContext())[0].tolist()
        ('nnm+median', [2.0])

    References:
        Allouah, Farhadkhani, Guerraoui, Gupta, Pinot, Stephan, "Fixing by mixing: a
        recipe for optimal Byzantine ML under heterogeneity", AISTATS 2023.
    """
    *pres, rule = _checked(steps)
    if not pres:
        return rule
    name = "+".join(step.name for step in steps)
    per_client = all(pre.per_client for pre in pres)
    if not per_client and _remembers_clients(rule):
        (grouping, *_) = (pre.name for pre in pres if not pre.per_client)
        raise ValueError(
            f"{rule.name} needs to know which client a row belongs to, but after "
            f"{grouping} a row belongs to several. Leave {grouping} out of {name}, or "
            "use a rule that does not."
        )

    def init(params: Params, num_clients: int) -> PyTree:
        return rule.init(ravel(params), num_clients)

    def pretrain(params: Params, key: Array, train: Train) -> PyTree:
        unravel = unraveler(params)

        def train_flat(key: Array, vector: Array) -> Array:
            return ravel(train(key, unravel(vector)))

        assert rule.pretrain is not None
        return rule.pretrain(ravel(params), key, train_flat)

    def validate(cohort_size: int) -> None:
        num_rows = cohort_size
        for i, step in enumerate(steps, start=1):
            try:
                step.validate(num_rows)
            except ValueError as error:
                raise ValueError(
                    f"{name} cannot work on a cohort of {cohort_size}: step {i}, "
                    f"{step.name}, sees {num_rows} rows. {error}"
                ) from None
            if isinstance(step, PreAggregator):
                num_rows = step.num_rows(num_rows)

    def apply(
        updates: PyTree, state: PyTree, context: RoundContext
    ) -> tuple[PyTree, PyTree, AggregatorInfo]:
        rows, mask, unravel = participants(updates, context, zero=False)
        validate(len(rows))
        seen = _flat(context)._replace(mask=mask)
        shares = jnp.diag(mask.astype(jnp.float32))
        for i, pre in enumerate(pres):
            rows, mixing, mask = pre.apply(rows, mask, _with_key(seen, context, i))
            shares = weighted_sum(mixing, shares)
            seen = seen._replace(mask=mask)
            if not pre.per_client:
                samples = _divided(mixing, seen.num_samples)
                seen = seen._replace(client_ids=None, num_samples=samples)
        seen = _with_key(seen, context, len(pres))
        aggregate, state, info = rule.apply(rows, state, seen)
        return unravel(aggregate), state, _of_clients(info, shares)

    needs = frozenset[str]().union(*(step.needs for step in steps))
    learns = None if rule.pretrain is None else pretrain
    return Aggregator(init, apply, validate, needs, name, learns)


def _checked(steps: tuple) -> tuple:
    """The steps.

    Raises:
        TypeError, ValueError: they are not pre-aggregators and then one rule.
    """
    if not steps:
        raise ValueError("chain needs a rule as its last step; got no step at all.")
    for i, step in enumerate(steps, start=1):
        if not isinstance(step, Aggregator):
            hint = "Call the factory, as in nnm(max_byzantine=2)."
            check_type(f"step {i} of chain", step, PreAggregator, hint)
        elif i < len(steps):
            raise ValueError(
                f"chain takes one rule, as its last step; got {step.name} as step {i} "
                f"of {len(steps)}."
            )
    if not isinstance(steps[-1], Aggregator):
        raise ValueError(
            "chain needs a rule as its last step; got the pre-aggregator "
            f"{steps[-1].name}. Add a rule, as in chain({steps[-1].name}(...), "
            "median())."
        )
    return steps


def _remembers_clients(rule: Aggregator) -> bool:
    """Whether the rule knows its rows by client: by id, or by a memory of all N."""

    def memory(num_clients: int) -> list[tuple[int, ...]]:
        if rule.pretrain is not None:  # of what a server trains alone
            return []
        state = jax.eval_shape(lambda: rule.init(jnp.zeros(1), num_clients))
        return [leaf.shape for leaf in jax.tree.leaves(state)]

    return "client_ids" in rule.needs or memory(2) != memory(3)


def _flat(context: RoundContext) -> RoundContext:
    """The context of a model whose parameters are one vector, as the rows are."""
    fields = ("params", "previous_params", "previous_aggregate", "root_update")
    vectors: dict[str, Any] = {}
    for field in fields:
        tree = getattr(context, field)
        vectors[field] = None if tree is None else ravel(tree)
    params, scores = context.params, context.root_scores
    if scores is not None and params is not None:
        unravel = unraveler(params)
        vectors["root_scores"] = lambda vector: scores(unravel(vector))
    return context._replace(**vectors)


def _with_key(seen: RoundContext, context: RoundContext, step: int) -> RoundContext:
    """With a step's own key, if there is any."""
    if context.key is None:
        return seen
    return seen._replace(key=jax.random.fold_in(context.key, step))


def _divided(mixing: Array, num_samples: Array | None) -> Array | None:
    """``[r]``: samples behind each row, where a client's are divided by its shares."""
    if num_samples is None:
        return None
    total = mixing.sum(axis=0)
    per_share = num_samples.astype(jnp.float32) / jnp.where(total > 0, total, 1.0)
    return weighted_sum(mixing, per_share)


def _of_clients(info: AggregatorInfo, shares: Array) -> AggregatorInfo:
    """What was said of rows, said of the clients with ``shares [r, k]`` in them."""
    has = shares > 0
    total = shares.sum(axis=0)

    def average(detail: Array) -> Array:
        parts = jnp.where(has, shares * detail[:, None].astype(jnp.float32), 0.0)
        return parts.sum(axis=0) / jnp.where(total > 0, total, 1.0)

    return AggregatorInfo(
        weights=weighted_sum(info.weights, shares),
        flagged=jnp.all(info.flagged[:, None] | ~has, axis=0),
        scores=jnp.where(has, info.scores[:, None], jnp.inf).min(axis=0),
        details={name: average(detail) for name, detail in info.details.items()},
    )
