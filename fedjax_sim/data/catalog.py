"""Every data set by the name it has in code, on the command line and in results."""

import functools
import os
from collections.abc import Callable
from pathlib import Path

from fedjax_sim.data import images, leaf, medmnist, tabular, tfds
from fedjax_sim.data.sources import resolve_data_dir
from fedjax_sim.registry import check_type, lookup
from fedjax_sim.types import Dataset

DATASETS: dict[str, Callable[[Path], Dataset]] = {
    "digits": images.digits,
    "breast_cancer": tabular.breast_cancer,
    "mnist": images.mnist,
    "fashion_mnist": images.fashion_mnist,
    "femnist": leaf.femnist,
    **{spec.name: functools.partial(medmnist.load, spec) for spec in medmnist.SETS},
}


def load(name: str, data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """The data set ``name``, from the disk where it is there, else downloaded.

    A source in ``data_dir`` (for MNIST first ``idx/mnist/*.gz``, then
    ``tfds/mnist/<version>/``) is decoded once. The decoded copy lies in the user's
    cache folder (``$FEDJAX_SIM_CACHE``) under the checksum of the source and serves
    every later load. Without a source, a decoded copy of the official files is used if
    there is one; otherwise the source is downloaded into ``data_dir`` and its checksums
    compared. A set of MedMNIST is read from ``medmnist/<name>.npz`` itself, without a
    copy. ``femnist`` is read from the JSON files that LEAF's scripts make, in
    ``leaf/femnist/train`` and ``test``, and cannot be downloaded. ``Dataset.source``
    says which source it was.

    Args:
        name: ``digits`` (8x8) and ``breast_cancer`` (30 measurements), which come with
            scikit-learn and need no files; ``mnist``, ``fashion_mnist``; ``femnist``
            (digits and letters, divided by writer); of MedMNIST v2 ``pathmnist``,
            ``chestmnist`` (14 labels), ``dermamnist``, ``octmnist``,
            ``pneumoniamnist``, ``retinamnist``, ``breastmnist``, ``bloodmnist``,
            ``tissuemnist``, ``organamnist``, ``organcmnist``, ``organsmnist``; or
            ``tfds:<name>[/<config>][:<version>]`` for any image-classification set of
            TensorFlow Datasets, such as ``tfds:cifar10``.
        data_dir: folder with the sources; by default ``$FEDJAX_SIM_DATA``, else
            ``data`` in the user's cache folder. Decoded copies are never written to it.

    Returns:
        A ``Dataset`` with ``uint8 [s, height, width, channels]`` inputs (``float32 [s,
        30]`` of ``breast_cancer``) and ``int32 [s]`` targets, or ``int32 [s, L]`` of a
        multilabel set. ``val`` is the validation part of a set of MedMNIST, else None;
        ``owners`` are the writers of ``femnist``, else None.

    Raises:
        TypeError: the name is no text.
        ValueError: unknown name, a corrupt file, or a TFDS set that is not image
            classification with a fixed image shape.
        FileNotFoundError: found nowhere and not to be had; lists every place tried.

    Example:
        >>> data = load("digits")
        >>> data.train.inputs.shape, str(data.train.inputs.dtype), data.num_classes
        ((1442, 8, 8, 1), 'uint8', 10)
    """
    check_type("name", name, str, "Give one such as 'digits'.")
    folder = resolve_data_dir(data_dir)
    if name.startswith("tfds:"):
        return tfds.load(name, folder)
    # The pattern is in the table only to be named by the error.
    known: dict[str, Callable[..., Dataset]] = {**DATASETS, "tfds:<name>": tfds.load}
    return lookup("data set", name, known)(folder)
