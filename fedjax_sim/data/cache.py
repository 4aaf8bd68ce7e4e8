"""Decoded data sets in the user's cache folder, keyed by their source's checksum."""

import logging
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fedjax_sim.data.sources import cache_dir
from fedjax_sim.types import Dataset, Examples

logger = logging.getLogger(__name__)


def decoded_path(name: str, key: str) -> Path:
    """Where the decoded copy of data set ``name`` with source checksum ``key`` lies."""
    safe_name = re.sub(r"[^\w.-]", "_", name)
    return cache_dir() / "decoded" / f"{safe_name}-{key}.npz"


def cached(name: str, key: str, decode: Callable[[], Dataset]) -> Dataset:
    """The decoded copy under ``key``, made by ``decode()`` where there is none.

    A copy that cannot be read is rebuilt, and a copy that cannot be written is done
    without; each with a warning.

    Raises:
        ValueError: the data set has what a copy does not keep: another task than
            classification, or a validation part.
    """
    dataset = read(name, key)
    if dataset is None:
        logger.info("decoding %s; later loads use the decoded copy", name)
        dataset = decode()
        if dataset.task != "classification" or dataset.val is not None:
            part = "no validation part" if dataset.val is None else "a validation part"
            raise ValueError(
                "a decoded copy keeps a classification set without a validation part; "
                f"got {name} with task {dataset.task!r} and {part}. Load it without "
                "the cache."
            )
        _write(dataset, decoded_path(name, key))
    return dataset


def read(name: str, key: str) -> Dataset | None:
    """The decoded copy under ``key``, or None where there is none or it is damaged."""
    path = decoded_path(name, key)
    if not path.exists():
        return None
    try:
        # The archive's CRC-32 of each array is compared as the array is read. Opened
        # here because np.load leaves a file open that is no archive.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = dict(archive)
        return Dataset(
            name=name,
            train=Examples(arrays["train_inputs"], arrays["train_targets"]),
            test=Examples(arrays["test_inputs"], arrays["test_targets"]),
            class_names=tuple(arrays["class_names"].tolist()),
            source=str(arrays["source"]),
            licence=str(arrays["licence"]),
            owners=arrays.get("owners"),  # of data that come divided
        )
    except Exception as error:  # damage shows in many ways, all with the same remedy
        warnings.warn(
            f"the decoded copy {path} is damaged ({type(error).__name__}: {error}); it "
            "is ignored, and rebuilt from the source.",
            stacklevel=2,
        )
        return None


def _write(dataset: Dataset, path: Path) -> None:
    # Renamed when complete, so that a killed or concurrent run leaves no partial copy.
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    owners: dict[str, Any] = {}
    if dataset.owners is not None:
        owners["owners"] = dataset.owners
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                np.savez(
                    file,
                    train_inputs=dataset.train.inputs,
                    train_targets=dataset.train.targets,
                    test_inputs=dataset.test.inputs,
                    test_targets=dataset.test.targets,
                    class_names=np.array(dataset.class_names),
                    source=np.array(dataset.source),
                    licence=np.array(dataset.licence),
                    **owners,
                )
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        warnings.warn(
            f"could not keep a decoded copy of {dataset.name} at {path} ({error}); the "
            "next load decodes again. Set FEDJAX_SIM_CACHE to a writable folder.",
            stacklevel=2,
        )
