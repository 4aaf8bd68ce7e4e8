"""Several processes, each with its own clients, that run one simulation together.

Every process runs the same program: it calls ``start`` first, makes its own clients,
joins them with ``share``, and goes on as a single process would. The devices of all
processes are one row of devices; parameters, rules and results are everywhere, and the
clients' data are where they were loaded.
"""

import dataclasses
import itertools
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from fedjax_sim.registry import check_type
from fedjax_sim.sharding import AXIS, device_mesh, replicate
from fedjax_sim.types import Array, Clients

# Seconds after which a process that says nothing is taken for dead.
HEARTBEAT = 20


def start(how: str = "auto") -> None:
    """Joins the processes of a job. To be called before anything else that uses JAX.

    Args:
        how: ``"auto"`` under SLURM, Open MPI or Kubernetes, which say who is who; else
            ``"HOST:PORT,PROCESSES,ID"``: where process 0 listens, how many processes
            there are, and the number of this one, from 0.

    Raises:
        ValueError: ``how`` is neither.
        RuntimeError: nothing says who is who, or JAX has started already.

    Where the others do not come JAX ends the process after a minute, by SIGABRT.

    Example:
        >>> start("node1:9000,4")
        Traceback (most recent call last):
        ...
        ValueError: expected auto or HOST:PORT,PROCESSES,ID, as in node1:9000,4,0; got
        'node1:9000,4'.
    """
    options: dict[str, Any] = {}
    if how != "auto":
        address, *numbers = how.split(",")
        host, colon, port = address.rpartition(":")
        whole = len(numbers) == 2 and all(x.strip().isdigit() for x in numbers)
        if not (whole and host and colon and port.isdigit()):
            raise ValueError(
                "expected auto or HOST:PORT,PROCESSES,ID, as in node1:9000,4,0; got "
                f"{how!r}."
            )
        count, own = map(int, numbers)
        if not (0 < int(port) < 2**16 and 0 <= own < count):
            raise ValueError(
                f"{how!r}: a port is below 65536, and of n processes, one at least, "
                "the numbers are 0 to n - 1."
            )
        options = {
            "coordinator_address": address,
            "num_processes": count,
            "process_id": own,
        }
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It would catch SIGTERM, by which batch systems end a job, and go on.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            **options,
            initialization_timeout=60,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=HEARTBEAT,
        )
    except ValueError as error:  # JAX has found no batch system
        raise RuntimeError(
            "the environment does not say which processes there are, as it "
            "does in a step of SLURM (srun), under Open MPI 4 (mpirun) or in a Job of "
            f"Kubernetes ({error}). Give HOST:PORT,PROCESSES,ID instead, as in "
            "node1:9000,4,0."
        ) from None


def own_clients(num_clients: int) -> range:
    """The clients of this process, of ``num_clients`` in all.

    Every device takes equally many, in the order of devices and processes, and the last
    ones may have fewer: ``ceil(N / P)`` each of P devices.

    Raises:
        ValueError: some process would have none.

    Example:
        >>> own_clients(10)
        range(0, 10)
    """
    return _ranges(num_clients)[jax.process_index()]


