"""The course of a training as columns of numbers, for plots and tables.

It is read from metrics.jsonl and, for a run of `charlm train`, from train.json. A run in training can be
read, too, with the records so far.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from charlm.errors import CharLMError, CheckpointError, quoted
from charlm.files import strict_json
from charlm.files.reading import read_file
from charlm.models.saving import CONFIG_FILE
from charlm.plain import as_path
from charlm.runs.checkpoint import STATE_FILE, checkpoint_names
from charlm.runs.directory import RECORD_FILE, RECORD_FORMAT, RECORD_VERSION, RunDirectory
from charlm.runs.log import read_metrics

__all__ = [
    "RECORD_BYTES",
    "RunHistory",
    "baseline_of",
    "read_histories",
    "read_history",
    "read_record_values",
]

RECORD_BYTES = 8 * 1024 * 1024
"""Size limit of train.json, which names every file of the training text."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RunHistory:
    """The course of a training. A number that was not finite, or was not logged, is NaN."""

    name: str
    """The name of the run in titles."""
    unit: Literal["character", "byte"] = "character"
    """The unit of an id and of the losses."""
    steps: NDArray[np.int64]
    """(N,) the logged steps, counted from 1."""
    loss_nats: NDArray[np.float64]
    """(N,) mean training loss of the batch of each step, before its update."""
    learning_rate: NDArray[np.float64]
    """(N,) learning rate of each step."""
    chars_per_second: NDArray[np.float64]
    """(N,) mean speed since the previous logged step."""
    eval_steps: NDArray[np.int64]
    """(M,) the steps after which the validation text was scored."""
    eval_loss_nats: NDArray[np.float64]
    """(M,) loss on the whole validation text, or on `eval_part`."""
    skipped_steps: NDArray[np.int64]
    """(K,) steps that changed nothing, since their loss or gradient was not finite."""
    eval_part: tuple[int, int] | None = None
    """Number of characters that each evaluation scored, and their total number; None: all were scored."""
    baseline_loss_nats: float | None = None
    """Validation loss of the n-gram model of `charlm train`, if there is one."""
    result: tuple[str, float] | None = None
    """Kind and validation loss of the result of `charlm train`, if it is not the trained model."""
    settings: Mapping[str, object] = field(default_factory=dict)
    """Fields of the model and of the training, by names such as "model.n_layer" and "training.seed"; empty
    for a run without a checkpoint."""
    baseline_part: tuple[int, int] | None = None
    """Number of characters on which the n-gram model was scored, and their total number; None: all, or
    unknown."""

    @property
    def best(self) -> int | None:
        """Index of the evaluation with the lowest loss, the first of equals; None: no loss is finite."""
        finite = np.flatnonzero(np.isfinite(self.eval_loss_nats))
        return int(finite[self.eval_loss_nats[finite].argmin()]) if len(finite) else None


def read_history(run: str | Path) -> RunHistory:
    """Read the course of a run, finished or not.

    Args:
        run: its directory.

    Raises:
        CheckpointError: there is no run, or it has logged nothing yet.
        FileFormatError: a file's content is refused.

    Example:
        >>> from tempfile import mkdtemp
        >>> from charlm import BigramLM, BlockDataset, Trainer, TrainerConfig
        >>> run, data = mkdtemp() + "/run", BlockDataset(np.arange(100) % 3, block_size=8)
        >>> config = TrainerConfig(max_steps=20, precision="fp32")
        >>> _ = Trainer(BigramLM(3), data, config, out_dir=run, device="cpu").fit()
        >>> read_history(run).steps
        array([10, 20])
    """
    directory = RunDirectory.open(as_path(run))
    log = directory.metrics
    try:
        records = list(read_metrics(log))
    except FileNotFoundError:
        records = []
    kinds = {kind: [r for r in records if r.get("kind") == kind] for kind in ("step", "eval", "skip")}
    if not kinds["step"] and not kinds["eval"]:
        raise CheckpointError(
            f"the run in {quoted(str(run))} has logged nothing yet: {log.name} holds no step and no "
            "evaluation. Try again when it has trained for a while."
        )
    unit, baseline, part, result = _of_command(directory.path / RECORD_FILE)
    return RunHistory(
        name=as_path(run).resolve().name,
        unit=unit,
        steps=_steps(kinds["step"], log),
        loss_nats=_numbers(kinds["step"], "loss", log),
        learning_rate=_numbers(kinds["step"], "learning_rate", log),
        chars_per_second=_numbers(kinds["step"], "chars_per_second", log),
        eval_steps=_steps(kinds["eval"], log),
        eval_loss_nats=_numbers(kinds["eval"], "loss_nats", log),
        skipped_steps=_steps(kinds["skip"], log),
        eval_part=_part(kinds["eval"], log),
        baseline_loss_nats=baseline,
        baseline_part=part,
        result=result,
        settings=_settings(directory),
    )


