"""FedSecure on vital signs: devices that screen their own series stay out if poisoned.

Each device holds one patient's heart rate and respiration rate, a sample a minute, and
trains a small BiLSTM to tell the state of the heart rate (low, usual or high for that
device) in the next minute. One device's series is poisoned. With FedSecure every
device rebuilds its windows by a reference model, a classifier scores the errors, and a
device with too many scores above its own threshold stays out. The study has two parts:
  same   the reference model is trained, and thresholds are set, on the series that the
         devices then train on, before it is poisoned: the paper's six runs.
  later  on an earlier stretch, as it would be in use; --history 0 leaves it out.

The first part also holds FedSecure against rules of the server; in both FedSecure also
comes before one.

Presets:
  paper      two long MIMIC records cut into five devices (default): some ten minutes.
  generated  five generated patients of a week each, the size of the paper's data.
  many       heart rate of some 350 MIMIC patients, a fifth of them poisoned.
  demo       generated vital signs, no files needed: under three minutes on two cores.

Example:
  python -m experiments.fedsecure_vitals --data-dir DIR --out runs/fedsecure
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import optax
from rich.console import Console

import fedjax_sim as fs
from experiments import (
    commandline,
    fedsecure_detector,
    fedsecure_report,
    results,
    rundir,
    runner,
    specs,
)
from experiments.fedsecure_detector import Trained
from fedjax_sim.client_defenses.reference_model import num_held_out
from fedjax_sim.data.series import STATES, SeriesFederation
from fedjax_sim.registry import check_number
from fedjax_sim.types import MakeSamples

SAME, LATER = "same", "later"
FEDSECURE = "fedsecure"
PAPER_ATTACKS = tuple(fedsecure_report.PAPER_RUNS)


@dataclasses.dataclass(frozen=True)
class Config:
    """FedSecure on vital signs: poisoned devices screen themselves out."""

    STUDY: ClassVar[str] = "fedsecure_vitals"

    #: Starting values of the other options. paper: MIMIC, five devices. generated: five
    #: weeks. many: some 350 MIMIC patients. demo: embedded generator.
    preset: Literal["paper", "generated", "many", "demo"] = "paper"
    #: Where the series come from: mimic_numerics, mimic_pap, bidmc, generated, or a
    #: table: "csv(path='vitals.csv', patient='subject', heart_rate='HR')". Options as
    #: in fedjax_sim.data.load_vitals.
    source: str = (
        'mimic_numerics(records=["s00001/s00001-2896-10-10-00-31n", '
        '"p000020/p000020-2183-04-28-17-47n"])'
    )
    #: Measured channels; states are those of the first.
    channels: tuple[str, ...] = ("heart_rate", "respiration_rate")
    #: Folder with vitals/; downloads land there. Default: $FEDJAX_SIM_DATA, else a user
    #: cache folder.
    data_dir: Path | None = None
    #: Folder for the results; refused if it holds any, unless --resume is given.
    out: Path = Path("runs/fedsecure")
    #: Continue the run in --out from its last checkpoint, extend it, or start it.
    resume: bool = False
    #: Rounds between checkpoints. Default: about a twentieth of each part.
    segment: int | None = None
    #: Communication rounds.
    rounds: int = 30
    #: Evaluate after every this many rounds, and after the last.
    eval_every: int = 1
    #: Seed of everything.
    seed: int = 0
    #: Run seeds seed, seed+1, ... side by side; they share devices and detector.
    num_seeds: int = 1

    #: Number of devices: the longest records are cut into pieces disjoint in time until
    #: there are so many. None: one for each record.
    devices: int | None = 5
    #: Leave out records that cannot be used (flat, or without a whole window), and say
    #: so, instead of stopping.
    skip_unusable: bool = False
    #: Steps of a window.
    window: int = 60
    #: Share of a device's time to train on; it is tested on the rest.
    train: float = 0.7
    #: Of the part later: share of the training time for the detector; devices train on
    #: the rest of it. 0 leaves the part out. A record that one part cannot use is left
    #: out of both.
    history: float = 0.5
    #: Samples of a gap that is filled in by a straight line.
    max_gap: int = 5
    #: Hour, day and weekday as columns beside the channels, or without them.
    calendar: bool = True
    #: Clean windows of the server, for rules that need a root dataset; out of those
    #: that the detector is trained on.
    root_size: int = 100

    #: Units of each direction of the devices' BiLSTM.
    hidden: int = 16
    #: Local epochs.
    epochs: int = 1
    #: Local batch size.
    batch_size: int = 32
    #: Local learning rate (Adam).
    lr: float = 0.003
    #: At most this many devices side by side; default: by backend and model size.
    client_chunk: int | None = None
    #: Cores of the CPU, each of which trains its own devices. Default:
    #: $JAX_NUM_CPU_DEVICES, else all that this process may use, at most 8.
    cores: int | None = None

    #: Units of each direction of the reference model.
    detector_hidden: int = 64
    #: Its epochs.
    detector_epochs: int = 31
    #: Share of its windows above which a device stays out.
    max_flagged: float = 0.1

    #: Numbers of the poisoned devices, from 1, in the order of the records that are
    #: used. The flag without a number: --attackers of them are drawn.
    poisoned: tuple[int, ...] = (2,)
    #: Where --poisoned is empty: share of the devices that are poisoned, in (0, 1).
    attackers: float = 0.2
    #: Attacks, the paper's runs 2 to 5 first; module.function for one of your own, with
    #: num_channels= and relabel=. With target= a backdoor, whose success is
    #: measured: windows that end in the pattern are labelled as that state (0 low, 1
    #: usual, 2 high).
    attacks: tuple[str, ...] = (
        *PAPER_ATTACKS,
        "repeated_pattern(target=0, period=30)",
    )
    #: Defenses besides none (fedavg): fedsecure, any aggregator of the README's table,
    #: or both, as fedsecure+dual_system.
    defenses: tuple[str, ...] = (
        "fedsecure",
        "fedsecure(max_flagged=0)",
        "multi_krum",
        "fltrust",
        "dual_system",
        "fedsecure+dual_system",
    )
    #: Defenses of the part later, out of --defenses.
    later_defenses: tuple[str, ...] = ("fedsecure", "fedsecure+dual_system")


PRESETS: dict[str, Config] = {
    "paper": Config(),
    "generated": Config(
        preset="generated",
        source="generated(patients=5, minutes=10080)",
        out=Path("runs/fedsecure_generated"),
        defenses=("fedsecure",),
        later_defenses=("fedsecure",),
        attacks=PAPER_ATTACKS,
    ),
    "many": Config(
        preset="many",
        source="mimic_pap",
        channels=("heart_rate",),
        out=Path("runs/fedsecure_many"),
        devices=None,
        skip_unusable=True,
        window=10,
        batch_size=8,
        poisoned=(),
    ),
    "demo": Config(
        preset="demo",
        source="generated(patients=5, minutes=600)",
        out=Path("runs/fedsecure_demo"),
        rounds=12,
        eval_every=2,
        window=20,
        root_size=50,
        detector_hidden=16,
        detector_epochs=20,
        defenses=("fedsecure",),
        later_defenses=("fedsecure",),
        attacks=PAPER_ATTACKS,
    ),
}


def parse(arguments: list[str]) -> Config:
    """The configuration of a command line: its preset, then its options."""
    usual = commandline.preset(arguments, PRESETS, Config.preset)
    return commandline.parse(arguments, usual, __doc__)


class Cell(NamedTuple):
    """What a system of this study varies; its name in the results follows from it."""

    part: str
    attack: str
    defense: str

    @property
    def name(self) -> str:
        return f"{self.part} {self.attack} {self.defense}"


def parts(config: Config) -> list[str]:
    """The parts of the study."""
    return [SAME, LATER] if config.history else [SAME]


def cells(config: Config) -> list[Cell]:
    """Every system of the study, each once."""
    defenses = {SAME: config.defenses, LATER: config.later_defenses}
    return [
        Cell(part, attack, defense)
        for part in parts(config)
        for attack in (specs.NO_ATTACK, *config.attacks)
        for defense in dict.fromkeys(("fedavg", *defenses[part]))
    ]


def check(config: Config) -> None:
    """Checks the options that need no data.

    Raises:
        ValueError: with the flag, what was expected and what came.
    """
    counts = {"rounds": 10**7, "eval_every": 10**7, "num_seeds": 10**4, "window": 10**5}
    counts |= {"epochs": 10**6, "batch_size": 10**6, "hidden": 4096}
    counts |= {"detector_hidden": 4096, "detector_epochs": 10**6, "segment": 10**7}
    counts |= {"devices": 10**6, "client_chunk": 2**31 - 1}
    for name, most in counts.items():
        value = getattr(config, name)
        if value is not None and not 1 <= value <= most:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} must be from 1 to {most}; got {value}.")
    most = 2**32 - 1 - config.num_seeds
    if not 0 <= config.seed <= most:
        raise ValueError(f"--seed must be from 0 to {most}; got {config.seed}.")
    check_number("--lr", config.lr, 0)
    check_number("--train", config.train, 0, 1)
    check_number("--history", config.history, 0, 1, "[)")
    check_number("--max-flagged", config.max_flagged, 0, 1, "[)")
    if config.root_size < 0 or config.max_gap < 0:
        raise ValueError(
            "--root-size and --max-gap must not be negative; got "
            f"{config.root_size} and {config.max_gap}."
        )
    for flag in ("attacks", "defenses", "channels"):
        values = getattr(config, flag)
        if not values:
            raise ValueError(f"--{flag} needs one value or more; got none.")
        forms = values if flag == "channels" else [specs.parse(text) for text in values]
        alike = [text for text, form in zip(values, forms) if forms.count(form) > 1]
        if alike:
            raise ValueError(f"--{flag} has one twice: {' and '.join(alike)}.")
    if specs.NO_ATTACK in config.attacks:
        raise ValueError(
            "--attacks none: runs without an attack are always there. Drop it."
        )
    for text in config.defenses:
        name, options = specs.parse(text)[0]
        own = {"detector", "calibration"} & options.keys()
        if name == FEDSECURE and own:
            raise ValueError(
                f"--defenses {text}: {sorted(own)[0]} is trained by the study. Drop it."
            )
        if name in fs.client_defenses.CLIENT_DEFENSES and name != FEDSECURE:
            raise ValueError(
                f"--defenses {text}: {name} leaves out samples, and not devices, by "
                "features of images. Here clients take fedsecure."
            )
    unknown = set(config.later_defenses) - set(config.defenses)
    if config.history and unknown:
        raise ValueError(
            f"--later-defenses must be some of --defenses, {config.defenses}; got "
            f"{sorted(unknown)}."
        )
    if len(set(config.poisoned)) < len(config.poisoned):
        raise ValueError(f"--poisoned names a device twice: {config.poisoned}.")
    if not config.poisoned:
        check_number("--attackers", config.attackers, 0, 1)


# What the library calls the options of this study.
FLAGS = {
    "Pass calendar_features=False.": "Add --no-calendar.",
    "Leave such records out with skip_empty=True": "Leave such records out with "
    "--skip-unusable",
    "Lower flat, ask for other channels, or leave the record out.": "Ask for other "
    "--channels, or leave the record out with --skip-unusable.",
    "Shorten the windows, fill longer gaps, or leave it out.": "Shorten the windows "
    "(--window), fill longer gaps (--max-gap), move the end of the stretch (--train, "
    "--history), or leave it out (--skip-unusable).",
    "ask for other channels, or change the stretches, windows and gaps.": "ask for "
    "other --channels, or change --train, --history, --window or --max-gap.",
    "Choose fewer records, or another number.": "Choose fewer records in --source, "
    "another number, or --devices None for one a record.",
    "Lower learning_rate.": "Give it other or longer series.",
    "Raise classifier_epochs, or change learning_rate.": "Give more of the "
    "series, or raise --detector-epochs.",
    "Train the classifier for longer, or lower k, percentile, low or high.": "Give "
    "more of the series, or raise --detector-epochs.",
    "Pass root=, from fs.data.federate(..., root_size=100).": "Raise --root-size.",
    "or train for more epochs.": "or raise --detector-epochs.",
    "root_size=": "--root-size ",
    "Lower root_size.": "Lower --root-size.",
    "batch_size=": "--batch-size ",
    "Lower batch_size to": "Lower --batch-size to",
    "Lower batch_size, shorten the windows": "Lower --batch-size, shorten the windows "
    "(--window)",
}


@contextlib.contextmanager
def in_flags() -> Iterator[None]:
    """Says the ways out of an error in the flags of this study."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        for name, flag in FLAGS.items():
            text = text.replace(name, flag)
        raise ValueError(text) from None


