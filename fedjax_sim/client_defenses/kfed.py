"""k-FED: k-means over the samples of many clients that send only their centres.

A client clusters its own rows (``local_clusters``), the server the clients' centres
(``merge_centers``). Plain arrays and masks: what a mask leaves out has no influence.
Symbols in shapes: ``m`` rows of one client, ``h`` features, ``k`` clusters.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_sim.linalg import eigh
from fedjax_sim.types import Array

_HIGHEST = jax.lax.Precision.HIGHEST
# Comparisons that are ties in exact arithmetic stay ties after rounding in float32.
_SLACK = 1e-6
# Further directions that the power iteration carries along: they make it converge at
# the rate of the next singular value but ten.
_OVERSAMPLING = 10


class LocalClusters(NamedTuple):
    """What one client found.

    Attributes:
        centers: theta, ``[k, h]``.
        counts: ``int32 [k]``, rows of each cluster. The centre of an empty one means
            nothing.
        labels: ``int32 [m]``, each row's cluster; meaningless where masked.
        separation: ``[]``, how far apart the clusters are (see ``separation``).
    """

    centers: Array
    counts: Array
    labels: Array
    separation: Array


class MergedCenters(NamedTuple):
    """What the server made of the clients' centres.

    Attributes:
        seeds: ``[k, h]``, those of the clients' centres that it started from.
        centers: mu, ``[k, h]``; an empty cluster keeps what it had.
        labels: tau, ``int32 [N, r]``: the global cluster of every client's r clusters.
    """

    seeds: Array
    centers: Array
    labels: Array


@jax.jit
def centred(X: Array, mask: Array) -> tuple[Array, Array]:
    """The rows less their mean, and the mean; masked rows become zero.

    Example:
        >>> rows, mean = centred(jnp.array([[1.0], [3.0], [9.0]]), jnp.arange(3) < 2)
        >>> rows.ravel().tolist(), mean.tolist()
        ([-1.0, 1.0, 0.0], [2.0])
    """
    X = jnp.where(mask[:, None], X, 0.0)
    # A product: XLA:CPU sums a leading axis one column after the other.
    mean = jnp.matmul(mask.astype(X.dtype), X, precision=_HIGHEST)
    mean = mean / jnp.maximum(mask.sum(), 1)
    return jnp.where(mask[:, None], X - mean[None], 0.0), mean


@jax.jit
def cluster_means(members: Array, X: Array, otherwise: Array) -> Array:
    """Mean row of every set of rows; ``otherwise`` where a set is empty.

    Args:
        members: ``bool [m, k]``; a row may belong to several sets or to none.
        X: finite ``[m, h]``.
        otherwise: ``[k, h]``.

    Returns:
        ``[k, h]``.

    Example:
        >>> members = jnp.array([[True, False], [True, False]])
        >>> otherwise = jnp.array([[7.0], [8.0]])
        >>> cluster_means(members, jnp.array([[1.0], [3.0]]), otherwise).tolist()
        [[2.0], [8.0]]
    """
    counts = members.sum(axis=0)[:, None]
    sums = jnp.einsum("mk,mh->kh", members.astype(X.dtype), X, precision=_HIGHEST)
    return jnp.where(counts > 0, sums / jnp.maximum(counts, 1), otherwise)


def one_hot(labels: Array, mask: Array, num_clusters: int) -> Array:
    """``bool [m, k]``, True where a row that counts has that label.

    Example:
        >>> one_hot(jnp.array([1, 0]), jnp.array([True, False]), 2).tolist()
        [[False, True], [False, False]]
    """
    return mask[:, None] & (labels[:, None] == jnp.arange(num_clusters)[None])


@jax.jit
def orthonormal(rows: Array) -> Array:
    """Rows made orthonormal one after the other: modified Gram-Schmidt, twice.

    ``jnp.linalg.qr`` takes twenty times as long on tall matrices of few columns.

    Args:
        rows: ``[b, h]``.

    Returns:
        ``[b, h]``: zero where a row is a combination of those before it, to within 1e-5
        of its length.

    Example:
        >>> orthonormal(jnp.array([[2.0, 0.0], [3.0, 4.0], [1.0, 1.0]])).tolist()
        [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]
    """

    count = len(rows)

    def unit(row: Array, least: float = 0.0) -> Array:
        length = jnp.linalg.norm(row)
        return jnp.where(length > least, row / jnp.maximum(length, 1e-30), 0.0)

    def take_out(step: int, Q: Array) -> Array:
        """Row j becomes a unit vector, and leaves the rows after it."""
        j = step % count
        row = unit(Q[j], 1e-5)
        shares = jnp.matmul(Q, row, precision=_HIGHEST)
        shares = jnp.where(jnp.arange(count) > j, shares, 0.0)
        return (Q - shares[:, None] * row[None]).at[j].set(row)

    return jax.lax.fori_loop(0, 2 * count, take_out, jax.vmap(unit)(rows))


@partial(jax.jit, static_argnames=("rank", "num_iterations"))
def singular_subspace(
    start: Array, X: Array, B: Array, C: Array, rank: int, num_iterations: int = 6
) -> tuple[Array, Array]:
    """Top right singular vectors of ``X + B C``, by block power iteration.

    ``Q <- orthonormal((X + BC)' (X + BC) Q)`` from a random block of ``b`` directions,
    then the best ``rank`` directions within the block (Rayleigh and Ritz). Neither ``X
    + BC`` nor anything of ``h x h`` is formed. The error of direction i is of the order
    of ``(sigma_{b + 1} / sigma_i)^(2 num_iterations)``; there is none where ``h <= b``.
    Directions 300 times as weak as the strongest are lost.

    Cost: O(num_iterations m h b).

    Args:
        start: ``[b, h]``, independent random entries, ``b`` well above ``rank``.
        X: ``[m, h]``.
        B: ``[m, q]``.
        C: ``[q, h]``.
        rank: how many, at most ``b`` and ``h``.
        num_iterations: power steps, at least one.

    Returns:
        Orthonormal columns ``[h, rank]``, strongest first, and the singular values
        ``[rank]``. Columns whose singular value is 0, to within rounding, may be zero.

    Example:
        >>> X = jnp.array([[3.0, 0.0], [0.0, 1.0]])
        >>> B, C = jnp.zeros((2, 1)), jnp.zeros((1, 2))
        >>> start = jax.random.normal(jax.random.key(0), (2, 2))
        >>> V, s = singular_subspace(start, X, B, C, rank=1)
        >>> jnp.abs(V).round(3).ravel().tolist(), s.round(2).item()
        ([1.0, 0.0], 3.0)

    References:
        N. Halko, P.-G. Martinsson and J. A. Tropp, "Finding structure with randomness:
        probabilistic algorithms for constructing approximate matrix decompositions",
        SIAM Review 2011.
    """

    def product(Q: Array) -> Array:
        """``(X + B C) Q'`` of rows Q."""
        low_rank = jnp.matmul(C, Q.T, precision=_HIGHEST)
        low_rank = jnp.matmul(B, low_rank, precision=_HIGHEST)
        return jnp.matmul(X, Q.T, precision=_HIGHEST) + low_rank

    def step(_: int, Q: Array) -> Array:
        Y = product(Q).T
        low_rank = jnp.matmul(Y, B, precision=_HIGHEST)
        low_rank = jnp.matmul(low_rank, C, precision=_HIGHEST)
        return orthonormal(jnp.matmul(Y, X, precision=_HIGHEST) + low_rank)

    Q = jax.lax.fori_loop(0, num_iterations, step, start)
    Y = product(Q)
    squares, W = eigh(jnp.einsum("ma,mb->ab", Y, Y, precision=_HIGHEST))
    best = W[:, ::-1][:, :rank]
    V = jnp.matmul(Q.T, best, precision=_HIGHEST)
    return V, jnp.sqrt(jnp.maximum(squares[::-1][:rank], 0.0))


@jax.jit
def plus_plus(draws: Array, X: Array, mask: Array) -> Array:
    """The first centres of k-means++: each a row, drawn by squared distance.

    A row is drawn with a chance proportional to its squared distance from the nearest
    centre so far; the first, and any after which all distances are 0, uniformly.

    Args:
        draws: ``[k]``, uniform on [0, 1). The same draws give the same rows, however
            many masked rows there are and wherever.
        X: finite ``[m, p]`` for few features: it works on differences.
        mask: ``bool [m]``, the rows that count.

    Returns:
        ``[k, p]``; all zero where no row counts.

    Example:
        >>> X = jnp.array([[0.0], [1.0], [5.0], [5.0]])
        >>> plus_plus(jnp.array([0.0, 0.5]), X, jnp.ones(4, bool)).ravel().tolist()
        [0.0, 5.0]

    References:
        D. Arthur and S. Vassilvitskii, "k-means++: the advantages of careful seeding",
        SODA 2007.
    """
    m = len(mask)

    def draw(squares: Array, u: Array) -> tuple[Array, Array]:
        weights = jnp.where(mask, jnp.where(jnp.isinf(squares), 1.0, squares), 0.0)
        weights = jnp.where(weights.any(), weights, mask)
        upto = jnp.cumsum(weights)
        # Rounding may lift u times the sum up to the sum.
        last = m - 1 - jnp.argmax(weights[::-1] > 0.0)
        row = jnp.minimum(jnp.sum(upto <= u * upto[-1]), last)
        center = jnp.where(mask[row], X[row], 0.0)
        to_center = jnp.sum((X - center[None]) ** 2, axis=1)
        return jnp.minimum(squares, to_center), center

    return jax.lax.scan(draw, jnp.full(m, jnp.inf, X.dtype), draws)[1]


@jax.jit
def lloyd(
    X: Array, mask: Array, centers: Array, max_steps: int = 50
) -> tuple[Array, Array]:
    """Lloyd's k-means from given centres, until nothing changes.

    ``U_r <- {x : ||x - c_r|| <= ||x - c_s|| for all s}``, then ``c_r <- mean of U_r``.
    A row as near to several centres, to within 1e-6 of ``||x||^2 + ||c||^2`` in the
    squared distance, goes to the first of them. An empty cluster keeps its centre.

    Cost: O(max_steps m h k).

    Args:
        X: finite ``[m, h]``. Its rows should have mean 0 (see ``centred``), as squared
            distances are found from products.
        mask: ``bool [m]``, the rows that count.
        centers: ``[k, h]``.
        max_steps: at most so many times, at least one.

    Returns:
        The centres ``[k, h]``, and the clusters ``int32 [m]`` whose means they are.

    Example:
        >>> X = jnp.array([[-3.0], [-2.0], [1.0], [4.0]])
        >>> centers, labels = lloyd(X, jnp.ones(4, bool), jnp.array([[-3.0], [-2.0]]))
        >>> centers.ravel().tolist(), labels.tolist()
        ([-2.5, 2.5], [0, 0, 1, 1])

    References:
        S. Lloyd, "Least squares quantization in PCM", IEEE Trans. Information Theory
        1982.
    """
    k = len(centers)
    squares = jnp.sum(X * X, axis=1)[:, None]

    def nearest(centers: Array) -> Array:
        of_centers = jnp.sum(centers * centers, axis=1)[None]
        products = jnp.matmul(X, centers.T, precision=_HIGHEST)
        D = of_centers - 2.0 * products
        D -= D.min(axis=1)[:, None]
        ties = _SLACK * (squares + of_centers) >= D
        return jnp.argmax(ties, axis=1).astype(jnp.int32)

    def goes_on(carry: tuple) -> Array:
        step, _, _, changes = carry
        return changes & (step < max_steps)

    def move(carry: tuple) -> tuple:
        step, centers, before, _ = carry
        labels = nearest(centers)
        centers = cluster_means(one_hot(labels, mask, k), X, centers)
        return step + 1, centers, labels, jnp.any(mask & (labels != before))

    start = (jnp.int32(0), centers, jnp.full(len(X), -1, jnp.int32), jnp.bool(True))
    _, centers, labels, _ = jax.lax.while_loop(goes_on, move, start)
    return centers, labels


@jax.jit
def core_sets(X: Array, mask: Array, centers: Array, ratio: float = 1 / 3) -> Array:
    """Rows much nearer to one centre than to any other.

    ``S_r = {x : ||x - c_r|| <= ratio ||x - c_s|| for all s != r}``, the squares to
    within 1e-6 of them.

    Args:
        X: ``[m, p]`` for few features: it works on differences.
        mask: ``bool [m]``, the rows that count.
        centers: ``[k, p]``, ``k >= 2``.
        ratio: from 0 to 1.

    Returns:
        ``bool [m, k]``. Below a ratio of 1, a row is in several only where those
        centres are the row.

    Example:
        >>> X = jnp.array([[0.0], [1.0], [2.0], [9.0]])
        >>> centers = jnp.array([[0.0], [4.0]])
        >>> core_sets(X, jnp.ones(4, bool), centers).tolist()
        [[True, False], [True, False], [False, False], [False, False]]
    """
    D = jnp.sum((X[:, None] - centers[None]) ** 2, axis=-1)
    nearest = jnp.argmin(D, axis=1)[:, None] == jnp.arange(len(centers))[None]
    second = jnp.where(nearest, jnp.inf, D).min(axis=1)
    others = jnp.where(nearest, second[:, None], D.min(axis=1)[:, None])
    limit = ratio**2 * (1.0 + _SLACK) * others
    return mask[:, None] & (limit >= D)


@jax.jit
def separation(
    start: Array, X: Array, mask: Array, labels: Array, centers: Array
) -> Array:
    """How far apart the two closest clusters are, relative to their spread.

    With ``C`` the matrix of every row's centre and ``||.||_2`` the spectral norm::

        Delta_r = sqrt(k) ||X - C||_2 / sqrt(|U_r|)
        separation = min over r < s of ||c_r - c_s|| / (Delta_r + Delta_s)

    The clusters are provably found where it exceeds a constant m, which no paper gives
    a value for: a certificate to look at, not a part of the clustering.

    Args:
        start: first block of the power iteration (see ``singular_subspace``).
        X: ``[m, h]``, rows of mean 0, and zero where masked.
        mask: ``bool [m]``, the rows that count.
        labels: ``int32 [m]``, each row's cluster.
        centers: ``[k, h]``.

    Returns:
        ``[]``; ``inf`` where fewer than two clusters have rows, or nothing spreads, to
        within 1e-5 of the norm of ``X``.

    Example:
        >>> X = jnp.array([[-6.0], [-4.0], [4.0], [6.0]])
        >>> labels, centers = jnp.array([0, 0, 1, 1]), jnp.array([[-5.0], [5.0]])
        >>> start, mask = jnp.ones((1, 1)), jnp.ones(4, bool)
        >>> separation(start, X, mask, labels, centers).round(3).item()
        2.5

    References:
        A. Kumar and R. Kannan, "Clustering with spectral norm and the k-means
        algorithm", FOCS 2010.
    """
    k = len(centers)
    members = one_hot(labels, mask, k)
    counts = members.sum(axis=0)
    to_center = -members.astype(X.dtype)
    norm = singular_subspace(start, X, to_center, centers, 1)[1][0]
    size = jnp.sqrt(jnp.sum(jnp.sum(X * X, axis=1)))
    norm = jnp.where(norm > 1e-5 * size, norm, 0.0)
    spread = norm * jnp.sqrt(k / jnp.maximum(counts, 1))
    apart = jax.lax.map(lambda c: jnp.linalg.norm(centers - c[None], axis=1), centers)
    together = spread[:, None] + spread[None]
    filled = counts > 0
    pairs = filled[:, None] & filled[None] & ~jnp.eye(k, dtype=bool)
    usable = pairs & (together > 0.0)
    return jnp.where(usable, apart / jnp.where(usable, together, 1.0), jnp.inf).min()


@partial(jax.jit, static_argnames=("num_clusters",))
def local_clusters(
    key: Array,
    A: Array,
    mask: Array,
    num_clusters: int,
    ratio: float = 1 / 3,
    max_steps: int = 50,
) -> LocalClusters:
    """One client's k-means: in a subspace, then from its core sets in full (Alg. 1).

    ``A`` is projected on its top-k right singular vectors, ``P = A V``; k-means++ and
    Lloyd's steps on ``P`` give nu; ``theta_r`` is the mean of ``A`` over the core set
    of ``nu_r``, or ``nu_r V'`` where that is empty; Lloyd's steps on ``A`` from theta
    give the clusters.

    Cost: O(m h k T), T Lloyd's steps; memory 2 m h.

    Args:
        key: PRNG key of this client.
        A: ``[m, h]``; the rows that count are finite.
        mask: ``bool [m]``, the rows that count. Others change nothing.
        num_clusters: ``k >= 2``.
        ratio: of the core sets (see ``core_sets``).
        max_steps: of each of the two runs of Lloyd's.

    Returns:
        ``LocalClusters``, with empty clusters where there are fewer distinct rows
        than k.

    Example:
        >>> A = jnp.array([[0.0, 1.0], [0.0, 1.1], [5.0, 0.0], [5.0, 0.1]])
        >>> found = local_clusters(jax.random.key(0), A, jnp.ones(4, bool), 2)
        >>> found.counts.tolist(), bool(found.labels[0] == found.labels[1])
        ([2, 2], True)

    References:
        P. Awasthi and O. Sheffet, "Improved spectral-norm bounds for clustering",
        APPROX 2012.

        D. K. Dennis, T. Li and V. Smith, "Heterogeneity for the win: one-shot federated
        clustering", ICML 2021.
    """
    X, mean = centred(A, mask)
    # In a power of two near the largest entry, which rounds nothing: the power
    # iteration has fourth powers in it.
    unit = jnp.ldexp(jnp.ones((), X.dtype), jnp.frexp(jnp.abs(X).max())[1])
    X, mean = X / unit, mean / unit
    h = X.shape[1]
    rank = min(num_clusters, h)
    block = min(num_clusters + _OVERSAMPLING, h)
    # Drawn at once, and alike however many rows there are.
    draws = jax.random.uniform(key, (num_clusters + block * h,), X.dtype)
    start = draws[num_clusters:].reshape(block, h) - 0.5
    # The subspace is that of A itself, X plus the mean in every row that counts.
    ones = mask.astype(X.dtype)[:, None]
    V, _ = singular_subspace(start, X, ones, mean[None], rank)
    P = jnp.matmul(X, V, precision=_HIGHEST)
    nu = plus_plus(draws[:num_clusters], P, mask)
    nu, _ = lloyd(P, mask, nu, max_steps)
    offset = jnp.matmul(mean, V, precision=_HIGHEST)
    lifted = jnp.matmul(nu + offset[None], V.T, precision=_HIGHEST) - mean[None]
    theta = cluster_means(core_sets(P, mask, nu, ratio), X, lifted)
    theta, labels = lloyd(X, mask, theta, max_steps)
    counts = one_hot(labels, mask, num_clusters).sum(axis=0, dtype=jnp.int32)
    apart = separation(start, X, mask, labels, theta)
    return LocalClusters((theta + mean[None]) * unit, counts, labels, apart)


@partial(jax.jit, static_argnames=("num_seeds",))
def farthest_first(X: Array, counted: Array, first: Array, num_seeds: int) -> Array:
    """Rows to start from: some given ones, then always the farthest from those so far.

    Args:
        X: finite ``[n, h]``.
        counted: ``bool [n]``, the rows that may be taken.
        first: ``bool [n]``, the rows that are taken first, in their order.
        num_seeds: how many rows.

    Returns:
        ``int32 [num_seeds]``. Of rows as far, the first is taken. A row comes twice
        where there are fewer distinct ones than ``num_seeds``.

    Example:
        >>> X = jnp.array([[0.0], [1.0], [9.0], [4.0]])
        >>> everybody, first = jnp.ones(4, bool), jnp.arange(4) < 1
        >>> farthest_first(X, everybody, first, 3).tolist()
        [0, 2, 3]
    """

    def take(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], Array]:
        distance, waiting = carry
        row = jnp.argmax(jnp.where(waiting, jnp.inf, distance))
        to_row = jnp.sum((X - X[row][None]) ** 2, axis=1)
        return (jnp.minimum(distance, to_row), waiting.at[row].set(False)), row

    start = (jnp.where(counted, jnp.inf, -jnp.inf), first & counted)
    return jax.lax.scan(take, start, None, length=num_seeds)[1].astype(jnp.int32)


