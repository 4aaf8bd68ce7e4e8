"""Look-up of factories by the one name they have in code, command line and results."""

import difflib
from collections.abc import Mapping
from typing import TypeVar

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
