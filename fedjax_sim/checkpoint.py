"""Checkpoints of a run and the final model, with orbax.

A checkpoint holds every system's ``RoundState`` and the history so far. It is written
to a temporary folder and renamed, so a killed process leaves the one before it whole.
Several processes that run one simulation write and read it together, all of them; what
some wrote any other number may read.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import (
    NamedSharding,
    PartitionSpec,
    Sharding,
    SingleDeviceSharding,
)
from orbax.checkpoint import v1 as ocp

from fedjax_sim.sharding import device_mesh, is_key
from fedjax_sim.types import AnyArray, Params, PyTree

KEEP = 2


def manifest(tree: PyTree) -> dict[str, str]:
    """Path -> shape and type of every array, to tell *why* a checkpoint does not fit.

    Example:
        >>> manifest({"w": np.zeros((2, 3), np.float32)})
        {"['w']": 'float32[2,3]'}
    """
    return {
        jax.tree_util.keystr(path): f"{x.dtype}[{','.join(map(str, x.shape))}]"
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def save(directory: Path, round: int, tree: PyTree) -> None:
    """Writes ``tree`` as the checkpoint of ``round``; drops all but the last two."""
    with ocp.training.Checkpointer(
        directory.absolute(),
        preservation_policy=ocp.training.preservation_policies.LatestN(KEEP),
        cleanup_tmp_directories=True,
    ) as checkpointer:
        checkpointer.save(
            round, tree, custom_metadata={"manifest": manifest(tree)}, overwrite=True
        )


def _on_device(x: AnyArray) -> jax.ShapeDtypeStruct:
    where: Sharding = SingleDeviceSharding(jax.devices()[0])
    if jax.process_count() > 1:  # which read it together
        where = NamedSharding(device_mesh(jax.device_count()), PartitionSpec())
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def _uncommitted(x: jax.Array) -> jax.Array:
    """The array, not bound to its device: programs are compiled anew for bound ones."""
    if is_key(x):
        data = jnp.array(np.asarray(jax.random.key_data(x)))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    return jnp.array(np.asarray(x))


def latest_round(directory: Path) -> int | None:
    """The last round that was saved whole, or None."""
    if not directory.is_dir():
        return None
    with ocp.training.Checkpointer(directory.absolute()) as checkpointer:
        latest = checkpointer.latest
    return None if latest is None else int(latest.step)


def load(directory: Path, round: int, template: Callable[[int], PyTree]) -> PyTree:
    """The checkpoint of ``round``.

    Args:
        directory: where ``save`` wrote.
        round: as from ``latest_round``.
        template: ``round -> pytree`` of arrays or ``jax.ShapeDtypeStruct``: what the
            checkpoint must look like.

    Raises:
        ValueError: it is unreadable, or not what ``template`` expects.
    """
    expected = template(round)
    where = directory / str(round)
    try:
        with ocp.training.Checkpointer(directory.absolute()) as checkpointer:
            metadata = checkpointer.metadata(round).custom_metadata
            found = (metadata or {})["manifest"]
            if found == manifest(expected):
                loaded = checkpointer.load(round, jax.tree.map(_on_device, expected))
                return jax.tree.map(_uncommitted, loaded)
    except Exception as error:
        raise ValueError(
            f"the checkpoint {where} cannot be read ({type(error).__name__}: "
            f"{str(error)[:200]}). Delete that folder to resume from the "
            "checkpoint before it, or start again in another --out."
        ) from error
    want = manifest(expected)
    differing = sorted(k for k in want | found if want.get(k) != found.get(k))
    key = differing[0]
    raise ValueError(
        f"the checkpoint {where} is not of this run: {len(differing)} arrays differ, "
        f"the first is {key}: expected {want.get(key)}, found {found.get(key)}. Resume "
        "with the program and options that wrote it."
    )


def save_model(run: Path, params: dict[str, Params]) -> None:
    """Writes the final parameters of every system to ``run/model``."""
    # As NumPy arrays, so that they load on any machine without asking for devices.
    ocp.save(run.absolute() / "model", jax.tree.map(np.asarray, params), overwrite=True)


def load_model(run: Path | str, system: str) -> Params:
    """The final parameters of one system of a finished run, as NumPy arrays.

    Args:
        run: the run directory.
        system: as in ``summary.json``; several seeds are stacked on a leading axis.

    Raises:
        ValueError: no such run or system.
    """
    path = Path(run).absolute() / "model"
    if not path.is_dir():
        raise ValueError(f"{path} does not exist: {run} holds no finished run.")
    params: Any = ocp.load(path)
    if system not in params:
        raise ValueError(f"{run} has no system {system!r}; it has {sorted(params)}.")
    return jax.tree.map(np.asarray, params[system])
