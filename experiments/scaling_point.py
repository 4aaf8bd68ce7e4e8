"""One measurement of the scaling study, which wants a process of its own.

What the process of another one has left behind would count as its memory, and the
number of CPU devices is fixed once JAX has started.
"""

import ctypes
import ctypes.util
import dataclasses
import resource
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fedjax_sim as fs
from experiments import results, specs
from fedjax_sim.memory import check_fits
from fedjax_sim.sharding import size_in_bytes

# Working sets of which the speed of memory is measured, in bytes: from what a core's
# cache holds to what no cache does.
WORKING_SETS = tuple(2**power for power in range(18, 29, 2))
PROBES = 5
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
# Of glibc's mallopt, and what its allocator comes to by itself where large buffers are
# freed: those below 32 MB are then kept.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_USUAL = {_MMAP_THRESHOLD: 2**25, _TRIM_THRESHOLD: 2**26}
_KEEPS_NOTHING = {_MMAP_THRESHOLD: 2**16, _TRIM_THRESHOLD: 0}


@dataclasses.dataclass(frozen=True)
class Point:
    """What is measured: one simulation, and on how many devices.

    Attributes:
        clients: ``N``, the population.
        cohort: ``k``, clients that train in a round.
        width: of the network's hidden layer; 0 for none.
        aggregator: a spec, as for ``attack_matrix``.
        devices: on CPU, cores that train a client each.
        update_memory: bytes, as for ``fs.Simulation``.
        attack: a spec.
        attackers: fraction of the clients that are Byzantine.
        samples: of every client.
        batch_size: of the local training, one epoch.
        lr: of the local training.
        dataset: whose training set all clients draw from.
        rounds: in one compiled program.
        repeats: times that it is run again once it is compiled.
        seed: of everything.
    """

    clients: int
    cohort: int
    width: int
    aggregator: str
    devices: int
    update_memory: int | None
    attack: str
    attackers: float
    samples: int
    batch_size: int
    lr: float
    dataset: str
    rounds: int
    repeats: int
    seed: int


class Work(NamedTuple):
    """What one round cannot do without.

    Attributes:
        flops: floating-point operations.
        train_bytes: that the clients' local steps read and write.
        train_set: bytes of the weights and gradients that a device works on at a time,
            which decides what cache they come from.
        rule_bytes: that the rule reads, in a set of as many.
    """

    flops: float
    train_bytes: float
    train_set: float
    rule_bytes: float


class Found(NamedTuple):
    """What was measured.

    Attributes:
        params: ``d``.
        round_seconds: median over the repeats, of one round.
        fastest, slowest: likewise, of the repeats.
        compile_seconds: compiling the initial states and the rounds, tracing apart:
            that is done when the memory is told.
        peak_bytes: the most memory that the run's arrays took: those that were there
            when it started, and how much more the process then took.
        told_bytes: what ``Comparison.memory`` had said.
        parts: of that, by name.
        process_bytes: the most that the process took, Python and compiler included.
        accuracy: on the test set after all rounds.
        work: what one round cannot do without, see ``Work``.
        versions: of the packages, the device and the machine.
    """

    params: int
    round_seconds: float
    fastest: float
    slowest: float
    compile_seconds: float
    peak_bytes: int
    told_bytes: int
    parts: dict[str, int]
    process_bytes: int
    accuracy: float
    work: Work
    versions: dict[str, str]


class Result(NamedTuple):
    """A point, and what was found; or why it could not be, for want of memory."""

    point: Point
    found: Found | None
    refused: str = ""


def make_rule(point: Point) -> fs.types.Aggregator:
    """The aggregator of a point.

    Raises:
        ValueError, TypeError: an unknown one, or an option out of range.
    """
    assumed = round(point.attackers * point.cohort)
    return specs.make_aggregator(point.aggregator, assumed)


def make_model(width: int, data: fs.types.Dataset) -> fs.models.Model:
    """A network with one hidden layer of that width; with none for 0."""
    shape = data.train.inputs.shape[1:]
    hidden = (width,) if width else ()
    return fs.models.mlp(shape, data.num_classes, hidden=hidden)


def simulate(point: Point, data: fs.types.Dataset) -> fs.Simulation:
    """The simulation of a point.

    Raises:
        ValueError, TypeError: a setting that cannot work.
    """
    clients, root = fs.data.populate(
        data, point.clients, size=point.samples, seed=point.seed
    )
    attack = specs.make_attack(point.attack, data.num_classes)
    active = attack.on_updates is not None or attack.on_data is not None
    byzantine = round(point.attackers * point.clients) if active else 0
    return fs.Simulation(
        model=make_model(point.width, data),
        clients=clients,
        root=root,
        test=data.test,
        client_update=fs.local_sgd(
            optax.sgd(point.lr), epochs=1, batch_size=point.batch_size
        ),
        aggregator=make_rule(point),
        attack=attack.on_updates,
        data_attack=attack.on_data,
        num_byzantine=byzantine,
        cohort_size=point.cohort,
        num_devices=point.devices,
        update_memory=point.update_memory,
    )


