"""Strict JAX, fixed seeds, no trace in the user's home, real data where there is any.

What is set when this file loads holds for the doctests of the package too, and for the
processes that tests start.
"""

import gc
import os
import random
import shutil
import tempfile
from pathlib import Path

# Before JAX is imported. No platform is forced: the suite runs on what JAX finds.
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # workers share a GPU
os.environ["MPLBACKEND"] = "Agg"

import chex
import jax
import numpy as np
import pytest

REPOSITORY = Path(__file__).parents[1]
REAL_DATA = Path(os.environ.get("FEDJAX_SIM_DATA") or REPOSITORY / "../shared/data")

# Tracing makes millions of short-lived objects, hardly any of them in cycles.
gc.set_threshold(200_000, 50, 100)

# A broadcast over axes of different number is a bug more often than a wish.
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config: pytest.Config) -> None:
    # One cache per run, so that parallel workers decode a data set once.
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if not worker:
        cache = tempfile.mkdtemp(prefix="fedjax_sim-tests-")
        os.environ["FEDJAX_SIM_CACHE"] = cache
        config.add_cleanup(lambda: shutil.rmtree(cache, ignore_errors=True))
    # Compiled programs are kept for this run only, and by worker: JAX may read what
    # another process has half written.
    compiled = f"{os.environ['FEDJAX_SIM_CACHE']}/compiled{worker}"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled
    jax.config.update("jax_compilation_cache_dir", compiled)


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
