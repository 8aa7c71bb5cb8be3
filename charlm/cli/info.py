"""`charlm info`: what lies in a directory, read without building a model.

A run, a checkpoint or a saved model. Nothing is trusted: what is damaged is shown as damaged, and what a file
says is written with its control characters escaped.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from charlm.cli.baseline import BASELINE_FOLDER
from charlm.cli.output import Console, aligned, emit
from charlm.cli.progress import clock
from charlm.cli.rundir import read_record
from charlm.cli.signals import Signals
from charlm.errors import CharLMError, CheckpointCorruptError, CheckpointError, quoted
from charlm.files import strict_json
from charlm.files.reading import read_file
from charlm.lm import load
from charlm.models.config import GPTConfig
from charlm.models.saving import CONFIG_FILE, TOKENIZER_FILE, model_settings
from charlm.runs.checkpoint import (
    MANIFEST_FILE,
    STATE_FILE,
    CheckpointInfo,
    scan_checkpoints,
    verify_checkpoint,
)
from charlm.runs.directory import RunDirectory
from charlm.text.tokenizer import CharTokenizer, load_tokenizer

__all__ = ["run"]


def run(args: argparse.Namespace, console: Console, signals: Signals, began: float) -> int:
    """Write what is known as text or as JSON; 1 if `--verify` finds damage."""
    path = Path(args.run)
    found: dict[str, object] = {"path": str(path)}
    if (path / "run.json").exists():
        found["kind"] = "run"
        damaged = _describe_run(path, found, verify=args.verify)
    elif (path / MANIFEST_FILE).exists():
        found["kind"] = "checkpoint"
        damaged = _describe_checkpoint(path, found, verify=args.verify)
    else:
        found["kind"] = "model"
        damaged = _describe_saved(path, found, verify=args.verify)
    emit(json.dumps(found) + "\n" if args.json else _text(found))
    for problem in damaged:
        console.complain(f"error: {problem}")
    return 1 if damaged else 0


def _describe_run(path: Path, found: dict[str, object], *, verify: bool) -> list[str]:
    run = RunDirectory.open(path)
    found["run_id"] = run.run_id
    while True:
        whole, others = scan_checkpoints(run)
        try:
            damaged = _describe_checkpoints(whole, others, found, verify=verify)
            break
        except OSError:
            if all(os.path.lexists(info.path) for info in whole):
                raise
            # else the run, still in training, has deleted one of them: look again
    problem = _describe_baseline(path, found, verify=verify)
    if problem is not None:
        damaged.append(problem)
    return damaged if verify else []


def _describe_checkpoints(
    whole: Sequence[CheckpointInfo], others: Collection[Path], found: dict[str, object], *, verify: bool
) -> list[str]:
    """Add what a run's checkpoints say, and return what is wrong with them."""
    newest = whole[-1] if whole else None
    best = min(  # as `load`
        reversed(whole), key=lambda info: (info.val_loss is None, info.val_loss or 0.0), default=None
    )
    infos = {info.path: info for info in whole}
    damaged, listed = [], []
    for entry in sorted([*infos, *others]):
        problem = None
        info = infos.get(entry)
        if info is None or verify:
            problem = _problem(entry)
            if problem is not None and not os.path.lexists(entry):
                continue  # the run, still in training, has deleted it
        if problem is not None:
            damaged.append(str(problem))
        listed.append(
            {
                "name": entry.name,
                "step": int(entry.name.split("-")[1]),
                "val_loss": None if info is None else info.val_loss,
                "bytes": None if info is None else _size(info),
                "best": info is not None and info == best,
                "newest": info is not None and info == newest,
                "damaged": isinstance(problem, CheckpointCorruptError),
                "problem": None if problem is None else str(problem),
            }
        )
    if best is not None and newest is not None:
        _describe_files(best.path, found)
        found["training"] = _training(newest.path)
    found["checkpoints"] = listed
    return damaged


def _describe_baseline(path: Path, found: dict[str, object], *, verify: bool) -> str | None:
    """Add what is known of the run's n-gram model, if it has one, and return what is wrong with it."""
    folder = path / BASELINE_FOLDER
    if not folder.exists():
        return None
    baseline: dict[str, object] = {"damaged": False, "settings": None, "loss_nats": None, "part": None}
    found["baseline"] = baseline
    try:
        data = read_file(folder / CONFIG_FILE, max_bytes=strict_json.MAX_BYTES)
        baseline["settings"] = model_settings({CONFIG_FILE: data}, folder)[1].to_dict()
        values = read_record(path).values.get("baseline")
        known: dict[str, object] = values if isinstance(values, dict) else {}
        baseline["loss_nats"] = known.get("loss_nats")
        scored, left_out = known.get("scored"), known.get("n_left_out")
        if isinstance(scored, int) and isinstance(left_out, int) and left_out > 0:
            baseline["part"] = [scored, scored + left_out]
        if verify:
            load(folder, device="cpu")
    except (CharLMError, OSError) as error:
        baseline["damaged"] = True
        return str(error)
    return None


def _describe_checkpoint(path: Path, found: dict[str, object], *, verify: bool) -> list[str]:
    _describe_files(path, found)
    found["training"] = _training(path)
    problem = _problem(path) if verify else None
    return [] if problem is None else [str(problem)]


def _describe_saved(path: Path, found: dict[str, object], *, verify: bool) -> list[str]:
    if not (path / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"{quoted(str(path))} is no run, no checkpoint and no saved model: it has neither run.json nor "
            f"{CONFIG_FILE}"
        )
    _describe_files(path, found)
    if verify:  # a saved model has no checksums; what can be seen is whether every part fits
        try:
            load(path, device="cpu")
        except (CharLMError, OSError) as error:
            return [str(error)]
    return []


