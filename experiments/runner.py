"""What every study shares: the run directory, segments, progress, resume, results.

A study is a list of phases. Each phase is a comparison run for a number of rounds, from
a key or forked from a system of the phase before. Between the segments of a phase its
checkpoint is written and progress is shown; inside there is only the compiled scan.
"""

import contextlib
import dataclasses
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

import fedjax_sim as fs
from experiments import rundir
from experiments.results import write_clients, write_metrics
from fedjax_sim import checkpoint
from fedjax_sim.evaluation import Scores
from fedjax_sim.sharding import over_devices, replicate, usable_cores

LONG = 120.0  # seconds from which a run is announced as long
WORTH_MEASURING = (
    1e8  # parameters x local steps a round from which its time is measured
)
SEGMENT = 60.0  # seconds a segment should take at most
FEW = 8  # systems whose accuracies fit a line of progress


class Phase(NamedTuple):
    """One comparison and how long it runs.

    Attributes:
        name: folder of its checkpoints.
        systems: the simulations by name.
        num_rounds: rounds of this phase.
        fork_from: system of the phase before whose state every system takes over; None
            to start from the key.
    """

    name: str
    systems: Mapping[str, fs.Simulation]
    num_rounds: int
    fork_from: str | None = None


class Result(NamedTuple):
    """What a finished study hands to its report."""

    histories: dict[str, fs.History]
    compile_seconds: float
    run_seconds: float


def check_common(config: Any) -> None:
    """Validates the options every study has, before anything slow.

    Raises:
        ValueError: with what was expected and what came.
    """
    limits = {
        "rounds": (1, 10**7),
        "eval_every": (1, 10**7),
        "segment": (1, 10**7),
        "num_seeds": (1, 10**4),
        "seed": (0, 2**32 - config.num_seeds),  # a key has 32 bits of seed
    }
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        low, high = limits.get(field.name, (None, 2**31 - 1))
        flag = f"--{field.name.replace('_', '-')}"
        if low is not None and value < low:
            raise ValueError(f"{flag} must be at least {low}; got {value}.")
        if value > high:
            raise ValueError(f"{flag} must be at most {high}; got {value}.")
    if not (np.isfinite(config.lr) and config.lr > 0):
        raise ValueError(f"--lr must be a positive number; got {config.lr}.")
    if config.clients < 1:
        raise ValueError(f"--clients must be at least 1; got {config.clients}.")
    if config.partition_seed < 0:
        raise ValueError(f"--partition-seed must be >= 0; got {config.partition_seed}.")
    if not 1 <= cohort_size(config) <= config.clients:
        raise ValueError(
            f"--cohort must be from 1 to --clients ({config.clients}) or all; got "
            f"{config.cohort}."
        )


def check_schedule(config: Any) -> None:
    """Validates the rounds of the attack, of studies that have these options.

    Raises:
        ValueError: with what was expected and what came.
    """
    if config.attack_start < 0:
        raise ValueError(f"--attack-start must be >= 0; got {config.attack_start}.")
    if config.attack_every < 1:
        raise ValueError(
            f"--attack-every must be at least 1; got {config.attack_every}."
        )
    if config.attack_stop is not None and config.attack_stop <= config.attack_start:
        raise ValueError(
            f"--attack-stop must be above --attack-start ({config.attack_start}); got "
            f"{config.attack_stop}."
        )


def check_attack_is_active(config: Any, first: int, last: int) -> None:
    """Checks that the attack strikes at least once in rounds ``first`` to ``last - 1``.

    Raises:
        ValueError: it never does.
    """
    strikes = range(config.attack_start, last, config.attack_every)
    stop = last if config.attack_stop is None else config.attack_stop
    if not any(first <= strike < stop for strike in strikes):
        raise ValueError(
            f"--attack-start {config.attack_start}, --attack-stop {config.attack_stop} "
            f"and --attack-every {config.attack_every}: the attack would never be "
            f"active in rounds {first} to {last - 1}, those of the attacked systems."
        )


