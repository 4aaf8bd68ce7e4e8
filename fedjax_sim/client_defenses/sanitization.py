"""Sanitization: drops the samples whose label is not that of their cluster."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sim.client_defenses.kfed import local_clusters, merge_centers
from fedjax_sim.models.layers import to_float
from fedjax_sim.registry import check_count, check_number, lookup, require
from fedjax_sim.types import Array, ClientData, ClientDefense, RoundContext

VOTES = {
    "local": "the most frequent label among the client's own samples of a cluster",
    "global": "the most frequent label among all clients' samples of a cluster",
}
SERVERS = {
    "one_round": "one of Lloyd's steps on the clients' centres",
    "convergence": "Lloyd's steps until nothing changes",
}
FEATURES = {
    "model": "the first block of the server's model",
    "inputs": "the inputs themselves, images in [0, 1]",
}
# Samples whose features are computed at once: what a model makes of a sample on the way
# to its features can be several times as large.
_BATCH = 500
# Bytes of the features, and what is made of them, of the clients clustered at once.
_MEMORY = 256 * 2**20
# Labels of a sample that fit in an integer, its sign left out.
_MAX_LABELS = 30


class SanitizationState(NamedTuple):
    """What the last clustering left.

    Attributes:
        keep: ``bool [N, m]``, the samples that take part. Before the first clustering,
            all there are.
        separation: ``float32 [N]``, of each client's clusters; 0 before the first
            clustering.
    """

    keep: Array
    separation: Array


def sanitization(
    num_clusters: int,
    start: int = 0,
    every: int | None = None,
    vote: str = "local",
    server: str = "one_round",
    features: str = "model",
    ratio: float = 1 / 3,
    max_steps: int = 50,
) -> ClientDefense:
    """Clusters all samples by shallow features; drops minority labels of a cluster.

    Every client i finds k clusters of the features ``A_i [m, h]`` of its samples
    (``kfed.local_clusters``) and sends their centres; the server merges the centres of
    all clients into k (``kfed.merge_centers``), so that every sample has a cluster c of
    its federation. Then, within each client and cluster::

        y_c = the most frequent label of the samples of cluster c, ties to the smallest
        keep sample j  iff  y_j = y_c(j)

    A cluster without samples has no label and drops nothing. Of a multilabel task, the
    label of a sample is its whole set of labels: the sum of ``2^l`` over them, and the
    smallest is the smallest sum.

    Threat model: attackers change labels or inputs of samples, by whatever attack, and
    then follow the protocol: they cluster, vote and drop as told. Poisoned samples must
    be the minority *inside each cluster*: of a client with ``vote="local"``, so that an
    attacker that flips every sample of a class keeps them all; of the federation with
    ``"global"``.

    It drops clean samples too. As many clusters as classes cannot tell classes apart
    that are several clusters each, or share one: of a class that is the minority in its
    cluster, every sample there is lost. On MNIST (10 clients of 1,000, four of which
    flip 30 % of their labels) k = 10 removes 98 % of the flipped samples and some 45 %
    of the others, k = 20 removes 97 % and 32 %.

    Cost: O(m h k T) per client in a round that clusters, with T of Lloyd's steps, and
    nothing in others. Memory: about 256 MB for each of the seeds that run side by side,
    or the features of one client two or three times over where that is more.

    Args:
        num_clusters: ``k >= 2``, at most the samples of the smallest client; as a rule
            the number of classes.
        start: the first round that clusters, from 0. Before it nothing is dropped.
        every: cluster anew every so many rounds from ``start`` on, always all samples;
            None for once.
        vote: whose samples are counted, ``"local"`` or ``"global"``. The latter makes
            clients send how often they have each label in each cluster, and a client
            may lose every sample: it then takes part in no round until a clustering
            gives it some back.
        server: ``"one_round"`` of Lloyd's steps on the clients' centres, or
            ``"convergence"``.
        features: ``"model"``, what ``context.features`` makes of a sample; or
            ``"inputs"``, the sample itself (``uint8`` scaled to [0, 1]).
        ratio: in (0, 1], how much nearer a sample of a core set is to its own centre
            than to any other.
        max_steps: of each run of Lloyd's.

    Returns:
        A ``ClientDefense``. Its state is a ``SanitizationState``. Info: ``separation``
        (``kfed.separation`` of the client's own clusters, 0 before the first
        clustering) and ``num_kept``. All N clients are clustered, whoever is in the
        cohort. A client's randomness follows from the key and its id alone. A sample
        whose features are not finite takes no part and is dropped.

    Raises:
        TypeError: an option of another type.
        ValueError: an option out of range or unknown. ``validate`` raises it where a
            client has fewer than k samples, or targets are not integers ``[P]`` or 0
            and 1 ``[P, L]`` with ``L <= 30``.

    Example:
        >>> x = jnp.array([[0.0], [0.1], [0.2], [0.8], [0.9], [1.0]])
        >>> data = ClientData(x, jnp.array([3, 3, 7, 5, 5, 5]), None)
        >>> defense = sanitization(2, features="inputs")
        >>> state = defense.init(jnp.ones((1, 6), bool))
        >>> round_0 = RoundContext(jax.random.key(0), round=0, client_ids=jnp.arange(1))
        >>> defense.apply(lambda id: data, state, round_0)[0].tolist()
        [[True, True, False, True, True, True]]

    References:
        C. Chen, Y. Gao, L. Shi and S. Huang, "Try to avoid attacks: a federated data
        sanitization defense for healthcare IoMT systems", arXiv:2211.01592, 2022.

        D. K. Dennis, T. Li and V. Smith, "Heterogeneity for the win: one-shot federated
        clustering", ICML 2021.

    Differs from the paper:
        Its extractor of shallow features is "federated" and no more is said; here it is
        the model of the round that clusters. The default ``start=0`` sanitizes before
        any training, as its Alg. 3 does, with filters still as initialized: on MNIST
        they separate as well as the pixels do, and trained ones hardly better. With
        ``start=1`` or later the filters are trained, but on data that is not sanitized,
        so that attackers have a say in what exposes them.

        Alg. 2 starts anew from every client's centres; read as the first client's, with
        the farthest others where it has fewer than k. Eq. (3) is read with the spectral
        norm of the residuals; eq. (4)'s separation is reported and decides nothing.
        The paper clusters ChestMNIST, of 14 findings, into 8.
    """
    num_clusters = check_count("sanitization's num_clusters", num_clusters, 2)
    start = check_count("sanitization's start", start, 0)
    every = None if every is None else check_count("sanitization's every", every, 1)
    lookup("vote of sanitization", vote, VOTES)
    lookup("server of sanitization", server, SERVERS)
    lookup("features of sanitization", features, FEATURES)
    ratio = check_number("sanitization's ratio", ratio, 0, 1, "(]")
    max_steps = check_count("sanitization's max_steps", max_steps, 1)
    server_steps = 1 if server == "one_round" else max_steps

    def init(mask: Array) -> SanitizationState:
        # A copy: a state that is donated must not take the clients' mask with it.
        keep = jnp.array(mask, bool)
        return SanitizationState(keep, jnp.zeros(len(mask), jnp.float32))

    def validate(sizes: np.ndarray, targets: np.ndarray, num_classes: int) -> None:
        smallest = int(np.min(sizes))
        if smallest < num_clusters:
            raise ValueError(
                "sanitization needs at least num_clusters samples at every client; got "
                f"num_clusters={num_clusters}, and a client with {smallest}. Lower "
                "num_clusters or give every client more samples."
            )
        check_targets(targets)

    def sanitize(
        gather: Callable[[Array], ClientData], num_clients: int, context: RoundContext
    ) -> SanitizationState:
        key = require("sanitization", context, "key")
        extract = to_float
        if features == "model":
            extract = require("sanitization", context, "features")

        def with_features(id: Array) -> tuple[ClientData, Array]:
            data = gather(id)
            return data, in_batches(extract, data.inputs)

        def one_client(id: Array) -> tuple:
            data, A = with_features(id)
            mask = jnp.isfinite(jnp.sum(A * A, axis=1))
            if data.mask is not None:
                mask &= data.mask
            own_key = jax.random.fold_in(key, id)
            found = local_clusters(own_key, A, mask, num_clusters, ratio, max_steps)
            return found, label_codes(data.targets), mask

        A = jax.eval_shape(with_features, jax.ShapeDtypeStruct((), jnp.int32))[1]
        # The features, their centred copy, and as much again for what makes them.
        size = max(1, _MEMORY // (4 * A.size * A.dtype.itemsize))
        found, codes, mask = map_blocks(one_client, num_clients, size)
        merged = merge_centers(
            found.centers, found.counts > 0, num_clusters, server_steps
        )
        clusters = jnp.take_along_axis(merged.labels, found.labels, axis=1)
        if vote == "global":
            flat = (clusters.reshape(-1), codes.reshape(-1), mask.reshape(-1))
            keep = vote_out(*flat, num_clusters)[1].reshape(mask.shape)
        else:
            each = jax.vmap(partial(vote_out, num_clusters=num_clusters))
            keep = each(clusters, codes, mask)[1]
        return SanitizationState(keep, found.separation)

    def apply(
        gather: Callable[[Array], ClientData],
        state: SanitizationState,
        context: RoundContext,
    ) -> tuple[Array, SanitizationState, dict[str, Array]]:
        since = require("sanitization", context, "round") - start
        ids = require("sanitization", context, "client_ids")
        due = since == 0 if every is None else (since >= 0) & (since % every == 0)
        state = jax.lax.cond(
            due,
            lambda: sanitize(gather, len(state.keep), context),
            lambda: state,
        )
        keep = state.keep[ids]
        info = {
            "separation": state.separation[ids],
            "num_kept": keep.sum(axis=1, dtype=jnp.int32),
        }
        return keep, state, info

    needs = {"key", "round", "client_ids"}
    if features == "model":
        needs |= {"features"}
    return ClientDefense(init, apply, frozenset(needs), "sanitization", validate)


def check_targets(targets: np.ndarray) -> None:
    """Refuses targets that are neither a label nor a set of labels for every sample.

    Raises:
        ValueError: not integers ``[P]``, nor 0 and 1 ``[P, L]`` with ``L <= 30``.

    Example:
        >>> check_targets(np.zeros((5, 31), int))
        Traceback (most recent call last):
        ...
        ValueError: sanitization compares whole sets of labels as one integer, so it \
