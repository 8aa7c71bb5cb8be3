"""Pictures of what the benchmarks wrote; needs matplotlib, the extra "plot".

    cd tests
    python -m benchmarks.draw cost cost.json -o cost.png
    python -m benchmarks.draw generate-context generate_context.json -o generate_context.png
    python -m benchmarks.draw loss one_minute.json ../runs/first/metrics.jsonl nanogpt.log -o loss.png

`cost` and `generate-context` draw the JSON of the benchmark of that name. `loss` draws loss against seconds,
a line for each run, from JSON of benchmarks.loss_at_budget and benchmarks.time_to_loss, from a run's
metrics.jsonl, and from what nanoGPT's train.py printed. nanoGPT's own figure comes from random batches, so
its line is dotted and says so. The pictures are legible in black and white.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import matplotlib as mpl
from benchmarks.common import Json
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from charlm.runs.log import read_metrics

__all__ = ["main"]

_STYLES = ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)))
_MARKERS = "osv^Dxd+"
_GREYS = ("0.0", "0.35", "0.6")
_X_AXES = {"model size": "parameters", "block size": "block_size", "batch size": "batch_size"}
_X_LABELS = {
    "model size": "parameters",
    "block size": "block size (characters)",
    "batch size": "batch size (blocks)",
}


@dataclass(frozen=True)
class _Line:
    name: str
    seconds: list[float]
    losses: list[float]
    random_batches: bool = False


def main(argv: Sequence[str] | None = None) -> None:
    """Draw one picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    cost = kinds.add_parser("cost", help="speed and memory against three sizes")
    cost.add_argument("inputs", type=Path, nargs=1, metavar="JSON")
    context = kinds.add_parser("generate-context", help="time of a character against how much text there is")
    context.add_argument("inputs", type=Path, nargs=1, metavar="JSON")
    loss = kinds.add_parser("loss", help="loss against seconds")
    loss.add_argument("inputs", type=Path, nargs="+", metavar="FILE")
    loss.add_argument("--log-time", action="store_true", help="logarithmic axis of time")
    for kind in (cost, context, loss):
        kind.add_argument("-o", "--out", type=Path, required=True, help="picture: .png, .svg or .pdf")
    args = parser.parse_args(argv)
    mpl.rcParams["font.size"] = 9
    if args.kind == "cost":
        figure = _cost(json.loads(args.inputs[0].read_text(encoding="utf-8")))
    elif args.kind == "generate-context":
        figure = _generate_context(json.loads(args.inputs[0].read_text(encoding="utf-8")))
    else:
        figure = _loss([line for path in args.inputs for line in _lines(path)], log_time=args.log_time)
    figure.savefig(args.out, dpi=150)


def _cost(content: Json) -> Figure:
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    memory_panels = [panel.twinx() for panel in panels]
    most = max(p["peak_memory_bytes"] for points in content["results"].values() for p in points)
    for panel, memory, (name, unsorted) in zip(
        panels, memory_panels, content["results"].items(), strict=True
    ):
        points = sorted(unsorted, key=lambda point: cast("float", point[_X_AXES[name]]))
        x = [point[_X_AXES[name]] for point in points]
        speed = panel.plot(x, [p["chars_per_second"] for p in points], "o-", color="0", label="speed")
        peak = memory.plot(
            x,
            [p["peak_memory_bytes"] / 2**20 for p in points],
            "s--",
            color="0.45",
            markerfacecolor="white",
            label="peak memory",
        )
        panel.set_xscale("log", base=10 if name == "model size" else 2)
        panel.set_yscale("log")
        memory.set_yscale("log")
        memory.set_ylim(100, 2 * most / 2**20)
        panel.set_xlabel(_X_LABELS[name])
        panel.set_title(_fixed_sizes(name, points[0]), fontsize=8)
        panel.grid(which="major", linewidth=0.3, color="0.7")
        if panel is panels[0]:
            panel.legend(handles=[*speed, *peak], fontsize=8, loc="lower left")
        if name != "model size":
            panel.set_xticks(x, [str(value) for value in x])
            panel.minorticks_off()
    panels[0].set_ylabel("training speed (characters per second)")
    memory_panels[-1].set_ylabel("peak memory of the process (MiB)")
    here = content["machine"]
    device = here["cpu"] if points[0]["device"] == "cpu" else here["gpu"]
    figure.suptitle(f"{device}, threads: {here['threads']}, torch {here['torch']}", fontsize=9)
    return figure


