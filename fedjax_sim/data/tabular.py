"""Medical measurements in a table, embedded: data without any file or network."""

from pathlib import Path

import numpy as np

from fedjax_sim.types import Dataset, Examples


def breast_cancer(data_dir: Path) -> Dataset:
    """Breast masses, 30 measurements of cell nuclei each: benign or malignant.

    scikit-learn's copy of the Wisconsin diagnostic set: 569 patients, 212 of them with
    a malignant mass (class 1). Every fifth sample of each class, in the order of the
    file, is a test sample: 456 for training and 113 for testing. Inputs are ``float32
    [s, 30]``, standardised by the mean and standard deviation of the training part.

    Args:
        data_dir: not used; every loader takes it.

    References:
        Street, Wolberg and Mangasarian, "Nuclear feature extraction for breast tumor
        diagnosis", IS&T/SPIE Symposium on Electronic Imaging 1993.
    """
    from sklearn.datasets import load_breast_cancer  # slow to import

    del data_dir
    bunch = load_breast_cancer()
    targets = (bunch.target == 0).astype(np.int32)  # the file has malignant as 0
    is_test = np.zeros(len(targets), bool)
    for label in range(2):
        is_test[np.flatnonzero(targets == label)[4::5]] = True
    train = bunch.data[~is_test]
    inputs = ((bunch.data - train.mean(axis=0)) / train.std(axis=0)).astype(np.float32)
    return Dataset(
        name="breast_cancer",
        train=Examples(inputs[~is_test], targets[~is_test]),
        test=Examples(inputs[is_test], targets[is_test]),
        class_names=("benign", "malignant"),
        source="sklearn.datasets.load_breast_cancer, every fifth of a class for test",
        licence="CC BY 4.0",
    )
