"""Command lines: the preset an option list starts from, the way back, and errors."""

import dataclasses
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import tyro
from rich.console import Console

from fedjax_sim.registry import lookup

T = TypeVar("T")


def preset(arguments: Sequence[str], presets: Mapping[str, T], usual: str) -> T:
    """The configuration that ``--preset`` names, ``usual`` where it is not given.

    Raises:
        ValueError: an unknown preset.

    Example:
        >>> preset(["--rounds", "3", "--preset=b"], {"a": 1, "b": 2}, "a")
        2
    """
    name = usual
    for i, word in enumerate(arguments):
        if word == "--preset" and i + 1 < len(arguments):
            name = arguments[i + 1]
        elif word.startswith("--preset="):
            name = word.split("=", 1)[1]
    return lookup("preset", name, presets)


def parse(arguments: Sequence[str], usual: T, description: str | None) -> T:
    """The configuration of an option list that starts from ``usual``, its preset."""
    config: Any = usual
    return tyro.cli(
        type(usual),
        args=arguments,
        default=usual,
        description=description,
        prog=f"python -m experiments.{config.STUDY}",
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def main(parse: Callable[[list[str]], T], run: Callable[[T, Console], Any]) -> None:
    """A study as a program: errors the user can mend are a line, and no traceback."""
    try:
        run(parse(sys.argv[1:]), Console(highlight=False, markup=False))
    except (ValueError, TypeError, OSError, OverflowError, MemoryError) as error:
        sys.exit(f"error: {error}")


def command(config: Any, usual: Any) -> str:
    """The command line of a configuration: its preset and what differs from ``usual``.

    ``usual`` is the preset's configuration.
    """
    module = f"experiments.{config.STUDY}"
    words = ["python", "-m", module, "--preset", config.preset]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == getattr(usual, field.name) or field.name in ("preset", "resume"):
            continue
        values = value if isinstance(value, tuple) else (value,)
        words += [f"--{field.name.replace('_', '-')}", *map(str, values)]
    return shlex.join(words)
