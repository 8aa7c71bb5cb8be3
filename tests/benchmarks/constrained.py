"""What it costs to hold a text to a pattern: for each character, and until a pattern is known or refused.

cost       a window of 256 characters of nanoGPT's architecture, 0.8M parameters beside embeddings, by the
           compiled engine: free, and held to a pattern of 1,000 states that allows half the vocabulary;
           with 65 characters and with 4,000; all at once, and character by character
patterns   seconds, and the most memory that Python has at once, of patterns that are large or explode

cd tests
python -m benchmarks.constrained --json constrained.json
"""

from __future__ import annotations

import dataclasses
import tracemalloc
from collections.abc import Callable, Sequence
from functools import partial

import torch
from benchmarks.common import Json, announce, in_turns, machine, new_parser, report, spread, table
from benchmarks.peers import QUICK_SIZE, SIZES, VOCABULARY, config_of

from charlm import GPT
from charlm.errors import InputError
from charlm.generation import Automaton

__all__ = ["main"]

_VOCABULARIES = {"65": VOCABULARY, "4,000": "".join(chr(0x4E00 + i) for i in range(4_000))}
_PATTERNS = (
    r"\d{4}-\d\d-\d\d",
    "[a-z ]{1,500}",
    "(a?){500}a{500}",
    "(a|b)*a(a|b){20}",
    "((a{1,90}){1,90})*",
    "(a{0,60}b{0,60}){0,60}",
    "([ab]*a[ab]{0,100}c?)*",
    "a{0,8000}b",
    "a{99999999}",
)


def main(argv: Sequence[str] | None = None) -> None:
    """Time both and report."""
    parser = new_parser(__doc__, data=False)
    parser.add_argument("--rounds", type=int, default=15, help="default: %(default)s")
    args = parser.parse_args(argv)
    measured_on = machine()
    if args.quick:
        args.rounds = 1
    results: Json = {"cost": {}, "patterns": {}}
    for size, vocabulary in _VOCABULARIES.items():
        announce(f"{size} characters")
        results["cost"][size] = _cost(vocabulary, args.rounds, quick=args.quick)
    for pattern in _PATTERNS[:1] if args.quick else _PATTERNS:
        results["patterns"][pattern] = _pattern(pattern)
    report("constrained", args, measured_on=measured_on, settings={}, results=results, text=_text(results))


def _cost(vocabulary: str, rounds: int, *, quick: bool) -> Json:
    torch.manual_seed(1337)
    config = config_of(QUICK_SIZE if quick else SIZES["0.8M"])
    model = GPT(dataclasses.replace(config, vocab_size=len(vocabulary))).eval()
    if (reason := model.why_not_native()) is not None:
        raise SystemExit(f"error: {reason}")
    count = (model.block_size or 1) - 1
    half = "".join(f"\\U{ord(c):08x}" for c in vocabulary[: len(vocabulary) // 2])
    automaton = Automaton.from_regex(f"[{half}]{{{count},999}}", vocabulary)
    idx = torch.zeros(1, 1, dtype=torch.int64)

    def generate(constraint: Automaton | None) -> None:
        assert model.generate(idx, count, seed=1, constraint=constraint).shape == (1, count + 1)

    def stream(constraint: Automaton | None) -> None:
        assert len(list(model.stream(idx, count, seed=1, constraint=constraint))) == count

    found: Json = {"states": len(automaton.distance)}
    ways: dict[str, Callable[[Automaton | None], None]] = {"generate": generate, "stream": stream}
    for name, way in ways.items():
        seconds = in_turns({"free": partial(way, None), "held": partial(way, automaton)}, rounds)
        times = [held / free for free, held in zip(seconds["free"], seconds["held"], strict=True)]
        micros = {which: spread([1e6 * s / count for s in values]) for which, values in seconds.items()}
        found[name] = {"microseconds_per_char": micros, "times_free": spread(times)}
    return found


def _pattern(pattern: str) -> Json:
    def read() -> str:
        try:
            return f"{len(Automaton.from_regex(pattern, VOCABULARY + '0123456789').distance):,} states"
        except InputError:
            return "refused"

    seconds = in_turns({"read": read}, 3)["read"]
    tracemalloc.start()  # which makes it slower, so by itself
    outcome = read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {"outcome": outcome, "seconds": spread(seconds), "peak_bytes": peak}


def _text(results: Json) -> str:
    rows = []
    for size, found in results["cost"].items():
        for way in ("generate", "stream"):
            micros, times = found[way]["microseconds_per_char"], found[way]["times_free"]
            both = [f"{micros[which]['median']:.1f}" for which in ("free", "held")]
            ratio = f"{times['median']:.2f} ({times['least']:.2f} to {times['most']:.2f})"
            rows.append([size, way, *both, ratio])
    cost = table(["characters", "", "free, microseconds a character", "held", "times"], rows)
    rows = [
        [pattern, found["outcome"], f"{found['seconds']['median']:.3f}", f"{found['peak_bytes'] / 1e6:.1f}"]
        for pattern, found in results["patterns"].items()
    ]
    return cost + "\n\n" + table(["pattern", "", "seconds", "peak, MB"], rows)


if __name__ == "__main__":
    main()
