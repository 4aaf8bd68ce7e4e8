"""Strict JAX, fixed seeds, no trace in the user's home, real data where there is any.

What is set when this file loads holds for the doctests of the package too, and for the
processes that tests start.
"""

import os
import random
import shutil
import tempfile
from pathlib import Path

# Before JAX is imported. No platform is forced: the suite runs on what JAX finds.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # compile what is under test
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # workers share a GPU
os.environ["MPLBACKEND"] = "Agg"

import chex
import jax
import numpy as np
import pytest

REPOSITORY = Path(__file__).parents[1]
REAL_DATA = Path(os.environ.get("FEDJAX_SIM_DATA") or REPOSITORY / "../shared/data")

# A broadcast over axes of different number is a bug more often than a wish.
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config: pytest.Config) -> None:
    # One cache per run, so that parallel workers decode a data set once.
    if "PYTEST_XDIST_WORKER" not in os.environ:
        cache = tempfile.mkdtemp(prefix="fedjax_sim-tests-")
        os.environ["FEDJAX_SIM_CACHE"] = cache
        config.add_cleanup(lambda: shutil.rmtree(cache, ignore_errors=True))


@pytest.fixture(autouse=True)
def _isolated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same start for every test: seeds, trace counters, no data folder set."""
    monkeypatch.delenv("FEDJAX_SIM_DATA", raising=False)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  # for libraries that use the global generator
    chex.clear_trace_counter()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real data, laid out as ``--data-dir`` expects; the test is skipped without."""
    if not REAL_DATA.is_dir():
        pytest.skip(f"needs real data: no folder {REAL_DATA} (set FEDJAX_SIM_DATA)")
    return REAL_DATA.resolve()
