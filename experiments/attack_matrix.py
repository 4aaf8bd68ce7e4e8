"""Every aggregator against every attack: accuracy, attack success and detection.

A cell is one aggregator under one attack, with one share of attackers and one partition
of the data. The seeds and the strengths of a cell run side by side in one compiled
program; with --side-by-side, several aggregators do as well. A finished cell is kept in
--out and never run again: the same command continues a matrix that was stopped, and a
longer list of aggregators or attacks adds to it.

Presets:
  demo           the embedded 8x8 digits, 20 clients: a few minutes on 2 cores.
  defenses       30 rules under 16 attacks on the digits, IID and not: what
                 docs/which_defense.md advises from. About an hour on 2 cores.
  fltrust_table  MNIST as in FLTrust's evaluation: 100 clients, label bias 0.5, 20
                 attackers, one local step of batch 32, 2000 rounds: 6.4 million samples
                 a cell. Take fewer --rounds on a CPU.

Names may carry options, and be joined by +, in quotes for the shell:
  --aggregators krum 'trimmed_mean(trim=0.1)' nnm+median dual_system:soft
  --attacks none 'ipm(epsilon=[0.1, 0.5, 2])' 'badnets(target=0)+model_replacement'
  --aggregators my_rules.trimmed_krum     your own function, in my_rules.py

Example:
  python -m experiments.attack_matrix --preset demo --out runs/matrix
"""

import dataclasses
import hashlib
import json
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import Progress, TaskID

import fedjax_sim as fs
from experiments import commandline, matrix_report, results, rundir, runner, specs
from fedjax_sim.registry import lookup

# Options that do not change what a cell computes, or of which a cell is one part.
NOT_IN_KEY = (
    *results.WHERE,
    "aggregators",
    "attacks",
    "attackers",
    "partitions",
    "side_by_side",
)
LONG_SEGMENT = 60.0  # seconds from which a program is played in segments


