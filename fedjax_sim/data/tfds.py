"""Image-classification sets of TensorFlow Datasets, read without TensorFlow.

Reading a prepared set in the array_record format needs no TensorFlow; preparing
(downloading and converting) one does.
"""

import contextlib
import difflib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fedjax_sim.data import cache
from fedjax_sim.data.sources import NotHere, fingerprint, first_found, md5, reachable
from fedjax_sim.types import Dataset, Examples

# tensorflow_datasets is imported inside functions: it takes half a second.

_SPEC = re.compile(r"(?P<path>\w+(/[\w.\-]+)?)(:(?P<version>\d+\.\d+\.\d+))?")
_CHUNK = 1024  # images decoded at a time


def load(name: str, data_dir: Path) -> Dataset:
    """``tfds:<name>[/<config>][:<version>]`` from ``data_dir/tfds``; else prepared.

    The split ``test`` is the test set, or ``validation`` where there is no ``test``.

    Raises:
        ValueError: unknown name, damaged files, or not image classification with a
            fixed image shape.
        FileNotFoundError: not prepared, and preparing failed or TensorFlow is missing.
    """
    spec = name.removeprefix("tfds:")
    if not _SPEC.fullmatch(spec):
        raise ValueError(
            f"expected tfds:<name>[/<config>][:<version>], such as tfds:cifar10:3.0.2; "
            f"got {name!r}."
        )
    return first_found(
        name,
        [lambda: load_prepared(spec, data_dir), lambda: prepare(spec, data_dir)],
    )


def load_prepared(spec: str, data_dir: Path) -> Dataset:
    """The prepared copy in ``data_dir/tfds``, the newest version if none is given.

    Raises:
        NotHere: there is none.
        ValueError: it is damaged or no fit.
    """
    folder = _prepared_folder(spec, data_dir)
    contents = [path for path in sorted(folder.iterdir()) if path.is_file()]
    key = fingerprint(part for path in contents for part in (path.name, md5(path)))
    name = f"tfds:{spec.partition(':')[0]}"
    return cache.cached(name, key, lambda: _decode(name, folder, key))


def prepare(spec: str, data_dir: Path) -> Dataset:
    """Downloads and prepares the set in ``data_dir/tfds`` with TensorFlow, and loads.

    Raises:
        NotHere: TensorFlow is not installed, or the download failed.
        ValueError: no such set, or features that do not fit (before the download).
    """
    import tensorflow_datasets as tfds

    base = re.split("[/:]", spec)[0]
    known = tfds.list_builders(with_community_datasets=False)
    if base not in known:
        close = difflib.get_close_matches(base, known, n=1)
        hint = f" Did you mean 'tfds:{close[0]}'?" if close else ""
        raise ValueError(
            f"unknown data set 'tfds:{base}'.{hint} It is neither prepared in "
            f"{data_dir / 'tfds'} nor one of TFDS's; "
            "names: https://www.tensorflow.org/datasets/catalog/overview."
        )
    place = f"preparing with TFDS into {data_dir / 'tfds'}"
    if importlib.util.find_spec("tensorflow") is None:
        raise NotHere(
            f"{place}: needs TensorFlow, which is not installed "
            "(pip install 'fedjax_sim[prepare]')"
        )
    builder = tfds.builder(
        spec, data_dir=data_dir / "tfds", try_gcs=False, file_format="array_record"
    )
    _image_and_label(f"tfds:{spec}", builder.info)
    # TFDS itself retries for minutes where there is no network.
    urls = [url for url in builder.url_infos or () if url.startswith("http")]
    if urls and not any(reachable(url) for url in urls):
        raise NotHere(f"{place}: no connection to {', '.join(urls)}")
    try:
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )
    except Exception as error:  # what can fail in there has no common base class
        raise NotHere(f"{place}: {type(error).__name__}: {error}") from error
    return load_prepared(spec, data_dir)