def read_histories(runs: Iterable[str | Path]) -> list[RunHistory]:
    """Read the courses of several runs, with distinct names.

    Args:
        runs: their directories. Runs whose directories have the same name get more of the path as names.

    Returns:
        One history for each, in their order.

    Raises:
        CheckpointError: there is no run, or it has logged nothing yet.
        FileFormatError: a file's content is refused.

    Example:
        >>> read_histories([])
        []
    """
    paths = [as_path(run).resolve() for run in runs]
    names, depth = [path.name for path in paths], 1
    while len({*names}) < len({*paths}):
        depth += 1
        twice = {name for name in names if names.count(name) > 1}
        names = [
            "/".join(path.parts[-depth:]) if name in twice else name
            for path, name in zip(paths, names, strict=True)
        ]
    return [replace(read_history(path), name=name) for path, name in zip(paths, names, strict=True)]


def _settings(run: RunDirectory) -> dict[str, object]:
    """Return the settings of a run from its newest readable checkpoint."""
    for name in sorted(checkpoint_names(run), reverse=True):
        with contextlib.suppress(CharLMError, OSError):  # damaged, or deleted by the continuing run
            tables = {"training": _config(run.checkpoints / name / STATE_FILE)}
            if (run.checkpoints / name / CONFIG_FILE).exists():  # a foreign module's checkpoint has none
                tables = {"model": _config(run.checkpoints / name / CONFIG_FILE), **tables}
            return {
                f"{table}.{key}": value for table, values in tables.items() for key, value in values.items()
            }
    return {}


def _config(path: Path) -> dict[str, object]:
    """Return the settings in a file of a checkpoint; those of a model begin with its kind."""
    values = strict_json.loads(read_file(path, max_bytes=strict_json.MAX_BYTES), path=str(path))
    config = strict_json.take(values, "config", dict, path=str(path))
    return {**({"kind": values["kind"]} if "kind" in values else {}), **config}


def read_record_values(record: Path) -> dict[str, object]:
    """Return the content of a run's train.json.

    Raises:
        FileFormatError: its content is refused.
        OSError: it is missing or cannot be read.
    """
    data = read_file(record, max_bytes=RECORD_BYTES)
    values = strict_json.loads(data, path=str(record), max_bytes=RECORD_BYTES)
    strict_json.check_version(values, RECORD_FORMAT, RECORD_VERSION, path=str(record))
    return values


def _of_command(
    record: Path,
) -> tuple[Literal["character", "byte"], float | None, tuple[int, int] | None, tuple[str, float] | None]:
    """Return from train.json the unit, the loss and part of the n-gram model, and the result."""
    try:
        values = read_record_values(record)
    except FileNotFoundError:
        return "character", None, None, None
    unit: Literal["character", "byte"] = "byte" if values.get("tokenizer") == "byte" else "character"
    return unit, *baseline_of(values), _result(values.get("result"))


def baseline_of(values: Mapping[str, object]) -> tuple[float | None, tuple[int, int] | None]:
    """Return the loss of the n-gram model in train.json and (scored, all) characters, or None if all were."""
    baseline = values.get("baseline")
    fields: dict[str, object] = baseline if isinstance(baseline, dict) else {}
    loss, scored, left_out = (fields.get(name) for name in ("loss_nats", "scored", "n_left_out"))
    part = None
    if isinstance(scored, int) and isinstance(left_out, int) and left_out > 0:
        part = scored, scored + left_out
    return loss if isinstance(loss, float) else None, part


def _result(values: object) -> tuple[str, float] | None:
    fields: dict[str, object] = values if isinstance(values, dict) else {}
    kind, losses = fields.get("kind"), fields.get("loss_nats")
    loss = losses.get(kind) if isinstance(losses, dict) and isinstance(kind, str) else None
    return (kind, loss) if isinstance(kind, str) and isinstance(loss, float) and kind != "gpt" else None


def _steps(records: Sequence[Mapping[str, object]], log: Path) -> NDArray[np.int64]:
    return np.array([strict_json.take(record, "step", int, path=str(log)) for record in records], np.int64)


def _part(records: Sequence[Mapping[str, object]], log: Path) -> tuple[int, int] | None:
    for record in records:
        if "n_left_out" in record:
            scored = strict_json.take(record, "n_chars", int, path=str(log))
            return scored, scored + strict_json.take(record, "n_left_out", int, path=str(log))
    return None


def _numbers(records: Sequence[Mapping[str, object]], name: str, log: Path) -> NDArray[np.float64]:
    return np.array(
        [
            math.nan if record.get(name) is None else strict_json.take(record, name, float, path=str(log))
            for record in records
        ],
        np.float64,
    )
