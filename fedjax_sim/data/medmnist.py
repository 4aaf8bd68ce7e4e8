"""The 2-D sets of MedMNIST v2: medical images of 28x28 pixels, one npz file each."""

import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fedjax_sim.data.sources import NotHere, download, first_found, md5
from fedjax_sim.types import Dataset, Examples

PARTS = ("train", "val", "test")
SIDE = 28  # pixels


class MedSet(NamedTuple):
    """A set of MedMNIST v2.

    Attributes:
        name: as given to ``load``; the file is ``data_dir/medmnist/<name>.npz``.
        class_names: in the order of the labels; of a multilabel set, of the columns.
        num_channels: 1 for grey images, 3 for colour.
        num_samples: of the official file, for training, validation and test.
        md5: checksum of the official file.
        task: ``classification`` (of two or more classes, or of grades) or
            ``multilabel``.
        urls: where the file can be had; its name is appended.
    """

    name: str
    class_names: tuple[str, ...]
    num_channels: int
    num_samples: tuple[int, int, int]
    md5: str
    task: str = "classification"
    licence: str = "CC BY 4.0"
    urls: tuple[str, ...] = ("https://zenodo.org/records/10519652/files/",)


ORGANS = (
    "bladder",
    "femur-left",
    "femur-right",
    "heart",
    "kidney-left",
    "kidney-right",
    "liver",
    "lung-left",
    "lung-right",
    "pancreas",
    "spleen",
)

# Yang, Shi, Wei, Liu, Zhao, Ke, Pfister and Ni, "MedMNIST v2 - A large-scale
# lightweight benchmark for 2D and 3D biomedical image classification", Scientific Data,
# 2023; names and checksums as published with it.
SETS = (
    MedSet(
        name="pathmnist",
        class_names=(
            "adipose",
            "background",
            "debris",
            "lymphocytes",
            "mucus",
            "smooth muscle",
            "normal colon mucosa",
            "cancer-associated stroma",
            "colorectal adenocarcinoma epithelium",
        ),
        num_channels=3,
        num_samples=(89_996, 10_004, 7_180),
        md5="a8b06965200029087d5bd730944a56c1",
    ),
    MedSet(
        name="chestmnist",
        class_names=(
            "atelectasis",
            "cardiomegaly",
            "effusion",
            "infiltration",
            "mass",
            "nodule",
            "pneumonia",
            "pneumothorax",
            "consolidation",
            "edema",
            "emphysema",
            "fibrosis",
            "pleural",
            "hernia",
        ),
        num_channels=1,
        num_samples=(78_468, 11_219, 22_433),
        md5="02c8a6516a18b556561a56cbdd36c4a8",
        task="multilabel",
    ),
    MedSet(
        name="dermamnist",
        class_names=(
            "actinic keratoses and intraepithelial carcinoma",
            "basal cell carcinoma",
            "benign keratosis-like lesions",
            "dermatofibroma",
            "melanoma",
            "melanocytic nevi",
            "vascular lesions",
        ),
        num_channels=3,
        num_samples=(7_007, 1_003, 2_005),
        md5="0744692d530f8e62ec473284d019b0c7",
        licence="CC BY-NC 4.0",
    ),
    MedSet(
        name="octmnist",
        class_names=(
            "choroidal neovascularization",
            "diabetic macular edema",
            "drusen",
            "normal",
        ),
        num_channels=1,
        num_samples=(97_477, 10_832, 1_000),
        md5="c68d92d5b585d8d81f7112f81e2d0842",
    ),
    MedSet(
        name="pneumoniamnist",
        class_names=("normal", "pneumonia"),
        num_channels=1,
        num_samples=(4_708, 524, 624),
        md5="28209eda62fecd6e6a2d98b1501bb15f",
    ),
    MedSet(
        name="retinamnist",
        class_names=tuple("01234"),  # grades of severity
        num_channels=3,
        num_samples=(1_080, 120, 400),
        md5="bd4c0672f1bba3e3a89f0e4e876791e4",
    ),
    MedSet(
        name="breastmnist",
        class_names=("malignant", "normal, benign"),
        num_channels=1,
        num_samples=(546, 78, 156),
        md5="750601b1f35ba3300ea97c75c52ff8f6",
    ),
    MedSet(
        name="bloodmnist",
        class_names=(
            "basophil",
            "eosinophil",
            "erythroblast",
            "immature granulocytes(myelocytes, metamyelocytes and promyelocytes)",
            "lymphocyte",
            "monocyte",
            "neutrophil",
            "platelet",
        ),
        num_channels=3,
        num_samples=(11_959, 1_712, 3_421),
        md5="7053d0359d879ad8a5505303e11de1dc",
    ),
    MedSet(
        name="tissuemnist",
        class_names=(
            "Collecting Duct, Connecting Tubule",
            "Distal Convoluted Tubule",
            "Glomerular endothelial cells",
            "Interstitial endothelial cells",
            "Leukocytes",
            "Podocytes",
            "Proximal Tubule Segments",
            "Thick Ascending Limb",
        ),
        num_channels=1,
        num_samples=(165_466, 23_640, 47_280),
        md5="ebe78ee8b05294063de985d821c1c34b",
    ),
    MedSet(
        name="organamnist",
        class_names=ORGANS,
        num_channels=1,
        num_samples=(34_561, 6_491, 17_778),
        md5="68e3f8846a6bd62f0c9bf841c0d9eacc",
    ),
    MedSet(
        name="organcmnist",
        class_names=ORGANS,
        num_channels=1,
        num_samples=(12_975, 2_392, 8_216),
        md5="b9ceb9546e10131b32923c5bbeaea2b1",
    ),
    MedSet(
        name="organsmnist",
        class_names=ORGANS,
        num_channels=1,
        num_samples=(13_932, 2_452, 8_827),
        md5="9ab87b696fb54e2a387ebe992d6ed5f1",
    ),
)