takes at most 30 labels a sample; got targets of shape (5, 31). Keep fewer labels.
    """
    shape = np.shape(targets)
    if len(shape) == 2 and shape[1] > _MAX_LABELS:
        raise ValueError(
            "sanitization compares whole sets of labels as one integer, so it takes at "
            f"most {_MAX_LABELS} labels a sample; got targets of shape {shape}. Keep "
            "fewer labels."
        )
    whole = np.asarray(targets).dtype.kind in "iub"
    if not (
        whole
        and (len(shape) == 1 or (len(shape) == 2 and np.isin(targets, (0, 1)).all()))
    ):
        raise ValueError(
            "sanitization needs integer targets [P], or 0 and 1 in [P, L]; got "
            f"{np.asarray(targets).dtype} of shape {shape}. It compares labels, so it "
            "suits classification and multilabel tasks only."
        )


def label_codes(targets: Array) -> Array:
    """``int32 [m]``: the label, or the set of labels as the sum of ``2^l``.

    Example:
        >>> label_codes(jnp.array([[0, 0, 0], [1, 0, 1]])).tolist()
        [0, 5]
    """
    targets = targets.astype(jnp.int32)
    if targets.ndim == 1:
        return targets
    return jnp.sum(targets << jnp.arange(targets.shape[1])[None], axis=1)


@partial(jax.jit, static_argnames=("num_clusters",))
def vote_out(
    clusters: Array, labels: Array, mask: Array, num_clusters: int
) -> tuple[Array, Array]:
    """The most frequent label of every cluster, and the samples that have it.

    Cost: O(s log s), whatever the number of labels.

    Args:
        clusters: ``int32 [s]``, each sample's cluster.
        labels: ``int32 [s]``, not negative.
        mask: ``bool [s]``, the samples that count.
        num_clusters: k.

    Returns:
        ``int32 [k]``: of labels as frequent, the smallest; -1 where a cluster is empty.
        And ``bool [s]``.

    Example:
        >>> clusters, labels = jnp.array([0, 0, 0, 2, 2]), jnp.array([3, 3, 2, 7, 5])
        >>> modes, keep = vote_out(clusters, labels, jnp.ones(5, bool), 3)
        >>> modes.tolist(), keep.tolist()
        ([3, -1, 5], [True, True, False, False, True])
    """
    s, most = len(mask), jnp.iinfo(jnp.int32).max
    by_cluster = jnp.where(mask, clusters, num_clusters)
    # In runs of one cluster and one label; samples that do not count come last.
    ordered, label = jax.lax.sort((by_cluster, labels), num_keys=2)
    begins = (ordered[1:] != ordered[:-1]) | (label[1:] != label[:-1])
    run = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(begins)])
    length = jnp.zeros(s, jnp.int32).at[run].add(1)[run]
    longest = jnp.zeros(num_clusters + 1, jnp.int32).at[ordered].max(length)
    candidates = jnp.where(length == longest[ordered], label, most)
    modes = jnp.full(num_clusters + 1, most, jnp.int32).at[ordered].min(candidates)
    modes = jnp.where(longest > 0, modes, -1)
    return modes[:num_clusters], mask & (labels == modes[by_cluster])


def in_batches(extract: Callable[[Array], Array], inputs: Array) -> Array:
    """Features of every sample, ``float32 [m, h]``, a batch at a time.

    Example:
        >>> in_batches(jnp.sqrt, jnp.array([[4.0], [9.0]])).tolist()
        [[2.0], [3.0]]
    """

    def batch(x: Array) -> Array:
        found = extract(x)
        if found.shape[:1] != (len(x),):
            raise ValueError(
                f"features of {len(x)} samples must have as many rows; got shape "
                f"{found.shape}."
            )
        return found.reshape(len(x), -1).astype(jnp.float32)

    m = len(inputs)
    count = -(-m // _BATCH)
    if count == 1:
        return batch(inputs)
    size = -(-m // count)
    rows = jnp.minimum(jnp.arange(count * size), m - 1).reshape(count, size)
    found = jax.lax.map(lambda r: batch(inputs[r]), rows)
    return found.reshape(count * size, -1)[:m]


def map_blocks(function: Callable[[Array], tuple], count: int, size: int) -> tuple:
    """``function(id)`` of every id below ``count``, ``size`` of them side by side.

    Example:
        >>> map_blocks(lambda id: (id, 2 * id), 3, 2)[1].tolist()
        [0, 2, 4]
    """
    blocks = -(-count // size)
    size = -(-count // blocks)
    if size == 1:
        return jax.lax.map(function, jnp.arange(count))
    if blocks == 1:
        return jax.vmap(function)(jnp.arange(count))
    ids = jnp.minimum(jnp.arange(blocks * size), count - 1).reshape(blocks, size)
    found = jax.lax.map(jax.vmap(function), ids)
    return jax.tree.map(lambda x: x.reshape(blocks * size, *x.shape[2:])[:count], found)
