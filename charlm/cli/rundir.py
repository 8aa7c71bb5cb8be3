"""RUN/train.json, from which `charlm train --resume` finds the text again; and the deletion of a run.

train.json holds what the checkpoints lack: the sources of the text and its cut, and for a reader all
settings, versions and command lines of the run. No torch here.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import cast, get_args

from charlm.cli.output import UsageError
from charlm.cli.reading import Reading
from charlm.cli.settings import Settings
from charlm.data.prepared import is_prepared
from charlm.errors import CheckpointError, CheckpointWriteError, FileFormatError, RunExistsError, quoted
from charlm.files import strict_json
from charlm.files.atomic import write_file
from charlm.files.reading import refusal
from charlm.models.config import PRESETS, PresetName
from charlm.plain import as_int, share_of
from charlm.runs.directory import (
    RECORD_FILE,
    RECORD_FORMAT,
    RECORD_VERSION,
    SERVICE_FOLDERS,
    RunDirectory,
    has_checkpoints,
    is_leftover,
)
from charlm.runs.history import RECORD_BYTES, read_record_values
from charlm.text.tokenizer import OnUnknown, tokenizer_from_dict
from charlm.training.config import MOST_STEPS, saved_config, with_end

__all__ = ["Origin", "check_free", "check_sources", "delete_run", "lasting", "read_record", "write_record"]

# Deleted in this order, so that an interrupted deletion can be repeated. The lock file stays: a process that
# waits for the lock has it open, and a second file of that name would be a second lock.
_OWN = ("checkpoints", "mixture", "ngram", *SERVICE_FOLDERS, "metrics.jsonl", RECORD_FILE, "run.json")
_COMMANDS, _COMMAND_CHARS = 20, 2_000  # the last commands are stored, and so many characters of each
_OTHER_VALUES = [256 * " "] * 2048  # takes more than everything but the sources


@dataclass(frozen=True)
class Origin:
    """The origin of a run's data and model: the content of train.json."""

    sources: Sequence[str]
    """Paths, names of corpora, or "-"."""
    encoding: str
    """Encoding of the files."""
    val_fraction: float
    """Share of the text, at its end, for validation."""
    tokenizer: str
    """"char" or "byte"."""
    block_size: int
    """T of the training blocks."""
    device: str
    """The option --device."""
    values: Mapping[str, object]
    """The whole content of train.json."""

    def train_share(self, count: int) -> float:
        """Return the share of `count` ids that is trained on, for `BlockDataset.split`.

        Earlier versions could cut one id too early. A run whose record has this cut, or no number of ids,
        keeps it.
        """
        share = 1 - self.val_fraction
        if self.reading().apart:
            return share
        train_ids = as_int(self.values.get("train_ids"))
        if self.is_prepared and train_ids is not None:
            return 1.0 if train_ids >= count else (train_ids + 0.5) / count
        early = int(share * count)
        if early == share_of(count, share) or self.values.get("train_ids", early) != early:
            return share
        return (early + 0.5) / count

    @property
    def parent(self) -> Mapping[str, object] | None:
        """The model that the training began with, by path, checkpoint and sha256; None: a new one."""
        parent = self.values.get("parent")
        return parent if isinstance(parent, dict) else None

    def reading(self) -> Reading:
        """Return how the texts were read.

        Raises:
            FileFormatError: the record does not hold it.
        """
        given = {name: value for name, value in self.values.items() if value is not None}
        tokenizer, on_unknown = None, self.values.get("on_unknown", "error")
        if self.values.get("vocabulary") is not None:
            tokenizer = tokenizer_from_dict(self._table("vocabulary"), path=RECORD_FILE)
        if on_unknown not in get_args(OnUnknown):
            raise refusal(RECORD_FILE, f"must hold a known 'on_unknown', got {quoted(str(on_unknown), 40)}.")
        return Reading(
            encoding=self.encoding,
            kind=self.tokenizer,
            tokenizer=tokenizer,
            on_unknown=cast("OnUnknown", on_unknown),
            val_fraction=self.val_fraction,
            by_file=self.values.get("by_file") is True,
            separator=strict_json.take({"separator": "", **given}, "separator", str, path=RECORD_FILE)
            or None,
            weights=strict_json.take({"weights": [], **given}, "weights", list, path=RECORD_FILE) or None,
        )

    def lost_sources(self) -> list[str]:
        """Return the sources that cannot be read again: standard input, and files that are gone."""
        return [s for s in self.sources if s == "-" or (Path(s).is_absolute() and not Path(s).exists())]

    @property
    def is_prepared(self) -> bool:
        """Whether the text was on disk, in a prepared corpus."""
        return self.values.get("prepared") is True

    @property
    def is_from_python(self) -> bool:
        """Whether a `Trainer` began the run, and not `charlm train`."""
        return "preset" not in self.values

    @property
    def aside(self) -> int:
        """Number of ids of the training text that are set aside to choose the result."""
        return strict_json.take({"aside": 0, **self.values}, "aside", int, path=RECORD_FILE)

    @property
    def log_to(self) -> Sequence[str]:
        """The loggers of the run."""
        names = strict_json.take({"log_to": [], **self.values}, "log_to", list, path=RECORD_FILE)
        return tuple(map(str, names))

    @property
    def aside_chars(self) -> int | None:
        """How many of these ids are read for the choice; None: all."""
        return as_int(self.values.get("aside_chars"))

    def settings(self, end: Mapping[str, object] = MappingProxyType({})) -> Settings:
        """Return the settings of the run; a given end in steps or in minutes replaces its own.

        Raises:
            FileFormatError: the record does not hold them.
            ConfigError: one of them is wrong.
            CheckpointError: they are not those of the whole run.
        """
        model = {k: v for k, v in self._table("model").items() if k != "vocab_size"}
        training = saved_config(self._table("training"))
        if (max_steps := as_int(end.get("max_steps"))) is not None:
            training = with_end(training, max_steps)
        elif end:
            steps = MOST_STEPS if training.minutes is None else training.max_steps
            training = training.replace(**{"max_steps": steps, **end})
        if self.is_from_python:
            raise CheckpointError("the run was begun in Python, and no command can begin it again")
        preset = strict_json.take(self.values, "preset", str, path=RECORD_FILE)
        if preset not in PRESETS:
            raise refusal(RECORD_FILE, f"must name a preset, got {quoted(preset, 40)}.")
        if self.has_moved_end():
            raise CheckpointError(
                "the end of this run was moved by --resume: no run from its beginning repeats it"
            )
        return Settings(cast("PresetName", preset), model, training, {}, {**model, **training.to_dict()})

    def has_moved_end(self) -> bool:
        """Return whether --resume has moved the end of the run."""
        commands = self.values.get("commands")
        words = [str(command).split() for command in commands] if isinstance(commands, list) else []
        # Older records have only the commands.
        asked = any(
            "--resume" in line and any(word.startswith("--max-steps") for word in line) for line in words
        )
        return bool(self.values.get("moved_end", asked))

    def _table(self, name: str) -> dict[str, object]:
        return strict_json.take(self.values, name, dict, path=RECORD_FILE)


