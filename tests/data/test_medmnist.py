"""MedMNIST files: the format, damage, and files that are not the official ones."""

import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from fedjax_sim.data import load, medmnist
from fedjax_sim.data.medmnist import SETS, MedSet
from fedjax_sim.data.sources import NotHere, md5

BY_NAME = {spec.name: spec for spec in SETS}
SIZES = {"train": 12, "val": 3, "test": 5}


def arrays_of(spec):
    """The six arrays of a small file, with every label in its training part."""
    rng = np.random.default_rng(0)
    side = (28, 28) if spec.num_channels == 1 else (28, 28, spec.num_channels)
    num_classes = len(spec.class_names)
    arrays = {}
    for part, size in SIZES.items():
        images = rng.integers(0, 256, (size, *side)).astype(np.uint8)
        if spec.task == "multilabel":
            labels = rng.integers(0, 2, (size, num_classes)).astype(np.uint8)
        else:
            labels = (np.arange(size) % num_classes).astype(np.uint8)[:, None]
        arrays |= {f"{part}_images": images, f"{part}_labels": labels}
    return arrays


def write(data_dir: Path, name: str, **changes) -> tuple[MedSet, Path]:
    """A small file in the true format, and the set of which it is the official one.

    ``changes`` are arrays to write instead, or None to leave one out.
    """
    path = data_dir / "medmnist" / f"{name}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    spec = BY_NAME[name]
    arrays = arrays_of(spec) | changes
    arrays = {key: array for key, array in arrays.items() if array is not None}
    np.savez_compressed(path, **arrays)
    spec = spec._replace(
        md5=md5(path), num_samples=tuple(SIZES.values()), urls=("http://127.0.0.1:9/",)
    )
    return spec, path


@pytest.mark.parametrize("name", BY_NAME)
def test_reads_the_official_file(tmp_path, name):
    spec, path = write(tmp_path, name)
    data = medmnist.load(spec, tmp_path)
    multilabel = name == "chestmnist"
    assert data.name == name
    assert data.task == ("multilabel" if multilabel else "classification")
    assert data.source == f"the official MedMNIST v2 file (md5 {md5(path)})"
    assert data.class_names == spec.class_names
    assert data.licence == spec.licence
    arrays = arrays_of(spec)
    for part in SIZES:
        examples = getattr(data, part)
        assert examples.inputs.dtype == np.uint8
        assert examples.targets.dtype == np.int32
        images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
        if spec.num_channels == 1:
            images = images[..., None]
        np.testing.assert_array_equal(examples.inputs, images)
        if not multilabel:
            labels = labels.ravel()
        np.testing.assert_array_equal(examples.targets, labels)


def test_specifications():
    # Totals as the data sets' descriptions give them, before the split into parts.
    totals = {
        "pathmnist": 107_180, "chestmnist": 112_120, "dermamnist": 10_015,
        "octmnist": 109_309, "pneumoniamnist": 5_856, "retinamnist": 1_600,
        "breastmnist": 780, "bloodmnist": 17_092, "tissuemnist": 236_386,
        "organamnist": 58_830, "organcmnist": 23_583, "organsmnist": 25_211,
    }  # fmt: skip
    num_classes = dict(
        zip(totals, (9, 14, 7, 4, 2, 5, 2, 8, 8, 11, 11, 11), strict=True)
    )
    colour = {"pathmnist", "dermamnist", "retinamnist", "bloodmnist"}
    assert {spec.name: sum(spec.num_samples) for spec in SETS} == totals
    assert {spec.name: len(spec.class_names) for spec in SETS} == num_classes
    assert {spec.name for spec in SETS if spec.num_channels == 3} == colour
    assert {spec.num_channels for spec in SETS} == {1, 3}
    assert [spec.name for spec in SETS if spec.task != "classification"] == [
        "chestmnist"
    ]
    assert len({spec.md5 for spec in SETS}) == 12
    assert all(len(bytes.fromhex(spec.md5)) == 16 for spec in SETS)
    other_licence = {s.name: s.licence for s in SETS if s.licence != "CC BY 4.0"}
    assert other_licence == {"dermamnist": "CC BY-NC 4.0"}


