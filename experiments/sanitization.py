"""Federated data sanitization against poisoned samples, beside rules of the server.

Ten clients, eight of them a round. Attackers flip the labels of one class, stamp a
trigger on samples, or both. With sanitization, clients cluster their samples by shallow
features, and drop those whose label is not that of their cluster; the others train with
FedAvg. The study has three parts:
  attacks  every defense under every attack: the paper's tables I and II, with the share
           of poisoned samples removed and of clean samples lost.
  ratios   sanitization and plain FedAvg with 25, 50 and 75 % attackers: its table III.
  poison   the same with fewer and with more of an attacker's samples poisoned.

Presets:
  paper      MNIST and a three-layer network: an hour or more on two cores (default).
  pneumonia  PneumoniaMNIST: pneumonia is flipped to normal.
  chest      ChestMNIST and ResNet-18: 14 labels, Mass is flipped to Nodule. Hours, even
             on a GPU; AUC stands beside accuracy, which is .947 if every label is
             denied.
  demo       scikit-learn's embedded 8x8 digits: under two minutes on two cores.

Example:
  python -m experiments.sanitization --data-dir DIR --out runs/sanitization
"""

import dataclasses
import math
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import optax
from rich.console import Console

import fedjax_sim as fs
from experiments import commandline, results, runner, sanitization_report, specs
from fedjax_sim.registry import check_number, lookup

NO_DEFENSE = "fedavg"


@dataclasses.dataclass(frozen=True)
class Config:
    """Federated data sanitization against poisoned samples, beside rules."""

    STUDY: ClassVar[str] = "sanitization"

    #: Starting values of the other options. paper: MNIST. pneumonia: PneumoniaMNIST.
    #: chest: ChestMNIST and ResNet-18, hours. demo: embedded digits, two minutes.
    preset: Literal["paper", "pneumonia", "chest", "demo"] = "paper"
    #: mnist, pneumoniamnist, chestmnist (14 labels), digits (embedded), or another.
    dataset: str = "mnist"
    #: Folder with idx/mnist/*.gz, medmnist/*.npz and so on; downloads land there.
    #: Default: $FEDJAX_SIM_DATA, else a user cache folder.
    data_dir: Path | None = None
    #: Folder for the results; refused if it holds any, unless --resume is given.
    out: Path = Path("runs/sanitization")
    #: Continue the run in --out from its last checkpoint, extend it, or start it.
    resume: bool = False
    #: Rounds between checkpoints. Default: about a twentieth of the run.
    segment: int | None = None
    #: Communication rounds.
    rounds: int = 10
    #: Evaluate after every this many rounds, and after the last.
    eval_every: int = 1
    #: Seed of everything but the partition.
    seed: int = 0
    #: Run seeds seed, seed+1, ... side by side; they share the partition.
    num_seeds: int = 1

    #: Number of clients.
    clients: int = 10
    #: Clients sampled each round, or all.
    cohort: int | Literal["all"] = 8
    #: iid, or for data of one label a sample 'dirichlet(alpha=0.5)' and so on.
    partition: str = "iid"
    #: Seed of the partition.
    partition_seed: int = 0

    #: small_cnn (two convolutions, a pooling, a dense layer), cnn, digits_cnn, mlp or
    #: resnet18.
    model: str = "small_cnn"
    #: Local epochs.
    epochs: int = 1
    #: Local batch size.
    batch_size: int = 32
    #: Local learning rate (plain SGD).
    lr: float = 0.05
    #: At most this many clients side by side; default: by backend and model size.
    client_chunk: int | None = None
    #: Cores of the CPU, each of which trains its own clients. Default:
    #: $JAX_NUM_CPU_DEVICES, else all that this process may use, at most 8.
    cores: int | None = None

    #: Attacks of the part attacks: label_flip, badnets, hybrid.
    attacks: tuple[Literal["label_flip", "badnets", "hybrid"], ...] = (
        "label_flip",
        "badnets",
        "hybrid",
    )
    #: Class whose samples label_flip and hybrid relabel.
    source: int = 3
    #: Class they relabel them as.
    flip_target: int = 2
    #: Class that badnets and hybrid relabel the samples as which they stamp.
    target: int = 0
    #: Side of the trigger, in pixels: a white square in the lower right corner.
    trigger: int = 3
    #: Poisoning ratio: share of an attacker's samples of the class that label_flip
    #: relabels, and of all its samples that badnets stamps. hybrid relabels the whole
    #: class, and stamps this share of the others.
    poison: float = 0.3
    #: Poisoning ratios of the part poison, besides --poison; none leaves it out.
    poisons: tuple[float, ...] = (0.1, 1.0)
    #: Share of the clients that are attackers, rounded up. The first is that of the
    #: parts attacks and poison.
    attackers: tuple[float, ...] = (0.25, 0.5, 0.75)
    #: Defenses of the part attacks, besides none: any aggregator of the README's table,
    #: sanitization, or both, as sanitization+krum.
    defenses: tuple[str, ...] = (
        "auror",
        "foolsgold",
        "krum",
        "sanitization",
        "sanitization(vote='global')",
    )
    #: Clusters of sanitization; the paper has as many as classes (and 8 for the 14
    #: labels of ChestMNIST). Default: the number of classes.
    clusters: int | None = None


