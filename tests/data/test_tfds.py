"""Sets of TensorFlow Datasets, read without TensorFlow."""

import importlib.util
import sys

import numpy as np
import pytest

from fedjax_sim.data import idx, load, tfds

IMAGES = np.random.default_rng(0).integers(0, 256, (9, 4, 3, 3)).astype(np.uint8)


def kind(name, **content):
    return {"pythonClassName": f"tensorflow_datasets.core.features.{name}", **content}


def test_reads_a_prepared_set(tmp_path, write_tfds, capfd):
    write_tfds(tmp_path)
    data = load("tfds:small", tmp_path)
    np.testing.assert_array_equal(data.train.inputs, IMAGES[:6])
    np.testing.assert_array_equal(data.test.inputs, IMAGES[6:])
    assert data.train.inputs.dtype == np.uint8
    assert data.train.targets.dtype == np.int32
    assert data.test.targets.tolist() == [2, 1, 0]
    assert (data.name, data.class_names) == ("tfds:small", ("cat", "dog", "owl"))
    assert data.source.startswith("TFDS small/1.0.0, splits train and test")
    assert capfd.readouterr() == ("", "")


def test_reads_more_images_than_are_decoded_at_a_time(tmp_path, write_tfds):
    images = np.random.default_rng(1).integers(0, 256, (1500, 4, 3, 3)).astype(np.uint8)
    split = (images, [i % 3 for i in range(1500)])
    write_tfds(tmp_path, splits={"train": split, "test": split})
    data = load("tfds:small", tmp_path)
    np.testing.assert_array_equal(data.train.inputs, images)
    assert data.train.targets.tolist() == split[1]


def test_second_load_uses_the_decoded_copy(tmp_path, write_tfds, monkeypatch):
    write_tfds(tmp_path)
    first = load("tfds:small", tmp_path)
    monkeypatch.setattr(tfds, "_decode", None)
    again = load("tfds:small", tmp_path)
    np.testing.assert_array_equal(again.train.inputs, first.train.inputs)
    assert again.class_names == first.class_names


def test_changed_records_are_decoded_anew(tmp_path, write_tfds):
    write_tfds(tmp_path / "one")
    other = (255 - IMAGES[:6], [2, 2, 2, 0, 1, 1])
    write_tfds(tmp_path / "two", splits={"train": other, "test": other})
    load("tfds:small", tmp_path / "one")
    data = load("tfds:small", tmp_path / "two")
    np.testing.assert_array_equal(data.train.inputs, other[0])


def test_versions_and_configurations(tmp_path, write_tfds):
    for version in ("9.0.0", "10.0.0"):
        write_tfds(tmp_path, version=version)
    write_tfds(tmp_path, name="small/letters", version="2.0.0")
    assert "small/10.0.0" in load("tfds:small", tmp_path).source
    assert "small/9.0.0" in load("tfds:small:9.0.0", tmp_path).source
    assert load("tfds:small/letters", tmp_path).name == "tfds:small/letters"


def test_validation_where_there_is_no_test(tmp_path, write_tfds):
    splits = {"train": (IMAGES[:6], [0] * 6), "validation": (IMAGES[6:], [1] * 3)}
    write_tfds(tmp_path, splits=splits)
    data = load("tfds:small", tmp_path)
    assert data.test.targets.tolist() == [1, 1, 1]
    assert "splits train and validation" in data.source


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"supervised": ()}, r"expected supervised keys \(image, label\); got None"),
        ({"supervised": ("label", "image")}, "needs images of one fixed shape"),
        ({"shape": (-1, -1, 3)}, "needs images of one fixed shape"),
        ({"dtype": "uint16"}, "needs uint8 images"),
        (
            {"label": kind("text_feature.Text", text={})},
            "expected a ClassLabel as its target",
        ),
        (
            {"splits": {"train": (IMAGES, [0] * 9)}},
            r"or 'validation'\); got \['train'\]",
        ),
        ({"file_format": "tfrecord"}, "needs the file format array_record"),
        (
            {"splits": {"train": (IMAGES, [0] * 8 + [-1]), "test": (IMAGES, [0] * 9)}},
            r"labels in 0\.\.2; got 9 samples, 1 of them with another label",
        ),
    ],
)
def test_refuses_what_is_no_fit(tmp_path, write_tfds, options, message):
    write_tfds(tmp_path, **options)
    with pytest.raises(ValueError, match=message):
        load("tfds:small", tmp_path)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT")] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: cut(next(folder.glob("*train*"))),
        lambda folder: flip(next(folder.glob("*train*"))),
        lambda folder: next(folder.glob("*test*")).write_bytes(b""),
        lambda folder: next(folder.glob("*test*")).unlink(),
        lambda folder: (folder / "features.json").write_text("{"),
        lambda folder: (folder / "dataset_info.json").write_text("{"),
    ],
    ids=["cut", "flipped", "empty", "missing", "features", "info"],
)
def test_damage_is_refused_and_named(tmp_path, write_tfds, cache_folder, spoil):
    folder = write_tfds(tmp_path)
    spoil(folder)
    with pytest.raises(
        ValueError, match="cannot read the prepared TFDS copy"
    ) as caught:
        load("tfds:small", tmp_path)
    assert str(folder) in str(caught.value)
    assert not cache_folder.exists()


