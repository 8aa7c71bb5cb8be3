"""Characters a second of generation: charlm beside nanoGPT and transformers, the same model in turns.

The parts, all in float32, at temperature 1 with nothing filtered, from a prompt of one character:

    G1       one stream to the end of the window, 1 -> 256 characters, 0.8M parameters
    G2       the same with 10.7M parameters
    G3       the same with a batch of 64, both sizes
    G4       one stream of four windows, 1 -> 1,024 characters, both sizes: charlm's two ways past the window,
             and nanoGPT's, which is "slide"
    first    until the first character is there: in a warm process, and from the start of a new one
    options  what temperature, top-k, top-p and min-p add to a character of G1

The model is nanoGPT's architecture with random weights, which all share. In G1 to G3 charlm also takes part
with these rounded to 16 and 8 bits; in G1 and G2 llama2.c (https://github.com/karpathy/llama2.c, gcc
-Ofast, one thread and two) with a model of its own architecture and as many weights. Every turn makes the
same number of characters. nanoGPT takes no part in G3 with 10.7M parameters, where a turn of it takes
minutes; transformers takes none in G4, for its GPT-2 ends with the window.

    cd tests
    python -m benchmarks.generate --nanogpt ../../nanoGPT --llama2c ../../llama2.c --json generate.json
    python -m benchmarks.generate --nanogpt ../../nanoGPT --only G1,G4 --rounds 10
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from benchmarks.common import (
    Json,
    announce,
    in_turns,
    machine,
    new_parser,
    report,
    seconds_to_output,
    spread,
    table,
)
from benchmarks.nanogpt import version_of
from benchmarks.peers import QUICK_SIZE, SIZES, VOCABULARY, Peer, build, llama2c, others_of
from torch import Tensor

from charlm import GPT, CharLM, CharTokenizer
from charlm.generation import Overflow, Sampling
from charlm.native.storage import round_weights

__all__ = ["main"]

_BOTH = tuple(SIZES)
_PARTS = {"G1": ("0.8M",), "G2": ("10.7M",), "G3": _BOTH, "G4": _BOTH, "first": _BOTH, "options": ("0.8M",)}
"""The sizes of each part."""

_TITLES = {
    "G1": "one stream inside the window",
    "G2": "one stream inside the window",
    "G3": "a batch inside the window",
    "G4": "one stream, four windows long",
}

_OPTIONS: Mapping[str, Sampling] = {
    "temperature 1": {},
    "temperature 0.8": {"temperature": 0.8},
    "temperature 0": {"temperature": 0.0},
    "top-k 10": {"top_k": 10},
    "top-p 0.9": {"top_p": 0.9},
    "min-p 0.05": {"min_p": 0.05},
    "temperature 0.8, top-k 10, top-p 0.9": {"temperature": 0.8, "top_k": 10, "top_p": 0.9},
}

_SEED = 1337


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the parts that were chosen and report."""
    args = _parser().parse_args(argv)
    if args.quick:
        args.rounds = 1
    measured_on = machine()
    sizes = {size: QUICK_SIZE if args.quick else SIZES[size] for part in args.only for size in _PARTS[part]}
    models = {name: build(size) for name, size in sizes.items()}
    peers: dict[str, dict[str, Peer]] = {}
    results: Json = {"models": {}}
    for name, model in models.items():
        peers[name], results["models"][name] = others_of(
            model, args.nanogpt, with_transformers=args.transformers
        )
    for part in args.only:
        results[part] = {}
        for name in _PARTS[part]:
            announce(f"{part}, {name}")
            if part == "first":
                results[part][name] = _first_character(models[name], peers[name], args.rounds)
            elif part == "options":
                results[part][name] = _options(models[name], args.rounds)
            else:
                batch_size = (4 if args.quick else 64) if part == "G3" else 1
                turns, chars = _contest(part, name, models[name], peers[name], batch_size)
                with contextlib.ExitStack() as stack:
                    if args.llama2c is not None and part in {"G1", "G2"}:
                        for threads in (2, 1):  # its second thread spins for a while after a turn
                            turn = stack.enter_context(llama2c(args.llama2c, sizes[name], threads))
                            turns[f"llama2.c, {threads} threads"] = turn
                    results[part][name] = _speeds(in_turns(turns, args.rounds), chars)
    if "first" in args.only:
        announce("first, a new process")
        results["first"]["a new process"] = _new_process(models["0.8M"], args.rounds)
    report(
        "generate",
        args,
        measured_on=measured_on,
        settings={
            "models": {name: model.config.to_dict() for name, model in models.items()},
            "nanogpt": None if args.nanogpt is None else version_of(args.nanogpt),
            "transformers": (
                metadata.version("transformers")
                if any("transformers" in others for others in peers.values())
                else None
            ),
        },
        results=results,
        text=_text(results, measured_on["threads"]),
    )


