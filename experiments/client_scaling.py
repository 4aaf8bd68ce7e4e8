"""Time, memory and accuracy against clients, cohort, model, rule and devices.

Every measurement is one simulation in a process of its own: the memory is told, the
program compiled, run and run again. A finished one is kept in --out: the same command
goes on where it was stopped, and longer lists of options add to it.

Series (--series):
  clients   the population grows, the cohort stays: 100 clients to a million.
  cohort    of the largest population more and more clients train in a round.
  width     the network grows.
  rule      all clients take part; each rule with all updates in memory and, with
            --update-memory, in passes where it has such a form, on each of --devices.

Presets:
  demo      up to 100,000 clients, 1,000 that all take part: two minutes on 2 cores.
  full      up to a million, 10,000 that all take part: what docs/results/scaling holds.
            Under half an hour on 2 cores.

Example:
  python -m experiments.client_scaling --preset demo --out runs/scaling
"""

import dataclasses
import hashlib
import json
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args

import jax
from rich.console import Console

import fedjax_sim as fs
from experiments import (
    commandline,
    results,
    rundir,
    runner,
    scaling_point,
    scaling_report,
    specs,
)
from experiments.scaling_point import Found, Point, Result, Work, make_rule
from fedjax_sim.memory import gigabytes
from fedjax_sim.sharding import usable_cores

