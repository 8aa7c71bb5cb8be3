"""All that is to be measured on a GPU, in one command that keeps to a time, eight minutes by default.

Each part is a process of its own, so that one that fails, hangs or breaks the device costs the others
nothing. What a part leaves of its share of the time, the later ones get.

    backend     `charlm.testing.check_backend`, and what the device is
    training    the recipe cpu-1min for 300 steps: losses, speed
    memory      of a step of T5's model: allocated, peak, and what `training_bytes` says
    generation  characters a second, 0.8M and 10.7M parameters, one stream and a batch of 64: `generate` with
                its cache, a step over buffers of a fixed size, and that step as a CUDA graph, where nothing
                waits for the device until the text is there
    T5          a model of 10.7M parameters after 32.8 million characters, or as many as the share allows
    compile     seconds until the first step with `torch.compile`, then milliseconds a step, and without it

The JSON is written anew after each part.

    cd tests
    python -m benchmarks.gpu --data tinyshakespeare.txt --json gpu.json
    python -m benchmarks.gpu --only T5 --seconds 240 --set dropout=0.3
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks import train_once
from benchmarks.common import (
    TINY,
    Json,
    Settings,
    add_settings,
    announce,
    child,
    new_parser,
    report,
    settings_of,
    table,
    write_json,
)
from benchmarks.gpu_parts import Spec

from charlm import load_corpus
from charlm.errors import CharLMError

__all__ = ["T5", "main"]

_SHARES = {"backend": 30, "training": 60, "memory": 30, "generation": 70, "T5": 220, "compile": 70}
"""The parts in their order, and how the seconds are shared out among those that are still to come."""

T5 = (
    *("n_layer=6", "n_head=6", "n_embd=384", "block_size=256", "dropout=0.2", "attention_dropout=None"),
    *("conv_width=1", "batch_size=32", "learning_rate=0.005", "weight_decay=0.2"),
)
"""What T5 changes in cpu-5min: half of nanoGPT's batch, so twice the steps for as many characters; no
convolution, dropout and decay for a text that is read 33 times. No GPU was at hand to tune it on."""

_T5_CHARS = 32.8e6
_MACHINE = "import json; from benchmarks.common import machine; print(json.dumps(machine()))"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the parts one after the other and report."""
    began = time.monotonic()
    args = _parser().parse_args(argv)
    if args.quick:
        args.changes = [*args.changes, *TINY]
    measured_on = json.loads(child(["-c", _MACHINE]).output)  # this process leaves the device to the others
    settings = settings_of("cpu-5min", [*T5, *args.changes])
    data, why = _text_at_hand(args.data)
    results: Json = {"text": {"data": data, "in_place_of": why}, "parts": {}}
    common = {"model": settings.model, "training": settings.training}
    for part in args.only:
        left = args.seconds - (time.monotonic() - began)
        to_come = [name for name in args.only if name not in results["parts"]]
        limit = left * _SHARES[part] / sum(_SHARES[name] for name in to_come)
        announce(f"{part}, at most {limit:.0f} s of {left:.0f}")
        results["parts"][part] = _result(part, args, settings, data, limit)
        write_json("gpu", args, measured_on=measured_on, settings=common, results=results)
    results["seconds"] = time.monotonic() - began
    report("gpu", args, measured_on=measured_on, settings=common, results=results, text=_text(results))


def _parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    add_settings(parser, preset=None)
    parser.set_defaults(json=Path("gpu.json"))
    parser.add_argument("--seconds", type=float, default=480.0, help="of it all (default: %(default)s)")
    parser.add_argument(
        "--only", type=_parts, default=list(_SHARES), metavar="PART,...", help="default: " + ",".join(_SHARES)
    )
    return parser


def _parts(text: str) -> list[str]:
    chosen = [name for name in _SHARES if name in text.split(",")]
    if len(chosen) != len(set(text.split(","))):
        raise argparse.ArgumentTypeError(f"parts are {', '.join(_SHARES)}, got {text!r}")
    return chosen


