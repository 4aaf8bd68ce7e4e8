"""Order statistics over the client axis, by a network of whole-row comparisons.

``jnp.sort`` over the client axis is a comparator loop per column on CPU, some forty
times slower than these few dozen row-wise ``minimum`` and ``maximum`` calls.
Rows must hold no NaN: callers pass what ``pytrees.participants`` returns.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sim.registry import lookup
from fedjax_sim.types import Array, PyTree

# Columns sorted at once on a CPU: so many that all rows of them stay in its caches, and
# its cores have enough to share. Of 10,000 rows, 64 columns take a fifth of the time
# that 4,096 take.
_CPU_BLOCK = (64, 4096)
_CPU_NUMBERS = 2**19

_EVEN = {"midpoint": 2, "lower": 1}


@jax.jit
def sort_clients(U: Array) -> Array:
    """Every column of ``U [n, d]`` in ascending order.

    A bitonic network: ``k (k + 1) / 2`` stages of row-wise minimum and maximum, with n
    padded to ``2**k`` rows of ``+inf``. The values come back sorted, not their indices.

    Args:
        U: float ``[n, d]`` without NaN; infinities are welcome.

    Returns:
        ``[n, d]``, the smallest value of each column first.

    Example:
        >>> import jax.numpy as jnp
        >>> sort_clients(jnp.array([[3.0, 1.0], [1.0, 2.0], [2.0, 0.0]])).tolist()
        [[1.0, 0.0], [2.0, 1.0], [3.0, 2.0]]

    References:
        Batcher, "Sorting networks and their applications", AFIPS 1968.
    """
    return map_columns(lambda block, _: (_sort_rows(block), ()), U)[0]


def mean_of_ranks(
    U: Array, mask: Array, first: Array | int, last: Array | int
) -> tuple[Array, Array]:
    """Per column, the mean of the participants' values of rank ``first`` to ``last``.

    Kept ranks are selected and averaged, never subtracted from a sum: a value of 1e8
    that is trimmed away leaves no rounding error behind.

    Args:
        U: float ``[n, d]`` without NaN.
        mask: ``bool [n]``, the rows that are ranked, from rank 0.
        first: lowest rank kept, an integer that may be traced.
        last: highest rank kept, inclusive.

    Returns:
        The means ``[d]``, zero if no rank is kept, and the shares ``[n]``: the part of
        all kept values that each client supplied. Where tied clients supplied fewer
        values than there are clients, they share alike. Shares sum to 1, or to 0 if no
        rank is kept.

    Example:
        >>> import jax.numpy as jnp
        >>> U = jnp.array([[1.0, 9.0], [2.0, 5.0], [3.0, 6.0]])
        >>> values, shares = mean_of_ranks(U, jnp.ones(3, bool), first=1, last=1)
        >>> values.tolist(), shares.tolist()
        ([2.0, 6.0], [0.0, 0.5, 0.5])
    """
    means, supplied, _ = of_ranks(U, mask, first, last)
    return means, supplied / jnp.maximum(supplied.sum(), 1.0)


def supplied_where_moved(
    U: Array, mask: Array, first: Array | int, last: Array | int
) -> tuple[Array, Array, Array]:
    """As ``mean_of_ranks``, counting only the columns whose mean is not 0.

    Returns:
        The means ``[d]``; ``[n]``, how many kept values each client supplied in these
        columns, a part of one where it shares it; and the number of these columns,
        ``float32 []``.

    Example:
        >>> import jax.numpy as jnp
        >>> U = jnp.array([[1.0, 9.0, 0.0], [2.0, 5.0, 0.0], [3.0, 6.0, 0.0]])
        >>> _, supplied, columns = supplied_where_moved(U, jnp.ones(3, bool), 1, 1)
        >>> supplied.tolist(), columns.item()
        ([0.0, 1.0, 1.0], 2.0)
    """
    return of_ranks(U, mask, first, last, moved=True)


@functools.partial(jax.jit, static_argnames="moved")
def of_ranks(
    U: Array,
    mask: Array,
    first: Array | int,
    last: Array | int,
    moved: bool = False,
    real: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Means, values supplied, and columns counted: all, or those that ``moved``.

    With ``real``, ``bool [d]``, only of columns that are.
    """
    real = jnp.ones(U.shape[1], bool) if real is None else real
    num_rows = len(U)
    rank = jnp.arange(num_rows)
    ranked = rank < mask.sum()
    kept = ranked & (rank >= first) & (rank <= last)
    num_kept = jnp.maximum(kept.sum(), 1)
    # The values at the two ends of what is kept; any index will do if nothing is.
    first = jnp.clip(first, 0, num_rows - 1)
    last = jnp.clip(last, 0, num_rows - 1)

    def one_block(
        block: Array, fresh: Array, real: Array
    ) -> tuple[Array, tuple[Array, Array]]:
        ordered = _sort_rows(jnp.where(mask[:, None], block, jnp.inf))
        mean = jnp.where(kept[:, None], ordered, 0.0).sum(axis=0) / num_kept

        low, high = ordered[first], ordered[last]
        counted = fresh & real
        if moved:
            counted &= mean != 0.0
        inside = (block >= low[None]) & (block <= high[None])
        inside &= mask[:, None] & counted[None]

        def tied(value: Array) -> Array:
            """The part of the ties at ``value`` that is kept, between 0 and 1."""
            ties = ordered == value[None]
            among = jnp.where(ties & ranked[:, None], 1.0, 0.0).sum(axis=0)
            of_kept = jnp.where(ties & kept[:, None], 1.0, 0.0).sum(axis=0)
            return (of_kept / jnp.maximum(among, 1.0))[None]

        def whole() -> Array:
            return jnp.where(inside, 1.0, 0.0).sum(axis=1)

        def shared() -> Array:
            supplied = jnp.where(block == high[None], tied(high), 1.0)
            supplied = jnp.where(block == low[None], tied(low), supplied)
            return jnp.where(inside, supplied, 0.0).sum(axis=1)

        before, after = jnp.maximum(first - 1, 0), jnp.minimum(last + 1, num_rows - 1)
        cut = (first > 0) & (ordered[before] == low)
        cut |= (last + 1 < mask.sum()) & (ordered[after] == high)
        # Hardly ever is one of several equal values kept and another one not.
        supplied = jax.lax.cond(cut.any(), shared, whole)
        return mean, (supplied, jnp.where(counted, 1.0, 0.0).sum())

    means, (supplied, columns) = map_columns(one_block, U, real)
    return means, jnp.where(kept.any(), supplied, 0.0), columns


