"""Characters a second and peak memory of training, against model size, block size and batch size.

Each point is a process of its own, so that its peak memory is its own: a few untimed steps, then steps for
about --seconds, at least five and at most fifty. One size changes at a time, the others stay the preset's.
`python -m benchmarks.draw cost` makes a picture of the JSON.

    cd tests
    python -m benchmarks.cost --json cost.json
    python -m benchmarks.draw cost cost.json -o cost.png
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence

from benchmarks.common import (
    TINY,
    Json,
    add_settings,
    announce,
    child,
    machine,
    new_parser,
    peak_device_memory_bytes,
    peak_memory_bytes,
    report,
    settings_of,
    spread,
    table,
)

__all__ = ["main"]

_MODELS = ((2, 2, 64), (3, 2, 96), (4, 2, 128), (6, 3, 192), (6, 4, 256), (6, 6, 384))  # layers, heads, width
_BLOCKS = (32, 64, 128, 256, 512, 1024)
_BATCHES = (1, 2, 4, 8, 16, 32, 64)
_WARM_UP, _LEAST, _MOST = 3, 5, 50  # steps
_VOCAB_SIZE = 65


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every point and report."""
    args = _parser().parse_args(argv)
    if args.point is not None:
        print(json.dumps(_measure(json.loads(args.point)), allow_nan=False))
        return
    if args.quick:
        args.changes, args.seconds = [*args.changes, *TINY], 0.01
    measured_on = machine()
    settings = settings_of(args.preset, args.changes)
    base: Json = {"model": settings.model, "training": settings.training}
    base |= {"device": args.device, "seconds": args.seconds}
    known: dict[str, Json] = {}  # the preset's own sizes are in all three series
    series: dict[str, list[Json]] = {}
    for name, spec in _points(base, quick=args.quick):
        key = json.dumps(spec)
        if key not in known:
            known[key] = json.loads(child(["-m", "benchmarks.cost", "--point", key]).output)
            point = known[key]
            announce(
                f"{name}: {point['parameters']:,} parameters, block {point['block_size']}, batch "
                f"{point['batch_size']}: {point['chars_per_second']:,.0f} chars/s, "
                f"{point['peak_memory_bytes'] / 2**20:,.0f} MiB"
            )
        series.setdefault(name, []).append(known[key])
    report(
        "cost",
        args,
        measured_on=measured_on,
        settings={"model": settings.model, "training": settings.training},
        results=series,
        text=_text(series),
    )


def _parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__, data=False)
    add_settings(parser)
    parser.set_defaults(device="cpu")
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="of timed steps for a point (default: %(default)s)"
    )
    parser.add_argument("--point", help=argparse.SUPPRESS)
    return parser


def _points(base: Json, *, quick: bool) -> Iterator[tuple[str, Json]]:
    """Yield the series that a point belongs to, and what is to be measured."""
    model, training = base["model"], base["training"]
    if quick:
        yield "model size", base
        yield "block size", base
        yield "batch size", base
        return
    for n_layer, n_head, n_embd in _MODELS:
        changed = {**model, "n_layer": n_layer, "n_head": n_head, "n_embd": n_embd}
        yield "model size", {**base, "model": changed}
    for block_size in _BLOCKS:
        yield "block size", {**base, "model": {**model, "block_size": block_size}}
    for batch_size in _BATCHES:
        yield "batch size", {**base, "training": {**training, "batch_size": batch_size}}


def _measure(spec: Json) -> Json:
    """Train in this process, and return what it cost."""
    import torch

    from charlm import GPT, BlockDataset, GPTConfig, Trainer, TrainerConfig

    config = GPTConfig.from_dict({**spec["model"], "vocab_size": _VOCAB_SIZE})
    changes = {"max_steps": _WARM_UP + _MOST, "max_seconds": None}
    training = TrainerConfig.from_dict({**spec["training"], **changes})
    torch.manual_seed(training.seed)
    # What the characters are does not matter to time and memory.
    data = BlockDataset(torch.randint(_VOCAB_SIZE, (100_000,), dtype=torch.uint8), config.block_size)
    before = peak_memory_bytes()
    model = GPT(config)
    trainer = Trainer(model, data, training, device=spec["device"])
    times: list[float] = []
    began = time.perf_counter()
    for record in trainer.steps():
        trainer.backend.synchronize()
        now = time.perf_counter()
        if record.step > _WARM_UP:
            times.append(now - began)
        began = now
        if len(times) >= _LEAST and sum(times) >= spec["seconds"]:
            break
    step_seconds = spread(times)
    chars = training.batch_size * training.accumulate * config.block_size
    return {
        "parameters": model.num_parameters(),
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "block_size": config.block_size,
        "batch_size": training.batch_size,
        "device": trainer.backend.name,
        "precision": trainer.precision,
        "step_seconds": step_seconds,
        "chars_per_second": chars / step_seconds["median"],
        "peak_memory_bytes": peak_memory_bytes(),
        "imports_memory_bytes": before,
        "peak_device_memory_bytes": peak_device_memory_bytes(trainer.backend),
    }


def _text(series: dict[str, list[Json]]) -> str:
    rows = [
        [
            name,
            f"{point['parameters']:,}",
            point["block_size"],
            point["batch_size"],
            f"{point['chars_per_second']:,.0f}",
            f"{1_000 * point['step_seconds']['median']:.1f}",
            f"{point['peak_memory_bytes'] / 2**20:,.0f}",
            f"{point['imports_memory_bytes'] / 2**20:,.0f}",
        ]
        for name, points in series.items()
        for point in points
    ]
    head = ["series", "parameters", "block", "batch", "chars/s", "ms a step", "peak MiB", "imports alone"]
    return table(head, rows)


if __name__ == "__main__":
    main()
