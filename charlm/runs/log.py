"""metrics.jsonl: one line for each logged step, evaluation, sample and skipped step.

A line is strict JSON with "kind" and "step". The kinds are "step", "eval", "sample", "end" (the clock has
fixed the end of the run) and "skip" (the step changed nothing). Callbacks add other kinds: `charlm train
--from` writes "old", the loss on the old validation text. JSON has no NaN, so a value that is not finite is
null, and "nonfinite" names it. Readers ignore an incomplete last line. A resume cuts the log back to its
checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from charlm.errors import FileFormatError
from charlm.evaluation.evaluate import EvalResult
from charlm.files import strict_json
from charlm.files.log import MAX_LINE, MAX_LOG, Appender, keep_lines
from charlm.files.reading import read_lines, refusal

__all__ = ["MetricsLog", "eval_values", "read_metrics"]


class MetricsLog:
    """The log of a run, open for appending.

    Args:
        path: metrics.jsonl.
        step: later records are cut off first; 0 for a new run.
    """

    def __init__(self, path: Path, *, step: int) -> None:
        if path.exists():
            keep_lines(path, lambda line: _step_of(line, path) <= step)
        self._appender = Appender(path)

    def write(self, kind: str, step: int, values: Mapping[str, object]) -> None:
        """Append one record."""
        self._appender.append(strict_json.dumps_line({"kind": kind, "step": step, **finite(values)}))

    def flush(self) -> None:
        """Make the records so far durable."""
        self._appender.flush()

    def close(self) -> None:
        """Close the file."""
        self._appender.close()


def finite(values: Mapping[str, object]) -> dict[str, object]:
    """Return the values with None in place of NaN and infinities, and "nonfinite" with their names."""
    bad = {k: str(v) for k, v in values.items() if isinstance(v, float) and not math.isfinite(v)}
    kept = {k: None if k in bad else v for k, v in values.items()}
    return {**kept, "nonfinite": bad} if bad else kept


def eval_values(result: EvalResult) -> dict[str, object]:
    """Return an evaluation as the values of a record."""
    values: dict[str, object] = {
        "loss_nats": result.loss_nats,
        "bits_per_char": result.bits_per_char,
        "perplexity": result.perplexity,
        "accuracy": result.accuracy,
        "n_chars": result.n_chars,
    }
    return {**values, "n_left_out": result.n_left_out} if result.n_left_out else values


def read_metrics(path: Path) -> Iterator[dict[str, object]]:
    """Yield the records of a log in order, without an incomplete last line; the run may continue meanwhile.

    Raises:
        FileFormatError: a line is no record or longer than 256 KiB, or the log is no regular file or larger
            than 1 GiB.
        OSError: the file is missing or cannot be read.
    """
    for line in read_lines(path, max_bytes=MAX_LOG, max_line=MAX_LINE):
        if line is None:
            raise refusal(path, f"must have lines of at most {MAX_LINE} bytes, got a longer one.")
        yield strict_json.loads(line, path=str(path))


def _step_of(line: bytes, path: Path) -> int:
    try:
        return strict_json.take(strict_json.loads(line, path=str(path)), "step", int, path=str(path))
    except FileFormatError:  # a line that is no record is cut off
        return 2**63