def test_another_file_is_used_with_a_warning(tmp_path):
    spec, path = write(tmp_path, "breastmnist")
    official = spec._replace(md5="0" * 32)
    with pytest.warns(UserWarning, match="is not the official breastmnist file") as got:
        data = medmnist.load(official, tmp_path)
    message = str(got[0].message)
    assert str(path) in message
    assert f"md5 {md5(path)}; the official one has {'0' * 32}" in message
    assert "samples" not in message
    assert data.source == f"not the official MedMNIST v2 file (md5 {md5(path)})"
    other_counts = official._replace(num_samples=(546, 78, 156))
    with pytest.warns(UserWarning, match=r"has \(12, 3, 5\) samples .* \(546, 78, 156"):
        medmnist.load(other_counts, tmp_path)


def test_by_name_and_without_a_cache(tmp_path, cache_folder):
    write(tmp_path, "chestmnist")
    before = sorted(tmp_path.rglob("*"))
    with pytest.warns(UserWarning, match="not the official chestmnist"):
        data = load("chestmnist", data_dir=tmp_path)
    assert data.train.targets.shape == (12, 14)
    assert sorted(tmp_path.rglob("*")) == before
    assert not cache_folder.exists()


def test_is_downloaded_where_there_is_none(tmp_path, monkeypatch):
    spec, path = write(tmp_path, "octmnist")
    origin = path.rename(tmp_path / "origin")
    asked = []

    def fetch(*arguments):
        asked.append(arguments)
        origin.rename(path)

    monkeypatch.setattr(medmnist, "download", fetch)
    for _ in range(2):
        assert len(medmnist.load(spec, tmp_path).train.targets) == 12
    assert asked == [("octmnist.npz", path.parent, spec.urls, spec.md5)]


def test_not_found_lists_the_places(tmp_path):
    spec, path = write(tmp_path, "octmnist")
    path.unlink()
    with pytest.raises(NotHere, match=r"no .*octmnist\.npz"):
        medmnist.load_file(spec, tmp_path)
    with pytest.raises(FileNotFoundError) as caught:
        medmnist.load(spec, tmp_path)
    for place in (f"no {path}", "http://127.0.0.1:9/octmnist.npz", "--data-dir"):
        assert place in str(caught.value)


def changed(key, change):
    """What ``write`` is to write instead of the array ``key`` of pneumoniamnist."""
    return {key: change(arrays_of(BY_NAME["pneumoniamnist"])[key])}


WRONG = {
    "missing arrays": (
        {"val_images": None, "test_labels": None},
        "got train_images, train_labels, val_labels, test_images .missing: val_images, "
        "test_labels",
    ),
    "floats for bytes": (
        changed("test_images", lambda a: a / 255),
        r"test_images of type uint8 .*; got type float64 and shape \(5, 28, 28\)",
    ),
    "larger images": (
        changed("train_images", lambda a: a.repeat(8, 1).repeat(8, 2)),
        r"shape \(samples, 28, 28\); got type uint8 and shape \(12, 224, 224\)",
    ),
    "colour": (
        changed("train_images", lambda a: a[..., None].repeat(3, -1)),
        r"got type uint8 and shape \(12, 28, 28, 3\)",
    ),
    "a scalar": ({"train_images": np.uint8(3)}, r"got type uint8 and shape \(\)"),
    "an empty part": (
        {
            **changed("val_images", lambda a: a[:0]),
            **changed("val_labels", lambda a: a[:0]),
        },
        "at least one image in val_images; got none",
    ),
    "fewer labels": (
        changed("val_labels", lambda a: a[:-1]),
        r"val_labels of an integer type and shape \(3, 1\).*; got .* shape \(2, 1\)",
    ),
    "fewer images": (
        changed("train_images", lambda a: a[1:]),
        r"shape \(11, 1\), a row for each image; got type uint8 and shape \(12, 1\)",
    ),
    "flat labels": (
        changed("train_labels", np.ravel),
        r"shape \(12, 1\).*; got type uint8 and shape \(12,\)",
    ),
    "real labels": (changed("train_labels", lambda a: a * 1.0), "got type float64"),
    "a label too large": (
        changed("test_labels", lambda a: a + np.uint8(1)),
        r"test_labels in 0\.\.1; got values in 1\.\.2",
    ),
    "a negative label": (
        changed("test_labels", lambda a: a.astype(int) - 1),
        r"test_labels in 0\.\.1; got values in -1\.\.0",
    ),
    "a label beyond 32 bits": (
        changed("test_labels", lambda a: a.astype(int) << 32),
        r"got values in 0\.\.4294967296",
    ),
    "pickled objects": (
        changed("train_labels", lambda a: a.astype(object)),
        "readable arrays of numbers; got ValueError: Object arrays cannot be loaded",
    ),
}