def _fixed_sizes(name: str, point: Json) -> str:
    sizes = {
        "model size": f"{point['parameters'] / 1e6:.2g}M parameters",
        "block size": f"block {point['block_size']}",
        "batch size": f"batch {point['batch_size']}",
    }
    return ", ".join(text for size, text in sizes.items() if size != name)


def _generate_context(content: Json) -> Figure:
    window = content["settings"]["model"]["block_size"]
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    looks: Json = {
        "slide": {"marker": "o", "markersize": 4, "linestyle": "--", "color": "0.45"},
        "restart": {"drawstyle": "steps-mid", "color": "0"},
    }
    for overflow, points in content["results"].items():
        x = [point["after"] + point["chars"] / 2 for point in points]
        times = [point["microseconds_per_char"] for point in points]
        middle = [t["median"] for t in times]
        axes.plot(x, middle, **looks[overflow])
        axes.fill_between(
            x,
            [t["least"] for t in times],
            [t["most"] for t in times],
            step="mid" if overflow == "restart" else None,
            color=looks[overflow]["color"],
            alpha=0.15,
            linewidth=0,
        )
        past = [m for m, point in zip(middle, points, strict=True) if point["after"] > window]
        above = overflow == "restart"
        axes.annotate(
            overflow,
            (4.5 * window, max(past) if above else min(past)),
            xytext=(0, 5 if above else -5),
            textcoords="offset points",
            ha="center",
            va="bottom" if above else "top",
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.set_xticks([window * i for i in range(9)])
    axes.grid(linewidth=0.3, color="0.7")
    axes.set_xlabel(f"characters before it, prompt and generated (the window is {window})")
    axes.set_ylabel("time of a character (microseconds)")
    here = content["machine"]
    parameters = content["settings"]["parameters"] / 1e6
    figure.suptitle(
        f"{parameters:.1f}M parameters, one stream, {here['cpu']}, threads: {here['threads']}, "
        f"torch {here['torch']}",
        fontsize=9,
    )
    return figure


def _loss(lines: list[_Line], *, log_time: bool) -> Figure:
    if not lines:
        raise SystemExit("error: none of the files has an evaluation")
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    looks = itertools.product(_STYLES, _GREYS)
    for line, (style, grey), marker in zip(
        lines, itertools.cycle(looks), itertools.cycle(_MARKERS), strict=False
    ):
        axes.plot(
            line.seconds,
            line.losses,
            linestyle=":" if line.random_batches else style,
            color=grey,
            marker=marker,
            markersize=4,
            label=line.name + (" (random batches)" if line.random_batches else ""),
        )
    if log_time:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel("time (seconds)")
    axes.set_ylabel("validation loss (nats per character)")
    axes.grid(which="both", linewidth=0.3, color="0.7")
    axes.legend(fontsize=8)
    return figure


def _lines(path: Path) -> Iterator[_Line]:
    if path.suffix == ".json":
        yield from _from_benchmark(path)
    elif path.suffix == ".jsonl":
        records = [record for record in read_metrics(path) if record["kind"] == "eval"]
        kept = [record for record in records if record["loss_nats"] is not None]
        seconds = [cast("float", record["seconds"]) for record in kept]
        if kept:
            yield _Line(path.parent.name, seconds, [cast("float", record["loss_nats"]) for record in kept])
    else:
        yield from _from_nanogpt(path)


def _from_benchmark(path: Path) -> Iterator[_Line]:
    results = json.loads(path.read_text(encoding="utf-8"))["results"]
    for run in results.get("runs") or results.get("charlm", {}).get("trials", ()):
        history = run["history"]
        losses = [e["loss_nats"] for e in history]
        yield _Line(f"{path.stem}, seed {run['seed']}", [e["seconds"] for e in history], losses)
    for trial in results.get("nanogpt", {}).get("trials", ())[:1]:  # its runs are all alike
        yield _Line("nanoGPT, at its end", [trial["process_seconds"]], [trial["loss_nats"]])


def _from_nanogpt(path: Path) -> Iterator[_Line]:
    """Read what train.py prints: its times are of iterations, and exclude what came before the first."""
    text = path.read_text(encoding="utf-8")
    seconds, points = 0.0, []
    pattern = r"^(?:step \d+: .*val loss (?P<loss>\S+)|iter \d+: .* time (?P<ms>\S+)ms.*)$"
    for found in re.finditer(pattern, text, re.M):
        if found["loss"] is None:
            seconds += float(found["ms"]) / 1_000
        elif seconds > 0:  # the weights before the first step are no result
            points.append((seconds, float(found["loss"])))
    if points:
        yield _Line(path.stem, [s for s, _ in points], [loss for _, loss in points], random_batches=True)


if __name__ == "__main__":
    main()