T = TypeVar("T")
Series = Literal["clients", "cohort", "width", "rule"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Time, memory and accuracy against clients, cohort, model, rule and devices."""

    STUDY: ClassVar[str] = "client_scaling"

    #: Starting values of the other options: demo (two minutes on 2 cores) or full (up
    #: to a million clients).
    preset: Literal["demo", "full"] = "demo"
    #: digits or breast_cancer (embedded), mnist, a set of MedMNIST, or tfds:NAME. The
    #: clients draw their samples from its training set.
    dataset: str = "digits"
    #: Folder with idx/mnist/*.gz, tfds/mnist/... or medmnist/*.npz.
    #: Default: $FEDJAX_SIM_DATA, else a user cache folder.
    data_dir: Path | None = None
    #: Folder for the measurements and the reports. Those found there are not repeated.
    out: Path = Path("runs/scaling")
    #: Seed of everything.
    seed: int = 0
    #: What to vary. Of the others, the reports show what was measured before.
    series: tuple[Series, ...] = ("clients", "cohort", "width", "rule")

    #: Populations, of series clients. The other series but rule have the last one.
    clients: tuple[int, ...] = (100, 1_000, 10_000, 100_000)
    #: Rules of series clients. Series cohort and width have the first one.
    aggregators: tuple[str, ...] = ("fltrust",)
    #: Clients that train in a round, of series cohort. The others have the first one.
    cohorts: tuple[int, ...] = (100, 1_000)
    #: Hidden units of the network, of series width; 0 for no hidden layer. The others
    #: have the first one.
    widths: tuple[int, ...] = (32, 1_024)
    #: Clients of series rule, which all take part in every round.
    everyone: int = 1_000
    #: Rules of series rule.
    rules: tuple[str, ...] = ("median", "krum")
    #: Bytes of updates that a device may hold: series rule then has every rule twice,
    #: with all updates held and, where it has such a form, with this limit.
    update_memory: int | None = None
    #: Devices of series rule (on CPU, cores). The others have the first number.
    devices: tuple[int, ...] = (1, 2)

    #: Attack, or none.
    attack: str = "sign_flip"
    #: Fraction of the clients that attack.
    attackers: float = 0.2
    #: Samples of a client.
    samples: int = 20
    #: Local batch size, of one epoch.
    batch_size: int = 10
    #: Local learning rate (plain SGD).
    lr: float = 0.1
    #: Rounds of a compiled run.
    rounds: int = 20
    #: Rounds of a compiled run of series rule.
    rule_rounds: int = 2
    #: Runs after the first one, which compiles: the median of their times is reported.
    repeats: int = 3


PRESETS: dict[str, Config] = {
    "demo": Config(),
    "full": Config(
        preset="full",
        out=Path("runs/scaling-full"),
        clients=(100, 1_000, 10_000, 100_000, 1_000_000),
        aggregators=("fedavg", "fltrust", "median", "foolsgold"),
        cohorts=(100, 10, 1_000, 10_000),
        widths=(32, 0, 256, 2_048, 16_384),
        everyone=10_000,
        rules=(
            "fedavg",
            "fltrust",
            "norm_clipping(bound=1.0)",
            "geometric_median",
            "median",
            "trimmed_mean",
            "krum",
            "dual_system",
        ),
        update_memory=2**23,
    ),
}


def parse(arguments: list[str]) -> Config:
    """The configuration of a command line; its options override the preset's."""
    usual = commandline.preset(arguments, PRESETS, "demo")
    return commandline.parse(arguments, usual, __doc__)


def check(config: Config) -> None:
    """Validates the options before anything is measured.

    Raises:
        ValueError, TypeError: with what was expected and what came.
    """
    lists = ("series", "clients", "aggregators", "cohorts", "widths", "rules")
    for field in (*lists, "devices"):
        values = getattr(config, field)
        if not values or len(set(values)) != len(values):
            raise ValueError(
                f"--{field} must name one or more, each once; got {values}."
            )
    counts: tuple[str, ...] = (
        "clients",
        "cohorts",
        "devices",
        "everyone",
        "update_memory",
        "samples",
    )
    counts += ("batch_size", "rounds", "rule_rounds", "repeats")
    for field, low in (dict.fromkeys(counts, 1) | {"widths": 0, "seed": 0}).items():
        values = getattr(config, field)
        for value in values if isinstance(values, tuple) else (values,):
            if value is not None and not low <= value < 2**31:
                flag = f"--{field.replace('_', '-')}"
                raise ValueError(f"{flag} must be at least {low}; got {value}.")
    if not 0 < config.lr < float("inf"):
        raise ValueError(f"--lr must be a positive number; got {config.lr}.")
    if not 0 <= config.attackers < 0.5:
        raise ValueError(f"--attackers must be in [0, 0.5); got {config.attackers}.")
    if config.batch_size > config.samples:
        raise ValueError(
            f"--batch-size {config.batch_size}, but clients have --samples "
            f"{config.samples}. Lower the batch size."
        )
    if max(config.cohorts) > config.clients[-1]:
        raise ValueError(
            f"--cohorts {max(config.cohorts)} of {config.clients[-1]} clients (the "
            "last of --clients): a cohort cannot be larger than the population."
        )
    if "clients" in config.series and config.cohorts[0] > min(config.clients):
        raise ValueError(
            f"series clients has cohorts of {config.cohorts[0]} (the first of "
            f"--cohorts), but only {min(config.clients)} clients (the least of "
            "--clients)."
        )
    specs.make_attack(config.attack, specs.ANY_CLASSES)
    for point in all_points(config):
        make_rule(point).validate(point.cohort)


def check_limit(config: Config, data: fs.types.Dataset) -> None:
    """Checks that ``--update-memory`` holds an update.

    Raises:
        ValueError: it does not.
    """
    if config.update_memory is None or "rule" not in config.series:
        return
    model = scaling_point.make_model(config.widths[0], data)
    params = jax.eval_shape(model.init, jax.random.key(0))
    size = sum(4 * x.size for x in jax.tree.leaves(params))
    if config.update_memory < size:
        raise ValueError(
            f"--update-memory must hold at least one update, {size:,} bytes; got "
            f"{config.update_memory:,}."
        )


def points(config: Config, series: str) -> list[Point]:
    """What a series measures."""
    usual = Point(
        clients=config.clients[-1],
        cohort=config.cohorts[0],
        width=config.widths[0],
        aggregator=config.aggregators[0],
        devices=config.devices[0],
        update_memory=None,
        attack=config.attack,
        attackers=config.attackers,
        samples=config.samples,
        batch_size=config.batch_size,
        lr=config.lr,
        dataset=config.dataset,
        rounds=config.rounds,
        repeats=config.repeats,
        seed=config.seed,
    )
    change = dataclasses.replace
    if series == "clients":
        return [
            change(usual, clients=n, aggregator=aggregator)
            for aggregator in config.aggregators
            for n in sorted(config.clients)
        ]
    if series == "cohort":
        return [change(usual, cohort=k) for k in sorted(config.cohorts)]
    if series == "width":
        return [change(usual, width=width) for width in sorted(config.widths)]
    everyone = change(
        usual,
        clients=config.everyone,
        cohort=config.everyone,
        rounds=config.rule_rounds,
    )
    found = []
    for aggregator in config.rules:
        held = change(everyone, aggregator=aggregator)
        ways = [held]
        if config.update_memory and make_rule(held).in_passes is not None:
            ways.append(change(held, update_memory=config.update_memory))
        found += [change(way, devices=n) for way in ways for n in config.devices]
    return found


def all_points(config: Config) -> list[Point]:
    """Those of all series, each once."""
    return list(dict.fromkeys(p for s in config.series for p in points(config, s)))


def point_file(config: Config, point: Point, source: str) -> Path:
    """Where a point is kept: its name has the hash of all that it depends on.

    ``source`` says which data it is measured on, ``Dataset.source``.
    """
    text = json.dumps([config.STUDY, fs.__version__, dataclasses.asdict(point), source])
    text += specs.source_hash(point.aggregator) + specs.source_hash(point.attack)
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    return config.out / "points" / f"{key}.json"


def kept(path: Path, point: Point) -> Result | None:
    """The measurement of a point that was kept; None where there is none.

    Raises:
        ValueError: the file is damaged.
    """
    if not path.exists():
        return None
    with results.reading(path, "Delete it to measure this point again."):
        content = json.loads(path.read_text())
        work = Work(**content["found"].pop("work"))
        found = Found(**content["found"], work=work)
        if content["point"] != dataclasses.asdict(point):
            raise ValueError("it is of another point")
        for value in (*work, found.round_seconds, found.told_bytes, found.accuracy):
            if not 0 <= float(value) < math.inf:
                raise ValueError(f"{value} is no measurement")
        1 / found.round_seconds, float(found.peak_bytes), float(found.compile_seconds)
        return Result(point, found)


def keep(path: Path, point: Point, found: Found) -> None:
    """Writes a measurement for ``kept``."""
    values = found._asdict() | {"work": found.work._asdict()}
    content = {"point": dataclasses.asdict(point), "found": values}
    results.write_atomically(path, json.dumps(content, indent=1) + "\n")


def apart(f: Callable[..., T], devices: int, *args: Any) -> T:
    """``f(*args)`` in a process of its own, with that many CPU devices.

    Raises:
        MemoryError: the process ended without a word.
        Exception: whatever ``f`` raises.
    """
    context = multiprocessing.get_context("forkserver")
    # What takes long to import is imported once, by the process that all come from.
    context.set_forkserver_preload(["experiments.scaling_point", "sklearn.datasets"])
    with ProcessPoolExecutor(1, context, _prepare, (devices,)) as pool:
        try:
            return pool.submit(f, *args).result()
        except BrokenProcessPool:
            raise MemoryError(
                "its process ended without a word, as it does where memory runs out "
                "and the system kills it"
            ) from None


def _prepare(devices: int) -> None:
    """Sets a new process up to measure."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the study says that it was stopped
    fs.use_cores(devices)
    # Compiling is measured, so nothing compiled before may be found.
    jax.config.update("jax_enable_compilation_cache", False)
    # On a GPU, take what is needed and not most of the memory at once.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"


def run(config: Config, console: Console) -> None:
    """Checks everything, measures what is missing, and writes the reports.

    Raises:
        ValueError, TypeError: a bad option, before anything is measured; or a point
            that could not be.
    """
    # The measurements run in other processes: this one leaves a GPU to them.
    jax.config.update("jax_platforms", "cpu")
    check(config)
    data = fs.data.load(config.dataset, config.data_dir)
    check_limit(config, data)
    rundir.check_writable(config.out)
    if not (config.out / "machine.json").exists():
        rundir.check_unused(config.out, "scaling study")

    def before(point: Point) -> Result | None:
        return kept(point_file(config, point, data.source), point)

    done = {point: before(point) for point in all_points(config)}
    with rundir.hold(config.out):
        (config.out / "points").mkdir(exist_ok=True)
        machine = probe(config, console)
        missing = [point for point, result in done.items() if result is None]
        console.print(
            f"{len(done) - len(missing)} of {len(done)} points measured before, "
            f"{len(missing)} to measure on {machine['versions']['device']}"
        )
        start = time.perf_counter()
        with runner.progress_bar(console) as progress:
            task = progress.add_task("points", total=len(missing))
            for count, point in enumerate(missing, start=1):
                progress.update(task, description=label(point))
                result = measure(point, config.data_dir)
                if result.found is not None:
                    keep(point_file(config, point, data.source), point, result.found)
                done[point] = result
                progress.update(task, advance=1)
                left = (time.perf_counter() - start) / count * (len(missing) - count)
                progress.console.print(
                    f"{count}/{len(missing)} {label(point)}: {told(result)} (left: "
                    f"about {runner.duration(left)})",
                    soft_wrap=True,
                )
        # Of series that were not asked for, what was measured before.
        series: dict[str, list[Result]] = {}
        for name in get_args(Series):
            for point in points(config, name):
                known = done.get(point) or before(point)
                if known is not None:
                    series.setdefault(name, []).append(known)
        command = commandline.command(config, PRESETS[config.preset])
        scaling_report.write(config, command, machine, series, console)


def probe(config: Config, console: Console) -> dict[str, Any]:
    """What the machine can do, measured once for a folder.

    Raises:
        ValueError: fewer devices than ``--devices`` asks for; a folder of another
            machine, or of other versions of the packages; or a damaged file.
    """
    path = config.out / "machine.json"
    if path.exists():
        here = apart(results.versions, usable_cores())
        with results.reading(path, "Delete it to measure the machine again."):
            machine: dict[str, Any] = json.loads(path.read_text())
            for speed in (machine["flops"], *machine["bytes"].values()):
                if not 0 < float(speed) < math.inf:
                    raise ValueError(f"{speed} is no speed")
            {int(size) for size in machine["bytes"]}, int(machine["devices"])
            there = dict(machine["versions"])
        differ = {k for k in here | there if here.get(k) != there.get(k)}
        if differ:
            was, now = (
                ", ".join(f"{k} {versions.get(k)}" for k in sorted(differ))
                for versions in (there, here)
            )
            raise ValueError(
                f"{config.out} was measured with {was}; here it would be {now}. Name "
                "another --out."
            )
    else:
        console.print("measuring what the machine can do")
        machine = apart(scaling_point.machine, usable_cores())
    if max(config.devices) > machine["devices"]:
        raise ValueError(
            f"--devices {max(config.devices)}, but there are {machine['devices']}."
        )
    results.write_atomically(path, json.dumps(machine, indent=2) + "\n")
    return machine


def measure(point: Point, data_dir: Path | None) -> Result:
    """Measures a point; of one that does not fit, the reason.

    That one will not be kept: another time there may be more memory.
    """
    try:
        found = apart(scaling_point.measure, point.devices, point, data_dir)
    except MemoryError as error:
        return Result(point, None, str(error))
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(f"{label(point)}: {error}") from None
    return Result(point, found)


def label(point: Point) -> str:
    """A point in a few words."""
    parts = [f"{point.clients:,} clients", f"cohort {point.cohort:,}"]
    parts += [f"width {point.width}", point.aggregator]
    if point.update_memory is not None:
        parts.append(f"in {gigabytes(point.update_memory)}")
    return ", ".join(parts) + f", {point.devices} device(s)"


def told(result: Result) -> str:
    """What was found, in a line."""
    found = result.found
    if found is None:
        return f"refused: {result.refused}"
    return (
        f"{1e3 * found.round_seconds:.3g} ms a round, {gigabytes(found.peak_bytes)} "
        f"(told {gigabytes(found.told_bytes)}), compiled in "
        f"{found.compile_seconds:.1f} s, accuracy {found.accuracy:.3f}"
    )


if __name__ == "__main__":
    runner.exit_on_interrupt("the same command continues")
    commandline.main(parse, run)
