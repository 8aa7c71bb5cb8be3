"""Seconds from the start of a process until the whole validation text has at most a given loss.

Each trial is a new process: import, text, training of a fixed number of steps (where the schedule of the
learning rate ends), and one evaluation over the whole validation text. Its time is that of the whole process,
and counts where the loss is at most --target. With --nanogpt, nanoGPT's README recipe for a CPU runs in
the same alternation, and the ratio of the times is given: nanoGPT's whole process over ours, counting where
our loss is at most nanoGPT's, by the same sweep over every target in windows of the model's block size.

    cd tests
    python -m benchmarks.time_to_loss --steps 300
    python -m benchmarks.time_to_loss --steps 300 --nanogpt ../../nanoGPT --json time_to_loss.json
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks import nanogpt, train_once
from benchmarks.common import (
    TINY,
    Json,
    add_seeds,
    add_settings,
    announce,
    machine,
    new_parser,
    report,
    settings_of,
    spread,
    table,
)

from charlm import load_corpus

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the trials and report them."""
    args = _parser().parse_args(argv)
    if args.quick:
        args.changes = [*args.changes, *TINY]
        args.steps, args.seeds = 10, args.seeds[:1]
    measured_on = machine()
    settings = settings_of(args.preset, args.changes)
    steps = settings.training["max_steps"] if args.steps is None else args.steps
    ours: list[Json] = []
    theirs: list[Json] = []
    with contextlib.ExitStack() as stack:
        copy = None
        if args.nanogpt is not None:
            copy = stack.enter_context(nanogpt.prepared(args.nanogpt, load_corpus(args.data)))
        for seed in args.seeds:
            if copy is not None:
                theirs.append(nanogpt.train_and_evaluate(copy, quick=args.quick))
                announce(
                    f"nanoGPT: {theirs[-1]['loss_nats']:.4f} nats in {theirs[-1]['process_seconds']:.2f} s"
                )
            spec = train_once.Spec(
                data=args.data,
                model=settings.model,
                training=settings.training,
                budget=("steps", steps),
                evaluations=1,
                seed=seed,
                device=args.device,
                keep=None if args.keep is None else str(args.keep / str(seed)),
            )
            ours.append(train_once.run(spec))
            loss = ours[-1]["final"]["loss_nats"]
            announce(f"charlm, seed {seed}: {loss:.4f} nats in {ours[-1]['process_seconds']:.2f} s")
    results = _results(ours, theirs, args.target)
    if args.nanogpt is not None:
        results["nanogpt"]["version"] = nanogpt.version_of(args.nanogpt)
    report(
        "time_to_loss",
        args,
        measured_on=measured_on,
        settings={"model": settings.model, "training": settings.training, "steps": steps},
        results=results,
        text=_text(results),
    )


def _parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    add_settings(parser)
    add_seeds(parser)
    parser.add_argument("--steps", type=int, help="steps of a trial (default: those of the recipe)")
    parser.add_argument("--target", type=float, default=1.88, help="loss in nats (default: %(default)s)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep each run, in DIR/SEED, for verify")
    parser.add_argument("--nanogpt", type=Path, metavar="DIR", help="a checkout of nanoGPT to run beside")
    return parser


def _results(ours: list[Json], theirs: list[Json], target: float) -> Json:
    losses = [trial["final"]["loss_nats"] for trial in ours]
    results: Json = {
        "target": target,
        "charlm": {
            "process_seconds": spread([trial["process_seconds"] for trial in ours]),
            "loss_nats": spread(losses),
            "reaches_target": max(losses) <= target,
            "trials": ours,
        },
    }
    if theirs:
        lowest = min(trial["loss_nats"] for trial in theirs)
        pairs = zip(ours, theirs, strict=True)
        ratios = [their["process_seconds"] / our["process_seconds"] for our, their in pairs]
        results["nanogpt"] = {
            "process_seconds": spread([trial["process_seconds"] for trial in theirs]),
            "loss_nats": spread([trial["loss_nats"] for trial in theirs]),
            "trials": theirs,
        }
        results["times_faster"] = {
            "of_medians": statistics.median(t["process_seconds"] for t in theirs)
            / statistics.median(t["process_seconds"] for t in ours),
            "of_pairs": spread(ratios),
            "counts": max(losses) <= lowest,
        }
    return results


def _text(results: Json) -> str:
    rows = []
    for name in ("nanogpt", "charlm"):
        for trial in results.get(name, {}).get("trials", ()):
            loss = trial["loss_nats"] if name == "nanogpt" else trial["final"]["loss_nats"]
            estimate = trial.get("random_batches", {}).get("loss_nats")
            rows.append(
                [
                    name,
                    trial.get("seed", "its own"),
                    trial["steps"],
                    f"{trial['parameters']:,}",
                    f"{loss:.4f}",
                    "" if estimate is None else f"{estimate:.4f}",
                    f"{trial['process_seconds']:.2f}",
                ]
            )
    head = ["", "seed", "steps", "parameters", "val nats (all of it)", "(random batches)", "process s"]
    ours = results["charlm"]
    reached = "reached by every trial" if ours["reaches_target"] else "NOT reached by every trial"
    lines = [
        table(head, rows),
        f"target {results['target']}: {reached}; median {ours['process_seconds']['median']:.2f} s",
    ]
    if "times_faster" in results:
        faster = results["times_faster"]
        counts = "" if faster["counts"] else "; does NOT count, a loss is above nanoGPT's"
        lines.append(f"nanoGPT's time / charlm's: {faster['of_medians']:.2f} (of medians){counts}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
