"""`charlm inspect`: facts about a text that a person should know before training on it.

`charlm.text.inspection` counts, without torch; `charlm.cli.guess` estimates the result of a training. Control
characters of a text are escaped.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from charlm.cli.encoded import characters_of, corpus_of
from charlm.cli.output import Console, as_word, emit, refuse, shell_word
from charlm.cli.reading import VAL_FRACTION, wrong_val_fraction
from charlm.cli.signals import Signals
from charlm.data.prepared import PreparedCorpus
from charlm.errors import quoted
from charlm.plain import share_of
from charlm.text.corpus import load_corpus
from charlm.text.inspection import RARE_BELOW, SHARED_WIDTH, TextReport, inspect_text, remarks
from charlm.text.tokenizer import ByteTokenizer
from charlm.training.config import TrainerConfig

if TYPE_CHECKING:
    from charlm.cli.guess import Guess

__all__ = ["run"]

_LISTED = 5, 100  # characters named, in text and in JSON
_EXCERPT = 60, 1_000  # characters shown of the longest shared run
_TRAINING = (
    *("preset", "reasons", "device", "steps", "seconds", "step_seconds", "evaluation_seconds"),
    *("text_is_short", "ahead_nats", "loss_nats", "usual_steps", "unlike", "enough_minutes"),
)
"""The fields of a `Guess` in the JSON, without the n-gram model."""

_SAMPLE = 10_000_000  # characters of a text on disk that are counted
_SHORT_VALIDATION = 10_000  # characters: with fewer, a loss says little about other texts


def run(args: argparse.Namespace, console: Console, signals: Signals, began: float) -> int:
    """Write counts, measurements and estimates as text or as JSON."""
    wrong = TrainerConfig.check({"minutes": args.minutes})
    problems = [f"--{problem}".replace(", or None,", ",") for problem in wrong]
    refuse(problems + wrong_val_fraction(args.val_fraction))
    corpus = corpus_of(args.files, args.encoding, "char", console=console)
    val_fraction = args.val_fraction
    if corpus is None:
        text = load_corpus(args.files, encoding=args.encoding)
    else:
        text, val_fraction = _sample(corpus, val_fraction)
    report = inspect_text(text, val_fraction=val_fraction)
    notes = remarks(text, report.vocab_size, val_fraction=val_fraction)
    if not args.json:
        if corpus is not None and report.n_chars < corpus.index.n_ids:
            unit = "bytes" if isinstance(corpus.tokenizer, ByteTokenizer) else "characters"
            _write([("on disk", f"{corpus.index.n_ids:,} {unit}; the counts are of a sample")])
        _write(_counted(args.files, report, notes))
    signals.check()
    guessed = None
    if report.train_chars >= 2 and (report.val_chars >= 2 or not args.val_fraction):
        with signals.ending_at_once():
            from charlm.cli.guess import guess  # noqa: PLC0415 - torch takes seconds, and only now is needed

        guessed = guess(
            text if corpus is None else corpus,
            val_fraction=args.val_fraction,
            minutes=args.minutes,
            began=began,
        )
    command = None if guessed is None else _command(args, guessed)
    if args.json:
        emit(
            json.dumps(
                {**_counted_values(report), "notes": notes, **_guessed_values(guessed), "command": command}
            )
            + "\n"
        )
    elif guessed is None:
        _write([("training", _too_short(report))])
    else:
        _write([*_guessed(report, guessed, args.minutes), *_recommended(command, guessed, args.minutes)])
    return 0


def _sample(corpus: PreparedCorpus, val_fraction: float) -> tuple[str, float]:
    """Return the beginnings of both parts of a text on disk, and the share of the second among them."""
    N, tokenizer = corpus.index.n_ids, characters_of(corpus)
    cut = share_of(N, 1 - val_fraction)
    most = int(_SAMPLE * (1 - val_fraction)), int(_SAMPLE * val_fraction)
    pieces = [(0, min(cut, most[0])), (cut, min(N, cut + most[1]))]
    train, val = (tokenizer.decode(corpus.read(*piece)).strip("\ufffd") for piece in pieces)
    return train + val, len(val) / max(len(train) + len(val), 1)


def _write(rows: Iterable[tuple[str, str]]) -> None:
    emit("".join(f"{label:<10}  {value}\n" for label, value in rows))


def _counted(files: Sequence[str], report: TextReport, notes: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the lines about the text itself, each with its label."""
    names = ", ".join("standard input" if name == "-" else name for name in files[:3])
    yield "text", names + (f" and {len(files) - 3} more" if len(files) > 3 else "")
    yield "characters", f"{report.n_chars:,} in {report.n_lines:,} lines; {report.n_bytes:,} bytes of UTF-8"
    yield "line ends", _line_ends(report)
    yield "vocabulary", f"{report.vocab_size:,} characters: {quoted(''.join(report.counts), 70)}"
    yield "rare", f"fewer than {RARE_BELOW} times: {_listed(report.rare)}"
    yield "invisible", _listed(report.invisible)
    entropies = [f"{bits:.2f}" for bits in report.entropy_bits if bits is not None]
    if entropies:
        orders = ", ".join(map(str, range(len(entropies))))
        yield "entropy", f"{', '.join(entropies)} bits per character where the last {orders} are known"
        part = "the text itself"
        if report.entropy_chars < report.n_chars:
            part = f"its first {report.entropy_chars:,} characters"
        yield "", f"(by the counts of {part}, so optimistic, and the more so the more are known)"
    yield "split", f"{report.train_chars:,} characters to train on, {report.val_chars:,} for validation"
    if report.train_chars and report.only_in_val:
        yield "", f"in validation alone: {_listed({c: report.counts[c] for c in report.only_in_val})}"
    if report.compared_chars >= SHARED_WIDTH:
        yield "shared", _shared(report)
    if report.longest_shared_lines is not None:
        there, here = report.longest_shared_lines
        lines = f"at line {here:,} and at line {there:,},"
        yield "", f"the longest: {len(report.longest_shared):,} characters {lines}"
        yield "", quoted(report.longest_shared, _EXCERPT[0])
    for remark in notes:
        yield "note", remark


