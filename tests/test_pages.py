"""Every worked example is used by some test, but for those of studies to come."""

from pathlib import Path

import pytest

from tests.pages import EXAMPLES, VALIDATION

TESTS = Path(__file__).parent
# Algorithms of studies that are not here yet.
TO_COME = {
    "fedsecure",
    "ts_data_poisoning",
    "ts_backdoor",
}


@pytest.fixture(scope="module")
def text():
    files = [path for path in TESTS.rglob("test_*.py") if path != Path(__file__)]
    return "\n".join(path.read_text() for path in files)


@pytest.mark.parametrize("identifier", EXAMPLES)
def test_example_is_used(identifier, text):
    algorithm = EXAMPLES[identifier]["algorithm"]
    used = f'"{identifier}"' in text or f'"{algorithm}"' in text
    assert used != (algorithm in TO_COME)


@pytest.mark.parametrize(
    "algorithm", sorted({entry["algorithm"] for entry in VALIDATION})
)
def test_validation_entries_are_used(algorithm, text):
    assert f'"{algorithm}"' in text or algorithm in TO_COME