@jax.jit
def means_without_each(
    U: Array, mask: Array, first: Array | int, last: Array | int
) -> Array:
    """For each row the means of ``mean_of_ranks`` over all the other participants.

    Sorting once serves all rows. Among the others, ranks ``first`` to ``last`` are the
    values of rank ``first`` to ``last + 1`` among all, without the row's own or, where
    that lies outside of them, without the nearest.

    Args:
        U: float ``[n, d]`` without NaN.
        mask: ``bool [n]``, the rows that are ranked.
        first: lowest rank kept, an integer that may be traced.
        last: highest rank kept, inclusive, of one participant fewer.

    Returns:
        ``[n, d]``, zero if no rank is kept; of rows that take no part it may be
        anything.

    Example:
        >>> import jax.numpy as jnp
        >>> U = jnp.array([[1.0], [2.0], [6.0], [9.0]])
        >>> means_without_each(U, jnp.ones(4, bool), first=1, last=1).tolist()
        [[6.0], [6.0], [2.0], [2.0]]
    """
    num_rows = len(U)
    rank = jnp.arange(num_rows)
    # The ranks there are among the others.
    first, last = jnp.maximum(first, 0), jnp.minimum(last, mask.sum() - 2)
    count = jnp.maximum(last - first + 1, 0)
    between = (rank > first) & (rank <= last)
    low_rank = jnp.clip(first, 0, num_rows - 1)
    high_rank = jnp.clip(last + 1, 0, num_rows - 1)

    def one_block(block: Array, fresh: Array) -> tuple[Array, tuple[()]]:
        ordered = _sort_rows(jnp.where(mask[:, None], block, jnp.inf))
        inner = jnp.where(between[:, None], ordered, 0.0).sum(axis=0)[None]
        low, high = ordered[low_rank][None], ordered[high_rank][None]
        total = jnp.where(
            block <= low,
            inner + high,
            jnp.where(block >= high, inner + low, (inner - block) + (low + high)),
        )
        return jnp.where(count > 0, total / jnp.maximum(count, 1), 0.0), ()

    return map_columns(one_block, U)[0]