def refused(spec, path, message):
    with pytest.raises(ValueError, match=message) as caught:
        medmnist.load(spec, path.parents[1])
    assert f"{path} is corrupt or truncated" in str(caught.value)
    assert "Delete the file" in str(caught.value)


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arrays_are_refused_and_named(tmp_path, case):
    changes, message = WRONG[case]
    refused(*write(tmp_path, "pneumoniamnist", **changes), message)


@pytest.mark.parametrize(
    ("name", "key", "change", "message"),
    [
        ("pathmnist", "val_images", lambda a: a[..., 0], r"\(samples, 28, 28, 3\)"),
        ("chestmnist", "val_labels", lambda a: a * 2, r"in 0\.\.1; got .* 0\.\.2"),
        ("chestmnist", "val_labels", lambda a: a[:, :13], r"\(3, 14\).*\(3, 13\)"),
        ("organsmnist", "train_labels", lambda a: a + np.uint8(1), r"in 0\.\.10; got"),
    ],
)
def test_what_is_wrong_depends_on_the_set(tmp_path, name, key, change, message):
    array = arrays_of(BY_NAME[name])[key]
    refused(*write(tmp_path, name, **{key: change(array)}), message)


def flip_a_byte(content):
    """In the middle of the first array's compressed data."""
    middle = len(content) // 4
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]


def npy(content):
    file = io.BytesIO()
    np.save(file, np.arange(3))
    return file.getvalue()


def zip_with(*names):
    def spoil(content):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            for name in names:
                archive.writestr(name, "no array")
        return file.getvalue()

    return spoil


DAMAGE = {
    "truncated": (lambda c: c[:-100], "a complete npz file .*; got .* bytes without"),
    "cut in half": (lambda c: c[: len(c) // 2], "a complete npz file"),
    "no bytes at all": (lambda c: b"", "got 0 bytes without a zip archive's end"),
    "a web page": (lambda c: b"<html>404</html>", "a complete npz file"),
    "a single array": (npy, "a complete npz file"),
    "a pickle": (lambda c: pickle.dumps({"train_images": 1}), "a complete npz file"),
    "a flipped byte": (flip_a_byte, "readable arrays of numbers; got (BadZip|error)"),
    "other files": (zip_with("a.txt", "b"), r"got a\.txt, b \(missing: train_images"),
    "no arrays": (zip_with(*arrays_of(SETS[0])), r"got type \|S8 and shape \(\)"),
    "something before the archive": (lambda c: b"\x80\x04" + c, "readable arrays"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_refused_and_named(tmp_path, case):
    spoil, message = DAMAGE[case]
    spec, path = write(tmp_path, "pneumoniamnist")
    path.write_bytes(spoil(path.read_bytes()))
    refused(spec, path, message)


def test_real_pneumoniamnist(data_dir):
    path = data_dir / "medmnist" / "pneumoniamnist.npz"
    if not path.is_file():
        pytest.skip(f"needs the real PneumoniaMNIST: no {path}")
    official = md5(path) == BY_NAME["pneumoniamnist"].md5
    if official:
        data = load("pneumoniamnist", data_dir)
        assert data.source.startswith("the official")
    else:
        with pytest.warns(UserWarning, match="not the official pneumoniamnist") as got:
            data = load("pneumoniamnist", data_dir)
        assert "samples" not in str(got[0].message)
        assert data.source.startswith("not the official")
    classes = {"train": [1214, 3494], "val": [135, 389], "test": [234, 390]}
    for part, counts in classes.items():
        examples = getattr(data, part)
        assert examples.inputs.shape == (sum(counts), 28, 28, 1)
        assert np.bincount(examples.targets).tolist() == counts
    assert data.class_names == ("normal", "pneumonia")
