"""What a run of the FedSecure study says at its end: tables, figures, summary.md."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import fedjax_sim as fs
from experiments import fedsecure_plots, results, runner, specs
from experiments.fedsecure_detector import Screened, Trained, screen_devices
from experiments.results import evaluated, tail
from fedjax_sim.client_defenses.reference_model import Fold
from fedjax_sim.data.series import STATES, SeriesFederation, states
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
# What the attacks are called there.
PAPER_RUNS = {
    "variability": "Run 2, data poisoning 1",
    "pattern_scaling": "Run 3, data poisoning 2",
    "gradual_pattern": "Run 4, backdoor 1",
    "repeated_pattern": "Run 5, backdoor 2",
}
# Strengths to try each attack at, as options; the label of what is varied.
STRENGTHS: dict[str, tuple[str, tuple[float, ...]]] = {
    "variability": ("amplitude", (0.25, 0.5, 1, 2, 4)),
    "pattern_scaling": ("scale", (1.1, 1.25, 1.5, 2, 3)),
    "gradual_pattern": ("amplitude", (0.5, 1, 2, 4, 8)),
    "repeated_pattern": ("height", (1, 2, 3, 4, 6)),
}
RUN_NOTE = (
    "Test accuracy and loss of the global model; *own* is the model that a device has "
    "after its local training (the server's, where it was excluded), on its own test "
    "stretch, poisoned where the device is. "
    f"Mean of the last {results.TAIL} evaluations. *Excluded*: rounds that poisoned "
    "and honest devices were kept out of, in percent; *saved*: of the bytes that "
    "updates would have taken."
)
ACCURACY_NOTE = (
    f"Test accuracy of the global model, mean of the last {results.TAIL} evaluations; "
    "in brackets the attack's success, where it has a target."
)
SCREEN_NOTE = (
    "Share of its windows that a device flags in its own series, clean and poisoned; "
    "it stays out above {limit}. *Threshold*: of the device's scores. In the columns "
    "of attacks every device is in turn the poisoned one."
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
    """
    by_cell = {cell: result.histories[name] for name, cell in cells.items()}
    first = next(iter(federations))
    screened = {
        part: screen_all(config, devices, trained[part], make_samples)
        for part, devices in federations.items()
    }
    tables: dict[str, tuple[fs.report.Table, str]] = {
        "Devices": (device_table(federations[first]), _left_out(federations[first])),
        "The reference model and the classifier": (
            detector_table(trained),
            "Held-out windows share steps with those trained on. The paper's "
            '"accuracy" of a reconstruction is read as Keras\': the share of steps '
            "at which the largest feature is the largest of the rebuilt step too.",
        ),
        "Five folds of the classifier (the paper's table I)": (
            fold_table(trained[first].training.folds),  # type: ignore[union-attr]
            "",
        ),
    }
    plots: dict[str, Any] = {}
    for part, devices in federations.items():
        size = _bytes(config, devices)
        tables[f"Runs: {part}"] = (
            run_table(config, by_cell, part, size),
            RUN_NOTE + f" An update is {size} bytes.",
        )
        tables[f"Defenses: {part}"] = (
            defense_table(config, by_cell, part),
            f"{ACCURACY_NOTE} {persistence(devices)}",
        )
        tables[f"Screening: {part}"] = (
            screening_table(config, devices, trained[part], screened[part]),
            SCREEN_NOTE.format(limit=results.percent(config.max_flagged)),
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
        swept = strengths(config, devices, trained[part], make_samples)
        if swept:
            plots[f"{part}_strengths"] = fedsecure_plots.strength_plot(
                swept, config.max_flagged
            )
            tables[f"Strength of attacks: {part}"] = (
                strength_table(config, swept),
                "Share of the devices that would stay out if they were poisoned so.",
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
    )


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


def _left_out(devices: SeriesFederation) -> str:
    found = list(devices.left_out.values())
    if not found:
        return "Every record could be used."
    shown = "; ".join(found[:5])
    more = f" And {len(found) - 5} more." if len(found) > 5 else ""
    return f"Left out ({len(found)}): {shown}{more}"


def device_table(devices: SeriesFederation) -> fs.report.Table:
    """What became of every record; of many, the range."""
    header = ("device", "steps", "missing", "filled in", "mean ± sd", "windows", "test")
    rows: list[tuple[str, ...]] = []
    if len(devices.devices) > MANY:
        for name, pick in (("lowest", 0), ("median", 50), ("highest", 100)):

            def of(values: list[float], pick: int = pick) -> str:
                return f"{np.percentile(values, pick):.4g}"

            own = devices.devices
            rows.append(
                (
                    f"{name} of {len(own)}",
                    of([d.steps for d in own]),
                    of([sum(d.missing) for d in own]),
                    of([sum(d.filled) for d in own]),
                    f"{of([d.mean[0] for d in own])} ± {of([d.sd[0] for d in own])}",
                    of([d.windows for d in own]),
                    of([d.test_windows for d in own]),
                )
            )
        return fs.report.Table(header, rows)
    for number, device in enumerate(devices.devices, start=1):
        scale = (f"{m:.1f} ± {s:.1f}" for m, s in zip(device.mean, device.sd))
        rows.append(
            (
                f"{number}: {device.name}",
                str(device.steps),
                ", ".join(map(str, device.missing)),
                ", ".join(map(str, device.filled)),
                ", ".join(scale),
                str(device.windows),
                str(device.test_windows),
            )
        )
    return fs.report.Table(header, rows)


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
                f"{found.train_loss[-1]:.5f}",
                f"{found.val_loss[-1]:.5f}",
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
    """A system's name as a run of the paper."""
    if attack == specs.NO_ATTACK:
        return "Run 1, no poisoning" if defense == FEDAVG else "FedSecure, no poisoning"
    known = PAPER_RUNS.get(specs.parse(attack)[0].name, attack)
    if _target(attack) is not None:  # not in the paper
        known = attack
    if defense == FEDAVG:
        return known
    return f"Run 6, FedSecure: {attack}"


def _target(attack: str) -> str | None:
    """The state that a backdoor makes the model say."""
    target = specs.parse(attack)[0].options.get("target")
    return None if target is None else STATES[target]


def excluded(history: fs.History, poisoned: bool) -> float:
    """Share of the rounds that poisoned, or honest, devices were kept out of."""
    who = np.asarray(history.byzantine) == poisoned
    out = np.asarray(history.defense["excluded"], bool)
    return float(out[who].mean()) if who.any() else float("nan")


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
    for defense in (FEDAVG, FEDSECURE):
        for attack in (specs.NO_ATTACK, *config.attacks):
            found = [
                h
                for c, h in by_cell.items()
                if (c.part, c.attack, c.defense) == (part, attack, defense)
            ]
            if not found:
                continue
            (history,) = found
            own = [
                mean_and_spread(tail(_own(history, "own_accuracy", device, kind)[1]))
                for device, kind in ((bad, True), (good, False))
            ]
            if attack == specs.NO_ATTACK and bad is None:
                own[0] = "-"
            out = ("", "", "")
            if history.defense:
                shares = [excluded(history, kind) for kind in (True, False)]
                gone = np.asarray(history.defense["excluded"], bool)
                sent = f"{size * gone.sum() / 1e6:.2f} MB ({100 * gone.mean():.0f} %)"
                out = (*(_percent(share) for share in shares), sent)  # type: ignore
            rows.append(
                (
                    run_name(attack, defense),
                    mean_and_spread(tail(history.accuracy)),
                    mean_and_spread(tail(history.loss)),
                    *own,
                    *out,
                )
            )
    return fs.report.Table(header, rows)


def _percent(share: float) -> str:
    return "-" if np.isnan(share) else f"{100 * share:.0f} %"


def defense_table(
    config: Any, by_cell: Mapping[Any, fs.History], part: str
) -> fs.report.Table:
    """Accuracy of every defense under every attack."""
    found = {(c.attack, c.defense): h for c, h in by_cell.items() if c.part == part}
    attacks = (specs.NO_ATTACK, *config.attacks)

    def cell(history: fs.History) -> str:
        success = mean_and_spread(tail(history.attack_success))
        accuracy = mean_and_spread(tail(history.accuracy))
        return accuracy if success == "-" else f"{accuracy} ({success})"

    rows = [
        (
            "no defense" if defense == FEDAVG else defense,
            *(cell(found[attack, defense]) for attack in attacks),
        )
        for defense in dict.fromkeys(d for _, d in found)
    ]
    return fs.report.Table(("defense", "no attack", *config.attacks), rows)


def screening_table(
    config: Any,
    devices: SeriesFederation,
    trained: Trained,
    screened: Mapping[str, Screened],
) -> fs.report.Table:
    """Threshold and flagged share of every device, clean and poisoned."""
    limits = np.asarray(trained.calibration.thresholds)
    header = ("device", "threshold", "clean", *config.attacks)
    rows: list[tuple[str, ...]] = []
    if len(limits) <= MANY:
        for i, device in enumerate(devices.devices):
            shares = (f"{found.flagged[i]:.2f}" for found in screened.values())
            rows.append((f"{i + 1}: {device.name}", f"{limits[i]:.3f}", *shares))
    else:
        for name, pick in (("median", 50), ("90 % quantile", 90)):
            shares = (
                f"{np.percentile(f.flagged, pick):.2f}" for f in screened.values()
            )
            rows.append((name, f"{np.percentile(limits, pick):.3f}", *shares))
    out = (
        f"{(found.flagged > config.max_flagged).sum()} of {len(limits)}"
        for found in screened.values()
    )
    rows.append(("devices that stay out", "", *out))
    if len(limits) <= MANY:
        paper = "/".join(f"{value:.3f}" for value in PAPER_THRESHOLDS)
        rows.append(("↳ paper, device 2 by run", paper, *[""] * len(screened)))
    return fs.report.Table(header, rows)


def strengths(
    config: Any, devices: SeriesFederation, trained: Trained, make_samples: MakeSamples
) -> dict[str, tuple[list[float], np.ndarray]]:
    """Flagged shares ``[S, N]`` of every attack of the run, at several strengths."""
    names = dict.fromkeys(specs.parse(text)[0].name for text in config.attacks)
    channels, classes = len(devices.channels), len(devices.edges) + 1
    clean = screen_devices(config, devices, trained, make_samples, None).flagged
    found = {}
    for name in names:
        if name not in STRENGTHS:
            continue
        option, values = STRENGTHS[name]
        shares = [clean]
        for value in values:
            text = f"{name}({option}={value})"
            if option == "height":
                text = f"{name}(pattern={[[float(value)] * channels] * 10})"
            attack = specs.make_series_attack(text, channels, classes)
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
        out = (shares > config.max_flagged).mean(axis=1)
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
        target = None if name == specs.NO_ATTACK else _target(name)
        run = run.replace(", ", "\n") if target is None else f"backdoor to\n{target}"
        found[run] = own.scores[device][mask], own.errors[device][mask]
    limit = float(np.asarray(trained.calibration.thresholds)[device])
    return fedsecure_plots.distribution_plot(found, limit)
