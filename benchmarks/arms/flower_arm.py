"""Flower's simulation engine (Ray): FedAvg with every client, one epoch a round."""

import logging
import sys
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
import torch
import torch.nn.functional as F
import workloads
from torch_arm import build
from workloads import BATCH, LEARNING_RATE, TRAINING

warnings.filterwarnings("ignore")
import flwr
from flwr.client import ClientApp, NumPyClient
from flwr.common import Context, ndarrays_to_parameters
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.simulation import run_simulation

logging.getLogger("flwr").setLevel(logging.ERROR)


class Client(NumPyClient):
    """Random samples of its own, plain SGD."""

    def __init__(self, model: str, seed: int, samples: int) -> None:
        torch.set_num_threads(1)  # one actor per core
        height, width, channels = TRAINING[model]["shape"]
        generator = torch.Generator().manual_seed(seed)
        shape = (samples, channels, height, width)
        self.inputs = torch.rand(shape, generator=generator)
        self.targets = torch.randint(0, 10, (samples,), generator=generator)
        self.network = build(model)

    def fit(self, parameters: Any, config: Any) -> Any:
        with torch.no_grad():
            for own, given in zip(self.network.parameters(), parameters, strict=True):
                own.copy_(torch.from_numpy(given))
        optimizer = torch.optim.SGD(self.network.parameters(), lr=LEARNING_RATE)
        order = torch.randperm(len(self.targets))
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            optimizer.zero_grad(set_to_none=True)
            loss = F.cross_entropy(self.network(self.inputs[rows]), self.targets[rows])
            loss.backward()
            optimizer.step()
        trained = [p.detach().numpy() for p in self.network.parameters()]
        return trained, len(order), {}


def train(
    model: str, clients: int, samples: int, rounds: int, cores: int
) -> dict[str, Any]:
    """Seconds a round, from a long run less a run of one round."""

    def client_fn(context: Context) -> Any:
        seed = int(context.node_config["partition-id"])
        return Client(model, seed, samples).to_client()

    def seconds(num_rounds: int) -> float:
        def server_fn(context: Context) -> ServerAppComponents:
            start = [p.detach().numpy() for p in build(model).parameters()]
            strategy = FedAvg(
                fraction_fit=1.0,
                fraction_evaluate=0.0,
                min_available_clients=clients,
                initial_parameters=ndarrays_to_parameters(start),
            )
            config = ServerConfig(num_rounds=num_rounds)
            return ServerAppComponents(strategy=strategy, config=config)

        start = time.perf_counter()
        run_simulation(
            server_app=ServerApp(server_fn=server_fn),
            client_app=ClientApp(client_fn=client_fn),
            num_supernodes=clients,
            backend_config={
                "init_args": {"num_cpus": cores, "log_to_driver": False},
                "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            },
        )
        return time.perf_counter() - start

    one = seconds(1)
    more = seconds(1 + rounds)
    per_round = (more - one) / rounds
    return {"start": one, "per_round": per_round, "rate": clients * samples / per_round}


def version() -> dict[str, Any]:
    return {"versions": {"flwr": flwr.__version__, "torch": torch.__version__}}


if __name__ == "__main__":
    workloads.main({"train": train, "version": version})
