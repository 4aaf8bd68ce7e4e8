"""MNIST and Fashion-MNIST as the IDX files their authors publish."""

import gzip
import math
import struct
import warnings
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fedjax_sim.data import cache
from fedjax_sim.data.sources import NotHere, download, fingerprint, md5
from fedjax_sim.types import Dataset, Examples


class IdxSet(NamedTuple):
    """A data set published as four gzipped IDX files.

    Attributes:
        name: as given to ``load``; the files lie in ``data_dir/idx/<name>/``.
        md5: checksum of every official file by its name, in the order training images,
            training labels, test images, test labels.
        urls: where the files can be had; a file name is appended.
    """

    name: str
    class_names: tuple[str, ...]
    md5: dict[str, str]
    urls: tuple[str, ...]
    licence: str


MNIST = IdxSet(
    name="mnist",
    class_names=tuple("0123456789"),
    md5={
        "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
    },
    urls=(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
    licence="CC BY-SA 3.0",
)

FASHION_MNIST = IdxSet(
    name="fashion_mnist",
    class_names=(
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
    md5={
        "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
    },
    urls=("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",),
    licence="MIT",
)


def load_files(spec: IdxSet, data_dir: Path) -> Dataset:
    """``spec`` from its four files in ``data_dir/idx/<name>``, gzipped or not.

    Files that are well formed but not the official ones are used, with a warning.

    Raises:
        NotHere: a file is missing.
        ValueError: a file is corrupt or truncated, or images and labels do not match.
    """
    folder = data_dir / "idx" / spec.name
    paths = [_present(folder, name) for name in spec.md5]
    missing = [name for name, path in zip(spec.md5, paths, strict=True) if not path]
    if missing:
        raise NotHere(f"IDX files in {folder}: no {', '.join(missing)}")
    found = [path for path in paths if path]
    checksums = [md5(path) for path in found]
    key = fingerprint(checksums)
    dataset = cache.cached(spec.name, key, lambda: _decode(spec, found, key))
    for path, got, official in zip(found, checksums, spec.md5.values(), strict=True):
        if got != official:
            warnings.warn(
                f"{path} is not the official {spec.name} file (md5 {got}; the official "
                f".gz has {official}). It is well formed and used as it is.",
                stacklevel=2,
            )
    return dataset


def load_cached(spec: IdxSet) -> Dataset:
    """The decoded copy of the official files, which needs no files any more."""
    key = fingerprint(spec.md5.values())
    dataset = cache.read(spec.name, key)
    if dataset is None:
        path = cache.decoded_path(spec.name, key)
        raise NotHere(f"decoded copy of the official files: no usable {path}")
    return dataset


def download_files(spec: IdxSet, data_dir: Path) -> Dataset:
    """Downloads the files that are missing in ``data_dir/idx/<name>``, and loads."""
    folder = data_dir / "idx" / spec.name
    for name, checksum in spec.md5.items():
        if not _present(folder, name):
            download(name, folder, spec.urls, checksum)
    return load_files(spec, data_dir)


def read_idx(path: Path, num_dims: int) -> np.ndarray:
    """An IDX file of unsigned bytes with ``num_dims`` dimensions.

    The format: two zero bytes, type 0x08, the number of dimensions; each dimension as
    a big-endian uint32; the values, last dimension fastest.

    Raises:
        ValueError: not such a file, or its length is not what its header says.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            content = file.read()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise _corrupt(path, "complete gzip data", error) from error
    magic = bytes([0, 0, 8, num_dims])
    start = 4 + 4 * num_dims
    if content[:4] != magic:
        raise _corrupt(path, f"magic {magic.hex()}", content[:4].hex() or "nothing")
    if len(content) < start:
        raise _corrupt(path, f"a header of {start} bytes", len(content))
    shape = struct.unpack(f">{num_dims}I", content[4:start])
    if len(content) - start != math.prod(shape):
        expected = f"{math.prod(shape)} values (shape {shape})"
        raise _corrupt(path, expected, len(content) - start)
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _present(folder: Path, name: str) -> Path | None:
    candidates = (folder / name, folder / name.removesuffix(".gz"))
    return next((path for path in candidates if path.is_file()), None)


def _decode(spec: IdxSet, paths: list[Path], key: str) -> Dataset:
    train = _examples(paths[0], paths[1], len(spec.class_names))
    test = _examples(paths[2], paths[3], len(spec.class_names))
    if train.inputs.shape[1:] != test.inputs.shape[1:]:
        shape = train.inputs.shape[1:3]
        raise _corrupt(paths[2], f"images of shape {shape}", test.inputs.shape[1:3])
    official = key == fingerprint(spec.md5.values())
    kind = "official IDX files" if official else "other IDX files"
    return Dataset(
        name=spec.name,
        train=train,
        test=test,
        class_names=spec.class_names,
        source=f"{kind} (md5 of md5s {key})",
        licence=spec.licence,
    )


def _examples(images: Path, labels: Path, num_classes: int) -> Examples:
    inputs = read_idx(images, num_dims=3)[..., None]
    targets = read_idx(labels, num_dims=1).astype(np.int32)
    if inputs.size == 0:
        raise _corrupt(images, "at least one image with pixels", inputs.shape[:3])
    if len(inputs) != len(targets):
        raise _corrupt(
            labels, f"{len(inputs)} labels, one for each image", len(targets)
        )
    if targets.max() >= num_classes:
        raise _corrupt(labels, f"labels below {num_classes}", targets.max())
    return Examples(inputs, targets)


def _corrupt(path: Path, expected: str, got: object) -> ValueError:
    return ValueError(
        f"{path} is corrupt or truncated: expected {expected}; got {got}. Delete the "
        "file to have it downloaded again, or put the official file in its place."
    )
