"""From a data set to clients and a root dataset."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from fedjax_sim.data.partition import Partition
from fedjax_sim.data.root import draw_root
from fedjax_sim.registry import check_count, check_type
from fedjax_sim.types import Clients, Dataset, Examples


def federate(
    data: Dataset,
    num_clients: int,
    partition: Partition,
    root_size: int = 100,
    root_bias: float | None = None,
    root_class: int = 1,
    seed: int = 0,
) -> tuple[Clients, Examples | None]:
    """Takes a root dataset out of the training set and divides the rest among clients.

    The root dataset, the clients' samples and the test set are disjoint: every training
    sample is in the root dataset, of one client, or (where the partition says so) left
    out. A client's samples are in random order.

    Args:
        data: a classification data set; only ``data.train`` is used.
        num_clients: ``N``.
        partition: how to divide, such as ``label_bias(0.5)``.
        root_size: samples of the server's root dataset; 0 for none.
        root_bias: share of ``root_class`` in the root dataset, in [0, 1]; None draws
            uniformly from all samples. See ``draw_root``.
        root_class: the class that ``root_bias`` is about.
        seed: same seed, same division. The NumPy generator is seeded with it.

    Returns:
        The ``Clients``, whose pool is the whole training set, and the root dataset as
        NumPy arrays (None with ``root_size=0``).

    Raises:
        TypeError: ``data`` or ``partition`` is something else, or a number no integer.
        ValueError: numbers that cannot be met (a root dataset larger than the data,
            more clients than samples, a client left without samples).

    Example:
        >>> from fedjax_sim.data import label_bias, load
        >>> clients, root = federate(load("digits"), 20, label_bias(0.5), root_size=50)
        >>> clients.num_clients, int(clients.sizes().sum()), root.inputs.shape
        (20, 1392, (50, 8, 8, 1))
    """
    check_type("data", data, Dataset, "Load it: fs.data.load('digits').")
    check_type("partition", partition, Partition, "Make one: fs.data.iid().")
    targets = np.asarray(data.train.targets)
    if targets.ndim != 1 or not np.issubdtype(targets.dtype, np.integer):
        raise ValueError(
            "federate divides samples by class: it needs one integer label per sample; "
            f"got targets of shape {targets.shape} and type {targets.dtype}. Use "
            "clients_from_indices with a division of your own."
        )
    num_clients = check_count("num_clients", num_clients, 1)
    if not 0 <= root_class < data.num_classes:
        raise ValueError(
            f"root_class must be a class of {data.name}, 0..{data.num_classes - 1}; "
            f"got root_class={root_class}."
        )
    root_rng, partition_rng = np.random.default_rng(seed).spawn(2)
    root_rows = draw_root(root_rng, targets, root_size, root_bias, root_class)
    rows = partition_rng.permutation(np.setdiff1d(np.arange(len(targets)), root_rows))
    if num_clients > len(rows):
        raise ValueError(
            f"every client needs a sample; got num_clients={num_clients} and "
            f"{len(rows)} training samples (with root_size={root_size} taken out). "
            "Lower num_clients."
        )
    owners = np.asarray(
        partition.assign(partition_rng, targets[rows], num_clients, data.num_classes)
    )
    if owners.shape != rows.shape or owners.min() < -1 or owners.max() >= num_clients:
        raise ValueError(
            f"partition {partition.name!r} must assign -1 or a client in "
            f"0..{num_clients - 1} to each of {len(rows)} samples; got shape "
            f"{owners.shape} with values in {owners.min()}..{owners.max()}."
        )
    kept = owners >= 0
    clients = _clients(data.train, rows[kept], owners[kept], num_clients)
    if root_size == 0:
        return clients, None
    root = Examples(data.train.inputs[root_rows], targets[root_rows])
    return clients, root


def clients_from_indices(
    examples: Examples, indices: Sequence[Sequence[int] | np.ndarray]
) -> Clients:
    """Clients with the given samples, for divisions that come with the data.

    Args:
        examples: the pool.
        indices: for every client the rows of ``examples`` it has, in their order.

    Returns:
        The ``Clients``.

    Raises:
        ValueError: a client without samples, or a row outside the pool.

    Example:
        >>> pool = Examples(np.zeros((4, 2)), np.array([0, 1, 0, 1]))
        >>> clients = clients_from_indices(pool, [[3, 1, 0], [2]])
        >>> clients.indices.tolist(), clients.sizes().tolist()
        ([[3, 1, 0], [2, 0, 0]], [3, 1])
    """
    if len(indices) == 0:
        raise ValueError("clients_from_indices needs at least one client; got none.")
    rows = np.concatenate([np.asarray(rows, dtype=int) for rows in indices])
    if rows.size and (rows.min() < 0 or rows.max() >= len(examples.targets)):
        raise ValueError(
            f"indices must be rows of the pool, 0..{len(examples.targets) - 1}; got "
            f"values in {rows.min()}..{rows.max()}."
        )
    owners = np.repeat(np.arange(len(indices)), [len(rows) for rows in indices])
    return _clients(examples, rows, owners, len(indices))


def _clients(
    pool: Examples, rows: np.ndarray, owners: np.ndarray, num_clients: int
) -> Clients:
    """The index table in which row ``rows[j]`` of the pool belongs to ``owners[j]``."""
    sizes = np.bincount(owners, minlength=num_clients)
    empty = np.flatnonzero(sizes == 0)
    if empty.size:
        raise ValueError(
            f"every client needs a sample; got none for {empty.size} of {num_clients} "
            f"clients, the first of them client {empty[0]}. Lower num_clients, or use "
            "another seed or a partition with less variable sizes."
        )
    mask = np.arange(sizes.max()) < sizes[:, None]
    indices = np.zeros(mask.shape, np.int32)
    indices[mask] = rows[np.argsort(owners, kind="stable")]
    return Clients(
        inputs=jnp.asarray(pool.inputs),
        targets=jnp.asarray(pool.targets, dtype=jnp.int32),
        indices=jnp.asarray(indices),
        mask=jnp.asarray(mask),
    )