def check_free(path: Path, *, overwrite: bool) -> None:
    """Raise RunExistsError unless a new run can begin here, or an old one may be deleted."""
    if RunDirectory.is_free(path):
        return
    if not path.is_dir():
        RunDirectory.refuse_if_taken(path)
    name, has_run = quoted(str(path)), (path / "run.json").is_file()
    own = {*_OWN, ".lock"}
    foreign = [e.name for e in path.iterdir() if e.name not in own and not is_leftover(e.name)]
    if not overwrite:
        ways = ["Go on with the run there (--resume)"] if has_run and has_checkpoints(path) else []
        ways += ["delete it first (--overwrite)"] if has_run and not foreign else []
        ways += ["or choose another directory."] if ways else ["Choose another directory."]
        raise RunExistsError(f"{name} is not empty. {', '.join(ways)}")
    if not has_run:
        raise RunExistsError(
            f"{name} holds no run, so --overwrite deletes nothing. Choose another directory."
        )
    if foreign:
        raise RunExistsError(
            f"{name} holds files that are no part of a run ({quoted(min(foreign), 80)}), so --overwrite "
            "deletes nothing. Move them away, or choose another directory."
        )


def delete_run(path: Path) -> None:
    """Delete a run's own files, and nothing else, if there is a run.

    Raises:
        RunLockedError: a process trains there.
        CheckpointWriteError: a file could not be deleted.
    """
    if not (path / "run.json").is_file():
        return
    check_free(path, overwrite=True)
    run = RunDirectory(path, "")
    run.lock()
    try:
        leftovers = [entry.name for entry in path.iterdir() if is_leftover(entry.name)]
        for name in [*leftovers, *_OWN]:
            file = path / name
            if file.is_dir() and not file.is_symlink():
                shutil.rmtree(file)
            else:
                file.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointWriteError(
            f"cannot delete the run in {quoted(str(path))}: {error}", errno=error.errno
        ) from error
    finally:
        run.unlock()


