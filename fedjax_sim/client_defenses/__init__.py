"""What clients do to their own data before they train: leave samples of it out."""

from collections.abc import Callable

from fedjax_sim.client_defenses.sanitization import sanitization
from fedjax_sim.types import ClientDefense

CLIENT_DEFENSES: dict[str, Callable[..., ClientDefense]] = {
    "sanitization": sanitization,
}

__all__ = ["CLIENT_DEFENSES", "sanitization"]
