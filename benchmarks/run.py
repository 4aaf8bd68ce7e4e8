"""Speed beside the peers: runs every arm in its own environment, writes RESULTS.md.

    make bench-peers    once: the environments of PyTorch with ByzFL, and of Flower
    make bench          all workloads, under half an hour on two cores
    make bench ARGS='--only training aggregation'

An arm is one process that does one workload with one library. The arms of a workload
take turns, ``--passes`` times, so that a machine that changes its speed changes it for
all of them; what is reported is the median over passes, and their range.
"""

import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import tyro

from benchmarks import report, workloads
from fedjax_sim.sharding import usable_cores

ROOT = Path(__file__).parents[1]
PEERS = {
    "torch": (".venv-byzfl", "torch_arm.py"),
    "byzfl": (".venv-byzfl", "byzfl_arm.py"),
    "flower": (".venv-flower", "flower_arm.py"),
}
OURS = ("fedjax", "naive")
Workload = Literal["training", "aggregation", "round", "matrix", "flower", "demo"]
Result = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Config:
    """Measures this library and its peers side by side on this machine."""

    #: Workloads to run; those of an earlier run in --out are kept.
    only: tuple[Workload, ...] = (
        "training",
        "aggregation",
        "round",
        "matrix",
        "flower",
        "demo",
    )
    #: Networks of the training workload; others of an earlier run are kept.
    models: tuple[Literal["cnn", "mlp", "digits_cnn"], ...] = (
        "cnn",
        "mlp",
        "digits_cnn",
    )
    #: Times that the arms of the training workload take turns.
    passes: int = 3
    #: Folder with idx/mnist/*.gz; without it the matrix is left out.
    data_dir: Path = Path(os.environ.get("FEDJAX_SIM_DATA") or "../shared/data")
    #: Folder for results.json, RESULTS.md and the plots.
    out: Path = Path("benchmarks")
    #: Cores of the CPU for every arm.
    cores: int = usable_cores()


class ArmError(Exception):
    """An arm that could not run, with the reason."""


