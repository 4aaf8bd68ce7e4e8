"""Where data comes from: the data folder, the search through places, downloads."""

import hashlib
import os
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import pooch
import requests

T = TypeVar("T")

DOWNLOAD_TIMEOUT = 10.0  # seconds to connect, and between two packets


class NotHere(Exception):
    """A place does not hold the data; the message names the place and the reason."""


def cache_dir() -> Path:
    """``$FEDJAX_SIM_CACHE``, else this package's folder in the user's cache folder."""
    configured = os.environ.get("FEDJAX_SIM_CACHE")
    return Path(configured) if configured else Path(pooch.os_cache("fedjax_sim"))


def resolve_data_dir(data_dir: str | os.PathLike[str] | None) -> Path:
    """``data_dir``, else ``$FEDJAX_SIM_DATA``, else ``data`` in ``cache_dir()``."""
    chosen = data_dir or os.environ.get("FEDJAX_SIM_DATA") or cache_dir() / "data"
    folder = Path(chosen).expanduser()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(
            f"data_dir must be a folder; got the file {folder}. Pass the folder that "
            "holds idx/, tfds/ and so on."
        )
    return folder


def first_found(name: str, places: Iterable[Callable[[], T]]) -> T:
    """What the first of ``places`` returns that does not raise ``NotHere``.

    Raises:
        FileNotFoundError: no place has it; lists the reason each one gave.

    Example:
        >>> def empty():
        ...     raise NotHere("the shelf: empty")
        >>> first_found("book", [empty, lambda: "found"])
        'found'
    """
    tried = []
    for place in places:
        try:
            return place()
        except NotHere as miss:
            tried.append(f"  - {miss}")
    raise FileNotFoundError(
        f"data set {name!r} was not found. Tried:\n"
        + "\n".join(tried)
        + "\nTwo ways out: --data-dir DIR (in code: load(name, data_dir=DIR)) with a "
        "folder that holds it, or --dataset digits, which needs no files."
    )


def md5(path: Path) -> str:
    """MD5 checksum of a file, as data-set publishers give it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def fingerprint(checksums: Iterable[str]) -> str:
    """One checksum for a sequence of checksums.

    Example:
        >>> fingerprint(["a", "b"]) == fingerprint(["b", "a"])
        False
    """
    return hashlib.md5(" ".join(checksums).encode()).hexdigest()


def reachable(url: str) -> bool:
    """Whether a server answers at ``url``, whatever it answers."""
    try:
        requests.head(url, timeout=DOWNLOAD_TIMEOUT)
    except requests.exceptions.RequestException:
        return False
    return True


def download(file_name: str, folder: Path, urls: Sequence[str], checksum: str) -> Path:
    """Fetches ``file_name`` into ``folder`` from the first of ``urls`` that has it.

    A file whose MD5 is not ``checksum`` is discarded. An existing file must not be
    passed: one with another checksum would be overwritten.

    Raises:
        NotHere: every URL failed; gives each one's reason.
    """
    failures = []
    for url in urls:
        try:
            return Path(
                pooch.retrieve(
                    url + file_name,
                    known_hash=f"md5:{checksum}",
                    fname=file_name,
                    path=folder,
                    downloader=pooch.HTTPDownloader(timeout=DOWNLOAD_TIMEOUT),
                )
            )
        except (OSError, ValueError) as error:  # ValueError: another checksum
            reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200)
            failures.append(f"{url}{file_name} ({reason})")
    raise NotHere(f"download to {folder}: " + "; ".join(failures))
