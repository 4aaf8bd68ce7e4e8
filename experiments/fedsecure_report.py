"""What a run of the FedSecure study says at its end: tables, figures, summary.md."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import fedjax_sim as fs
from experiments import fedsecure_plots, results, runner, specs
from experiments.fedsecure_detector import Screened, Trained, screen_devices
from experiments.results import evaluated, tail
from fedjax_sim.attacks.series_backdoors import LENGTH
from fedjax_sim.client_defenses.fedsecure import too_many
from fedjax_sim.client_defenses.reference_model import Fold
from fedjax_sim.data.series import SeriesFederation, states
from fedjax_sim.report import mean_and_spread, mean_defined
from fedjax_sim.types import MakeSamples

FEDAVG, FEDSECURE = "fedavg", "fedsecure"
BYTES = 4  # of a float32 parameter
MANY = 12  # devices from which a table shows their range instead
# The paper's table I.
PAPER_FOLDS = {
    "train_accuracy": (0.9953, 0.9972, 0.9969, 0.9982, 0.9971),
    "train_loss": (0.0118, 0.0070, 0.0088, 0.0061, 0.0067),
    "val_accuracy": (0.9998, 0.9996, 0.9993, 0.9993, 0.9996),
    "val_loss": (0.0065, 0.0013, 0.0034, 0.0038, 0.0018),
}
# Its figure 8, text and figure 9.
PAPER_ACCURACY = (0.950, 0.954)
PAPER_AUC, PAPER_TRUE = 0.99, (4477, 264)
# Thresholds of its poisoned device, by run (figure 11).
PAPER_THRESHOLDS = (0.990, 0.800, 0.950, 0.900, 0.900)
# Its runs, at the strengths that are ours.
PAPER_RUNS = {
    "variability(amplitude=1)": "Run 2, data poisoning 1",
    "pattern_scaling(scale=2)": "Run 3, data poisoning 2",
    "gradual_pattern": "Run 4, backdoor 1",
    "repeated_pattern": "Run 5, backdoor 2",
}
# Strengths to try each attack at, and the option that is varied; the height is that of
# the default pattern.
STRENGTHS: dict[str, tuple[str, tuple[float, ...]]] = {
    "variability": ("amplitude", (0.25, 0.5, 1, 2, 4)),
    "pattern_scaling": ("scale", (1.1, 1.25, 1.5, 2, 3)),
    "gradual_pattern": ("amplitude", (0.5, 1, 2, 4, 8)),
    "repeated_pattern": ("height", (1, 2, 3, 4, 6)),
}
RUN_NOTE = (
    "Test accuracy and loss of the global model; *own* is the model that a device has "
    "after its local training (the server's, where it was excluded), on its own test "
    "stretch, poisoned where the device is. {tail} *Excluded*: rounds that poisoned "
    "and honest devices were kept out of; *saved*: bytes that a run did not send, of "
    "an update of {size} bytes by every device in every round. Rules of the server "
    "alone are in the table after this one."
)
ACCURACY_NOTE = (
    "Test accuracy of the global model; in brackets the attack's success, where it has "
    "a target. {tail}"
)
IDLE_NOTE = (
    " *Idle*: rounds in which nobody was left, so that the model stayed as it was; at "
    "100 % it was never trained."
)
SCREEN_NOTE = (
    "Share of its windows that a device flags in its own series, clean and poisoned. "
    "*Threshold*: of the device's scores. In the columns of attacks every device is in "
    "turn the poisoned one."
)


def write(
    config: Any,
    result: runner.Result,
    console: Console,
    *,
    cells: Mapping[str, Any],
    federations: Mapping[str, SeriesFederation],
    trained: Mapping[str, Trained],
    make_samples: MakeSamples,
    command: str,
    settings: str,
    remarks: Sequence[str],
) -> None:
    """Prints the tables and writes the figures, ``summary.json`` and ``summary.md``.

    Args:
        config: of ``experiments.fedsecure_vitals``.
        result: its histories and seconds.
        console: where the tables go.
        cells: what each system is, by its name.
        federations: the devices of each part.
        trained: the detector of each part.
        make_samples: how windows are cut.
        command: what starts this run.
        settings: the run in a sentence.
        remarks: what is to be said of the data.
    """
    by_cell = {cell: result.histories[name] for name, cell in cells.items()}
    screened = {
        part: screen_all(config, devices, trained[part], make_samples)
        for part, devices in federations.items()
    }
    write_devices(config.out / "devices.csv", federations)
    tables: dict[str, tuple[fs.report.Table, str]] = {
        f"Devices: {part}": (device_table(devices), who(config, devices))
        for part, devices in federations.items()
    }
    tables |= {
        "The reference model and the classifier": (
            detector_table(trained),
            "Held-out windows share steps with those trained on. The paper's "
            '"accuracy" of a reconstruction is read as Keras\': the share of steps '
            "at which the largest feature is the largest of the rebuilt step too.",
        ),
    }
    for part, own in trained.items():
        assert own.training is not None, "trained before the run"
        name = f"Five folds of the classifier (the paper's table I): {part}"
        tables[name] = fold_table(own.training.folds), ""
    plots: dict[str, Any] = {}
    for part, devices in federations.items():
        size = _bytes(config, devices)
        own_cells = {c: h for c, h in by_cell.items() if c.part == part}
        last = tail_note(own_cells.values())
        idle = IDLE_NOTE if any(map(idle_rounds, own_cells.values())) else ""
        tables[f"Runs: {part}"] = (
            run_table(config, by_cell, part, size),
            RUN_NOTE.format(tail=last, size=f"{size:,}") + idle,
        )
        tables[f"Defenses: {part}"] = (
            defense_table(config, by_cell, part),
            f"{ACCURACY_NOTE.format(tail=last)}{idle} {persistence(devices)}",
        )
        tables[f"Screening: {part}"] = (
            screening_table(
                devices, trained[part], screened[part], limits(config, own_cells)
            ),
            SCREEN_NOTE,
        )
        training = trained[part].training
        assert training is not None, "trained before the run"
        plots[f"{part}_reference_model"] = fedsecure_plots.training_plot(
            training, devices.channels
        )
        plots[f"{part}_classifier"] = fedsecure_plots.classifier_plot(training)
        plots[f"{part}_runs"] = _runs_plot(config, by_cell, part)
        plots[f"{part}_scores"] = _score_plot(
            config, by_cell, part, trained[part], screened[part]
        )
        clean = screened[part][specs.NO_ATTACK].flagged
        swept = strengths(config, devices, trained[part], make_samples, clean)
        if swept:
            plots[f"{part}_strengths"] = fedsecure_plots.strength_plot(
                swept, config.max_flagged
            )
            tables[f"Strength of attacks: {part}"] = (
                strength_table(config, swept),
                "Share of the devices that would stay out if they were poisoned so, "
                f"above {results.percent(config.max_flagged)} flagged windows.",
            )
    results.publish(
        config,
        result,
        console,
        title="FedSecure on vital signs",
        command=command,
        settings=settings,
        tables=tables,
        plots=plots,
        remarks=remarks,
    )


def tail_note(histories: Iterable[fs.History]) -> str:
    """Over how many evaluations the means are."""
    count = min(len(evaluated(h, h.accuracy)[0]) for h in histories)
    if count < 2:
        return "Of the last evaluation."
    return f"Mean of the last {min(count, results.TAIL)} evaluations."


def idle_rounds(history: fs.History) -> float:
    """Share of the rounds in which nobody was left."""
    return float(np.mean(history.no_aggregate))


def limits(config: Any, histories: Mapping[Any, fs.History]) -> list[float]:
    """The shares of flagged windows above which devices stay out, by the defenses."""
    found = [
        specs.parse(cell.defense)[0].options.get("max_flagged", config.max_flagged)
        for cell, history in histories.items()
        if history.defense
    ]
    return list(dict.fromkeys([config.max_flagged, *found]))


def screen_all(
    config: Any,
    devices: SeriesFederation,
    trained: Trained,
    make_samples: MakeSamples,
) -> dict[str, Screened]:
    """What every device finds in its series, clean and under each attack."""
    channels, classes = len(devices.channels), len(devices.edges) + 1
    attacks = {
        text: specs.make_series_attack(text, channels, classes)
        for text in config.attacks
    }
    return {
        name: screen_devices(config, devices, trained, make_samples, attack)
        for name, attack in {specs.NO_ATTACK: None, **attacks}.items()
    }


def who(config: Any, devices: SeriesFederation) -> str:
    """Who is poisoned, and which records were left out and why."""
    poisoned = "drawn by the seed, `byzantine` in clients.npz says who."
    if config.poisoned:
        names = (f"{n} ({devices.devices[n - 1].name})" for n in config.poisoned)
        poisoned = f"{', '.join(names)}."
    # What is to be done comes after the first sentence.
    found = [why.partition(". ")[0] for why in devices.left_out.values()]
    left_out = "Every record could be used."
    if found:
        more = f"; and {len(found) - 5} more" if len(found) > 5 else ""
        more += " (devices.csv has all)" if more else ""
        left_out = f"Left out ({len(found)}): {'; '.join(found[:5])}{more}."
    return f"Poisoned: {poisoned} {left_out}"


def write_devices(path: Path, federations: Mapping[str, SeriesFederation]) -> None:
    """``devices.csv``: a row for every device of a part, and every record left out."""
    names = ("missing", "filled", "mean", "sd")
    first = next(iter(federations.values()))
    each = [f"{name}_{c}" for name in names for c in first.channels]
    counts = ("steps", "windows", "test_windows")
    rows: list[list[Any]] = []
    for part, devices in federations.items():
        for number, device in enumerate(devices.devices, start=1):
            own = [x for name in names for x in getattr(device, name)]
            sizes = [getattr(device, name) for name in counts]
            who = [part, number, device.name, device.patient]
            rows.append([*who, *sizes, *own, ""])
        blank = [""] * (1 + len(counts) + len(each))
        for name, why in devices.left_out.items():
            rows.append([part, "", name, *blank, why])
    header = ["part", "device", "name", "patient", *counts, *each, "left_out"]
    results.write_csv(path, header, rows)


def device_table(devices: SeriesFederation) -> fs.report.Table:
    """What became of every record; of many, the range."""
    counts = ("steps", "missing", "filled in", "windows", "test windows")
    rows: list[tuple[str, ...]] = []
    own = devices.devices
    if len(own) > MANY:  # every column for itself
        sizes = [
            (d.steps, sum(d.missing), sum(d.filled), d.windows, d.test_windows)
            for d in own
        ]
        columns: dict[str, Any] = dict(zip(counts, zip(*sizes), strict=True))
        for c, channel in enumerate(devices.channels):
            columns[f"mean of {channel}"] = [d.mean[c] for d in own]
            columns[f"sd of {channel}"] = [d.sd[c] for d in own]
        for name, pick in (("lowest", 0), ("median", 50), ("highest", 100)):
            picked = (f"{np.percentile(v, pick):.4g}" for v in columns.values())
            rows.append((f"{name} of {len(own)}", *picked))
        return fs.report.Table(("device", *columns), rows)
    for number, device in enumerate(devices.devices, start=1):
        scale = (f"{m:.1f} ± {s:.1f}" for m, s in zip(device.mean, device.sd))
        rows.append(
            (
                f"{number}: {device.name}",
                str(device.steps),
                ", ".join(map(str, device.missing)),
                ", ".join(map(str, device.filled)),
                str(device.windows),
                str(device.test_windows),
                ", ".join(scale),
            )
        )
    channels = " and ".join(devices.channels)
    return fs.report.Table(("device", *counts, f"mean ± sd of {channels}"), rows)


def detector_table(trained: Mapping[str, Trained]) -> fs.report.Table:
    """How the training of each part's detector went, beside the paper's."""
    header = (
        "part",
        "loss",
        "held out",
        '"accuracy"',
        "held out",
        "positives",
        "TN, FP, FN, TP",
        "AUC",
    )
    rows: list[tuple[str, ...]] = []
    for part, own in trained.items():
        found = own.training
        assert found is not None, "trained before the run"
        counts = fedsecure_plots.confusion(found.scores, found.labels)
        rows.append(
            (
                part,
                f"{found.train_loss[-1]:.3g}",
                f"{found.val_loss[-1]:.3g}",
                f"{found.train_accuracy[-1]:.3f}",
                f"{found.val_accuracy[-1]:.3f}",
                f"{100 * found.labels.mean():.1f} %",
                ", ".join(str(n) for n in counts.flat),
                f"{fedsecure_plots.auc(found.scores, found.labels):.3f}",
            )
        )
    true = f"{PAPER_TRUE[0]}, , , {PAPER_TRUE[1]}"
    accuracy = (f"{value:.3f}" for value in PAPER_ACCURACY)
    rows.append(("↳ paper", "", "", *accuracy, "", true, f"{PAPER_AUC}"))
    return fs.report.Table(header, rows)


def fold_table(folds: Fold) -> fs.report.Table:
    """The classifier's cross-validation, fold by fold, beside the paper's."""
    words = [name.replace("_", " ") for name in Fold._fields]
    header = ("fold", *(w for word in words for w in (word, "↳ paper")))
    rows: list[tuple[str, ...]] = []
    for i in range(len(folds.val_loss)):
        pairs = (
            (f"{np.asarray(getattr(folds, name))[i]:.4f}", f"{PAPER_FOLDS[name][i]}")
            for name in Fold._fields
        )
        rows.append((str(i + 1), *(cell for pair in pairs for cell in pair)))
    return fs.report.Table(header, rows)


def _bytes(config: Any, devices: SeriesFederation) -> int:
    """Bytes of one update."""
    shape = (config.window, len(devices.features))
    model = fs.models.bilstm(shape, len(devices.edges) + 1, config.hidden)
    params = jax.eval_shape(model.init, jax.random.key(0))
    return BYTES * sum(leaf.size for leaf in jax.tree.leaves(params))


def persistence(devices: SeriesFederation) -> str:
    """How often the next state is that of the window's last step."""
    last = np.asarray(states(jnp.asarray(devices.test.inputs[:, -1]), devices.edges))
    targets = np.asarray(devices.test.targets)
    usual = np.bincount(targets).max() / len(targets)
    return (
        f"To say that the state stays as it is scores {np.mean(last == targets):.3f}, "
        f"to say always the most frequent one {usual:.3f}."
    )


