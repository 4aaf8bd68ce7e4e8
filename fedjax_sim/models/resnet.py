"""ResNet-18 for small images, with GroupNorm in place of BatchNorm."""

import flax.linen as nn

from fedjax_sim.models.layers import Conv, check_images
from fedjax_sim.models.model import Model
from fedjax_sim.registry import check_count
from fedjax_sim.types import Array

# Two groups in every layer: Reddi et al. 2021, and much of federated learning since.
NUM_GROUPS = 2


class _ConvNorm(nn.Module):
    features: int
    kernel: int = 3
    stride: int = 1
    relu: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        sides, strides = (self.kernel, self.kernel), (self.stride, self.stride)
        x = Conv(self.features, sides, "SAME", strides=strides, use_bias=False)(x)
        x = nn.GroupNorm(NUM_GROUPS, epsilon=1e-5)(x)  # epsilon: Wu, He 2018
        return nn.relu(x) if self.relu else x


class _Block(nn.Module):
    features: int
    stride: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = _ConvNorm(self.features, stride=self.stride)(x)
        y = _ConvNorm(self.features, relu=False)(y)
        if x.shape != y.shape:
            shortcut = _ConvNorm(self.features, 1, self.stride, False, name="shortcut")
            x = shortcut(x)
        return nn.relu(x + y)


class _ResNet18(nn.Module):
    width: int
    num_classes: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = _ConvNorm(self.width, name="stem")(x)
        for stage in range(4):
            features, stride = self.width * 2**stage, 1 if stage == 0 else 2
            x = _Block(features, stride)(x)
            x = _Block(features, 1)(x)
        return nn.Dense(self.num_classes)(x.mean(axis=(1, 2)))


def resnet18(
    input_shape: tuple[int, ...] = (28, 28, 1), num_classes: int = 10, width: int = 64
) -> Model:
    """ResNet-18 for small images, normalised by GroupNorm: MedMNIST's baseline.

    ``y = relu(x + GN(K2 * relu(GN(K1 * x))))``, eight such blocks after a stem
    ``relu(GN(K * x))`` with 3x3 kernels, stride 1 and no pooling, as MedMNIST's authors
    have it for 28x28; stages of two blocks with 64, 128, 256 and 512 channels and
    strides 1, 2, 2, 2, a 1x1 convolution on the shortcut where the shape changes, the
    mean over all positions, and a dense layer.

    11,172,810 parameters for 28x28x1 images and ten classes; 0.94 GFLOP an image and
    forward pass; training holds about 16 MB an image, most of them patches. Features:
    the stem (28*28*64).

    Args:
        input_shape: (height, width, channels), at least 8 by 8.
        num_classes: L.
        width: channels of the first stage, an even number; the others have 2, 4 and 8
            times as many.

    Raises:
        ValueError: images too small for three strides of 2, or an odd width.

    Example:
        >>> import jax
        >>> params = jax.eval_shape(resnet18().init, jax.random.key(0))
        >>> sum(leaf.size for leaf in jax.tree.leaves(params))
        11172810

    References:
        He, Zhang, Ren, Sun. Deep Residual Learning for Image Recognition. CVPR 2016.
        Yang, Shi, Wei, Liu, Zhao, Ke, Pfister, Ni. MedMNIST v2: A large-scale
        lightweight benchmark for 2D and 3D biomedical image classification. Scientific
        Data 2023.
        Wu, He. Group Normalization. ECCV 2018.
        Hsieh, Phanishayee, Mutlu, Gibbons. The Non-IID Data Quagmire of Decentralized
        Machine Learning. ICML 2020.
        Reddi, Charles, Zaheer, Garrett, Rush, Konečný, Kumar, McMahan. Adaptive
        Federated Optimization. ICLR 2021.

    Differs from the paper: GroupNorm in place of BatchNorm, whose statistics clients
    with different labels cannot share (Hsieh et al.), with two groups in every layer
    (Reddi et al.; 32 in Wu and He, whose accuracy depends little on it); kernels are
    initialised by LeCun's rule, flax's default; a stride of 2 pads after the image
    ("SAME") where PyTorch pads on both sides.
    """
    check_images("resnet18", input_shape, smallest=8, use="mlp")
    if check_count("resnet18's width", width, 2) % NUM_GROUPS:
        raise ValueError(
            f"resnet18's width must be even, since GroupNorm has {NUM_GROUPS} groups; "
            f"got {width}."
        )
    return Model.from_linen(_ResNet18(width, num_classes), input_shape, features="stem")
