"""LEAF files: the format, a file larger than what is kept of it, and all damage."""

import functools
import json
import string
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_sim as fs
from fedjax_sim.data import by_client, federate, leaf, load
from fedjax_sim.data.leaf import read_users

SIZES = {"train": {"f0_01": 12, "f1_02": 3, "f2_03": 20}, "test": {"f0_01": 2, "g": 5}}
NOT_JSON = "expected one complete JSON object in UTF-8, which has no NaN or Infinity; "
EOF = 'got "parse error: premature EOF"'
tiny = functools.partial(read_users, num_features=3, num_classes=4, bounds=(0, 1))


def file_of(sizes, seed=0, num_features=784, num_classes=62):
    """What a LEAF file holds: writers of these sizes, pixels as LEAF divides them."""
    rng = np.random.default_rng(seed)
    data = {}
    for user, size in sizes.items():
        pixels = rng.integers(0, 256, (size, num_features)) / 255
        labels = rng.integers(0, num_classes, size)
        data[user] = {"x": pixels.tolist(), "y": labels.tolist()}
    counts = list(sizes.values())
    return {"users": list(sizes), "num_samples": counts, "user_data": data}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def folder(tmp_path):
    """FEMNIST in small: two files for training, one for testing."""
    folder = tmp_path / "data" / "leaf" / "femnist"
    for place, sizes in enumerate(SIZES["train"].items()):
        write(
            folder / "train" / f"all_data_{place}.json", file_of(dict([sizes]), place)
        )
    write(folder / "test" / "all_data_0.json", file_of(SIZES["test"], seed=9))
    return folder


@pytest.fixture
def small():
    """Of a file for ``tiny``: ann has two samples, bob one."""
    data = {
        "ann": {"x": [[0, 0.5, 1], [1, 1, 1]], "y": [3, 0]},
        "bob": {"x": [[0.25, 0, 0]], "y": [1]},
    }
    return {"users": ["ann", "bob"], "num_samples": [2, 1], "user_data": data}


