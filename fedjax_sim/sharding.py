"""The client axis over devices: several GPUs, or the cores of one CPU.

A client's local steps are a long chain of small operations. Two cores gain little by
sharing each of them, and nearly twice the speed by training a client each.
"""

import os
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fedjax_sim.registry import check_count
from fedjax_sim.types import PyTree

AXIS = "clients"
# Every device holds its own copy of the data and of the cohort's updates.
MOST_CORES = 8


def use_cores(count: int | None = None) -> int:
    """Makes JAX see cores of the CPU as devices, each of which trains its own clients.

    Call it before anything else that uses JAX; ``JAX_NUM_CPU_DEVICES`` in the
    environment does the same. Simulations then spread over all of them (see
    ``Simulation.num_devices``). The experiments call it themselves. Where JAX finds a
    GPU it uses that, and this makes no difference.

    Args:
        count: how many. Default: ``JAX_NUM_CPU_DEVICES``, or else the cores this
            process may use, at most 8.

    Returns:
        The number of CPU devices there are now.

    Raises:
        RuntimeError: JAX has started already, with another number of them.

    Example:
        >>> import jax
        >>> use_cores(len(jax.devices("cpu"))) == len(jax.devices("cpu"))
        True
    """
    if count is None:
        asked = jax.config.values["jax_num_cpu_devices"]
        count = asked if asked > 0 else min(usable_cores(), MOST_CORES)
    check_count("use_cores' count", count, 1)
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:
        there = len(jax.devices("cpu"))  # JAX runs, so that asking does not start it
        if there != count:
            raise RuntimeError(
                f"use_cores({count}) comes too late: JAX has started with {there} CPU "
                "device(s) and keeps them. Call it before anything that uses JAX, or "
                f"start Python with JAX_NUM_CPU_DEVICES={count}."
            ) from error
    return count


