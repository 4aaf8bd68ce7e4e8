"""FLTrust against the Dual-System under poisoning: the main comparison.

Four systems from the same start, on the same clients, attackers, cohorts and
minibatches, in one compiled program: FedAvg without an attack, FedAvg under attack,
FLTrust, and the Dual-System (FLTrust + Multi-Krum).

Presets:
  table   the source study's section 4 (default): MNIST, FLTrust's CNN, 100 clients with
          two label shards each, 10 of them a round, 5 local epochs, batch 10, rate
          0.01, 100 rounds of every system.
  paper   its section 2: 1000 clean rounds, then 200 under attack and 200 defended, all
          forked from the same clean state. --cohort all trains all 100 clients a round.
  demo    scikit-learn's embedded 8x8 digits, 100 clients all training, 100 rounds:
          about a minute on two cores.

Example:
  python -m experiments.fltrust_mnist --preset table --data-dir DIR --out runs/table
"""

import dataclasses
import inspect
from pathlib import Path
from typing import Any, ClassVar, Literal

import optax
from rich.console import Console

import fedjax_sim as fs
from experiments import commandline, fltrust_report, results, runner, specs
from fedjax_sim.registry import lookup

CLEAN = "fedavg_clean"
# Options that belong to one partition.
ONLY_WITH = {"shards_per_client": "shards", "alpha": "dirichlet", "bias": "label_bias"}
# The option of each attack that --attack-strength sets.
STRENGTH = {
    "sign_flip": "scale",
    "gaussian": "std",
    "scaling": "factor",
    "ipm": "epsilon",
    "alie": "z",
    "label_flip": "fraction",
}