class TestFemnist:
    def test_reads_all_files(self, folder):
        data = load("femnist", data_dir=folder.parents[1])
        assert data.class_names == tuple(
            string.digits + string.ascii_uppercase + string.ascii_lowercase
        )
        assert (data.name, data.task, data.val) == ("femnist", "classification", None)
        assert data.source.startswith("FEMNIST as 3 + 1 LEAF JSON files (md5 of md5s ")
        assert "not subject to copyright in the United States" in data.licence
        for part, examples in (("train", data.train), ("test", data.test)):
            assert examples.inputs.dtype == np.uint8
            assert examples.targets.dtype == np.int32
            users = [
                user
                for path in sorted((folder / part).iterdir())
                for user in json.loads(path.read_text())["user_data"].values()
            ]
            x = np.concatenate([user["x"] for user in users]).reshape(-1, 28, 28, 1)
            np.testing.assert_array_equal(examples.inputs / 255, x)
            y = np.concatenate([user["y"] for user in users])
            np.testing.assert_array_equal(examples.targets, y)
        assert data.owners.dtype == np.int32
        assert data.owners.tolist() == [0] * 12 + [1] * 3 + [2] * 20

    def test_is_decoded_once(self, folder, monkeypatch):
        first = leaf.femnist(folder.parents[1])
        with monkeypatch.context() as patch:
            patch.setattr(leaf, "read_users", None)
            again = leaf.femnist(folder.parents[1])
        assert again.source == first.source
        np.testing.assert_array_equal(again.owners, first.owners)
        np.testing.assert_array_equal(again.train.inputs, first.train.inputs)
        # Other data have another fingerprint, and so has a file in the other part.
        (folder / "train" / "all_data_2.json").rename(folder / "test" / "all_data.json")
        other = leaf.femnist(folder.parents[1])
        assert other.source.split("md5s")[1] != first.source.split("md5s")[1]
        assert other.owners.tolist() == [0] * 12 + [1] * 3

    def test_pixels_are_rounded(self, folder):
        content = file_of({"h": 1})
        content["user_data"]["h"]["x"] = [[0.9999 / 255, 1.4 / 255, *[0.9981] * 782]]
        write(folder / "train" / "zzz.json", content)
        image = leaf.femnist(folder.parents[1]).train.inputs[-1]
        assert image.ravel().tolist() == [1, 1] + [255] * 782

    def test_data_dir_is_never_written(self, folder):
        before = sorted(folder.parents[1].rglob("*"))
        leaf.femnist(folder.parents[1])
        assert sorted(folder.parents[1].rglob("*")) == before

    @pytest.mark.parametrize("folders", [False, True])
    def test_absent(self, tmp_path, folders):
        for part in ("train", "test") if folders else ():
            (tmp_path / "leaf" / "femnist" / part).mkdir(parents=True)
        with pytest.raises(FileNotFoundError) as caught:
            load("femnist", data_dir=tmp_path)
        for text in (
            f"no *.json in {tmp_path / 'leaf' / 'femnist' / 'train'} or "
            f"{tmp_path / 'leaf' / 'femnist' / 'test'}",
            "LEAF (TalwalkarLab/leaf) makes them of NIST's archives: in its "
            "data/femnist run ./preprocess.sh -s niid --sf 1.0 -k 0 -t sample, then "
            "copy data/train and data/test to",
            "--data-dir DIR",
        ):
            assert text in str(caught.value)

    @pytest.mark.parametrize("part", ["train", "test"])
    def test_only_one_part(self, folder, part):
        for path in (folder / part).iterdir():
            path.unlink()
        message = rf"expected \*.json in {folder / part} too; got none. Copy both"
        with pytest.raises(ValueError, match=message):
            leaf.femnist(folder.parents[1])
        (folder / part).rmdir()
        with pytest.raises(ValueError, match="too; got no such folder"):
            leaf.femnist(folder.parents[1])

    def test_a_writer_in_two_files(self, folder):
        write(folder / "train" / "more.json", file_of({"h": 1, "f1_02": 1}))
        message = (
            r"more.json .*: of user 'f1_02' expected a writer in one file of the part "
            r"only; got the one of all_data_1.json again.*run it anew"
        )
        with pytest.raises(ValueError, match=message):
            leaf.femnist(folder.parents[1])

    @pytest.mark.parametrize("part", ["train", "test"])
    def test_what_is_no_file(self, folder, part):
        path = folder / part / "x.json"
        for make, got in (
            (path.mkdir, "a folder"),
            (lambda: path.symlink_to("x.json"), "a link to nothing"),
        ):
            make()
            message = rf"{path} is damaged .*: expected a file; got {got}\."
            with pytest.raises(ValueError, match=message):
                leaf.femnist(folder.parents[1])
            path.unlink() if path.is_symlink() else path.rmdir()

    def test_no_samples(self, folder):
        for path in (folder / "test").iterdir():
            write(path, file_of({"g": 0}))
        with pytest.raises(
            ValueError, match=rf"1 files of {folder / 'test'}; got none"
        ):
            leaf.femnist(folder.parents[1])

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            (
                "x",
                [[0.5] * 783 + [1.2]],
                r"'h' expected \"x\" between 0 and 1; got 1.2",
            ),
            (
                "x",
                [[0.5] * 783],
                r"expected 784 numbers .*; got 783 numbers in sample 0",
            ),
            (
                "y",
                [62],
                r"expected whole labels in \"y\", 0\.\.61; got 62 for sample 0",
            ),
        ],
    )
    def test_wants_femnists_pixels_and_classes(self, folder, key, value, message):
        content = file_of({"h": 1})
        content["user_data"]["h"][key] = value
        write(folder / "train" / "more.json", content)
        with pytest.raises(ValueError, match=message):
            leaf.femnist(folder.parents[1])