def _describe_files(path: Path, found: dict[str, object]) -> None:
    """Add what config.json and tokenizer.json say; a checkpoint of a foreign module has neither."""
    if (path / CONFIG_FILE).exists():
        data = read_file(path / CONFIG_FILE, max_bytes=strict_json.MAX_BYTES)
        cls, config = model_settings({CONFIG_FILE: data}, path)
        model: dict[str, object] = {
            "kind": cls.kind,
            "parameters": config.num_parameters(),
            "settings": config.to_dict(),
        }
        if isinstance(config, GPTConfig):
            model["flops_per_char"] = config.flops_per_char()
        found["model"] = model
    if (path / TOKENIZER_FILE).exists():
        tokenizer = load_tokenizer(path / TOKENIZER_FILE)
        is_char = isinstance(tokenizer, CharTokenizer)
        found["tokenizer"] = {
            "kind": "character" if is_char else "byte",
            "vocab_size": tokenizer.vocab_size,
            **({"vocab": "".join(tokenizer.vocab)} if isinstance(tokenizer, CharTokenizer) else {}),
        }


def _training(path: Path) -> dict[str, object]:
    """Return how far a training was when it wrote a checkpoint."""
    where = str(path / STATE_FILE)
    state = strict_json.loads(read_file(where, max_bytes=strict_json.MAX_BYTES), path=where)
    best = state.get("best")
    settings = strict_json.take(state, "config", dict, path=where)
    strict_json.take(settings, "max_steps", int, path=where)  # what is written with its digits grouped
    if settings.get("minutes") is not None:
        strict_json.take(settings, "minutes", float, path=where)
    if isinstance(best, dict) and "n_left_out" in best:
        strict_json.take(best, "n_left_out", int, path=where)
        strict_json.take(best, "n_chars", int, path=where)
    return {
        "step": strict_json.take(state, "step", int, path=where),
        "chars_seen": strict_json.take(state, "chars_seen", int, path=where),
        "seconds": strict_json.take(state, "seconds", float, path=where),
        "best": best if isinstance(best, dict) else None,
        "settings": settings,
    }


def _problem(path: Path) -> Exception | None:
    try:
        verify_checkpoint(path)
    except (CharLMError, OSError) as error:
        return error
    return None


def _size(info: CheckpointInfo) -> int:
    return sum(digest.size for digest in info.files.values())


def _text(found: Mapping[str, object]) -> str:
    """Return all that was found as lines to read."""
    lines = [f"{found['kind']}: {found['path']}\n"]
    model = found.get("model")
    if isinstance(model, dict):
        flops = f", {model['flops_per_char']:,} FLOPs per character" if "flops_per_char" in model else ""
        lines.append(f"\nmodel: {model['kind']}, {model['parameters']:,} parameters{flops}\n")
        lines.append(_settings(model["settings"]))
    tokenizer = found.get("tokenizer")
    if isinstance(tokenizer, dict):
        vocab = f": {quoted(tokenizer['vocab'], 80)}" if "vocab" in tokenizer else ""
        lines.append(f"\ntokenizer: {tokenizer['kind']}, vocabulary {tokenizer['vocab_size']:,}{vocab}\n")
    training = found.get("training")
    if isinstance(training, dict):
        minutes, most = training["settings"].get("minutes"), training["settings"].get("max_steps")
        of = f" of {most:,} steps" if minutes is None else f" steps within {minutes:g} min"
        lines.append(
            f"\ntraining: {training['step']:,}{of}, {training['chars_seen']:,} characters, "
            f"{clock(training['seconds'])}\n"
        )
        lines.append(_settings(training["settings"]))
    baseline = found.get("baseline")
    if isinstance(baseline, dict):
        lines.append(f"\nbaseline: {_baseline_line(baseline)}\n")
    checkpoints = found.get("checkpoints")
    if isinstance(checkpoints, list):
        best = training.get("best") if isinstance(training, dict) else None
        of = ""
        if isinstance(best, dict) and best.get("n_left_out"):
            of = f", losses on {best['n_chars']:,} of {best['n_chars'] + best['n_left_out']:,} characters"
        lines.append(f"\ncheckpoints: {len(checkpoints)}{of}\n")
        lines.append(aligned(map(_checkpoint_row, checkpoints), indent="  "))
    return "".join(lines)


def _baseline_line(baseline: Mapping[str, object]) -> str:
    settings, loss = baseline["settings"], baseline["loss_nats"]
    if baseline["damaged"] or not isinstance(settings, dict):
        return "an n-gram model, damaged"
    val = f", val loss {loss:.4f}" if isinstance(loss, float) else ""
    if val and isinstance(baseline["part"], list):
        val += " on {:,} of {:,} characters".format(*baseline["part"])
    return f"n-gram model of order {settings.get('order')}, {settings.get('n_ngrams', 0):,} n-grams{val}"


def _settings(settings: Mapping[str, object]) -> str:
    return aligned(((_shown(name), _shown(value)) for name, value in settings.items()), indent="  ")


def _shown(value: object) -> str:
    """Return a setting as JSON has it, a string without its quotation marks."""
    return quoted(value, 80)[1:-1] if isinstance(value, str) else json.dumps(value)


def _checkpoint_row(entry: Mapping[str, object]) -> list[str]:
    marks = [mark for mark in ("best", "newest", "damaged") if entry[mark]]
    if entry["problem"] is not None and not entry["damaged"]:
        marks.append("not readable by this charlm")
    loss, size = entry["val_loss"], entry["bytes"]
    return [
        f"step {entry['step']:,}",
        f"val loss {loss:.4f}" if isinstance(loss, float) else "val loss unknown",
        f"{size / 1e6:.1f} MB" if isinstance(size, int) else "",
        str(entry["name"]),
        ", ".join(marks),
    ]
