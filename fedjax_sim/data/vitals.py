"""Vital signs of patients by the name of their source.

A source is a function ``(data_dir, channels, *, its own options) -> Vitals``; put one
of your own into ``SOURCES``. It returns NaN where nothing was measured (``measured`` in
``vitals_series`` helps). With an option ``interval`` it is handed that of
``load_vitals``; without one, ``load_vitals`` averages what it returns.
"""

import inspect
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fedjax_sim.data.sources import resolve_data_dir
from fedjax_sim.data.synthetic_vitals import generated
from fedjax_sim.data.vitals_series import CHANNELS, MOST, Record, Vitals, averaged
from fedjax_sim.data.vitals_tables import bidmc, csv, mimic_pap
from fedjax_sim.data.vitals_wfdb import mimic_numerics
from fedjax_sim.registry import check_number, check_type, lookup

__all__ = ["CHANNELS", "SOURCES", "Record", "Vitals", "load_vitals"]

SOURCES: dict[str, Callable[..., Vitals]] = {
    "mimic_numerics": mimic_numerics,
    "mimic_pap": mimic_pap,
    "bidmc": bidmc,
    "csv": csv,
    "generated": generated,
}


def load_vitals(
    source: str,
    data_dir: str | os.PathLike[str] | None = None,
    channels: Sequence[str] = ("heart_rate", "respiration_rate"),
    interval: float | None = None,
    skip_empty: bool = False,
    **options: Any,
) -> Vitals:
    """Series of vital signs, one or more of each patient, at one interval.

    Not measured, and NaN in the result, is what the source leaves out, a pressure of 0,
    and a rate or saturation of 0 or less.

    The clinical tables of MIMIC-III need credentials and are not read as such. Who has
    them exports a CSV file of CHARTEVENTS with the columns patient, time, heart_rate
    (itemid 211 and 220045) and respiration_rate (618 and 220210) and loads it with
    ``load_vitals("csv", path="chartevents.csv", interval=3600)``: nurses chart about
    once an hour. The documentation has the query.

    Args:
        source: ``mimic_numerics`` (records of MIMIC's waveform database, once a
            minute; options ``records``, ``download``), ``mimic_pap`` (heart rate and
            pulmonary artery pressure of 351 patients, once a minute;
            ``one_per_patient``), ``bidmc`` (53 patients for 8 minutes, once a second),
            ``csv`` (any table: ``path``, ``patient``, ``time``, and ``heart_rate="HR"``
            for the column of a channel), or ``generated`` (needs no files:
            ``patients``, ``minutes``, ``seed``, ``missing``). Their functions describe
            the options.
        data_dir: folder with the data; by default ``$FEDJAX_SIM_DATA``, else ``data``
            in the user's cache folder.
        channels: what the columns are, out of ``CHANNELS``, in the order wanted.
        interval: seconds between two samples. None keeps that of the source, 60 for
            ``csv``. Otherwise a whole multiple of it (for ``csv`` any): a sample is
            then the mean of what was measured in its bin, NaN if nothing was; the last
            bin may be shorter.
        skip_empty: leave out the records without any measured sample in one of
            ``channels``, which are an error otherwise; ``Vitals.left_out`` names them.
        options: of the source.

    Returns:
        A ``Vitals`` with ``float32 [T, C]`` records.

    Raises:
        TypeError: an option that the source needs is not given, or one is of another
            type.
        ValueError: unknown source, channel or option, a channel that a record does not
            have or that is empty in it, a sample that no monitor shows, an interval
            that does not fit, or a damaged file.
        FileNotFoundError: there are no files; lists the places and the ways out.

    Example:
        >>> vitals = load_vitals("generated", patients=3, minutes=1440, interval=300)
        >>> len(vitals.records), vitals.records[0].values.shape, vitals.interval
        (3, (288, 2), 300.0)
        >>> vitals.channels
        ('heart_rate', 'respiration_rate')
    """
    check_type("source", source, str, "Give one such as 'generated'.")
    read = lookup("source of vital signs", source, SOURCES)
    wanted = _channels(channels)
    check_type("skip_empty", skip_empty, bool)
    if interval is not None:
        interval = check_number("interval", interval, low=0)
    if _checked(source, read, options):
        options = {**options, "interval": interval}
    vitals = read(resolve_data_dir(data_dir), wanted, **options)
    own = vitals.interval
    if interval is not None and own != interval:
        vitals = vitals._replace(
            records=tuple(
                record._replace(
                    values=averaged(record.values, own, interval, f"source {source!r}")
                )
                for record in vitals.records
            ),
            interval=interval,
        )
    _check_samples(vitals)
    return _without_empty(vitals, skip_empty)