@pytest.mark.parametrize("name", ["tfds:", "tfds:../x", "tfds:a/b/c", "tfds:a:latest"])
def test_refuses_malformed_names(tmp_path, name):
    with pytest.raises(ValueError, match=r"expected tfds:<name>\[/<config>\]"):
        load(name, tmp_path)


def test_unknown_name_has_the_nearest_match(tmp_path):
    with pytest.raises(ValueError, match="Did you mean 'tfds:cifar10'"):
        load("tfds:cifr10", tmp_path)


def test_without_tensorflow_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(FileNotFoundError) as caught:
        load("tfds:cifar10:3.0.2", tmp_path)
    message = str(caught.value)
    assert f"no {tmp_path / 'tfds' / 'cifar10' / '3.0.2'}/dataset_info.json" in message
    assert "needs TensorFlow, which is not installed" in message
    assert "fedjax_sim[prepare]" in message
    assert "--dataset digits" in message


def test_without_network_says_so_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "tensorflow is here")
    monkeypatch.setattr(tfds, "reachable", lambda url: False)
    with pytest.raises(FileNotFoundError, match=r"no connection to http.*cifar-10"):
        load("tfds:cifar10", tmp_path)


@pytest.mark.filterwarnings("default")  # TensorFlow's own
def test_prepares_with_tensorflow(tmp_path):
    pytest.importorskip("tensorflow", reason="preparing needs TensorFlow")
    import tensorflow_datasets

    class MadeUp(tensorflow_datasets.core.GeneratorBasedBuilder):
        VERSION = tensorflow_datasets.core.Version("1.2.0")

        def _info(self):
            features = {
                "image": tensorflow_datasets.features.Image(shape=(4, 3, 1)),
                "label": tensorflow_datasets.features.ClassLabel(names=["a", "b"]),
            }
            return tensorflow_datasets.core.DatasetInfo(
                builder=self,
                features=tensorflow_datasets.features.FeaturesDict(features),
                supervised_keys=("image", "label"),
                license="MIT",
            )

        def _split_generators(self, dl_manager):
            sizes = {"train": 8, "test": 4}
            return {split: self._generate_examples(n) for split, n in sizes.items()}

        def _generate_examples(self, size):
            for i in range(size):
                yield i, {"image": np.full((4, 3, 1), i, np.uint8), "label": i % 2}

    data = load("tfds:made_up", tmp_path)
    assert sorted(data.train.inputs[:, 0, 0, 0]) == list(range(8))
    np.testing.assert_array_equal(data.train.targets, data.train.inputs[:, 0, 0, 0] % 2)
    assert data.test.inputs.shape == (4, 4, 3, 1)
    assert (data.class_names, data.licence) == (("a", "b"), "MIT")
    assert (tmp_path / "tfds" / "made_up" / "1.2.0" / "dataset_info.json").is_file()


def test_real_mnist_has_the_images_of_the_idx_files(real_mnist):
    """The same test images with the same labels, in TFDS's own order."""
    import tensorflow_datasets

    folder = real_mnist / "tfds" / "mnist" / "3.0.1"
    builder = tensorflow_datasets.builder_from_directory(folder)
    ours = tfds.read_split(builder, "test", ("image", "label"))
    official = idx.load_files(idx.MNIST, real_mnist).test
    assert (ours.targets != official.targets).any()
    tables = [
        np.column_stack(
            [part.inputs.reshape(10_000, -1), part.targets.astype(np.uint8)]
        )
        for part in (ours, official)
    ]
    np.testing.assert_array_equal(*(np.sort(_as_rows(table)) for table in tables))


def _as_rows(table):
    return np.ascontiguousarray(table).view(f"V{table.shape[1]}")[:, 0]
