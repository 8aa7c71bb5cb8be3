"""`charlm generate`: a trained model continues a text, on standard output as it is generated."""

from __future__ import annotations

import argparse
import dataclasses
import json
import secrets
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from charlm.cli import interactive
from charlm.cli.baseline import BASELINE_FOLDER
from charlm.cli.output import Console, UsageError, emit, refuse
from charlm.cli.reading import known_text, unknown_notes
from charlm.cli.session import sampling_of
from charlm.cli.signals import Signals
from charlm.errors import CheckpointError, InputError, quoted
from charlm.generation.options import Sampling, SamplingOptions
from charlm.generation.stopping import StopMatcher
from charlm.lm import CharLM, load
from charlm.models.ngram import NGramLM
from charlm.text.corpus import load_corpus, read_text
from charlm.text.tokenizer import OnUnknown, Tokenizer
from charlm.text.verbatim import Verbatim, verbatim

__all__ = ["run"]

_MANY = 500  # characters, where nobody has said another number
_LINE = "-" * 40
_FLUSH_SECONDS = 0.05


def run(args: argparse.Namespace, console: Console, signals: Signals, began: float) -> int:
    """Write one sample as it is generated, or several, or all as JSON."""
    stop: list[str] = args.stop
    if args.interactive:
        interactive.refuse_others(args)
    sampling = _checked(args, stop)
    prompt = _prompt(args)
    source = None if args.verbatim is None else load_corpus(args.verbatim, encoding=args.encoding)
    ranked = [] if args.rank is None else _lines(read_text(args.rank, encoding=args.encoding), args.rank)
    lm = load(args.run, device=args.device, mixture=args.mixture, weights=args.weights)
    prompt, *ranked = _known([prompt, *ranked], lm.tokenizer, args.on_unknown or "error", console)
    if args.interactive:
        return interactive.run(lm, prompt, args, console, signals)
    if ranked:
        _rank(lm, prompt, ranked, args)
        return 0
    if args.draft:
        sampling["draft"] = _baseline_of(Path(args.run))
    seed = secrets.randbits(32) if args.seed is None else args.seed
    console.detail(f"seed {seed}")
    count = _MANY if args.max_new_tokens is None else args.max_new_tokens
    settings = {"run": args.run, "max_new_tokens": count, "stop": stop}
    settings |= {"keep_stop": args.keep_stop, "weights": args.weights, **sampling, "draft": args.draft}
    wishes = {"banned": args.ban, "allowed": args.allow, "regex": args.regex, "choices": args.choice}
    settings |= wishes
    sampling["seed"] = seed
    options: dict[str, Any] = {"stop": stop, "keep_stop": args.keep_stop, **wishes, **sampling}
    if args.num_samples == 1 and not args.json:
        written = _write_as_it_comes(prompt, lm.stream(prompt, count, **options))
        if source is not None:
            _tell_verbatim(verbatim(written, source), args.verbatim, console)
        return 0
    samples = lm.generate([prompt] * args.num_samples, count, **options)
    found = [] if source is None else [verbatim(text[len(prompt) :], source) for text in samples]
    if args.json:
        # Escapes for all that is not ASCII: valid JSON, whatever the encoding of standard output is.
        values = {"prompt": prompt, "samples": samples, "seed": seed, "settings": settings}
        if source is not None:
            values["verbatim"] = [dataclasses.asdict(one) for one in found]
        emit(json.dumps(values) + "\n")
    else:
        emit(f"{_LINE}\n".join(text if text.endswith("\n") else text + "\n" for text in samples))
        for one in found:
            _tell_verbatim(one, args.verbatim, console)
    return 0


def _known(texts: list[str], tokenizer: Tokenizer, on_unknown: OnUnknown, console: Console) -> list[str]:
    """Return texts with unknown characters left out or replaced, and write notes on them."""
    for note in unknown_notes("".join(texts), tokenizer, on_unknown):
        console.complain(f"note: {note}")
    return [known_text(text, tokenizer, on_unknown)[0] for text in texts]


def _lines(text: str, file: str) -> list[str]:
    lines = [line for line in text.splitlines() if line]
    if not lines:
        raise UsageError(f"--rank needs a file with a continuation on each line, got none in {quoted(file)}")
    return lines


def _rank(lm: CharLM, prompt: str, lines: list[str], args: argparse.Namespace) -> None:
    """Write the continuations with their probabilities instead of a text, the likeliest first."""
    ranked = lm.rank(lines, prompt=prompt, overflow=args.overflow)
    if args.json:
        values = [{"text": text, "log_prob_nats": nats} for text, nats in ranked]
        emit(json.dumps({"prompt": prompt, "ranked": values}) + "\n")
    else:
        emit("".join(f"{nats:.4f}\t{text}\n" for text, nats in ranked))


def _tell_verbatim(found: Verbatim, source: str, console: Console) -> None:
    """Show how much of a generated text the source contains."""
    longest = f"; the longest, of {len(found.longest)}: {quoted(found.longest, 200)}" if found.longest else ""
    part = f"{found.n_shared:,} of {found.n_chars:,} characters"
    console.say(f"verbatim {part} stand in {quoted(source)} in runs of 50 or more{longest}")


def _baseline_of(run: Path) -> NGramLM:
    try:
        return NGramLM.load(run / BASELINE_FOLDER)
    except CheckpointError as error:
        raise InputError(
            f"--draft needs the n-gram baseline that charlm train leaves in a run; {error}"
        ) from error


def _write_as_it_comes(prompt: str, pieces: Iterable[str]) -> str:
    last, written = prompt, []
    emit(prompt)
    flushed_at = time.monotonic()
    for piece in pieces:
        now = time.monotonic()
        due = now - flushed_at >= _FLUSH_SECONDS
        emit(piece, flush=due)
        last = piece
        written.append(piece)
        if due:
            flushed_at = now
    emit("" if last.endswith("\n") else "\n")
    return "".join(written)


def _checked(args: argparse.Namespace, stop: list[str]) -> Sampling:
    """Return the sampling options, refused as a wrong command line where they are wrong."""
    sampling = sampling_of(args)
    problems = []
    if args.max_new_tokens is not None and args.max_new_tokens < 0:
        problems += [f"--max-new-tokens must be 0 or more, got {args.max_new_tokens}"]
    wishes = {"--regex": args.regex, "--choice": args.choice, "--stop": stop}
    names = [name for name, value in wishes.items() if value]
    if len(names) > 1:
        problems += [f"{' and '.join(names)} exclude each other; give one of them"]
    if args.num_samples < 1:
        problems += [f"--num-samples must be 1 or more, got {args.num_samples}"]
    for check in (lambda: SamplingOptions(**{**sampling, "seed": args.seed}), lambda: StopMatcher(stop)):
        try:
            check()
        except InputError as error:
            problems += [str(error)]
    refuse(problems)
    return sampling


def _prompt(args: argparse.Namespace) -> str:
    if args.stdin not in {None, "-"}:
        raise UsageError(f"unexpected argument '{args.stdin}'; a prompt is given with -p")
    given = [way for way in (args.prompt, args.prompt_file, args.stdin) if way is not None]
    if len(given) > 1:
        raise UsageError("-p, --prompt-file and - exclude each other; give one of them")
    if args.prompt_file is not None or args.stdin is not None:
        return read_text(given[0], encoding=args.encoding)
    return args.prompt or ""