@dataclasses.dataclass(frozen=True)
class Config:
    """Every aggregator against every attack: accuracy, attack success, detection."""

    STUDY: ClassVar[str] = "attack_matrix"

    #: Starting values of the other options: demo (embedded digits, a few minutes on 2
    #: cores), defenses (all that docs/which_defense.md is about) or fltrust_table
    #: (MNIST as in FLTrust's evaluation).
    preset: Literal["demo", "defenses", "fltrust_table"] = "demo"
    #: digits or breast_cancer (embedded), mnist, fashion_mnist, a set of MedMNIST such
    #: as pneumoniamnist, or tfds:NAME.
    dataset: str = "digits"
    #: Folder with idx/mnist/*.gz, tfds/mnist/... or medmnist/*.npz; downloads land
    #: there.
    #: Default: $FEDJAX_SIM_DATA, else a user cache folder.
    data_dir: Path | None = None
    #: Folder for the cells and the reports. Cells found there are not run again.
    out: Path = Path("runs/attack_matrix")
    #: Communication rounds of every cell.
    rounds: int = 30
    #: Evaluate on the test set after every this many rounds, and after the last.
    eval_every: int = 3
    #: Seed of everything but the partition.
    seed: int = 0
    #: Run seeds seed, seed+1, ... of every cell side by side; they share the partition.
    num_seeds: int = 2

    #: Aggregators, the rows of the matrix.
    aggregators: tuple[str, ...] = (
        "fedavg",
        "median",
        "trimmed_mean",
        "krum",
        "multi_krum",
        "geometric_median",
        "nnm+trimmed_mean",
        "signguard",
        "fltrust",
        "dual_system",
    )
    #: Attacks, its columns; none is no attack.
    attacks: tuple[str, ...] = (
        "none",
        "label_flip",
        "sign_flip(scale=[1, 4])",
        "ipm(epsilon=[0.1, 0.5, 2])",
        "alie(z=[0.5, 1.5])",
        "fang_krum",
        "fang_trimmed_mean",
        "mimic",
        "badnets(target=0, size=2)+model_replacement",
    )
    #: Fractions of all clients that are Byzantine, each in (0, 1).
    attackers: tuple[float, ...] = (0.2,)
    #: How the data is spread: iid, 'shards(per_client=2)', 'dirichlet(alpha=0.5)' or
    #: 'label_bias(q=0.5)'.
    partitions: tuple[str, ...] = ("iid",)
    #: First round, from 0, in which the attackers attack.
    attack_start: int = 0
    #: Round from which they do so no more. Default: never.
    attack_stop: int | None = None
    #: They attack in every so manyth round.
    attack_every: int = 1

    #: Number of clients.
    clients: int = 20
    #: Clients sampled each round, or all.
    cohort: int | Literal["all"] = "all"
    #: Byzantine clients per cohort that the rules assume. Default: the true number if
    #: all train; for a sample its mean plus one standard deviation, within what Krum
    #: allows.
    max_byzantine: int | None = None
    #: Seed of the partition and of the root dataset.
    partition_seed: int = 0
    #: Clean samples of the server, disjoint from every client and from the test set.
    root_size: int = 100
    #: Local steps of the root update. Default: as many as a client takes.
    root_steps: int | None = None
    #: cnn (FLTrust's), digits_cnn or mlp.
    model: str = "digits_cnn"
    #: Passes of a client over its data each round. This or --steps.
    epochs: int | None = 1
    #: Local steps of a client each round, instead of --epochs.
    steps: int | None = None
    #: Local batch size.
    batch_size: int = 10
    #: Local learning rate (plain SGD).
    lr: float = 0.1
    #: At most this many clients side by side; default: by backend and model size.
    client_chunk: int | None = None
    #: Cores of the CPU, each of which trains its own clients. Default:
    #: $JAX_NUM_CPU_DEVICES, else all that this process may use, at most 8.
    cores: int | None = None

    #: Aggregators compiled into one program, which trains their clients together.
    #: More of them compile faster, fewer are kept sooner.
    side_by_side: int = 100
    #: Rounds between checkpoints inside a program. Default: about a minute's worth.
    segment: int | None = None


PRESETS: dict[str, Config] = {
    "demo": Config(),
    "defenses": Config(
        preset="defenses",
        out=Path("runs/defenses"),
        aggregators=(
            "fedavg",
            "median",
            "trimmed_mean",
            "meamed",
            "phocas",
            "geometric_median",
            "clipping+geometric_median",
            "centered_clipping",
            "norm_clipping(bound='median')",
            "krum",
            "multi_krum",
            "bulyan",
            "mda",
            "smea",
            "caf",
            "dnc",
            "foolsgold",
            "auror",
            "signguard",
            "flame",
            "fldetector(start=5, window=5)",
            "robust_learning_rate(threshold=10)",
            "crfl(start=15)",
            "nnm+trimmed_mean",
            "nnm+krum",
            "bucketing+median",
            "arc+trimmed_mean",
            "monna",
            "fltrust",
            "dual_system",
        ),
        attacks=(
            "none",
            "label_flip",
            "gaussian",
            "free_rider",
            "sign_flip(scale=[1, 4])",
            "ipm(epsilon=[0.1, 0.5, 2])",
            "alie(z=[0.5, 1.5])",
            "min_max",
            "min_sum",
            "fang_krum",
            "fang_trimmed_mean",
            "mimic",
            "optimal_alie",
            "optimal_ipm",
            "fltrust_adaptive",
            "badnets(target=0, size=2)",
            "badnets(target=0, size=2)+model_replacement",
        ),
        partitions=("iid", "dirichlet(alpha=0.3)"),
    ),
    "fltrust_table": Config(
        preset="fltrust_table",
        dataset="mnist",
        out=Path("runs/fltrust_table"),
        rounds=2000,
        eval_every=50,
        num_seeds=1,
        aggregators=("fedavg", "krum", "trimmed_mean", "median", "fltrust"),
        attacks=(
            "none",
            "label_flip",
            "fang_krum",
            "fang_trimmed_mean",
            "badnets(target=0, fraction=0.5)+scaling(factor=100)",
        ),
        partitions=("label_bias(q=0.5)",),
        clients=100,
        root_steps=1,
        model="cnn",
        epochs=None,
        steps=1,
        batch_size=32,
        lr=0.01,
        side_by_side=1,
    ),
}