@dataclasses.dataclass(frozen=True)
class Config:
    """FLTrust against the Dual-System under poisoning.

    Runs FedAvg without an attack, FedAvg under attack, FLTrust and the Dual-System
    (FLTrust + Multi-Krum) from the same start, on the same clients, attackers, cohorts
    and minibatches, in one compiled program.
    """

    STUDY: ClassVar[str] = "fltrust_mnist"

    #: Starting values of the other options. table: the source study's section 4,
    #: MNIST, 100 rounds, 10 of 100 clients a round. paper: its section 2, 1000 clean
    #: rounds, then 200 attacked and 200 defended. demo: embedded digits, about a minute
    #: on 2 cores.
    preset: Literal["table", "paper", "demo"] = "table"
    #: digits or breast_cancer (embedded), mnist, fashion_mnist, a set of MedMNIST such
    #: as pneumoniamnist, or tfds:NAME.
    dataset: str = "mnist"
    #: Folder with idx/mnist/*.gz, tfds/mnist/... or medmnist/*.npz; downloads land
    #: there.
    #: Default: $FEDJAX_SIM_DATA, else a user cache folder.
    data_dir: Path | None = None
    #: Folder for the results; refused if it holds any, unless --resume is given.
    out: Path = Path("runs/fltrust_mnist")
    #: Continue the run in --out from its last checkpoint, extend it to --rounds, or
    #: start it where there is none.
    resume: bool = False
    #: Rounds between checkpoints. Default: about a twentieth of the run.
    segment: int | None = None
    #: Communication rounds (preset paper: of clean training).
    rounds: int = 100
    #: If above 0, train only FedAvg without attack for --rounds, then run the attacked
    #: and defended systems for this many rounds from its final state.
    attack_rounds: int = 0
    #: Evaluate on the test set after every this many rounds, and after the last.
    eval_every: int = 5
    #: Seed of everything but the partition.
    seed: int = 0
    #: Run seeds seed, seed+1, ... side by side; they share the partition.
    num_seeds: int = 1

    #: Number of clients.
    clients: int = 100
    #: Clients sampled each round, or all.
    cohort: int | Literal["all"] = 10
    #: iid, shards, dirichlet or label_bias.
    partition: str = "shards"
    #: shards: label-sorted shards per client.
    shards_per_client: int = 2
    #: dirichlet: concentration; smaller is more heterogeneous.
    alpha: float = 0.5
    #: label_bias: probability q that a sample goes to the group of its label.
    bias: float = 0.5
    #: Seed of the partition and of the root dataset.
    partition_seed: int = 0
    #: Clean samples of the server, disjoint from every client and from the test set.
    root_size: int = 100
    #: Share of class 1 in the root dataset (FLTrust's bias); default: none.
    root_bias: float | None = None
    #: Local steps of the root update. Default: as many as a client takes.
    root_steps: int | None = None

    #: cnn (FLTrust's), digits_cnn or mlp.
    model: str = "cnn"
    #: Local epochs.
    epochs: int = 5
    #: Local batch size.
    batch_size: int = 10
    #: Local learning rate (plain SGD).
    lr: float = 0.01
    #: At most this many clients side by side; default: by backend and model size.
    client_chunk: int | None = None
    #: Cores of the CPU, each of which trains its own clients. Default:
    #: $JAX_NUM_CPU_DEVICES, else all that this process may use, at most 8.
    cores: int | None = None
    #: Bytes of the cohort's updates that a device may hold; more are seen in passes, by
    #: rules that have such a form (docs/scale.md). Default: all of them.
    update_memory: int | None = None
    #: This process is one of several that run the study together, each with its own
    #: clients: auto under SLURM, Open MPI or Kubernetes, else HOST:PORT,PROCESSES,ID.
    #: experiments.launch starts them.
    distributed: str | None = None

    #: Any attack of the README's table, with options and joined by + as attack_matrix
    #: has them: alie, 'badnets(target=0)+model_replacement', 'mimic(warmup=5)'.
    attack: str = "sign_flip"
    #: sign_flip: scale; gaussian: std; scaling: factor; ipm: epsilon; alie: z;
    #: label_flip: fraction of samples. For others, write it as an option of --attack.
    #: Default: the preset's (sign_flip 5; demo 3); with --attack, the attack's own.
    attack_strength: float | None = None
    #: First round of the attack, from 0; rounds of clean training count.
    attack_start: int = 0
    #: Round from which the attack is over. Default: never.
    attack_stop: int | None = None
    #: Rounds from one strike of the attack to the next.
    attack_every: int = 1
    #: Fraction of all clients that are Byzantine, in [0, 1).
    attackers: float = 0.2
    #: Systems under attack, besides FedAvg without attack: any aggregator of the
    #: README's table, with options and steps before it as attack_matrix has them:
    #: krum, 'trimmed_mean(trim=0.1)', nnm+median. A variant is written
    #: dual_system:VARIANT, with filter_then_trust, trust_then_filter, soft,
    #: intersection, dynamic_trust or gated_mean.
    aggregators: tuple[str, ...] = ("fedavg", "fltrust", "dual_system")
    #: Byzantine clients per cohort that the rules assume. Default: the true number if
    #: all train; for a sample its mean plus one standard deviation, within what Krum
    #: allows.
    max_byzantine: int | None = None


PRESETS: dict[str, Config] = {
    "table": Config(attack_strength=5.0),
    "paper": Config(
        preset="paper",
        attack_strength=5.0,
        rounds=1000,
        attack_rounds=200,
        eval_every=10,
    ),
    "demo": Config(
        preset="demo",
        dataset="digits",
        out=Path("runs/demo"),
        cohort="all",
        partition="iid",
        model="digits_cnn",
        lr=0.1,
        attackers=0.3,
        attack_strength=3.0,
    ),
}


def parse(arguments: list[str]) -> Config:
    """The configuration of a command line: its preset, then its options."""
    default = commandline.preset(arguments, PRESETS, Config.preset)
    if any(word == "--attack" or word.startswith("--attack=") for word in arguments):
        # A preset's strength is meant for the preset's attack.
        default = dataclasses.replace(default, attack_strength=None)
    return commandline.parse(arguments, default, __doc__)


def command(config: Config) -> str:
    """The command line that starts this run: its preset and what differs from it."""
    usual = PRESETS[config.preset]
    if config.attack != usual.attack:
        usual = dataclasses.replace(usual, attack_strength=None)  # as parse has it
    return commandline.command(config, usual)


def assumed_byzantine(config: Config) -> int:
    """The f of the rules: see ``Config.max_byzantine``."""
    if config.max_byzantine is not None:
        return config.max_byzantine
    return runner.assumed_byzantine(
        config.clients, runner.cohort_size(config), runner.num_attackers(config)
    )