def load(config: Config) -> fs.data.Vitals:
    """The series, cut into as many devices as asked for.

    Raises:
        ValueError: a source that is none, damaged files, too few devices.
        FileNotFoundError: the source has no files.
    """
    calls = specs.parse(config.source)
    if len(calls) != 1:
        raise ValueError(f"--source takes one source; got {config.source!r}.")
    (call,) = calls
    own = {"data_dir": "--data-dir", "channels": "--channels"}
    own |= {"skip_empty": "--skip-unusable"}
    for option in own.keys() & call.options.keys():
        raise ValueError(
            f"--source {config.source}: {option} is no option of a source. Give "
            f"{own[option]}."
        )
    try:
        with in_flags():
            vitals = fs.data.load_vitals(
                call.name,
                config.data_dir,
                channels=config.channels,
                skip_empty=config.skip_unusable,
                **call.options,
            )
    except TypeError as error:
        raise ValueError(f"--source {config.source}: {error}") from None
    if config.devices is None:
        return vitals
    try:
        with in_flags():
            return fs.data.cut(vitals, config.devices)
    except ValueError as error:
        raise ValueError(f"--devices: {error}") from None


def federate(config: Config, vitals: fs.data.Vitals) -> dict[str, SeriesFederation]:
    """The devices of every part.

    Raises:
        ValueError: a record that cannot be used, a poisoned device that there is not,
            nobody poisoned or nobody honest, or too few windows for a detector.
    """

    def devices(vitals: fs.data.Vitals) -> dict[str, SeriesFederation]:
        shares = {SAME: None, LATER: config.history}
        return {
            part: fs.data.federate_series(
                vitals,
                length=config.window,
                train=config.train,
                history=shares[part],
                max_gap=config.max_gap,
                calendar_features=config.calendar,
                skip_unusable=config.skip_unusable,
                root_size=config.root_size,
                seed=config.seed,
            )
            for part in parts(config)
        }

    with in_flags():
        federations = devices(vitals)
        # A device has one number in all parts, and so is there in all or in none.
        left_out: dict[str, str] = {}
        for found in federations.values():
            left_out = {**found.left_out, **left_out}
        kept = tuple(r for r in vitals.records if r.name not in left_out)
        if len(kept) < len(vitals.records):
            federations = devices(vitals._replace(records=kept, left_out=left_out))
        for found in federations.values():
            num_held_out(int(found.history.mask.sum()), config.batch_size)
    count = len(kept)
    if count < 2:
        raise ValueError(
            "the study needs two devices at least, one poisoned and one honest; got "
            f"{count}. Load more records (--source), or cut them (--devices)."
        )
    wrong = [number for number in config.poisoned if not 1 <= number <= count]
    if wrong:
        raise ValueError(
            f"--poisoned must be numbers of devices, from 1 to {count}; got "
            f"{wrong[0]}. Records left out have none: {len(left_out)} here."
        )
    num_poisoned(config, count)
    return federations