def lasting(source: str) -> str:
    """Return a source that is valid in another working directory, too."""
    return str(Path(source).absolute()) if source != "-" and _is_on_disk(source) else source


def _is_on_disk(source: str) -> bool:
    return Path(source).is_file() or is_prepared(source)


def check_sources(sources: Sequence[str]) -> None:
    """Raise UsageError if the names of the sources are too many or too long for train.json."""
    names = [_text(lasting(source)) for source in sources]
    data = strict_json.dumps({"sources": names + _OTHER_VALUES})
    try:
        strict_json.loads(data, path=RECORD_FILE, max_bytes=RECORD_BYTES)
    except FileFormatError as error:
        raise UsageError(
            f"FILE stands there {len(sources):,} times, and a run cannot keep so many names; join the files, "
            "with cat for example, and give the one"
        ) from error


def write_record(path: Path, values: Mapping[str, object]) -> None:
    """Write RUN/train.json, with the last commands and the beginning of each."""
    # A path that is no valid text is recorded with escapes, and cannot be opened again.
    plain = {
        k: [_text(v) for v in value] if isinstance(value, list) else value for k, value in values.items()
    }
    if "commands" in plain:
        commands = cast("list[str]", plain["commands"])[-_COMMANDS:]
        plain["commands"] = [c if len(c) <= _COMMAND_CHARS else c[:_COMMAND_CHARS] + "…" for c in commands]
    write_file(
        path / RECORD_FILE, strict_json.dumps({"format": RECORD_FORMAT, "version": RECORD_VERSION, **plain})
    )


def read_record(path: Path) -> Origin:
    """Read RUN/train.json, or for a run that was begun in Python its newest checkpoint.

    Raises:
        CheckpointError: there is no run, or the command cannot resume it.
        FileFormatError: the file is refused.
    """
    run = RunDirectory.open(path)
    file = path / RECORD_FILE
    try:
        values = read_record_values(file)
    except FileNotFoundError as error:
        from charlm.cli.begun import values_from_python  # noqa: PLC0415 - it needs torch

        if (from_python := values_from_python(run)) is None:
            raise CheckpointError(
                f"the run in {quoted(str(path))} has no {RECORD_FILE}: `charlm train` did not begin it. "
                "Go on with Trainer.resume."
            ) from error
        values = from_python
    where = str(file)
    sources = strict_json.take(values, "sources", list, path=where)
    if not all(isinstance(source, str) for source in sources):
        raise refusal(file, "must hold strings in 'sources'.")
    model = strict_json.take(values, "model", dict, path=where)
    return Origin(
        sources=sources,
        encoding=strict_json.take({"encoding": "utf-8", **values}, "encoding", str, path=where),
        val_fraction=strict_json.take(values, "val_fraction", float, path=where),
        tokenizer=strict_json.take(values, "tokenizer", str, path=where),
        block_size=strict_json.take(model, "block_size", int, path=where),
        device=strict_json.take(values, "device", str, path=where),
        values={k: v for k, v in values.items() if k not in {"format", "version"}},
    )


def _text(value: object) -> object:
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
