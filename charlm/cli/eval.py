"""`charlm eval`: the loss of a model on a text, as a whole and for each character."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import lzma
except ImportError:  # Python was built without it
    lzma = None  # type: ignore[assignment]

from torch import Tensor, nn

from charlm.cli.baseline import BASELINE_FOLDER
from charlm.cli.colours import annotated, coloured, wants_colour
from charlm.cli.encoded import is_large
from charlm.cli.output import Console, UsageError, aligned, check_output, emit, writing
from charlm.cli.preparing import Bar
from charlm.cli.reading import known_text
from charlm.cli.signals import Signals
from charlm.cli.stored import MOST_EVALUATED, score_stored, stored_text
from charlm.data.prepared import is_prepared
from charlm.errors import CharLMError, quoted
from charlm.evaluation.evaluate import EvalResult
from charlm.evaluation.markup import char_bits
from charlm.evaluation.page import surprisal_page
from charlm.evaluation.surprisal import Surprisal
from charlm.files.atomic import write_file
from charlm.lm import CharLM, load
from charlm.text.corpus import load_corpus
from charlm.text.tokenizer import unit_of

__all__ = ["run"]

_LEAST_PACKED, _MOST_PACKED = 1_000, 16_000_000  # bytes for xz; the most take ten seconds
_CANDIDATES = 5  # likeliest characters that the page shows for each


def run(args: argparse.Namespace, console: Console, signals: Signals, began: float) -> int:
    """Write the figures as a table or as JSON, and on request the text with its surprisal."""
    if args.html is not None and Path(args.html).suffix.lower() not in {".html", ".htm"}:
        raise UsageError(f"--html must name a file that ends in .html, got {quoted(args.html)}")
    if args.show and args.json:
        raise UsageError("--show writes a text and --json an object; give one of them")
    if args.html is not None:
        check_output(args.html)
    stored = any(map(is_prepared, args.files)) or is_large(args.files)
    if stored and (args.show or args.html is not None):
        raise UsageError("--show and --html need a text that fits into memory; give a part of it")
    if stored and args.on_unknown is not None:
        raise UsageError("--on-unknown needs a text that fits into memory; give a part of it")
    text = "" if stored else load_corpus(args.files, encoding=args.encoding)
    lm = load(args.run, device=args.device, mixture=args.mixture, weights=args.weights)
    if stored:
        return _scored_on_disk(args, lm, console)
    text, notes = known_text(text, lm.tokenizer, args.on_unknown or "error")
    for note in notes:
        console.complain(f"note: {note}")
    surprisals = None
    with _progress(lm, len(lm.tokenizer.encode_array(text)), console):
        if args.html is not None or args.show:
            surprisals = lm.surprisal(text, top=0 if args.html is None else _CANDIDATES)
        result = lm.evaluate(text) if surprisals is None else surprisals.result
    block_size = lm.model.block_size
    baseline = _baseline(Path(args.run), lambda ngram: ngram.evaluate(text, block_size=block_size), console)
    unit = unit_of(lm.tokenizer)
    try:
        if surprisals is not None and args.html is not None:
            _write_page(args, text, surprisals, lm)
            console.say(f"page    {args.html}")
    finally:  # the figures are written even if the page fails
        if surprisals is not None and args.show:
            for line in _shown(text, surprisals):
                emit(line, flush=False, painted=True)
            emit("\n")
        write = _json if args.json else _table
        emit(write(result, baseline, unit, lm.model.kind, _xz_bits_per_byte(text)))
    return 0


def _scored_on_disk(args: argparse.Namespace, lm: CharLM, console: Console) -> int:
    """Score a part, spread over the text, of a prepared corpus or a text that is too large for memory."""
    data = stored_text(args.files, args.encoding, lm, console)
    with _progress(lm, min(data.n_targets, MOST_EVALUATED), console):
        result = score_stored(lm, data)
    baseline = _baseline(Path(args.run), lambda ngram: score_stored(ngram, data), console)
    write = _json if args.json else _table
    emit(write(result, baseline, unit_of(lm.tokenizer), lm.model.kind, None))
    return 0


@contextlib.contextmanager
def _progress(lm: CharLM, total: int, console: Console) -> Iterator[None]:
    """Show how many of so many tokens the model has read inside the block."""
    done = 0

    def after(model: nn.Module, args: tuple[Tensor, ...], output: object) -> None:
        nonlocal done
        done += args[0].numel()
        bar.tell("scoring", min(done, total), total)

    with Bar(console) as bar:
        handle = lm.model.register_forward_hook(after)
        try:
            yield
        finally:
            handle.remove()


def _write_page(args: argparse.Namespace, text: str, found: Surprisal, lm: CharLM) -> None:
    files = ("standard input" if file == "-" else Path(file).name for file in args.files)
    title = f"{Path(args.run).resolve().name} reads {', '.join(files)}"
    page = surprisal_page(text, found, lm.tokenizer, title=title)
    with writing(args.html):
        write_file(Path(args.html), page.encode())


def _xz_bits_per_byte(text: str) -> float | None:
    """Return the bits per byte of `xz -9e`; None: the text is too short or too long for it."""
    data = text.encode()
    if lzma is None or not _LEAST_PACKED <= len(data) <= _MOST_PACKED:
        return None
    best = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": max(4096, len(data))}
    return 8 * len(lzma.compress(data, filters=[best])) / len(data)


def _json(result: EvalResult, baseline: EvalResult | None, unit: str, kind: str, xz: float | None) -> str:
    values = {
        "loss_nats": result.loss_nats,
        "bits_per_char": result.bits_per_char,
        "bits_per_byte": result.bits_per_byte,
        "perplexity": result.perplexity,
        "accuracy": result.accuracy,
        "n_chars": result.n_chars,
        "n_left_out": result.n_left_out,
        "unit": unit,
        "kind": kind,
        "baseline_loss_nats": None if baseline is None else baseline.loss_nats,
        "xz_bits_per_byte": xz,
    }
    # JSON has no infinity, which is the loss if the model gave a character the probability 0.
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    return json.dumps(finite) + "\n"


def _table(result: EvalResult, baseline: EvalResult | None, unit: str, kind: str, xz: float | None) -> str:
    per_byte = math.nan if result.bits_per_byte is None else result.bits_per_byte
    impossible = ", as one was held impossible" if math.isinf(result.loss_nats) else ""
    perplexity, total = result.perplexity, result.n_chars + result.n_left_out
    part = f"of {total:,}, spread over them" if result.n_left_out else "all but the first"
    rows = [
        ("loss", f"{result.loss_nats:.4f}", f"nats per {unit}{impossible}"),
        ("", f"{result.bits_per_char:.4f}", f"bits per {unit}"),
        ("", f"{per_byte:.4f}", "bits per byte of UTF-8"),
        ("perplexity", f"{perplexity:.4f}" if perplexity < 1e6 else f"{perplexity:.4g}", f"per {unit}"),
        ("accuracy", f"{100 * result.accuracy:.2f}", "% predicted as the likeliest"),
        ("predicted", f"{result.n_chars:,}", f"{unit}s, {part}"),
    ]
    if xz is not None:
        rows.insert(3, ("xz", f"{xz:.4f}", "bits per byte, of this text packed by xz -9e"))
    if kind == "mixture":
        rows.insert(0, ("model", kind, "of a GPT and an n-gram model; --no-mixture takes the GPT alone"))
    if baseline is not None:
        ahead = baseline.loss_nats - result.loss_nats
        verdict = f"beaten by {ahead:.4f}" if ahead > 0 else f"{-ahead:.4f} better than the model"
        verdict = "which is the model" if kind == "ngram" else verdict
        rows.append(("n-gram", f"{baseline.loss_nats:.4f}", f"nats per {unit}, the baseline: {verdict}"))
    return aligned(rows)


def _shown(text: str, found: Surprisal) -> Iterator[str]:
    """Yield the lines of the text, with the surprisal of each character."""
    bits = char_bits(text, found.bits)
    encoding, chars, newline = sys.stdout.encoding, {c: c for c in text}, "\u21b5"
    for char in {*chars, newline}:  # a character that the stream escapes is as wide as its escape
        chars[char] = char.encode(encoding, "backslashreplace").decode(encoding)
    newline = newline if chars[newline] == newline else "\\n"
    cells = [(chars[char], b) for char, b in zip(text, bits.tolist(), strict=True)]
    if wants_colour(sys.stdout):
        return coloured(cells, newline)
    return annotated(cells, newline, shutil.get_terminal_size().columns)


def _baseline(run: Path, score: Callable[[CharLM], EvalResult], console: Console) -> EvalResult | None:
    """Score the text with the n-gram model of a run, if it has one, in the windows of its model."""
    if not (run / "run.json").exists() or not (run / BASELINE_FOLDER).exists():
        return None
    try:
        return score(load(run / BASELINE_FOLDER, device="cpu"))
    except (CharLMError, OSError) as error:
        console.complain(f"warning: no baseline: {error}")
        return None
