"""Checks of what a user gives: names of factories, types, and counts."""

import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

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


def check_type(what: str, value: object, kind: type, hint: str = "") -> None:
    """Refuses a value of another type, which a NamedTuple would let pass.

    Raises:
        TypeError: with the type expected and the one that came.

    Example:
        >>> check_type("seed", print, int)
        Traceback (most recent call last):
        ...
        TypeError: seed must be of type int; got builtin_function_or_method. Did you \
forget to call the factory, as in median()?
    """
    if isinstance(value, kind):
        return
    if callable(value) and not hint:
        hint = "Did you forget to call the factory, as in median()?"
    message = f"{what} must be of type {kind.__name__}; got {type(value).__name__}."
    raise TypeError(f"{message} {hint}".rstrip())


def check_count(what: str, value: Any, lowest: int) -> int:
    """``value``, refused unless it is an integer of at least ``lowest``.

    Raises:
        TypeError: not an integer.
        ValueError: below ``lowest``.

    Example:
        >>> check_count("num_rounds", 0, 1)
        Traceback (most recent call last):
        ...
        ValueError: num_rounds must be an integer of at least 1; got 0.
    """
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not (whole and value >= lowest):
        error = ValueError if whole else TypeError
        raise error(f"{what} must be an integer of at least {lowest}; got {value!r}.")
    return int(value)