def run_name(attack: str, defense: str) -> str:
    """A system's name: that of the paper's run where it is one of ``PAPER_RUNS``.

    Example:
        >>> run_name("gradual_pattern", "fedavg")
        'Run 4, backdoor 1'
        >>> run_name("gradual_pattern(ramp=5)", "fedavg")
        'gradual_pattern(ramp=5)'
        >>> run_name("gradual_pattern", "fedsecure")
        'Run 6, FedSecure: gradual_pattern'
    """
    if defense != FEDAVG:
        known = "Run 6, FedSecure" if defense == FEDSECURE else defense
        return f"{known}: {'no poisoning' if attack == specs.NO_ATTACK else attack}"
    if attack == specs.NO_ATTACK:
        return "Run 1, no poisoning"
    call = specs.parse(attack)
    return next(
        (run for x, run in PAPER_RUNS.items() if specs.parse(x) == call), attack
    )


def excluded(history: fs.History, poisoned: bool) -> np.ndarray:
    """Share of the rounds that poisoned, or honest, devices were kept out of, [seeds].

    NaN where there is no such device.
    """
    who = _by_seed(history, history.byzantine) == poisoned
    out = _by_seed(history, history.defense["excluded"]).astype(float)
    return mean_defined(np.where(who, out, np.nan), axis=1)


