"""Microseconds a character of generation against how much text there is, from 1 character to eight windows.

One stream of charlm's model with 0.8M parameters (as in benchmarks.generate), in float32, with both ways past
the window, in turns. A point is the mean of a stretch of 32 characters, its figure the median over rounds.
"restart" is timed in one run from the first character on. "slide" costs the same anywhere past the window:
there, two stretches a window are timed, each in a run of its own, whose prompt ends a few characters before.
`python -m benchmarks.draw generate-context` makes a picture of the JSON.

    cd tests
    python -m benchmarks.generate_context --json generate_context.json
    python -m benchmarks.draw generate-context generate_context.json -o generate_context.png
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence

import torch
from benchmarks.common import Json, announce, machine, new_parser, report, spread, table
from benchmarks.peers import QUICK_SIZE, SIZES, build

from charlm import GPT
from charlm.generation import Overflow

__all__ = ["main"]

_WINDOWS = 8
_STRETCH = 32
_LEAD_IN = 4  # characters before a stretch, so that what a run does once is not in it
_SEED = 1337

_Times = dict[int, float]
"""Seconds a character of the stretch that follows so many characters."""


def main(argv: Sequence[str] | None = None) -> None:
    """Time all stretches and report."""
    args = _parser().parse_args(argv)
    stretch = 4 if args.quick else _STRETCH
    if args.quick:
        args.rounds = 2
    measured_on = machine()
    model = build(QUICK_SIZE if args.quick else SIZES["0.8M"])
    rounds: dict[Overflow, list[_Times]] = {"restart": [], "slide": []}
    _run(model, 1, 2 * stretch, stretch, "restart")  # untimed
    for number in range(args.rounds):
        announce(f"round {number + 1} of {args.rounds}")
        for overflow, times in rounds.items():
            times.append(_round(model, stretch, overflow))
    results: Json = {
        overflow: [
            {
                "after": after,
                "chars": stretch,
                "microseconds_per_char": spread([1e6 * seconds[after] for seconds in times]),
            }
            for after in times[0]
        ]
        for overflow, times in rounds.items()
    }
    report(
        "generate_context",
        args,
        measured_on=measured_on,
        settings={"model": model.config.to_dict(), "parameters": model.num_parameters()},
        results=results,
        text=_text(results),
    )


def _parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__, data=False)
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    return parser


def _round(model: GPT, stretch: int, overflow: Overflow) -> _Times:
    window, end = model.block_size, _WINDOWS * model.block_size
    if overflow == "restart":
        return _run(model, 1, end, stretch, overflow)
    seconds = _run(model, 1, window, stretch, overflow)
    for after in range(window + 1, end, window // 2):
        seconds |= _run(model, after, stretch, stretch, overflow)
    return seconds


def _run(model: GPT, after: int, count: int, stretch: int, overflow: Overflow) -> _Times:
    """Time the whole stretches among the `count` characters that follow the first `after`."""
    lead_in = min(_LEAD_IN, after - 1)
    generator = torch.Generator().manual_seed(_SEED)
    idx = torch.randint(model.vocab_size, (1, after - lead_in), generator=generator)  # (1, T)
    steps = model.stream(idx, lead_in + count, seed=_SEED, overflow=overflow)
    for _ in itertools.islice(steps, lead_in):
        pass
    seconds: _Times = {}
    for start in range(after, after + count - stretch + 1, stretch):
        began = time.perf_counter()
        for _ in itertools.islice(steps, stretch):
            pass
        seconds[start] = (time.perf_counter() - began) / stretch
    return seconds


def _text(results: Json) -> str:
    by_start: dict[int, dict[str, str]] = {}
    for overflow, points in results.items():
        for point in points:
            us = point["microseconds_per_char"]
            words = f"{us['median']:.1f} ({us['least']:.1f} to {us['most']:.1f})"
            by_start.setdefault(point["after"], {})[overflow] = words
    rows = [
        [after, *(words.get(overflow, "") for overflow in results)]
        for after, words in sorted(by_start.items())
    ]
    return table(["characters before", *(f"{overflow}, microseconds" for overflow in results)], rows)


if __name__ == "__main__":
    main()
