"""The built-in image-classification sets."""

import functools
from pathlib import Path

import numpy as np

from fedjax_sim.data import idx, tfds
from fedjax_sim.data.sources import first_found
from fedjax_sim.types import Dataset, Examples


def digits(data_dir: Path) -> Dataset:
    """Handwritten digits of 13 people, 8x8 pixels; needs no files and no network.

    scikit-learn's copy of the UCI test set. Its 17 grey levels are spread over 0..255.
    Every fifth sample of each class, in the order of the file, is a test sample: 1,442
    for training and 355 for testing. Both parts have the same class shares and the same
    writers.

    Args:
        data_dir: not used; every loader takes it.

    References:
        Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine
        Learning Repository, 1998.
    """
    from sklearn.datasets import load_digits  # slow to import

    del data_dir
    bunch = load_digits()
    inputs = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    targets = bunch.target.astype(np.int32)
    is_test = np.zeros(len(targets), bool)
    for label in range(10):
        is_test[np.flatnonzero(targets == label)[4::5]] = True
    return Dataset(
        name="digits",
        train=Examples(inputs[~is_test], targets[~is_test]),
        test=Examples(inputs[is_test], targets[is_test]),
        class_names=tuple("0123456789"),
        source="sklearn.datasets.load_digits, every fifth sample of a class for test",
        licence="CC BY 4.0",
    )


def idx_dataset(spec: idx.IdxSet, data_dir: Path) -> Dataset:
    """A set published as IDX files: from these, from TFDS's copy, or downloaded.

    The order does not depend on the cache as long as ``data_dir`` holds a source:
    TFDS stores the samples shuffled, so its copy is a different sequence.
    """
    return first_found(
        spec.name,
        [
            lambda: idx.load_files(spec, data_dir),
            lambda: tfds.load_prepared(spec.name, data_dir)._replace(
                name=spec.name, class_names=spec.class_names, licence=spec.licence
            ),
            lambda: idx.load_cached(spec),
            lambda: idx.download_files(spec, data_dir),
        ],
    )


# Handwritten digits, 28x28: 60,000 for training, 10,000 for testing (LeCun, Bottou,
# Bengio and Haffner, "Gradient-based learning applied to document recognition", 1998).
mnist = functools.partial(idx_dataset, idx.MNIST)

# Articles of clothing in MNIST's format (Xiao, Rasul and Vollgraf, "Fashion-MNIST: a
# novel image dataset for benchmarking machine learning algorithms", 2017).
fashion_mnist = functools.partial(idx_dataset, idx.FASHION_MNIST)
