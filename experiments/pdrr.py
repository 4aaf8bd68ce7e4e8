"""PDRR and five other detectors against attacks made for the rule they attack.

Fifty clients, twenty of them attackers who craft their models against Krum, the trimmed
mean or the median (Fang et al.). PDRR looks for the trace that these attacks leave, and
needs no data; ERR, LFR, their union, VAE and DAGMM have the server's samples. The study
has six parts:
  schemes     every detector on every rule under its attack, from the attackers' own
              models: false and missing alarms (the paper's tables 1 and 2), a client's
              detection index (its figures 8 to 10), test error; PDRR without an attack.
  knowledge   PDRR where the attackers know all models, and the thresholds that detect
              without a mistake (its figure 11).
  counts      PDRR with fewer and with more attackers than it assumes.
  partitions  PDRR where clients differ more, less, or not at all.
  others      PDRR under attacks that it was not made for.
  time        how long one detection of the part schemes takes (the paper's table 3).

Presets:
  paper    MNIST, divided by label: an hour and a half on two cores (default).
  femnist  FEMNIST in LEAF's format, a writer to a client, and LEAF's network of 6.6
           million parameters: for a GPU.
  demo     scikit-learn's embedded 8x8 digits, half as many clients, two of the parts:
           under three minutes on two cores.

Example:
  python -m experiments.pdrr --data-dir DIR --out runs/pdrr
"""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import optax
from rich.console import Console

import fedjax_sim as fs
from experiments import commandline, pdrr_report, pdrr_time, runner, specs
from fedjax_sim.registry import check_number, lookup
from fedjax_sim.types import Aggregator

BASES = ("krum", "trimmed_mean", "median")
#: Attackers that the attack on Krum needs, if they know their own models only.
FEWEST = 3
#: The attack that is made for a rule.
FANG = "fang"
NO_DEFENSE = "none"
PDRR = "pdrr"
#: A rule without PDRR and with it.
TWO = (NO_DEFENSE, PDRR)
#: Options of the paper, besides those of the command line.
OPTIONS: dict[str, dict[str, Any]] = {
    "vae_detector": {"reject": "count", "latent": 100, "draws": 10},
    "dagmm_detector": {"reject": "count"},
}
#: How the paper calls what attackers know.
KNOWLEDGE = {"partial": "colluding", "full": "omniscient"}
Part = Literal["schemes", "knowledge", "counts", "partitions", "others", "time"]


