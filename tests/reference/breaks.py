"""Ways to break charlm, each with the test that notices it. `reliability/broken_versions.py` tries them.

A break is a replacement of one piece of the source that stands there exactly once.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["BREAKS", "Break"]


class Break(NamedTuple):
    """One way to break charlm."""

    what: str
    """What is wrong with the broken version."""
    file: str
    old: str
    new: str
    test: str
    """What must fail, as pytest takes it."""


_STEP = "charlm/training/step.py"
_NONFINITE = "tests/reliability/test_nonfinite.py"
_GOLDEN = "tests/reliability/test_golden_files.py"

BREAKS = [
    Break(
        "a device that works on its own is not told to skip a step that is not finite",
        _STEP,
        "optimizer.found_inf = torch.maximum(bad, ended)",
        "optimizer.found_inf = ended",
        f"{_NONFINITE}::test_a_step_that_is_not_finite_is_left_out_and_logged",
    ),
    Break(
        "a step that is to be skipped is taken",
        _STEP,
        "if self._masked or self._is_finite(step, loss, norm, learning_rate):",
        "if self._masked or self._is_finite(step, loss, norm, learning_rate) or self._limit > 1:",
        f"{_NONFINITE}::test_a_step_that_is_not_finite_is_left_out_and_logged",
    ),
    Break(
        "a good step does not break the row of bad ones",
        _STEP,
        "            self._in_a_row = 0\n            return True",
        "            return True",
        f"{_NONFINITE}::test_ten_in_a_row_end_a_run_that_skips",
    ),
    Break(
        "a skipped step is not logged",
        "charlm/training/trainer.py",
        '            self._log("skip", {"loss": loss, "grad_norm": norm}, step=step + 1)\n',
        "",
        f"{_NONFINITE}::test_a_step_that_is_not_finite_is_left_out_and_logged",
    ),
    Break(
        "a run that is to end goes on from the step after the bad one",
        "charlm/training/trainer.py",
        "            self.step -= undone\n",
        "",
        f"{_NONFINITE}::test_a_step_that_is_not_finite_ends_the_run_with_nothing_moved",
    ),
    Break(
        "a resume falls back past a newer charlm's checkpoint",
        "charlm/training/resume.py",
        "if isinstance(error, CheckpointError) and not isinstance(error, CheckpointCorruptError):",
        "if False:",
        "tests/training/test_resume.py",
    ),
    Break(
        "files of version 1 are refused",
        "charlm/files/strict_json.py",
        "    if version > newest:",
        "    if version >= newest:",
        _GOLDEN,
    ),
    Break(
        "tokenizer.json is written in another way, under the same version",
        "charlm/text/tokenizer.py",
        '            "version": _VERSION,\n',
        '            "version": 1.0,\n',
        _GOLDEN,
    ),
]
