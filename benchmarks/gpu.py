"""The figures of a GPU: forms of the convolution, training, the source study's rounds.

    python -m benchmarks.gpu --data-dir DIR --out gpu.json

Needs what fedjax_sim needs and, for the PyTorch loop, torch in the same environment.
Every part is written to the file once it is measured. Without a GPU it runs too, in
float32 alone. No GPU has been measured yet: see RESULTS.md.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fedjax_sim as fs
from benchmarks import workloads
from benchmarks.arms import fedjax_arm
from benchmarks.workloads import BATCH, MFLOP, TRAINING
from fedjax_sim.models.layers import patches

# The convolutions of FLTrust's CNN: input height and channels, output channels.
LAYERS = {"first": (28, 1, 30), "second": (13, 30, 50)}
PRECISIONS = ("float32", "tf32", "bf16")


def parse(args: list[str] | None = None) -> argparse.Namespace:
    """The command line; with argparse, so that nothing has to be installed there."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--clients", type=int, default=100, help="clients side by side (100)")
    add("--rounds", type=int, default=20, help="rounds that are timed (20)")
    add("--epochs", type=int, default=5, help="local epochs of those rounds (5)")
    add("--steps", type=int, default=50, help="steps of a timed convolution (50)")
    add("--data-dir", type=Path, help="folder with idx/mnist/*.gz, for the rounds")
    add("--out", type=Path, default=Path("gpu.json"), help="file of the results")
    config = parser.parse_args(args)
    for name in ("clients", "rounds", "epochs", "steps"):
        if getattr(config, name) < 1:
            parser.error(f"--{name} must be at least 1; got {getattr(config, name)}")
    if config.data_dir is not None and config.clients < 10:
        parser.error(
            "with --data-dir the clients are divided into a group for each of ten "
            f"digits: --clients must be at least 10; got {config.clients}"
        )
    if not config.out.parent.is_dir() or config.out.is_dir():
        parser.error(f"--out must be a file in a folder that exists; got {config.out}")
    return config


def by_patches(x: Any, kernel: Any) -> Any:
    """Patches and one matrix product."""
    windows = patches(x, *kernel.shape[:2])
    return windows @ kernel.reshape(-1, kernel.shape[-1])


def by_convolution(x: Any, kernel: Any) -> Any:
    """The device's own convolution."""
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@jax.custom_vjp
def by_both(x: Any, kernel: Any) -> Any:
    """The device's convolution forward, a matrix product for the kernel's gradient."""
    return by_convolution(x, kernel)


def _both_forward(x: Any, kernel: Any) -> Any:
    return by_convolution(x, kernel), (x, kernel)


def _both_backward(saved: Any, grad: Any) -> Any:
    x, kernel = saved
    (grad_x,) = jax.vjp(lambda x: by_convolution(x, kernel), x)[1](grad)
    windows = patches(x, *kernel.shape[:2])
    windows = windows.reshape(-1, windows.shape[-1])
    grad_kernel = windows.T @ grad.reshape(-1, grad.shape[-1])
    return grad_x, grad_kernel.reshape(kernel.shape)


by_both.defvjp(_both_forward, _both_backward)

FORMS: dict[str, tuple[Callable, bool]] = {
    "patches and a batched product": (by_patches, True),
    "grouped convolution, vmapped": (by_convolution, True),
    "grouped convolution, product for the kernel": (by_both, True),
    "convolution, one client after the other": (by_convolution, False),
}


