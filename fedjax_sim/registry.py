"""Checks of what a user gives: names of factories, and counts."""

import difflib
from collections.abc import Mapping
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def lookup(kind: str, name: str, table: Mapping[str, T]) -> T:
    """The entry ``name`` of ``table``.

    Raises:
        ValueError: unknown name; says the nearest match and every valid name.

    Example:
        >>> lookup("aggregator", "krumm", {"krum": 1, "mean": 2})
        Traceback (most recent call last):
        ...
        ValueError: unknown aggregator 'krumm'. Did you mean 'krum'? Valid: krum, mean.
    """
    if name in table:
        return table[name]
    close = difflib.get_close_matches(str(name), table, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ValueError(
        f"unknown {kind} {name!r}.{hint} Valid: {', '.join(sorted(table))}."
    )


def check_count(what: str, value: object, lowest: int) -> None:
    """Refuses a count that is not a whole number, or is below ``lowest``.

    Raises:
        TypeError: not an integer.
        ValueError: below ``lowest``.

    Example:
        >>> check_count("num_rounds", 0, 1)
        Traceback (most recent call last):
        ...
        ValueError: num_rounds must be >= 1; got 0.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{what} must be an integer; got {value!r}.")
    if value < lowest:
        raise ValueError(f"{what} must be >= {lowest}; got {value}.")
