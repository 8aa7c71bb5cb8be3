"""What a checkpoint costs: to save it, to load it, and how long training waits for it.

A save is compared with `torch.save` of the same model and optimizer to one file, flushed and fsynced;
loading with reading the same files and taking their sha256. Each pair in turns, in one process.

    cd tests
    python -m benchmarks.checkpoints --json checkpoints.json
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from benchmarks.common import (
    TINY,
    Json,
    add_settings,
    in_turns,
    machine,
    new_parser,
    report,
    settings_of,
    spread,
    table,
)

from charlm import GPT, BlockDataset, CharTokenizer, Trainer, TrainerConfig, load, load_corpus
from charlm.runs.checkpoint import read_checkpoint

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and report."""
    parser = new_parser(__doc__)
    add_settings(parser, preset="lecture")
    parser.add_argument("--rounds", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured (default: temporary)")
    args = parser.parse_args(argv)
    rounds = 2 if args.quick else args.rounds
    measured_on = machine()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        results = measure(args, Path(folder), rounds)
    settings = {"preset": args.preset, "changes": args.changes, "rounds": rounds}
    report(
        "checkpoints", args, measured_on=measured_on, settings=settings, results=results, text=shown(results)
    )


def measure(args: argparse.Namespace, folder: Path, rounds: int) -> Json:
    """Return seconds of saving and loading, ours and the plain way's."""
    trainer = trained(args, folder / "run")

    def plain_save() -> None:
        with (folder / "plain.pt").open("wb") as file:
            state = [optimizer.state_dict() for optimizer in trainer.optimizers]
            torch.save({"model": trainer.model.state_dict(), "optimizers": state}, file)
            file.flush()
            os.fsync(file.fileno())

    saving = in_turns({"charlm": trainer.save, "torch.save and fsync": plain_save}, rounds)
    checkpoint = trainer.save()
    size = sum(path.stat().st_size for path in checkpoint.iterdir())

    def plain_read() -> None:
        for path in checkpoint.iterdir():
            hashlib.sha256(path.read_bytes()).digest()

    loading = in_turns(
        {
            "read_checkpoint": lambda: read_checkpoint(checkpoint),
            "charlm.load": lambda: load(checkpoint, device="cpu"),
            "reading and sha256": plain_read,
        },
        rounds,
    )
    steps, pauses = [], []
    for record in trainer.steps():
        steps.append(record.seconds)
        began = time.perf_counter()
        trainer.save()
        pauses.append(time.perf_counter() - began)
        if len(steps) > rounds:
            break
    return {
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "bytes": size,
        "saving": {name: spread(seconds) for name, seconds in saving.items()},
        "loading": {name: spread(seconds) for name, seconds in loading.items()},
        "step": spread(steps[1:]),
        "pause": spread(pauses[1:]),
    }


def shown(results: Json) -> str:
    """Return the results as a table, each time beside its ratio to the plain way's."""
    rows = []
    for kind, plain in (("saving", "torch.save and fsync"), ("loading", "reading and sha256")):
        for name, seconds in results[kind].items():
            ratios = [a / b for a, b in zip(seconds["values"], results[kind][plain]["values"], strict=True)]
            times = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            rows.append([kind, name, f"{1e3 * seconds['median']:.1f}", times])
    for name in ("step", "pause"):
        seconds = results[name]
        most = f"{1e3 * seconds['least']:.1f} to {1e3 * seconds['most']:.1f} ms"
        rows.append(["training", name, f"{1e3 * seconds['median']:.1f}", most])
    head = f"{results['parameters']:,} parameters, {results['bytes'] / 1e6:.1f} MB a checkpoint"
    return f"{head}\n\n" + table(["", "what", "median ms", "times the plain way (spread)"], rows)


def trained(args: argparse.Namespace, out_dir: Path) -> Trainer:
    """Return a trainer that has done three steps, so that its optimizer has moments."""
    settings = settings_of(args.preset, [*(TINY if args.quick else ()), *args.changes])
    text = load_corpus("python-docs" if args.quick else args.data)
    tokenizer = CharTokenizer.from_text(text)
    model = GPT.from_config({**settings.model, "vocab_size": tokenizer.vocab_size})
    train, _ = BlockDataset.from_text(text, tokenizer, model.block_size).split()
    never = {"eval_interval": 10**9, "save_interval": 10**9, "log_interval": 10**9, "max_steps": 10**9}
    config = TrainerConfig.from_dict({**settings.training, **never})
    trainer = Trainer(model, train, config, tokenizer=tokenizer, out_dir=out_dir, device=args.device)
    steps = trainer.steps()
    for _ in range(3):
        next(steps)
    del steps
    return trainer


if __name__ == "__main__":
    main()
