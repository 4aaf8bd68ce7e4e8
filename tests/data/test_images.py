"""The built-in sets: which source is used, and what they hold."""

import shutil

import numpy as np
import pytest

from fedjax_sim.data import idx, images, load


def test_digits_split_is_fixed_and_stratified():
    data = load("digits")
    assert data.train.inputs.shape == (1442, 8, 8, 1)
    assert data.test.inputs.shape == (355, 8, 8, 1)
    assert data.train.inputs.dtype == np.uint8
    assert data.train.targets.dtype == np.int32
    assert (data.train.inputs.min(), data.train.inputs.max()) == (0, 255)
    both = np.bincount(data.train.targets) + np.bincount(data.test.targets)
    assert both.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    np.testing.assert_array_equal(np.bincount(data.test.targets), both // 5)
    np.testing.assert_array_equal(load("digits").test.inputs, data.test.inputs)
    train, test = (
        {image.tobytes() for image in part.inputs} for part in (data.train, data.test)
    )
    assert not train & test


@pytest.fixture
def tfds_copy(idx_set, write_tfds):
    """A TFDS copy beside the IDX files, with three other samples."""
    _, folder = idx_set
    return write_tfds(folder.parents[1], name="mnist", version="3.0.1")


def test_idx_files_come_before_the_tfds_copy(idx_set, tfds_copy):
    spec, folder = idx_set
    assert "IDX" in images.idx_dataset(spec, folder.parents[1]).source


def test_tfds_copy_is_used_without_idx_files_even_if_those_are_cached(
    idx_set, tfds_copy
):
    """What data_dir holds decides, not what happens to be in the cache."""
    spec, folder = idx_set
    images.idx_dataset(spec, folder.parents[1])
    shutil.rmtree(folder)
    data = images.idx_dataset(spec, folder.parents[1])
    assert data.source.startswith("TFDS mnist/3.0.1")
    assert (data.name, data.class_names) == ("mnist", spec.class_names)
    assert data.licence == spec.licence


def test_decoded_official_copy_is_used_without_any_source(idx_set):
    spec, folder = idx_set
    expected = images.idx_dataset(spec, folder.parents[1])
    shutil.rmtree(folder)
    data = images.idx_dataset(spec, folder.parents[1])
    np.testing.assert_array_equal(data.train.inputs, expected.train.inputs)
    assert data.source == expected.source


def test_without_source_a_damaged_copy_is_no_copy(idx_set, cache_folder):
    spec, folder = idx_set
    images.idx_dataset(spec, folder.parents[1])
    shutil.rmtree(folder)
    (copy,) = (cache_folder / "decoded").iterdir()
    copy.write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="is damaged"),
        pytest.raises(FileNotFoundError, match="no usable"),
    ):
        images.idx_dataset(spec, folder.parents[1])


def test_downloads_only_what_is_missing(idx_set, tmp_path, monkeypatch):
    spec, folder = idx_set
    origin = folder.rename(tmp_path / "origin")
    folder.mkdir()
    kept = "t10k-labels-idx1-ubyte.gz"
    shutil.copy(origin / kept, folder)
    fetched = []

    def copy(name, target, urls, checksum):
        assert urls == ("http://there/",)
        assert checksum == spec.md5[name]
        fetched.append(name)
        shutil.copy(origin / name, target)

    monkeypatch.setattr(idx, "download", copy)
    data = images.idx_dataset(spec._replace(urls=("http://there/",)), folder.parents[1])
    assert len(data.train.targets) == 12
    assert fetched == [name for name in spec.md5 if name != kept]


def test_not_found_lists_every_place_and_both_ways_out(idx_set, cache_folder):
    spec, folder = idx_set
    for path in folder.iterdir():
        path.unlink()
    nowhere = spec._replace(urls=("http://127.0.0.1:9/",))
    with pytest.raises(FileNotFoundError) as caught:
        images.idx_dataset(nowhere, folder.parents[1])
    message = str(caught.value)
    for place in (
        f"IDX files in {folder}",
        str(folder.parents[1] / "tfds" / "mnist"),
        str(cache_folder / "decoded" / "mnist-"),
        "http://127.0.0.1:9/train-images-idx3-ubyte.gz",
        "--data-dir",
        "--dataset digits",
    ):
        assert place in message


def test_data_dir_is_never_written_when_it_holds_the_source(idx_set):
    spec, folder = idx_set
    before = sorted(folder.parents[1].rglob("*"))
    images.idx_dataset(spec, folder.parents[1])
    assert sorted(folder.parents[1].rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mnits", "Did you mean 'mnist'. Valid: bloodmnist, .*, mnist, .*, tfds:<"),
        ("tfds", "unknown data set 'tfds'"),
        ("", "unknown data set ''"),
    ],
)
def test_unknown_name(name, message):
    with pytest.raises(ValueError, match=message.replace("?", ".")):
        load(name)


def test_name_must_be_text():
    with pytest.raises(TypeError, match="name must be of type str; got int"):
        load(3)