class Cell(NamedTuple):
    """One aggregator under one attack in one setting, by the specs of each."""

    partition: str
    attackers: float
    attack: str
    aggregator: str


class Setting(NamedTuple):
    """What the cells of one partition share."""

    partition: str
    shared: dict[str, Any]  # arguments of every Simulation
    root: fs.types.Examples | None
    num_classes: int


def parse(arguments: list[str]) -> Config:
    """The configuration of a command line: its preset, then its options."""
    usual = commandline.preset(arguments, PRESETS, Config.preset)
    return commandline.parse(arguments, usual, __doc__)


def num_attackers(config: Config, cell: Cell) -> int:
    return round(cell.attackers * config.clients)


def max_byzantine(config: Config, cell: Cell) -> int:
    if config.max_byzantine is not None:
        return config.max_byzantine
    return runner.assumed_byzantine(
        config.clients, runner.cohort_size(config), num_attackers(config, cell)
    )


def check(config: Config) -> None:
    """Checks the options that need no data.

    Raises:
        ValueError: with the flag, what was expected and what came.
    """
    runner.check_common(config)
    runner.check_schedule(config)
    for flag in ("aggregators", "attacks", "attackers", "partitions"):
        values = getattr(config, flag)
        if not values:
            raise ValueError(f"--{flag} needs at least one value.")
        if len(set(values)) < len(values):
            raise ValueError(
                f"--{flag} repeats a value: {', '.join(map(str, values))}."
            )
    for share in config.attackers:
        if not 0 < share < 1 or not 0 < round(share * config.clients) < config.clients:
            raise ValueError(
                "--attackers must be in (0, 1) and leave at least one attacker and one "
                f"honest client of {config.clients}; got {share}. For no attack, use "
                "--attacks none."
            )
    if (config.epochs is None) == (config.steps is None):
        raise ValueError(
            f"give exactly one of --epochs and --steps; got {config.epochs} and "
            f"{config.steps}. Write --epochs None to use --steps."
        )
    runner.check_attack_is_active(config, 0, config.rounds)
    if config.side_by_side < 1:
        raise ValueError(f"--side-by-side must be >= 1; got {config.side_by_side}.")


def cells(config: Config) -> list[Cell]:
    return [
        Cell(partition, attackers, attack, aggregator)
        for partition in config.partitions
        for attackers in config.attackers
        for attack in config.attacks
        for aggregator in config.aggregators
    ]


def cell_key(config: Config, cell: Cell, source: str) -> str:
    """Hash of everything that changes a cell's numbers, the user's functions included.

    Args:
        config: of the matrix; what other cells there are makes no difference.
        cell: which one.
        source: ``Dataset.source``, with the fingerprint of the data.
    """
    fields = {k: v for k, v in results.as_json(config).items() if k not in NOT_IN_KEY}
    for spec in (cell.attack, cell.aggregator):
        fields[spec] = specs.source_hash(spec)
    parts = [config.STUDY, fs.__version__, fields, cell, source]
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def load_settings(config: Config) -> tuple[list[Setting], str]:
    """The data of every partition, and where it came from."""
    partitions = {text: specs.make_partition(text) for text in config.partitions}
    make_model = lookup("model", config.model, fs.models.MODELS)
    data = fs.data.load(config.dataset, config.data_dir)
    model = make_model(data.train.inputs.shape[1:], data.num_classes)
    update = fs.local_sgd(
        optax.sgd(config.lr),
        epochs=config.epochs,
        steps=config.steps,
        batch_size=config.batch_size,
    )
    settings = []
    for text, partition in partitions.items():
        clients, root = fs.data.federate(
            data,
            num_clients=config.clients,
            partition=partition,
            root_size=config.root_size,
            seed=config.partition_seed,
        )
        shared = {
            "model": model,
            "clients": clients,
            "client_update": update,
            "test": data.test,
            "cohort_size": runner.cohort_size(config),
            "client_chunk": config.client_chunk,
        }
        settings.append(Setting(text, shared, root, data.num_classes))
    return settings, data.source