def usable_cores() -> int:
    """Cores this process may use: all of the machine's unless it was confined."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def device_mesh(num_devices: int) -> Mesh:
    """The first ``num_devices`` devices along the axis ``clients``.

    Those of this process; or of all, where several processes run one simulation.
    """
    several = jax.process_count() > 1
    devices = (jax.devices() if several else jax.local_devices())[:num_devices]
    return jax.make_mesh((num_devices,), (AXIS,), (AxisType.Auto,), devices=devices)


def replicate(tree: PyTree, num_devices: int) -> PyTree:
    """The arrays of a tree on every one of several devices; as they are, for one."""
    if num_devices == 1:
        return tree
    everywhere = NamedSharding(device_mesh(num_devices), PartitionSpec())
    if jax.process_count() == 1:
        return jax.device_put(tree, everywhere)

    def put(x: jax.Array) -> jax.Array:
        """What every process has, as one array of all of them."""
        if isinstance(x, jax.core.Tracer):
            return x  # of its shape alone
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return x
        if is_key(x):
            data, kind = put(jax.random.key_data(x)), jax.random.key_impl(x)
            return jax.random.wrap_key_data(data, impl=kind)
        own = np.asarray(x)
        return jax.make_array_from_callback(
            own.shape, everywhere, lambda part: own[part]
        )

    return jax.tree.map(put, tree)


def over_devices(
    f: Callable[[PyTree, PyTree], PyTree], num_devices: int
) -> Callable[[PyTree, PyTree], PyTree]:
    """``f(shared, rows) -> results``, where every device takes its part of the rows.

    Rows and results have a leading axis of R; result i must depend on ``shared`` and
    row i alone. Where R is not a multiple of ``num_devices`` the last row is repeated,
    and its further results are dropped. Every device ends with all results.
    """
    if num_devices == 1:
        return f

    def part(shared: PyTree, rows: PyTree) -> PyTree:
        results = f(shared, rows)
        return jax.tree.map(
            lambda x: jax.lax.all_gather(x, AXIS, axis=0, tiled=True), results
        )

    spread = jax.shard_map(
        part,
        mesh=device_mesh(num_devices),
        in_specs=(PartitionSpec(), PartitionSpec(AXIS)),
        out_specs=PartitionSpec(),
        check_vma=False,  # JAX cannot see that all_gather makes all devices equal
    )

    def run(shared: PyTree, rows: PyTree) -> PyTree:
        count = len(jax.tree.leaves(rows)[0])
        places = jnp.minimum(jnp.arange(count + -count % num_devices), count - 1)
        if len(places) > count:
            rows = jax.tree.map(lambda x: x[places], rows)
        return jax.tree.map(lambda x: x[:count], spread(shared, rows))

    return run


def on_every_device(
    f: Callable[..., PyTree], num_devices: int, layout: PyTree = None
) -> Callable[..., PyTree]:
    """``f`` run by all devices at once, which agree on its results.

    Each gets all arguments, or of some its own part, where ``layout`` says so; what a
    device does of its own it tells by ``jax.lax.axis_index(AXIS)``.
    """
    if num_devices == 1:
        return f
    return jax.shard_map(
        f,
        mesh=device_mesh(num_devices),
        in_specs=PartitionSpec() if layout is None else layout,
        out_specs=PartitionSpec(),
        check_vma=False,
    )


def share_out(
    calls: Mapping[str, Callable[..., PyTree]],
    args: Mapping[str, tuple],
    num_devices: int,
    most_sent: int,
) -> dict[str, PyTree]:
    """``{name: calls[name](*args[name])}``, each computed by one device in its turn.

    Every device ends with all results. What returns more than ``most_sent`` bytes, such
    as what a rule remembers of a million clients, every device computes by itself, in
    place.
    """
    if num_devices == 1:
        return {name: call(*args[name]) for name, call in calls.items()}
    shapes = {name: jax.eval_shape(call, *args[name]) for name, call in calls.items()}
    alone = [name for name in calls if size_in_bytes(shapes[name]) > most_sent]
    shared = [name for name in calls if name not in alone]
    turns = {name: turn % num_devices for turn, name in enumerate(shared)}
    raw_shapes = jax.tree.map(lambda x: jax.eval_shape(_raw, x), shapes)

    def part(args: Mapping[str, tuple]) -> dict[str, PyTree]:
        here = jax.lax.axis_index(AXIS)
        found, whole = {}, {}
        for name, call in calls.items():

            def compute(own: tuple, call: Callable[..., PyTree] = call) -> PyTree:
                return jax.tree.map(_raw, call(*own))

            if name in alone:
                whole[name] = compute(args[name])
                continue

            def skip(own: tuple, name: str = name) -> PyTree:
                return jax.tree.map(jnp.zeros_like, raw_shapes[name])

            mine = here == turns[name]
            found[name] = jax.lax.cond(mine, compute, skip, args[name])
        # Only now, so that no device waits for another before its own turns are over.
        return whole | {
            name: jax.tree.map(
                lambda x, turn=turns[name]: jax.lax.all_gather(x, AXIS)[turn], results
            )
            for name, results in found.items()
        }

    return jax.tree.map(
        lambda x, shape: jax.random.wrap_key_data(x) if is_key(shape) else x,
        on_every_device(part, num_devices)(args),
        shapes,
    )


def size_in_bytes(tree: PyTree) -> int:
    """Of all arrays, or their shapes, together."""
    return sum(
        x.size * (8 if is_key(x) else x.dtype.itemsize)
        for x in jax.tree.leaves(tree)
        if hasattr(x, "dtype")
    )


def is_key(x: jax.Array | jax.ShapeDtypeStruct) -> bool:
    """Whether an array holds typed PRNG keys."""
    return bool(jnp.issubdtype(x.dtype, jax.dtypes.prng_key))


def _raw(x: jax.Array) -> jax.Array:
    """The bits of a PRNG key, which no collective takes; other arrays as they are."""
    return jax.random.key_data(x) if is_key(x) else x
