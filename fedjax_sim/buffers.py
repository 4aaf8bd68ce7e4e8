"""The buffers that a traced program will need, told before it is compiled."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.extend import core

from fedjax_sim.sharding import size_in_bytes


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Computed where they are read, without a buffer of their own.
_FUSED = _names(
    """abs add add_any and atan2 bitcast_convert_type broadcast_in_dim cbrt ceil clamp
    convert_element_type copy cos cosh digamma div dynamic_slice eq erf erf_inv exp exp2
    expm1 floor gather ge gt integer_pow iota is_finite le lgamma log log1p logistic lt
    max min mul ne neg nextafter not or pad population_count pow random_bits
    random_fold_in random_seed random_unwrap random_wrap real rem rev round rsqrt
    select_n shift_left shift_right_arithmetic shift_right_logical sign sin sinh slice
    sqrt square stop_gradient sub tan tanh threefry2x32 xor"""
)
_ARITHMETIC = _names(
    """add broadcast_in_dim div exp log max min mul neg reshape rsqrt sqrt square sub"""
)
# The memory of their argument under another shape.
_ALIASES = _names("reshape squeeze expand_dims transpose optimization_barrier")
# Read value by value, so that their arguments may be fused into them.
_REDUCTIONS = _names(
    """argmax argmin concatenate reduce reduce_and reduce_max reduce_min reduce_or
    reduce_prod reduce_sum reduce_xor"""
)
# Written over their first argument, where nobody needs it any more.
_IN_PLACE = _names("dynamic_update_slice scatter scatter-add scatter_add scatter-mul")
_LOOPS = _names("scan while")


def peak_of(jaxpr: core.ClosedJaxpr, idle: bool = False) -> int:
    """Bytes of buffers, besides its arguments, that a program holds at most.

    An estimate of what XLA will allocate. Operations run in the order in which they are
    written; a buffer lasts from the one that fills it to the last that reads it. What
    is computed value by value has no buffer, unless it is returned or read by a matrix
    product, a loop or the like.

    Args:
        jaxpr: of the program, as ``jax.make_jaxpr(f)(*args)`` returns it; arguments may
            be ``jax.ShapeDtypeStruct``.
        idle: on a device that has no turn wherever devices take turns (a branch chosen
            by the device's own number).

    Example:
        >>> import jax.numpy as jnp
        >>> x = jax.ShapeDtypeStruct((1000, 1000), jnp.float32)
        >>> peak_of(jax.make_jaxpr(lambda x: jnp.exp(2 * x).sum())(x))
        4
        >>> peak_of(jax.make_jaxpr(lambda x: (jnp.exp(x) @ x).sum())(x))
        8000000
    """
    return _peak(jaxpr.jaxpr, set(range(len(jaxpr.jaxpr.outvars))), (), idle)


@dataclasses.dataclass
class _Step:
    """One operation, with calls of functions written out."""

    name: str
    params: dict[str, Any]
    inputs: list[Any]  # variables; literals are left out, as None
    outputs: list[Any]


class _Value:
    """A variable of the program written out; the same object wherever it is named."""

    def __init__(self, aval: Any) -> None:
        self.bytes = size_in_bytes(aval)


def _peak(jaxpr: Any, kept: set[int], loose: Sequence[int], idle: bool) -> int:
    """What is held at most, besides the arguments.

    ``kept`` are the places of the results that need a buffer of their own, ``loose``
    those of the arguments whose buffers others may take over after their last use.
    """
    named = {v: _Value(v.aval) for v in (*jaxpr.invars, *jaxpr.constvars)}
    given = set(named.values())
    steps = list(_written_out(jaxpr, named))
    results = [None if _is_literal(v) else named[v] for v in jaxpr.outvars]
    wanted = {results[i] for i in kept if results[i] is not None}

    # From the end: which values are read as whole buffers.
    whole = set(wanted)
    if jax.default_backend() == "cpu":
        whole |= _around_sums(steps)
    for step in reversed(steps):
        if step.name in _ALIASES:
            if step.outputs[0] in whole:
                whole.add(step.inputs[0])
        elif step.name not in _FUSED and step.name not in _REDUCTIONS:
            carried = _carried(step)
            whole.update(x for i, x in enumerate(step.inputs) if i not in carried)
    whole.discard(None)

    # Which buffers the values without one are computed from.
    sources: dict[Any, frozenset[Any]] = {v: frozenset([v]) for v in given}
    reads: list[frozenset[Any]] = []
    for step in steps:
        read = frozenset().union(*(sources.get(x, frozenset()) for x in step.inputs))
        reads.append(read)
        for x in step.outputs:
            fused = step.name in _FUSED and x not in whole
            sources[x] = read if fused or step.name in _ALIASES else frozenset([x])
    last: dict[Any, int] = {}
    for i, read in enumerate(reads):
        last.update(dict.fromkeys(read, i))
    for x in wanted:
        last.update(dict.fromkeys(sources.get(x, ()), len(steps)))

    of_device: set[Any] = set()  # what follows from a device's own number
    held = {named[jaxpr.invars[i]] for i in loose}
    peak = now = start = sum(x.bytes for x in held)
    for i, step in enumerate(steps):
        if step.name == "axis_index" or of_device.intersection(step.inputs):
            of_device.update(step.outputs)
        new = [x for x in step.outputs if x in sources[x] and x not in given]
        ending = {x for x in reads[i] if last[x] == i and x in held}
        if step.name in _IN_PLACE or step.name in _LOOPS:
            # They go on in the buffers of what they replace.
            over = set().union(
                *(sources.get(step.inputs[j], frozenset()) for j in _carried(step))
            )
            over &= ending
        elif step.name in _FUSED and new:
            # Value by value, an operand of the same size gives way.
            over = {x for x in ending if x.bytes == new[0].bytes}
            over = set(list(over)[:1])
        else:
            over = set()
        now -= sum(x.bytes for x in over)
        held -= over
        ending -= over
        for x in new:
            held.add(x)
            now += x.bytes
        turn = step.name == "cond" and step.inputs[0] in of_device
        peak = max(peak, now + _inner(step, idle, turn))
        for x in ending | {x for x in new if x not in last}:
            held.discard(x)
            now -= x.bytes
    return peak - start


def _written_out(jaxpr: Any, named: dict[Any, _Value]) -> Iterator[_Step]:
    """The operations of a program, those of functions it calls in their place."""

    def value(v: Any) -> _Value | None:
        return None if _is_literal(v) else named[v]

    for eqn in jaxpr.eqns:
        inner = _called(eqn)
        if inner is None:
            for v in eqn.outvars:
                named[v] = _Value(v.aval)
            yield _Step(
                eqn.primitive.name,
                eqn.params,
                [value(v) for v in eqn.invars],
                [named[v] for v in eqn.outvars],
            )
            continue
        own: dict[Any, Any] = {v: _Value(v.aval) for v in inner.constvars}
        for v, outer in zip(inner.invars, eqn.invars[-len(inner.invars) :]):
            own[v] = value(outer) or _Value(v.aval)
        yield from _written_out(inner, own)
        for v, within in zip(eqn.outvars, inner.outvars):
            named[v] = _Value(v.aval) if _is_literal(within) else own[within]


def _around_sums(steps: list[_Step]) -> set[Any]:
    """What a CPU's library of sums, which knows arithmetic only, gets and leaves whole.

    That is what was chosen or compared before it is summed, and sums spread over a
    matrix before something is chosen by them.
    """
    whole: set[Any] = set()
    maker = {x: step for step in steps for x in step.outputs}
    summed: set[Any] = set()
    for step in steps:
        if step.name == "reduce_sum":
            before = maker.get(step.inputs[0])
            if before and before.name in ("select_n", "convert_element_type"):
                whole.add(step.inputs[0])
            summed.update(step.outputs)
        elif step.name in _ARITHMETIC and summed.intersection(step.inputs):
            summed.update(step.outputs)
        elif step.name in _FUSED:
            whole.update(
                x
                for x in summed.intersection(step.inputs)
                if maker[x].name == "broadcast_in_dim"
            )
    return whole


def _called(eqn: Any) -> Any:
    """The program of a call that is none of a loop or a branch."""
    if eqn.primitive.name in _LOOPS or eqn.primitive.name == "cond":
        return None
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr", "call"):
        inner = eqn.params.get(key)
        if inner is not None:
            return getattr(inner, "jaxpr", inner)
    return None


def _carried(step: _Step) -> Sequence[int]:
    """Places of the arguments that the results are written over."""
    if step.name == "scan":
        first = step.params["num_consts"]
        return range(first, first + step.params["num_carry"])
    if step.name == "while":
        first = step.params["cond_nconsts"] + step.params["body_nconsts"]
        return range(first, len(step.inputs))
    return (0,) if step.name in _IN_PLACE else ()


def _inner(step: _Step, idle: bool, turn: bool) -> int:
    """What a loop or a branch holds besides its arguments and results.

    ``turn`` says of a branch that devices take turns in it.
    """
    if step.name == "scan":
        body = step.params["jaxpr"].jaxpr
        kept = set(range(step.params["num_carry"]))
        return _peak(body, kept, _carried(step), idle)
    if step.name == "while":
        body = step.params["body_jaxpr"].jaxpr
        carried = range(step.params["body_nconsts"], len(body.invars))
        return _peak(body, set(range(len(body.outvars))), carried, idle)
    if step.name == "all_to_all" and jax.default_backend() == "cpu":
        return step.outputs[0].bytes  # cut into a part for every device
    if step.name == "cond":
        # Results are those of the branch: they are there already.
        branches = [_peak(b.jaxpr, set(), (), idle) for b in step.params["branches"]]
        return min(branches) if idle and turn else max(branches)
    return 0


def _is_literal(v: Any) -> bool:
    return isinstance(v, core.Literal)
