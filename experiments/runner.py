"""What every study shares: the run directory, segments, progress, resume, results.

A study is a list of phases. Each phase is a comparison run for a number of rounds, from
a key or forked from a system of the phase before. Between the segments of a phase its
checkpoint is written and progress is shown; inside there is only the compiled scan.
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

import fedjax_sim as fs
from experiments.results import (
    WHERE,
    as_json,
    config_key,
    versions,
    write_atomically,
    write_clients,
    write_metrics,
)
from fedjax_sim import checkpoint

LONG_RUN = 5e9  # parameters x local steps above which the time is estimated first


class Phase(NamedTuple):
    """One comparison and how long it runs.

    Attributes:
        name: folder of its checkpoints.
        systems: the simulations by name.
        num_rounds: rounds of this phase.
        fork_from: system of the phase before whose state every system takes over; None
            to start from the key.
    """

    name: str
    systems: Mapping[str, fs.Simulation]
    num_rounds: int
    fork_from: str | None = None


class Result(NamedTuple):
    """What a finished study hands to its report."""

    histories: dict[str, fs.History]
    compile_seconds: float
    run_seconds: float


def check_common(config: Any) -> None:
    """Validates the options every study has, before anything slow.

    Raises:
        ValueError: with what was expected and what came.
    """
    for name in ("rounds", "eval_every", "num_seeds"):
        if getattr(config, name) < 1:
            raise ValueError(
                f"--{name.replace('_', '-')} must be at least 1; got "
                f"{getattr(config, name)}."
            )
    if config.segment is not None and config.segment < 1:
        raise ValueError(f"--segment must be at least 1; got {config.segment}.")
    if config.seed < 0:
        raise ValueError(f"--seed must not be negative; got {config.seed}.")


def check_out(config: Any) -> None:
    """Checks the run directory before anything slow: new, or the same run to resume.

    Raises:
        ValueError: it holds results and ``resume`` is not set, nothing to resume,
            another run's configuration, or a folder that cannot be written.
    """
    out: Path = config.out
    file = out / "config.json"
    key = config_key(config)
    if file.exists():
        try:
            found = json.loads(file.read_text())
            old, old_key, _ = found["config"], found["key"], found["data"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file} is not a run's configuration ({error}). Choose another --out."
            ) from None
        if not config.resume:
            raise ValueError(
                f"--out {out} already holds a run. Add --resume to continue or extend "
                "it, or choose another --out."
            )
        if old_key != key:
            new = as_json(config)
            changed = sorted(
                k
                for k in old.keys() | new.keys()
                if k not in (*WHERE, "rounds") and old.get(k) != new.get(k)
            )
            what = ", ".join(f"{k}: {old.get(k)} -> {new.get(k)}" for k in changed)
            raise ValueError(
                f"--resume: {out} was started with another configuration ({what}). "
                "Repeat the options it was started with, or choose another --out."
            )
    elif config.resume:
        raise ValueError(
            f"--resume: {out} holds no run ({file.name} is missing). Drop --resume to "
            "start one."
        )
    elif out.is_dir() and any(out.iterdir()):
        raise ValueError(
            f"--out {out} is not empty and holds no run. Choose another --out."
        )
    existing = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise _unwritable(out, "not a folder you may write to")


def _unwritable(out: Path, why: str | None) -> ValueError:
    return ValueError(
        f"--out {out} cannot be written ({why}). Choose a folder you may write to."
    )


def open_out(config: Any, source: str) -> None:
    """Makes the run directory and writes ``config.json``, just before training.

    Args:
        config: the study's configuration.
        source: ``Dataset.source``, with the fingerprint of the data that was found.

    Raises:
        ValueError: the run to resume was trained on other data, or the folder cannot be
            written.
    """
    out: Path = config.out
    file = out / "config.json"
    content = {
        "key": config_key(config),
        "config": as_json(config),
        "data": source,
        "versions": versions(),
    }
    if config.resume:
        before = json.loads(file.read_text())["data"]
        if before != source:
            raise ValueError(
                f"--resume: {out} was started on other data ({before}; now {source}). "
                "Point --data-dir to the data it was started with."
            )
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise _unwritable(out, error.strerror) from None


def run_study(config: Any, phases: Sequence[Phase], console: Console) -> Result:
    """Runs or resumes all phases and writes metrics.csv and clients.npz as it goes."""
    # Seed s of several is exactly the run with --seed s.
    keys = [jax.random.key(config.seed + s) for s in range(config.num_seeds)]
    key = keys[0] if len(keys) == 1 else jax.numpy.stack(keys)
    params = {}
    seconds = {"compile": 0.0, "run": 0.0}
    histories: dict[str, fs.History] = {}
    states: dict[str, fs.RoundState] = {}
    for phase in phases:
        comparison = fs.compare(phase.systems)
        if phase.fork_from is None:
            start = comparison.init(key)
        else:
            base = states[phase.fork_from]
            start = {name: sim.fork(base) for name, sim in phase.systems.items()}
        states, found = _run_phase(
            config, phase, comparison, start, histories, seconds, console
        )
        histories.update(found)
        params.update({name: state.params for name, state in states.items()})
    checkpoint.save_model(config.out, params)
    return Result(histories, seconds["compile"], seconds["run"])


def _run_phase(
    config: Any,
    phase: Phase,
    comparison: fs.Comparison,
    states: dict[str, fs.RoundState],
    earlier: dict[str, fs.History],
    seconds: dict[str, float],
    console: Console,
) -> tuple[dict[str, fs.RoundState], dict[str, fs.History]]:
    directory = config.out / "checkpoints" / phase.name
    first = _round_of(states)
    last = first + phase.num_rounds
    done = first
    history: dict[str, fs.History] = {}
    latest = checkpoint.latest_round(directory)
    if latest is not None:
        if latest > last:
            raise ValueError(
                f"{config.out} is already at round {latest}; --rounds asks for {last}. "
                "Give at least that many rounds, or choose another --out."
            )

        def template(round: int) -> Any:
            return comparison.shapes(states, round - first, config.eval_every)

        states, history = checkpoint.load(directory, latest, template)
        history = jax.device_get({name: history[name] for name in phase.systems})
        done = latest
        console.print(f"resumed {phase.name} at round {done}")
    segment = config.segment or default_segment(phase.num_rounds, config.eval_every)
    remaining = last - done
    if remaining:
        announce_duration(comparison, remaining, config, console)
    compiled: set[int] = set()
    with _progress(console) as progress:
        task = progress.add_task(phase.name, total=phase.num_rounds, accuracy="")
        progress.update(task, completed=done - first)
        while done < last:
            length = min(segment, last - done)
            if length not in compiled:
                progress.update(task, accuracy="compiling")
                seconds["compile"] += _timed(
                    lambda n=length, s=states: comparison.lower(
                        s, n, config.eval_every
                    ).compile()
                )[0]
                compiled.add(length)
            took, (states, new) = _timed(
                lambda n=length, s=states: comparison.run(
                    num_rounds=n, eval_every=config.eval_every, states=s, last=last
                )
            )
            seconds["run"] += took
            if history:
                new = {n: _append(history[n], new[n]) for n in new}
            history = new
            done += length
            checkpoint.save(directory, done, (states, history))
            shown = {n: _drop_early_ends(h, config, last) for n, h in history.items()}
            write_metrics(config.out / "metrics.csv", earlier | shown, config.seed)
            accuracy = "  ".join(
                f"{n} {latest_accuracy(h):.3f}" for n, h in shown.items()
            )
            progress.update(task, completed=done - first, accuracy=accuracy)
            if not console.is_terminal:
                console.print(
                    f"{phase.name} round {done}/{last}: {accuracy}", soft_wrap=True
                )
    shown = {n: _drop_early_ends(h, config, last) for n, h in history.items()}
    write_metrics(config.out / "metrics.csv", earlier | shown, config.seed)
    write_clients(config.out / "clients.npz", earlier | shown)
    return states, shown


def _timed(call: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    result = jax.block_until_ready(call())
    return time.perf_counter() - start, result


def _round_of(states: Mapping[str, fs.RoundState]) -> int:
    return int(np.ravel(next(iter(states.values())).round)[0])


def _append(old: fs.History, new: fs.History) -> fs.History:
    """Joins two stretches of a run on the round axis (after the seed axis, if any)."""
    axis = np.ndim(new.round) - 1
    return jax.tree.map(lambda a, b: np.concatenate([a, b], axis=axis), old, new)


def _drop_early_ends(history: fs.History, config: Any, last: int) -> fs.History:
    """Without the extra evaluation at the end of a run that was then extended."""
    rounds = np.asarray(history.round)
    keep = (rounds % config.eval_every == 0) | (rounds == last)
    return history._replace(
        accuracy=np.where(keep, history.accuracy, np.nan).astype(np.float32),
        loss=np.where(keep, history.loss, np.nan).astype(np.float32),
    )


def latest_accuracy(history: fs.History) -> float:
    """Mean over seeds of the last evaluated accuracy."""
    accuracy = np.atleast_2d(history.accuracy)
    known = accuracy[:, ~np.isnan(accuracy).any(axis=0)]
    return float(known[:, -1].mean()) if known.size else float("nan")


def default_segment(num_rounds: int, eval_every: int) -> int:
    """The segment nearest a twentieth of the run: whole evaluations, no remainder.

    A segment that does not divide the run costs a second compilation.
    """
    target = max(1, num_rounds // 20)
    divisors = [n for n in range(1, num_rounds + 1) if num_rounds % n == 0]
    return min(divisors, key=lambda n: (n % eval_every != 0, abs(n - target)))


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[accuracy]}"),
        console=console,
        disable=not console.is_terminal,
    )


def announce_duration(
    comparison: fs.Comparison, num_rounds: int, config: Any, console: Console
) -> None:
    """Says how long a long run will take on this device, from a short measurement."""
    sims = comparison.systems.values()
    sim = next(iter(sims))
    sizes = np.asarray(sim.clients.sizes())
    steps = float(np.mean(sim.client_update.num_steps(sizes))) * sim.cohort_size
    steps = (
        config.num_seeds
        * num_rounds
        * sum(steps + ("root_update" in s.needs) * (s.root_steps or 0) for s in sims)
    )
    params = sim.model.init(jax.random.key(0))
    if steps * sum(leaf.size for leaf in jax.tree.leaves(params)) < LONG_RUN:
        return
    probe_steps = 20
    update = sim.client_update.with_steps(probe_steps)
    chunk = min(sim.client_chunk, sim.cohort_size)

    @jax.jit
    def probe(clients: Any, params: Any) -> Any:
        def one(client: Any) -> Any:
            data = clients.gather(client)
            state = update.init(params)
            return update.apply(sim.model, jax.random.key(0), params, data, state, 0)[0]

        return jax.vmap(one)(np.arange(chunk))

    compiled = probe.lower(sim.clients, params).compile()
    jax.block_until_ready(compiled(sim.clients, params))
    took = min(_timed(lambda: compiled(sim.clients, params))[0] for _ in range(3))
    total = took / (probe_steps * chunk) * steps
    console.print(
        f"{num_rounds} rounds of {len(comparison.systems)} systems are "
        f"{steps:,.0f} local steps: about {_duration(total)} on this device "
        f"({jax.devices()[0].device_kind}), evaluation apart. It can be stopped and "
        "continued with --resume."
    )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def enable_compilation_cache() -> None:
    """Keeps compiled programs between processes, in the user's cache folder."""
    from fedjax_sim.data.cache import cache_dir

    if not jax.config.values["jax_compilation_cache_dir"]:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
