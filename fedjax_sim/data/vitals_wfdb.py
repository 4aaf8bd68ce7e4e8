"""MIMIC's numerics, a monitor's own averages, in the WFDB format of PhysioNet."""

import math
import re
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import requests

from fedjax_sim.data.sources import DOWNLOAD_TIMEOUT, fingerprint, md5
from fedjax_sim.data.vitals_series import (
    Record,
    Vitals,
    averaged,
    measured,
    missing_channel,
    not_found,
)
from fedjax_sim.registry import check_type

NUMERICS_URL = "https://physionet.org/files/mimic3wdb-matched/1.0/"
# As letters and digits only: newer monitors write "ABP Sys" and "%SpO2".
SIGNALS = {
    "heart_rate": "hr",
    "pulse": "pulse",
    "respiration_rate": "resp",
    "spo2": "spo2",
    "abp_systolic": "abpsys",
    "abp_diastolic": "abpdias",
    "abp_mean": "abpmean",
    "pap_systolic": "papsys",
    "pap_diastolic": "papdias",
    "pap_mean": "papmean",
}


def mimic_numerics(
    data_dir: Path,
    channels: tuple[str, ...],
    *,
    records: Sequence[str] | None = None,
    download: bool = True,
    interval: float | None = None,
) -> Vitals:
    """Numerics records of MIMIC's waveform database, at their monitors' interval.

    From ``data_dir/vitals/mimic_numerics/<patient>/<record>n.hea`` and the ``.dat``
    files that the header names. The samples are compared with the header's checksums.

    Args:
        data_dir: folder with the data.
        channels: which signals, as in ``SIGNALS``.
        records: such as ``["p000020/p000020-2183-04-28-17-47n"]``; None for all that
            are on the disk.
        download: whether a listed record of the matched subset (a patient such as
            p000020) that is not on the disk is fetched from PhysioNet into ``data_dir``
            (the numerics are open, without credentials).
        interval: seconds, to which every record is averaged; None for what all the
            records have in common.

    Raises:
        ValueError: a record is corrupt or lacks a channel, or the records have
            different intervals and none was given.
        FileNotFoundError: there is no record, or a listed one cannot be had.

    References:
        Moody, Moody, Villarroel, Clifford and Silva, "MIMIC-III Waveform Database
        Matched Subset" (version 1.0), PhysioNet, 2020.
        Johnson, Pollard, Shen, Lehman, Feng, Ghassemi, Moody, Szolovits, Celi and Mark,
        "MIMIC-III, a freely accessible critical care database", Scientific Data, 2016.
    """
    folder = data_dir / "vitals" / "mimic_numerics"
    check_type("download", download, bool)
    if records is None:
        headers = sorted(folder.glob("*/*n.hea"))
        if not headers:
            raise not_found(
                "mimic_numerics",
                [folder / "<patient>" / "<record>n.hea"],
                "records=['p000020/p000020-2183-04-28-17-47n', ...], which are "
                "downloaded",
            )
    else:
        headers = [_located(folder, name, download) for name in _names(records)]
    found, intervals, checksums = [], [], []
    for header in headers:
        record, own = _read(header, channels)
        values = averaged(record.values, own, interval, f"record {record.name}")
        found.append(record._replace(values=values))
        intervals.append(own)
        checksums += [md5(path) for path in (header, *_files(header))]
    if interval is None and len(set(intervals)) > 1:
        fits = math.lcm(*(round(1000 * own) for own in intervals)) / 1000
        other = next(k for k, own in enumerate(intervals) if own != intervals[0])
        raise ValueError(
            "records must have one interval: got "
            f"{intervals[0]:g} s in {found[0].name} and {intervals[other]:g} s in "
            f"{found[other].name}. Pass a whole multiple of each, such as interval="
            f"{fits:g}, to average them to it, or choose with records=[...]."
        )
    return Vitals(
        name="mimic_numerics",
        records=tuple(found),
        channels=channels,
        interval=intervals[0] if interval is None else interval,
        source=f"numerics of MIMIC's waveform database, {len(found)} records (md5 of "
        f"md5s {fingerprint(checksums)})",
        licence="ODbL 1.0",
    )


def _names(records: Sequence[str]) -> list[str]:
    """Names without the ending, each once and with its patient."""
    example = "such as 'p000020/p000020-2183-04-28-17-47n'"
    if isinstance(records, str):
        raise TypeError(f"records must be a list of names; got the text {records!r}.")
    if not records:
        raise ValueError(f"records must name at least one, {example}; got none.")
    names = []
    for name in records:
        check_type("a record's name", name, str, f"Give one {example}.")
        short = name.removesuffix(".hea")
        if not re.fullmatch(r"\w+/[\w-]+", short):
            raise ValueError(
                f"a record's name must be <patient>/<record>, {example}; got {name!r}."
            )
        if short in names:
            raise ValueError(f"records must name each once; got {short} twice.")
        names.append(short)
    return names


