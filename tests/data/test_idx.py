"""IDX files: the format, damage, and files that are not the official ones."""

import gzip

import numpy as np
import pytest

from fedjax_sim.data import idx
from fedjax_sim.data.cache import decoded_path
from fedjax_sim.data.sources import NotHere, fingerprint, md5

IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"


def load(idx_set):
    spec, folder = idx_set
    return idx.load_files(spec, folder.parents[1])


def rewrite(path, change):
    """Replaces the content of a gzipped file."""
    content = bytearray(gzip.decompress(path.read_bytes()))
    path.write_bytes(gzip.compress(bytes(change(content)), mtime=0))


def test_reads_the_official_files(idx_set):
    data = load(idx_set)
    assert data.train.inputs.shape == (12, 4, 3, 1)
    assert data.test.inputs.shape == (5, 4, 3, 1)
    assert data.train.inputs.dtype == np.uint8
    assert data.train.targets.dtype == np.int32
    assert data.train.targets.tolist() == [*range(10), 0, 1]
    # Row-major, last dimension fastest.
    values = np.random.default_rng(0).integers(0, 256, (12, 4, 3))
    np.testing.assert_array_equal(data.train.inputs[..., 0], values)
    assert data.num_classes == 10
    assert "official IDX files" in data.source
    assert data.licence == "CC BY-SA 3.0"


def test_reads_files_without_gzip_with_a_warning(idx_set):
    spec, folder = idx_set
    expected = load(idx_set)
    for name in spec.md5:
        content = gzip.decompress((folder / name).read_bytes())
        (folder / name.removesuffix(".gz")).write_bytes(content)
        (folder / name).unlink()
    with pytest.warns(UserWarning, match="is not the official mnist file"):
        data = load(idx_set)
    np.testing.assert_array_equal(data.train.inputs, expected.train.inputs)


def test_other_files_are_used_with_a_warning_every_time(idx_set):
    spec, folder = idx_set
    rewrite(folder / LABELS, lambda content: content[:-1] + b"\x07")
    for _ in range(2):
        with pytest.warns(UserWarning, match=f"{LABELS} is not the official mnist"):
            data = load(idx_set)
    assert data.train.targets[-1] == 7
    assert "other IDX files" in data.source
    assert not decoded_path("mnist", fingerprint(spec.md5.values())).exists()


def test_the_cache_follows_the_files(idx_set):
    _, folder = idx_set
    official = load(idx_set)
    before = (folder / LABELS).read_bytes()
    rewrite(folder / LABELS, lambda content: content[:-1] + b"\x07")
    with pytest.warns(UserWarning, match="not the official"):
        assert load(idx_set).train.targets[-1] == 7
    (folder / LABELS).write_bytes(before)
    np.testing.assert_array_equal(load(idx_set).train.targets, official.train.targets)


def test_a_missing_file_is_named(idx_set):
    _, folder = idx_set
    (folder / TEST_LABELS).unlink()
    with pytest.raises(NotHere, match=f"no {TEST_LABELS}$"):
        load(idx_set)


def cut_gzip(path):
    path.write_bytes(path.read_bytes()[:-10])


def flip_in_gzip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


DAMAGE = {
    "truncated gzip": (IMAGES, cut_gzip, "complete gzip data"),
    "flipped byte in gzip": (IMAGES, flip_in_gzip, "complete gzip data"),
    "not gzip": (LABELS, lambda p: p.write_bytes(b"<html>404</html>"), "gzip data"),
    "no bytes at all": (LABELS, lambda p: p.write_bytes(b""), "magic 00000801"),
    "images for labels": (
        LABELS,
        lambda p: p.write_bytes((p.parent / IMAGES).read_bytes()),
        "expected magic 00000801; got 00000803",
    ),
    "32-bit values": (
        IMAGES,
        lambda p: rewrite(p, lambda c: b"\0\0\x0c\x03" + c[4:]),
        "expected magic 00000803; got 00000c03",
    ),
    "cut header": (IMAGES, lambda p: rewrite(p, lambda c: c[:9]), "header of 16 bytes"),
    "cut values": (
        IMAGES,
        lambda p: rewrite(p, lambda c: c[:-1]),
        r"expected 144 values \(shape \(12, 4, 3\)\); got 143",
    ),
    "too many values": (IMAGES, lambda p: rewrite(p, lambda c: c + b"\0"), "got 145"),
    "absurd counts": (
        IMAGES,
        lambda p: rewrite(p, lambda c: c[:4] + b"\xff" * 12 + c[16:]),
        "got 144",
    ),
    "fewer labels": (
        LABELS,
        lambda p: rewrite(p, lambda c: c[:7] + b"\x0b" + c[8:-1]),
        "expected 12 labels, one for each image; got 11",
    ),
    "no images": (
        TEST_IMAGES,
        lambda p: rewrite(p, lambda c: c[:4] + b"\0" * 4 + c[8:16]),
        "at least one image",
    ),
    "a label too large": (
        TEST_LABELS,
        lambda p: rewrite(p, lambda c: c[:-1] + b"\x0a"),
        "expected labels below 10; got 10",
    ),
    "other image shape in the test set": (
        TEST_IMAGES,
        lambda p: rewrite(p, lambda c: c[:8] + b"\0\0\0\x03" + b"\0\0\0\x04" + c[16:]),
        r"expected images of shape \(4, 3\); got \(3, 4\)",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused_and_named(idx_set, cache_folder, damage):
    name, spoil, message = DAMAGE[damage]
    _, folder = idx_set
    spoil(folder / name)
    with pytest.raises(ValueError, match=message) as caught:
        load(idx_set)
    assert str(folder / name) in str(caught.value)
    assert "Delete the file" in str(caught.value)
    assert not cache_folder.exists()


def test_damaged_official_name_is_no_cache_hit(idx_set):
    """A good copy in the cache does not hide that a source file got damaged."""
    _, folder = idx_set
    load(idx_set)
    cut_gzip(folder / IMAGES)
    with pytest.raises(ValueError, match="corrupt or truncated"):
        load(idx_set)


@pytest.mark.parametrize("spec", [idx.MNIST, idx.FASHION_MNIST], ids=lambda s: s.name)
def test_specifications(spec):
    assert list(spec.md5) == [IMAGES, LABELS, TEST_IMAGES, TEST_LABELS]
    assert len(set(spec.md5.values())) == 4
    assert len(spec.class_names) == 10
    assert all(url.endswith("/") for url in spec.urls)


def test_real_mnist(real_mnist):
    data = idx.load_files(idx.MNIST, real_mnist)
    assert data.train.inputs.shape == (60_000, 28, 28, 1)
    assert data.test.inputs.shape == (10_000, 28, 28, 1)
    assert data.train.targets[:5].tolist() == [5, 0, 4, 1, 9]
    assert np.bincount(data.test.targets).tolist() == [
        980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009
    ]  # fmt: skip
    assert "official" in data.source
    assert md5(real_mnist / "idx" / "mnist" / IMAGES) == idx.MNIST.md5[IMAGES]
    cached = idx.load_cached(idx.MNIST)
    np.testing.assert_array_equal(cached.train.inputs, data.train.inputs)