def check_reach(
    config: Config,
    federations: Mapping[str, SeriesFederation],
    make_samples: MakeSamples,
) -> str:
    """What is to be said of devices that an attack leaves as they are.

    Raises:
        ValueError: they are the poisoned ones, or all.
    """
    remarks = []
    for part, devices in federations.items():
        everyone = range(1, len(devices.devices) + 1)
        for text in config.attacks:
            attack = specs.make_series_attack(text, len(devices.channels), len(STATES))
            target = specs.parse(text)[0].options.get("target")
            missed = fedsecure_detector.out_of_reach(
                config, devices, make_samples, attack, target
            )
            poisoned = set(config.poisoned or everyone)
            if poisoned & set(missed) if config.poisoned else poisoned <= set(missed):
                first = min(poisoned & set(missed))
                seen = "" if target is None else ", with the target as its label,"
                count = devices.devices[first - 1].windows
                raise ValueError(
                    f"--attacks {text}: none of the {count} windows of device {first}"
                    f"{seen} would change in the part {part}, so that nothing would be "
                    "attacked. Let it begin earlier or be stronger, choose other "
                    "--poisoned, or shorten --window."
                )
            if missed:
                remarks.append(
                    f"{text} ({part}) would leave {len(missed)} of {len(everyone)} "
                    "devices as they are."
                )
    return " ".join(remarks)


