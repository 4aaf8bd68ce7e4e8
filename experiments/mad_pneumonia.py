"""MAD on chest X-rays: when trust-based exclusion engages, and what it is worth.

Ten hospitals train on PneumoniaMNIST; two of them flip all their labels. MAD keeps a
reputation and a trust value for every client and excludes for good whom it does not
trust, from a chosen round on. The study has three parts:
  engagement  MAD engaged at rounds 5, 20, 40, 60, 80 and never, and no attack: the
              paper's figure 3(a, b), with trust, detection rounds and false alarms.
  long        MAD engaged at round 10 against 500, of 1000 rounds: its figure 3(c).
  settings    MAD, FedAvg, Multi-Krum and FLTrust under label flips, sign flips and
              ALIE, on IID and on uneven data, where the paper is silent.

Presets:
  paper  PneumoniaMNIST, all three parts (default).
  demo   scikit-learn's embedded breast-cancer table, 40 rounds: under two minutes.

Example:
  python -m experiments.mad_pneumonia --data-dir DIR --out runs/mad
"""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import optax
from rich.console import Console

import fedjax_sim as fs
from experiments import commandline, mad_report, results, runner, specs
from fedjax_sim.registry import lookup


@dataclasses.dataclass(frozen=True)
class Config:
    """MAD on chest X-rays: when exclusion engages, and what it is worth."""

    STUDY: ClassVar[str] = "mad_pneumonia"

    #: Starting values of the other options. paper: PneumoniaMNIST, 100 and 1000 rounds.
    #: demo: the embedded breast-cancer table, 40 rounds.
    preset: Literal["paper", "demo"] = "paper"
    #: pneumoniamnist, breast_cancer (embedded), or any other data set of two or more
    #: classes.
    dataset: str = "pneumoniamnist"
    #: Folder with medmnist/*.npz; downloads land there. Default: $FEDJAX_SIM_DATA, else
    #: a user cache folder.
    data_dir: Path | None = None
    #: Folder for the results; refused if it holds any, unless --resume is given.
    out: Path = Path("runs/mad_pneumonia")
    #: Continue the run in --out from its last checkpoint, extend it, or start it.
    resume: bool = False
    #: Rounds between checkpoints. Default: about a twentieth of each part.
    segment: int | None = None
    #: Communication rounds of the parts engagement and settings.
    rounds: int = 100
    #: Communication rounds of the part long; 0 leaves it out.
    long_rounds: int = 1000
    #: Evaluate after every this many rounds, and after the last.
    eval_every: int = 2
    #: Seed of everything but the partition.
    seed: int = 0
    #: Run seeds seed, seed+1, ... side by side; they share the partition.
    num_seeds: int = 1

    #: Number of clients.
    clients: int = 10
    #: Clients sampled each round, or all.
    cohort: int | Literal["all"] = "all"
    #: Partitions of the part settings; the first is that of the other parts: iid,
    #: 'dirichlet(alpha=0.5)', 'label_bias(q=0.8)'.
    partitions: tuple[str, ...] = ("iid", "dirichlet(alpha=0.5)")
    #: Seed of the partition, of the held-out samples and of the root dataset.
    partition_seed: int = 0
    #: Share of its samples that each client keeps to evaluate the model on.
    held_out: float = 0.2
    #: Clean samples of the server, for FLTrust.
    root_size: int = 100

    #: digits_cnn (8 and 16 channels), cnn, small_cnn, resnet18 or mlp.
    model: str = "digits_cnn"
    #: Local epochs.
    epochs: int = 1
    #: Local batch size.
    batch_size: int = 16
    #: Local learning rate (plain SGD).
    lr: float = 0.05
    #: At most this many clients side by side; default: by backend and model size.
    client_chunk: int | None = None
    #: Cores of the CPU, each of which trains its own clients. Default:
    #: $JAX_NUM_CPU_DEVICES, else all that this process may use, at most 8.
    cores: int | None = None

    #: Rounds from which MAD excludes clients, in the part engagement. The first is that
    #: of the part settings.
    engage: tuple[int, ...] = (5, 20, 40, 60, 80)
    #: Rounds from which it does so in the part long.
    engage_long: tuple[int, ...] = (10, 500)
    #: MAD and its options. The first is the one of all parts, the others are tried
    #: under the first attack: with measured='all' excluded clients still shape the
    #: centre and the scale, and with variant='code' too it is what its authors
    #: published.
    mad: tuple[str, ...] = (
        "mad",
        "mad(measured='all')",
        "mad(variant='code', measured='all')",
        "mad(clusters=2)",
    )
    #: Other aggregators of the part settings.
    aggregators: tuple[str, ...] = ("fedavg", "multi_krum", "fltrust")
    #: Attacks of the part settings; the first is that of the other parts.
    attacks: tuple[str, ...] = ("label_flip", "sign_flip(scale=3)", "alie")
    #: Fraction of all clients that are Byzantine, in (0, 1).
    attackers: float = 0.2