def _prepared_folder(spec: str, data_dir: Path) -> Path:
    match = _SPEC.fullmatch(spec)
    assert match is not None  # checked by load
    parent = data_dir / "tfds" / match["path"]
    wanted = match["version"]
    versions = [
        info.parent
        for info in parent.glob("*/dataset_info.json")
        if re.fullmatch(wanted or r"\d+\.\d+\.\d+", info.parent.name)
    ]
    if not versions:
        version = wanted or "<version>"
        raise NotHere(f"prepared TFDS copy: no {parent / version}/dataset_info.json")
    return max(versions, key=lambda path: [int(n) for n in path.name.split(".")])


def _image_and_label(name: str, info: Any) -> tuple[str, str]:
    """The keys of the image and of the label, or ValueError where the set is no fit."""
    import tensorflow_datasets as tfds

    keys = info.supervised_keys
    if not keys or len(keys) != 2 or not all(isinstance(key, str) for key in keys):
        raise ValueError(
            f"{name} is not an image-classification set: expected supervised keys "
            f"(image, label); got {keys}. Choose another set."
        )
    image, label = (info.features[key] for key in keys)
    if not isinstance(image, tfds.features.Image) or None in image.shape:
        raise ValueError(
            f"{name} needs images of one fixed shape, to stack them in one array; got "
            f"{image}. Choose another set, or a configuration of it that is resized."
        )
    if image.np_dtype != np.uint8:
        raise ValueError(f"{name} needs uint8 images; got {image}. Choose another set.")
    if not isinstance(label, tfds.features.ClassLabel):
        raise ValueError(
            f"{name} is not a classification set: expected a ClassLabel as its target; "
            f"got {label}. Choose another set."
        )
    return keys


def _decode(name: str, folder: Path, key: str) -> Dataset:
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(folder)
    except Exception as error:  # malformed JSON shows in many ways
        raise _damaged(folder, error) from error
    info = builder.info
    if info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        raise ValueError(
            f"{folder} needs the file format array_record, which is read without "
            f"TensorFlow; got {info.file_format}. Prepare it again: tfds build "
            "--file_format=array_record."
        )
    keys = _image_and_label(name, info)
    test = "test" if "test" in info.splits else "validation"
    if not {"train", test} <= set(info.splits):
        raise ValueError(
            f"{name} needs the splits 'train' and 'test' (or 'validation'); got "
            f"{sorted(info.splits)}. Choose another set."
        )
    return Dataset(
        name=name,
        train=read_split(builder, "train", keys),
        test=read_split(builder, test, keys),
        class_names=tuple(info.features[keys[1]].names),
        source=f"TFDS {info.full_name}, splits train and {test} (md5 of md5s {key})",
        licence=info.redistribution_info.license or f"see {info.homepage}",
    )


def read_split(builder: Any, split: str, keys: tuple[str, str]) -> Examples:
    """One split of a TFDS builder with the given image and label keys, decoded."""
    folder = Path(builder.data_dir)
    image_key, label_key = keys
    image, label = (builder.info.features[key] for key in keys)
    try:
        with _quiet():
            source = builder.as_data_source(split)
            inputs = np.empty((len(source), *image.shape), np.uint8)
            targets = np.empty(len(source), np.int32)
            for start in range(0, len(source), _CHUNK):
                rows = range(start, min(start + _CHUNK, len(source)))
                examples = source.__getitems__(list(rows))
                inputs[rows] = [example[image_key] for example in examples]
                targets[rows] = [example[label_key] for example in examples]
    except Exception as error:  # array_record and the image decoders raise many kinds
        raise _damaged(folder, error) from error
    num_outside = np.sum((targets < 0) | (targets >= label.num_classes))
    if len(targets) == 0 or num_outside:
        raise ValueError(
            f"{folder}: the split {split!r} needs samples with labels in "
            f"0..{label.num_classes - 1}; got {len(targets)} samples, {num_outside} of "
            "them with another label (-1 is unlabelled). Choose another set."
        )
    return Examples(inputs, targets)


def _damaged(folder: Path, error: Exception) -> ValueError:
    return ValueError(
        f"cannot read the prepared TFDS copy in {folder}: {type(error).__name__}: "
        f"{error}. If it is corrupt or truncated, delete or prepare it again."
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without TFDS's advice to install OpenCV: small images decode as fast without."""
    from absl import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)