PRESETS: dict[str, Config] = {
    "paper": Config(),
    "pneumonia": Config(
        preset="pneumonia",
        dataset="pneumoniamnist",
        out=Path("runs/sanitization_pneumonia"),
        rounds=50,
        eval_every=2,
        batch_size=16,
        source=1,
        flip_target=0,
        target=0,
    ),
    "chest": Config(
        preset="chest",
        dataset="chestmnist",
        out=Path("runs/sanitization_chest"),
        rounds=20,
        model="resnet18",
        source=4,
        flip_target=5,
        target=5,
        clusters=8,
    ),
    "demo": Config(
        preset="demo",
        dataset="digits",
        out=Path("runs/sanitization_demo"),
        rounds=20,
        eval_every=2,
        model="digits_cnn",
        batch_size=8,
        lr=0.1,
        trigger=2,
        poisons=(),
        attackers=(0.25, 0.75),
        defenses=("foolsgold", "krum", "sanitization"),
    ),
}


def parse(arguments: list[str]) -> Config:
    """The configuration of a command line: its preset, then its options."""
    usual = commandline.preset(arguments, PRESETS, Config.preset)
    return commandline.parse(arguments, usual, __doc__)


class Cell(NamedTuple):
    """What a system of this study varies; its name in the results follows from it."""

    attack: str
    poison: float
    attackers: float
    defense: str

    @property
    def name(self) -> str:
        if self.attack == specs.NO_ATTACK:
            return f"none {self.defense}"
        share = results.percent(self.attackers)
        return f"{self.attack}({self.poison:g}) by {share} {self.defense}"


def sanitizing(config: Config) -> list[str]:
    """The defenses in which clients sanitize their data."""
    return [d for d in config.defenses if d.startswith("sanitization")]


def cells(config: Config) -> list[Cell]:
    """Every system of the study, each once."""
    first = config.attackers[0]
    found = [Cell(specs.NO_ATTACK, 0.0, 0.0, NO_DEFENSE)]
    found += [Cell(specs.NO_ATTACK, 0.0, 0.0, d) for d in sanitizing(config)]
    defenses = tuple(dict.fromkeys((NO_DEFENSE, *config.defenses)))
    for attack in config.attacks:
        found += [Cell(attack, config.poison, first, d) for d in defenses]
    main = (NO_DEFENSE, *sanitizing(config))
    for attack in config.attacks:
        if attack == "hybrid":  # not in the paper's table III; both attacks are
            continue
        for share in config.attackers[1:]:
            found += [Cell(attack, config.poison, share, d) for d in main]
        for poison in config.poisons:
            found += [Cell(attack, poison, first, d) for d in main]
    return list(dict.fromkeys(found))


def num_attackers(config: Config, share: float) -> int:
    return math.ceil(share * config.clients - 1e-9)


def counts(config: Config, share: float) -> tuple[int, int]:
    """Attackers among all clients, and how many of them rules assume in a cohort."""
    count = num_attackers(config, share)
    cohort = runner.cohort_size(config)
    return count, runner.assumed_byzantine(config.clients, cohort, count)


def make_attack(config: Config, cell: Cell, num_classes: int) -> specs.Attack:
    """The attack of a cell."""
    flip = {"source": config.source, "target": config.flip_target}
    trigger = {"target": config.target, "size": config.trigger}
    if cell.attack == specs.NO_ATTACK:
        return specs.Attack(None, None)
    if cell.attack == "label_flip":
        options: dict[str, Any] = {"mode": "targeted", "fraction": cell.poison, **flip}
        return specs.Attack(fs.attacks.label_flip(num_classes, **options), None)
    options = {"fraction": cell.poison, **trigger}
    if cell.attack == "hybrid":
        options |= {"source": config.source, "flip_target": config.flip_target}
        return specs.Attack(fs.attacks.hybrid(num_classes, **options), None)
    return specs.Attack(fs.attacks.badnets(num_classes, **options), None)