def make_attack(config: Config, num_classes: int) -> specs.Attack:
    """The attack of the options, in the rounds and of the strength they say."""
    text = config.attack
    if config.attack_strength is not None:
        text += f"({STRENGTH[config.attack]}={config.attack_strength!r})"
    attack = specs.make_attack(text, num_classes)
    if attack.strengths:
        raise ValueError(
            f"--attack {config.attack}: one strength at a time; for several side by "
            "side use experiments.attack_matrix."
        )
    return specs.schedule(
        attack, config.attack_start, config.attack_stop, config.attack_every
    )


def _always(config: Config) -> bool:
    """Whether the attack is active in every round."""
    return {o: getattr(config, o) for o in results.WHEN} == results.WHEN


def make_partition(config: Config) -> fs.data.Partition:
    factory = lookup("partition", config.partition, fs.data.PARTITIONS)
    options: dict[str, dict[str, Any]] = {
        "shards": {"per_client": config.shards_per_client},
        "dirichlet": {"alpha": config.alpha, "min_size": config.batch_size},
        "label_bias": {"q": config.bias},
    }
    return factory(**options.get(config.partition, {}))


def check(config: Config) -> None:
    """Checks the options that need no data.

    Raises:
        ValueError: with the flag, what was expected and what came.
    """
    runner.check_common(config)
    runner.check_schedule(config)
    runner.num_attackers(config)
    if config.attack_rounds < 0:
        raise ValueError(f"--attack-rounds must be >= 0; got {config.attack_rounds}.")
    first = config.rounds if config.attack_rounds else 0
    runner.check_attack_is_active(config, first, config.rounds + config.attack_rounds)
    if not config.aggregators:
        raise ValueError("--aggregators needs at least one name.")
    if len(set(config.aggregators)) < len(config.aggregators):
        raise ValueError(f"--aggregators repeats a name: {config.aggregators}.")
    default = inspect.signature(fs.aggregators.dual_system).parameters["variant"]
    if {"dual_system", f"dual_system:{default.default}"} <= set(config.aggregators):
        raise ValueError(
            f"--aggregators names one rule twice: dual_system is "
            f"dual_system:{default.default}. Drop one."
        )
    if config.attack_strength is not None and config.attack not in STRENGTH:
        specs.make_attack(config.attack, specs.ANY_CLASSES)  # a wrong name comes first
        raise ValueError(
            f"--attack-strength goes with {', '.join(STRENGTH)}; for another attack "
            f"write an option, as in 'additive_noise(std=0.5)'; got --attack "
            f"{config.attack}."
        )
    if config.attack == specs.NO_ATTACK:
        raise ValueError(
            "--attack none: every study has FedAvg without an attack beside the "
            "attacked systems. Name an attack."
        )
    if config.attack == "scaling" and config.attack_strength is None:
        raise ValueError("--attack scaling needs --attack-strength, its factor.")
    preset = PRESETS[config.preset]
    for option, partition in ONLY_WITH.items():
        if getattr(config, option) != getattr(preset, option) and (
            config.partition != partition
        ):
            raise ValueError(
                f"--{option.replace('_', '-')} has no effect with --partition "
                f"{config.partition}. Drop it, or use --partition {partition}."
            )
    if config.root_size == 0 and config.root_bias is not None:
        raise ValueError("--root-bias has no effect with --root-size 0. Drop one.")