class TestReadUsers:
    def test_published_synthetic_file(self, data_dir):
        """Of FedProx: labels as floats, and users in another order than listed."""
        path = data_dir / "leaf" / "synthetic_0.5_0.5_test.json"
        if not path.exists():
            pytest.skip(f"needs the published synthetic file: no {path}")
        content = json.loads(path.read_text())
        users = list(read_users(path, num_features=60, num_classes=10))
        assert [user for user, _, _ in users] == list(content["user_data"])
        assert [user for user, _, _ in users] != content["users"]
        assert len(users) == 30
        for user, inputs, targets in users:
            assert (inputs.dtype, targets.dtype) == (np.float32, np.int32)
            want = content["user_data"][user]
            np.testing.assert_array_equal(inputs, np.array(want["x"], np.float32))
            assert targets.tolist() == want["y"]

    @pytest.mark.parametrize(
        "order",
        [
            ("users", "num_samples", "user_data"),
            ("user_data", "users", "num_samples"),
            ("num_samples", "user_data", "users"),
        ],
    )
    def test_keys_in_any_order(self, tmp_path, small, order):
        content = {key: small[key] for key in order} | {"hierarchies": [["a"], "b"]}
        users = list(tiny(write(tmp_path / "x.json", content)))
        assert [(user, y.tolist()) for user, _, y in users] == [
            ("ann", [3, 0]),
            ("bob", [1]),
        ]
        assert users[0][1].tolist() == [[0, 0.5, 1], [1, 1, 1]]

    @pytest.mark.parametrize("listed", [True, False])
    def test_users_without_samples_are_left_out(self, tmp_path, small, listed):
        """LEAF splits off users of one sample: no longer listed, and empty."""
        small["user_data"] = {"eve": {"x": [], "y": []}, **small["user_data"]}
        if listed:
            small["users"].insert(1, "eve")
            small["num_samples"].insert(1, 0)
        users = list(tiny(write(tmp_path / "x.json", small)))
        assert [user for user, _, _ in users] == ["ann", "bob"]

    def test_whole_floats_are_labels(self, tmp_path, small):
        small["user_data"]["ann"]["y"] = [3.0, 0.0]
        assert next(tiny(write(tmp_path / "x.json", small)))[2].tolist() == [3, 0]

    def test_streams(self, tmp_path):
        """The first user is there before the end was looked at; little is kept."""
        sizes = {f"f{place}": 10 for place in range(60)}
        path = write(tmp_path / "x.json", file_of(sizes))
        text = path.read_text()
        tracemalloc.start()
        try:
            count = sum(len(y) for _, _, y in read_users(path, 784, 62))
            streamed = tracemalloc.get_traced_memory()[1]
            tracemalloc.reset_peak()
            json.loads(path.read_text())
            whole = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert count == 600
        assert streamed < whole / 10
        path.write_text(text[: text.index('"f30": {"x"') + 50])
        users = read_users(path, 784, 62)
        assert next(users)[0] == "f0"
        message = f"{EOF} after user 'f29', in a file of"
        with pytest.raises(ValueError, match=message):
            list(users)


def changed(**changes):
    return lambda content: content.update(changes)


def without(key):
    return lambda content: content.pop(key)


def of_bob(**changes):
    return lambda content: content["user_data"]["bob"].update(changes)


