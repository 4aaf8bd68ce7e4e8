"""The detectors of the FedSecure study: trained once, kept beside the run."""

import contextlib
import functools
import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import fedjax_sim as fs
from experiments import results, runner
from fedjax_sim.client_defenses.fedsecure import Calibration, Scale, screen
from fedjax_sim.client_defenses.reference_model import Detector, Fold, Training
from fedjax_sim.data.series import SeriesFederation
from fedjax_sim.models import Autoencoder
from fedjax_sim.state import POISON
from fedjax_sim.types import ClientData, DataAttack, MakeSamples, RoundContext

LAYERS = (32, 16)


class Trained(NamedTuple):
    """What a part's devices are given.

    Attributes:
        detector: reference model and classifier.
        calibration: of every device.
        training: how it went; None where nothing was trained yet.
    """

    detector: Detector
    calibration: Calibration
    training: Training | None


def untrained(config: Any, devices: SeriesFederation) -> Trained:
    """A detector of the right shapes that has learned nothing."""
    count, features = len(devices.devices), len(devices.features)
    net = Autoencoder(config.detector_hidden)
    windows = jnp.zeros((1, config.window, features))
    shapes = jax.eval_shape(net.init, jax.random.key(0), windows)["params"]
    sizes = (1, *LAYERS, 1)
    pairs = itertools.pairwise(sizes)
    layers = tuple((jnp.zeros((n, m)), jnp.zeros(m)) for n, m in pairs)
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    zeros = jnp.zeros(count)
    own = Calibration(Scale(zeros, zeros + 1), zeros + 0.5)
    return Trained(Detector(params, layers, jnp.zeros(())), own, None)


@contextlib.contextmanager
def or_nothing(config: Any) -> Iterator[None]:
    """Leaves no run behind that could never be trained, and would be in the way."""
    try:
        yield
    except ValueError:
        if not config.resume:
            for path in (config.out / "config.json", *config.out.glob("detector-*")):
                path.unlink(missing_ok=True)
        raise


def load_or_train(
    config: Any,
    part: str,
    devices: SeriesFederation,
    make_samples: MakeSamples,
    console: Console,
) -> Trained:
    """The detector of a part: as it was kept in the run's folder, else trained anew.

    Raises:
        ValueError: too few windows, none of which stands out, or a training that
            diverged or taught nothing.
    """
    path, key = config.out / f"detector-{part}.npz", results.config_key(config)
    kept = _load(path, untrained(config, devices), key)
    if kept is not None:
        console.print(f"{part}: the detector is that of {path}")
        return kept
    if path.is_file():
        console.print(f"{part}: {path} is damaged or of another run: trained anew")
    windows, device = fs.client_defenses.clean_windows(devices.history, make_samples)
    console.print(
        f"{part}: the reference model learns from {len(windows)} windows of "
        f"{len(devices.devices)} devices, {config.detector_epochs} epochs"
    )
    start = time.perf_counter()
    with runner.progress_bar(console) as progress:
        task = progress.add_task("epochs", total=config.detector_epochs)

        def on_epoch(number: int, loss: float, held_out: float) -> None:
            losses = f"loss {loss:.3g}, held out {held_out:.3g}"
            progress.update(task, completed=number, description=f"epochs, {losses}")
            if number % max(1, config.detector_epochs // 5) == 0:
                progress.console.print(
                    f"{part}: epoch {number}/{config.detector_epochs}, {losses}"
                )

        try:
            detector, training = fs.client_defenses.train_detector(
                jax.random.key(config.seed),
                windows,
                device,
                hidden=config.detector_hidden,
                epochs=config.detector_epochs,
                batch_size=config.batch_size,
                layers=LAYERS,
                on_epoch=on_epoch,
            )
            own = fs.client_defenses.calibrate(detector, devices.history, make_samples)
        except ValueError as error:
            hint = " Or leave this part out: --history 0." if part == "later" else ""
            raise ValueError(f"part {part}: {error}{hint}") from None
    found = Trained(detector, own, training)
    console.print(
        f"{part}: loss {training.train_loss[-1]:.3g}, held out "
        f"{training.val_loss[-1]:.3g}, in {time.perf_counter() - start:.0f} s"
    )
    temporary = path.with_name("tmp-" + path.name)
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(found)]
    np.savez(temporary, *leaves, key=key)
    os.replace(temporary, path)
    return found