def _shared(report: TextReport) -> str:
    val = "the validation text"
    if report.compared_chars < report.val_chars:
        val = f"the first {report.compared_chars:,} characters of validation"
    if not report.shared_chars:
        return f"no {SHARED_WIDTH} characters in a row of {val} are in the training text"
    share = f"{100 * report.shared:.1f} %" if report.shared >= 0.0005 else "under 0.05 %"
    return f"{share} of {val} lies in runs of {SHARED_WIDTH} or more that training has, too"


def _line_ends(report: TextReport) -> str:
    kinds = {r"\n": report.lf, r"\r\n": report.crlf, r"\r alone": report.cr}
    parts = [f"{count:,} {kind}" for kind, count in kinds.items() if count]
    return (", ".join(parts) or "none") + ("; mixed" if len(parts) > 1 else "")


def _listed(counts: Mapping[str, int]) -> str:
    """Return the first characters with their code points and counts."""
    most = _LISTED[0]
    named = [f"{quoted(c)} U+{ord(c):04X} ({n:,})" for c, n in list(counts.items())[:most]]
    return ", ".join([*named, f"and {len(counts) - most:,} more"] if len(counts) > most else named) or "none"


def _too_short(report: TextReport) -> str:
    return (
        f"too short a text: {report.train_chars} characters to train on, {report.val_chars} for validation; "
        "each takes at least 2, and thousands to mean anything"
    )


def _guessed(report: TextReport, guessed: Guess, minutes: float) -> Iterator[tuple[str, str]]:
    """Yield the lines about a training, each with its label."""
    nats = guessed.ngram_loss_nats
    if nats is not None:
        bits = f"{nats / math.log(2):.3f} bits per character"
        measured = f"on the validation text: measured, with order {guessed.ngram_order}"
        yield "n-gram", f"{nats:.3f} nats = {bits} {measured}"
        if guessed.ngram_counted < report.train_chars:
            yield "", f"(counted in the last {guessed.ngram_counted:,} characters of training)"
        if guessed.ngram_scored < report.val_chars:
            yield "", f"(scored on {guessed.ngram_scored:,} characters, spread over the validation text)"
        if guessed.unlike:
            yield "", "that is hardly better than to know how often each character occurs there: the end of"
            yield "", "the text is unlike its beginning, as in a sorted list, and a loss on it will mislead"
    yield "preset", f"{guessed.preset}, {'; '.join(guessed.reasons)}"
    timed = f"(timed just now, on {guessed.device})"
    steps = f"{_two_digits(guessed.steps):,.0f} step{'s' if guessed.steps > 1 else ''}"
    if guessed.text_is_short:
        yield "time", f"{_roughly(guessed.seconds)} {timed}: about {steps}, enough for so short a text"
    elif guessed.is_limited:
        yield "time", f"{_roughly(guessed.seconds)} {timed}: {steps}, as max_steps is set"
    elif guessed.steps == 1:
        yield "time", f"{minutes:g} min is too short for more than a step {timed}"
    else:
        yield "time", f"{minutes:g} min, which is about {steps} {timed}"
    yield from _loss(report, guessed)


