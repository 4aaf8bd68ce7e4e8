"""Starts a study in several processes, and ends them all where one dies.

On one machine:

  python -m experiments.launch --processes 4 -- \\
      experiments.fltrust_mnist --preset demo --cores 1 --out runs/four

On a cluster, once a task, under SLURM, Open MPI or Kubernetes, which say who is who:

  srun --ntasks=4 python -m experiments.launch --distributed auto -- \\
      experiments.fltrust_mnist --data-dir DIR --out SHARED/runs/four

All processes must see the same folder --out. Process 0 writes the results and shows
the progress. Where a process dies, the job ends within seconds (on another machine,
within half a minute), and the same command with --resume goes on from the last
checkpoint, with as many processes as you like.
"""

import ctypes
import dataclasses
import importlib.util
import signal
import socket
import subprocess
import sys
import time

import tyro

PR_SET_PDEATHSIG = 1  # in sys/prctl.h
GRACE = 2.0  # seconds from asking a process to end to ending it


@dataclasses.dataclass(frozen=True)
class Config:
    """Starts a study in several processes, and ends them all where one dies."""

    #: Processes on this machine; they find each other by themselves.
    processes: int = 1
    #: auto: this is one process of a job of SLURM, Open MPI or Kubernetes; or
    #: HOST:PORT,PROCESSES,ID: where process 0 listens, how many there are, and which
    #: this one is.
    distributed: str | None = None


def commands(config: Config, study: list[str]) -> list[list[str]]:
    """The command of every process.

    Raises:
        ValueError: no study, or options that do not go together.
    """
    if not study or study[0].startswith("-"):
        raise ValueError(
            "expected a study after --, as in: -- experiments.fltrust_mnist --preset "
            f"demo; got {' '.join(study) or 'nothing'}."
        )
    try:
        known = importlib.util.find_spec(study[0]) is not None
    except (ImportError, ValueError):
        known = False
    if not known:
        raise ValueError(
            f"there is no module {study[0]}; expected one with --distributed, as "
            "experiments.fltrust_mnist."
        )
    if config.processes < 1:
        raise ValueError(f"--processes must be at least 1; got {config.processes}.")
    if config.distributed is not None and config.processes > 1:
        raise ValueError(
            "--distributed says that this is one process of a job; drop it, or "
            "--processes."
        )
    python = [sys.executable, "-m", *study, "--distributed"]
    if config.distributed is not None:
        return [[*python, config.distributed]]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    count = config.processes
    return [[*python, f"localhost:{port},{count},{i}"] for i in range(count)]


def wait(children: list[subprocess.Popen]) -> int | None:
    """Waits until all have ended well, or one has not: its number."""
    while True:
        codes = [child.poll() for child in children]
        for i, code in enumerate(codes):
            if code:
                return i
        if all(code == 0 for code in codes):
            return None
        time.sleep(0.1)


def end(children: list[subprocess.Popen]) -> None:
    """Ends what still runs: what waits for a lost process does not end by itself."""
    for child in children:
        if child.poll() is None:
            child.terminate()
    deadline = time.monotonic() + GRACE
    for child in children:
        try:
            child.wait(max(deadline - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def end_with_parent() -> None:
    """Has this process ended with its parent, however that ends, where Linux can."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def why(number: int, count: int, code: int) -> str:
    """What is to be said of a process that did not end well."""
    if code > 0:
        return (
            f"error: process {number} of {count} ended with exit code {code}, and with "
            "it the job. What it said is above."
        )
    what = signal.Signals(-code).name
    if -code == signal.SIGKILL:
        what += ", as the system does where memory runs out"
    if -code == signal.SIGABRT:
        what += ", as JAX does where another process of the job is lost, or never came"
    return (
        f"error: process {number} of {count} was ended by {what}, and with it the job. "
        "The same command with --resume goes on from the last checkpoint."
    )


def main() -> None:
    arguments = sys.argv[1:]
    place = arguments.index("--") if "--" in arguments else len(arguments)
    own, study = arguments[:place], arguments[place + 1 :]
    prog = "python -m experiments.launch"
    config = tyro.cli(Config, args=own, description=__doc__, prog=prog)
    try:
        all_commands = commands(config, study)
    except ValueError as error:
        sys.exit(f"error: {error}")
    # So a batch system or a closed terminal ends a job; what was started ends with it.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    children: list[subprocess.Popen] = []
    try:
        for command in all_commands:
            children.append(subprocess.Popen(command, preexec_fn=end_with_parent))
        failed = wait(children)
        if failed is not None:
            sys.exit(why(failed, len(children), children[failed].returncode))
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        end(children)


if __name__ == "__main__":
    main()