def _ranges(num_clients: int) -> list[range]:
    """The clients of every process."""
    share = -(-num_clients // jax.device_count())
    here = jax.local_device_count()
    first = [min(p * here * share, num_clients) for p in range(jax.process_count() + 1)]
    if any(a == b for a, b in itertools.pairwise(first)):
        raise ValueError(
            f"{num_clients} clients on {jax.device_count()} devices, {share} each, "
            f"leave one of {jax.process_count()} processes without any. Use more "
            "clients, or fewer processes."
        )
    return [range(a, b) for a, b in itertools.pairwise(first)]


def cut(clients: Clients, ids: range) -> Clients:
    """Some clients of a federation, with a pool of their own samples only.

    And of the first sample of all, which the padding of clients refers to.

    Example:
        >>> from fedjax_sim.data import federate, iid, load
        >>> clients, _ = federate(load("digits"), num_clients=10, partition=iid())
        >>> part = cut(clients, range(2, 5))
        >>> clients.inputs.shape, part.num_clients, part.inputs.shape
        ((1442, 8, 8, 1), 3, (403, 8, 8, 1))
    """
    check_type("clients", clients, Clients, "See fs.data.federate.")
    own = slice(ids.start, ids.stop)
    indices = np.asarray(clients.indices[own])
    mask = np.asarray(clients.mask[own])
    rows, places = np.unique(indices, return_inverse=True)
    return Clients(
        clients.inputs[rows],
        clients.targets[rows],
        jnp.asarray(places.reshape(indices.shape), jnp.int32),
        jnp.asarray(mask),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class HostClients:
    """The clients of all processes, of which this one holds its own; see ``share``.

    Attributes:
        own: the clients of this process.
        counts: number of samples of every client, ``int32 [N]``.
        padded: whether rows of any of them are padding.
        longest: pool rows of the device that has most.
    """

    own: Clients
    counts: np.ndarray
    padded: bool
    longest: int

    @property
    def num_clients(self) -> int:
        return len(self.counts)

    def sizes(self) -> np.ndarray:
        """Number of samples of every client of all processes, ``int32 [N]``."""
        return self.counts


def share(own: Clients) -> HostClients:
    """Joins the clients of all processes; every process calls it with its own.

    Clients are numbered process after process, ``own_clients`` says which are whose.
    Their samples stay where they are: of the others, a process learns how many samples
    each has. In a round in which all take part every device trains its own; of a sample
    of clients the data are sent to the devices that train them.

    Raises:
        ValueError: in every process: one has not as many clients as ``own_clients``
            says, another number of devices, or samples of another shape or type.
    """
    check_type("own", own, Clients, "See fs.data.federate and fs.hosts.cut.")

    def everybody(values: Any) -> np.ndarray:
        """What every process has, ``[processes, ...]``."""
        found = np.asarray(multihost_utils.process_allgather(np.asarray(values)))
        return found.reshape(jax.process_count(), *np.shape(values))

    like = f"{own.inputs.shape[1:]} {own.inputs.dtype} {own.targets.shape[1:]}"
    number, longest, devices, kind = everybody(
        [
            own.num_clients,
            own.indices.shape[1],
            jax.local_device_count(),
            zlib.crc32(like.encode()) >> 1,  # a number that fits 32 bits
        ]
    ).T
    for what, values in (("devices", devices), ("samples of shape and type", kind)):
        if len(set(values)) > 1:
            mine = jax.local_device_count() if what == "devices" else like
            raise ValueError(
                f"every process must have the same {what}; process "
                f"{jax.process_index()} has {mine}, and others have others."
            )
    total = int(number.sum())
    expected = [len(ids) for ids in _ranges(total)]
    if number.tolist() != expected:
        raise ValueError(
            f"of {total} clients the processes must hold {expected} (see "
            f"fs.hosts.own_clients); they hold {number.tolist()}."
        )
    wide = ((0, 0), (0, longest.max() - own.indices.shape[1]))
    own = own._replace(indices=jnp.pad(own.indices, wide), mask=jnp.pad(own.mask, wide))
    counts = np.zeros(number.max(), np.int32)
    counts[: own.num_clients] = np.asarray(own.sizes())
    pools = [len(part.targets) for part in _by_device(own, total)]
    return HostClients(
        own=own,
        counts=np.concatenate(
            [of_one[:n] for of_one, n in zip(everybody(counts), number, strict=True)]
        ),
        padded=bool(everybody(own.padded).any()),
        longest=int(everybody(max(pools)).max()),
    )


def _by_device(own: Clients, total: int) -> list[Clients]:
    """The clients of each device of this process."""
    share, count = -(-total // jax.device_count()), own.num_clients
    starts = [min(i * share, count) for i in range(jax.local_device_count())]
    return [cut(own, range(a, min(a + share, count))) for a in starts]


class Spread(NamedTuple):
    """``HostClients`` on the devices, with a leading axis of devices.

    Attributes:
        inputs, targets: the pools, ``[P, n, ...]``.
        indices, mask: ``[P, b, m]``.
        counts: number of samples of every client, ``int32 [N]``, on every device.
    """

    inputs: Array
    targets: Array
    indices: Array
    mask: Array
    counts: Array

    def samples_of(self, ids: Array) -> Array:
        """Number of samples of clients."""
        return self.counts[ids]

    def cohort(self, ids: Array) -> Clients:
        """On this device, the clients that it trains of the cohort ``ids``, ``[k]``.

        Inside ``shard_map``. Row i is the client at place ``p ceil(k / P) + i`` of the
        cohort, on device p.
        """
        own = Clients(self.inputs[0], self.targets[0], self.indices[0], self.mask[0])
        if len(ids) == len(self.counts):
            return own  # everybody, and in this order
        if own.num_clients >= len(self.counts):  # one device has them all
            return own._replace(indices=own.indices[ids], mask=own.mask[ids])
        devices = jax.lax.axis_size(AXIS)
        first = jax.lax.axis_index(AXIS) * own.num_clients
        here = ids - first
        mine = (here >= 0) & (here < own.num_clients)
        data = own.gather(jnp.clip(here, 0, own.num_clients - 1))
        share = -(-len(ids) // devices)

        def send(x: Array) -> Array:
            """To each device its part: everybody but the owner has zeros."""
            wanted = mine.reshape(-1, *[1] * (x.ndim - 1))
            x = jnp.where(wanted, x, jnp.zeros_like(x))
            x = jnp.pad(x, ((0, -len(x) % devices), *[(0, 0)] * (x.ndim - 1)))
            return jax.lax.psum_scatter(x, AXIS, scatter_dimension=0, tiled=True)

        assert data.mask is not None
        inputs, targets = send(data.inputs), send(data.targets)
        mask = send(data.mask.astype(jnp.int32)) > 0
        m = mask.shape[1]
        return Clients(
            inputs.reshape(share * m, *inputs.shape[2:]),
            targets.reshape(share * m, *targets.shape[2:]),
            jnp.arange(share * m, dtype=jnp.int32).reshape(share, m),
            mask,
        )


# How ``Spread`` lies on the devices.
_PARTS: Any = PartitionSpec(AXIS)
_WHOLE: Any = PartitionSpec()
LAYOUT = Spread(_PARTS, _PARTS, _PARTS, _PARTS, _WHOLE)


def spread(clients: HostClients) -> Spread:
    """Puts the clients of this process on its devices."""
    parts = _by_device(clients.own, clients.num_clients)
    share = -(-clients.num_clients // jax.device_count())

    def stack(field: str, rows: int) -> Array:
        own = []
        for part in parts:
            x = np.asarray(getattr(part, field))
            own.append(np.pad(x, ((0, rows - len(x)), *[(0, 0)] * (x.ndim - 1))))
        sharding = NamedSharding(device_mesh(jax.device_count()), PartitionSpec(AXIS))
        return jax.make_array_from_process_local_data(sharding, np.stack(own))

    return Spread(
        stack("inputs", clients.longest),
        stack("targets", clients.longest),
        stack("indices", share),
        stack("mask", share),
        replicate(clients.counts, jax.device_count()),
    )


def check_alike(things: Mapping[str, str]) -> None:
    """What all processes must have alike is alike.

    Raises:
        ValueError: in every process: names what is not.
    """
    if jax.process_count() == 1:
        return
    own = np.array([zlib.crc32(x.encode()) >> 1 for x in things.values()])
    everybody = np.asarray(multihost_utils.process_allgather(own))
    differ = [
        name
        for name, seen in zip(things, everybody.T, strict=True)
        if len(set(seen.tolist())) > 1
    ]
    if differ:
        raise ValueError(
            f"the processes differ in {' and '.join(differ)}: all of them must run the "
            "same program, with the same options and keys."
        )


def agree(value: float) -> float:
    """The value of process 0, for all: what processes measure differs."""
    if jax.process_count() == 1:
        return value
    return float(multihost_utils.broadcast_one_to_all(np.float32(value)))
