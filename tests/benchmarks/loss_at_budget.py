"""The loss that a recipe ends with, given characters, steps or minutes, for several seeds.

Each run is a new process. The loss is that of the whole validation text, every target once, in windows of the
model's block size: at the end, and at the best of the evaluations. Seconds count from the start of the
process, evaluations included. With --random-batches nanoGPT's figure stands beside it: the mean over 200
random batches, which has a standard error and is not comparable with the other.

    cd tests
    python -m benchmarks.loss_at_budget --chars 1.54e6 --set block_size=64
    python -m benchmarks.loss_at_budget --minutes 1 --json one_minute.json
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Literal

from benchmarks import train_once
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

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> None:
    """Run each seed and report."""
    args = _parser().parse_args(argv)
    if args.quick:
        args.changes = [*args.changes, *TINY]
        args.chars, args.steps, args.minutes, args.seeds = 1_000.0, None, None, args.seeds[:1]
    measured_on = machine()
    settings = settings_of(args.preset, args.changes)
    budget = _budget(args, settings.training["max_steps"])
    runs: list[Json] = []
    for seed in args.seeds:
        spec = train_once.Spec(
            data=args.data,
            model=settings.model,
            training=settings.training,
            budget=budget,
            evaluations=0 if "eval_interval" in settings.given else args.evaluations,
            seed=seed,
            device=args.device,
            random_batches=args.random_batches,
        )
        run = train_once.run(spec)
        below = (e["seconds"] for e in run["history"] if args.target and e["loss_nats"] <= args.target)
        run["seconds_to_target"] = next(below, None)
        announce(f"seed {seed}: {run['final']['loss_nats']:.4f} nats after {run['seconds']:.1f} s")
        runs.append(run)
    results = {
        "budget": dict([budget]),
        "final_loss_nats": spread([run["final"]["loss_nats"] for run in runs]),
        "best_loss_nats": spread([run["best"]["loss_nats"] for run in runs]),
        "seconds": spread([run["seconds"] for run in runs]),
        "runs": runs,
    }
    report(
        "loss_at_budget",
        args,
        measured_on=measured_on,
        settings={"model": settings.model, "training": settings.training},
        results=results,
        text=_text(runs, args.target),
    )


def _parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    add_settings(parser)
    add_seeds(parser)
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--chars", type=float, help="the most characters that are predicted in training")
    amount.add_argument("--steps", type=int, help="steps (default: those of the recipe)")
    amount.add_argument("--minutes", type=float, help="of the whole process, as charlm train --minutes")
    parser.add_argument(
        "--evaluations", type=int, default=5, help="evenly spaced, the last at the end (default: %(default)s)"
    )
    parser.add_argument(
        "--target", type=float, help="a loss: also report when an evaluation first reached it"
    )
    parser.add_argument("--random-batches", action="store_true", help="nanoGPT's figure beside it")
    return parser


def _budget(args: argparse.Namespace, steps: int) -> tuple[Literal["steps", "chars", "seconds"], float]:
    if args.chars is not None:
        return "chars", args.chars
    if args.minutes is not None:
        return "seconds", 60 * args.minutes
    return "steps", steps if args.steps is None else args.steps


def _text(runs: list[Json], target: float | None) -> str:
    head = [
        "seed",
        "steps",
        "characters",
        "parameters",
        "final nats",
        "best nats",
        "at step",
        "s",
        "peak MiB",
    ]
    head += [f"s to {target:g}"] if target else []
    head += ["(random batches)"] if "random_batches" in runs[0] else []
    rows = []
    for run in runs:
        row = [
            run["seed"],
            run["steps"],
            f"{run['chars_seen']:,}",
            f"{run['parameters']:,}",
            f"{run['final']['loss_nats']:.4f}",
            f"{run['best']['loss_nats']:.4f}",
            run["best"]["step"],
            f"{run['seconds']:.1f}",
            round(run["peak_memory_bytes"] / 2**20),
        ]
        if target:
            reached = run["seconds_to_target"]
            row.append("never" if reached is None else f"{reached:.1f}")
        if "random_batches" in run:
            estimate = run["random_batches"]
            row.append(f"{estimate['loss_nats']:.4f} ± {estimate['standard_error']:.4f}")
        rows.append(row)
    return table(head, rows)


if __name__ == "__main__":
    main()