def _parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__, data=False)
    parser.add_argument("--nanogpt", type=Path, metavar="DIR", help="a checkout of nanoGPT to time beside")
    parser.add_argument("--llama2c", type=Path, metavar="DIR", help="a checkout of llama2.c, likewise")
    parser.add_argument(
        "--no-transformers",
        dest="transformers",
        action="store_false",
        help="leave transformers out, which else takes part if it is installed",
    )
    parser.add_argument(
        "--only", type=_parts, default=list(_PARTS), metavar="PART,...", help="default: " + ",".join(_PARTS)
    )
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    return parser


def _parts(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in _PARTS]:
        raise argparse.ArgumentTypeError(
            f"there is no part {unknown[0]!r}; the parts are {', '.join(_PARTS)}"
        )
    return [part for part in _PARTS if part in names]


def _contest(
    part: str, size: str, model: GPT, peers: Mapping[str, Peer], batch_size: int
) -> tuple[dict[str, Callable[[], None]], int]:
    """Return a turn of everyone who takes part, by name, and how many characters each makes in it."""
    count = (4 if part == "G4" else 1) * model.block_size - 1  # the prompt is the first character
    left_out = {("G3", "10.7M"): "nanogpt", ("G4", "0.8M"): "transformers", ("G4", "10.7M"): "transformers"}
    ways: Mapping[str, Overflow] = {"charlm": "slide"}
    if part == "G4":
        ways = {"charlm restart": "restart", "charlm slide": "slide"}
    generators: dict[str, Callable[[Tensor, int], Tensor]] = {
        name: partial(model.generate, seed=_SEED, overflow=overflow) for name, overflow in ways.items()
    }
    if part != "G4":
        for storage in ("bfloat16", "int8"):
            rounded = copy.deepcopy(model)
            round_weights(rounded, storage)
            generators[f"charlm {storage}"] = partial(rounded.generate, seed=_SEED)
    for name, peer in peers.items():
        if name != left_out.get((part, size)):
            generators[name] = peer.generate
    idx = torch.zeros(batch_size, 1, dtype=torch.int64)

    def turn(name: str) -> None:
        shape = tuple(generators[name](idx, count).shape)
        if shape != (batch_size, 1 + count):
            raise SystemExit(f"error: {name} made {shape} characters instead of {(batch_size, 1 + count)}")

    return {name: partial(turn, name) for name in generators}, batch_size * count


def _speeds(seconds: Mapping[str, Sequence[float]], chars: int) -> Json:
    """Return characters a second of each contestant, and its ratios to those of somebody else."""
    speeds: Json = {name: {"chars_per_second": spread([chars / s for s in t])} for name, t in seconds.items()}
    for name, times in seconds.items():
        speeds[name]["times_faster_than"] = {
            base: {
                "of_medians": statistics.median(theirs) / statistics.median(times),
                "of_turns": spread([a / b for a, b in zip(theirs, times, strict=True)]),
            }
            for base, theirs in seconds.items()
            if not base.startswith("charlm")
        }
    return speeds


def _first_character(model: GPT, peers: Mapping[str, Peer], rounds: int) -> Json:
    """Return milliseconds until the first character, of many calls in a process that has made some before."""
    lm = CharLM(model, CharTokenizer(VOCABULARY))

    def streamed(prompt: str) -> None:
        next(lm.stream(prompt, 500, seed=_SEED))

    results: Json = {}
    for length in (1, min(200, model.block_size)):
        prompt = (VOCABULARY * 4)[:length]
        idx = torch.tensor([lm.tokenizer.encode(prompt)])  # (1, T)
        turns: dict[str, Callable[[], object]] = {"charlm": partial(streamed, prompt)}
        turns |= {name: partial(peer.generate, idx, 1) for name, peer in peers.items()}
        seconds = in_turns(turns, 10 * rounds)
        results[f"a prompt of {length}"] = _milliseconds(seconds)
    return results