def simulation(config: Config, setting: Setting, cell: Cell) -> fs.Simulation:
    """The cell as a simulation, at its attack's first strength."""
    rule = specs.make_aggregator(cell.aggregator, max_byzantine(config, cell))
    attack = make_attack(config, cell.attack, setting.num_classes)
    options: dict[str, Any] = {}
    for field, part in (("attack", attack.on_updates), ("data_attack", attack.on_data)):
        if part is not None:
            options[field] = part
            options["num_byzantine"] = num_attackers(config, cell)
    if rule.needs_root or attack.needs_root:
        options |= {"root": setting.root, "root_steps": config.root_steps}
    return fs.Simulation(aggregator=rule, **options, **setting.shared)


def make_attack(config: Config, text: str, num_classes: int) -> specs.Attack:
    """The attack of a spec, in the rounds that the options say."""
    return specs.schedule(
        specs.make_attack(text, num_classes),
        config.attack_start,
        config.attack_stop,
        config.attack_every,
    )


def impossible(config: Config, cell: Cell, setting: Setting) -> str:
    """Why a rule or an attack has no meaning in this cell; "" where it has."""
    rule = specs.make_aggregator(cell.aggregator, max_byzantine(config, cell))
    attack = specs.make_attack(cell.attack, setting.num_classes).on_updates
    cohort = runner.cohort_size(config)
    try:
        rule.validate(cohort)
        if attack is not None:
            expected = round(cohort * num_attackers(config, cell) / config.clients)
            attack.validate(cohort, expected)
    except ValueError as error:
        return str(error)
    return ""


def check_cells(config: Config, settings: Sequence[Setting]) -> dict[Cell, str]:
    """Checks every rule and attack before any training: cell -> why it cannot be.

    Raises:
        ValueError, TypeError: one that cannot run in any cell, or not with this data
            and model.
    """
    first = settings[0]
    why = {cell: impossible(config, cell, first) for cell in cells(config)}
    for field in ("aggregator", "attack"):
        for spec in getattr(config, f"{field}s"):
            reasons = [why[cell] for cell in why if getattr(cell, field) == spec]
            if all(reasons):
                raise ValueError(f"{spec} can run in no cell: {reasons[0]}")
    # One simulation for every rule and every attack in every partition finds what does
    # not fit the model or the data; all cells would take minutes.
    for setting in settings:
        tried: set[str] = set()
        for cell in (c for c in why if c.partition == setting.partition and not why[c]):
            if not {cell.attack, cell.aggregator} <= tried:
                simulation(config, setting, cell)
                tried |= {cell.attack, cell.aggregator}
    return why


def cell_file(config: Config, cell: Cell, key: str) -> Path:
    words = (cell.partition, f"{cell.attackers:g}", cell.attack, cell.aggregator)
    name = "-".join(re.sub(r"[^\w.]+", "_", word).strip("_") for word in words)
    return config.out / "cells" / f"{name[:150]}-{key}.json"


