"""Models: the contract, the adapters for flax modules, and a small zoo."""

from fedjax_sim.models.layers import Conv, max_pool
from fedjax_sim.models.model import (
    Model,
    for_task,
    sigmoid_cross_entropy,
    softmax_cross_entropy,
)
from fedjax_sim.models.recurrent import Autoencoder, bilstm
from fedjax_sim.models.resnet import resnet18
from fedjax_sim.models.zoo import MODELS, cnn, digits_cnn, leaf_cnn, mlp, small_cnn

__all__ = [
    "MODELS",
    "Autoencoder",
    "Conv",
    "Model",
    "bilstm",
    "cnn",
    "digits_cnn",
    "for_task",
    "leaf_cnn",
    "max_pool",
    "mlp",
    "resnet18",
    "sigmoid_cross_entropy",
    "small_cnn",
    "softmax_cross_entropy",
]