def bobs_data(value):
    return lambda content: content["user_data"].update(bob=value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("users"), 'expected a list "users"; got none'),
        (changed(users=None), 'expected a list "users"; got none'),
        (changed(users={"ann": 2}), 'expected a list "users"; got {"ann": 2}'),
        (changed(users=["ann", 7]), 'expected names in "users"; got ["ann", 7]'),
        (changed(users=["ann", "ann"]), "user 'ann' expected its name once"),
        (without("num_samples"), 'expected a list "num_samples"; got none'),
        (changed(num_samples=[2]), 'for each of "users"; got 1 for 2'),
        (changed(num_samples=[2, 1, 1]), 'for each of "users"; got 3 for 2'),
        (changed(num_samples=[2, "1"]), 'counts in "num_samples"; got [2, "1"]'),
        (changed(num_samples=[2, True]), 'counts in "num_samples"; got [2, true]'),
        (changed(num_samples=[3, -1]), 'counts in "num_samples"; got [3, -1]'),
        (
            changed(num_samples=[2, 3]),
            'user \'bob\' expected as many samples as "users" and "num_samples" say; '
            "got 1 samples, and 3 there",
        ),
        (changed(num_samples=[2, 0]), "user 'bob' expected as many samples as"),
        (
            changed(users=["ann"], num_samples=[2]),
            'user \'bob\' expected as many samples as "users" and "num_samples" say; '
            "got 1 samples, and no such user there",
        ),
        (without("user_data"), "user 'ann' expected data in \"user_data\"; got none"),
        (changed(user_data=[1]), "user 'ann' expected data in \"user_data\"; got none"),
        (
            lambda content: content["user_data"].pop("ann"),
            "user 'ann' expected data in \"user_data\"; got none",
        ),
        (bobs_data(None), 'user \'bob\' expected an object with "x" and "y"; got null'),
        (bobs_data([[1], 2]), 'expected an object with "x" and "y"; got [[1], 2]'),
        (bobs_data({"x": []}), 'expected an object with "x" and "y"; got ["x"]'),
        (of_bob(x=None), "user 'bob' expected a list \"x\"; got null"),
        (of_bob(y=1), "user 'bob' expected a list \"y\"; got 1"),
        (of_bob(y=[1, 2]), 'labels in "y"; got 1 samples and 2 labels'),
        (of_bob(x=[]), 'labels in "y"; got 0 samples and 1 labels'),
        (of_bob(x=[[0, 0]]), 'in every sample of "x"; got 2 numbers in sample 0'),
        (
            of_bob(x=[[0, 0, 0], [0] * 4], y=[0, 0]),
            "user 'bob' expected 3 numbers in every sample of \"x\"; got 4 numbers in "
            "sample 1",
        ),
        (of_bob(x=[0.5]), 'in every sample of "x"; got 0.5 in sample 0'),
        (of_bob(x=["abc"]), 'in every sample of "x"; got "abc" in sample 0'),
        (of_bob(x=[[0, 0, 1.5]]), '"x" between 0 and 1; got 1.5 in sample 0'),
        (of_bob(x=[[0, -0.1, 0]]), '"x" between 0 and 1; got -0.1 in sample 0'),
        (of_bob(x=[[0, "0.5", 0]]), 'numbers in "x"; got "0.5". Copy'),
        (of_bob(x=[[0, None, 0]]), 'numbers in "x"; got null. Copy'),
        (of_bob(x=[[0, True, 0]]), 'numbers in "x"; got true. Copy'),
        (of_bob(x=[[0, [0], 0]]), 'numbers in "x"; got [0]. Copy'),
        (of_bob(y=[0.5]), 'whole labels in "y", 0..3; got 0.5 for sample 0'),
        (of_bob(y=[4]), 'whole labels in "y", 0..3; got 4 for sample 0'),
        (of_bob(y=[-1]), 'whole labels in "y", 0..3; got -1 for sample 0'),
        (of_bob(y=["1"]), 'numbers in "y"; got "1". Copy'),
        (of_bob(y=[False]), 'numbers in "y"; got false. Copy'),
        (of_bob(y=[[1]]), 'numbers in "y"; got [1]. Copy'),
    ],
)
def test_refuses(tmp_path, small, change, message):
    change(small)
    path = write(tmp_path / "bad.json", small)
    with pytest.raises(ValueError) as caught:
        list(tiny(path))
    text = str(caught.value)
    assert text.startswith(f"{path} is damaged or not in LEAF's format: ")
    assert message in text
    assert text.endswith("that LEAF's preprocess.sh made and run it anew.")