def num_poisoned(config: Config, num_devices: int) -> int:
    """Poisoned devices of a part with so many devices.

    Raises:
        ValueError: none, or all of them.
    """
    if config.poisoned and len(config.poisoned) < num_devices:
        return len(config.poisoned)
    if config.poisoned:
        raise ValueError(
            f"--poisoned names all {num_devices} devices: leave at least one out."
        )
    found = round(config.attackers * num_devices)
    if not 0 < found < num_devices:
        raise ValueError(
            f"--attackers {config.attackers} of {num_devices} devices is {found}; "
            "expected at least one poisoned and one honest."
        )
    return found


def make_systems(
    config: Config,
    part: str,
    devices: SeriesFederation,
    make_samples: MakeSamples,
    trained: Trained,
) -> dict[str, fs.Simulation]:
    """The simulations of a part.

    Raises:
        ValueError: a bad setting.
    """
    count = num_poisoned(config, len(devices.devices))
    classes, channels = len(devices.edges) + 1, len(devices.channels)
    shape = (config.window, len(devices.features))
    shared: dict[str, Any] = {
        "model": fs.models.bilstm(shape, classes, config.hidden),
        "clients": devices.clients,
        "test": devices.test,
        "local_test": devices.local_test,
        "root": devices.root,
        "make_samples": make_samples,
        "client_update": fs.local_sgd(
            optax.adam(config.lr), epochs=config.epochs, batch_size=config.batch_size
        ),
        "client_chunk": config.client_chunk,
    }
    filled = {
        "detector": trained.detector,
        "calibration": trained.calibration,
        "max_flagged": config.max_flagged,
        # Series do not change from round to round.
        "every": None,
    }
    # One object each, so that systems share its part of the program.
    attacks = {
        text: specs.make_series_attack(text, channels, classes)
        for text in config.attacks
    }
    on_clients: dict[str, Any] = {}

    def simulation(cell: Cell) -> fs.Simulation:
        defense = specs.make_defense(cell.defense, count, filled)
        screening = cell.defense.partition("+")[0]
        own = on_clients.setdefault(screening, defense.on_clients)
        attack = attacks.get(cell.attack)
        chosen: dict[str, Any] = {}
        if attack is not None and config.poisoned:
            chosen["byzantine_clients"] = tuple(n - 1 for n in config.poisoned)
        elif attack is not None:
            chosen["num_byzantine"] = count
        return fs.Simulation(
            aggregator=defense.rule,
            client_defense=own,
            data_attack=attack,
            **chosen,
            **shared,
        )

    todo = [cell for cell in cells(config) if cell.part == part]
    return {cell.name: simulation(cell) for cell in todo}