@dataclasses.dataclass(frozen=True)
class Config:
    """PDRR and five other detectors against attacks made for the rule they attack."""

    STUDY: ClassVar[str] = "pdrr"

    #: Starting values of the other options. paper: MNIST, 90 minutes. femnist: LEAF's
    #: FEMNIST, for a GPU. demo: embedded digits, under three minutes.
    preset: Literal["paper", "femnist", "demo"] = "paper"
    #: mnist, femnist, digits (embedded), or another.
    dataset: str = "mnist"
    #: Folder with idx/mnist/*.gz, leaf/femnist/train/*.json and so on; downloads land
    #: there. Default: $FEDJAX_SIM_DATA, else a user cache folder.
    data_dir: Path | None = None
    #: Folder for the results; refused if it holds any, unless --resume is given.
    out: Path = Path("runs/pdrr")
    #: Continue the run in --out from its last checkpoint, extend it, or start it.
    resume: bool = False
    #: Rounds between checkpoints. Default: about a twentieth of a part.
    segment: int | None = None
    #: Communication rounds of the parts schemes and knowledge.
    rounds: int = 100
    #: Communication rounds of the other parts.
    sweep_rounds: int = 10
    #: Evaluate after every this many rounds, and after the last.
    eval_every: int = 5
    #: Seed of everything but the partition.
    seed: int = 0
    #: Run seeds seed, seed+1, ... side by side; they share the partition.
    num_seeds: int = 1

    #: Parts to run.
    parts: tuple[Part, ...] = (
        "schemes",
        "knowledge",
        "counts",
        "partitions",
        "others",
        "time",
    )
    #: Number of clients.
    clients: int = 50
    #: Clients sampled each round, or all.
    cohort: int | Literal["all"] = "all"
    #: Attackers among the clients.
    attackers: int = 20
    #: How the data are divided: label_bias(q=0.5), dirichlet(alpha=0.5), iid, or
    #: by_client of data that come divided.
    partition: str = "label_bias(q=0.5)"
    #: Seed of the partition.
    partition_seed: int = 0
    #: Samples of the server, for ERR, LFR, VAE and DAGMM; taken from the training set.
    root_size: int = 500

    #: cnn (FLTrust's), leaf_cnn (LEAF's), small_cnn, digits_cnn, mlp or resnet18.
    model: str = "cnn"
    #: Local steps.
    steps: int = 5
    #: Local batch size.
    batch_size: int = 16
    #: Local learning rate (plain SGD).
    lr: float = 0.1
    #: At most this many clients side by side; default: by backend and model size.
    client_chunk: int | None = None
    #: Cores of the CPU, each of which trains its own clients. Default:
    #: $JAX_NUM_CPU_DEVICES, else all that this process may use, at most 8.
    cores: int | None = None

    #: Detectors of the part schemes. All are told how many attackers there are, as the
    #: rules are; all but pdrr remove as many clients.
    schemes: tuple[
        Literal["dagmm_detector", "vae_detector", "err", "lfr", "err_lfr", "pdrr"], ...
    ] = ("dagmm_detector", "vae_detector", "err", "lfr", "err_lfr", "pdrr")
    #: PDRR's detection parameter for Krum.
    q_krum: float = 0.5
    #: PDRR's detection parameter for the trimmed mean.
    q_trimmed_mean: float = 0.9
    #: PDRR's detection parameter for the median.
    q_median: float = 0.9
    #: The step at which the attack on Krum gives up.
    stop: float = 1e-9
    #: How far the attack on trimmed mean and median reaches beyond the extreme model,
    #: where attackers know all models.
    b: float = 1.05
    #: Numbers of attackers of the part counts; rules go on assuming --attackers.
    counts: tuple[int, ...] = (5, 10, 15, 24)
    #: Values that the trimmed mean of the part counts cuts at each end, where these are
    #: fewer than attackers. The paper's "2 beta = 20" is 10; 0 leaves it out.
    beta: int = 10
    #: Partitions of the part partitions, besides --partition.
    partitions: tuple[str, ...] = ("iid", "dirichlet(alpha=0.5)", "label_bias(q=0.8)")
    #: Attacks of the part others: any of the README's table.
    others: tuple[str, ...] = (
        'fang_krum(knowledge="colluding")',
        'fang_trimmed_mean(knowledge="colluding")',
        "sign_flip",
        "gaussian",
        "label_flip",
        "alie",
        "ipm",
        "min_max",
    )


PRESETS: dict[str, Config] = {
    "paper": Config(),
    "femnist": Config(
        preset="femnist",
        dataset="femnist",
        out=Path("runs/pdrr_femnist"),
        partition="by_client",
        model="leaf_cnn",
        batch_size=10,
        partitions=("iid", "dirichlet(alpha=0.5)"),
    ),
    "demo": Config(
        preset="demo",
        dataset="digits",
        out=Path("runs/pdrr_demo"),
        # Of small models, checkpoints take longer than rounds.
        segment=10,
        rounds=20,
        parts=("schemes", "knowledge"),
        clients=25,
        attackers=10,
        beta=5,
        counts=(5, 8, 12),
        root_size=200,
        model="digits_cnn",
        batch_size=5,
        schemes=("dagmm_detector", "vae_detector", "err", "lfr", "pdrr"),
        partitions=("iid",),
    ),
}


def parse(arguments: list[str]) -> Config:
    """The configuration of a command line: its preset, then its options."""
    usual = commandline.preset(arguments, PRESETS, Config.preset)
    return commandline.parse(arguments, usual, __doc__)