def check(config: Config) -> None:
    """Checks the options that need no data.

    Raises:
        ValueError: with the flag, what was expected and what came.
    """
    runner.check_common(config)
    for flag in ("attacks", "attackers", "defenses"):
        values = getattr(config, flag)
        if not values or len(set(values)) < len(values):
            raise ValueError(
                f"--{flag} needs one value or more, each once; got {values}."
            )
    for share in config.attackers:
        check_number("--attackers", share, 0, 1)
        if num_attackers(config, share) >= config.clients:
            raise ValueError(
                f"--attackers {share} of {config.clients} clients, rounded up, is all "
                "of them; somebody must be honest."
            )
    poisons = (config.poison, *config.poisons)
    for poison in poisons:
        check_number("--poison and --poisons", poison, 0, 1, "(]")
    if len(set(poisons)) < len(poisons):
        raise ValueError(
            "--poisons needs ratios other than --poison, each once; got "
            f"{config.poisons} besides {config.poison}."
        )
    check_names(cells(config))


def check_names(todo: list[Cell]) -> None:
    """Checks that every system has a name of its own.

    Raises:
        ValueError: two that results could not tell apart.
    """
    names = [cell.name for cell in todo]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(
            f"two systems would be called {twice[0]!r}: values of --attackers, or of "
            "--poison and --poisons, must differ in their first six digits."
        )


def check_starts(config: Config) -> None:
    """Checks that every sanitization begins within the run; for specs that are right.

    Raises:
        ValueError: one that does not.
    """
    for text in sanitizing(config):
        start = specs.parse(text)[0].options.get("start", 0)
        if start >= config.rounds:
            raise ValueError(
                f"--defenses {text}: start={start} is after the run, whose rounds are "
                f"0 to {config.rounds - 1}. Take a smaller start or more --rounds."
            )


def make_phases(config: Config) -> tuple[list[runner.Phase], str]:
    """Loads the data and builds every system.

    Returns:
        One phase, and where the data came from.

    Raises:
        ValueError: a bad setting.
    """
    check(config)
    # Names first: they cost nothing, loading the data may.
    make_model = lookup("model", config.model, fs.models.MODELS)
    partition = specs.make_partition(config.partition)
    for text in config.defenses:
        usual = {"num_clusters": 2 if config.clusters is None else config.clusters}
        specs.make_defense(text, 0, usual)
    check_starts(config)

    data = fs.data.load(config.dataset, config.data_dir)
    clients, _ = fs.data.federate(
        data,
        num_clients=config.clients,
        partition=partition,
        root_size=0,
        seed=config.partition_seed,
    )
    model = make_model(data.train.inputs.shape[1:], data.num_classes)
    shared: dict[str, Any] = {
        "model": fs.models.for_task(model, data.task),
        "clients": clients,
        "test": data.test,
        "client_update": fs.local_sgd(
            optax.sgd(config.lr), epochs=config.epochs, batch_size=config.batch_size
        ),
        "cohort_size": runner.cohort_size(config),
        "client_chunk": config.client_chunk,
    }
    todo = cells(config)
    # One attack object each, so that systems under one attack share its trigger.
    attacks = {
        (c.attack, c.poison): make_attack(config, c, data.num_classes) for c in todo
    }

    clusters = data.num_classes if config.clusters is None else config.clusters
    # And one client defense, so that they share its compiled program.
    on_clients: dict[str, Any] = {}

    def simulation(cell: Cell) -> fs.Simulation:
        attack = attacks[cell.attack, cell.poison]
        count, f = counts(config, cell.attackers)
        defense = specs.make_defense(cell.defense, f, {"num_clusters": clusters})
        own = on_clients.setdefault(cell.defense, defense.on_clients)
        return fs.Simulation(
            aggregator=defense.rule,
            client_defense=own,
            data_attack=attack.on_data,
            num_byzantine=count,
            **shared,
        )

    systems = {cell.name: simulation(cell) for cell in todo}
    return [runner.Phase("all", systems, config.rounds)], data.source


def settings(config: Config) -> str:
    """The run in a sentence, for the terminal and the summary."""
    seeds = f"seed {config.seed}"
    if config.num_seeds > 1:
        seeds += f" and the {config.num_seeds - 1} after it"
    attackers = ", ".join(
        f"{results.percent(share)} are {count} clients (rules assume {f} in a cohort)"
        for share in config.attackers
        for count, f in [counts(config, share)]
    )
    return (
        f"{config.dataset}, {config.model}, {config.clients} clients "
        f"({config.partition}), {runner.cohort_size(config)} a round; label flip "
        f"{config.source} to {config.flip_target}, trigger of {config.trigger} x "
        f"{config.trigger} pixels for class {config.target}; {config.epochs} local "
        f"epoch(s), batch {config.batch_size}, rate {config.lr:g}, {seeds}. "
        f"Attackers: {attackers}."
    )


def run(config: Config, console: Console) -> runner.Result:
    """Checks everything, runs or resumes, and writes the results.

    Raises:
        ValueError: a bad option, before any training.
    """

    def write(config: Config, result: runner.Result, console: Console) -> None:
        sanitization_report.write(
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