def _new_process(model: GPT, rounds: int) -> Json:
    """Return milliseconds from the start of `charlm generate` to its first byte, and torch's share of it."""
    with TemporaryDirectory() as folder:
        run = str(Path(folder, "model"))
        CharLM(model, CharTokenizer(VOCABULARY)).save(run)
        commands = {
            "charlm generate": ["-m", "charlm", "generate", run, "-n", "1", "--device", "cpu"],
            "import torch alone": ["-c", "import torch; print(flush=True)"],
        }
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(rounds + 1):  # the first one is not looked at
            for name, command in commands.items():
                seconds[name].append(seconds_to_output(command))
    return _milliseconds({name: times[1:] for name, times in seconds.items()})


def _milliseconds(seconds: Mapping[str, Sequence[float]]) -> Json:
    return {name: {"milliseconds": spread([1_000 * s for s in times])} for name, times in seconds.items()}


def _options(model: GPT, rounds: int) -> Json:
    """Return microseconds a character with each option, and what that is more than at temperature 1."""
    idx, count = torch.zeros(1, 1, dtype=torch.int64), model.block_size - 1

    def turn(sampling: Sampling) -> None:
        options: Sampling = {"seed": _SEED, **sampling}
        model.generate(idx, count, **options)

    seconds = in_turns({name: partial(turn, sampling) for name, sampling in _OPTIONS.items()}, rounds)
    plain = next(iter(seconds.values()))
    return {
        name: {
            "microseconds_per_char": spread([1e6 * s / count for s in times]),
            "microseconds_more": spread([1e6 * (s - p) / count for s, p in zip(times, plain, strict=True)]),
        }
        for name, times in seconds.items()
    }


def _text(results: Json, threads: int) -> str:
    sections = [f"threads: {threads}"]
    counts = {name: model["parameters"] for name, model in results["models"].items()}
    rows = [[size, who, f"{count:,}"] for size, peers in counts.items() for who, count in peers.items()]
    sections.append(table(["model", "", "parameters"], rows))
    for part, by_size in results.items():
        if part in _TITLES:
            sections += [
                f"{part}: {_TITLES[part]}, {size}\n{_speed_table(speeds)}" for size, speeds in by_size.items()
            ]
    if "first" in results:
        rows = []
        for where, timed in results["first"].items():
            settings = {"": timed} if where == "a new process" else timed
            for what, by_name in settings.items():
                for name, values in by_name.items():
                    ms = values["milliseconds"]
                    label = ", ".join(filter(None, (where, what)))
                    rows.append(
                        [label, name, f"{ms['median']:.2f}", f"{ms['least']:.2f} to {ms['most']:.2f}"]
                    )
        sections.append("first character\n" + table(["", "", "ms", "range"], rows))
    if "options" in results:
        rows = [
            [name, f"{v['microseconds_per_char']['median']:.1f}", _in_words(v["microseconds_more"], ".1f")]
            for name, v in results["options"]["0.8M"].items()
        ]
        sections.append("options\n" + table(["", "microseconds a character", "more (of turns)"], rows))
    return "\n\n".join(sections)


def _speed_table(speeds: Json) -> str:
    bases = list(next(iter(speeds.values()))["times_faster_than"])
    rows = []
    for name, values in speeds.items():
        row = [name, _in_words(values["chars_per_second"], ",.0f")]
        for base in bases:
            ratio = values["times_faster_than"][base]
            row.append(f"{ratio['of_medians']:.2f}; {_in_words(ratio['of_turns'], '.2f')}")
        rows.append(row)
    head = ["", "characters/s (range)", *(f"times faster than {base}: medians; turns" for base in bases)]
    return table(head, rows)


def _in_words(values: Json, digits: str) -> str:
    return f"{values['median']:{digits}} ({values['least']:{digits}} to {values['most']:{digits}})"


if __name__ == "__main__":
    main()