PRESETS: dict[str, Config] = {
    "paper": Config(),
    "demo": Config(
        preset="demo",
        dataset="breast_cancer",
        out=Path("runs/mad_demo"),
        rounds=40,
        long_rounds=0,
        partitions=("iid", "dirichlet(alpha=1.0)"),
        root_size=50,
        model="mlp",
        batch_size=4,
        lr=0.02,
        engage=(5, 15, 25),
        mad=("mad", "mad(measured='all')"),
        attacks=("label_flip", "sign_flip(scale=3)"),
    ),
}


def parse(arguments: list[str]) -> Config:
    """The configuration of a command line: its preset, then its options."""
    usual = commandline.preset(arguments, PRESETS, Config.preset)
    return commandline.parse(arguments, usual, __doc__)


class Cell(NamedTuple):
    """What a system of this study varies; its name in the results follows from it.

    ``rule`` is an aggregator as ``specs`` reads it, ``start`` the round in which MAD
    engages, None for other rules.
    """

    part: str
    partition: str
    attack: str
    rule: str
    start: int | None = None

    @property
    def label(self) -> str:
        return self.rule if self.start is None else f"{self.rule}@{self.start}"

    @property
    def name(self) -> str:
        where = "long" if self.part == "long" else self.partition
        return f"{where} {self.attack} {self.label}"


def cells(config: Config) -> list[Cell]:
    """Every system of the study, each once, the ones trained together in a row."""
    found = []
    for place, partition in enumerate(config.partitions):
        found.append(Cell("settings", partition, specs.NO_ATTACK, "fedavg"))
        for i, attack in enumerate(config.attacks):
            usual, *others = config.mad
            engage = config.engage if place == i == 0 else config.engage[:1]
            rules = dict.fromkeys(("fedavg", *config.aggregators))
            found += [Cell("settings", partition, attack, rule) for rule in rules]
            found += [Cell("settings", partition, attack, usual, at) for at in engage]
            found += [
                Cell("settings", partition, attack, mad, engage[0])
                for mad in (others if i == 0 else ())
            ]
    if config.long_rounds:
        setting = (config.partitions[0], config.attacks[0], config.mad[0])
        found += [Cell("long", *setting, at) for at in config.engage_long]
    return found


def check(config: Config) -> None:
    """Checks the options that need no data.

    Raises:
        ValueError: with the flag, what was expected and what came.
    """
    runner.check_common(config)
    if runner.num_attackers(config) == 0:
        raise ValueError("--attackers 0: the study compares rules under attack.")
    if not 0 < config.held_out < 1:
        raise ValueError(f"--held-out must be in (0, 1); got {config.held_out}.")
    if config.long_rounds < 0:
        raise ValueError(f"--long-rounds must be >= 0; got {config.long_rounds}.")
    for flag in ("partitions", "attacks", "engage", "mad"):
        values = getattr(config, flag)
        if not values or len(set(values)) < len(values):
            raise ValueError(
                f"--{flag} needs one value or more, each once; got {values}."
            )
    if config.long_rounds and not config.engage_long:
        raise ValueError("--engage-long needs a round, or give --long-rounds 0.")
    if len(set(config.engage_long)) < len(config.engage_long):
        raise ValueError(f"--engage-long repeats a round: {config.engage_long}.")
    if specs.NO_ATTACK in config.attacks:
        raise ValueError(
            "--attacks none: FedAvg without an attack is always there. Drop it."
        )
    for flag, rounds in (("engage", config.rounds), ("engage_long", None)):
        last = rounds or config.long_rounds
        late = [at for at in getattr(config, flag) if last and not 1 <= at <= last]
        if late:
            raise ValueError(
                f"--{flag.replace('_', '-')} must be rounds from 1 to {last}; got "
                f"{late[0]}."
            )
    for text in config.mad:
        call, *more = specs.parse(text)
        if more or call.name != "mad" or "start" in call.options:
            raise ValueError(
                "--mad takes mad and its options but start, such as 'mad(clusters=2)': "
                "--engage and --engage-long say when it engages; got "
                f"{text!r}."
            )
    calls = [specs.parse(text) for text in config.mad]
    if any(call in calls[:i] for i, call in enumerate(calls)):
        raise ValueError(f"--mad repeats one of its values: {config.mad}.")