def _by_seed(history: fs.History, values: Any) -> np.ndarray:
    """Values of every round and device, ``[seeds, R k]``, also without a seed axis."""
    return np.asarray(values).reshape(len(np.atleast_2d(history.round)), -1)


def _own(history: fs.History, field: str, device: int | None, poisoned: bool) -> Any:
    """Rounds, and ``[seeds, R]`` means of a local field over a device or a kind."""
    values = np.asarray(history.local[field], float)
    if device is None:
        chosen = np.asarray(history.byzantine) == poisoned
    else:
        chosen = np.asarray(history.client_ids) == device
    values = np.where(chosen, values, np.nan)
    return evaluated(history, mean_defined(values, axis=-1))


def shown_devices(
    config: Any, by_cell: Mapping[Any, fs.History], part: str
) -> tuple[tuple[int | None, int | None], tuple[str, str]]:
    """The poisoned and the clean device of the figures, from 0, and what to call them.

    The paper shows devices 2 and 4. Where poisoned devices are drawn, it is all of a
    kind: None.
    """
    if not config.poisoned:
        return (None, None), ("poisoned devices", "clean devices")
    history = next(h for c, h in by_cell.items() if c.part == part)
    count = np.shape(history.client_ids)[-1]
    clean = [i for i in range(count) if i + 1 not in config.poisoned]
    bad, good = config.poisoned[0] - 1, 3 if 3 in clean else clean[0]
    return (bad, good), (f"device {bad + 1}", f"device {good + 1}")


