"""The run directory: whether a run may start there, and who holds it."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.results import (
    WHEN,
    WHERE,
    as_json,
    config_key,
    versions,
    write_atomically,
)


def check_out(config: Any) -> None:
    """Checks the run directory before anything slow: new, or the same run to resume.

    Where there is nothing to resume the run starts, so that the line of a sweep can be
    given again and again.

    Raises:
        ValueError: it holds results and ``resume`` is not set, another run's
            configuration, or a folder that cannot be written.
    """
    out: Path = config.out
    file = out / "config.json"
    key = config_key(config)
    if file.exists():
        try:
            found = json.loads(file.read_text())
            old, old_key = dict(found["config"]), found["key"]
            found["data"], found["versions"]
        except (OSError, ValueError, KeyError, TypeError) as error:
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
            old = {k: v for k, v in WHEN.items() if k in new} | old
            changed = sorted(
                k
                for k in old.keys() | new.keys()
                if k not in (*WHERE, "rounds", "long_rounds", "sweep_rounds")
                and old.get(k) != new.get(k)
            )
            what = ", ".join(f"{k}: {old.get(k)} -> {new.get(k)}" for k in changed)
            raise ValueError(
                f"--resume: {out} was started with another configuration ({what}). "
                "Repeat the options it was started with, or choose another --out."
            )
    else:
        check_unused(out, "run")
    check_writable(out)


def check_unused(out: Path, kind: str) -> None:
    """ValueError where a folder holds something, which is no ``kind`` of results."""
    if out.is_dir() and any(p.suffix != ".tmp" for p in out.iterdir()):
        raise ValueError(
            f"--out {out} is not empty and holds no {kind}. Choose another --out."
        )


def _unwritable(out: Path, why: str | None) -> ValueError:
    return ValueError(
        f"--out {out} cannot be written ({why}). Choose a folder you may write to."
    )


@contextlib.contextmanager
def open_out(config: Any, source: str) -> Iterator[None]:
    """Holds the run directory for one process and writes ``config.json``.

    To be entered just before training, when nothing can be refused any more. Versions
    and devices with which rounds were run before are kept there as ``earlier``.

    Args:
        config: the study's configuration.
        source: ``Dataset.source``, with the fingerprint of the data that was found.

    Raises:
        ValueError: the run to resume was trained on other data, another process is
            writing to the folder, or the folder cannot be written.
    """
    out: Path = config.out
    file = out / "config.json"
    content = {
        "key": config_key(config),
        "config": as_json(config),
        "data": source,
        "versions": versions(),
    }
    if config.resume and file.exists():
        before = json.loads(file.read_text())
        if before["data"] != source:
            raise ValueError(
                f"--resume: {out} was started on other data ({before['data']}; now "
                f"{source}). Point --data-dir to the data it was started with."
            )
        ran = [*before.get("earlier", []), before["versions"]]
        content["earlier"] = [v for v in ran if v != content["versions"]]
    with hold(out):
        if not config.resume and file.exists():
            raise _taken(out)
        write_atomically(file, json.dumps(content, indent=2) + "\n")
        yield


@contextlib.contextmanager
def hold(out: Path) -> Iterator[None]:
    """Makes the folder and holds it for one process.

    Raises:
        ValueError: another process holds it, or it cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        folder = os.open(out, os.O_RDONLY)
    except OSError as error:
        raise _unwritable(out, error.strerror) from None
    try:
        # The lock goes with the process, however it ends.
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(folder)
        raise _taken(out) from None
    try:
        yield
    finally:
        os.close(folder)


def check_writable(out: Path) -> None:
    """ValueError unless ``out`` is, or can become, a folder one may write to."""
    if out.is_symlink() and not out.exists():
        raise _unwritable(out, "a link to nowhere")
    existing = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise _unwritable(out, "not a folder you may write to")


def _taken(out: Path) -> ValueError:
    return ValueError(
        f"another process is running in --out {out}. Wait for it, or choose another "
        "--out."
    )
