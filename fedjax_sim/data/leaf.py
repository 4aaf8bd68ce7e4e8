"""LEAF's JSON files, which say whose every sample is; FEMNIST."""

import json
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import ijson
import numpy as np

from fedjax_sim.data import cache
from fedjax_sim.data.sources import NotHere, fingerprint, first_found, md5
from fedjax_sim.types import Dataset, Examples

SIDE = 28  # pixels
CLASS_NAMES = tuple("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
# -k 0 keeps writers with few samples; by_client(min_size) leaves them out.
COMMAND = "./preprocess.sh -s niid --sf 1.0 -k 0 -t sample"


class _Entry(dict[str, Any]):
    """A JSON object that remembers a key that came twice, where the last value wins."""

    repeated: str | None = None

    def __setitem__(self, key: str, value: Any) -> None:
        if key in self:
            self.repeated = key
        super().__setitem__(key, value)


def femnist(data_dir: Path) -> Dataset:
    """Handwritten digits and letters of some 3,500 people, 28x28 pixels, 62 classes.

    From ``data_dir/leaf/femnist/train/*.json`` and ``test/*.json`` as LEAF's scripts
    make them; there is no download. ``owners`` are the writers, in the order of the
    files. The paper has 805,263 samples of 3,550 writers; what is read is what the
    files hold. Ink is dark on light paper, other than in MNIST.

    Raises:
        ValueError: a file is damaged or not in LEAF's format, a writer is in two files
            of a part, or only one of the two parts is there.
        FileNotFoundError: there are no files.

    References:
        Caldas, Duddu, Wu, Li, Konečný, McMahan, Smith and Talwalkar, "LEAF: A Benchmark
        for Federated Settings", arXiv:1812.01097, 2018.
        Cohen, Afshar, Tapson and van Schaik, "EMNIST: Extending MNIST to handwritten
        letters", IJCNN 2017.
    """
    return first_found("femnist", [lambda: load_files(data_dir)])


def load_files(data_dir: Path) -> Dataset:
    """FEMNIST from its JSON files, or from the copy that was decoded from them.

    Raises:
        NotHere: there are no files.
        ValueError: as for ``femnist``.
    """
    folder = data_dir / "leaf" / "femnist"
    train, test = (sorted((folder / part).glob("*.json")) for part in ("train", "test"))
    if not train and not test:
        raise NotHere(
            f"LEAF files: no *.json in {folder / 'train'} or {folder / 'test'}. LEAF "
            "(TalwalkarLab/leaf) makes them of NIST's archives: in its data/femnist "
            f"run {COMMAND}, then copy data/train and data/test to {folder}"
        )
    if not train or not test:
        missing = folder / ("test" if train else "train")
        raise ValueError(
            f"FEMNIST is LEAF's files of both parts: expected *.json in {missing} too; "
            f"got {'none' if missing.is_dir() else 'no such folder'}. Copy both "
            f"data/train and data/test of LEAF's data/femnist to {folder}."
        )
    for path in (*train, *test):
        if not path.is_file():
            got = "a folder" if path.is_dir() else "a link to nothing"
            raise _malformed(path, None, "a file", got)
    # With the word between them, a file that moves to the other part counts.
    key = fingerprint([*map(md5, train), "test", *map(md5, test)])
    return cache.cached("femnist", key, lambda: _decode(train, test, key))


def read_users(
    path: Path,
    num_features: int,
    num_classes: int,
    bounds: tuple[float, float] = (-np.inf, np.inf),
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """The users of a LEAF file one by one, so that a file may be larger than memory.

    The file is ``{"users": [names], "num_samples": [counts], "user_data": {name: {"x":
    [[numbers]], "y": [labels]}}}``, its keys in any order; others, such as
    "hierarchies", are passed over. LEAF leaves users without samples in "user_data":
    they are not yielded, and need not be in "users".

    Args:
        path: the file.
        num_features: numbers of one sample.
        num_classes: labels are ``0..num_classes - 1``.
        bounds: lowest and highest value of an input.

    Yields:
        Name, inputs ``float32 [s, num_features]`` and targets ``int32 [s]`` of every
        user, in the order of "user_data".

    Raises:
        ValueError: the file is damaged or not in this format, which shows when the
            reading gets there.

    Example:
        >>> import tempfile
        >>> data = '{"ann": {"x": [[0.5, 1], [0, 1]], "y": [3, 1]}}'
        >>> head = '"users": ["ann"], "num_samples": [2]'
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "all_data.json")
        ...     size = path.write_text(f'{{{head}, "user_data": {data}}}')
        ...     ((name, inputs, targets),) = read_users(path, 2, num_classes=10)
        >>> name, inputs.tolist(), targets.tolist()
        ('ann', [[0.5, 1.0], [0.0, 1.0]], [3, 1])

    References:
        Caldas, Duddu, Wu, Li, Konečný, McMahan, Smith and Talwalkar, "LEAF: A Benchmark
        for Federated Settings", arXiv:1812.01097, 2018.
    """
    counts = _counts(path)
    seen: set[str] = set()
    where = "before the first user"
    try:
        with path.open("rb") as file:
            for user, data in ijson.kvitems(
                file, "user_data", map_type=_Entry, use_float=True
            ):
                where = f"after user {user!r}"
                if user in seen:
                    raise _malformed(path, user, 'data once in "user_data"', "twice")
                seen.add(user)
                inputs, targets = _samples(
                    path, user, data, num_features, num_classes, bounds
                )
                if len(targets) != counts.get(user, 0):
                    listed = f"{counts[user]}" if user in counts else "no such user"
                    raise _malformed(
                        path,
                        user,
                        'as many samples as "users" and "num_samples" say',
                        f"{len(targets)} samples, and {listed} there",
                    )
                if len(targets):
                    yield user, inputs, targets
    except ijson.JSONError as error:
        raise _not_json(path, where, error) from error
    for user in counts:
        if user not in seen:
            raise _malformed(path, user, 'data in "user_data"', "none")


def _counts(path: Path) -> dict[str, int]:
    """Number of samples of every user as the file lists them."""
    users, counts = (_list(path, key) for key in ("users", "num_samples"))
    if not all(isinstance(user, str) for user in users):
        raise _malformed(path, None, 'names in "users"', _shown(users))
    if not all(type(count) is int and count >= 0 for count in counts):
        raise _malformed(path, None, 'counts in "num_samples"', _shown(counts))
    if len(users) != len(counts):
        expected = 'a number in "num_samples" for each of "users"'
        raise _malformed(path, None, expected, f"{len(counts)} for {len(users)}")
    listed = dict(zip(users, counts, strict=True))
    if len(listed) < len(users):
        twice = next(user for user in users if users.count(user) > 1)
        raise _malformed(path, twice, 'its name once in "users"', "it twice")
    return listed


def _list(path: Path, key: str) -> list[Any]:
    """A list at the top level, for which the file is read no further than need be."""
    try:
        with path.open("rb") as file:
            value = next(ijson.items(file, key, use_float=True), None)
    except ijson.JSONError as error:
        raise _not_json(path, f'while looking for "{key}"', error) from error
    if not isinstance(value, list):
        got = "none" if value is None else _shown(value)
        raise _malformed(path, None, f'a list "{key}"', got)
    return value


def _samples(
    path: Path,
    user: str,
    data: Any,
    num_features: int,
    num_classes: int,
    bounds: tuple[float, float],
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets of one user."""
    if not isinstance(data, _Entry) or not {"x", "y"} <= data.keys():
        got = list(data) if isinstance(data, _Entry) else data
        raise _malformed(path, user, 'an object with "x" and "y"', _shown(got))
    if data.repeated is not None:
        got = f'"{data.repeated}" twice'
        raise _malformed(path, user, "every key once", got)
    x, y = data["x"], data["y"]
    for key in ("x", "y"):
        if not isinstance(data[key], list):
            raise _malformed(path, user, f'a list "{key}"', _shown(data[key]))
    if len(x) != len(y):
        got = f"{len(x)} samples and {len(y)} labels"
        raise _malformed(path, user, 'as many samples in "x" as labels in "y"', got)
    for place, row in enumerate(x):
        if not isinstance(row, list) or len(row) != num_features:
            got = f"{len(row)} numbers" if isinstance(row, list) else _shown(row)
            expected = f'{num_features} numbers in every sample of "x"'
            raise _malformed(path, user, expected, f"{got} in sample {place}")
    inputs = _numbers(path, user, "x", list(chain.from_iterable(x)))
    inputs = inputs.reshape(-1, num_features)
    good = np.isfinite(inputs) & (inputs >= bounds[0]) & (inputs <= bounds[1])
    if not good.all():
        place, feature = np.argwhere(~good)[0]
        expected = f'"x" between {bounds[0]:g} and {bounds[1]:g}'
        got = f"{inputs[place, feature]:g} in sample {place}"
        raise _malformed(path, user, expected, got)
    labels = _numbers(path, user, "y", y)
    good = (labels == np.rint(labels)) & (labels >= 0) & (labels < num_classes)
    if not good.all():
        place = int(np.argmin(good))
        expected = f'whole labels in "y", 0..{num_classes - 1}'
        raise _malformed(path, user, expected, f"{labels[place]:g} for sample {place}")
    return inputs.astype(np.float32), labels.astype(np.int32)


def _numbers(path: Path, user: str, key: str, values: list[Any]) -> np.ndarray:
    # NumPy would make numbers of booleans, and of numbers text where there is some.
    if not set(map(type, values)) <= {int, float}:
        other = next(value for value in values if type(value) not in (int, float))
        raise _malformed(path, user, f'numbers in "{key}"', _shown(other))
    return np.array(values, np.float64)


def _decode(train: list[Path], test: list[Path], key: str) -> Dataset:
    samples, owners = _part(train)
    return Dataset(
        name="femnist",
        train=samples,
        test=_part(test)[0],
        class_names=CLASS_NAMES,
        source=f"FEMNIST as {len(train)} + {len(test)} LEAF JSON files "
        f"(md5 of md5s {key})",
        licence="NIST Special Database 19: a work of the US government, not subject to "
        "copyright in the United States; LEAF's scripts: BSD 2-Clause",
        owners=owners,
    )


def _part(paths: list[Path]) -> tuple[Examples, np.ndarray]:
    """The samples of all files, and the number of the writer of each."""
    inputs, targets = [], []
    file_of: dict[str, Path] = {}
    for path in paths:
        for user, x, y in read_users(path, SIDE**2, len(CLASS_NAMES), bounds=(0, 1)):
            if user in file_of:
                raise _malformed(
                    path,
                    user,
                    "a writer in one file of the part only",
                    f"the one of {file_of[user].name} again",
                )
            file_of[user] = path
            pixels = np.rint(255 * x).astype(np.uint8)  # LEAF divided them by 255
            inputs.append(pixels.reshape(-1, SIDE, SIDE, 1))
            targets.append(y)
    if not inputs:
        raise ValueError(
            f"FEMNIST needs samples: expected some in the {len(paths)} files of "
            f"{paths[0].parent}; got none. Make them anew: in LEAF's data/femnist run "
            f"{COMMAND}"
        )
    owners = np.repeat(np.arange(len(targets), dtype=np.int32), [*map(len, targets)])
    return Examples(np.concatenate(inputs), np.concatenate(targets)), owners


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value)
    except RecursionError:
        return "lists in lists without end"
    return text if len(text) <= 60 else f"{text[:60]} ..."


def _not_json(path: Path, where: str, error: Exception) -> ValueError:
    # Of the parser's text what is wrong; then come lines with the place.
    reason = re.split(r"\n|\\n", str(error))[0].removeprefix("b'")
    size = path.stat().st_size
    got = f'"{reason}" {where}, in a file of {size} bytes'
    expected = "one complete JSON object in UTF-8, which has no NaN or Infinity"
    return _malformed(path, None, expected, got)


def _malformed(path: Path, user: str | None, expected: str, got: str) -> ValueError:
    of_user = "" if user is None else f"of user {user!r} "
    return ValueError(
        f"{path} is damaged or not in LEAF's format: {of_user}expected {expected}; got "
        f"{got}. Copy the file again; if that does not help, delete the folders that "
        "LEAF's preprocess.sh made and run it anew."
    )
