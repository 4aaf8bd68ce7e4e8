"""Populations of any size: clients that draw their samples from one pool."""

import jax.numpy as jnp
import numpy as np

from fedjax_sim.data.root import draw_root
from fedjax_sim.registry import check_count, check_number, check_type
from fedjax_sim.types import Clients, Dataset, Examples

# Clients that are drawn by one generator, fewer where they have many samples: what a
# client has depends on the seed and its number, not on how many clients there are.
_BLOCK, _SAMPLES = 4096, 2**20
_ALPHA = 1e100  # from which on the shares would leave the range of floating point


def populate(
    data: Dataset,
    num_clients: int,
    size: int | tuple[int, int] = 20,
    alpha: float | None = None,
    root_size: int = 100,
    seed: int = 0,
) -> tuple[Clients, Examples | None]:
    """Clients that each draw samples of their own from the training set.

    ``federate`` divides a training set, so that there are at most as many clients as
    samples. Here client i draws ``m_i`` samples independently of all others::

        m_i ~ U{low, ..., high},   p_i ~ Dir(alpha, ..., alpha),
        class c_ij ~ p_i,          sample uniform among those of class c_ij

    so that there may be any number of clients, and two of them, or one, may hold the
    same sample twice. Without ``alpha`` samples are drawn uniformly. Nothing is copied:
    a client is a row of an index table, ``5 m`` bytes for the largest ``m``. Client i
    of a seed is the same in a population of any size.

    Args:
        data: a classification data set, or a multilabel one without ``alpha``; only
            ``data.train`` is used.
        num_clients: ``N``.
        size: samples of a client, or the smallest and the largest number of them.
        alpha: concentration of the clients' class shares, positive; None for clients
            that are all alike. Towards 0 a client has one class.
        root_size: samples of the server's root dataset, taken out of the training set
            first; 0 for none.
        seed: same seed, same population. The NumPy generators are seeded with it.

    Returns:
        The ``Clients``, whose pool is the whole training set, and the root dataset as
        NumPy arrays (None with ``root_size=0``).

    Raises:
        TypeError: ``data`` is something else, or a number no integer.
        ValueError: numbers that cannot be met, or ``alpha`` with multilabel data.

    Example:
        >>> from fedjax_sim.data import load
        >>> clients, root = populate(load("digits"), 100_000, size=8, alpha=0.3)
        >>> clients.indices.shape, int(clients.sizes().sum()), root.inputs.shape
        ((100000, 8), 800000, (100, 8, 8, 1))
    """
    check_type("data", data, Dataset, "Load it: fs.data.load('digits').")
    num_clients = check_count("num_clients", num_clients, 1)
    low, high = _sizes(size)
    if alpha is not None:
        alpha = check_number("populate's alpha", alpha, low=0, high=_ALPHA)
        if data.task == "multilabel":
            raise ValueError(
                "populate's alpha goes by class: it needs one label per sample; got "
                f"the multilabel {data.name}. Leave alpha out."
            )
    check_count("seed", seed, 0)
    targets = np.asarray(data.train.targets)
    root_rng = np.random.default_rng(seed)
    root_rows = draw_root(root_rng, targets, root_size, None, 0)
    rows = np.setdiff1d(np.arange(len(targets)), root_rows)
    if not len(rows):
        raise ValueError(
            f"root_size={root_size} takes all {len(targets)} training samples of "
            f"{data.name}, and clients have nothing to draw from. Lower root_size."
        )
    by_class = rows if alpha is None else rows[np.argsort(targets[rows], kind="stable")]
    counts = np.array([len(rows)])
    if alpha is not None:
        counts = np.bincount(targets[rows])
        counts = counts[counts > 0]  # a class may have no sample here

    indices = np.empty((num_clients, high), np.int32)
    mask = np.empty((num_clients, high), bool)
    together = max(min(_BLOCK, _SAMPLES // high), 1)
    for first in range(0, num_clients, together):
        rng = np.random.default_rng((seed, first // together))
        drawn, sizes = _draw(rng, counts, alpha, low, high, together)
        block = slice(first, min(first + together, num_clients))
        count = block.stop - first
        mask[block] = np.arange(high) < sizes[:count, None]
        indices[block] = np.where(mask[block], by_class[drawn[:count]], 0)
    clients = Clients(
        inputs=jnp.asarray(data.train.inputs),
        targets=jnp.asarray(targets, dtype=jnp.int32),
        indices=jnp.asarray(indices),
        mask=jnp.asarray(mask),
    )
    if root_size == 0:
        return clients, None
    return clients, Examples(data.train.inputs[root_rows], targets[root_rows])


def _sizes(size: int | tuple[int, int]) -> tuple[int, int]:
    both = size if isinstance(size, tuple | list) else (size, size)
    if len(both) != 2:
        raise ValueError(
            "populate's size must be a number of samples, or the smallest and the "
            f"largest; got {size}."
        )
    low, high = both
    low = check_count("populate's size", low, 1)
    high = check_count("populate's size", high, 1)
    if low > high:
        raise ValueError(
            "populate's size must be a number of samples, or the smallest and the "
            f"largest; got {low} and {high}. Swap them."
        )
    return low, high


def _draw(
    rng: np.random.Generator,
    counts: np.ndarray,
    alpha: float | None,
    low: int,
    high: int,
    count: int,
) -> tuple[np.ndarray, np.ndarray]:
    """For a block of clients the places of their samples, class by class, and sizes.

    Always of a whole block, so that a client does not depend on how many there are.
    """
    sizes = rng.integers(low, high, count, endpoint=True)
    classes = np.zeros((count, high), int)
    if alpha is not None:
        shares = rng.standard_gamma(alpha, (count, len(counts)))
        # A small alpha underflows: then the client has one class.
        only = rng.integers(len(counts), size=count)
        none = shares.sum(axis=1) == 0.0
        shares[none, only[none]] = 1.0
        ends = shares.cumsum(axis=1)
        draws = rng.random((count, high)) * ends[:, -1:]
        classes = (draws[:, :, None] >= ends[:, None]).sum(axis=2)
        classes = np.minimum(classes, len(counts) - 1)
    starts = counts.cumsum() - counts
    places = rng.random((count, high)) * counts[classes]
    return starts[classes] + places.astype(int), sizes