def mean_near(
    U: Array, mask: Array, centre: Array, count: Array | int
) -> tuple[Array, Array]:
    """Per column, the mean of the ``count`` participants' values nearest to a centre.

    Of values equally far away those of the lowest client index are kept.

    Args:
        U: float ``[n, d]``, finite.
        mask: ``bool [n]``, the rows that take part.
        centre: ``[d]``, finite.
        count: values kept per column, an integer that may be traced. Where fewer take
            part, all of theirs are kept.

    Returns:
        The means ``[d]``, zero if no value is kept, and the shares ``[n]``: the part of
        all kept values that each client supplied. They sum to 1, or to 0.

    Example:
        >>> import jax.numpy as jnp
        >>> U = jnp.array([[1.0, 9.0], [2.0, 5.0], [4.0, 6.0]])
        >>> means, shares = mean_near(U, jnp.ones(3, bool), jnp.array([3.0, 5.0]), 2)
        >>> means.tolist(), shares.tolist()
        ([3.0, 5.5], [0.0, 0.5, 0.5])
    """
    means, supplied = values_near(U, mask, centre, count)
    kept = U.shape[1] * jnp.clip(count, 0, mask.sum())
    return means, supplied / jnp.maximum(kept, 1)


@jax.jit
def values_near(
    U: Array,
    mask: Array,
    centre: Array,
    count: Array | int,
    real: Array | None = None,
) -> tuple[Array, Array]:
    """The means of ``mean_near``, and how many kept values each client supplied.

    With ``real``, ``bool [d]``, only of columns that are.
    """
    num_rows = len(U)
    real = jnp.ones(U.shape[1], bool) if real is None else real
    rank = jnp.arange(num_rows)
    count = jnp.clip(count, 0, mask.sum())
    # Counts rows up to each row as a cumulative sum would, which is far slower on CPUs.
    # Sums of ones are exact at any precision of the product.
    so_far = jnp.tri(num_rows)

    def one_block(
        block: Array, fresh: Array, centre: Array, real: Array
    ) -> tuple[Array, Array]:
        # Distances only say where in the sorted column the kept values start. Comparing
        # a client's distance with the largest one kept would take the same rounding in
        # both, which a compiler that computes the centre twice does not promise.
        ordered = _sort_rows(jnp.where(mask[:, None], block, jnp.inf))
        far = jnp.abs(ordered - centre[None])
        up = rank + count
        next_far = jnp.abs(ordered[jnp.minimum(up, num_rows - 1)] - centre[None])
        in_place = jnp.where((up < num_rows)[:, None], next_far, jnp.inf)

        def behind(leaves: Array) -> Array:
            """The rank after the last one that leaves for the value ``count`` on."""
            return jnp.where(leaves, rank[:, None] + 1, 0).max(axis=0)

        def at(index: Array) -> Array:
            return jnp.take_along_axis(ordered, index[None], axis=0, mode="clip")

        start = behind(in_place < far)
        low, high = at(start), at(start + count - 1)
        low_far, high_far = jnp.abs(low - centre[None]), jnp.abs(high - centre[None])
        # The lowest value kept may give way to one as far above the centre.
        last = jnp.maximum(start, behind((ordered == low) & (in_place <= far)))
        closed = mask[:, None] & (block >= low) & (block <= high)

        def break_ties() -> Array:
            # The farthest values kept, of which there may be more than are kept.
            lower = jnp.where(low_far >= high_far, low, -jnp.inf)
            upper = jnp.where(high_far >= low_far, high, jnp.inf)
            upper = jnp.where(last > start, at(last + count - 1), upper)
            edge = mask[:, None] & ((block == lower) | (block == upper))
            inside = closed & ~edge
            room = count - jnp.where(inside, 1.0, 0.0).sum(axis=0, keepdims=True)
            return inside | (edge & (so_far @ jnp.where(edge, 1.0, 0.0) <= room))

        # Hardly ever does a value left out lie as far away as one that is kept.
        tied = (last > start) | (jnp.where(closed, 1, 0).sum(axis=0) > count)
        kept = jax.lax.cond(tied.any(), break_ties, lambda: closed)
        kept &= count > 0
        num_kept = jnp.maximum(jnp.where(kept, 1.0, 0.0).sum(axis=0), 1.0)
        mean = jnp.where(kept, block, 0.0).sum(axis=0) / num_kept
        counted = (fresh & real)[None]
        return mean, jnp.where(kept & counted, 1.0, 0.0).sum(axis=1)

    return map_columns(one_block, U, centre, real)