def run_table(
    config: Any, by_cell: Mapping[Any, fs.History], part: str, size: int
) -> fs.report.Table:
    """The paper's six runs: loss and accuracy, who was kept out, what that saved."""
    (bad, good), (bad_name, good_name) = shown_devices(config, by_cell, part)
    header = (
        "run",
        "accuracy",
        "loss",
        f"{bad_name}, own",
        f"{good_name}, own",
        "excluded: poisoned",
        "honest",
        "saved",
    )
    rows: list[tuple[str, ...]] = []
    own_cells = {(c.attack, c.defense): h for c, h in by_cell.items() if c.part == part}
    for defense in dict.fromkeys(d for _, d in own_cells):
        for attack in (specs.NO_ATTACK, *config.attacks):
            history = own_cells[attack, defense]
            if defense != FEDAVG and not history.defense:  # a rule of the server alone
                continue
            own = [
                mean_and_spread(tail(_own(history, "own_accuracy", device, kind)[1]))
                for device, kind in ((bad, True), (good, False))
            ]
            if attack == specs.NO_ATTACK and bad is None:
                own[0] = "-"
            out = ("", "", "")
            if history.defense:
                gone = _by_seed(history, history.defense["excluded"]).astype(float)
                saved = _size(size * gone.sum(axis=1))
                out = (
                    _percent(excluded(history, True)),
                    _percent(excluded(history, False)),
                    f"{saved} ({_percent(gone.mean(axis=1))})",
                )
            rows.append(
                (
                    run_name(attack, defense),
                    mean_and_spread(tail(history.accuracy)) + _idle(history),
                    mean_and_spread(tail(history.loss)),
                    *own,
                    *out,
                )
            )
    return fs.report.Table(header, rows)