def settings(config: Config) -> str:
    """The run in a sentence, for the terminal and the summary."""
    seeds = f"seed {config.seed}"
    if config.num_seeds > 1:
        seeds += f" and the {config.num_seeds - 1} after it"
    who = f"{results.percent(config.attackers)} of the devices poisoned"
    if config.poisoned:
        who = f"device {', '.join(map(str, config.poisoned))} poisoned"
    return (
        f"{config.source}: {', '.join(config.channels)}"
        f"{' and hour, day, weekday' if config.calendar else ''}; windows of "
        f"{config.window}; the next step's state ({', '.join(STATES)}) by a BiLSTM of "
        f"2 x {config.hidden}; {config.epochs} local epoch(s), batch "
        f"{config.batch_size}, Adam {config.lr:g}; {who}; reference model of 2 x "
        f"{config.detector_hidden}, {config.detector_epochs} epochs, devices out above "
        f"{results.percent(config.max_flagged)} flagged windows; {seeds}."
    )


def data_remark(vitals: fs.data.Vitals) -> str:
    """Where the series come from."""
    return (
        f"Data: {vitals.source}; licence: {vitals.licence}; a sample every "
        f"{vitals.interval:g} s."
    )


def run(config: Config, console: Console) -> runner.Result:
    """Checks everything, trains the detectors, runs or resumes, writes the results.

    Raises:
        ValueError: a bad option, before any training.
    """
    check(config)
    rundir.check_out(config)
    runner.start(config.cores)
    for attack in config.attacks:  # before any file is read
        try:
            specs.make_series_attack(attack, len(config.channels), len(STATES))
        except ValueError as error:
            raise ValueError(f"--attacks {attack}: {error}") from None
    vitals = load(config)
    federations = federate(config, vitals)
    make_samples = fs.data.windows(config.window)
    reach = check_reach(config, federations, make_samples)

    def phases(trained: dict[str, Trained]) -> list[runner.Phase]:
        return [
            runner.Phase(
                part,
                make_systems(config, part, devices, make_samples, trained[part]),
                config.rounds,
            )
            for part, devices in federations.items()
        ]

    # Every check of a simulation goes by shapes alone, so that a detector that has
    # learned nothing serves it.
    untrained = {
        part: fedsecure_detector.untrained(config, devices)
        for part, devices in federations.items()
    }
    with in_flags():
        runner.check_progress(config, phases(untrained))
    with rundir.open_out(config, vitals.source):
        console.print(settings(config))
        console.print(fedsecure_report.who(config, next(iter(federations.values()))))
        with fedsecure_detector.or_nothing(config), in_flags():
            trained = {
                part: fedsecure_detector.load_or_train(
                    config, part, devices, make_samples, console
                )
                for part, devices in federations.items()
            }
        result = runner.run_study(config, phases(trained), console)
        fedsecure_report.write(
            config,
            result,
            console,
            cells={cell.name: cell for cell in cells(config)},
            federations=federations,
            trained=trained,
            make_samples=make_samples,
            command=commandline.command(config, PRESETS[config.preset]),
            settings=settings(config),
            remarks=[remark for remark in (data_remark(vitals), reach) if remark],
        )
    return result


if __name__ == "__main__":
    runner.exit_on_interrupt()
    commandline.main(parse, run)