@jax.jit
def sum_of_smallest(x: Array, count: Array | int) -> Array:
    """The sum of the ``count`` smallest values of every row that are not infinite.

    The count-th smallest is found by bisection over the binary form of the values, 31
    times. While the rows stay in cache, and they have thousands of values, this takes a
    tenth of the time of sorting them.

    Args:
        x: float32 ``[r, n]``, at least 0 or ``inf``.
        count: values summed, an integer that may be traced. Where fewer are finite,
            those are summed.

    Returns:
        ``[r]``.

    Example:
        >>> import jax.numpy as jnp
        >>> sum_of_smallest(jnp.array([[3.0, 1.0, jnp.inf, 2.0]]), 2).tolist()
        [3.0]
    """
    infinity = int(np.float32(np.inf).view(np.int32))

    def of_row(row: Array) -> Array:
        bits = jax.lax.bitcast_convert_type(row, jnp.int32)

        def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = ends
            middle = low + (high - low) // 2
            enough = (bits <= middle).sum() >= count
            return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

        ends = (jnp.int32(0), jnp.int32(infinity))
        last = jax.lax.fori_loop(0, 31, halve, ends)[1]
        below = bits < last
        value = jax.lax.bitcast_convert_type(last, jnp.float32)
        more = jnp.maximum(count - below.sum(), 0)
        total = jnp.where(below, row, 0.0).sum()
        return total + jnp.where(last < infinity, more * value, 0.0)

    return jax.vmap(of_row)(x)


def median(U: Array, mask: Array | None = None, even: str = "midpoint") -> Array:
    """Median of every column over the participants.

    Args:
        U: float ``[n, d]`` without NaN.
        mask: ``bool [n]``, who takes part; None for everybody.
        even: of an even count, ``"midpoint"`` averages the two middle values (NumPy),
            ``"lower"`` takes the lower one (PyTorch).

    Returns:
        ``[d]``, zeros if nobody takes part.

    Example:
        >>> import jax.numpy as jnp
        >>> U = jnp.array([[1.0], [2.0], [4.0], [9.0]])
        >>> median(U).item(), median(U, even="lower").item()
        (3.0, 2.0)
    """
    mask = jnp.ones(len(U), bool) if mask is None else mask
    return mean_of_ranks(U, mask, *median_ranks(mask.sum(), even))[0]


def median_ranks(
    num_rows: Array | int, even: str = "midpoint"
) -> tuple[Array | int, Array | int]:
    """First and last rank of the median of ``num_rows`` values.

    Example:
        >>> median_ranks(4), median_ranks(4, even="lower")
        ((1, 2), (1, 1))
    """
    middle = lookup("median of an even count", even, _EVEN)
    return (num_rows - 1) // 2, (num_rows - 2 + middle) // 2


def trimmed_mean(U: Array, mask: Array | None, trim: Array | int) -> Array:
    """Mean of every column without its ``trim`` largest and ``trim`` smallest values.

    Args:
        U: float ``[n, d]`` without NaN.
        mask: ``bool [n]``, who takes part; None for everybody.
        trim: values cut at each end, an integer that may be traced.

    Returns:
        ``[d]``, zeros if nothing is left.

    Example:
        >>> import jax.numpy as jnp
        >>> trimmed_mean(jnp.array([[1.0], [2.0], [1e8], [6.0]]), None, trim=1).item()
        4.0
    """
    mask = jnp.ones(len(U), bool) if mask is None else mask
    return mean_of_ranks(U, mask, trim, mask.sum() - 1 - trim)[0]