def load(spec: MedSet, data_dir: Path) -> Dataset:
    """``spec`` from ``data_dir/medmnist/<name>.npz``, which is downloaded if need be.

    There is no decoded copy in the cache: an npz file holds the arrays themselves.

    Raises:
        ValueError: the file is corrupt, truncated, or not in the format of the set.
        FileNotFoundError: no file, and no download.
    """
    return first_found(
        spec.name,
        [lambda: load_file(spec, data_dir), lambda: download_file(spec, data_dir)],
    )


def load_file(spec: MedSet, data_dir: Path) -> Dataset:
    """``spec`` from its file.

    A file that is well formed but not the official one is used, with a warning.

    Raises:
        NotHere: there is no file.
        ValueError: it is corrupt, truncated, or not in the format of the set.
    """
    path = data_dir / "medmnist" / f"{spec.name}.npz"
    if not path.is_file():
        raise NotHere(f"MedMNIST file: no {path}")
    checksum = md5(path)
    arrays = _read(path)
    train, val, test = (_examples(path, spec, part, arrays) for part in PARTS)
    official = checksum == spec.md5
    if not official:
        counts = tuple(len(part.targets) for part in (train, val, test))
        note = ""
        if counts != spec.num_samples:
            note = f" It has {counts} samples for training, validation and test; the "
            note += f"official one has {spec.num_samples}."
        warnings.warn(
            f"{path} is not the official {spec.name} file (md5 {checksum}; the "
            f"official one has {spec.md5}). It is well formed and used as it is.{note}",
            stacklevel=2,
        )
    kind = "the official" if official else "not the official"
    return Dataset(
        name=spec.name,
        train=train,
        test=test,
        class_names=spec.class_names,
        source=f"{kind} MedMNIST v2 file (md5 {checksum})",
        licence=spec.licence,
        task=spec.task,
        val=val,
    )


def download_file(spec: MedSet, data_dir: Path) -> Dataset:
    """Downloads the file, which must not be there yet, and loads it."""
    download(f"{spec.name}.npz", data_dir / "medmnist", spec.urls, spec.md5)
    return load_file(spec, data_dir)


def _read(path: Path) -> dict[str, np.ndarray]:
    """The six arrays of a MedMNIST file by their names."""
    keys = [f"{part}_{kind}" for part in PARTS for kind in ("images", "labels")]
    if not zipfile.is_zipfile(path):
        raise _corrupt(
            path,
            "a complete npz file (a zip archive)",
            f"{path.stat().st_size} bytes without a zip archive's end",
        )
    try:
        # The archive's CRC-32 of each array is compared as the array is read. Opened
        # here because np.load leaves a file open that is no archive.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            found = list(archive.files)
            arrays = {key: np.asarray(archive[key]) for key in keys if key in found}
    except Exception as error:  # damage shows in many ways, all with the same remedy
        problem = f"{type(error).__name__}: {error}"
        raise _corrupt(path, "readable arrays of numbers", problem) from error
    missing = [key for key in keys if key not in arrays]
    if missing:
        raise _corrupt(
            path,
            f"the arrays {', '.join(keys)}",
            f"{', '.join(found) or 'none'} (missing: {', '.join(missing)})",
        )
    return arrays


def _examples(
    path: Path, spec: MedSet, part: str, arrays: dict[str, np.ndarray]
) -> Examples:
    images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
    shape = (SIDE, SIDE) if spec.num_channels == 1 else (SIDE, SIDE, spec.num_channels)
    if images.dtype != np.uint8 or images.shape[1:] != shape:
        raise _corrupt(
            path,
            f"{part}_images of type uint8 and shape (samples, {str(shape)[1:]}",
            f"type {images.dtype} and shape {images.shape}",
        )
    if len(images) == 0:
        raise _corrupt(path, f"at least one image in {part}_images", "none")
    multilabel = spec.task == "multilabel"
    width = len(spec.class_names) if multilabel else 1
    whole = np.issubdtype(labels.dtype, np.integer)
    if not whole or labels.shape != (len(images), width):
        raise _corrupt(
            path,
            f"{part}_labels of an integer type and shape {(len(images), width)}, a row "
            "for each image",
            f"type {labels.dtype} and shape {labels.shape}",
        )
    highest = 1 if multilabel else len(spec.class_names) - 1
    if labels.min() < 0 or labels.max() > highest:
        raise _corrupt(
            path,
            f"{part}_labels in 0..{highest}",
            f"values in {labels.min()}..{labels.max()}",
        )
    inputs = images.reshape(len(images), SIDE, SIDE, spec.num_channels)
    targets = labels.astype(np.int32)
    return Examples(inputs, targets if multilabel else targets[:, 0])


def _corrupt(path: Path, expected: str, got: str) -> ValueError:
    return ValueError(
        f"{path} is corrupt or truncated: expected {expected}; got {got}. Delete the "
        "file to have it downloaded again, or put the official file in its place."
    )
