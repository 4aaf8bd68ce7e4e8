"""Rules in passes over a cohort's updates that no one place holds whole.

``n`` updates of ``d`` parameters are ``4 n d`` bytes: 6.5 TB for a million clients of
1.6 million parameters. A rule that has an ``Aggregator.in_passes`` sees them as
``Rows``: chunks of clients that are trained, looked at and dropped, spread over the
devices of a run. Where they do not fit the memory they are allowed, every further pass
trains them again, which gives the same rows: what a client does depends on its key.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_sim import distances, order
from fedjax_sim.sharding import AXIS
from fedjax_sim.types import Array, PyTree

# From who takes part to the first and the last rank kept.
Ranks = Callable[[Array], tuple[Array | int, Array | int]]
# Bits of a float32 that one pass of ``mean_of_ranks`` settles, out of 32.
_DIGIT = 4
# Passes of a rank by its digits: 8, and one for what lies between two ranks.
_DIGIT_PASSES = 32 // _DIGIT + 1
# Numbers of held rows looked at together.
_HELD_CHUNK = 2**22


class Rows:
    """The updates ``[k, d]`` of a cohort, as rows that pass by.

    Of P devices, device p takes ``share = ceil(k / P)`` rows from ``p share`` on, one
    after the other. They are kept, if they fit ``memory``, or made again in every pass.
    A pass ends with one all-reduce, of its sums and of what it found of each row;
    devices exchange nothing else but the blocks of ``columns``.

    The first pass over rows must not stand inside a loop (``jax.lax.fori_loop``): what
    it learns besides, such as who is finite, is kept.

    Args:
        make: ``(places int32 [c]) -> (updates float32 [c, d], extras)``, of the rows at
            these places in the cohort; extras are arrays ``[c, ...]``.
        count: ``k``.
        size: ``d``.
        chunk: rows made at a time.
        memory: bytes of updates that a device may hold.
        mask: ``bool [k]``, who takes part; None for everybody. Rows that hold a
            non-finite value, or whose squared norm is not finite, take no part.
        num_devices: P. Above 1, all of this happens inside a ``shard_map``.

    Attributes:
        share: rows of a device.
        present: ``bool [k]``, who takes part; after the first pass.
        finite: ``bool [k]``, whose row is finite; after the first pass.
        extras: of every row ``[k, ...]``; after the first pass.

    Example:
        >>> import jax.numpy as jnp
        >>> U = jnp.array([[1.0, 2.0], [3.0, jnp.inf], [5.0, 6.0]])
        >>> rows = Rows(lambda places: (U[places], ()), 3, 2, chunk=2, memory=8)
        >>> total, norms = rows.scan(
        ...     lambda u, present: (u.sum(axis=0), jnp.linalg.norm(u, axis=1)))
        >>> total.tolist(), norms.astype(int).tolist(), rows.present.tolist()
        ([6.0, 8.0], [2, 0, 7], [True, False, True])
    """

    def __init__(
        self,
        make: Callable[[Array], tuple[Array, PyTree]],
        count: int,
        size: int,
        *,
        chunk: int,
        memory: int,
        mask: Array | None = None,
        num_devices: int = 1,
    ) -> None:
        self.count, self.size, self.memory = count, size, memory
        self.num_devices = num_devices
        self.share = -(-count // num_devices)
        chunk = min(chunk, self.share, max(memory // (4 * size), 1))
        self._num_chunks = -(-self.share // chunk)
        self._chunk = -(-self.share // self._num_chunks)
        self._here = self._num_chunks * self._chunk
        self._mask = mask
        self._make = make
        self._known: dict[str, Any] = {}
        self._trained: dict[str, Any] = {}
        self._held: Array | None = None
        if 4 * self._here * size <= memory:
            self._hold()

    def __len__(self) -> int:
        return self.count

    @property
    def present(self) -> Array:
        finite = self.finite
        return finite if self._mask is None else finite & self._mask

    @property
    def finite(self) -> Array:
        if "finite" not in self._known:
            raise ValueError(
                "who takes part is known after the first pass: call rows.scan or "
                "rows.columns before rows.present or rows.finite (a rule needs at "
                "least one pass)."
            )
        found: Array = self._known["finite"]
        return found

    @property
    def extras(self) -> PyTree:
        return self._trained["extras"]

    @property
    def num_blocks(self) -> int:
        """Blocks of columns that fit the memory; each is a pass, unless all do."""
        if self._held is not None:
            return 1
        width = max(self.memory // (4 * self._here), self.num_devices)
        return -(-self.size // width)

    def then(self, change: Callable[[Array, Array], Array]) -> "Rows":
        """The rows as ``change(updates [c, d], places [c])`` makes them."""
        derived = Rows.__new__(Rows)
        derived.__dict__.update(self.__dict__, _known={})

        def make(places: Array) -> tuple[Array, PyTree]:
            updates, extras = self._make(places)
            return change(updates, places), extras

        derived._make = make
        if self._held is not None:
            held, chunk = self._held, self._held_chunk

            def part(i: Array) -> Array:
                rows = jax.lax.dynamic_slice_in_dim(held, i * chunk, chunk)
                return change(rows, self._places(i, chunk))

            changed = jax.lax.map(part, jnp.arange(self._here // chunk))
            derived._held = changed.reshape(held.shape)
        return derived

    def whole(self) -> tuple[Array, PyTree]:
        """All rows ``[k, d]`` as they are, and extras, on every device.

        Of rows that are held.
        """
        assert self._held is not None, "memory must hold the rows of a device"
        found = (self._held, self._trained["here"])
        if self.num_devices > 1:
            found = jax.tree.map(lambda x: jax.lax.all_gather(x, AXIS), found)
            found = jax.tree.map(self._joined, found)
        return jax.tree.map(lambda x: x[: self.count], found)

    def _joined(self, of_devices: Array) -> Array:
        """From ``[P, rows made, ...]`` to ``[k, ...]``, without padding."""
        rows = of_devices[:, : self.share]
        return rows.reshape(-1, *rows.shape[2:])[: self.count]

    def scan(
        self, f: Callable[..., tuple[PyTree, PyTree]], *own: Array
    ) -> tuple[PyTree, PyTree]:
        """One pass: sums over the rows, and something of every row.

        Args:
            f: ``(updates [c, d], present bool [c], *own [c, ...]) -> (sums, of_rows)``.
                Rows that take no part are zero, and are not ``present``; sums must not
                count them. ``of_rows`` are arrays ``[c, ...]``.
            *own: arrays ``[k, ...]``, of which f gets those of its rows.

        Returns:
            The sums over all rows, and ``of_rows`` of the cohort, ``[k, ...]``.
        """
        sums, of_rows, others, _ = self._pass(f, own)
        sums, (of_rows, others) = self._together(sums, (of_rows, others))
        self._learn(others)
        return sums, of_rows

    def columns(
        self, f: Callable[[Array, Array, Array, Array], tuple[PyTree, PyTree]]
    ) -> tuple[PyTree, PyTree]:
        """All rows of some columns at a time.

        A pass for every block of columns that fits the memory; the devices exchange
        them, so that each sees all rows of its share of the block.

        Args:
            f: ``(block [k, b], real bool [b], present bool [k], norms [k]) -> (values
                with a last axis b, values to be summed over blocks)``. Rows that take
                no part are zero, and so are columns that are not ``real``, which sums
                must not count. ``norms`` are those of the whole rows.

        Returns:
            The joined values ``[..., d]`` and the sums.
        """
        P = self.num_devices
        width = -(-self.size // (self.num_blocks * P))  # of a device
        blocks = -(-self.size // (P * width))
        padded = blocks * P * width
        me = jax.lax.axis_index(AXIS) if P > 1 else 0

        def of_block(j: Array) -> Any:
            sums, _, others, (block, norms) = self._pass(
                lambda *_: ((), ()), (), (j * P * width, P * width)
            )
            del sums
            seen = jnp.stack([others["present"].astype(jnp.float32), norms], axis=1)
            block, seen = self._exchange(block, seen)
            present, norms = seen[:, 0] > 0, seen[:, 1]
            start = (j * P + me) * width
            real = start + jnp.arange(width) < self.size
            joined, summed = f(block, real, present, norms)
            return joined, summed, others

        def add(carry: PyTree, j: Array) -> tuple[PyTree, PyTree]:
            joined, summed, others = of_block(j)
            return (jax.tree.map(jnp.add, carry[0], summed), others), joined

        start = zeros_like_result(lambda: of_block(jnp.int32(0))[1:])
        (summed, others), joined = jax.lax.scan(add, start, jnp.arange(blocks))

        def place(x: Array) -> Array:
            """From ``[blocks, ..., width]`` to the columns of all devices."""
            everywhere = jnp.zeros((P, *x.shape), x.dtype).at[me].set(x)
            moved = jnp.moveaxis(everywhere, (1, 0), (-3, -2))
            return moved.reshape(*moved.shape[:-3], padded)

        sums = (jax.tree.map(place, joined), summed)
        (joined, summed), others = self._together(sums, others)
        self._learn(others)
        return jax.tree.map(lambda x: x[..., : self.size], joined), summed

    @property
    def _held_chunk(self) -> int:
        """Held rows looked at together: whole chunks, not too many numbers."""
        most = max(_HELD_CHUNK // (self.size * self._chunk), 1)
        together = next(
            n
            for n in range(min(most, self._num_chunks), 0, -1)
            if self._num_chunks % n == 0
        )
        return together * self._chunk

    def _hold(self) -> None:
        """Makes all rows of this device, once."""

        def made(i: Array) -> tuple[Array, PyTree]:
            return self._make(self._places(i, self._chunk))

        held, extras = jax.tree.map(
            lambda x: x.reshape(self._here, *x.shape[2:]),
            jax.lax.map(made, jnp.arange(self._num_chunks)),
        )
        self._held, self._trained["here"] = held, extras

    def _places(self, i: Array, chunk: int) -> Array:
        """Places in the cohort of the rows of a chunk; the last again for padding."""
        places = self._unbounded(i, chunk)
        return jnp.minimum(places, self.count - 1)

    def _unbounded(self, i: Array, chunk: int) -> Array:
        """The same, from ``count`` on where a row is padding."""
        me = jax.lax.axis_index(AXIS) if self.num_devices > 1 else 0
        own = i * chunk + jnp.arange(chunk)
        return jnp.where(own < self.share, me * self.share + own, self.count)

    def _pass(
        self,
        f: Callable[..., tuple[PyTree, PyTree]],
        own: tuple[Array, ...],
        columns: tuple[Array, int] | None = None,
    ) -> tuple[PyTree, PyTree, dict[str, Any], Any]:
        """Sums and rows of this device, who is present, and a block with its norms."""
        chunk = self._chunk if self._held is None else self._held_chunk
        new = "extras" not in self._trained

        def visit(i: Array) -> Any:
            places = self._places(i, chunk)
            real = self._unbounded(i, chunk) < self.count
            if self._held is None:
                updates, extras = self._make(places)
            else:
                start = i * chunk
                updates = jax.lax.dynamic_slice_in_dim(self._held, start, chunk)
                extras = jax.tree.map(
                    lambda x: jax.lax.dynamic_slice_in_dim(x, start, chunk),
                    self._trained["here"],
                )
            squares = jnp.square(updates).sum(axis=1)
            finite = jnp.isfinite(squares)
            present = real & finite
            if self._mask is not None:
                present &= self._mask[places]
            updates = jnp.where(present[:, None], updates, 0.0)
            sums, rows = f(updates, present, *(x[places] for x in own))
            others = {"finite": finite, "present": present}
            if new:
                others["extras"] = extras
            block: Any = ()
            if columns is not None:
                start, width = columns
                wide = jnp.pad(updates, ((0, 0), (0, -self.size % width)))
                block = (
                    jax.lax.dynamic_slice_in_dim(wide, start, width, 1),
                    jnp.where(present, jnp.sqrt(squares), 0.0),
                )
            return sums, (rows, others, block)

        def add(total: PyTree, i: Array) -> tuple[PyTree, PyTree]:
            sums, out = visit(i)
            return jax.tree.map(jnp.add, total, sums), out

        zero = zeros_like_result(lambda: visit(jnp.int32(0))[0])
        total, out = jax.lax.scan(add, zero, jnp.arange(self._here // chunk))
        rows, others, block = jax.tree.map(
            lambda x: x.reshape(self._here, *x.shape[2:]), out
        )
        return total, rows, others, block

    def _exchange(self, block: Array, seen: Array) -> tuple[Array, Array]:
        """From some rows of a block to all rows of this device's share of it.

        What was seen of a row travels with it.
        """
        P = self.num_devices
        if P == 1:
            return block[: self.count], seen[: self.count]
        parts = block.reshape(self._here, P, -1)
        also = jnp.broadcast_to(seen[:, None], (self._here, P, seen.shape[1]))
        parts = jnp.concatenate([also, parts], axis=2).swapaxes(0, 1)
        rows = jax.lax.all_to_all(parts, AXIS, split_axis=0, concat_axis=0)
        rows = self._joined(rows.reshape(P, self._here, -1))
        return rows[:, seen.shape[1] :], rows[:, : seen.shape[1]]

    def _together(self, sums: PyTree, of_rows: PyTree) -> tuple[PyTree, PyTree]:
        """Sums over all devices, and the rows of all, by one all-reduce."""
        if self.num_devices == 1:
            return sums, jax.tree.map(lambda x: x[: self.count], of_rows)
        me = jax.lax.axis_index(AXIS)

        def place(x: Array) -> Array:
            everywhere = jnp.zeros((self.num_devices, *x.shape), x.dtype)
            return everywhere.at[me].set(x)

        totals = all_reduce((sums, jax.tree.map(place, of_rows)))
        sums, of_rows = totals
        return sums, jax.tree.map(self._joined, of_rows)

    def _learn(self, others: dict[str, Any]) -> None:
        self._known.setdefault("finite", others["finite"])
        if "extras" in others:
            self._trained.setdefault("extras", others["extras"])


def zeros_like_result(f: Callable[[], PyTree]) -> PyTree:
    """Zeros of the shapes and types that ``f`` returns, without running it."""
    shapes = jax.eval_shape(f)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def all_reduce(tree: PyTree) -> PyTree:
    """The sum of a tree over all devices, in one all-reduce.

    Integers and booleans travel as float32, which holds them exactly up to ``2**24``.
    """
    sums = jax.lax.psum(jax.tree.map(lambda x: x.astype(jnp.float32), tree), AXIS)
    return jax.tree.map(
        lambda x, old: x > 0 if old.dtype == bool else x.astype(old.dtype), sums, tree
    )


def weighted_mean(
    rows: Rows,
    weigh: Callable[..., tuple[Array, Array, PyTree]],
    *own: Array,
    floor: float = 0.0,
) -> tuple[Array, Array, Any]:
    """``sum_i factor_i u_i / sum_i weight_i`` in one pass.

    Args:
        rows: the updates.
        weigh: ``(updates [c, d], *own [c, ...]) -> (factor [c], weight [c], details)``
            of every row by itself. Those of rows that take no part do not count.
        *own: arrays ``[k, ...]`` for ``weigh``.
        floor: up to this a sum of weights counts as zero, and so does the mean.

    Returns:
        The mean ``[d]``, the weights ``[k]`` over their sum, and the details
        ``[k, ...]``.

    Example:
        >>> import jax.numpy as jnp
        >>> U = jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, jnp.nan]])
        >>> rows = Rows(lambda places: (U[places], ()), 3, 2, chunk=2, memory=8)
        >>> alike = lambda u: (jnp.ones(len(u)), jnp.ones(len(u)), ())
        >>> mean, weights, _ = weighted_mean(rows, alike)
        >>> mean.tolist(), weights.tolist()
        ([2.0, 3.0], [0.5, 0.5, 0.0])
    """

    def part(updates: Array, present: Array, *own: Array) -> tuple[PyTree, PyTree]:
        factor, weight, details = weigh(updates, *own)
        factor, weight = (jnp.where(present, x, 0.0) for x in (factor, weight))
        total = jnp.matmul(factor, updates, precision=jax.lax.Precision.HIGHEST)
        return (total, weight.sum()), (weight, details)

    (total, weight), (weights, details) = rows.scan(part, *own)
    share = jnp.where(weight > floor, 1.0 / jnp.where(weight > floor, weight, 1.0), 0.0)
    return total * share, weights * share, details


def mean(rows: Rows, sizes: Array) -> tuple[Array, Array]:
    """The mean ``[d]`` of those that take part, by their sizes, and its weights."""

    def weigh(updates: Array, sizes: Array) -> tuple[Array, Array, tuple]:
        return sizes, sizes, ()

    return weighted_mean(rows, weigh, sizes)[:2]


def norms(rows: Rows) -> Array:
    """Euclidean norms ``[k]`` of the updates, 0 of those that take no part."""
    return rows.scan(lambda updates, _: ((), jnp.linalg.norm(updates, axis=1)))[1]


def distances_to(rows: Rows, point: Array) -> Array:
    """``distances.distances_to`` ``[k]``, in one pass."""
    return rows.scan(lambda updates, _: ((), distances.distances_to(updates, point)))[1]


def repeat(
    count: int, step: Callable[[Any, PyTree], PyTree], start: tuple[Array, ...]
) -> Any:
    """``step(i, carry)``, ``count`` times, of which the first stands outside the loop.

    The first carry may be shorter than what a step returns.
    """
    return jax.lax.fori_loop(1, count, step, step(0, start))


def weighted_sum(rows: Rows, weights: Array) -> Array:
    """``sum_i weights_i u_i`` of those that take part, in one pass."""

    def part(updates: Array, present: Array, weights: Array) -> tuple[Array, tuple]:
        used = jnp.where(present, weights, 0.0)
        return jnp.matmul(used, updates, precision=jax.lax.Precision.HIGHEST), ()

    return rows.scan(part, weights)[0]


def mean_of_ranks(rows: Rows, ranks: Ranks) -> tuple[Array, Array]:
    """``order.mean_of_ranks``: per column the mean of the values of some ranks.

    By blocks of columns as long as those take no more passes than by digits. By digits,
    a pass counts how many values of every column have each of the 16 next digits of
    their binary form, and so settles four of the 32 bits of the lowest and the highest
    value kept, in ``O(d)`` memory; a last pass sums what lies between.

    Args:
        rows: the updates.
        ranks: from who takes part, ``bool [k]``, to the first and last rank kept.

    Returns:
        The means ``[d]`` and the shares ``[k]``, as there.

    Example:
        >>> import jax.numpy as jnp
        >>> U = jnp.array([[1.0, 9.0], [2.0, 5.0], [3.0, 6.0]])
        >>> rows = Rows(lambda places: (U[places], ()), 3, 2, chunk=1, memory=8)
        >>> means, shares = mean_of_ranks(rows, lambda mask: (1, 1))
        >>> means.tolist(), shares.tolist()
        ([2.0, 6.0], [0.0, 0.5, 0.5])
    """
    if rows.num_blocks <= _DIGIT_PASSES:
        means, supplied = _by_blocks(rows, ranks)
    else:
        means, supplied = _by_digits(rows, ranks)
    return means, supplied / jnp.maximum(supplied.sum(), 1.0)


def _by_blocks(rows: Rows, ranks: Ranks) -> tuple[Array, Array]:
    def part(block: Array, real: Array, present: Array, norms: Array) -> Any:
        first, last = ranks(present)
        means, supplied, _ = order.of_ranks(block, present, first, last, real=real)
        return means, supplied

    return rows.columns(part)


def _by_digits(rows: Rows, ranks: Ranks) -> tuple[Array, Array]:
    digits = jnp.arange(1 << _DIGIT, dtype=jnp.uint32)
    columns = jnp.arange(rows.size)

    def counts(prefixes: Array, shift: Array) -> Array:
        """``[2, 16, d]``: values by their next digit, of those that start alike."""

        def part(updates: Array, present: Array) -> tuple[PyTree, tuple]:
            keys = _sortable(updates)
            digit = (keys >> shift) & jnp.uint32(len(digits) - 1)

            def of(prefix: Array) -> Array:
                # A shift by all 32 bits is not defined: by four, twice.
                alike = (keys >> shift >> _DIGIT) == prefix[None]
                hits = jnp.where(alike & present[:, None], 1.0, 0.0)
                zero = jnp.zeros((len(digits), rows.size))
                return zero.at[digit.astype(jnp.int32), columns[None]].add(hits)

            return jax.vmap(of)(prefixes), ()

        found: Array = rows.scan(part)[0]
        return found

    def narrow(
        state: tuple[Array, Array, Array], found: Array
    ) -> tuple[Array, Array, Array]:
        """One digit more: the values' prefixes, and how many values lie below them."""
        prefixes, below, _ = state
        upto = below[:, None] + jnp.cumsum(found, axis=1)
        # The digit whose values include the rank: the first that reaches beyond it.
        digit = (upto <= wanted[:, None, None]).sum(axis=1)
        digit = jnp.minimum(digit, len(digits) - 1)

        def at(x: Array) -> Array:
            return jnp.take_along_axis(x, digit[:, None], axis=1)[:, 0]

        prefixes = (prefixes << _DIGIT) | digit.astype(jnp.uint32)
        return prefixes, at(upto) - at(found), at(found)

    start = jnp.zeros((2, rows.size), jnp.uint32)
    found = counts(start, jnp.uint32(32 - _DIGIT))
    first, last = ranks(rows.present)
    first, last = jnp.maximum(first, 0), jnp.minimum(last, rows.present.sum() - 1)
    num_kept = jnp.maximum(last - first + 1, 0)
    wanted = jnp.stack([first, last]).astype(jnp.float32)
    state = narrow((start, jnp.zeros(start.shape), jnp.zeros(start.shape)), found)

    def step(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        shift = (32 - _DIGIT - i * _DIGIT).astype(jnp.uint32)
        return narrow(state, counts(state[0], shift))

    prefixes, below, ties = jax.lax.fori_loop(1, 32 // _DIGIT, step, state)
    low, high = _from_sortable(prefixes)
    # The values equal to the lowest and the highest kept, and how many are kept.
    single = low == high
    kept_low = jnp.where(single, num_kept, below[0] + ties[0] - first)
    kept_high = jnp.where(single, 0.0, last + 1 - below[1])
    part_low = kept_low / jnp.maximum(ties[0], 1.0)
    part_high = jnp.where(single, part_low, kept_high / jnp.maximum(ties[1], 1.0))

    def between(updates: Array, present: Array) -> tuple[Array, Array]:
        inside = present[:, None] & (updates > low[None]) & (updates < high[None])
        supplied = jnp.where(inside, 1.0, 0.0)
        supplied = jnp.where(updates == high[None], part_high[None], supplied)
        supplied = jnp.where(updates == low[None], part_low[None], supplied)
        supplied = jnp.where(present[:, None], supplied, 0.0).sum(axis=1)
        return jnp.where(inside, updates, 0.0).sum(axis=0), supplied

    total, supplied = rows.scan(between)
    total = total + kept_low * low + kept_high * high
    none = num_kept == 0
    means = jnp.where(none, 0.0, total / jnp.maximum(num_kept, 1))
    return means, jnp.where(none, 0.0, supplied)


def _sortable(x: Array) -> Array:
    """``uint32`` in the order of the float32 values; 0 and -0 are one value."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0.0, 0.0, x), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _from_sortable(keys: Array) -> Array:
    bits = jnp.where(keys >> 31 == 1, keys ^ jnp.uint32(1 << 31), ~keys)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def sq_distances(rows: Rows, pool: Array | None = None, scale: Any = None) -> Array:
    """``distances.pairwise_sq_distances`` ``[k, k]``, a block of columns at a time.

    Args:
        rows: the updates.
        pool: ``bool [k]``, whose entries mean something; None for all that take part.
        scale: ``(norms [k]) -> [k]``, by which rows are multiplied before; or None.
    """

    def part(block: Array, real: Array, present: Array, norms: Array) -> Any:
        mask = present if pool is None else present & pool
        if scale is not None:
            factors = scale(norms)
            block, norms = block * factors[:, None], norms * factors
        middle = distances.middle_row(norms**2, mask)
        return (), distances.gram(block, mask, middle)

    return distances.from_gram(rows.columns(part)[1])