def _percent(shares: np.ndarray) -> str:
    """Shares by seed, in percent."""
    found = mean_and_spread(100 * shares, digits=0)
    return found if found == "-" else f"{found} %"


def _size(bytes: np.ndarray) -> str:
    """Bytes by seed."""
    unit, digits, name = (1e6, 2, "MB") if bytes.max() >= 1e6 else (1e3, 1, "kB")
    return f"{mean_and_spread(bytes / unit, digits)} {name}"


def _idle(history: fs.History) -> str:
    share = idle_rounds(history)
    return f" (idle {100 * share:.0f} %)" if share else ""


def defense_table(
    config: Any, by_cell: Mapping[Any, fs.History], part: str
) -> fs.report.Table:
    """Accuracy of every defense under every attack."""
    found = {(c.attack, c.defense): h for c, h in by_cell.items() if c.part == part}
    attacks = (specs.NO_ATTACK, *config.attacks)

    def cell(history: fs.History) -> str:
        success = mean_and_spread(tail(history.attack_success))
        found = mean_and_spread(tail(history.accuracy))
        return found + ("" if success == "-" else f" ({success})") + _idle(history)

    rows = [
        (
            "no defense" if defense == FEDAVG else defense,
            *(cell(found[attack, defense]) for attack in attacks),
        )
        for defense in dict.fromkeys(d for _, d in found)
    ]
    return fs.report.Table(("defense", "no attack", *config.attacks), rows)


def screening_table(
    devices: SeriesFederation,
    trained: Trained,
    screened: Mapping[str, Screened],
    limits: Sequence[float],
) -> fs.report.Table:
    """Threshold and flagged share of every device, clean and poisoned.

    And how many devices stay out above each of the ``limits``.
    """
    thresholds = np.asarray(trained.calibration.thresholds)
    columns = ("clean" if name == specs.NO_ATTACK else name for name in screened)
    rows: list[tuple[str, ...]] = []
    if len(thresholds) <= MANY:
        for i, device in enumerate(devices.devices):
            shares = (f"{found.flagged[i]:.2f}" for found in screened.values())
            rows.append((f"{i + 1}: {device.name}", f"{thresholds[i]:.3f}", *shares))
    else:
        for name, pick in (("median", 50), ("90 % quantile", 90)):
            shares = (
                f"{np.percentile(f.flagged, pick):.2f}" for f in screened.values()
            )
            rows.append((name, f"{np.percentile(thresholds, pick):.3f}", *shares))
    for limit in limits:
        out = (
            f"{int(too_many(found.flagged, limit).sum())} of {len(thresholds)}"
            for found in screened.values()
        )
        rows.append((f"stay out, above {results.percent(limit)}", "", *out))
    if len(thresholds) <= MANY:
        paper = "/".join(f"{value:.3f}" for value in PAPER_THRESHOLDS)
        rows.append(("↳ paper, device 2 by run", paper, *[""] * len(screened)))
    return fs.report.Table(("device", "threshold", *columns), rows)


