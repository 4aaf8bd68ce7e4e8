"""PyTorch: a competent loop over clients in one process, and `torch.func.vmap`."""

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import workloads
from workloads import BATCH, LEARNING_RATE, TRAINING


class CNN(nn.Module):
    """FLTrust's network, and with `small` the one for 8x8 digits."""

    def __init__(self, small: bool = False) -> None:
        super().__init__()
        padding, channels = (1, (8, 16)) if small else (0, (30, 50))
        self.first = nn.Conv2d(1, channels[0], 3, padding=padding)
        self.second = nn.Conv2d(*channels, 3, padding=padding)
        self.head = (
            nn.Linear(64, 10)
            if small
            else nn.Sequential(nn.Linear(1250, 100), nn.ReLU(), nn.Linear(100, 10))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(F.max_pool2d(self.first(x), 2))
        x = F.relu(F.max_pool2d(self.second(x), 2))
        return self.head(x.flatten(1))


def build(model: str) -> nn.Module:
    if model == "mlp":
        network: nn.Module = nn.Sequential(
            nn.Flatten(), nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 10)
        )
    else:
        network = CNN(small=model == "digits_cnn")
    network.apply(as_flax_draws)
    return network


def as_flax_draws(layer: nn.Module) -> None:
    """Flax's initial weights: truncated normal of variance 1 / fan in, biases 0."""
    if isinstance(layer, (nn.Linear, nn.Conv2d)):
        fan_in = layer.weight[0].numel()
        # The standard deviation of a standard normal cut off at 2 is 0.8796.
        std = fan_in**-0.5 / 0.87962566
        nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
        nn.init.zeros_(layer.bias)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def set_up(
    model: str, threads: int, clients: int, device: str
) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A network, and inputs and targets ``[clients, samples, ...]``."""
    torch.set_num_threads(threads)
    clients = clients or TRAINING[model]["clients"]
    height, width, channels = TRAINING[model]["shape"]
    samples = TRAINING[model]["samples"]
    generator = torch.Generator().manual_seed(0)
    shape = (clients, samples, channels, height, width)
    inputs = torch.rand(shape, generator=generator)
    targets = torch.randint(0, 10, (clients, samples), generator=generator)
    return build(model).to(device), inputs.to(device), targets.to(device)


def train(
    model: str, threads: int, clients: int = 0, device: str = "cpu"
) -> dict[str, Any]:
    """One model object, reset to the server's parameters for every client."""
    network, inputs, targets = set_up(model, threads, clients, device)
    clients, samples = targets.shape
    server = [p.detach().clone() for p in network.parameters()]

    def one_round() -> None:
        for client in range(clients):
            with torch.no_grad():
                torch._foreach_copy_(list(network.parameters()), server)
            optimizer = torch.optim.SGD(network.parameters(), lr=LEARNING_RATE)
            order = torch.randperm(samples, device=device)
            for start in range(0, samples, BATCH):
                rows = order[start : start + BATCH]
                optimizer.zero_grad(set_to_none=True)
                outputs = network(inputs[client, rows])
                F.cross_entropy(outputs, targets[client, rows]).backward()
                optimizer.step()
            with torch.no_grad():
                torch._foreach_sub(list(network.parameters()), server)
        synchronize(device)

    found = workloads.measure(one_round, workloads.REPEATS_A_PASS)
    return {**found, "rate": clients * samples / found["median"]}


def vmap(
    model: str, threads: int, clients: int = 0, device: str = "cpu"
) -> dict[str, Any]:
    """All clients side by side: `torch.func.vmap` of `torch.func.grad`."""
    network, inputs, targets = set_up(model, threads, clients, device)
    clients, samples = targets.shape
    server = {name: p.detach() for name, p in network.named_parameters()}

    def loss(params: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(torch.func.functional_call(network, params, (x,)), y)

    gradient = torch.func.vmap(torch.func.grad(loss))

    def one_round() -> None:
        params = {
            name: p.expand(clients, *p.shape).clone() for name, p in server.items()
        }
        draws = torch.rand(clients, samples, device=device)
        order = draws.argsort(dim=1)
        who = torch.arange(clients, device=device)[:, None]
        for start in range(0, samples, BATCH):
            rows = order[:, start : start + BATCH]
            grads = gradient(params, inputs[who, rows], targets[who, rows])
            for name in params:
                params[name].sub_(grads[name], alpha=LEARNING_RATE)
        synchronize(device)

    found = workloads.measure(one_round, workloads.REPEATS_A_PASS)
    return {**found, "rate": clients * samples / found["median"]}


def aggregate(
    rows: int, columns: int, assumed: int, threads: int = 2
) -> dict[str, Any]:
    """What a PyTorch user writes for the rules that are one line."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    U = torch.randn(rows, columns) * 0.01 + 0.02
    calls = {
        "fedavg": lambda: U.mean(dim=0),
        "median": lambda: U.median(dim=0).values,
        "trimmed_mean": lambda: U.sort(dim=0).values[assumed:-assumed].mean(dim=0),
        "krum": lambda: krum(U, assumed),
    }
    return {"seconds": {k: workloads.measure(f)["median"] for k, f in calls.items()}}


def krum(U: torch.Tensor, assumed: int) -> torch.Tensor:
    distances = torch.cdist(U, U) ** 2
    distances.fill_diagonal_(torch.inf)
    nearest = distances.topk(len(U) - assumed - 2, largest=False).values
    return U[nearest.sum(dim=1).argmin()]


def sgemm(threads: int, device: str = "cpu") -> dict[str, Any]:
    """Floating point operations per second of a large matrix product."""
    torch.set_num_threads(threads)
    size = 2048 if device == "cpu" else 8192
    a = torch.rand(size, size, device=device)

    def product() -> None:
        a @ a
        synchronize(device)

    product()
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        product()
        seconds.append(time.perf_counter() - start)
    return {"gflops": 2 * size**3 / statistics.median(seconds) / 1e9}


def version() -> dict[str, Any]:
    return {"versions": {"torch": torch.__version__}}


if __name__ == "__main__":
    workloads.main(
        {
            "train": train,
            "vmap": vmap,
            "aggregate": aggregate,
            "sgemm": sgemm,
            "version": version,
        }
    )
