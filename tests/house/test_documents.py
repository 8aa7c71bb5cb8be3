"""Every code block of README and docs runs, and every example does what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SLOW_ARGUMENTS = {"gpt_from_config.py": ["20"]}  # steps


def blocks(document: Path) -> list[tuple[str, str]]:
    """Return the code of each block, and the text block that follows it directly: what it prints."""
    pattern = r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```$)?"
    found: list[tuple[str, str]] = re.findall(pattern, document.read_text(encoding="utf-8"), re.M | re.S)
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_python_blocks_run_in_order_and_print_what_is_shown(
    document: Path, tmp_path: Path, small_corpus: Path
) -> None:
    end = "<end of block>"
    code = "\n".join(f"{block}\nprint({end!r})" for block, _ in blocks(document))
    # The blocks train on a named corpus for long; here on a small one, and for a few steps.
    code = code.replace('"python-docs"', repr(str(small_corpus))).replace("max_steps=1_000", "max_steps=20")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"},
        stdout=subprocess.PIPE,
        encoding="utf-8",
    )
    for (block, shown), printed in zip(blocks(document), done.stdout.split(f"{end}\n"), strict=False):
        assert printed == (shown or printed), block


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.name)
def test_example_runs_on_a_small_corpus(example: Path, tmp_path: Path, small_corpus: Path) -> None:
    takes_corpus = "load_corpus" in example.read_text(encoding="utf-8")
    arguments = [str(small_corpus), *SLOW_ARGUMENTS.get(example.name, [])] if takes_corpus else []
    done = subprocess.run(
        [sys.executable, "-W", "error", str(example), *arguments],
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip()
    assert not done.stderr


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.name)
def test_example_is_short(example: Path) -> None:
    assert len(example.read_text(encoding="utf-8").splitlines()) < 60


def test_the_first_version_of_the_changelog_is_the_package_version() -> None:
    import charlm

    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[(\d[^\]]*)\]", changelog, re.M)
    assert versions[0] == charlm.__version__
