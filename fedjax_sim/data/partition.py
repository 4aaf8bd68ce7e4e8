"""Dividing samples among clients: who gets which sample, by label or by owner.

A partition is a value, ``Partition(name, assign)``. ``assign`` gives every sample at
most one client, as one array, so 100,000 clients cost no more than ten.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fedjax_sim.registry import check_count

MAX_REDRAWS = 300


class Partition(NamedTuple):
    """A rule that divides samples among clients.

    Attributes:
        name: as on the command line and in the results.
        assign: ``(rng, targets int [s], num_clients, num_classes) -> int [s]``, the
            client of every sample, -1 for a sample that nobody gets. Raises ValueError
            where the rule has no meaning for these numbers.
        by_class: whether the rule looks at the label of a sample. If not, it divides
            multilabel data too, with targets ``int [s, L]``.
        by_owner: whether ``assign`` is given the owners of the samples, ``int [s]``, in
            place of their targets; then only data with owners can be divided.
    """

    name: str
    assign: Callable[[np.random.Generator, np.ndarray, int, int], np.ndarray]
    by_class: bool = True
    by_owner: bool = False


def iid() -> Partition:
    """Every client gets a uniform random sample of the data.

    ``|D_i| = s / N``, rounded up for some clients and down for the others. No sample is
    left over. Labels play no part: multilabel data are divided the same way.

    Returns:
        A ``Partition``.

    Example:
        >>> rng, targets = np.random.default_rng(0), np.zeros(10, int)
        >>> np.bincount(iid().assign(rng, targets, 4, 2)).tolist()
        [3, 3, 2, 2]

    References:
        McMahan, Moore, Ramage, Hampson and Aguera y Arcas, "Communication-Efficient
        Learning of Deep Networks from Decentralized Data", AISTATS 2017.
    """

    def assign(
        rng: np.random.Generator, targets: np.ndarray, num_clients: int, _: int
    ) -> np.ndarray:
        return rng.permutation(np.arange(len(targets)) % num_clients)

    return Partition("iid", assign, by_class=False)


def dirichlet(alpha: float, min_size: int = 10) -> Partition:
    """The samples of every class are divided in Dirichlet proportions.

    ``p_c ~ Dir_N(alpha, ..., alpha)`` for every class c; client i gets the share
    ``p_c[i]`` of the samples of class c. Redrawn until every client has at least
    ``min_size`` samples. No sample is left over.

    Args:
        alpha: concentration, positive. Towards 0 every class goes to one client; with
            large values all clients have the same class shares.
        min_size: smallest number of samples of a client.

    Returns:
        A ``Partition``. Its ``assign`` raises ValueError where there are fewer than
        ``num_clients * min_size`` samples, or no draw out of 300 has enough samples
        for every client.

    Raises:
        ValueError: ``alpha`` is not a positive number, or ``min_size < 1``.

    Example:
        >>> rng, targets = np.random.default_rng(0), np.repeat([0, 1], 50)
        >>> client = dirichlet(0.5, min_size=5).assign(rng, targets, 4, 2)
        >>> [np.bincount(client[targets == c], minlength=4).tolist() for c in (0, 1)]
        [[12, 0, 27, 11], [4, 16, 19, 11]]

    References:
        Yurochkin, Agarwal, Ghosh, Greenewald, Hoang and Khazaeni, "Bayesian
        Nonparametric Federated Learning of Neural Networks", ICML 2019.
        Li, Diao, Chen and He, "Federated Learning on Non-IID Data Silos: An
        Experimental Study", ICDE 2022.

    Differs from the paper: the public code of the second zeroes the proportion of a
    client that already has ``s / N`` samples; here the proportions are as drawn.
    """
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(
            f"dirichlet needs a positive, finite alpha; got alpha={alpha}. Use 0.1 for "
            "strongly and 1.0 for mildly different clients, or iid() for equal ones."
        )
    min_size = check_count("dirichlet's min_size", min_size, 1)

    def assign(
        rng: np.random.Generator,
        targets: np.ndarray,
        num_clients: int,
        num_classes: int,
    ) -> np.ndarray:
        if len(targets) < num_clients * min_size:
            raise ValueError(
                "dirichlet needs num_clients * min_size samples; got "
                f"num_clients={num_clients}, min_size={min_size} and {len(targets)} "
                "samples. Lower one of them."
            )
        class_sizes = np.bincount(targets, minlength=num_classes)
        smallest = -1
        for _ in range(MAX_REDRAWS):
            shares = rng.dirichlet(np.full(num_clients, alpha), size=num_classes)
            ends = np.floor(shares.cumsum(axis=1) * class_sizes[:, None]).astype(int)
            ends = np.minimum(ends, class_sizes[:, None])
            ends[:, -1] = class_sizes
            counts = np.diff(ends, axis=1, prepend=0)  # [num_classes, num_clients]
            smallest = max(smallest, counts.sum(axis=0).min())
            if smallest >= min_size:
                break
        else:
            raise ValueError(
                f"dirichlet found no division of {len(targets)} samples in "
                f"{MAX_REDRAWS} draws in which each of {num_clients} clients has "
                f"min_size={min_size} samples; the best left a client with {smallest}. "
                f"Raise alpha={alpha}, or lower min_size or num_clients."
            )
        clients = np.empty(len(targets), int)
        clients[_shuffled_by_label(rng, targets)] = np.repeat(
            np.tile(np.arange(num_clients), num_classes), counts.ravel()
        )
        return clients

    return Partition("dirichlet", assign)


def shards(per_client: int = 2) -> Partition:
    """Samples sorted by label are cut into shards; a client gets a few at random.

    ``N * per_client`` shards of ``floor(s / (N * per_client))`` samples each, so that
    all clients have equally many samples, of few classes: at most ``per_client``, and
    one more for every shard across the border of two classes.

    Args:
        per_client: shards of a client.

    Returns:
        A ``Partition``. Its ``assign`` raises ValueError where there are fewer samples
        than shards.

    Raises:
        ValueError: ``per_client < 1``.

    Example:
        >>> rng, targets = np.random.default_rng(0), np.repeat([0, 1, 2, 3], 10)
        >>> client = shards(2).assign(rng, targets, 4, 4)
        >>> [np.unique(targets[client == i]).tolist() for i in range(4)]
        [[1, 2], [3], [1, 2], [0]]

    References:
        McMahan, Moore, Ramage, Hampson and Aguera y Arcas, "Communication-Efficient
        Learning of Deep Networks from Decentralized Data", AISTATS 2017.

    Differs from the paper: where the number of samples is no multiple of the number of
    shards, the remainder (fewer samples than shards) is chosen at random and left out.
    """
    per_client = check_count("shards' per_client", per_client, 1)

    def assign(
        rng: np.random.Generator, targets: np.ndarray, num_clients: int, _: int
    ) -> np.ndarray:
        num_shards = num_clients * per_client
        shard_size = len(targets) // num_shards
        if shard_size == 0:
            raise ValueError(
                "shards needs num_clients * per_client samples; got "
                f"num_clients={num_clients}, per_client={per_client} and "
                f"{len(targets)} samples. Lower one of them."
            )
        kept = rng.permutation(len(targets))[: num_shards * shard_size]
        kept = kept[_shuffled_by_label(rng, targets[kept])]
        client_of_shard = rng.permutation(np.repeat(np.arange(num_clients), per_client))
        clients = np.full(len(targets), -1)
        clients[kept] = np.repeat(client_of_shard, shard_size)
        return clients

    return Partition("shards", assign)


def label_bias(q: float) -> Partition:
    """Clients form one group per class; a sample goes to its class's group at rate q.

    With L classes: ``P(group g | label l) = q if g = l else (1 - q) / (L - 1)``, then
    uniformly to one client of the group. ``q = 1 / L`` is IID, ``q = 1`` gives every
    client one class. Clients are divided into groups at random and as evenly as
    possible. Client sizes differ; no sample is left over.

    Args:
        q: probability that a sample goes to the group of its own class, in [0, 1].

    Returns:
        A ``Partition``. Its ``assign`` raises ValueError where there are fewer clients
        than classes (a group would have no client), or fewer than two classes.

    Raises:
        ValueError: ``q`` is not in [0, 1].

    Example:
        >>> rng, targets = np.random.default_rng(0), np.repeat([0, 1], 10)
        >>> client = label_bias(1.0).assign(rng, targets, 4, 2)
        >>> [np.unique(targets[client == i]).tolist() for i in range(4)]
        [[1], [0], [0], [1]]

    References:
        Fang, Cao, Jia and Gong, "Local Model Poisoning Attacks to Byzantine-Robust
        Federated Learning", USENIX Security 2020.
        Cao, Fang, Liu and Gong, "FLTrust: Byzantine-robust Federated Learning via Trust
        Bootstrapping", NDSS 2021.
    """
    if not 0 <= q <= 1:
        raise ValueError(
            f"label_bias needs a probability q in [0, 1]; got q={q}. FLTrust uses 0.5; "
            "1 / num_classes is IID."
        )

    def assign(
        rng: np.random.Generator,
        targets: np.ndarray,
        num_clients: int,
        num_classes: int,
    ) -> np.ndarray:
        if not 2 <= num_classes <= num_clients:
            raise ValueError(
                "label_bias needs at least two classes, and a client for each class's "
                f"group; got num_clients={num_clients}, num_classes={num_classes}. Add "
                "clients, or use another partition."
            )
        elsewhere = rng.random(len(targets)) >= q
        shift = rng.integers(1, num_classes, size=len(targets))
        group = np.where(elsewhere, (targets + shift) % num_classes, targets)
        # Group g has the clients order[g], order[g + L], order[g + 2 L], ...
        order = rng.permutation(num_clients)
        group_sizes = np.bincount(np.arange(num_clients) % num_classes)
        member = rng.integers(group_sizes[group])
        return order[group + num_classes * member]

    return Partition("label_bias", assign)


def by_client(min_size: int = 10) -> Partition:
    """Every client is one of the owners that the data come with, such as a writer.

    Of the owners with at least ``min_size`` samples, ``num_clients`` are drawn
    uniformly without replacement; each is a client with all its samples. The samples of
    the other owners are left out. What the root dataset took counts for nobody.

    Args:
        min_size: smallest number of samples of a client.

    Returns:
        A ``Partition``. Its ``assign`` is given owners in place of targets; it raises
        ValueError where fewer than ``num_clients`` owners have enough samples.

    Raises:
        ValueError: ``min_size < 1``.

    Example:
        >>> rng, owners = np.random.default_rng(0), np.array([7, 7, 3, 3, 3, 5, 2, 2])
        >>> by_client(min_size=2).assign(rng, owners, 2, 62).tolist()
        [1, 1, 0, 0, 0, -1, -1, -1]

    References:
        Caldas, Duddu, Wu, Li, Konečný, McMahan, Smith and Talwalkar, "LEAF: A Benchmark
        for Federated Settings", arXiv:1812.01097, 2018.
    """
    min_size = check_count("by_client's min_size", min_size, 1)

    def assign(
        rng: np.random.Generator, owners: np.ndarray, num_clients: int, _: int
    ) -> np.ndarray:
        names, places, sizes = np.unique(
            owners, return_inverse=True, return_counts=True
        )
        enough = np.flatnonzero(sizes >= min_size)
        if len(enough) < num_clients:
            raise ValueError(
                "by_client needs num_clients owners with min_size samples or more; got "
                f"num_clients={num_clients}, min_size={min_size} and {len(enough)} "
                f"such owners (of {len(names)}). Lower one of them."
            )
        client_of = np.full(len(names), -1)
        drawn = rng.choice(enough, num_clients, replace=False)
        client_of[drawn] = np.arange(num_clients)
        return client_of[places]

    return Partition("by_client", assign, by_class=False, by_owner=True)


PARTITIONS: dict[str, Callable[..., Partition]] = {
    "iid": iid,
    "dirichlet": dirichlet,
    "shards": shards,
    "label_bias": label_bias,
    "by_client": by_client,
}


def _shuffled_by_label(rng: np.random.Generator, targets: np.ndarray) -> np.ndarray:
    """Sample numbers sorted by label, in random order within a label."""
    order = rng.permutation(len(targets))
    return order[np.argsort(targets[order], kind="stable")]