def _text_at_hand(data: str) -> tuple[str, str | None]:
    """Return which text is used, and why it is another one than was meant."""
    try:
        load_corpus(data)
    except CharLMError as error:
        if data != "tinyshakespeare":  # the user named a file
            raise SystemExit(f"error: {error}") from error
        announce(f"no Tiny Shakespeare here, so losses are of python-docs and mean nothing: {error}")
        return "python-docs", str(error)
    return data, None


def _result(part: str, args: argparse.Namespace, settings: Settings, data: str, limit: float) -> Json:
    """Run a part in a process of its own; return what came of it, or its error, and its seconds."""
    began = time.monotonic()
    found: Json
    try:
        if part in {"training", "T5"}:
            found = train_once.run(_run_of(part, args, settings, data, limit), timeout=limit)
        else:
            spec = Spec(
                part=part,
                device=args.device,
                data=data,
                quick=args.quick,
                model=settings.model,
                training=settings.training,
            )
            command = ["-m", "benchmarks.gpu_parts", json.dumps(asdict(spec))]
            found = json.loads(child(command, timeout=limit).output)
    except subprocess.TimeoutExpired:
        found = {"error": f"was not done after {limit:.0f} s, and was stopped"}
    except SystemExit as error:
        found = {"error": str(error)}
    seconds = time.monotonic() - began
    announce(f"{part}: {_last_line(found.get('error', 'done'))} ({seconds:.1f} s)")
    return {**found, "part_seconds": seconds}


def _last_line(message: str) -> str:
    return message.strip().splitlines()[-1]


def _run_of(
    part: str, args: argparse.Namespace, settings: Settings, data: str, limit: float
) -> train_once.Spec:
    """Return the training of a part, which is to end a little before its limit."""
    if part == "training":
        settings = settings_of("cpu-1min", TINY if args.quick else ())
    steps: tuple[str, float] = ("steps", 10 if args.quick else 300)
    chars: tuple[str, float] = ("chars", 2_000 if args.quick else _T5_CHARS)
    return train_once.Spec(
        data=data,
        model=settings.model,
        training=settings.training,
        budget=steps if part == "training" else chars,  # type: ignore[arg-type]
        evaluations=3 if part == "training" else 8,
        seed=1337,
        device=args.device,
        most_seconds=max(1.0, 0.9 * limit - 2),
    )


def _text(results: Json) -> str:
    rows = []
    for name, part in results["parts"].items():
        told = _last_line(part["error"]) if "error" in part else "; ".join(_told(name, part))
        rows.append([name, f"{part['part_seconds']:.1f}", told])
    return (
        table(["part", "s", "result"], rows) + f"\n{results['seconds']:.0f} s, text {results['text']['data']}"
    )


def _told(name: str, part: Json) -> list[str]:
    """Return what a part has to say, for people."""
    if name == "backend":
        return [part["name"], part["precision"]]
    if name in {"training", "T5"}:
        final, best = part["final"]["loss_nats"], part["best"]["loss_nats"]
        return [
            f"{final:.4f} nats, best {best:.4f}",
            f"{part['chars_seen']:,} characters in {part['seconds']:.1f} s",
        ]
    if name == "memory":
        return [
            f"{key} {part[key] / 1e6:,.0f} MB" for key in ("peak_bytes", "allocated_bytes", "estimate_bytes")
        ]
    if name == "compile":
        return [
            f"{way}: {part[way]['first_step_seconds']:.1f} s until the first step, "
            f"then {part[way]['step_milliseconds']['median']:.1f} ms a step"
            for way in ("eager", "compiled")
        ]
    return [
        f"{size} x {rows}: " + ", ".join(f"{way} {_speed(one)}" for way, one in ways.items())
        for size, batches in part["chars_per_second"].items()
        for rows, ways in batches.items()
    ]


def _speed(found: Json) -> str:
    return f"{found['median']:,.0f}/s" if "median" in found else "skipped"


if __name__ == "__main__":
    main()
