"""Every worked example is used by some test."""

from pathlib import Path

import pytest

from tests.pages import EXAMPLES, VALIDATION

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def text():
    files = [path for path in TESTS.rglob("test_*.py") if path != Path(__file__)]
    return "\n".join(path.read_text() for path in files)


@pytest.mark.parametrize("identifier", EXAMPLES)
def test_example_is_used(identifier, text):
    algorithm = EXAMPLES[identifier]["algorithm"]
    assert f'"{identifier}"' in text or f'"{algorithm}"' in text


@pytest.mark.parametrize(
    "algorithm", sorted({entry["algorithm"] for entry in VALIDATION})
)
def test_validation_entries_are_used(algorithm, text):
    assert f'"{algorithm}"' in text
