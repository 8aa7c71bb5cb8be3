"""Whether the tests would notice: charlm is broken on purpose, in one way after another.

    python tests/reliability/broken_versions.py [--only WORD]

`harness/breaks.py` has the ways, and for each the test that has to fail on it, in its short form. The test
runs in a process of its own, in which charlm is broken before any test is collected, and so it is in the
processes that the test starts. A break that no test notices ends the program with an error.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.breaks import BREAKS, Break

ROOT = Path(__file__).resolve().parents[2]


def caught(broken: Break) -> tuple[bool, float]:
    """Run the test on the broken version; return whether it failed, and its seconds."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n0", "-p", "no:cacheprovider", broken.test]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "BREAK_CHARLM": broken.apply.__name__}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in {0, 1}:  # no such test, or no test run at all
        sys.exit(f"{broken.test} could not be run:\n{done.stdout[-2_000:]}{done.stderr[-2_000:]}")
    return done.returncode == 1, time.perf_counter() - began


def main() -> None:
    """Go through all breaks and say of each what came of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="breaks that have this word in their name or sentence")
    args = parser.parse_args()
    missed = 0
    for broken in BREAKS:
        if args.only not in f"{broken.apply.__name__} {broken.what}":
            continue
        noticed, seconds = caught(broken)
        missed += not noticed
        said = "caught" if noticed else "MISSED"
        print(f"{said}  {broken.what}  [{broken.test.rpartition('/')[2]}, {seconds:.0f} s]", flush=True)
    if missed:
        sys.exit(f"{missed} were missed")


if __name__ == "__main__":
    main()