def found(path: Path, key: str) -> dict[str, Any] | None:
    """A finished cell; None where there is none.

    Raises:
        ValueError: the file is damaged.
    """
    if not path.exists():
        return None
    with results.reading(path, "Delete it to run this cell again."):
        content: dict[str, Any] = json.loads(path.read_text())
        if content["key"] != key or not content["results"]:
            raise ValueError("it is of another cell")
        wanted = {"strength", "seed", *matrix_report.MEASURES}
        if not all(wanted <= set(run) for run in content["results"]):
            raise ValueError("a result lacks some of its measures")
        for measure in matrix_report.MEASURES:
            np.array([run[measure] for run in content["results"]], np.float64)
        for field in ("cell", "max_byzantine", "rounds", "versions"):
            content[field]
    return content


def groups(
    config: Config, missing: Sequence[Cell]
) -> Iterator[tuple[tuple[str, float, str], list[Cell]]]:
    """The missing cells that share a program: one attack, up to side_by_side rules."""
    by_attack: dict[tuple[str, float, str], list[Cell]] = {}
    for cell in missing:
        by_attack.setdefault(cell[:3], []).append(cell)
    for which, members in by_attack.items():
        for i in range(0, len(members), config.side_by_side):
            yield which, members[i : i + config.side_by_side]


def play(
    config: Config,
    setting: Setting,
    members: Sequence[Cell],
    directory: Path,
    progress: Progress,
    task: TaskID,
) -> tuple[runner.Played, tuple[float, ...]]:
    """Plays the cells of one program to the end: what they found, and the strengths."""
    strengths = specs.make_attack(members[0].attack, setting.num_classes).strengths
    comparison = fs.compare(
        {cell.aggregator: simulation(config, setting, cell) for cell in members}
    )
    copies = max(len(strengths), 1)
    keys = [jax.random.key(config.seed + s) for s in range(config.num_seeds)]
    states = comparison.init(jnp.stack(keys * copies))
    if strengths:
        # Strength by strength, each with every seed.
        values = jnp.repeat(jnp.array(strengths, jnp.float32), config.num_seeds)
        states = {n: s._replace(attack=values) for n, s in states.items()}
    start = runner.begin(states)
    played = runner.latest(directory, comparison, start, config.eval_every) or start
    segment = config.segment or config.rounds
    if config.segment is None:
        pace = runner.estimate(comparison, config.num_seeds * copies)
        if pace * config.rounds > LONG_SEGMENT:
            segment = runner.default_segment(config.rounds, config.eval_every, pace)
    before = played.round
    progress.update(task, advance=before * len(members))
    for ahead in runner.segments(
        comparison,
        played,
        last=config.rounds,
        eval_every=config.eval_every,
        segment=segment,
        directory=directory if segment < config.rounds else None,
        on_compile=lambda length: None,
    ):
        played = ahead
        progress.update(task, advance=(played.round - before) * len(members))
        before = played.round
        if before < config.rounds:
            accuracies = runner.latest_accuracies(played.history)
            progress.console.print(
                f"    round {before}/{config.rounds}: {accuracies}", soft_wrap=True
            )
    return played, strengths


def cell_content(
    config: Config,
    cell: Cell,
    key: str,
    history: fs.History,
    strengths: Sequence[float],
) -> dict[str, Any]:
    """What is kept of a cell: every strength's and seed's results and its curve."""
    runs: list[dict[str, Any]] = [
        {"strength": strength, "seed": config.seed + seed}
        for strength in (strengths or (None,))
        for seed in range(config.num_seeds)
    ]
    for index, run in enumerate(runs):
        one = jax.tree.map(lambda x, i=index: np.asarray(x)[i], history)
        run |= matrix_report.measure(one)
    return {
        "key": key,
        "cell": cell._asdict(),
        "max_byzantine": max_byzantine(config, cell),
        "num_byzantine": num_attackers(config, cell),
        "rounds": config.rounds,
        "versions": results.versions(),
        "results": runs,
    }