BOB = '"bob": {"x": [[0.25, 0, 0]], "y": [1]}'


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: text[:-1], f"{NOT_JSON}{EOF} after user 'bob'"),
        (lambda text: text[:60], f"{EOF} before the first user, in a file of 60 bytes"),
        (lambda text: text[:30], f'{EOF} while looking for "num_samples", in a file'),
        (lambda text: "", f'{EOF} while looking for "users", in a file of 0 bytes'),
        (lambda text: "\n", f'{EOF} while looking for "users", in a file of 1 bytes'),
        (lambda text: "users: ann", 'lexical error: invalid char in json text." while'),
        (lambda text: f"[{text}]", 'expected a list "users"; got none'),
        (lambda text: "null", 'expected a list "users"; got none'),
        (lambda text: f"{text} more", "error: trailing garbage\" after user 'bob'"),
        (lambda text: text + text, "error: trailing garbage\" after user 'bob'"),
    ],
)
def test_refuses_what_is_not_json(tmp_path, small, spoil, message):
    refuses_text(tmp_path, spoil(json.dumps(small)), message)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("0.25", "NaN", "invalid char in json text.\" after user 'ann'"),
        ("0.25", "Infinity", "invalid char in json text.\" after user 'ann'"),
        ("0.25", "1e999", "overflow\" after user 'ann'"),
        ("0.25", "9" * 30, "overflow\" after user 'ann'"),
        ("0.25,", "0.25", "element, I expect ',' or ']'\" after user 'ann'"),
        (
            BOB,
            f"{BOB}, {BOB}",
            "user 'bob' expected data once in \"user_data\"; got twice",
        ),
        (
            '"y": [1]',
            '"y": [1], "y": [1]',
            "user 'bob' expected every key once; got \"y\"",
        ),
        ('"y": [1]', '"x": [[0, 0, 0]], "y": [1]', 'every key once; got "x" twice'),
    ],
)
def test_refuses_text(tmp_path, small, old, new, message):
    text = json.dumps(small)
    assert old in text
    refuses_text(tmp_path, text.replace(old, new), message)


def test_refuses_endless_nesting(tmp_path, small):
    deep = 5000 * "[" + 5000 * "]"
    text = json.dumps(small).replace('["ann", "bob"]', f'["ann", {deep}]')
    refuses_text(tmp_path, text, 'names in "users"; got lists in lists without end')


def refuses_text(folder, text, message):
    path = folder / "bad.json"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        list(tiny(path))
    assert f"{path} is damaged" in str(caught.value)
    assert message in str(caught.value)


def test_refuses_other_encodings(tmp_path, small):
    path = tmp_path / "bad.json"
    text = json.dumps(small)
    for content, message in (
        (
            text.replace("bob", "b\xf6b").encode("latin-1"),
            "invalid bytes in UTF8 string",
        ),
        (text.encode("utf-16"), "invalid char in json text"),
    ):
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=f'{NOT_JSON}got "lexical error: {message}'
        ):
            list(tiny(path))


class TestByWriter:
    @pytest.fixture
    def data(self, tmp_path):
        sizes = {f"f{place:02}": 4 + place * 5 % 13 for place in range(20)}
        folder = tmp_path / "data" / "leaf" / "femnist"
        for place, name in enumerate(("all_data_0", "all_data_1")):
            users = list(sizes)[place::2]
            part = {user: sizes[user] for user in users}
            write(folder / "train" / f"{name}.json", file_of(part, seed=place))
        write(folder / "test" / "all_data_0.json", file_of({"g": 30}, seed=5))
        return load("femnist", data_dir=tmp_path / "data")

    def test_a_client_is_a_writer(self, data):
        clients, root = federate(data, 8, by_client(min_size=5), root_size=20, seed=1)
        rows, mask = np.asarray(clients.indices), np.asarray(clients.mask)
        owners = [np.unique(data.owners[rows[i][mask[i]]]) for i in range(8)]
        assert [len(each) for each in owners] == [1] * 8
        assert len(np.unique(owners)) == 8
        sizes = mask.sum(axis=1)
        assert sizes.min() >= 5
        assert len(set(sizes.tolist())) > 3
        # All samples of a writer but those of the root dataset.
        in_root = {image.tobytes() for image in root.inputs}
        for i in range(8):
            (its,) = np.nonzero(data.owners == owners[i][0])
            left = [r for r in its if data.train.inputs[r].tobytes() not in in_root]
            assert sorted(rows[i][mask[i]]) == left

    def test_trains(self, data):
        clients, _ = federate(data, 4, by_client(min_size=5), root_size=0)
        sim = fs.Simulation(
            model=fs.models.mlp((28, 28, 1), num_classes=62, hidden=(8,)),
            clients=clients,
            test=data.test,
            client_update=fs.local_sgd(optax.sgd(0.1), epochs=1, batch_size=4),
            aggregator=fs.aggregators.fedavg(),
        )
        state, history = sim.run(jax.random.key(0), num_rounds=1)
        start = sim.init(jax.random.key(0)).params
        moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), state.params, start)
        assert min(jax.tree.leaves(moved)) > 0
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
        assert np.isfinite(history.loss).all()