def arm(library: str, name: str, **options: Any) -> Result:
    """Runs one arm and returns what it printed last.

    Raises:
        ArmError: its environment is not there, or it failed.
    """
    if library in OURS:
        command = [sys.executable, "-m", f"benchmarks.arms.{library}_arm"]
    else:
        folder, file = PEERS[library]
        python = ROOT / folder / "bin" / "python"
        if not python.exists():
            raise ArmError(f"no {folder}: run 'make bench-peers'")
        command = [str(python), str(ROOT / "benchmarks" / "arms" / file)]
    command += [name, json.dumps(options)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ArmError(f"{library} {name} failed: {last}")
    found: Result = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def take_turns(
    calls: dict[str, Callable[[], Result]], passes: int
) -> dict[str, Result]:
    """Every arm once a pass. ``rate`` is the median over passes, ``range`` its ends."""
    found: dict[str, list[Result]] = {name: [] for name in calls}
    failed: dict[str, str] = {}
    for _ in range(passes):
        for name, call in calls.items():
            if name not in failed:
                try:
                    found[name].append(call())
                    print(
                        f"    {name}: {found[name][-1]['rate']:,.0f} samples/s",
                        flush=True,
                    )
                except ArmError as error:
                    failed[name] = str(error)
    results: dict[str, Result] = {n: {"failed": why} for n, why in failed.items()}
    for name, runs in found.items():
        if name in failed:
            continue
        rates = [run["rate"] for run in runs]
        results[name] = {
            "rate": statistics.median(rates),
            "range": [min(rates), max(rates)],
            **{
                key: statistics.median(run[key] for run in runs)
                for key in ("compile", "first", "peak_mb")
                if key in runs[0]
            },
        }
    return results


def training(config: Config) -> Result:
    """Local training of 100 clients, samples a second; and this machine's sgemm."""
    threads = sorted({1, config.cores})
    models = {}
    for model in config.models:
        print(f"  {model}")
        # The naive program is too slow for all clients where it convolves.
        part = {"clients": 20, "samples": 20} if model == "cnn" else {}
        sizes = {k: workloads.TRAINING[model][k] for k in ("clients", "samples")}
        calls: dict[str, Callable[[], Result]] = {
            "fedjax_sim": lambda m=model: arm(
                "fedjax", "train", model=m, cores=config.cores
            ),
            "naive vmap": lambda m=model, s=sizes | part: arm(
                "naive", "train", model=m, **s
            ),
        }
        if config.cores > 1:
            calls["fedjax_sim, one device"] = lambda m=model: arm(
                "fedjax", "train", model=m, cores=1
            )
        for count in threads:
            calls[f"PyTorch loop, {count} thread(s)"] = lambda m=model, t=count: arm(
                "torch", "train", model=m, threads=t
            )
        calls["torch.func.vmap"] = lambda m=model: arm(
            "torch", "vmap", model=m, threads=config.cores
        )
        models[model] = take_turns(calls, config.passes)
    peak = {
        "jax": arm("fedjax", "sgemm")["gflops"],
        "torch": tried(lambda: arm("torch", "sgemm", threads=config.cores)["gflops"]),
    }
    return {"models": models, "sgemm": peak, "passes": config.passes}


def aggregation(config: Config) -> Result:
    """Seconds of every rule that ByzFL has too, on one matrix."""
    size = {"rows": workloads.ROWS, "columns": workloads.COLUMNS}
    large = workloads.LARGE
    found = {
        "size": size,
        "fedjax_sim": arm(
            "fedjax", "aggregate", rules=large, assumed=workloads.ASSUMED, **size
        ),
        "byzfl": tried(
            lambda: arm("byzfl", "aggregate", rules=large, threads=config.cores, **size)
        ),
        "torch": tried(
            lambda: arm(
                "torch",
                "aggregate",
                assumed=workloads.ASSUMED,
                threads=config.cores,
                **size,
            )
        ),
    }
    size = {"rows": workloads.FEW_ROWS, "columns": workloads.COLUMNS}
    few = workloads.FEW
    found["few"] = {
        "size": size,
        "fedjax_sim": arm(
            "fedjax", "aggregate", rules=few, assumed=workloads.FEW_ASSUMED, **size
        ),
        "byzfl": tried(
            lambda: arm("byzfl", "aggregate", rules=few, threads=config.cores, **size)
        ),
    }
    return found


def one_round(config: Config) -> Result:
    """Seconds of a round's training and of the rest of it."""
    return arm("fedjax", "parts", cores=config.cores)


def matrix(config: Config) -> Result:
    """Rules x attacks on MNIST with ByzFL's loop and with one program an attack."""
    folder = config.data_dir / "idx" / "mnist"
    if not folder.is_dir():
        raise ArmError(f"no MNIST in {folder}: pass --data-dir")
    what = {k: workloads.MATRIX[k] for k in ("model", "rules", "attacks", "rounds")}
    ours = arm(
        "fedjax", "matrix", folder=str(config.data_dir), cores=config.cores, **what
    )
    print(f"    fedjax_sim: {ours['total']:.0f} s", flush=True)
    theirs = arm("byzfl", "matrix", folder=str(folder), threads=config.cores, **what)
    print(f"    ByzFL: {theirs['total']:.0f} s", flush=True)
    return {"fedjax_sim": ours, "byzfl": theirs, **what}


def flower(config: Config) -> Result:
    """A round of FedAvg in Flower's simulation, and here."""
    size = {"clients": workloads.FLOWER["clients"]}
    size["samples"] = workloads.FLOWER["samples"]
    ours = arm("fedjax", "train", model="cnn", cores=config.cores, **size)
    theirs = arm(
        "flower",
        "train",
        model="cnn",
        cores=config.cores,
        rounds=workloads.FLOWER["rounds"],
        **size,
    )
    return {"fedjax_sim": ours, "flower": theirs, **workloads.FLOWER}


def demo(config: Config) -> Result:
    """``make demo`` twice, from an empty cache of compiled programs and from a full."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("first", "second"):
            out = Path(folder) / name
            command = [sys.executable, "-m", "experiments.fltrust_mnist"]
            command += ["--preset", "demo", "--out", str(out)]
            command += ["--cores", str(config.cores)]
            environment = {**os.environ, "FEDJAX_SIM_CACHE": f"{folder}/cache"}
            start = time.perf_counter()
            subprocess.run(
                command, cwd=ROOT, env=environment, check=True, capture_output=True
            )
            wall = time.perf_counter() - start
            summary = json.loads((out / "summary.json").read_text())
            found[name] = {
                "wall": wall,
                "compile": summary["compile_seconds"],
                "run": summary["run_seconds"],
            }
    return found


def tried(call: Callable[[], Any]) -> Any:
    """What a call gives, or why it could not be made."""
    try:
        return call()
    except ArmError as error:
        return {"failed": str(error)}


def machine() -> Result:
    """What the figures depend on."""
    versions = arm("fedjax", "version")["versions"]
    for library in PEERS:
        found = tried(lambda name=library: arm(name, "version")["versions"])
        if "failed" not in found:
            versions |= found
    try:
        information = Path("/proc/cpuinfo").read_text()
        names = [x for x in information.splitlines() if x.startswith("model name")]
        processor = names[0].split(":")[1].strip()
    except (OSError, IndexError):
        processor = platform.processor() or platform.machine()
    return {"processor": processor, "versions": versions}


RUN: dict[str, Callable[[Config], Result]] = {
    "training": training,
    "aggregation": aggregation,
    "round": one_round,
    "matrix": matrix,
    "flower": flower,
    "demo": demo,
}


def main() -> None:
    config = tyro.cli(Config, description=__doc__, prog="python -m benchmarks.run")
    if not 1 <= config.cores <= usable_cores():
        sys.exit(f"error: --cores must be from 1 to {usable_cores()}.")
    if config.passes < 1:
        sys.exit(f"error: --passes must be at least 1; got {config.passes}.")
    try:
        config.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"error: --out must be a folder: {error}")
    path = config.out / "results.json"
    try:
        results = json.loads(path.read_text()) if path.exists() else {}
        if results:
            results["machine"]
    except (ValueError, KeyError, TypeError) as error:
        sys.exit(
            f"error: {path} is not what an earlier run wrote ({error!r}). Delete it, "
            "or choose another --out."
        )
    here = machine() | {"cores": config.cores}
    if results and results["machine"] != here:
        print("the results there are of another machine or other versions: left behind")
        results = {}
    results["machine"] = here
    for name in config.only:
        print(name, flush=True)
        start = time.perf_counter()
        found = tried(lambda name=name: RUN[name](config))
        if "models" in found:
            found["models"] = results.get(name, {}).get("models", {}) | found["models"]
        results[name] = found
        results[name]["took"] = round(time.perf_counter() - start)
        if "failed" in results[name]:
            print(f"  {results[name]['failed']}")
        path.write_text(json.dumps(results, indent=1) + "\n")
    report.write(results, config.out)
    print(f"results in {config.out / 'RESULTS.md'}")


if __name__ == "__main__":
    main()
