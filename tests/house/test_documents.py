"""Every code block of README and docs runs, and every example does what it says.

On a page, in an empty directory with my.txt, other.txt, val.txt and beginning.txt:

- ```python blocks run from top to bottom in one process, with warnings as errors; a ```text block directly
  below one is exactly what it prints.
- The lines of a ```console block that begin with `$ ` run in a shell and must succeed (or not, after
  `<!-- fails -->`); what they print is not compared.
- Training is cut short: `<!-- in tests: A => B -->` replaces A by B, `--minutes N` becomes a few steps, and
  `python-docs` a small corpus. From the first block that was changed on, numbers are not compared, only what
  stands around them, and after `<!-- varies -->` nothing is.
- `<!-- given: runs/first -->` puts a small trained run there.

`--whole-docs` replaces nothing, and then numbers are compared, too: for whoever renews the pages.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import string
import subprocess
import sys
from pathlib import Path

import pytest
from harness.documents import Page, masked, numbers, plain_environment
from harness.warm import WarmPython

from charlm.testing import tiny_corpus

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SLOW_ARGUMENTS = {"gpt_from_config.py": ["20"], "resume.py": ["20"], "own_loop.py": ["40"]}  # steps
WHOLE_TOLERANCE = 0.02  # of a number, between two machines


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory, warm_python: WarmPython) -> Path:
    """Name a run of a small GPT that knows all printable ASCII characters, and its n-gram baseline."""
    folder = tmp_path_factory.mktemp("given")
    (folder / "text.txt").write_text(string.printable + tiny_corpus(6_000), encoding="utf-8")
    words = ["train", "text.txt", "-o", "run", "--max-steps", "20", "--n-layer", "1", "--eval-interval", "10"]
    subprocess.run(warm_python("-m", "charlm", "-q", *words), check=True, cwd=folder, env=plain_environment())
    return folder / "run"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_code_blocks_run_in_order_and_print_what_is_shown(
    document: Path,
    tmp_path: Path,
    small_corpus: Path,
    small_run: Path,
    warm_python: WarmPython,
    request: pytest.FixtureRequest,
) -> None:
    page = Page(document)
    if page.uses("tinyshakespeare") and "CHARLM_DATA_DIR" not in os.environ:
        pytest.skip("CHARLM_DATA_DIR is not set: this page reads tinyshakespeare.txt from there")
    folder = tmp_path / "page"
    folder.mkdir()
    for seed, name in enumerate(("my", "other", "val", "beginning")):
        (folder / f"{name}.txt").write_text(tiny_corpus(6_000, seed=seed), encoding="utf-8")
    for name in page.given:
        shutil.copytree(small_run, folder / name)
    whole = request.config.getoption("--whole-docs")
    blocks = page.runnable()
    codes = [block.code if whole else page.shortened(block, small_corpus) for block in blocks]
    changed = False
    for block, code, printed in zip(blocks, codes, page.run(warm_python, folder, codes), strict=True):
        changed = changed or code != block.code
        shown = block.output
        if shown is None or "varies" in shown.remarks:
            continue
        if whole or changed:
            assert masked(printed) == masked(shown.code), block.code
            if whole:
                for got, expected in zip(numbers(printed), numbers(shown.code), strict=True):
                    assert math.isclose(got, expected, rel_tol=WHOLE_TOLERANCE), block.code
        else:
            assert printed == shown.code, block.code


def test_the_code_of_every_page_passes_the_type_checker(tmp_path: Path) -> None:
    """As strictly as the package, but for what pyproject.toml says of `pages`; with mypy's own cache."""
    (tmp_path / "pages").mkdir()
    for document in DOCUMENTS:
        code = "\n".join(block.code for block in Page(document).blocks if block.language == "python")
        name = "_".join(document.relative_to(ROOT).with_suffix("").parts).replace("-", "_")
        (tmp_path / "pages" / f"{name}.py").write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", str(tmp_path / "pages")],
        check=False,
        cwd=ROOT,
        env={**plain_environment(), "MYPYPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.name)
def test_example_runs_on_a_small_corpus(
    example: Path, tmp_path: Path, small_corpus: Path, warm_python: WarmPython
) -> None:
    takes_corpus = "load_corpus" in example.read_text(encoding="utf-8")
    arguments = [str(small_corpus), *SLOW_ARGUMENTS.get(example.name, [])] if takes_corpus else []
    done = subprocess.run(
        warm_python("-W", "error", example, *arguments),
        check=True,
        cwd=tmp_path,
        env=plain_environment(),
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


def test_the_first_code_that_a_newcomer_sees_is_the_same_on_every_page() -> None:
    pages = (ROOT / "README.md", ROOT / "docs" / "index.md", ROOT / "docs" / "guides" / "quickstart.md")
    first = {next(b.code for b in Page(page).blocks if b.language == "python") for page in pages}
    assert len(first) == 1
    (code,) = first
    assert 'GPT.from_config("cpu-1min", vocab_size=' in code
    assert 'RECIPES["cpu-1min"]' in code