def num_attackers(config: Any) -> int:
    """Byzantine clients of a configuration's ``attackers`` and ``clients``.

    Raises:
        ValueError: nobody would be honest, or nobody an attacker although asked for.
    """
    if not 0 <= config.attackers < 1:
        raise ValueError(f"--attackers must be in [0, 1); got {config.attackers}.")
    found = round(config.attackers * config.clients)
    if found == config.clients or (found == 0 and config.attackers > 0):
        raise ValueError(
            f"--attackers {config.attackers} of {config.clients} clients is {found} of "
            "them; expected at least one attacker and one honest client, or exactly 0."
        )
    return found


def cohort_size(config: Any) -> int:
    """Clients in a round, of a configuration's ``cohort`` and ``clients``."""
    size: int = config.clients if config.cohort == "all" else config.cohort
    return size


def assumed_byzantine(num_clients: int, cohort_size: int, num_byzantine: int) -> int:
    """The f that rules assume of a cohort unless the user says.

    The true number where all clients train; for a sample its mean plus one standard
    deviation (of the hypergeometric count of attackers), within what Krum allows.
    """
    n, k, f = num_clients, cohort_size, num_byzantine
    if k == n:
        return f
    spread = math.sqrt(k * f / n * (1 - f / n) * (n - k) / max(n - 1, 1))
    return min(math.ceil(k * f / n + spread), max((k - 3) // 2, 0))


def check_progress(config: Any, phases: Sequence[Phase]) -> None:
    """Checks that no phase is already further than asked for, or left out.

    Raises:
        ValueError: naming the rounds done and asked for; or the phase whose results
            would be lost; or checkpoints that are gone.
    """
    checkpoints = config.out / "checkpoints"
    names = {phase.name for phase in phases}
    for folder in sorted(checkpoints.glob("*")):
        if checkpoint.latest_round(folder) is not None and folder.name not in names:
            raise ValueError(
                f"{config.out} holds the part {folder.name!r}, which the options leave "
                "out: its results would be lost. Ask for it, or choose another --out."
            )
    last = 0
    for phase in phases:
        last = phase.num_rounds + (last if phase.fork_from else 0)
        latest = checkpoint.latest_round(_checkpoints(config, phase))
        if latest is not None and latest > last:
            raise ValueError(
                f"{config.out} is already at round {latest} ({phase.name}); the "
                f"options ask for round {last}. Ask for at least that many rounds, or "
                "choose another --out."
            )
    if (config.out / "metrics.csv").exists() and not checkpoints.is_dir():
        raise ValueError(
            f"{config.out} holds results, but its checkpoints are gone: it cannot be "
            "continued. Choose another --out."
        )


def _checkpoints(config: Any, phase: Phase) -> Path:
    return config.out / "checkpoints" / phase.name


def run(
    config: Any,
    console: Console,
    make_phases: Callable[[Any], tuple[list[Phase], str]],
    settings: Callable[[Any], str],
    write: Callable[[Any, Result, Console], None],
) -> Result:
    """Checks everything, runs or resumes a study, and writes its results.

    Args:
        config: the study's options.
        console: for progress and tables.
        make_phases: loads the data and builds every system; also returns where the data
            came from.
        settings: the run in a sentence.
        write: the report on the result.

    Raises:
        ValueError: a bad option, before any training.
    """
    rundir.check_out(config)
    start(config.cores, getattr(config, "distributed", None))
    # Of several processes, process 0 writes the results and says how far they are.
    writes = jax.process_index() == 0
    console.quiet = not writes
    phases, source = make_phases(config)
    check_progress(config, phases)
    with rundir.open_out(config, source) if writes else contextlib.nullcontext():
        console.print(settings(config))
        result = run_study(config, phases, console)
        if writes:
            write(config, result, console)
    return result


def run_study(config: Any, phases: Sequence[Phase], console: Console) -> Result:
    """Runs or resumes all phases and writes metrics.csv and clients.npz as it goes."""
    # Seed s of several is exactly the run with --seed s.
    keys = [jax.random.key(config.seed + s) for s in range(config.num_seeds)]
    key = keys[0] if len(keys) == 1 else jax.numpy.stack(keys)
    params = {}
    seconds = np.zeros(2, np.float32)  # compiling, running
    histories: dict[str, fs.History] = {}
    states: dict[str, fs.RoundState] = {}
    for phase in phases:
        comparison = fs.compare(phase.systems)
        rules = [sim.aggregator for sim in phase.systems.values()]
        learning = sorted({rule.name for rule in rules if rule.pretrain})
        if learning:
            console.print(f"{phase.name}: {', '.join(learning)} learn from the root")
        if phase.fork_from is None:
            start = comparison.init(key)
        else:
            base = states[phase.fork_from]
            start = {name: sim.fork(base) for name, sim in phase.systems.items()}
        states, found, took = _run_phase(
            config, phase, comparison, start, histories, console
        )
        seconds += took
        histories.update(found)
        params.update({name: state.params for name, state in states.items()})
    checkpoint.save_model(config.out, params)
    return Result(histories, float(seconds[0]), float(seconds[1]))


class Played(NamedTuple):
    """How far a comparison is: what its checkpoint holds."""

    states: dict[str, fs.RoundState]
    history: dict[str, fs.History]  # empty before the first segment
    seconds: np.ndarray  # compiling and running, of all processes that worked on it

    @property
    def round(self) -> int:
        """Rounds finished since round 0."""
        return int(np.ravel(next(iter(self.states.values())).round)[0])


def begin(states: dict[str, fs.RoundState]) -> Played:
    """Nothing played yet."""
    return Played(states, {}, np.zeros(2, np.float32))


def latest(
    directory: Path, comparison: fs.Comparison, start: Played, eval_every: int
) -> Played | None:
    """What the last checkpoint of a comparison holds; None where there is none."""
    found = checkpoint.latest_round(directory)
    if fs.hosts.agree(found or 0) != (found or 0):
        raise ValueError(
            f"process {jax.process_index()} finds other checkpoints in {directory} "
            "than process 0. --out must be a folder that all processes see."
        )
    if found is None:
        return None

    def template(round: int) -> Any:
        shapes = comparison.shapes(start.states, round - start.round, eval_every)
        return (*shapes, start.seconds)

    states, history, seconds = checkpoint.load(directory, found, template)
    # jax sorts dictionaries by key; keep the order of the systems.
    return Played(
        {name: states[name] for name in comparison.systems},
        {name: jax.device_get(history[name]) for name in comparison.systems},
        np.array(seconds),
    )


def segments(
    comparison: fs.Comparison,
    played: Played,
    *,
    last: int,
    eval_every: int,
    segment: int,
    directory: Path | None,
    on_compile: Callable[[int], None],
) -> Iterator[Played]:
    """Plays on to round ``last``, ``segment`` rounds at a time.

    Args:
        comparison: the systems.
        played: where to go on.
        last: round of the run's end.
        eval_every: rounds between evaluations.
        segment: rounds between checkpoints.
        directory: of a checkpoint after every segment; None to write none.
        on_compile: called with a segment's length before it is compiled.

    Yields:
        What is played so far; its states are gone once the next one is asked for.
    """
    states, history, seconds = played
    own = False  # the states given are the caller's, later ones are not
    compiled: set[int] = set()
    while played.round < last:
        length = min(segment, last - played.round)
        if length not in compiled:
            on_compile(length)
            seconds[0] += _timed(
                lambda n=length, s=states: comparison.lower(s, n, eval_every).compile()
            )[0]
            compiled.add(length)
        took, (states, new) = _timed(
            lambda n=length, s=states, own=own: comparison.run(
                num_rounds=n, eval_every=eval_every, states=s, last=last, donate=own
            )
        )
        seconds[1] += took
        own = True
        if history:
            new = {n: _append(history[n], new[n]) for n in new}
        history = new
        played = Played(states, history, seconds)
        if directory is not None:
            checkpoint.save(directory, played.round, tuple(played))
        yield played


def _run_phase(
    config: Any,
    phase: Phase,
    comparison: fs.Comparison,
    states: dict[str, fs.RoundState],
    earlier: dict[str, fs.History],
    console: Console,
) -> Played:
    """Plays a phase from its last checkpoint, or from ``states``, to its end."""
    directory = _checkpoints(config, phase)
    writes = jax.process_index() == 0
    start = begin(states)
    first, last = start.round, start.round + phase.num_rounds
    found = latest(directory, comparison, start, config.eval_every)
    played = found or start
    if found:
        console.print(f"resumed {phase.name} at round {played.round}")
    elif config.resume:
        console.print(f"{phase.name}: no checkpoint yet, starting at round {first}")
    remaining = last - played.round
    pace = estimate(comparison, config.num_seeds) if remaining else 0.0
    pace = fs.hosts.agree(pace)  # all processes have to stop at the same rounds
    segment = config.segment or default_segment(
        phase.num_rounds, config.eval_every, pace
    )
    if remaining * pace > LONG:
        console.print(
            f"{remaining} rounds of {len(phase.systems)} systems: about "
            f"{duration(remaining * pace)} on this device "
            f"({jax.devices()[0].device_kind}), evaluation apart. A checkpoint every "
            f"{segment} rounds: stop it when you like, it can be resumed."
        )

    def shown(played: Played) -> dict[str, fs.History]:
        history = played.history.items()
        return {n: _drop_early_ends(h, config, last) for n, h in history}

    with progress_bar(console) as progress:
        task = progress.add_task("rounds", total=phase.num_rounds)
        progress.update(task, completed=played.round - first)
        for ahead in segments(
            comparison,
            played,
            last=last,
            eval_every=config.eval_every,
            segment=segment,
            directory=directory,
            on_compile=lambda length: progress.console.print(
                f"compiling a segment of {length} rounds"
            ),
        ):
            played = ahead
            if writes:
                write_metrics(
                    config.out / "metrics.csv", earlier | shown(played), config.seed
                )
            progress.update(task, completed=played.round - first)
            progress.console.print(
                f"round {played.round}/{last}: {latest_accuracies(shown(played))}",
                soft_wrap=True,
            )
    if writes:
        write_metrics(config.out / "metrics.csv", earlier | shown(played), config.seed)
        write_clients(config.out / "clients.npz", earlier | shown(played))
    return played._replace(history=shown(played))


def _timed(call: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    result = jax.block_until_ready(call())
    return time.perf_counter() - start, result


def _append(old: fs.History, new: fs.History) -> fs.History:
    """Joins two stretches of a run on the round axis (after the seed axis, if any)."""
    axis = np.ndim(new.round) - 1
    return jax.tree.map(lambda a, b: np.concatenate([a, b], axis=axis), old, new)


def _drop_early_ends(history: fs.History, config: Any, last: int) -> fs.History:
    """Without the extra evaluation at the end of a run that was then extended."""
    rounds = np.asarray(history.round)
    keep = (rounds % config.eval_every == 0) | (rounds == last)

    def kept(values: Any) -> np.ndarray:
        shown = keep.reshape(*keep.shape, *[1] * (np.ndim(values) - keep.ndim))
        return np.where(shown, values, np.nan).astype(np.float32)

    fields = (*Scores._fields, "attack_success")
    changes: dict[str, Any] = {field: kept(getattr(history, field)) for field in fields}
    changes["local"] = {name: kept(values) for name, values in history.local.items()}
    return history._replace(**changes)


def latest_accuracies(histories: Mapping[str, fs.History]) -> str:
    """Every system's last evaluated accuracy (mean over seeds), and when it was.

    Of many systems the lowest, the median and the highest.
    """
    found, at = {}, 0
    for name, history in histories.items():
        accuracy = np.atleast_2d(history.accuracy)
        known = np.flatnonzero(~np.isnan(accuracy).any(axis=0))
        if known.size:
            found[name] = float(accuracy[:, known[-1]].mean())
            at = int(np.atleast_2d(history.round)[0, known[-1]])
    if not found:
        return "not evaluated yet"
    parts = [f"{name} {accuracy:.3f}" for name, accuracy in found.items()]
    if len(parts) > FEW:
        low, high = min(found, key=found.__getitem__), max(found, key=found.__getitem__)
        middle = np.median(list(found.values()))
        parts = [
            f"accuracy of {len(parts)} systems from {found[low]:.3f} ({low}) to "
            f"{found[high]:.3f} ({high}), median {middle:.3f}"
        ]
    newest = max(int(np.max(history.round)) for history in histories.values())
    return "  ".join(parts) + ("" if at == newest else f" (of round {at})")


def default_segment(num_rounds: int, eval_every: int, pace: float = 0.0) -> int:
    """About a twentieth of the run, or a minute where a round takes ``pace`` seconds.

    Whole evaluations and no remainder, if possible: a segment that does not divide the
    run costs a second compilation.
    """
    target = max(1, num_rounds // 20)
    if pace:
        target = max(1, min(target, int(SEGMENT / pace)))
    near = [
        n for n in range(max(1, target // 2), 2 * target + 1) if num_rounds % n == 0
    ]
    whole = list(range(eval_every, 4 * target + 1, eval_every))
    for candidates in ([n for n in whole if num_rounds % n == 0], near, whole):
        if candidates:
            return min(candidates, key=lambda n: abs(n - target))
    return target


def progress_bar(console: Console) -> Progress:
    """A bar with the time left; hidden where the output is not a terminal."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
        disable=not console.is_terminal,
    )


def estimate(comparison: fs.Comparison, num_seeds: int) -> float:
    """Seconds a round will take on this device, from timing a few local steps.

    0 where there is clearly too little work for a measurement to be worth its while.
    """
    sims = comparison.systems.values()
    sim = next(iter(sims))
    sizes = np.asarray(sim.clients.sizes())
    per_system = float(np.mean(sim.client_update.num_steps(sizes))) * sim.cohort_size
    roots = sum(s.root_steps or 0 for s in sims if "root_update" in s.needs)
    steps = num_seeds * (len(sims) * per_system + roots)
    if steps * sim.num_params < WORTH_MEASURING:
        return 0.0
    params = sim.model.init(jax.random.key(0))
    clients, devices = sim.own_clients, sim.num_devices
    if sim.hosted:  # measured on one device, with clients that are here
        devices, steps = 1, steps / sim.num_devices
    probe_steps = 20
    update = sim.client_update.with_steps(probe_steps)
    count = min(sim.client_chunk * devices, sim.cohort_size, clients.num_clients)

    def probe(shared: Any, ids: Any) -> Any:
        clients, params = shared

        def one(client: Any) -> Any:
            data = clients.gather(client)
            if sim.make_samples is not None:
                data = sim.make_samples(data)
            state = update.init(params)
            return update.apply(sim.model, jax.random.key(0), params, data, state, 0)[0]

        return jax.vmap(one)(ids)

    args = replicate(((clients, params), np.arange(count)), devices)
    compiled = jax.jit(over_devices(probe, devices)).lower(*args).compile()
    jax.block_until_ready(compiled(*args))
    took = min(_timed(lambda: compiled(*args))[0] for _ in range(3))
    return took / (probe_steps * count) * steps


def duration(seconds: float) -> str:
    """A time for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def exit_on_interrupt(way_on: str = "--resume continues") -> None:
    """Makes Ctrl-C end the process at once, with a line instead of a traceback.

    Python's own handler waits for the compiled segment to end. What is lost is what
    was done since the last checkpoint.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno())
    signal.signal(signal.SIGINT, lambda number, frame: None)

    def wait() -> None:
        with writer:  # which would be closed if nothing held it
            reader.recv(1)
        sys.stdout.write("\x1b[?25h" if sys.stdout.isatty() else "")  # show the cursor
        print(f"\nstopped; {way_on} from the last checkpoint", flush=True)
        os._exit(130)

    threading.Thread(target=wait, daemon=True).start()


def start(cores: int | None, distributed: str | None = None) -> None:
    """Sets JAX up for a study: ``--cores``, and a cache of compiled programs.

    With ``distributed``, ``--distributed``, this process joins the others of its job. A
    notebook that has used JAX already keeps the devices it has.

    Raises:
        ValueError: ``--cores`` is more than there are, or comes too late.
    """
    if cores is not None and not 1 <= cores <= usable_cores():
        raise ValueError(
            f"--cores must be from 1 to {usable_cores()}, what this process may use; "
            f"got {cores}."
        )
    try:
        fs.use_cores(cores)
    except RuntimeError as error:
        if cores is not None:
            raise ValueError(str(error)) from None
    if distributed is not None:
        try:
            fs.hosts.start(distributed)
        except RuntimeError as error:
            raise ValueError(f"--distributed {distributed}: {error}") from None
    _enable_compilation_cache()


def _enable_compilation_cache() -> None:
    """Keeps compiled programs between processes, in the user's cache folder."""
    from fedjax_sim.data.cache import cache_dir

    if not jax.config.values["jax_compilation_cache_dir"]:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
