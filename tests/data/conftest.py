"""An empty cache for every test, and writers of the true file formats."""

import gzip
import io
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedjax_sim.data.idx import MNIST, IdxSet
from fedjax_sim.data.sources import md5
from fedjax_sim.types import Dataset, Examples

REPOSITORY = Path(__file__).parents[2]
REAL_DATA = Path(os.environ.get("FEDJAX_SIM_DATA", REPOSITORY / "../shared/data"))


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("FEDJAX_SIM_CACHE", str(folder))
    monkeypatch.delenv("FEDJAX_SIM_DATA", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return folder


@pytest.fixture
def real_mnist() -> Path:
    for part in ("idx/mnist", "tfds/mnist/3.0.1"):
        if not (REAL_DATA / part).is_dir():
            pytest.skip(f"needs real MNIST: no {REAL_DATA / part}")
    return REAL_DATA


@pytest.fixture
def labelled() -> Callable[..., Dataset]:
    """Makes a data set in which sample i has the input i, and labels in turn."""

    def make(num_samples: int, num_classes: int = 10) -> Dataset:
        inputs = np.arange(num_samples).reshape(-1, 1)
        targets = (np.arange(num_samples) % num_classes).astype(np.int32)
        examples = Examples(inputs, targets)
        names = tuple(str(label) for label in range(num_classes))
        return Dataset("labelled", examples, examples, names, "test", "none")

    return make


def idx_bytes(values: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, values.ndim]) + struct.pack(
        f">{values.ndim}I", *values.shape
    )
    return header + values.astype(np.uint8).tobytes()


@pytest.fixture
def idx_set(tmp_path: Path) -> tuple[IdxSet, Path]:
    """Four small official files (12 for training, 5 for testing) and their folder."""
    folder = tmp_path / "data" / "idx" / "mnist"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    sizes = {"train": 12, "t10k": 5}
    for part, size in sizes.items():
        contents = {
            f"{part}-images-idx3-ubyte.gz": rng.integers(0, 256, (size, 4, 3)),
            f"{part}-labels-idx1-ubyte.gz": np.arange(size) % 10,
        }
        for name, values in contents.items():
            (folder / name).write_bytes(gzip.compress(idx_bytes(values), mtime=0))
    checksums = {name: md5(folder / name) for name in MNIST.md5}
    return MNIST._replace(md5=checksums, urls=()), folder


@pytest.fixture
def write_tfds() -> Callable[..., Path]:
    """Writes a prepared TFDS set as TFDS itself would; returns its folder."""
    from array_record.python.array_record_module import ArrayRecordWriter
    from PIL import Image
    from tensorflow_datasets.proto import tf_example_generated_pb2 as tf_example

    def feature(kind: str, **content: object) -> dict[str, object]:
        return {
            "pythonClassName": f"tensorflow_datasets.core.features.{kind}",
            **content,
        }

    def example_bytes(image: np.ndarray, label: int) -> bytes:
        png = io.BytesIO()
        Image.fromarray(image).save(png, "PNG")
        example = tf_example.Example()
        example.features.feature["image"].bytes_list.value.append(png.getvalue())
        example.features.feature["label"].int64_list.value.append(label)
        return example.SerializeToString()

    def write(
        data_dir: Path,
        name: str = "small",
        version: str = "1.0.0",
        splits: dict[str, tuple[np.ndarray, list[int]]] | None = None,
        shape: tuple[int, ...] = (4, 3, 3),
        dtype: str = "uint8",
        supervised: tuple[str, ...] = ("image", "label"),
        label: dict[str, object] | None = None,
        file_format: str = "array_record",
    ) -> Path:
        folder = data_dir / "tfds" / name / version
        folder.mkdir(parents=True)
        if splits is None:
            rng = np.random.default_rng(0)
            images = rng.integers(0, 256, (9, 4, 3, 3)).astype(np.uint8)
            splits = {
                "train": (images[:6], [0, 1, 2, 0, 1, 2]),
                "test": (images[6:], [2, 1, 0]),
            }
        base = name.split("/")[0]
        for split, (images, labels) in splits.items():
            path = folder / f"{base}-{split}.{file_format}-00000-of-00001"
            writer = ArrayRecordWriter(str(path), "group_size:1")
            for image, target in zip(images, labels, strict=True):
                writer.write(example_bytes(image, target))
            writer.close()
        dimensions = [str(size) for size in shape]
        image_feature = feature(
            "image_feature.Image",
            image={"dtype": dtype, "shape": {"dimensions": dimensions}},
        )
        label_feature = label or feature(
            "class_label_feature.ClassLabel", classLabel={"numClasses": "3"}
        )
        features = feature(
            "features_dict.FeaturesDict",
            featuresDict={"features": {"image": image_feature, "label": label_feature}},
        )
        info = {
            "name": base,
            "version": version,
            "fileFormat": file_format,
            "moduleName": "somewhere",
            "splits": [
                {
                    "name": split,
                    "shardLengths": [str(len(labels))],
                    "numBytes": "1",
                    "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                }
                for split, (_, labels) in splits.items()
            ],
        }
        if supervised:
            items = [{"featureKey": key} for key in supervised]
            info["supervisedKeys"] = {"tuple": {"items": items}}
        (folder / "dataset_info.json").write_text(json.dumps(info))
        (folder / "features.json").write_text(json.dumps(features))
        (folder / "label.labels.txt").write_text("cat\ndog\nowl\n")
        return folder

    return write