def run(config: Config, console: Console) -> None:
    """Checks everything, runs the cells that are missing, and writes the reports.

    Raises:
        ValueError, TypeError: a bad option, or a damaged cell; before any training.
    """
    check(config)
    rundir.check_writable(config.out)
    if not (config.out / "matrix.json").exists():
        rundir.check_unused(config.out, "matrix")
    for spec in config.aggregators:  # names first: loading the data may take long
        specs.make_aggregator(spec, 1)
    for spec in config.attacks:
        make_attack(config, spec, specs.ANY_CLASSES)
    runner.start(config.cores)
    settings, source = load_settings(config)
    why = check_cells(config, settings)
    keys = {cell: cell_key(config, cell, source) for cell in cells(config)}
    done = {
        cell: found(cell_file(config, cell, key), key) for cell, key in keys.items()
    }
    with rundir.hold(config.out):
        results.write_atomically(
            config.out / "matrix.json",
            json.dumps(
                {
                    "study": config.STUDY,
                    "config": results.as_json(config),
                    "data": source,
                    "versions": results.versions(),
                },
                indent=2,
            )
            + "\n",
        )
        _run_missing(config, settings, keys, done, why, console)
        matrix_report.write(config, command(config), done, why, console)


def _run_missing(
    config: Config,
    settings: Sequence[Setting],
    keys: dict[Cell, str],
    done: dict[Cell, dict[str, Any] | None],
    why: dict[Cell, str],
    console: Console,
) -> None:
    """Runs what is not done, a program at a time; fills in ``done`` and the files."""
    missing = [cell for cell in keys if done[cell] is None and not why[cell]]
    for reason in dict.fromkeys(filter(None, why.values())):
        of = [cell for cell in why if why[cell] == reason]
        console.print(f"not possible in {len(of)} cells: {reason}")
    console.print(
        f"{sum(map(bool, done.values()))} of {len(keys)} cells done before, "
        f"{len(missing)} to run on {jax.devices()[0].device_kind}"
    )
    by_partition = {setting.partition: setting for setting in settings}
    (config.out / "cells").mkdir(exist_ok=True)
    with runner.progress_bar(console) as progress:
        task = progress.add_task("cells x rounds", total=len(missing) * config.rounds)
        left, start = len(missing), time.perf_counter()
        for which, members in groups(config, missing):
            digest = hashlib.sha256("".join(keys[c] for c in members).encode())
            directory = config.out / "checkpoints" / digest.hexdigest()[:16]
            names = f"{which[0]}, {results.percent(which[1])} attackers, {which[2]}"
            progress.update(task, description=names)
            played, strengths = play(
                config, by_partition[which[0]], members, directory, progress, task
            )
            for cell in members:
                history = played.history[cell.aggregator]
                content = cell_content(config, cell, keys[cell], history, strengths)
                # Of the whole program: what it holds is trained together.
                content["program_seconds"] = dict(
                    zip(("compile", "run"), map(float, played.seconds.round(2)))
                )
                done[cell] = content
                path = cell_file(config, cell, keys[cell])
                results.write_atomically(path, json.dumps(content) + "\n")
            shutil.rmtree(directory, ignore_errors=True)
            matrix_report.write_csv(config.out / "matrix.csv", done.values())
            left -= len(members)
            pace = (time.perf_counter() - start) / (len(missing) - left)
            # As the matrix will show it: at the strength that hurts most.
            shown = "  ".join(
                f"{c.aggregator} {matrix_report.headline(done[c])[0]:.3f}"
                for c in members
            )
            progress.console.print(
                f"{len(keys) - left}/{len(keys)} {names}: {shown} (compiled in "
                f"{runner.duration(played.seconds[0])}, ran "
                f"{runner.duration(played.seconds[1])}; left: about "
                f"{runner.duration(pace * left)})",
                soft_wrap=True,
            )
    # What other options left behind in the middle of a program.
    shutil.rmtree(config.out / "checkpoints", ignore_errors=True)


def command(config: Config) -> str:
    """The command line that makes this matrix."""
    return commandline.command(config, PRESETS[config.preset])


if __name__ == "__main__":
    runner.exit_on_interrupt("the same command continues")
    commandline.main(parse, run)
