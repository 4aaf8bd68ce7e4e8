"""Vital signs in CSV files: excerpts of MIMIC and BIDMC, and any table of one's own."""

import datetime
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from fedjax_sim.data.sources import fingerprint, md5
from fedjax_sim.data.vitals_series import (
    CHANNELS,
    Record,
    Vitals,
    gridded,
    measured,
    missing_channel,
    not_found,
)
from fedjax_sim.registry import check_type, lookup

PAP_COLUMNS = {
    "heart_rate": "hr",
    "pap_systolic": "pap_sys",
    "pap_diastolic": "pap_dia",
    "pap_mean": "pap_mean",
}
BIDMC_COLUMNS = {
    "heart_rate": "HR",
    "pulse": "PULSE",
    "respiration_rate": "RESP",
    "spo2": "SpO2",
}


def mimic_pap(
    data_dir: Path, channels: tuple[str, ...], *, one_per_patient: bool = True
) -> Vitals:
    """Heart rate and pulmonary artery pressure of patients of MIMIC, once a minute.

    From ``data_dir/vitals/mimic_pap/mimic_pap_numerics.csv``, an excerpt of the
    numerics of the waveform database's matched subset. It has no respiration.

    Args:
        data_dir: folder with the data.
        channels: out of ``PAP_COLUMNS``.
        one_per_patient: keep of each patient the record with the most measured values
            in ``channels``, of equal ones the earliest.

    Raises:
        ValueError: the file is damaged, or has no such channel.
        FileNotFoundError: there is no file.

    References:
        Moody, Moody, Villarroel, Clifford and Silva, "MIMIC-III Waveform Database
        Matched Subset" (version 1.0), PhysioNet, 2020.
    """
    check_type("one_per_patient", one_per_patient, bool)
    path = data_dir / "vitals" / "mimic_pap" / "mimic_pap_numerics.csv"
    columns = _own_columns("mimic_pap", channels, PAP_COLUMNS)
    if not path.is_file():
        raise not_found("mimic_pap", [path])
    table = _table(path, ["record", "subject", "t_s", *columns])
    names, patients = (_text(path, table, key) for key in ("record", "subject"))
    seconds = _numbers(path, table, "t_s", blank=False)
    values = measured(_columns(path, table, columns), channels)
    records = []
    for rows in _groups(names):
        name, patient = str(names[rows[0]]), str(patients[rows[0]])
        first = datetime.timedelta(seconds=seconds[rows].min())
        series = gridded(seconds[rows], values[rows], 60, f"record {name} of {path}")
        records.append(Record(name, patient, _start(path, name) + first, series))
    num_records = len(records)
    if one_per_patient:
        best: dict[str, Record] = {}
        for record in records:
            kept = best.setdefault(record.patient, record)
            if _worth(record) > _worth(kept):
                best[record.patient] = record
        records = list(best.values())
    return Vitals(
        name="mimic_pap",
        records=tuple(records),
        channels=channels,
        interval=60.0,
        source=f"{len(records)} of {num_records} records of numerics of MIMIC's "
        f"waveform database, matched subset, {path.name} (md5 {md5(path)})",
        licence="ODbL 1.0",
    )


def bidmc(data_dir: Path, channels: tuple[str, ...]) -> Vitals:
    """Eight minutes of each of 53 critically ill patients, once a second.

    From ``data_dir/vitals/bidmc/bidmc_NN_Numerics.csv``. The records have no date.

    Raises:
        ValueError: a file is damaged, or there is no such channel.
        FileNotFoundError: there are no files.

    References:
        Pimentel, Johnson, Charlton, Birrenkott, Watkinson, Tarassenko and Clifton,
        "Toward a Robust Estimation of Respiratory Rate From Pulse Oximeters", IEEE
        Transactions on Biomedical Engineering, 2017.
    """
    columns = _own_columns("bidmc", channels, BIDMC_COLUMNS)
    pattern = "bidmc_*_Numerics.csv"
    folder = data_dir / "vitals" / "bidmc"
    paths = sorted(folder.glob(pattern))
    if not paths:
        raise not_found("bidmc", [folder / pattern])
    records = []
    for path in paths:
        table = _table(path, ["Time [s]", *columns])
        seconds = _numbers(path, table, "Time [s]", blank=False)
        values = measured(_columns(path, table, columns), channels)
        name = path.name.removesuffix("_Numerics.csv")
        records.append(Record(name, name, None, gridded(seconds, values, 1, str(path))))
    return Vitals(
        name="bidmc",
        records=tuple(records),
        channels=channels,
        interval=1.0,
        source=f"BIDMC PPG and Respiration Dataset, numerics of {len(records)} "
        f"patients (md5 of md5s {fingerprint(map(md5, paths))})",
        licence="ODC-By 1.0",
    )


