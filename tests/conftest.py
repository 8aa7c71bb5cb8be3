"""Shared fixtures: the corpus of the lecture, a small text of our own, and tests that are repeated."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

# One thread each: the models here are tiny, and threads that wait for each other would cost more than they
# do. It also holds for the processes that tests start. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from harness.breaks import break_charlm
from harness.campaign import Campaign
from harness.command import environment
from harness.warm import WarmPython

break_charlm(os.environ.get("BREAK_CHARLM"))  # what reliability/broken_versions.py asks for

PASSED = pytest.StashKey[bool]()


@pytest.fixture(scope="session")
def shakespeare() -> str:
    """Tiny Shakespeare, from the folder that CHARLM_DATA_DIR names."""
    folder = os.environ.get("CHARLM_DATA_DIR")
    if not folder:
        pytest.skip("CHARLM_DATA_DIR is not set: this test reads tinyshakespeare.txt from there")
    return Path(folder, "tinyshakespeare.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Name a file with a few thousand characters of generated text."""
    from charlm.testing import tiny_corpus

    path = tmp_path_factory.mktemp("corpus") / "small.txt"
    path.write_text(tiny_corpus(6_000), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def warm_python() -> Iterator[WarmPython]:
    """Run what needs a process of its own, and not a new Python."""
    with WarmPython(environment()) as python:
        yield python


def pytest_configure(config: pytest.Config) -> None:
    # Of properties that do not say how many they need; HYPOTHESIS_PROFILE=default tries a hundred.
    # There is no limit of time for an example: others may use the machine, too.
    slow = hypothesis.HealthCheck.too_slow
    hypothesis.settings.register_profile(
        "charlm", max_examples=25, deadline=None, suppress_health_check=[slow]
    )
    hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "charlm"))
    # What a shell starts in the background ignores Ctrl-C, and so would the processes that tests send it to.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("charlm")
    group.addoption(
        "--all",
        action="store_true",
        help="run the slow tests, too: processes, documents, browsers, campaigns",
    )
    group.addoption("--trials", type=int, help="trials of each repeated test, instead of its short form")
    group.addoption("--whole-docs", action="store_true", help="run the code of README and docs uncut")
    group.addoption("--seed", type=int, default=0, help="seed of the repeated tests (0)")


# Coverage is measured in the quick tests, and in the slow ones of these rooms: elsewhere slow tests go over
# the same lines once more, and counting costs them two fifths of their time. So what is reported is the least
# that there is.
MEASURED = {"cli", "files", "text"}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the slow tests out, unless all are asked for, or a file or folder inside of tests is named."""
    tests = Path(__file__).parent
    if config.pluginmanager.hasplugin("_cov"):
        for item in items:
            room = item.path.relative_to(tests).parts[0] if item.path.is_relative_to(tests) else "charlm"
            if item.get_closest_marker("slow") and room not in MEASURED:
                item.add_marker("no_cover")
    if config.getoption("--all"):
        return
    named = {Path(argument.partition("::")[0]).resolve() for argument in config.args}
    named = {path for path in named if path != tests and path.is_relative_to(tests)}
    slow = {
        item
        for item in items
        if item.get_closest_marker("slow") and named.isdisjoint({item.path, *item.path.parents})
    }
    config.hook.pytest_deselected(items=[item for item in items if item in slow])
    items[:] = [item for item in items if item not in slow]


@pytest.fixture(autouse=True)
def _quick_tests_start_no_python(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse a new Python in a test that is not marked as slow: that takes seconds."""
    if request.node.get_closest_marker("slow"):
        return
    begin = subprocess.Popen.__init__

    def refusing(self: Any, args: Any, *others: Any, **options: Any) -> None:
        if isinstance(args, list | tuple) and args and args[0] == sys.executable:
            pytest.fail("a test that starts a process must be marked: pytest.mark.slow")
        begin(self, args, *others, **options)

    monkeypatch.setattr(subprocess.Popen, "__init__", refusing)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call":
        item.stash[PASSED] = report.passed
    return report


@pytest.fixture
def campaign(request: pytest.FixtureRequest) -> Iterator[Campaign]:
    """How often a test of `tests/reliability` repeats what it does, and what it counts."""
    config = request.config
    own = Campaign(request.node.name, config.getoption("--seed"), config.getoption("--trials"))
    yield own
    if line := own.line(request.node.stash.get(PASSED, False)):
        request.node.user_properties.append(
            ("campaign", line)
        )  # travels with the report, also between processes


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [
        r for group in terminalreporter.stats.values() for r in group if isinstance(r, pytest.TestReport)
    ]
    lines = [
        str(value)
        for report in reports
        if report.when == "teardown"
        for name, value in report.user_properties
        if name == "campaign"
    ]
    if lines:
        terminalreporter.section("repeated tests")
        for line in lines:
            terminalreporter.write_line(line)
