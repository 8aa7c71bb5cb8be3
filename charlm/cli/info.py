"""`charlm info`: describes a run, a checkpoint or a saved model, without building a model.

Nothing is trusted: damaged files are shown as damaged, and control characters from a file are escaped.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from charlm.cli.baseline import BASELINE_FOLDER
from charlm.cli.output import Console, aligned, emit
from charlm.cli.rundir import read_record
from charlm.cli.signals import Signals
from charlm.errors import CharLMError, CheckpointCorruptError, CheckpointError, quoted
from charlm.files import strict_json
from charlm.files.reading import read_file
from charlm.lm import load
from charlm.models.config import GPTConfig
from charlm.models.saving import (
    CONFIG_FILE,
    TOKENIZER_FILE,
    build_tokenizer,
    model_settings,
    read_model_files,
)
from charlm.runs.checkpoint import (
    MANIFEST_FILE,
    STATE_FILE,
    CheckpointInfo,
    scan_checkpoints,
    verify_checkpoint,
)
from charlm.runs.choosing import MIXTURE_FOLDER, best_of
from charlm.runs.directory import RunDirectory, runs_in
from charlm.runs.history import baseline_of
from charlm.text.tokenizer import CharTokenizer, unit_of
from charlm.training.config import ABSENT
from charlm.training.progress import clock

__all__ = ["run"]


@dataclass(frozen=True)
class _Model:
    kind: str
    parameters: int
    settings: Mapping[str, object]
    flops_per_char: int | None
    """None: unknown for this kind."""


@dataclass(frozen=True)
class _Tokenizer:
    kind: str
    vocab_size: int
    vocab: str | None
    """None: bytes."""


@dataclass(frozen=True)
class _Training:
    """The state of a training in a checkpoint."""

    step: int
    chars_seen: int
    seconds: float
    best: Mapping[str, object] | None
    settings: Mapping[str, object]
    length: str
    """Its max_steps or minutes, in words."""
    part: str
    """The part of the validation text on which its losses were measured, in words; empty: all."""


@dataclass(frozen=True)
class _Checkpoint:
    """A checkpoint of a run."""

    name: str
    step: int
    val_loss: float | None
    bytes: int | None
    best: bool
    newest: bool
    damaged: bool
    problem: str | None
    """The reason why it cannot be read."""


@dataclass(frozen=True)
class _Baseline:
    """The n-gram model of a run."""

    damaged: bool
    settings: Mapping[str, object] | None = None
    loss_nats: float | None = None
    part: tuple[int, int] | None = None
    """Number of characters on which the loss was measured, and their total number; None: all."""


@dataclass(frozen=True)
class _Result:
    """The result of `charlm train`: the model that `load` returns."""

    kind: str
    """"gpt", "ngram" or "mixture"."""
    loss_nats: float | None
    """On the validation text, if there is one."""


@dataclass(frozen=True)
class _Described:
    """The content of a directory."""

    path: str
    kind: str
    """"run", "checkpoint" or "model"."""
    run_id: str | None = None
    model: _Model | None = None
    tokenizer: _Tokenizer | None = None
    training: _Training | None = None
    checkpoints: Sequence[_Checkpoint] | None = None
    baseline: _Baseline | None = None
    result: _Result | None = None
    parent: Mapping[str, object] | None = None
    """The model that the training began with: path, checkpoint, sha256; None: a new one."""

    def to_dict(self) -> dict[str, object]:
        """Return the values for `--json`: without missing ones, and without texts for people."""
        values = asdict(self)
        for part in (values, values["model"] or {}, values["tokenizer"] or {}):
            for name in [name for name, value in part.items() if value is None]:
                del part[name]
        for name in ("length", "part"):
            values.get("training", {}).pop(name, None)
        return values


def run(args: argparse.Namespace, console: Console, signals: Signals, began: float) -> int:
    """Write the description as text or JSON; return 1 if a file cannot be read or `--verify` finds damage."""
    path = Path(args.run)
    if (path / "run.json").exists():
        described, problems = _run(path, verify=args.verify)
    elif (path / MANIFEST_FILE).exists():
        model, tokenizer, training, problems = _contents(path, path)
        described = _Described(str(path), "checkpoint", None, model, tokenizer, training)
        wrong = _problem(path) if args.verify else None
        problems = problems if wrong is None else [str(wrong)]
    else:
        described, problems = _saved(path, verify=args.verify)
    emit(json.dumps(described.to_dict()) + "\n" if args.json else _text(described))
    for problem in problems:
        console.complain(f"error: {problem}")
    return 1 if problems else 0


def _run(path: Path, *, verify: bool) -> tuple[_Described, list[str]]:
    """Return the description of a run, and its problems."""
    run = RunDirectory.open(path)
    while True:
        whole, others = scan_checkpoints(run)
        best = best_of(whole[::-1]) if whole else None  # the one that `load` takes
        checkpoints, problems = _checkpoints(whole, others, best, verify=verify)
        model, tokenizer, training, unreadable = _contents(
            None if best is None else best.path, whole[-1].path if whole else None
        )
        if all(os.path.lexists(info.path) for info in whole):
            break
        # else the run, which is training, has deleted one of them: look again
    baseline, wrong = _baseline(path, verify=verify)
    problems += wrong
    result, wrong = _result(path, best, verify=verify)
    problems += wrong
    described = _Described(
        str(path), "run", run.run_id, model, tokenizer, training, checkpoints, baseline, result, _parent(path)
    )
    return described, (problems or unreadable) if verify else unreadable


def _contents(
    best: Path | None, newest: Path | None
) -> tuple[_Model | None, _Tokenizer | None, _Training | None, list[str]]:
    """Return model, tokenizer and training from the checkpoints of a run, and the problems of reading."""
    model, tokenizer, training, unreadable = None, None, None, []
    try:
        if best is not None and (best / CONFIG_FILE).exists():  # a foreign module's checkpoint has none
            model, tokenizer = _model_files(best)
    except (CharLMError, OSError) as error:
        unreadable.append(str(error))
    try:
        training = None if newest is None else _training(newest)
    except (CharLMError, OSError) as error:
        unreadable.append(str(error))
    return model, tokenizer, training, unreadable


def _checkpoints(
    whole: Sequence[CheckpointInfo], others: Collection[Path], best: CheckpointInfo | None, *, verify: bool
) -> tuple[list[_Checkpoint], list[str]]:
    """Return the checkpoints of a run, unreadable ones included, and their problems."""
    infos = {info.path: info for info in whole}
    checkpoints, problems = [], []
    for path in sorted([*infos, *others]):
        info = infos.get(path)
        problem = _problem(path) if info is None or verify else None
        if problem is not None:
            if not os.path.lexists(path):
                continue  # the run, which is training, has deleted it
            problems.append(str(problem))
        checkpoints.append(
            _Checkpoint(
                name=path.name,
                step=int(path.name.split("-")[1]),
                val_loss=None if info is None else info.val_loss,
                bytes=None if info is None else sum(digest.size for digest in info.files.values()),
                best=info is not None and info == best,
                newest=info is not None and info == whole[-1],
                damaged=isinstance(problem, CheckpointCorruptError),
                problem=None if problem is None else str(problem),
            )
        )
    return checkpoints, problems


def _baseline(path: Path, *, verify: bool) -> tuple[_Baseline | None, list[str]]:
    """Return the n-gram model of a run, if it has one, and its problems."""
    folder = path / BASELINE_FOLDER
    if not folder.exists():
        return None, []
    baseline, problems = _Baseline(damaged=False), []
    try:
        data = read_file(folder / CONFIG_FILE, max_bytes=strict_json.MAX_BYTES)
        baseline = replace(baseline, settings=model_settings({CONFIG_FILE: data}, folder)[1].to_dict())
        if verify:
            load(folder, device="cpu")
    except (CharLMError, OSError) as error:
        baseline = replace(baseline, damaged=True)
        problems.append(str(error))
    if baseline.settings is None:
        return baseline, problems
    try:  # its loss is recorded elsewhere, and the model may be whole without that
        loss, part = baseline_of(read_record(path).values)
        baseline = replace(baseline, loss_nats=loss, part=part)
    except (CharLMError, OSError) as error:
        problems.append(str(error))
    return baseline, problems


def _result(path: Path, best: CheckpointInfo | None, *, verify: bool) -> tuple[_Result | None, list[str]]:
    """Return the result of a run, if it was decided for the best checkpoint, and its problems."""
    try:
        values = read_record(path).values.get("result")
        fields: dict[str, object] = values if isinstance(values, dict) else {}
        kind, losses = fields.get("kind"), fields.get("loss_nats")
        if best is None or fields.get("checkpoint") != best.path.name or not isinstance(kind, str):
            return None, []
        if verify and kind != "gpt":
            load(path / MIXTURE_FOLDER, device="cpu")
    except (CharLMError, OSError) as error:
        return None, [str(error)] if (path / MIXTURE_FOLDER).exists() else []
    loss = losses.get(kind) if isinstance(losses, dict) else None
    return _Result(kind, loss if isinstance(loss, float) else None), []


def _parent(path: Path) -> Mapping[str, object] | None:
    try:
        return read_record(path).parent
    except (CharLMError, OSError):  # the run may be whole without it
        return None


def _saved(path: Path, *, verify: bool) -> tuple[_Described, list[str]]:
    """Return the description of a saved model, and its problems."""
    try:
        described = _Described(str(path), "model", None, *_model_files(path))
    except CheckpointError as error:
        raise CheckpointError(
            f"{quoted(str(path))} is no run, no checkpoint and no saved model: it "
            + (runs_in(path) or f"has neither run.json nor {CONFIG_FILE}")
        ) from error
    if verify:  # a saved model has no checksums, so only the fit of its parts is checked
        try:
            load(path, device="cpu")
        except (CharLMError, OSError) as error:
            return described, [str(error)]
    return described, []


def _model_files(path: Path) -> tuple[_Model, _Tokenizer | None]:
    """Return the content of config.json and tokenizer.json."""
    files = read_model_files(path, weights=False)
    cls, config = model_settings(files, path)
    flops = config.flops_per_char() if isinstance(config, GPTConfig) else None
    model = _Model(cls.kind, config.num_parameters(), config.to_dict(), flops)
    if TOKENIZER_FILE not in files:
        return model, None
    read = build_tokenizer(files, path)
    vocab = "".join(read.vocab) if isinstance(read, CharTokenizer) else None
    return model, _Tokenizer(unit_of(read), read.vocab_size, vocab)


def _training(path: Path) -> _Training:
    """Return the state of the training in a checkpoint."""
    where = str(path / STATE_FILE)
    state = strict_json.loads(read_file(where, max_bytes=strict_json.MAX_BYTES), path=where)
    settings = strict_json.take(state, "config", dict, path=where)
    values = {**ABSENT, **settings}  # a newer charlm may have further settings
    length = f" of {strict_json.take(values, 'max_steps', int, path=where):,} steps"
    if values["minutes"] is not None:
        length = f" steps within {strict_json.take(values, 'minutes', float, path=where):g} min"
    best, part = state.get("best"), ""
    if isinstance(best, dict) and "n_left_out" in best:
        left_out = strict_json.take(best, "n_left_out", int, path=where)
        scored = strict_json.take(best, "n_chars", int, path=where)
        part = f", losses on {scored:,} of {scored + left_out:,}" if left_out else ""
    return _Training(
        step=strict_json.take(state, "step", int, path=where),
        chars_seen=strict_json.take(state, "chars_seen", int, path=where),
        seconds=strict_json.take(state, "seconds", float, path=where),
        best=best if isinstance(best, dict) else None,
        settings=settings,
        length=length,
        part=part,
    )


def _problem(path: Path) -> Exception | None:
    try:
        verify_checkpoint(path)
    except (CharLMError, OSError) as error:
        return error
    return None


def _text(described: _Described) -> str:
    """Return the description as lines of text."""
    lines = [f"{described.kind}: {described.path}\n"]
    model, tokenizer, training = described.model, described.tokenizer, described.training
    unit = "character" if tokenizer is None else tokenizer.kind
    if model is not None:
        per_char = model.flops_per_char
        flops = "" if per_char is None else f", {per_char:,} FLOPs per {unit}"
        lines.append(f"\nmodel: {model.kind}, {model.parameters:,} parameters{flops}\n")
        lines.append(_settings(model.settings))
    if tokenizer is not None:
        vocab = "" if tokenizer.vocab is None else f": {quoted(tokenizer.vocab, 80)}"
        lines.append(f"\ntokenizer: {tokenizer.kind}, vocabulary {tokenizer.vocab_size:,}{vocab}\n")
    if training is not None:
        done = f"{training.step:,}{training.length}, {training.chars_seen:,} {unit}s"
        lines.append(f"\ntraining: {done}, {clock(training.seconds)}\n")
        lines.append(_settings(training.settings))
    if described.parent is not None:
        parts = [described.parent.get(name) for name in ("path", "checkpoint", "sha256")]
        names = [quoted(part, 200)[1:-1] for part in parts if isinstance(part, str)]
        lines.append(f"\nparent: {', '.join(names)}\n")
    if described.result is not None:
        loss = "" if described.result.loss_nats is None else f", val loss {described.result.loss_nats:.4f}"
        lines.append(f"\nresult: {quoted(described.result.kind, 40)[1:-1]}{loss}\n")
    if described.baseline is not None:
        lines.append(f"\nbaseline: {_baseline_line(described.baseline, unit)}\n")
    if described.checkpoints is not None:
        part = f"{training.part} {unit}s" if training is not None and training.part else ""
        lines.append(f"\ncheckpoints: {len(described.checkpoints)}{part}\n")
        lines.append(aligned(map(_checkpoint_row, described.checkpoints), indent="  "))
    return "".join(lines)


def _baseline_line(baseline: _Baseline, unit: str) -> str:
    settings, loss = baseline.settings, baseline.loss_nats
    if baseline.damaged or settings is None:
        return "an n-gram model, damaged"
    val = "" if loss is None else f", val loss {loss:.4f}"
    if val and baseline.part is not None:
        val += f" on {baseline.part[0]:,} of {baseline.part[1]:,} {unit}s"
    return f"n-gram model of order {settings.get('order')}, {settings.get('n_ngrams', 0):,} n-grams{val}"


def _settings(settings: Mapping[str, object]) -> str:
    return aligned(((_shown(name), _shown(value)) for name, value in _one_by_one(settings)), indent="  ")


def _one_by_one(settings: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """Yield the settings; those of a mixture's members are separate."""
    for name, value in settings.items():
        parts = value if isinstance(value, list) else []
        if not parts or not all(isinstance(part, dict) for part in parts):
            yield name, value
        for number, part in enumerate(parts):
            if isinstance(part, dict):
                yield from ((f"{name}[{number}].{inner}", shown) for inner, shown in _one_by_one(part))


def _shown(value: object) -> str:
    """Return a setting as JSON, a string without quotation marks."""
    return quoted(value, 80)[1:-1] if isinstance(value, str) else json.dumps(value)


def _checkpoint_row(described: _Checkpoint) -> list[str]:
    marks = {"best": described.best, "newest": described.newest, "damaged": described.damaged}
    marks["not readable by this charlm"] = described.problem is not None and not described.damaged
    return [
        f"step {described.step:,}",
        "val loss unknown" if described.val_loss is None else f"val loss {described.val_loss:.4f}",
        "" if described.bytes is None else f"{described.bytes / 1e6:.1f} MB",
        described.name,
        ", ".join(mark for mark, holds in marks.items() if holds),
    ]