def make_rule(config: Config, cell: Cell) -> fs.types.Aggregator:
    """The aggregator of a cell: MAD with its options, engaged in the cell's round."""
    text = cell.rule
    if cell.start is not None:
        (call,) = specs.parse(text)
        options = call.options | {"start": cell.start}
        text = specs.text_of(specs.Call("mad", options))
    return specs.make_aggregator(text, runner.num_attackers(config))


def make_phases(config: Config) -> tuple[list[runner.Phase], str]:
    """Loads the data and builds every system.

    Returns:
        The phases, one for every partition and one for the long part, and where the
        data came from.

    Raises:
        ValueError: a bad setting.
    """
    check(config)
    # Names first: they cost nothing, loading the data may.
    make_model = lookup("model", config.model, fs.models.MODELS)
    todo = cells(config)
    for attack in config.attacks:
        if specs.make_attack(attack, specs.ANY_CLASSES).strengths:
            raise ValueError(f"--attacks {attack!r}: one strength at a time.")
    for cell in todo:
        make_rule(config, cell).validate(runner.cohort_size(config))
    partitions = {text: specs.make_partition(text) for text in config.partitions}

    data = fs.data.load(config.dataset, config.data_dir)
    if data.task != "classification":
        raise ValueError(
            f"--dataset {config.dataset} has several labels a sample; this study "
            "flips and scores one. Take another, such as pneumoniamnist."
        )
    model = make_model(data.train.inputs.shape[1:], data.num_classes)
    update = fs.local_sgd(
        optax.sgd(config.lr), epochs=config.epochs, batch_size=config.batch_size
    )
    attacks = {
        text: specs.make_attack(text, data.num_classes)
        for text in (specs.NO_ATTACK, *config.attacks)
    }
    shared: dict[str, dict[str, Any]] = {}
    for text, partition in partitions.items():
        clients, root = fs.data.federate(
            data,
            num_clients=config.clients,
            partition=partition,
            root_size=config.root_size,
            seed=config.partition_seed,
        )
        clients, held_out = fs.data.hold_out(
            clients, config.held_out, config.partition_seed
        )
        shared[text] = {
            "model": model,
            "clients": clients,
            "local_test": held_out,
            "root": root,
            "test": data.test,
            "client_update": update,
            "cohort_size": runner.cohort_size(config),
            "client_chunk": config.client_chunk,
        }

    def simulation(cell: Cell) -> fs.Simulation:
        attack = attacks[cell.attack]
        attacked = cell.attack != specs.NO_ATTACK
        return fs.Simulation(
            aggregator=make_rule(config, cell),
            attack=attack.on_updates,
            data_attack=attack.on_data,
            num_byzantine=runner.num_attackers(config) if attacked else 0,
            **shared[cell.partition],
        )

    phases = [
        runner.Phase(
            f"partition-{place}",
            {
                c.name: simulation(c)
                for c in todo
                if (c.part, c.partition) == ("settings", partition)
            },
            config.rounds,
        )
        for place, partition in enumerate(config.partitions)
    ]
    long = {c.name: simulation(c) for c in todo if c.part == "long"}
    if long:
        phases.append(runner.Phase("long", long, config.long_rounds))
    return phases, data.source


def settings(config: Config) -> str:
    """The run in a sentence, for the terminal and the summary."""
    seeds = f"seed {config.seed}"
    if config.num_seeds > 1:
        seeds += f" and the {config.num_seeds - 1} after it"
    return (
        f"{config.dataset}, {config.model}, {config.clients} clients, "
        f"{runner.cohort_size(config)} a round, {runner.num_attackers(config)} of all "
        f"Byzantine; {config.epochs} local epoch(s), batch {config.batch_size}, rate "
        f"{config.lr:g}; each client keeps {results.percent(config.held_out)} of its "
        f"samples to evaluate on; root dataset of {config.root_size}, {seeds}."
    )


def run(config: Config, console: Console) -> runner.Result:
    """Checks everything, runs or resumes, and writes the results.

    Raises:
        ValueError: a bad option, before any training.
    """

    def write(config: Config, result: runner.Result, console: Console) -> None:
        mad_report.write(
            config,
            result,
            console,
            cells={cell.name: cell for cell in cells(config)},
            command=commandline.command(config, PRESETS[config.preset]),
            settings=settings(config),
        )

    return runner.run(config, console, make_phases, settings, write)


if __name__ == "__main__":
    runner.exit_on_interrupt()
    commandline.main(parse, run)