class Cell(NamedTuple):
    """What a system of this study varies; its name in the results follows from it.

    Attributes:
        part: to which it belongs.
        base: the rule; ``bulyan`` beside the three of the study.
        scheme: the detector before it, or none.
        attack: ``fang``, which is the one made for the base, another, or none.
        knowledge: what its attackers know, ``partial`` or ``full``; empty for others.
        attackers: among all clients.
        f: attackers in a cohort that the rule assumes.
        partition: how the data are divided.
    """

    part: str
    base: str
    scheme: str
    attack: str
    knowledge: str
    attackers: int
    f: int
    partition: str

    @property
    def name(self) -> str:
        attack = f"{self.attack} {self.knowledge}".strip()
        who = f"{attack} by {self.attackers}" if self.attackers else "no attack"
        return f"{self.base} (f={self.f}), {self.scheme}, {who}, {self.partition}"


def assumed(config: Config) -> int:
    """Attackers in a cohort that rules assume."""
    cohort = runner.cohort_size(config)
    return runner.assumed_byzantine(config.clients, cohort, config.attackers)


def bulyan_f(config: Config) -> int:
    """The most attackers that Bulyan can assume, up to those that rules assume."""
    return min(assumed(config), max((runner.cohort_size(config) - 3) // 4, 0))


def cells(config: Config) -> list[Cell]:
    """Every system of the study, each once."""
    c, f, home = config.attackers, assumed(config), config.partition
    found: list[Cell] = []

    def add(
        part: Part,
        base: str,
        scheme: str,
        attack: str,
        knowledge: str = "partial",
        attackers: int = c,
        assumed: int = f,
        partition: str = home,
    ) -> None:
        if part not in config.parts:
            return
        if attack == specs.NO_ATTACK:
            attackers, knowledge = 0, ""
        elif attack != FANG:
            knowledge = ""
        cell = Cell(
            part, base, scheme, attack, knowledge, attackers, assumed, partition
        )
        if cell.name not in {other.name for other in found}:
            found.append(cell)

    for base in BASES:
        add("schemes", base, NO_DEFENSE, specs.NO_ATTACK)
        add("schemes", base, NO_DEFENSE, FANG)
        for detector in config.schemes:
            add("schemes", base, detector, FANG)
        add("schemes", base, PDRR, specs.NO_ATTACK)
        add("knowledge", base, PDRR, FANG)
        add("knowledge", base, NO_DEFENSE, FANG, "full")
        add("knowledge", base, PDRR, FANG, "full")
    for attack in (specs.NO_ATTACK, FANG):
        add("schemes", "bulyan", NO_DEFENSE, attack, assumed=bulyan_f(config))
    for base in BASES:
        for count in config.counts:
            for scheme in TWO:
                add("counts", base, scheme, FANG, attackers=count)
    if config.beta:
        for scheme in TWO:
            add("counts", "trimmed_mean", scheme, FANG, assumed=config.beta)
    for attack in config.others:
        for base in BASES:
            for scheme in TWO:
                add("others", base, scheme, attack)
    for partition in config.partitions:
        for attack in (specs.NO_ATTACK, FANG):
            for base in BASES:
                for scheme in TWO:
                    add("partitions", base, scheme, attack, partition=partition)
    return found


def make_rule(config: Config, cell: Cell) -> Aggregator:
    """The rule of a cell, behind its detector."""
    if cell.scheme == NO_DEFENSE:
        rules = fs.aggregators.REGISTRY
        f = () if cell.base == "median" else (cell.f,)
        return rules[cell.base](*f)
    options = dict(OPTIONS.get(cell.scheme, {}))
    if cell.scheme == PDRR:
        options["q"] = getattr(config, f"q_{cell.base}")
    return fs.aggregators.REGISTRY[cell.scheme](cell.f, cell.base, **options)


def make_attack(config: Config, cell: Cell, num_classes: int) -> specs.Attack:
    """The attack of a cell."""
    if cell.attack != FANG:
        return specs.make_attack(cell.attack, num_classes)
    knowledge = KNOWLEDGE[cell.knowledge]
    full = cell.knowledge == "full"
    if cell.base in ("krum", "bulyan"):
        f = cell.f if full else None
        attack = fs.attacks.fang_krum(knowledge, f, config.stop)
    else:
        reach: dict[str, Any] = {"b": config.b, "space": "weights"} if full else {}
        attack = fs.attacks.fang_trimmed_mean(knowledge=knowledge, **reach)
    return specs.Attack(None, attack)


def check(config: Config) -> None:
    """Checks the options that need no data.

    Raises:
        ValueError: with the flag, what was expected and what came.
    """
    runner.check_common(config)
    for flag in ("parts", "schemes", "counts", "partitions", "others"):
        values = getattr(config, flag)
        if len(set(values)) < len(values):
            raise ValueError(f"--{flag} needs each value once; got {values}.")
        if not values and (flag == "parts" or flag in config.parts):
            raise ValueError(f"--{flag} needs one value or more; got none.")
    if "time" in config.parts and "schemes" not in config.parts:
        raise ValueError(
            f"--parts needs schemes where it has time; got {' '.join(config.parts)}."
        )
    for flag in ("sweep_rounds", "steps", "batch_size"):
        if getattr(config, flag) < 1:
            name = flag.replace("_", "-")
            raise ValueError(
                f"--{name} must be at least 1; got {getattr(config, flag)}."
            )
    counts = config.counts if "counts" in config.parts else ()
    for flag, count in (
        ("attackers", config.attackers),
        *(("counts", count) for count in counts),
    ):
        if not FEWEST <= count < config.clients:
            raise ValueError(
                f"--{flag} must be from {FEWEST}, without which attackers who know "
                f"their own models cannot attack Krum, to {config.clients - 1}, so "
                f"that one of {config.clients} clients is honest; got {count}."
            )
    if config.attackers in counts:
        raise ValueError(
            f"--counts needs other numbers than --attackers, {config.attackers}, which "
            f"the part schemes has; got {config.counts}."
        )
    if "counts" in config.parts and not 0 <= config.beta < max(assumed(config), 1):
        raise ValueError(
            f"--beta must be from 0 to {max(assumed(config), 1) - 1}, below the "
            f"attackers that rules assume ({assumed(config)}); got {config.beta}."
        )
    for base in BASES:
        flag = f"--q-{base.replace('_', '-')}"
        check_number(flag, getattr(config, f"q_{base}"), 0, 1, "[]")
    check_number("--stop", config.stop, low=0)
    check_number("--b", config.b, low=1)
    if "partitions" in config.parts and config.partition in config.partitions:
        raise ValueError(
            f"--partitions needs others than --partition; got {config.partitions}."
        )
    if config.root_size < config.batch_size and needing_root(config):
        raise ValueError(
            f"--root-size must be at least --batch-size ({config.batch_size}), for "
            f"{', '.join(needing_root(config))}; got {config.root_size}."
        )


def needing_root(config: Config) -> list[str]:
    """The schemes, and other attacks, that need samples of the server's own."""
    found: list[str] = []
    if "schemes" in config.parts:
        found += [scheme for scheme in config.schemes if scheme != PDRR]
    if "others" in config.parts:
        for attack in config.others:
            if specs.make_attack(attack, specs.ANY_CLASSES).needs_root:
                found.append(attack)
    return found


def make_phases(config: Config) -> tuple[list[runner.Phase], str]:
    """Loads the data and builds every system.

    Returns:
        The phases, one to a division of the data and a number of rounds, and where the
        data came from.

    Raises:
        ValueError: a bad setting.
    """
    check(config)
    # Names first: they cost nothing, loading the data may.
    make_model = lookup("model", config.model, fs.models.MODELS)
    todo = cells(config)
    partitions = {text: specs.make_partition(text) for text in _partitions(todo)}
    for cell in todo:
        make_rule(config, cell).validate(runner.cohort_size(config))
        attack = make_attack(config, cell, specs.ANY_CLASSES)
        if attack.strengths:
            raise ValueError(
                f"--others {cell.attack}: this study runs one strength. Give one value."
            )

    data = fs.data.load(config.dataset, config.data_dir)
    model = make_model(data.train.inputs.shape[1:], data.num_classes)
    update = fs.local_sgd(
        optax.sgd(config.lr), steps=config.steps, batch_size=config.batch_size
    )
    attacks: dict[tuple, specs.Attack] = {}
    phases: list[runner.Phase] = []
    for text, partition in partitions.items():
        clients, root = fs.data.federate(
            data,
            num_clients=config.clients,
            partition=partition,
            root_size=config.root_size if needing_root(config) else 0,
            seed=config.partition_seed,
        )
        shared: dict[str, Any] = {
            "model": fs.models.for_task(model, data.task),
            "clients": clients,
            "test": data.test,
            "root": root,
            "client_update": update,
            "cohort_size": runner.cohort_size(config),
            "client_chunk": config.client_chunk,
        }

        def simulation(cell: Cell, shared: dict[str, Any] = shared) -> fs.Simulation:
            # One object for each attack on data, so that systems share its program.
            kind: tuple = (cell.attack,)
            if cell.attack == FANG:
                kind += (cell.base, cell.knowledge, cell.f)
            if kind not in attacks:
                attacks[kind] = make_attack(config, cell, data.num_classes)
            attack = attacks[kind]
            return fs.Simulation(
                aggregator=make_rule(config, cell),
                attack=attack.on_updates,
                data_attack=attack.on_data,
                num_byzantine=cell.attackers,
                **shared,
            )

        for long in (True, False):
            systems = {
                cell.name: simulation(cell)
                for cell in todo
                if cell.partition == text
                and (cell.part in ("schemes", "knowledge")) == long
            }
            if systems:
                name = "main" if long else f"sweep{len(phases)}"
                rounds = config.rounds if long else config.sweep_rounds
                phases.append(runner.Phase(name, systems, rounds))
    return phases, data.source


def _partitions(todo: list[Cell]) -> list[str]:
    return list(dict.fromkeys(cell.partition for cell in todo))


def settings(config: Config) -> str:
    """The run in a sentence, for the terminal and the summary."""
    seeds = f"seed {config.seed}"
    if config.num_seeds > 1:
        seeds += f" and the {config.num_seeds - 1} after it"
    return (
        f"{config.dataset}, {config.model}, {config.clients} clients "
        f"({config.partition}), {runner.cohort_size(config)} a round, "
        f"{config.attackers} attackers (rules assume {assumed(config)} in a cohort); "
        f"{config.steps} local steps of {config.batch_size}, rate {config.lr:g}; "
        f"{config.root_size} samples of the server for those who need them; PDRR's q "
        f"{config.q_krum:g} for Krum, {config.q_trimmed_mean:g} for the trimmed mean, "
        f"{config.q_median:g} for the median; {seeds}."
    )


def run(config: Config, console: Console) -> runner.Result:
    """Checks everything, runs or resumes, and writes the results.

    Raises:
        ValueError: a bad option, before any training.
    """
    built: dict[str, fs.Simulation] = {}

    def phases(config: Config) -> tuple[list[runner.Phase], str]:
        made, source = make_phases(config)
        for phase in made:
            built.update(phase.systems)
        return made, source

    def write(config: Config, result: runner.Result, console: Console) -> None:
        by_name = {cell.name: cell for cell in cells(config)}
        schemes = {
            (cell.base, cell.scheme): built[name]
            for name, cell in by_name.items()
            if (cell.part, cell.attack) == ("schemes", FANG) and cell.base in BASES
        }
        timed = "time" in config.parts
        pdrr_report.write(
            config,
            result,
            console,
            cells=by_name,
            command=commandline.command(config, PRESETS[config.preset]),
            settings=settings(config),
            times=pdrr_time.measure(config, schemes, console) if timed else {},
        )

    return runner.run(config, console, phases, settings, write)


if __name__ == "__main__":
    runner.exit_on_interrupt()
    commandline.main(parse, run)