@partial(jax.jit, static_argnames=("num_clusters",))
def merge_centers(
    centers: Array, counted: Array, num_clusters: int, max_steps: int = 1
) -> MergedCenters:
    """The server's part: clusters of the clients' centres (Alg. 2).

    It starts from the first client's centres, adds the centre farthest from those so
    far until there are k, and runs Lloyd's steps on all centres, each counted once.

    Cost: O(N r h k) for each step.

    Args:
        centers: theta, ``[N, r, h]``.
        counted: ``bool [N, r]``, those that take part: clusters that are not empty.
        num_clusters: k.
        max_steps: Lloyd's steps, each an assignment and the means of what was assigned.

    Returns:
        ``MergedCenters``.

    Example:
        >>> theta = jnp.array([[[0.0, 0.0], [10.0, 0.0]], [[1.0, 0.0], [0.0, 10.0]]])
        >>> merged = merge_centers(theta, jnp.ones((2, 2), bool), 3)
        >>> merged.labels.tolist(), merged.centers.round(3).tolist()
        ([[0, 1], [0, 2]], [[0.5, 0.0], [10.0, 0.0], [0.0, 10.0]])

    References:
        D. K. Dennis, T. Li and V. Smith, "Heterogeneity for the win: one-shot federated
        clustering", ICML 2021.
    """
    N, r, h = centers.shape
    counted = counted.reshape(-1)
    X, mean = centred(centers.reshape(-1, h), counted)
    rows = farthest_first(X, counted, jnp.arange(N * r) < r, num_clusters)
    merged, labels = lloyd(X, counted, X[rows], max_steps)
    seeds = X[rows] + mean[None]
    return MergedCenters(seeds, merged + mean[None], labels.reshape(N, r))
