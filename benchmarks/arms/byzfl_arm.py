"""ByzFL: its aggregators on a matrix, and its training loop over rules x attacks."""

import functools
import gzip
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
import byzfl
import workloads
from byzfl.aggregators import aggregators, preaggregators
from byzfl.fed_framework import models
from torch_arm import build
from workloads import ALIE, BATCH, IPM, MATRIX, NOISE

# ByzFL finds a model by name in this module.
models.cnn = functools.partial(build, "cnn")
models.mlp = functools.partial(build, "mlp")

RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "fedavg": ("Average", {}),
    "median": ("Median", {}),
    "trimmed_mean": ("TrMean", {"f": 20}),
    "geometric_median": ("GeometricMedian", {"nu": 1e-6, "T": 8}),
    "krum": ("Krum", {"f": 20}),
    "multi_krum": ("MultiKrum", {"f": 20}),
    "centered_clipping": ("CenteredClipping", {"L": 1, "tau": 10.0}),
    "monna": ("MoNNA", {"f": 20}),
    "meamed": ("Meamed", {"f": 20}),
    "caf": ("CAF", {"f": 20}),
}
STEPS: dict[str, tuple[str, dict[str, Any]]] = {
    "nnm": ("NNM", {"f": 20}),
    "bucketing": ("Bucketing", {"s": 2}),
    "clipping": ("Clipping", {"c": 2.0}),
    "arc": ("ARC", {"f": 20}),
}
SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "mda": ("MDA", {"f": 2}),
    "smea": ("SMEA", {"f": 2}),
}
ATTACKS: dict[str, tuple[str, dict[str, Any]]] = {
    "sign_flip": ("SignFlipping", {}),
    "ipm": ("InnerProductManipulation", {"tau": IPM}),
    "alie": ("ALittleIsEnough", {"tau": ALIE}),
    "gaussian": ("Gaussian", {"mu": 0.0, "sigma": NOISE}),
}


def rows_of(rows: int, columns: int) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(rows, columns) * 0.01 + 0.02


def aggregate(
    rules: list[str], rows: int, columns: int, threads: int = 2
) -> dict[str, Any]:
    """Seconds of each rule; of a pre-aggregator, followed by the mean."""
    torch.set_num_threads(threads)
    U = rows_of(rows, columns)
    found: dict[str, float | None] = {}
    for name in rules:
        seconds = []
        try:
            for _ in range(1 + workloads.REPEATS):
                # Some of ByzFL's steps write into what they are given.
                given = U.clone() if name in STEPS else U
                start = time.perf_counter()
                apply(name, given)
                seconds.append(time.perf_counter() - start)
        except RuntimeError as error:  # out of memory
            print(f"{name}: {error}", file=sys.stderr)
            found[name] = None
            continue
        found[name] = statistics.median(seconds[1:])
    return {"seconds": found}


def apply(name: str, U: torch.Tensor) -> torch.Tensor:
    if name in STEPS:
        step, options = STEPS[name]
        return aggregators.Average()(getattr(preaggregators, step)(**options)(U))
    rule, options = (RULES | SMALL)[name]
    return getattr(aggregators, rule)(**options)(U)


def idx(path: Path) -> np.ndarray:
    content = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(content, ">u4", count=content[3], offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(shape)


def mnist(folder: Path) -> tuple[torch.utils.data.TensorDataset, ...]:
    sets = []
    for part in ("train", "t10k"):
        images = idx(folder / f"{part}-images-idx3-ubyte.gz").astype(np.float32) / 255
        labels = idx(folder / f"{part}-labels-idx1-ubyte.gz").astype(np.int64)
        tensors = torch.from_numpy(images)[:, None], torch.from_numpy(labels)
        sets.append(torch.utils.data.TensorDataset(*tensors))
    return tuple(sets)


def matrix(
    model: str,
    folder: str,
    rules: list[str],
    attacks: list[str],
    rounds: int,
    seed: int = 0,
    threads: int = 2,
) -> dict[str, Any]:
    """ByzFL's own loop (``byzfl.benchmark.train``, DSGD) without its files.

    The data set is in memory as tensors, which spares it decoding an image a sample.
    """
    torch.set_num_threads(threads)
    train_set, test_set = mnist(Path(folder))
    cells = {}
    start = time.perf_counter()
    for attack in attacks:
        for rule in rules:
            began = time.perf_counter()
            accuracy = play(model, (train_set, test_set), rule, attack, rounds, seed)
            seconds = time.perf_counter() - began
            cells[f"{rule}/{attack}"] = {"accuracy": accuracy, "seconds": seconds}
            print(rule, attack, accuracy, seconds, file=sys.stderr, flush=True)
    return {"cells": cells, "total": time.perf_counter() - start}


def play(
    model: str, sets: tuple, rule: str, attack: str, rounds: int, seed: int
) -> float:
    """The test accuracy of one cell."""
    train_set, test_set = sets
    honest = MATRIX["clients"] - MATRIX["byzantine"]
    byzfl.utils.misc.set_random_seed(seed)
    loader = torch.utils.data.DataLoader
    order = torch.randperm(len(train_set)).tensor_split(MATRIX["clients"])
    own_sets = [
        torch.utils.data.Subset(train_set, part.tolist()) for part in order[:honest]
    ]
    common = {
        "model_name": model,
        "device": "cpu",
        "optimizer_name": "SGD",
        "learning_rate": MATRIX["learning_rate"],
        "weight_decay": 0.0,
        "milestones": [],
        "learning_rate_decay": 1.0,
    }
    clients = [
        byzfl.Client(
            common
            | {
                "loss_name": "CrossEntropyLoss",
                "LabelFlipping": False,
                "training_dataloader": loader(own, batch_size=BATCH, shuffle=True),
                "momentum": 0.0,
                "nb_labels": 10,
                "store_per_client_metrics": False,
            }
        )
        for own in own_sets
    ]
    name, options = RULES[rule]
    server = byzfl.Server(
        common
        | {
            "test_loader": loader(test_set, batch_size=500),
            "aggregator_info": {"name": name, "parameters": options},
            "pre_agg_list": [],
        }
    )
    name, options = ATTACKS[attack]
    attackers = byzfl.ByzantineClient(
        {"name": name, "f": MATRIX["byzantine"], "parameters": options}
    )

    def send() -> None:
        model = server.get_dict_parameters()
        for client in clients:
            client.set_model_state(model)

    send()
    for _ in range(rounds):
        for client in clients:
            client.compute_gradients()
        gradients = [client.get_flat_gradients_with_momentum() for client in clients]
        server.update_model_with_gradients(
            gradients + attackers.apply_attack(gradients)
        )
        send()
    return float(server.compute_test_accuracy())


def version() -> dict[str, Any]:
    from importlib.metadata import version as of

    return {"versions": {"byzfl": of("byzfl"), "torch": torch.__version__}}


if __name__ == "__main__":
    workloads.main({"aggregate": aggregate, "matrix": matrix, "version": version})