def _load(path: Path, blank: Trained, key: str) -> Trained | None:
    """What was kept, if it is there, whole, and of this run."""
    if not path.is_file():
        return None
    nothing: Any = np.zeros(0)
    fields: dict[str, Any] = dict.fromkeys(Training._fields, nothing)
    fields |= {"folds": Fold(*[nothing] * len(Fold._fields))}
    training = Training(**fields | {"example": (nothing, nothing)})
    like = blank._replace(training=training)
    shapes, structure = jax.tree.flatten(like)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            leaves = [archive[f"arr_{i}"] for i in range(len(shapes))]
            if str(archive["key"]) != key:
                return None
    except Exception:  # damage shows in many ways, all with the same remedy
        return None
    found: Trained = jax.tree.unflatten(structure, leaves)
    for old, new in zip(jax.tree.leaves(blank), jax.tree.leaves(found[:2])):
        if np.shape(old) != np.shape(new) or not np.isfinite(new).all():
            return None
    # The networks are applied by jax; what the report reads stays NumPy.
    return found._replace(
        detector=jax.tree.map(jnp.asarray, found.detector),
        calibration=jax.tree.map(jnp.asarray, found.calibration),
    )


class Screened(NamedTuple):
    """Scores and errors of every window of every device: ``[N, T]`` and who has them.

    ``mask`` says where there is a window; ``flagged`` is the share ``[N]`` of them that
    is above the device's threshold.
    """

    scores: np.ndarray
    errors: np.ndarray
    mask: np.ndarray
    flagged: np.ndarray


def screen_devices(
    config: Any,
    devices: SeriesFederation,
    trained: Trained,
    make_samples: MakeSamples,
    attack: DataAttack | None,
) -> Screened:
    """What each device finds if it is the poisoned one; nobody is where there is none.

    The noise of an attack is that of the run of the first seed.
    """
    data = _data(config, devices, attack)
    found = _screen(make_samples, trained.detector, trained.calibration.scale, data)
    scores, errors, mask = (np.asarray(values) for values in found)
    limits = np.asarray(trained.calibration.thresholds)[:, None]
    flagged = (mask & (scores > limits)).sum(axis=1) / np.maximum(mask.sum(axis=1), 1)
    return Screened(scores, errors, mask, flagged)


def _data(
    config: Any, devices: SeriesFederation, attack: DataAttack | None
) -> ClientData:
    """What each device would train on if it were poisoned; clean without an attack."""
    ids = jnp.arange(len(devices.devices))
    data = devices.clients.gather(ids)
    if attack is None:
        return data
    key = jax.random.fold_in(jax.random.key(config.seed), POISON)

    def poison(id: jax.Array, own: ClientData) -> ClientData:
        context = RoundContext(round=jnp.int32(0), client_ids=id, rank=jnp.int32(0))
        return attack.poison(jax.random.fold_in(key, id), own, context)

    # Not compiled: an attack of another strength would be another program.
    return jax.vmap(poison)(ids, data)


def out_of_reach(
    config: Any,
    devices: SeriesFederation,
    make_samples: MakeSamples,
    attack: DataAttack,
    target: int | None,
) -> list[int]:
    """Numbers, from 1, of the devices that an attack would leave as they are.

    Of a backdoor those without a changed window that is labelled as its target.
    """
    clean, poisoned = _data(config, devices, None), _data(config, devices, attack)
    wanted = jnp.int32(-1 if target is None else target)
    found = np.asarray(_reached(make_samples, clean, poisoned, wanted))
    return [int(i) + 1 for i in np.flatnonzero(~found)]


@functools.partial(jax.jit, static_argnums=0)
def _reached(
    make_samples: MakeSamples, clean: ClientData, poisoned: ClientData, target: Any
) -> jax.Array:
    def one(both: tuple[ClientData, ClientData]) -> jax.Array:
        before, after = map(make_samples, both)
        changed = (before.inputs != after.inputs).any(axis=(1, 2))
        either = changed | (before.targets != after.targets)
        backdoor = changed & (after.targets == target)
        return (after.valid & jnp.where(target < 0, either, backdoor)).any()

    return jax.lax.map(one, (clean, poisoned))


@functools.partial(jax.jit, static_argnums=0)
def _screen(
    make_samples: MakeSamples, detector: Detector, scale: Scale, data: ClientData
) -> Any:
    def one(own: tuple[ClientData, Scale]) -> Any:
        samples = make_samples(own[0])
        return *screen(detector, samples, own[1]), samples.mask

    return jax.lax.map(one, (data, scale))