def strengths(
    config: Any,
    devices: SeriesFederation,
    trained: Trained,
    make_samples: MakeSamples,
    clean: np.ndarray,
) -> dict[str, tuple[list[float], np.ndarray]]:
    """Flagged shares ``[S, N]`` of every attack of the run, at several strengths.

    The first is that of the ``clean`` series.
    """
    channels, classes = len(devices.channels), len(devices.edges) + 1
    found = {}
    for text in config.attacks:
        (call,) = specs.parse(text)
        # Nobody looks at labels, and a pattern of one's own has no height.
        kept = {k: v for k, v in call.options.items() if k != "target"}
        if call.name not in STRENGTHS or "pattern" in kept:
            continue
        option, values = STRENGTHS[call.name]
        kept.pop(option, None)
        name = specs.text_of(specs.Call(call.name, kept))
        if f"{name}: {option}" in found:
            continue
        shares = [clean]
        for value in values:
            changed = {**kept, option: value}
            if option == "height":
                del changed["height"]
                length = changed.pop("length", LENGTH)
                changed["pattern"] = [[float(value)] * channels] * length
            own = specs.text_of(specs.Call(call.name, changed))
            attack = specs.make_series_attack(own, channels, classes)
            shares.append(
                screen_devices(config, devices, trained, make_samples, attack).flagged
            )
        found[f"{name}: {option}"] = ([0.0, *values], np.stack(shares))
    return found


def strength_table(
    config: Any, swept: Mapping[str, tuple[list[float], np.ndarray]]
) -> fs.report.Table:
    """How many devices stay out, by attack and strength."""
    rows: list[tuple[str, ...]] = []
    for name, (values, shares) in swept.items():
        out = np.asarray(too_many(shares, config.max_flagged)).mean(axis=1)
        cells = (f"{v:g}: {100 * share:.0f} %" for v, share in zip(values[1:], out[1:]))
        rows.append((name, f"{100 * out[0]:.0f} %", *cells))
    width = max(len(row) for row in rows)
    blanks = [(*row, *[""] * (width - len(row))) for row in rows]
    return fs.report.Table(("attack", "clean", *["strength"] * (width - 2)), blanks)


def _runs_plot(config: Any, by_cell: Mapping[Any, fs.History], part: str) -> Any:
    (bad, good), (bad_name, good_name) = shown_devices(config, by_cell, part)
    runs: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    # The paper does not say under which attack its sixth run is.
    sixth = (config.attacks[min(1, len(config.attacks) - 1)], FEDSECURE)
    shown = [
        (c, h)
        for c, h in by_cell.items()
        if c.part == part and (c.defense == FEDAVG or (c.attack, c.defense) == sixth)
    ]
    for cell, history in shown:
        lines = {}
        for field in ("loss", "accuracy"):
            for device, kind, name in ((bad, True, bad_name), (good, False, good_name)):
                rounds, values = _own(history, f"own_{field}", device, kind)
                lines[f"{name} {field}"] = rounds, mean_defined(values, axis=0)
            rounds, values = evaluated(history, getattr(history, field))
            lines[f"global {field}"] = rounds, mean_defined(values, axis=0)
        runs[run_name(cell.attack, cell.defense)] = lines
    return fedsecure_plots.runs_plot(runs, (bad_name, good_name, "global"))


def _score_plot(
    config: Any,
    by_cell: Mapping[Any, fs.History],
    part: str,
    trained: Trained,
    screened: Mapping[str, Screened],
) -> Any:
    (bad, _), _ = shown_devices(config, by_cell, part)
    device = 0 if bad is None else bad
    found = {}
    for name, own in screened.items():
        mask = own.mask[device]
        run = run_name(name, FEDAVG)
        # One of the paper's, "Run 2, ..."; else an attack with its options.
        run = run.replace("(", "\n(", 1).replace(", ", ",\n" if "(" in run else "\n")
        found[run] = own.scores[device][mask], own.errors[device][mask]
    limit = float(np.asarray(trained.calibration.thresholds)[device])
    return fedsecure_plots.distribution_plot(found, limit, f"device {device + 1}")