def csv(
    data_dir: Path,
    channels: tuple[str, ...],
    *,
    path: str | os.PathLike[str],
    patient: str = "patient",
    time: str = "time",
    interval: float | None = None,
    **columns: str,
) -> Vitals:
    """A table of one's own: a row for each time at which something was measured.

    Every patient becomes a record of equal steps, each the mean of what was measured
    in it, from the patient's first row on. Rows may be in any order, and several may
    have the same time.

    Args:
        data_dir: not used; every source takes it.
        channels: out of ``CHANNELS``.
        path: the file, relative to the current folder; compressed where it ends so,
            as in ``.csv.gz``.
        patient: the column that says whose the row is.
        time: the column with the times: seconds if all are numbers, otherwise ISO 8601
            as in ``2183-04-28 17:47:00`` (other orders of day and month would be
            guesses). ``Record.start`` is in UTC where they say their zone.
        interval: seconds of a step; None for 60.
        columns: the column of a channel that is not under the channel's own name, as in
            ``heart_rate="HR"``. Empty cells, and NaN, NULL and the like, are not
            measured, and so are the last ones of a row that ends before them.

    Raises:
        ValueError: the file is damaged or empty, lacks a column, has another cell than
            a number or a time where one is needed, dates without dashes, times some of
            which say their zone, or is far too long for the interval; one column is
            named for two things.
        FileNotFoundError: there is no file.
    """
    del data_dir
    file = Path(path).expanduser()
    step = 60.0 if interval is None else interval
    valid = dict.fromkeys(("path", "patient", "time", *CHANNELS))
    for channel in columns:
        lookup("csv option", channel, valid)
        if channel not in channels:
            raise ValueError(
                f"a column was given for {channel}, which is not loaded: expected one "
                f"of the channels {', '.join(channels)}. Add it to channels, or leave "
                "the column out."
            )
    if not file.is_file():
        raise not_found("csv", [file.absolute()], "path=... with the table's place")
    wanted = [columns.get(channel, channel) for channel in channels]
    used = [patient, time, *wanted]
    twice = [name for name in used if used.count(name) > 1]
    if twice:
        raise ValueError(
            "patient, time and every channel need columns of their own; got "
            f"{twice[0]!r} for more than one. Say which are meant: patient='...', "
            "time='...', heart_rate='...'."
        )
    table = _table(
        file,
        used,
        "Say which columns are meant: patient='...', time='...', heart_rate='...'.",
    )
    patients = _text(file, table, patient)
    seconds, epoch = _times(file, table, time)
    values = measured(_columns(file, table, wanted), channels)
    records = []
    for rows in _groups(patients):
        name = str(patients[rows[0]])
        series = gridded(seconds[rows], values[rows], step, f"patient {name} of {file}")
        start = None
        if epoch is not None:
            start = epoch + datetime.timedelta(seconds=seconds[rows].min())
        records.append(Record(name, name, start, series))
    return Vitals(
        name="csv",
        records=tuple(records),
        channels=channels,
        interval=step,
        source=f"{file.name}, {len(records)} patients (md5 {md5(file)})",
        licence="that of the file",
    )


def _own_columns(
    source: str, channels: tuple[str, ...], columns: dict[str, str]
) -> list[str]:
    for channel in channels:
        if channel not in columns:
            way_out = "Ask for those, or take another source."
            raise missing_channel(f"source {source!r}", channel, columns, way_out)
    return [columns[channel] for channel in channels]


def _worth(record: Record) -> tuple[int, float]:
    """How much a record has, and of equal ones more for the earlier."""
    assert record.start is not None
    since = record.start - datetime.datetime(1, 1, 1)
    return int((~np.isnan(record.values)).sum()), -since.total_seconds()


def _start(path: Path, name: str) -> datetime.datetime:
    try:
        return datetime.datetime.strptime(name.split("-", 1)[1], "%Y-%m-%d-%H-%M")
    except (IndexError, ValueError) as error:
        expected = "records named <patient>-<year>-<month>-<day>-<hour>-<minute>"
        raise _damaged(path, expected, repr(name)) from error


def _groups(names: np.ndarray) -> list[np.ndarray]:
    """The rows of each name, in the order in which the names first appear."""
    _, first, codes = np.unique(names, return_index=True, return_inverse=True)
    rows = np.split(np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes)))
    return [rows[code] for code in np.argsort(first)]


