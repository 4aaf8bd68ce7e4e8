"""FLTrust against the Dual-System under poisoning: the main comparison.

Four systems from the same start, on the same clients, attackers, cohorts and
minibatches, in one compiled program: FedAvg without an attack, FedAvg under attack,
FLTrust, and the Dual-System (FLTrust + Multi-Krum).

Presets:
  table   the seed study's section 4 (default): MNIST, FLTrust's CNN, 100 clients with
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
import math
import sys
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import optax
import tyro
from rich.console import Console

import fedjax_sim as fs
from experiments import results, runner
from fedjax_sim.registry import lookup
from fedjax_sim.types import Aggregator, DataAttack, UpdateAttack

CLEAN = "fedavg_clean"
# The option of each attack that --attack-strength sets.
STRENGTH = {
    "sign_flip": "scale",
    "gaussian": "std",
    "scaling": "factor",
    "ipm": "epsilon",
    "alie": "z",
    "label_flip": "fraction",
}
# Section 4 of the seed document (MNIST); "final" is its last column.
SEED_ROUNDS = (20, 40, 60, 80, 100)
SEED_TABLE = {
    "fedavg_clean": (0.6267, 0.8022, 0.8607, 0.8343, 0.8980, 0.89),
    "fedavg": (0.1945, 0.3078, 0.2882, 0.1135, 0.1010, 0.10),
    "fltrust": (0.2853, 0.5981, 0.5001, 0.7923, 0.7169, 0.71),
    "dual_system": (0.4468, 0.6424, 0.8284, 0.8433, 0.8958, 0.89),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """FLTrust against the Dual-System under poisoning.

    Runs FedAvg without an attack, FedAvg under attack, FLTrust and the Dual-System
    (FLTrust + Multi-Krum) from the same start, on the same clients, attackers, cohorts
    and minibatches, in one compiled program.
    """

    STUDY: ClassVar[str] = "fltrust_mnist"

    preset: Literal["table", "paper", "demo"] = "table"
    """Starting values of the other options. table: the seed study's section 4, MNIST,
    100 rounds, 10 of 100 clients a round. paper: its section 2, 1000 clean rounds, then
    200 attacked and 200 defended. demo: embedded digits, about a minute on 2 cores."""
    dataset: str = "mnist"
    """digits (embedded), mnist, fashion_mnist, or tfds:NAME."""
    data_dir: Path | None = None
    """Folder with idx/mnist/*.gz or tfds/mnist/...; downloads land there. Default:
    $FEDJAX_SIM_DATA, else a user cache folder."""
    out: Path = Path("runs/fltrust_mnist")
    """Folder for the results; refused if it holds any, unless --resume is given."""
    resume: bool = False
    """Continue the run in --out from its last checkpoint, or extend it to --rounds."""
    segment: int | None = None
    """Rounds between checkpoints. Default: about a twentieth of the run."""
    rounds: int = 100
    """Communication rounds (preset paper: of clean training)."""
    attack_rounds: int = 0
    """If above 0, train only FedAvg without attack for --rounds, then run the attacked
    and defended systems for this many rounds from its final state."""
    eval_every: int = 5
    """Evaluate on the test set after every this many rounds, and after the last."""
    seed: int = 0
    """Seed of everything but the partition."""
    num_seeds: int = 1
    """Run seeds seed, seed+1, ... side by side; they share the partition."""

    clients: int = 100
    """Number of clients."""
    cohort: int | Literal["all"] = 10
    """Clients sampled each round, or all."""
    partition: str = "shards"
    """iid, shards, dirichlet or label_bias."""
    shards_per_client: int = 2
    """shards: label-sorted shards per client."""
    alpha: float = 0.5
    """dirichlet: concentration; smaller is more heterogeneous."""
    bias: float = 0.5
    """label_bias: probability q that a sample goes to the group of its label."""
    partition_seed: int = 0
    """Seed of the partition and of the root dataset."""
    root_size: int = 100
    """Clean samples of the server, disjoint from every client and from the test set."""
    root_bias: float | None = None
    """Share of class 1 in the root dataset (FLTrust's bias); default: none."""
    root_steps: int | None = None
    """Local steps of the root update. Default: as many as a client takes."""

    model: str = "cnn"
    """cnn (FLTrust's), digits_cnn or mlp."""
    epochs: int = 5
    """Local epochs."""
    batch_size: int = 10
    """Local batch size."""
    lr: float = 0.01
    """Local learning rate (plain SGD)."""
    client_chunk: int | None = None
    """At most this many clients side by side; default: by backend and model size."""

    attack: str = "sign_flip"
    """sign_flip, gaussian, scaling, ipm, alie or label_flip."""
    attack_strength: float | None = None
    """sign_flip: scale; gaussian: std; scaling: factor; ipm: epsilon; alie: z;
    label_flip: fraction of samples. Default: the attack's own default."""
    attackers: float = 0.2
    """Fraction of all clients that are Byzantine, in [0, 1)."""
    aggregators: tuple[str, ...] = ("fedavg", "fltrust", "dual_system")
    """Systems under attack, besides FedAvg without attack. A Dual-System variant is
    written dual_system:VARIANT, for example dual_system:gated_mean."""
    max_byzantine: int | None = None
    """Byzantine clients per cohort that the rules assume. Default: the true number if
    all train; for a sample its mean plus one standard deviation, within what Krum
    allows."""


PRESETS: dict[str, Config] = {
    "table": Config(),
    "paper": Config(preset="paper", rounds=1000, attack_rounds=200, eval_every=10),
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
    preset: str = Config.preset
    for i, word in enumerate(arguments):
        if word == "--preset" and i + 1 < len(arguments):
            preset = arguments[i + 1]
        elif word.startswith("--preset="):
            preset = word.split("=", 1)[1]
    return tyro.cli(
        Config,
        args=arguments,
        default=lookup("preset", preset, PRESETS),
        description=__doc__,
        prog="python -m experiments.fltrust_mnist",
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def num_attackers(config: Config) -> int:
    return round(config.attackers * config.clients)


def cohort_size(config: Config) -> int:
    return config.clients if config.cohort == "all" else config.cohort


def assumed_byzantine(config: Config) -> int:
    """The f of the rules: see ``Config.max_byzantine``."""
    if config.max_byzantine is not None:
        return config.max_byzantine
    n, k, f = config.clients, cohort_size(config), num_attackers(config)
    largest = max((k - 3) // 2, 0)
    if k == n:
        return min(f, largest)
    # Standard deviation of the hypergeometric count of attackers in a cohort.
    spread = math.sqrt(k * f / n * (1 - f / n) * (n - k) / max(n - 1, 1))
    return min(math.ceil(k * f / n + spread), largest)


def make_aggregator(name: str, max_byzantine: int) -> Aggregator:
    """The rule ``name``, or ``dual_system:VARIANT``, with this assumed f."""
    base, _, variant = name.partition(":")
    factory = lookup("aggregator", base, fs.aggregators.REGISTRY)
    if variant and base != "dual_system":
        raise ValueError(f"only dual_system has variants; got aggregator {name!r}.")
    options: dict[str, Any] = {"variant": variant} if variant else {}
    if "max_byzantine" in inspect.signature(factory).parameters:
        options["max_byzantine"] = max_byzantine
    return factory(**options)


def make_attack(config: Config, num_classes: int) -> UpdateAttack | DataAttack:
    table = fs.attacks.UPDATE_ATTACKS | fs.attacks.DATA_ATTACKS
    factory = lookup("attack", config.attack, table)
    options: dict[str, Any] = {}
    if config.attack in fs.attacks.DATA_ATTACKS:
        options["num_classes"] = num_classes
    if config.attack_strength is not None:
        options[STRENGTH[config.attack]] = config.attack_strength
    return factory(**options)


def make_partition(config: Config) -> fs.data.Partition:
    factory = lookup("partition", config.partition, fs.data.PARTITIONS)
    options: dict[str, dict[str, Any]] = {
        "shards": {"per_client": config.shards_per_client},
        "dirichlet": {"alpha": config.alpha, "min_size": config.batch_size},
        "label_bias": {"q": config.bias},
    }
    return factory(**options.get(config.partition, {}))


def make_phases(config: Config) -> tuple[list[runner.Phase], str]:
    """Loads the data and builds every system.

    Returns:
        The phases, and where the data came from.

    Raises:
        ValueError: a bad setting.
    """
    runner.check_common(config)
    if not 0 <= config.attackers < 1:
        raise ValueError(f"--attackers must be in [0, 1); got {config.attackers}.")
    if not (np.isfinite(config.lr) and config.lr > 0):
        raise ValueError(f"--lr must be a positive number; got {config.lr}.")
    if config.attack_rounds < 0:
        raise ValueError(f"--attack-rounds must be >= 0; got {config.attack_rounds}.")
    if len(set(config.aggregators)) < len(config.aggregators):
        raise ValueError(f"--aggregators repeats a name: {config.aggregators}.")
    if not 1 <= cohort_size(config) <= config.clients:
        raise ValueError(
            f"--cohort must be from 1 to --clients ({config.clients}) or all; got "
            f"{config.cohort}."
        )
    # Names first: they cost nothing, loading the data may.
    partition = make_partition(config)
    attacks = fs.attacks.UPDATE_ATTACKS | fs.attacks.DATA_ATTACKS
    lookup("attack", config.attack, attacks)
    make_model = lookup("model", config.model, fs.models.MODELS)
    f = assumed_byzantine(config)
    rules = {name: make_aggregator(name, f) for name in config.aggregators}
    for rule in rules.values():
        rule.validate(cohort_size(config))

    data = fs.data.load(config.dataset, config.data_dir)
    clients, root = fs.data.federate(
        data,
        num_clients=config.clients,
        partition=partition,
        root_size=config.root_size,
        root_bias=config.root_bias,
        seed=config.partition_seed,
    )
    shared: dict[str, Any] = {
        "model": make_model(data.train.inputs.shape[1:], data.num_classes),
        "clients": clients,
        "test": data.test,
        "client_update": fs.local_sgd(
            optax.sgd(config.lr), epochs=config.epochs, batch_size=config.batch_size
        ),
        "root": root,
        "root_steps": config.root_steps,
        "cohort_size": cohort_size(config),
        "client_chunk": config.client_chunk,
    }
    attack = make_attack(config, data.num_classes)
    field = "data_attack" if isinstance(attack, DataAttack) else "attack"
    attacked: dict[str, Any] = {field: attack, "num_byzantine": num_attackers(config)}
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


def report(config: Config, result: runner.Result, console: Console) -> None:
    """The table, the plots, summary.json and summary.md."""
    histories = result.histories
    start = config.rounds if config.attack_rounds else 0
    at = tuple(start + r for r in SEED_ROUNDS)
    header, rows = fs.report.table(histories, rounds=at)
    reference = config.dataset == "mnist" and start == 0
    if reference:
        rows = [
            row
            for own in rows
            for row in (own, _seed_row(own[0], len(header)))
            if row is not None
        ]
    console.print(fs.report.rich_table(header, rows, title="Test accuracy"))
    fs.report.accuracy_plot(histories, config.out / "accuracy.png")
    detection = _detection_rows(histories)
    detecting = {n: h for n, h in histories.items() if np.sum(h.num_flagged) > 0}
    if detecting:
        fs.report.detection_plot(histories, config.out / "detection.png")
        console.print(fs.report.rich_table(*detection, title="Detection, whole run"))
    results.write_summary(
        config,
        histories,
        result.compile_seconds,
        result.run_seconds,
        {"max_byzantine": assumed_byzantine(config)},
    )
    command = " ".join(["python -m experiments.fltrust_mnist", *sys.argv[1:]])
    notes = [
        f"# FLTrust against the Dual-System: {config.dataset}, {config.attack}",
        f"`{command}`",
        f"{num_attackers(config)} of {config.clients} clients Byzantine, "
        f"{cohort_size(config)} a round, f = {assumed_byzantine(config)} assumed; seed "
        f"{config.seed}"
        + (f" and {config.num_seeds - 1} more" * (config.num_seeds > 1))
        + f". {result.compile_seconds:.0f} s compiling, {result.run_seconds:.0f} s "
        "running in this process.",
        "; ".join(f"{k} {v}" for k, v in results.versions().items()),
        "## Test accuracy",
        fs.report.markdown_table(header, rows),
        *(
            [
                "The rows below a system are the seed document's own figures, from an "
                "implementation and an attack that it does not specify."
            ]
            if reference
            else []
        ),
        "## Detection",
        "Rejected share of the Byzantine clients (TPR) and of the honest ones (FPR, "
        "false alarms), mean over rounds; FNR, missing alarms, is 1 - TPR. Updates "
        "with a NaN or infinity count as rejected: every rule leaves them out, and a "
        "model that has diverged yields nothing else.",
        fs.report.markdown_table(*detection),
        "![accuracy](accuracy.png)",
        *(["![detection](detection.png)"] if detecting else []),
    ]
    results.write_atomically(config.out / "summary.md", "\n\n".join(notes) + "\n")
    console.print(f"results in {config.out}")


def _seed_row(system: str, width: int) -> tuple[str, ...] | None:
    if system not in SEED_TABLE:
        return None
    values = tuple(f"{v:.4f}" for v in SEED_TABLE[system])
    return ("↳ seed document", *values, *[""] * (width - len(values) - 1))


def _detection_rows(
    histories: dict[str, fs.History],
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    rows = []
    for name, history in histories.items():
        rates = [
            f"{np.nanmean(r):.3f}" if np.isfinite(r).any() else "-"
            for r in (history.tpr, history.fpr, history.fnr)
        ]
        nonfinite = int(np.sum(history.num_nonfinite))
        stuck = int(np.sum(history.no_aggregate))
        rows.append((name, *rates, str(nonfinite), str(stuck)))
    header = (
        "system",
        "TPR",
        "FPR",
        "FNR",
        "non-finite updates",
        "rounds without update",
    )
    return header, rows


def run(config: Config, console: Console) -> runner.Result:
    """Checks everything, runs or resumes, and writes the results.

    Raises:
        ValueError: a bad option, before any training.
    """
    runner.check_out(config)
    runner.enable_compilation_cache()
    phases, source = make_phases(config)
    runner.open_out(config, source)
    result = runner.run_study(config, phases, console)
    report(config, result, console)
    return result


def main() -> None:
    config = parse(sys.argv[1:])
    try:
        run(config, Console(highlight=False))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
