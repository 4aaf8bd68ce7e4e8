"""Models: the contract, the adapters for flax modules, and a small zoo."""

from fedjax_sim.models.layers import Conv, max_pool
from fedjax_sim.models.model import Model, softmax_cross_entropy
from fedjax_sim.models.zoo import MODELS, cnn, digits_cnn, mlp

__all__ = [
    "MODELS",
    "Conv",
    "Model",
    "cnn",
    "digits_cnn",
    "max_pool",
    "mlp",
    "softmax_cross_entropy",
]
