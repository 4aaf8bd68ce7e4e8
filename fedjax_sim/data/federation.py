"""From a data set to clients and a root dataset."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from fedjax_sim.data.partition import Partition
from fedjax_sim.data.root import draw_root
from fedjax_sim.registry import check_count, check_number, check_type
from fedjax_sim.types import Array, Clients, Dataset, Examples


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
        data: a classification data set, or a multilabel one with a partition that does
            not look at labels (``iid``); only ``data.train`` is used, and
            ``data.owners`` by a partition that goes by owner (``by_client``).
        num_clients: ``N``.
        partition: how to divide, such as ``label_bias(0.5)``.
        root_size: samples of the server's root dataset; 0 for none.
        root_bias: share of ``root_class`` in the root dataset, in [0, 1]; None draws
            uniformly from all samples, as multilabel data need it. See ``draw_root``.
        root_class: the class that ``root_bias`` is about.
        seed: same seed, same division. The NumPy generator is seeded with it.

    Returns:
        The ``Clients``, whose pool is the whole training set, and the root dataset as
        NumPy arrays (None with ``root_size=0``).

    Raises:
        TypeError: ``data`` or ``partition`` is something else, or a number no integer.
        ValueError: numbers that cannot be met (a root dataset larger than the data,
            more clients than samples, a client left without samples), a division by
            class of data that have no one class a sample, or by owner of data that do
            not say whose their samples are.

    Example:
        >>> from fedjax_sim.data import label_bias, load
        >>> clients, root = federate(load("digits"), 20, label_bias(0.5), root_size=50)
        >>> clients.num_clients, int(clients.sizes().sum()), root.inputs.shape
        (20, 1392, (50, 8, 8, 1))
    """
    check_type("data", data, Dataset, "Load it: fs.data.load('digits').")
    check_type("partition", partition, Partition, "Make one: fs.data.iid().")
    targets = np.asarray(data.train.targets)
    multilabel = data.task == "multilabel"
    num_axes = 2 if multilabel else 1
    if targets.ndim != num_axes or not np.issubdtype(targets.dtype, np.integer):
        raise ValueError(
            "federate needs one integer label per sample, or a row of 0 and 1 per "
            f"sample of a multilabel task; got task {data.task!r} with targets of "
            f"shape {targets.shape} and type {targets.dtype}. Use clients_from_indices "
            "with a division of your own."
        )
    if multilabel and (partition.by_class or root_bias is not None):
        what = f"partition {partition.name!r}" if partition.by_class else "root_bias"
        raise ValueError(
            f"{what} goes by class: it needs one label per sample; got the multilabel "
            f"{data.name} with targets of shape {targets.shape}. Use iid() without "
            "root_bias, or clients_from_indices with a division of your own."
        )
    divided_by = _owners(data) if partition.by_owner else targets
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
        partition.assign(partition_rng, divided_by[rows], num_clients, data.num_classes)
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


def hold_out(
    clients: Clients, share: float = 0.2, seed: int = 0
) -> tuple[Clients, Clients]:
    """Splits every client's samples into those it trains on and those it is tested on.

    Client i keeps ``round(share * |D_i|)`` of its samples for evaluation, drawn
    uniformly at random (half a sample is rounded to the even number). Samples keep
    their order within a client, and the pool is not copied.

    Args:
        clients: as from ``federate`` or ``clients_from_indices``.
        share: of a client's samples that is held out, in (0, 1).
        seed: same seed, same samples. The NumPy generator is seeded with it.

    Returns:
        The ``Clients`` with the samples for training, and the same clients with the
        samples held out.

    Raises:
        TypeError: ``clients`` is something else, or ``share`` no number.
        ValueError: ``share`` is outside (0, 1), a client is too small to have a sample
            on either side, or clients store a series, which is divided in time.

    Example:
        >>> pool = Examples(np.zeros((9, 2)), np.zeros(9, int))
        >>> clients = clients_from_indices(pool, [[0, 1, 2, 3, 4, 5], [6, 7, 8]])
        >>> train, held_out = hold_out(clients, share=1 / 3)
        >>> train.sizes().tolist(), held_out.sizes().tolist()
        ([4, 2], [2, 1])
    """
    check_type("clients", clients, Clients, "Make them: fs.data.federate(...).")
    share = check_number("share", share, 0, 1)
    seed = check_count("seed", seed, 0)
    mask = np.asarray(clients.mask)
    # Where a row is no sample it is padding, which holds 0, or a step of a series.
    if np.asarray(clients.indices)[~mask].any():
        raise ValueError(
            "hold_out draws samples at random; these clients store a series, of which "
            "that would leave holes. Divide it in time: federate_series(train=)."
        )
    sizes = mask.sum(axis=1)
    num_held = np.rint(share * sizes).astype(int)
    failing = np.flatnonzero((num_held == 0) | (num_held == sizes))
    if failing.size:
        first = failing[0]
        raise ValueError(
            "hold_out needs a sample to hold out and one to train on of every client; "
            f"got share={share} for {failing.size} of {len(sizes)} clients that are "
            f"too small for it, the first of them client {first} with {sizes[first]} "
            f"samples, {num_held[first]} of them to hold out. Change share, or give "
            "every client more samples."
        )
    # The samples of a client with the smallest random keys are held out.
    keys = np.random.default_rng(seed).random(mask.shape)
    order = np.where(mask, keys, 1.0).argsort(axis=1)  # padding last
    held = np.empty_like(mask)
    np.put_along_axis(held, order, np.arange(mask.shape[1]) < num_held[:, None], axis=1)
    rows = np.asarray(clients.indices)
    train = index_table(rows[mask & ~held], sizes - num_held)
    held_out = index_table(rows[held], num_held)
    inputs, targets = clients.inputs, clients.targets
    return Clients(inputs, targets, *train), Clients(inputs, targets, *held_out)


def _owners(data: Dataset) -> np.ndarray:
    """Whose each training sample is, for a partition that goes by it."""
    if data.owners is None:
        raise ValueError(
            f"{data.name} does not say whose its samples are (owners is None), so that "
            "nothing can be divided by owner. Use iid(), dirichlet(alpha) or another "
            "partition, or data that come divided, such as femnist."
        )
    owners, shape = np.asarray(data.owners), np.shape(data.train.targets)[:1]
    if owners.shape != shape or not np.issubdtype(owners.dtype, np.integer):
        raise ValueError(
            f"owners of {data.name} must be integers of shape {shape}, one for each "
            f"training sample; got shape {owners.shape} and type {owners.dtype}. Keep "
            "the owners of the samples you keep."
        )
    return owners


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
    indices, mask = index_table(rows[np.argsort(owners, kind="stable")], sizes)
    return Clients(
        inputs=jnp.asarray(pool.inputs),
        targets=jnp.asarray(pool.targets, dtype=jnp.int32),
        indices=indices,
        mask=mask,
    )


def index_table(rows: np.ndarray, sizes: np.ndarray) -> tuple[Array, Array]:
    """``indices`` and ``mask`` of ``Clients`` from the rows of one after the other."""
    mask = np.arange(sizes.max()) < sizes[:, None]
    indices = np.zeros(mask.shape, np.int32)
    indices[mask] = rows
    return jnp.asarray(indices), jnp.asarray(mask)