def _located(folder: Path, name: str, download: bool) -> Path:
    """The header of a record, all files of which are there or have been fetched."""
    header = folder / f"{name}.hea"
    needed = _files(header) if header.is_file() else [header]
    absent = [path for path in needed if not path.is_file()]
    if not absent:
        return header
    patient = header.parent.name
    if not re.fullmatch(r"p\d{6}", patient):
        raise not_found(
            "mimic_numerics",
            absent,
            f"place the record's files in {header.parent} by hand: only those of the "
            "matched subset, of patients such as p000020, are downloaded",
        )
    if not download:
        raise not_found("mimic_numerics", absent, "download=True")
    url = f"{NUMERICS_URL}{patient[:3]}/{patient}/"
    try:
        _fetch(url, header)
    except OSError as error:
        there = f"{url}{header.name} ({type(error).__name__}: {error})"
        raise not_found("mimic_numerics", [*map(str, absent), there]) from error
    return header


def _fetch(url: str, header: Path) -> None:
    """Downloads what is absent of a record, which appears when all of it is there."""
    folder = header.parents[2]  # where no search for headers comes
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="download-") as temporary:
        part = Path(temporary, header.name)
        if header.is_file():
            shutil.copyfile(header, part)
        else:
            _get(url, part)
        fetched = []
        for path in _files(part, shown=url + header.name):
            if not (header.parent / path.name).is_file():
                _get(url, path)
                fetched.append(path)
        header.parent.mkdir(parents=True, exist_ok=True)
        for path in (*fetched, part):  # the header last: with it the record is there
            path.replace(header.parent / path.name)


def _get(url: str, path: Path) -> None:
    response = requests.get(url + path.name, timeout=DOWNLOAD_TIMEOUT)
    response.raise_for_status()
    path.write_bytes(response.content)  # at most a few MB, for months of minutes


def _wfdb() -> Any:
    """The library, which is slow to import and calls pandas in a deprecated way."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import wfdb

    return wfdb


def _files(header: Path, shown: str = "") -> list[Path]:
    """The files with samples that a header names."""
    wfdb = _wfdb()
    try:
        # wfdb assumes 250 Hz for a frequency that it cannot read, and a gain of 200 for
        # one of 0.
        text = header.read_text("ascii", errors="replace")
        lines = [x.split() for x in text.splitlines() if x.strip() and x[0] != "#"]
        numbers = [lines[0][2], *(line[2] for line in lines[1:])]
        frequency, *gains = (float(re.split("[/(]", x)[0]) for x in numbers)
        names = wfdb.rdheader(str(header.with_suffix(""))).file_name
        usable = [math.isfinite(gain) and gain != 0 for gain in gains]
        if not 1e-6 <= frequency <= 1e6 or not all(usable):
            raise ValueError(f"{frequency:g} Hz, gains {gains}")
        if not names or None in names:
            raise ValueError(f"files {names}")
    except Exception as error:  # damage shows in many ways, all with the same remedy
        raise _corrupt(
            shown or header,
            "a WFDB header of one segment with a sampling frequency, and signals with "
            "gains other than 0",
            f"{type(error).__name__}: {error}",
        ) from error
    return [header.parent / name for name in dict.fromkeys(names)]


def _read(header: Path, channels: tuple[str, ...]) -> tuple[Record, float]:
    """One record, checked, and the seconds between two of its samples."""
    for path in _files(header):
        if not path.is_file():
            raise _corrupt(header, f"the file {path} that it names", "no such file")
    wfdb = _wfdb()
    try:
        record = wfdb.rdrecord(str(header.with_suffix("")), physical=False)
        sums = record.calc_checksum()
    except Exception as error:
        files = ", ".join(
            f"{path.name} of {path.stat().st_size} bytes" for path in _files(header)
        )
        raise _corrupt(
            header,
            "as many samples in its .dat files as it says, one per signal and step",
            f"{files} ({type(error).__name__}: {error})",
        ) from error
    for signal, got, expected in zip(record.sig_name, sums, record.checksum):
        if expected is not None and (got - expected) % 65536:
            raise _corrupt(
                header,
                f"samples of {signal} with the checksum {expected % 65536}",
                f"{got}, in {', '.join(path.name for path in _files(header))}",
            )
    name = header.stem
    # A line without a description has no name.
    signals = [re.sub(r"[^a-z0-9]", "", (s or "").lower()) for s in record.sig_name]
    for channel in channels:
        if SIGNALS[channel] not in signals:
            raise missing_channel(
                f"record {name}",
                channel,
                [str(signal) for signal in record.sig_name],
                "Choose the records that have it with records=[...], or other channels",
            )
    columns = [signals.index(SIGNALS[channel]) for channel in channels]
    seconds = 1 / record.fs
    whole = round(seconds)  # the header has 0.0166666666667 Hz for a minute
    own = whole if abs(seconds - whole) < 1e-4 * seconds else round(seconds, 6)
    values = measured(record.dac()[:, columns], channels)
    patient = header.parent.name
    return Record(name, patient, record.base_datetime, values), float(own)


def _corrupt(path: str | Path, expected: str, got: str) -> ValueError:
    return ValueError(
        f"{path} or its samples are corrupt or truncated: expected {expected}; got "
        f"{got}. Delete the record's files and copy them again; those of the matched "
        "subset are downloaded where records=[...] lists them."
    )
