"""Runs of `charlm train` that are stopped, killed and begun again: flags, the next command, checks."""

from __future__ import annotations

import re
from pathlib import Path

from charlm.training import list_checkpoints, verify_checkpoint

__all__ = ["FLAGS", "LAST_STEP", "check_whole", "newest_step", "next_command", "stopped_after", "write_text"]

LAST_STEP = 60
FLAGS = (
    *("--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--block-size", "16", "--batch-size", "2"),
    *("--max-steps", str(LAST_STEP), "--eval-interval", "6", "--save-interval", "4", "--log-interval", "1"),
    *("--sample-interval", "10", "--device", "cpu", "--precision", "fp32", "--keep-last", "2"),
    *("--dropout", "0.1", "--no-baseline", "--val-fraction", "0.5"),
)
"""A training that takes a moment, half of it in steps, the rest in evaluations and saves."""


def write_text(folder: Path) -> Path:
    """Write the text to train on."""
    path = folder / "text.txt"
    path.write_text(
        "".join(f"{i} green bottles, hanging on the wall\n" for i in range(300)), encoding="utf-8"
    )
    return path


def newest_step(run: Path) -> int:
    """Return the step of the newest checkpoint; 0 if there is none."""
    if not (run / "run.json").exists():
        return 0
    return max((info.step for info in list_checkpoints(run)), default=0)


def next_command(run: Path, text: Path, *flags: str) -> list[str]:
    """Return what a person would type now: begin or go on, and either of them where nothing was saved yet."""
    begun_anew = len(list(run.glob("abandoned-*.jsonl")))
    if (run / "train.json").exists() and (newest_step(run) or begun_anew % 2):
        return ["train", "--resume", "-o", str(run)]
    return ["train", str(text), "-o", str(run), *flags]


def check_whole(run: Path) -> int:
    """Verify every checkpoint of a run and return how many there are."""
    if not (run / "run.json").exists():
        return 0
    infos = list_checkpoints(run)
    names = {path.name for path in (run / "checkpoints").glob("step-*")}
    assert {info.path.name for info in infos} == names, "a checkpoint's manifest is damaged"
    for info in infos:
        assert verify_checkpoint(info.path) == info
    return len(infos)


def stopped_after(message: str) -> int | None:
    """Return the step that the command says it stopped after, or None."""
    said = re.search(r"stopped after step ([\d,]+) of", message)
    return None if said is None else int(said[1].replace(",", ""))