def _table(path: Path, columns: Iterable[str], way_out: str = "") -> Any:
    """A data frame of text with all columns of a file."""
    import pandas as pd  # slow to import

    try:
        # The header as a row like the others, since pandas would rename the second of
        # two equal names, and drop cells that no column is for.
        table = pd.read_csv(
            path, header=None, index_col=False, dtype=str, skipinitialspace=True
        )
    except Exception as error:  # damage shows in many ways, all with the same remedy
        got = f"{type(error).__name__}: {error}, in {path.stat().st_size} bytes"
        expected = "a header and rows of as many cells, in UTF-8"
        raise _damaged(path, expected, got) from error
    names = [str(name).strip() for name in table.iloc[0]]
    for column in columns:
        if names.count(column) != 1:
            got = "it twice in " if names.count(column) else ""
            expected = f"a column {column!r}"
            raise _damaged(path, expected, f"{got}{', '.join(names)}", way_out)
    if len(table) == 1:
        raise _damaged(path, "rows below the header", "none")
    return table.set_axis(names, axis="columns").iloc[1:].reset_index(drop=True)


def _text(path: Path, table: Any, column: str) -> np.ndarray:
    cells = table[column].str.strip()
    blank = (cells.isna() | (cells == "")).to_numpy()
    if blank.any():
        row = int(blank.argmax())
        raise _damaged(path, f"{column!r} in every row", _cell(cells, row))
    return cells.to_numpy(dtype=str)


def _columns(path: Path, table: Any, columns: Iterable[str]) -> np.ndarray:
    return np.stack([_numbers(path, table, column) for column in columns], axis=1)


def _numbers(path: Path, table: Any, column: str, blank: bool = True) -> np.ndarray:
    """The numbers of a column, NaN for an empty cell where ``blank`` allows it."""
    import pandas as pd

    cells = table[column]
    numbers = pd.to_numeric(cells, errors="coerce").to_numpy(np.float64)
    bad = ~np.isfinite(numbers)
    if blank:
        bad &= cells.notna().to_numpy()
    if bad.any():
        row = int(bad.argmax())
        raise _damaged(
            path,
            f"finite numbers in {column!r}",
            _cell(cells, row),
            "Leave a cell empty where nothing was measured." if blank else "",
        )
    return numbers


def _times(
    path: Path, table: Any, column: str
) -> tuple[np.ndarray, datetime.datetime | None]:
    """Seconds, and since when if the column has dates."""
    import pandas as pd

    cells = table[column]
    numbers = pd.to_numeric(cells, errors="coerce").to_numpy(np.float64)
    if np.isfinite(numbers).all():
        dates = pd.to_datetime(cells, format="%Y%m%d", errors="coerce")
        if dates.notna().all():
            raise _damaged(
                path,
                f"seconds in {column!r}, or dates as in 2183-04-28 17:47:00",
                f"{_cell(cells, 0)}, which may be either",
                "Write dates with dashes, or count the seconds from another day.",
            )
        return numbers, None
    stamps = pd.to_datetime(cells, format="ISO8601", utc=True, errors="coerce")
    # A number alone is no date, although the year 2183 would be one.
    bad = stamps.isna().to_numpy() | np.isfinite(numbers)
    if 2 * np.isfinite(numbers).sum() >= len(cells):  # seconds are meant
        bad = ~np.isfinite(numbers)
    if bad.any():
        row = int(bad.argmax())
        raise _damaged(
            path,
            f"seconds in all of {column!r}, or dates as in 2183-04-28 17:47:00",
            _cell(cells, row),
        )
    zoned = cells.str.contains(r":\d\d(?:\.\d+)?\s*(?:Z|[+-]\d\d(?::?\d\d)?)\s*$")
    if zoned.any() and not zoned.all():
        row = int((~zoned).to_numpy().argmax())
        raise _damaged(
            path,
            f"the zone of all times in {column!r}, or of none",
            f"{_cell(cells, row)}, which says none",
        )
    first = stamps.min()
    seconds = (stamps - first).dt.total_seconds().to_numpy(np.float64)
    return seconds, first.tz_localize(None).to_pydatetime(warn=False)


def _cell(cells: Any, row: int) -> str:
    shown = repr(cells[row]) if isinstance(cells[row], str) else "an empty cell"
    return f"{shown} in row {row + 1} below the header"


def _damaged(path: Path, expected: str, got: str, way_out: str = "") -> ValueError:
    way_out = way_out or "Copy or export the file again."
    return ValueError(
        f"{path} is damaged or not such a table: expected {expected}; got {got}. "
        f"{way_out}"
    )