def _loss(report: TextReport, guessed: Guess) -> Iterator[tuple[str, str]]:
    ngram, expected, ahead = guessed.ngram_loss_nats, guessed.loss_nats, guessed.ahead_nats
    if ngram is None:
        yield "loss", "no guess: nothing is kept for validation"
        return
    if expected is None or ahead is None or guessed.usual_steps is None:
        yield "loss", f"no guess: {guessed.preset} was not measured on texts of about this length"
        return
    low, high = expected
    usual = f"{guessed.preset} ended {_beside(*ahead)} its n-gram model"
    yield "loss", f"{low:.2f} to {high:.2f} nats, a guess: {usual}"
    yield "", "on prose and source code of about this length; lists and other kinds of text may differ"
    if guessed.too_few:
        yield "", f"there it made {guessed.usual_steps:,} steps or more: expect a worse loss than that"
    elif high < ngram:
        yield "", "so it should beat the n-gram model, if by little"
    elif low <= ngram:
        yield "", "so it may or may not beat the n-gram model"
    elif guessed.text_is_short:
        yield "", "so the n-gram model should stay better: the text is too short for a GPT to beat it"
    else:
        yield "", "so the n-gram model should stay better: give the training more minutes"
    if report.val_chars < _SHORT_VALIDATION:
        yield "", "and so short a validation text says little: another piece of text, another loss"


def _beside(least: float, most: float) -> str:
    """Return the distance below something in words."""
    if most <= 0:
        return f"{-most:.2f} to {-least:.2f} above"
    return f"{least:.2f} to {most:.2f} below" if least >= 0 else f"{-least:.2f} above to {most:.2f} below"


def _roughly(seconds: float) -> str:
    if seconds < 7.5:
        return "a few seconds"
    if seconds < 57.5:
        return f"about {5 * round(seconds / 5)} s"
    return f"about {_two_digits(seconds / 60):g} min"


def _two_digits(value: float) -> float:
    return float(f"{value:.2g}")


def _command(args: argparse.Namespace, guessed: Guess) -> str | None:
    """Return a `charlm train` that is worth its time, or None."""
    if guessed.unlike or guessed.enough_minutes is None:
        return None
    name = "mine" if args.files[0] == "-" else Path(args.files[0]).name.partition(".")[0] or "mine"
    words = ["-o", f"runs/{name}", "--minutes", f"{guessed.enough_minutes:g}"]
    if guessed.enough_minutes != args.minutes:
        words += ["--preset", guessed.preset]
    if args.encoding != "utf-8":
        words += ["--encoding", args.encoding]
    if args.val_fraction != VAL_FRACTION:
        words += ["--val-fraction", repr(args.val_fraction).removesuffix(".0")]
    return " ".join(["charlm train", *map(as_word, args.files), *map(shell_word, words)])


def _recommended(command: str | None, guessed: Guess, minutes: float) -> Iterator[tuple[str, str]]:
    if guessed.unlike:
        yield "command", "none for this text as it is: shuffle its lines first (shuf FILE > shuffled.txt)"
    elif command is None:
        smaller = "" if guessed.preset == "cpu-10s" else "; try --preset cpu-10s"
        yield "command", f"none: an hour is too short for this model here{smaller}"
    else:
        yield "command", command
        if guessed.enough_minutes != minutes:
            yield "", f"({minutes:g} min would be too few steps)"
        elif guessed.text_is_short and guessed.loses:
            yield "", "(its result will be the n-gram model, or a mixture of which that is the larger part)"


def _counted_values(report: TextReport) -> dict[str, object]:
    lines = report.longest_shared_lines
    return {
        "n_chars": report.n_chars,
        "n_bytes": report.n_bytes,
        "n_lines": report.n_lines,
        "line_ends": {"lf": report.lf, "crlf": report.crlf, "cr": report.cr},
        "has_bom": report.has_bom,
        "vocab_size": report.vocab_size,
        "n_rare": len(report.rare),
        "rare": _first(report.rare),
        "n_invisible": len(report.invisible),
        "invisible": _first(report.invisible),
        "entropy_bits": report.entropy_bits,
        "entropy_chars": report.entropy_chars,
        "train_chars": report.train_chars,
        "val_chars": report.val_chars,
        "n_only_in_val": len(report.only_in_val),
        "only_in_val": _first({c: report.counts[c] for c in report.only_in_val}),
        "compared_chars": report.compared_chars,
        "shared_chars": report.shared_chars,
        "longest_shared_chars": len(report.longest_shared),
        "longest_shared": report.longest_shared[: _EXCERPT[1]],
        "longest_shared_lines": None if lines is None else {"val": lines[0], "train": lines[1]},
    }


def _first(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(list(counts.items())[: _LISTED[1]])


def _guessed_values(guessed: Guess | None) -> dict[str, object]:
    if guessed is None:
        return {"ngram": None, "training": None}
    return {
        "ngram": {
            "order": guessed.ngram_order,
            "loss_nats": guessed.ngram_loss_nats,
            "counted_chars": guessed.ngram_counted,
            "scored_chars": guessed.ngram_scored,
        },
        "training": {name: getattr(guessed, name) for name in _TRAINING},
    }
