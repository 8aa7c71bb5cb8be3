"""Python imports this file at its start where its folder is on PYTHONPATH; from then on charlm is broken."""

import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

from harness.breaks import break_charlm

break_charlm(os.environ.get("BREAK_CHARLM"))