def make_phases(config: Config) -> tuple[list[runner.Phase], str]:
    """Loads the data and builds every system.

    Returns:
        The phases, and where the data came from.

    Raises:
        ValueError: a bad setting.
    """
    check(config)
    # Names first: they cost nothing, loading the data may.
    partition = make_partition(config)
    attack = make_attack(config, specs.ANY_CLASSES)
    make_model = lookup("model", config.model, fs.models.MODELS)
    f = assumed_byzantine(config)
    rules = {name: specs.make_aggregator(name, f) for name in config.aggregators}
    for rule in rules.values():
        rule.validate(runner.cohort_size(config))
    needs_root = attack.needs_root or any(rule.needs_root for rule in rules.values())
    if needs_root and config.root_size < config.batch_size:
        raise ValueError(
            f"--root-size must be at least --batch-size ({config.batch_size}) for "
            f"{', '.join(config.aggregators)}; got {config.root_size}."
        )

    data = fs.data.load(config.dataset, config.data_dir)
    clients, root = fs.data.federate(
        data,
        num_clients=config.clients,
        partition=partition,
        root_size=config.root_size,
        root_bias=config.root_bias,
        seed=config.partition_seed,
    )
    everybody: fs.types.Clients | fs.hosts.HostClients = clients
    if config.distributed is not None:
        own = fs.hosts.own_clients(config.clients)
        everybody = fs.hosts.share(fs.hosts.cut(clients, own))
    shared: dict[str, Any] = {
        "model": make_model(data.train.inputs.shape[1:], data.num_classes),
        "clients": everybody,
        "test": data.test,
        "client_update": fs.local_sgd(
            optax.sgd(config.lr), epochs=config.epochs, batch_size=config.batch_size
        ),
        "root": root if needs_root else None,
        "root_steps": config.root_steps,
        "cohort_size": runner.cohort_size(config),
        "client_chunk": config.client_chunk,
        "update_memory": config.update_memory,
    }
    attack = make_attack(config, data.num_classes)
    attacked: dict[str, Any] = {
        "attack": attack.on_updates,
        "data_attack": attack.on_data,
        "num_byzantine": runner.num_attackers(config),
    }
    clean = fs.Simulation(aggregator=fs.aggregators.fedavg(), **shared)
    systems = {
        name: fs.Simulation(aggregator=rule, **attacked, **shared)
        for name, rule in rules.items()
    }
    if config.attack_rounds == 0:
        whole = runner.Phase("all", {CLEAN: clean, **systems}, config.rounds)
        return [whole], data.source
    fork = runner.Phase(
        f"attacked-from-{config.rounds}", systems, config.attack_rounds, CLEAN
    )
    return [runner.Phase("clean", {CLEAN: clean}, config.rounds), fork], data.source


def settings(config: Config) -> str:
    """The run in a sentence, for the terminal and the summary."""
    strength = "" if config.attack_strength is None else f" {config.attack_strength:g}"
    when = ""
    if not _always(config):
        stop = "" if config.attack_stop is None else f" to {config.attack_stop - 1}"
        when = f", every {config.attack_every} rounds from {config.attack_start}{stop}"
    partition = config.partition
    if partition in ONLY_WITH.values():
        option = next(o for o, p in ONLY_WITH.items() if p == partition)
        partition += f"({getattr(config, option):g})"
    root = f"{config.root_size}"
    if config.root_bias is not None:
        root += f" ({results.percent(config.root_bias)} of them of class 1)"
    return (
        f"{config.dataset}, {config.model}, {config.clients} clients ({partition}), "
        f"{runner.cohort_size(config)} sampled per round; "
        f"{runner.num_attackers(config)} of all clients are Byzantine "
        f"({config.attack}{strength}{when}), rules assume "
        f"{assumed_byzantine(config)} per cohort; {config.epochs} local epochs, batch "
        f"{config.batch_size}, rate {config.lr:g}, root dataset of {root}, "
        f"seed {config.seed}"
        + (
            f" and the {config.num_seeds - 1} after it."
            if config.num_seeds > 1
            else "."
        )
    )


def run(config: Config, console: Console) -> runner.Result:
    """Checks everything, runs or resumes, and writes the results.

    Raises:
        ValueError: a bad option, before any training.
    """
    return runner.run(config, console, make_phases, settings, _write)


def _write(config: Config, result: runner.Result, console: Console) -> None:
    fltrust_report.write(
        config,
        result,
        console,
        command=command(config),
        settings=settings(config),
        comparable=_matches_source(config),
    )


def _matches_source(config: Config) -> bool:
    """Whether the run has the source study's data, model, clients and training."""
    table = PRESETS["table"]
    fields = ("dataset", "model", "clients", "cohort", "partition", "epochs", "lr")
    same = all(getattr(config, f) == getattr(table, f) for f in fields)
    return same and config.attack_rounds == 0


if __name__ == "__main__":
    runner.exit_on_interrupt()
    commandline.main(parse, run)
