"""What all benchmarks share: arguments, settings, the machine, timing in turns, and the JSON at the end.

It imports no torch at the top, so that a process whose whole time is measured pays for what it uses only.
Times are of `time.perf_counter`; a figure is the median of its repetitions, beside the least and the most.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import datetime as dt
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import charlm
from charlm import DeviceBackend
from charlm.files.atomic import write_file
from charlm.models.config import PRESETS, GPTConfig, PresetName
from charlm.training.config import TrainerConfig
from charlm.training.recipes import RECIPES

__all__ = [
    "TINY",
    "Finished",
    "Json",
    "Settings",
    "add_seeds",
    "add_settings",
    "announce",
    "child",
    "commit_of",
    "environment",
    "in_turns",
    "machine",
    "new_parser",
    "peak_device_memory_bytes",
    "peak_memory_bytes",
    "report",
    "seconds_to_output",
    "settings_of",
    "spread",
    "table",
    "write_json",
]

Json = dict[str, Any]

TINY = ("n_layer=1", "n_head=2", "n_embd=16", "block_size=16", "batch_size=4")
"""Settings of `--quick`: of no use as a figure, and done in a moment."""

_HERE = Path(__file__).resolve()
_GPT_FIELDS = {field.name for field in dataclasses.fields(GPTConfig)} - {"vocab_size"}


@dataclass(frozen=True)
class Settings:
    """Of a model and its training, before the text is known."""

    model: Json
    """Fields of `GPTConfig` but vocab_size."""
    training: Json
    """Fields of `TrainerConfig`."""
    given: frozenset[str]
    """Names of the fields that `--set` decided."""


def new_parser(description: str | None, *, data: bool = True) -> argparse.ArgumentParser:
    """Return a parser with what every benchmark takes; the description is the module's docstring."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="see that it works; the figures mean nothing")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write settings and results to this file")
    if data:
        parser.add_argument(
            "--data",
            default="tinyshakespeare",
            help="path of a text, or a named corpus (default: %(default)s, from CHARLM_DATA_DIR if set)",
        )
    return parser


def add_settings(parser: argparse.ArgumentParser, preset: str | None = "cpu-1min") -> None:
    """Add `--preset` with its default, unless that is None, and `--set` and `--device`."""
    if preset is not None:
        parser.add_argument("--preset", default=preset, choices=list(PRESETS), help="default: %(default)s")
    parser.add_argument(
        "--set",
        dest="changes",
        metavar="FIELD=VALUE",
        action="append",
        default=[],
        help="change a field of GPTConfig or TrainerConfig; may be repeated",
    )
    parser.add_argument("--device", default="auto", help="default: %(default)s")


def add_seeds(parser: argparse.ArgumentParser) -> None:
    """Add `--seeds`."""
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[1337, 1, 2], help="one run each (default: 1337 1 2)"
    )


def settings_of(preset: str, changes: Sequence[str]) -> Settings:
    """Return a preset with its recipe, changed by `FIELD=VALUE`, where a value is written as in Python."""
    name = cast("PresetName", preset)
    model: Json = dict(PRESETS[name])
    training: Json = RECIPES.get(name, TrainerConfig()).to_dict()
    given = set()
    for change in changes:
        field, _, text = change.partition("=")
        try:
            value = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            value = text  # a word, as in schedule=cosine
        (model if field in _GPT_FIELDS else training)[field] = value
        given.add(field)
    problems = [*GPTConfig.check(model), *TrainerConfig.check(training)]
    if problems:
        raise SystemExit("error: --set: " + "; ".join(problems))
    return Settings(model, training, frozenset(given))


def machine() -> Json:
    """Return what the figures were measured on, and when."""
    import torch

    return {
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": importlib.metadata.version("numpy"),
        "charlm": charlm.__version__,
        "commit": commit_of(_HERE.parent),
    }


def commit_of(folder: Path) -> str | None:
    """Return the commit of a checkout, with "-dirty" where files were changed; None outside of one."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def peak_memory_bytes() -> int:
    """Return the most memory that this process has had resident."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage here: on Linux its figure is at least that of the process which started this one.
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def peak_device_memory_bytes(backend: DeviceBackend) -> int | None:
    """Return the most memory that was in use on a device of its own; None on the CPU."""
    memory = None if backend.device.type == "cpu" else backend.memory()
    return None if memory is None else memory.peak


def spread(values: Sequence[float]) -> Json:
    """Return the median, the least, the most, and the values in the order in which they were measured."""
    return {
        "median": statistics.median(values),
        "least": min(values),
        "most": max(values),
        "values": list(values),
    }


def in_turns(contestants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Time each contestant once in every round, A B A B, and return the seconds by name.

    A machine that gets slower meanwhile then slows all of them. One untimed turn goes first.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in contestants.values():
        turn()
    for _ in range(rounds):
        for name, turn in contestants.items():
            began = time.perf_counter()
            turn()
            seconds[name].append(time.perf_counter() - began)
    return seconds


@dataclass(frozen=True)
class Finished:
    """A process that has ended well."""

    seconds: float
    """From before it was started until after it had ended."""
    output: str
    """What it wrote to standard output."""


def child(command: Sequence[str], *, cwd: Path | None = None, timeout: float | None = None) -> Finished:
    """Run Python with these arguments as a process of its own; it finds this charlm and these benchmarks.

    After `timeout` seconds it is ended, and `subprocess.TimeoutExpired` raised.
    """
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )
    seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"error: {shlex.join(command)} failed:\n{done.stderr[-4_000:]}")
    return Finished(seconds, done.stdout)


def seconds_to_output(command: Sequence[str]) -> float:
    """Run Python as `child` does; return the seconds from before its start to its first byte of output."""
    began = time.perf_counter()
    with subprocess.Popen([sys.executable, *command], env=environment(), stdout=subprocess.PIPE) as process:
        first = b"" if process.stdout is None else process.stdout.read(1)
        seconds = time.perf_counter() - began
        process.communicate()
    if process.returncode or not first:
        raise SystemExit(f"error: {shlex.join(command)} failed, or wrote nothing")
    return seconds


def environment() -> dict[str, str]:
    found = [str(_HERE.parents[1]), str(Path(charlm.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, found))}


def announce(sentence: str) -> None:
    """Say what is going on, on standard error."""
    print(sentence, file=sys.stderr, flush=True)


def report(
    name: str,
    args: argparse.Namespace,
    *,
    measured_on: Mapping[str, object],
    settings: Mapping[str, object],
    results: Mapping[str, object],
    text: str,
) -> None:
    """Print the results for people, and write them as JSON where that was asked for.

    Args:
        name: of the benchmark.
        args: the options, which go into the JSON.
        measured_on: what `machine` returned at the start.
        settings: what was trained or called.
        results: the figures.
        text: what is printed.
    """
    print(text)
    if args.json is not None:
        write_json(name, args, measured_on=measured_on, settings=settings, results=results)
        announce(f"written: {args.json}")


def write_json(
    name: str,
    args: argparse.Namespace,
    *,
    measured_on: Mapping[str, object],
    settings: Mapping[str, object],
    results: Mapping[str, object],
) -> None:
    """Write what `report` does to `args.json`."""
    content = {
        "benchmark": name,
        "quick": args.quick,
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "machine": measured_on,
        "settings": settings,
        "results": results,
    }
    write_file(args.json, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return rows as a Markdown table, aligned for reading as it is."""
    cells = [[str(cell) for cell in row] for row in [head, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)