def convolutions(config: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step, forward and both gradients, of every form and layer."""
    found: dict[str, Any] = {}
    for layer, (size, channels, features) in LAYERS.items():
        key = jax.random.key(0)
        x = jax.random.normal(key, (config.clients, BATCH, size, size, channels))
        kernels = jax.random.normal(key, (config.clients, 3, 3, channels, features))
        seconds = {}
        for name, (form, side_by_side) in FORMS.items():

            def gradients(x: Any, kernel: Any, form: Callable = form) -> Any:
                return jax.grad(lambda *a: jnp.sum(form(*a) ** 2), (0, 1))(x, kernel)

            every = jax.vmap(gradients)
            if not side_by_side:
                every = functools.partial(_one_by_one, gradients)

            def steps(x: Any, kernels: Any, every: Callable = every) -> Any:
                def step(carry: Any, _: Any) -> Any:
                    grad_x, grad_kernel = every(*carry)
                    # Both gradients are used, so that none is dropped.
                    return (x + 1e-9 * grad_x, carry[1] - 1e-9 * grad_kernel), None

                return jax.lax.scan(step, (x, kernels), length=config.steps)[0]

            run = jax.jit(steps)
            given = (x, kernels)
            took = workloads.measure(
                lambda r=run, a=given: jax.block_until_ready(r(*a))
            )
            seconds[name] = took["median"] / config.steps
            print(f"{layer}: {name}: {seconds[name] * 1e3:.3f} ms a step", flush=True)
        found[layer] = {"seconds": seconds, "fastest": min(seconds, key=seconds.get)}
    return found


def _one_by_one(f: Callable, x: Any, kernels: Any) -> Any:
    return jax.lax.map(lambda own: f(*own), (x, kernels))


def training(config: argparse.Namespace) -> dict[str, Any]:
    """Samples a second of local training, by precision; and of a PyTorch loop."""
    gpu = jax.default_backend() != "cpu"
    found: dict[str, Any] = {}
    for model in TRAINING:
        rates = {}
        for precision in PRECISIONS if gpu else PRECISIONS[:1]:
            took = fedjax_arm.train(
                model, cores=1, clients=config.clients, precision=precision
            )
            rates[precision] = took["rate"]
        try:
            from benchmarks.arms import torch_arm

            device = "cuda" if gpu else "cpu"
            took = torch_arm.train(model, threads=1, clients=10, device=device)
            rates["PyTorch loop"] = took["rate"]
        except (ImportError, RuntimeError) as error:
            print(f"no PyTorch loop: {error}")
        tflops = {name: rate * MFLOP[model] / 1e6 for name, rate in rates.items()}
        found[model] = {"rate": rates, "tflops": tflops}
        print(model, rates, flush=True)
    return found


def source_study(config: argparse.Namespace, data: fs.types.Dataset) -> dict[str, Any]:
    """Seconds a round of FLTrust and of the Dual-System, each on its own."""
    gpu = jax.default_backend() != "cpu"
    clients, root = fs.data.federate(
        data,
        num_clients=config.clients,
        partition=fs.data.label_bias(0.5),
        root_size=100,
        seed=0,
    )
    attackers = config.clients // 5
    rules = {
        "fltrust": fs.aggregators.fltrust(),
        "dual_system": fs.aggregators.dual_system(max_byzantine=attackers),
    }
    found: dict[str, Any] = {}
    for precision in PRECISIONS if gpu else PRECISIONS[:1]:
        for name, rule in rules.items():
            sim = fs.Simulation(
                model=fs.models.cnn(),
                clients=clients,
                root=root,
                test=data.test,
                client_update=fs.local_sgd(
                    optax.sgd(0.01),
                    epochs=config.epochs,
                    batch_size=BATCH,
                    precision=precision,
                ),
                attack=fs.attacks.sign_flip(5.0),
                num_byzantine=attackers,
                aggregator=rule,
            )
            rounds = config.rounds
            start = time.perf_counter()
            sim.run(jax.random.key(0), num_rounds=rounds, eval_every=rounds)
            first = time.perf_counter() - start
            start = time.perf_counter()
            _, history = sim.run(
                jax.random.key(0), num_rounds=rounds, eval_every=rounds
            )
            took = time.perf_counter() - start
            found[f"{name}, {precision}"] = {
                "first_call": first,
                "per_round": took / rounds,
                "minutes_of_1000": 1000 * took / rounds / 60,
                "accuracy": float(history.accuracy[-1]),
            }
            print(name, precision, found[f"{name}, {precision}"], flush=True)
    return found


def main() -> None:
    config = parse()
    data = None
    if config.data_dir is not None:
        data = fs.data.load("mnist", data_dir=config.data_dir)
    device = jax.devices()[0]
    found: dict[str, Any] = {
        "device": f"{len(jax.devices())} x {device.device_kind}",
        "versions": {"jax": jax.__version__, "numpy": np.__version__},
    }
    parts: dict[str, Callable[[], Any]] = {
        "sgemm": fedjax_arm.sgemm,
        "convolutions": lambda: convolutions(config),
        "training": lambda: training(config),
    }
    if data is not None:
        parts["source_study"] = lambda: source_study(config, data)
    for name, measure in parts.items():
        found[name] = measure()
        config.out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"results in {config.out}")


if __name__ == "__main__":
    main()