def _sort_rows(x: Array) -> Array:
    """The bitonic network itself, on all columns of ``x [n, b]`` at once."""
    num_rows, num_columns = x.shape
    padded = 1 << (num_rows - 1).bit_length()
    if padded > num_rows:
        fill = jnp.full((padded - num_rows, num_columns), jnp.inf, x.dtype)
        x = jnp.concatenate([x, fill])
    half = 1
    while half < padded:
        # Merges ascending runs of `half` rows in stages of stride half, half / 2 ... 1,
        # of which the first turns every second run round. Two stages at a time take
        # half as many passes over the cache.
        stride, turn = half, True
        while stride > 1:
            x = _compare_quarters(x, stride // 2, turn)
            stride, turn = stride // 4, False
        if stride == 1:
            x = _compare_neighbours(x)
        half *= 2
    return x[:num_rows]


def _compare_neighbours(x: Array) -> Array:
    """A stage of stride 1: orders rows 0 and 1, 2 and 3, and so on."""
    pairs = x.reshape(len(x) // 2, 2, x.shape[1])
    low = jnp.minimum(pairs[:, 0], pairs[:, 1])
    high = jnp.maximum(pairs[:, 0], pairs[:, 1])
    return jnp.stack([low, high], axis=1).reshape(x.shape)


def _compare_quarters(x: Array, quarter: int, turn: bool) -> Array:
    """Stages of stride ``2 * quarter`` and ``quarter``, row against row.

    With ``turn`` the second half of each group of ``4 * quarter`` rows is reversed
    before the first of them, and back after it.
    """
    groups = x.reshape(len(x) // (4 * quarter), 4, quarter, x.shape[1])
    a, b, c, d = (groups[:, i] for i in range(4))
    if turn:
        c, d = d[:, ::-1], c[:, ::-1]
    a, c = jnp.minimum(a, c), jnp.maximum(a, c)
    b, d = jnp.minimum(b, d), jnp.maximum(b, d)
    if turn:
        c, d = d[:, ::-1], c[:, ::-1]
    ordered = [jnp.minimum(a, b), jnp.maximum(a, b)]
    ordered += [jnp.minimum(c, d), jnp.maximum(c, d)]
    return jnp.stack(ordered, axis=1).reshape(x.shape)


def map_columns(
    f: Callable[..., tuple[PyTree, PyTree]],
    U: Array,
    *rows: Array,
    block: int | None = None,
) -> tuple[PyTree, PyTree]:
    """``f`` over blocks of columns that fit a cache; over all of them off the CPU.

    ``f(block [n, b], fresh bool[b], *the same columns of rows)`` returns values with a
    last axis ``b``, which are joined, and values that are summed over blocks. The last
    block overlaps the one before it rather than being padded; ``fresh`` is False on the
    columns seen before. ``rows`` are further arrays ``[..., d]``. A block of columns of
    a CPU has ``block`` of them, by default as many as fit its caches.
    """
    num_rows, num_columns = U.shape
    if block is None:
        fewest, most = _CPU_BLOCK
        block = min(max(_CPU_NUMBERS // num_rows, fewest), most)
    if jax.default_backend() != "cpu":
        block = num_columns
    if num_columns <= block:
        return f(U, jnp.ones(num_columns, bool), *rows)
    num_blocks = -(-num_columns // block)
    overlap = num_blocks * block - num_columns

    def one_block(i: Array) -> tuple[Array, PyTree]:
        start = jnp.minimum(i * block, num_columns - block)
        columns, *others = (
            jax.lax.dynamic_slice_in_dim(x, start, block, axis=-1) for x in (U, *rows)
        )
        return f(columns, start + jnp.arange(block) >= i * block, *others)

    def join(blocks: Array) -> Array:
        blocks = jnp.moveaxis(blocks, 0, -2)
        head = blocks[..., :-1, :].reshape(*blocks.shape[:-2], -1)
        return jnp.concatenate([head, blocks[..., -1, overlap:]], axis=-1)

    joined, summed = jax.lax.map(one_block, jnp.arange(num_blocks))
    return jax.tree.map(join, joined), jax.tree.map(lambda x: x.sum(axis=0), summed)