def least_work(sim: fs.Simulation, batch_size: int) -> Work:
    """The least work of a round.

    A dense layer of ``i`` inputs and ``o`` outputs takes ``6 B i o`` operations a step
    of batch ``B``, forward and backward, the first layer ``4 B i o`` (its input needs
    no gradient). A step reads the weights three times, writes and reads their gradient
    and writes the weights: ``24 d`` bytes. The rule reads every update once, ``4 k d``
    bytes; what a rule computes is counted for the Krum family alone, ``2 k^2 d``.
    """
    params = jax.eval_shape(sim.model.init, jax.random.key(0))
    kernels = [x.size for x in jax.tree.leaves(params) if x.ndim == 2]
    steps = float(sim.client_update.num_steps(np.asarray(sim.clients.sizes()[:1]))[0])
    steps *= sim.cohort_size
    flops = steps * batch_size * (6 * sum(kernels) - 2 * kernels[0])
    if sim.aggregator.name in ("krum", "multi_krum", "dual_system"):
        flops += 2 * sim.cohort_size**2 * sim.num_params
    at_a_time = min(sim.client_chunk, sim.cohort_size)
    return Work(
        flops=flops,
        train_bytes=24.0 * sim.num_params * steps,
        train_set=8.0 * sim.num_params * at_a_time,
        rule_bytes=4.0 * sim.cohort_size * sim.num_params,
    )


def measure(point: Point, data_dir: Path | None) -> Found:
    """Runs a point: memory told, compiled, run, and run again.

    Raises:
        MemoryError: there is not enough, before anything is compiled.
    """
    sim = simulate(point, fs.data.load(point.dataset, data_dir))
    comparison, key = sim.alone, jax.random.key(point.seed)
    length = point.rounds, point.rounds  # evaluated once, at the end
    told = comparison.memory(
        key, num_rounds=length[0], eval_every=length[1], donate=True
    )
    check_fits(told, sim)
    start = time.perf_counter()
    states = comparison.placed(comparison.init(key))
    run = comparison.lower(states, *length).compile()
    compile_seconds = time.perf_counter() - start

    # What the compiler and the libraries hold is no array of the run.
    copies = point.devices if jax.default_backend() == "cpu" else 1
    arrays = copies * size_in_bytes((states, comparison.arrays))
    _allocate(_KEEPS_NOTHING)
    seconds = []
    for repeat in range(point.repeats + 2):
        if repeat == 1:  # the first run starts threads and the like
            whole = _memory("VmHWM")
            before = _settled()
        first = jnp.int32(repeat * point.rounds)
        start = time.perf_counter()
        states, history = run(states, comparison.arrays, first, first + point.rounds)
        jax.block_until_ready(states)
        seconds.append(time.perf_counter() - start)
        if repeat == 1:  # this one was for its memory, the others are for their time
            peak = _memory("VmHWM")
            _allocate(_USUAL)
    seconds = seconds[2:]
    return Found(
        params=sim.num_params,
        round_seconds=statistics.median(seconds) / point.rounds,
        fastest=min(seconds) / point.rounds,
        slowest=max(seconds) / point.rounds,
        compile_seconds=compile_seconds,
        # The system counts pages of several threads with a delay: never less than none.
        peak_bytes=arrays + max(peak - before, 0),
        told_bytes=told.total,
        parts=told._asdict(),
        process_bytes=max(whole, _memory("VmHWM")),
        accuracy=float(next(iter(history.values())).accuracy[-1]),
        work=least_work(sim, point.batch_size),
        versions=results.versions(),
    )


def _memory(field: str) -> int:
    """Bytes that this process takes now (VmRSS) or took at most (VmHWM).

    On a GPU, of its memory.
    """
    if jax.default_backend() != "cpu":
        stats = jax.local_devices()[0].memory_stats()
        return stats["bytes_in_use" if field == "VmRSS" else "peak_bytes_in_use"]
    if not _STATUS.exists():  # macOS: only the highest, in bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    lines = dict(line.split(":") for line in _STATUS.read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def _allocate(options: dict[int, int]) -> None:
    """Has glibc return what is freed, or keep it as usual.

    What has been freed already, such as 100 MB and more by the compiler, is returned.
    """
    library = ctypes.CDLL(ctypes.util.find_library("c"))
    if hasattr(library, "malloc_trim"):
        for option, value in options.items():
            library.mallopt(option, value)
        library.malloc_trim(0)


def _settled() -> int:
    """Memory now, of which the peak starts anew, where the system can.

    XLA frees its buffers some time after it has returned the results.
    """
    before = None
    while (now := _memory("VmRSS")) != before:
        before = now
        time.sleep(0.2)
    if _CLEAR.exists():
        _CLEAR.write_text("5")
    return now


def machine() -> dict[str, Any]:
    """What the machine can do: operations a second, and bytes a second by working set.

    A product of two 2048 x 2048 matrices; and ``x <- a x + b`` over arrays of
    ``WORKING_SETS`` bytes, which reads and writes each once. The best of five.
    """
    side = 2048
    matrix = jnp.ones((side, side))
    product = jax.jit(lambda x: x @ x)
    flops = 2 * side**3 / _best(lambda: product(matrix))

    def sweep(x: jax.Array, times: int) -> jax.Array:
        return jax.lax.fori_loop(0, times, lambda i, x: 0.999 * x + 0.001, x)

    run = jax.jit(sweep, static_argnames="times", donate_argnames="x")
    speed = {}
    for size in WORKING_SETS:
        times = max(2**29 // size, 2)
        x = jnp.ones(size // 4)
        took = []
        for _ in range(PROBES + 1):
            start = time.perf_counter()
            x = jax.block_until_ready(run(x, times))
            took.append(time.perf_counter() - start)
        speed[str(size)] = 2 * size * times / min(took[1:])
    # A larger set is no faster: what it shows is that a smaller one could be.
    speed = {
        size: max(v for other, v in speed.items() if int(other) >= int(size))
        for size in speed
    }
    return {
        "flops": flops,
        "bytes": speed,
        "devices": jax.local_device_count(),
        "versions": results.versions(),
    }


def _best(call: Any) -> float:
    jax.block_until_ready(call())
    took = []
    for _ in range(PROBES):
        start = time.perf_counter()
        jax.block_until_ready(call())
        took.append(time.perf_counter() - start)
    return min(took)
