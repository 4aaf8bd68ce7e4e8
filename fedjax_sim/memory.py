"""How much memory a run will take, and whether there is as much."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax

from fedjax_sim.buffers import peak_of
from fedjax_sim.sharding import size_in_bytes
from fedjax_sim.types import AnyArray

if TYPE_CHECKING:
    from fedjax_sim.simulation import Comparison, Simulation
    from fedjax_sim.state import RoundState

# Limits of containers and batch systems, and what is used of them (versions 2 and 1).
_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)


class Memory(NamedTuple):
    """Bytes that a run takes, of all its devices that share a memory.

    Attributes:
        data: the clients' samples and index table, root and test data.
        state: what passes from round to round, such as what a rule remembers of every
            client.
        history: what is measured of every round.
        updates: the cohort's updates, as far as they are held.
        work: everything else: training, attack, rule and evaluation.
    """

    data: int
    state: int
    history: int
    updates: int
    work: int

    @property
    def total(self) -> int:
        return sum(self)


def predict(
    comparison: "Comparison",
    states: Mapping[str, "RoundState"],
    num_rounds: int,
    eval_every: int,
    donate: bool = True,
) -> Memory:
    """What ``Comparison.run`` will take with these states, or their shapes."""
    traced = comparison.trace(states, num_rounds, eval_every)
    new_states, histories = traced.out_info
    first = next(iter(comparison.systems.values()))
    state, history = size_in_bytes(new_states), size_in_bytes(histories)
    seeds = next(iter(new_states.values())).key.size
    held = 4 * first.cohort_size * first.num_params
    updates = seeds * held * len(comparison.systems)
    if first.in_passes:
        assert first.update_memory is not None
        share = -(-held // first.num_devices)
        updates = seeds * share if share <= first.update_memory else 0
    copies = 1
    if jax.default_backend() == "cpu":  # whose devices share a memory
        copies = jax.local_device_count() if first.hosted else first.num_devices
    # Systems take turns over the devices: the others wait for those that have one.
    busy = min(len(comparison.systems), copies)
    peak = busy * peak_of(traced.jaxpr)
    if busy < copies:
        peak += (copies - busy) * peak_of(traced.jaxpr, idle=True)
    return Memory(
        data=sum(_held(x, copies) for x in jax.tree.leaves(comparison.arrays)),
        state=copies * state * (1 if donate else 2),
        history=copies * history,
        updates=copies * updates,
        work=max(peak - copies * (state + history + updates), 0),
    )


def _held(x: AnyArray, copies: int) -> int:
    """Bytes of an array, or of its parts on the devices of this process."""
    if not isinstance(x, jax.Array):
        return copies * x.nbytes
    return sum(shard.data.nbytes for shard in x.addressable_shards[:copies])


def check_fits(memory: Memory, sim: "Simulation", otherwise: str = "") -> None:
    """Refuses a run that takes more than there is.

    Raises:
        MemoryError: with the numbers, what would change them, and ``otherwise``.
    """
    free = free_memory()
    if free is None or memory.total <= free:
        return
    parts = ", ".join(
        f"{name} {gigabytes(size)}"
        for name, size in sorted(memory._asdict().items(), key=lambda x: -x[1])
        if size > 0.01 * memory.total
    )
    knobs = []
    if memory.updates + memory.work > 0.1 * memory.total:
        knobs += ["lower cohort_size, or client_chunk"]
        if sim.update_memory is None and sim.aggregator.in_passes is not None:
            whole = gigabytes(4 * sim.cohort_size * sim.num_params)
            knobs += [
                f"set update_memory, which bounds the {whole} of the cohort's updates"
            ]
        elif sim.in_passes:
            knobs += ["lower update_memory"]
    if memory.state > 0.1 * memory.total:
        knobs += [
            f"use a rule that does not remember all {sim.num_clients:,} clients, or "
            "fewer clients"
        ]
    if memory.history > 0.1 * memory.total:
        knobs += ["run fewer rounds at a time"]
    if memory.data > 0.1 * memory.total:
        knobs += ["take fewer samples per client"]
    if jax.default_backend() == "cpu" and sim.num_devices > 1:
        knobs += [f"lower num_devices (each of {sim.num_devices} has its copy)"]
    raise MemoryError(
        f"this run would take about {gigabytes(memory.total)} ({parts}), but "
        f"{gigabytes(free)} are free. Fewer seeds or systems take less; or "
        f"{'; '.join(knobs)}.{otherwise}"
    )


def gigabytes(size: int) -> str:
    """Readable.

    Example:
        >>> gigabytes(2_500_000_000), gigabytes(3_000_000)
        ('2.5 GB', '3 MB')
    """
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def free_memory() -> int | None:
    """Bytes that this process may still take; None where nobody says.

    On a GPU, of its own memory; on a CPU, of the machine's, or of what a container or a
    batch system leaves to this process.
    """
    if jax.default_backend() != "cpu":
        stats = jax.local_devices()[0].memory_stats()
        return stats and stats["bytes_limit"] - stats["bytes_in_use"]
    free = []
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        kilobytes = dict(line.split(":") for line in meminfo.read_text().splitlines())
        free.append(int(kilobytes["MemAvailable"].split()[0]) * 1024)
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        free.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for limit, used in _CGROUPS:
        try:
            free.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return min(free, default=None)
