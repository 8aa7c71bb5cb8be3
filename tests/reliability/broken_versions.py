"""Whether the tests would notice: charlm is broken on purpose, in one way after another.

    python tests/reliability/broken_versions.py [--only WORD]

Every break is one replacement in a copy of the package, and the test that has to fail on it, in its short
form. A break that no test notices ends the program with an error.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.breaks import BREAKS, Break

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("charlm", "tests", "pyproject.toml", "README.md", "docs", "examples", "constraints.txt")


def caught(copy: Path, broken: Break) -> tuple[bool, float]:
    """Break the copy, run the test, mend the copy; return whether the test failed, and its seconds."""
    file = copy / broken.file
    whole = file.read_text(encoding="utf-8")
    began = time.perf_counter()
    try:
        file.write_text(whole.replace(broken.old, broken.new), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-n0", "-p", "no:cacheprovider", broken.test]
        environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    finally:
        file.write_text(whole, encoding="utf-8")
    if done.returncode not in {0, 1}:  # no such test, or no test run at all
        sys.exit(f"{broken.test} could not be run:\n{done.stdout[-2_000:]}{done.stderr[-2_000:]}")
    return done.returncode == 1, time.perf_counter() - began


def main() -> None:
    """Go through all breaks and say of each what came of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="breaks that have this word in their file or sentence")
    args = parser.parse_args()
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            source = ROOT / name
            ignored = shutil.ignore_patterns("__pycache__", ".*")
            if source.is_dir():
                shutil.copytree(source, copy / name, ignore=ignored)
            else:
                shutil.copy(source, copy / name)
        for broken in BREAKS:
            if args.only not in f"{broken.file} {broken.what}":
                continue
            noticed, seconds = caught(copy, broken)
            missed += not noticed
            said = "caught" if noticed else "MISSED"
            print(f"{said}  {broken.what}  [{broken.test.rpartition('/')[2]}, {seconds:.0f} s]", flush=True)
    if missed:
        sys.exit(f"{missed} were missed")


if __name__ == "__main__":
    main()
