"""Decoded copies: kept, found, and never trusted when damaged."""

import numpy as np
import pytest

from fedjax_sim.data import cache
from fedjax_sim.types import Dataset, Examples


def make():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (30, 8, 8, 1)).astype(np.uint8)
    targets = np.arange(30, dtype=np.int32) % 3
    return Dataset(
        name="tfds:a/b",
        train=Examples(images[:20], targets[:20]),
        test=Examples(images[20:], targets[20:]),
        class_names=("cat", "dog", "été"),
        source="here",
        licence="CC0",
    )


def unreachable():
    raise AssertionError("decoded although there is a copy")


def assert_equal(left, right):
    for field in ("name", "class_names", "source", "licence", "task", "owners"):
        assert getattr(left, field) == getattr(right, field)
    for one, other in zip(
        left.train + left.test, right.train + right.test, strict=True
    ):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == other.dtype


def test_decodes_once_for_each_key(cache_folder):
    first = cache.cached("tfds:a/b", "k1", make)
    assert_equal(cache.cached("tfds:a/b", "k1", unreachable), first)
    with pytest.raises(AssertionError):
        cache.cached("tfds:a/b", "k2", unreachable)
    assert [path.name for path in (cache_folder / "decoded").iterdir()] == [
        "tfds_a_b-k1.npz"
    ]
    assert cache.read("tfds:a/b", "k2") is None


def test_keeps_owners_where_there_are_any(cache_folder):
    owners = np.arange(20, dtype=np.int32) // 3
    divided = cache.cached("set", "k", lambda: make()._replace(owners=owners))
    assert divided.owners is owners
    copy = cache.cached("set", "k", unreachable)
    np.testing.assert_array_equal(copy.owners, owners)
    assert copy.owners.dtype == np.int32
    # A set without has the copy it had before there were owners.
    cache.cached("tfds:a/b", "k", make)
    with np.load(cache.decoded_path("tfds:a/b", "k")) as arrays:
        assert "owners" not in arrays
    # One whose owners go by another name is damaged, not without owners.
    path = cache.decoded_path("set", "k")
    head, _, tail = path.read_bytes().rpartition(b"owners.npy")
    path.write_bytes(head + b"owmers.npy" + tail)
    with pytest.warns(UserWarning, match="is damaged"):
        assert cache.read("set", "k") is None


def flip(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def without_a_field(content):
    return content.replace(b"train_targets.npy", b"train_tergets.npy")


@pytest.mark.parametrize(
    "spoil",
    [flip, without_a_field, lambda c: c[:-100], lambda c: b"", lambda c: b"\0" * 999],
)
def test_a_damaged_copy_is_rebuilt_with_a_warning(spoil):
    expected = cache.cached("tfds:a/b", "k", make)
    path = cache.decoded_path("tfds:a/b", "k")
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.warns(UserWarning, match="is damaged"):
        assert_equal(cache.cached("tfds:a/b", "k", make), expected)
    assert_equal(cache.cached("tfds:a/b", "k", unreachable), expected)


def test_every_flipped_byte_of_an_array_is_noticed():
    cache.cached("tfds:a/b", "k", make)
    path = cache.decoded_path("tfds:a/b", "k")
    content = path.read_bytes()
    start = content.index(make().train.inputs.tobytes())
    for offset in (start, start + 500, start + make().train.inputs.nbytes - 1):
        spoiled = bytearray(content)
        spoiled[offset] ^= 0x80
        path.write_bytes(spoiled)
        with pytest.warns(UserWarning, match="is damaged"):
            assert cache.read("tfds:a/b", "k") is None


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("FEDJAX_SIM_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="could not keep a decoded copy"):
        assert_equal(cache.cached("tfds:a/b", "k", make), make())


def test_a_failed_write_leaves_nothing(cache_folder, monkeypatch):
    def full_disk(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full_disk)
    with pytest.warns(UserWarning, match="No space left"):
        cache.cached("tfds:a/b", "k", make)
    assert list((cache_folder / "decoded").iterdir()) == []


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"task": "multilabel"}, "task 'multilabel' and no validation part"),
        ({"val": make().test}, "task 'classification' and a validation part"),
    ],
)
def test_what_a_copy_does_not_keep_is_refused(cache_folder, extra, message):
    with pytest.raises(ValueError, match=message):
        cache.cached("set", "k", lambda: make()._replace(**extra))
    assert not cache_folder.exists()
