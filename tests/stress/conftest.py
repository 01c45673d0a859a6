"""Reliability figures: the same tests small in `make test`, and at full size with a table by `make stress`."""

from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, settings

FIGURES = pytest.StashKey[list[tuple[str, str]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--stress", action="store_true", help="run tests/stress at full size and print the figures")


def is_full_size(config: pytest.Config) -> bool:
    # Where pytest was not started on this folder, it has read the command line before it knew the option.
    return config.getoption("--stress", default=False)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FIGURES] = []
    common = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True}
    settings.register_profile("small", max_examples=25, derandomize=True, database=None, **common)
    settings.register_profile("full", max_examples=2000, **common)
    settings.load_profile("full" if is_full_size(config) else "small")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if is_full_size(config):
        terminalreporter.section("reliability figures")
        for name, outcome in config.stash[FIGURES]:
            terminalreporter.write_line(f"{name}: {outcome}")


@pytest.fixture
def amount(request: pytest.FixtureRequest) -> Callable[[int, int], int]:
    """A function (small, full) -> the size to run at."""
    return lambda small, full: full if is_full_size(request.config) else small


@pytest.fixture
def outcomes(request: pytest.FixtureRequest) -> Iterator[Counter[str]]:
    """Count what became of the cases of a test; at the end they stand in the table of figures."""
    counts: Counter[str] = Counter()
    yield counts
    told = ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common())
    request.config.stash[FIGURES].append((request.node.name, f"{counts.total()} cases: {told}"))