def _channels(channels: Sequence[str]) -> tuple[str, ...]:
    if isinstance(channels, str):
        raise TypeError(
            f"channels must be a list of names; got the text {channels!r}. Give "
            f"({channels!r},)."
        )
    if not isinstance(channels, Sequence):
        raise TypeError(
            "channels must be a list of names, whose order is that of the columns; got "
            f"a {type(channels).__name__}."
        )
    for channel in channels:
        lookup("channel", channel, CHANNELS)
    wanted = tuple(channels)
    if not wanted or len(set(wanted)) < len(wanted):
        raise ValueError(
            "channels must be one or more different names of "
            f"{', '.join(CHANNELS)}; got {wanted}."
        )
    return wanted


def _checked(source: str, read: Callable[..., Vitals], options: dict[str, Any]) -> bool:
    """Whether a source takes an interval; refuses options that it does not take."""
    parameters = inspect.signature(read).parameters.values()
    own = {each.name: each for each in parameters if each.kind is each.KEYWORD_ONLY}
    # A source that takes any name, as csv does, checks the names itself.
    if not any(each.kind is each.VAR_KEYWORD for each in parameters):
        common = ("data_dir", "channels", "interval", "skip_empty")
        for option in options:
            lookup(f"{source} option", option, {**own, **dict.fromkeys(common)})
    takes_interval = own.pop("interval", None) is not None
    for name, parameter in own.items():
        if parameter.default is parameter.empty and name not in options:
            raise TypeError(
                f"source {source!r} needs the option {name}; got "
                f"{', '.join(options) or 'none'}. Pass {name}=..."
            )
    return takes_interval


def _check_samples(vitals: Vitals) -> None:
    """Refuses what no monitor shows."""
    for record in vitals.records:
        beyond = np.abs(record.values) > MOST  # False for what is not measured
        if beyond.any():
            row, column = np.argwhere(beyond)[0]
            channel = vitals.channels[column]
            raise ValueError(
                f"sample {row} of record {record.name} is a {channel} of "
                f"{record.values[row, column]:g} {CHANNELS[channel]}: expected at most "
                f"{MOST:,.0f}. Mend the file, or leave it empty there."
            )


def _without_empty(vitals: Vitals, skip_empty: bool) -> Vitals:
    """``vitals`` if every channel of every record has a measured sample."""
    kept, left_out = [], dict(vitals.left_out)
    for record in vitals.records:
        empty = np.isnan(record.values).all(axis=0)
        if not empty.any():
            kept.append(record)
            continue
        channel = vitals.channels[int(empty.argmax())]
        if not skip_empty:
            raise ValueError(
                f"record {record.name} needs a measured sample of {channel}: expected "
                f"some in {len(record.values)} samples; got none. Leave such records "
                "out with skip_empty=True, or ask for other channels."
            )
        left_out[record.name] = f"{record.name} has no measured sample of {channel}."
    if not kept:
        raise ValueError(
            f"source {vitals.name!r} needs a record with measured samples of "
            f"{' and '.join(vitals.channels)}; got {len(left_out)} records, each "
            "without one of them. Ask for other channels or records."
        )
    return vitals._replace(records=tuple(kept), left_out=left_out)
