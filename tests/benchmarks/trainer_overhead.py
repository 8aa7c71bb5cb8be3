"""What the Trainer costs beside a bare loop over the same model, optimizer and batches, in per cent.

The Trainer runs as in use: into a directory, records every log_interval steps, a callback that moves a
progress bar and reads the loss now and then. The bare loop draws a batch, runs forward and backward,
sets the learning rate, clips where the recipe does, and steps; no more. `fit` is a loop without a body over
`steps`, so both are taken in turns of a few steps, and the overhead is the median over pairs of turns.
A second bare loop takes part, too: what it seems to cost beside the first one is the error of the figure.
Evaluations and checkpoints are left out: the bare loop has none.

    cd tests
    python -m benchmarks.trainer_overhead --json overhead.json
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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
from typing_extensions import override

from charlm import (
    GPT,
    BlockDataset,
    CharTokenizer,
    DeviceBackend,
    GPTConfig,
    Trainer,
    TrainerConfig,
    get_backend,
    load_corpus,
)
from charlm.training import Callback, StepRecord
from charlm.training.optimizers import build_optimizers
from charlm.training.schedules import learning_rate_at

__all__ = ["main"]


class _Bar(Callback):
    """A progress bar as the command line has it, on a file that nobody reads."""

    def __init__(self, total: int, file: Any) -> None:
        try:
            self._bar: Any = importlib.import_module("tqdm").tqdm(total=total, file=file)
        except ImportError:
            self._bar = None
        self._drawn_at = 0.0

    @override
    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        if self._bar is not None:
            now = time.monotonic()
            if now - self._drawn_at >= 0.25:
                self._drawn_at = now
                self._bar.set_postfix_str(f"loss {record.loss:.4f}", refresh=False)
            self._bar.update(1)


def main(argv: Sequence[str] | None = None) -> None:
    """Run both loops in turns and report."""
    args = _parser().parse_args(argv)
    if args.quick:
        args.changes = [*args.changes, *TINY]
        args.rounds, args.steps = 2, 3
    measured_on = machine()
    settings = settings_of(args.preset, args.changes)
    text = load_corpus(args.data)
    tokenizer = CharTokenizer.from_text(text)
    config = GPTConfig.from_dict({**settings.model, "vocab_size": tokenizer.vocab_size})
    total = 2 * (args.rounds + 1) * args.steps  # twice what is taken, so that no turn is the run's last
    training = TrainerConfig.from_dict({**settings.training, "max_steps": total, "eval_interval": total})
    data, _ = BlockDataset.from_text(text, tokenizer, config.block_size).split(0.9)
    backend = get_backend(args.device)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        sink = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
        torch.manual_seed(training.seed)
        trainer = Trainer(
            GPT(config),
            data,
            training,
            tokenizer=tokenizer,
            out_dir=Path(folder, "run"),
            device=backend,
            callbacks=[_Bar(total, sink)],
        )
        steps = trainer.steps()
        stack.enter_context(contextlib.closing(steps))
        bare, again = (_bare(config, training, data, backend) for _ in range(2))

        def trainer_turn() -> None:
            list(itertools.islice(steps, args.steps))
            backend.synchronize()

        def turn_of(loop: Callable[[int], None]) -> Callable[[], None]:
            def turn() -> None:
                loop(args.steps)
                backend.synchronize()

            return turn

        turns = {"bare loop": turn_of(bare), "trainer": trainer_turn, "bare loop again": turn_of(again)}
        seconds = in_turns(turns, args.rounds)
    pairs = list(zip(seconds["trainer"], seconds["bare loop"], strict=True))
    controls = zip(seconds["bare loop again"], seconds["bare loop"], strict=True)
    results: Json = {
        "step_milliseconds": {
            name: spread([1_000 * s / args.steps for s in times]) for name, times in seconds.items()
        },
        "overhead_percent": spread([100 * (with_it / without - 1) for with_it, without in pairs]),
        "error_percent": spread([100 * (again / first - 1) for again, first in controls]),
        # Other processes only ever add time, so the least times are the cleanest on a noisy machine.
        "overhead_percent_of_least": 100 * (min(seconds["trainer"]) / min(seconds["bare loop"]) - 1),
        "overhead_milliseconds_a_step": spread([1_000 * (a - b) / args.steps for a, b in pairs]),
    }
    report(
        "trainer_overhead",
        args,
        measured_on=measured_on,
        settings={"model": config.to_dict(), "training": training.to_dict()},
        results=results,
        text=_text(results),
    )


def _parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    add_settings(parser)
    parser.set_defaults(device="cpu")
    parser.add_argument("--rounds", type=int, default=100, help="pairs of turns (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2, help="of a turn (default: %(default)s)")
    return parser


def _bare(
    config: GPTConfig, training: TrainerConfig, data: BlockDataset, backend: DeviceBackend
) -> Callable[[int], None]:
    torch.manual_seed(training.seed)
    model = backend.prepare(GPT(config))
    model.train()
    optimizers = build_optimizers(model, training, backend)
    precision = backend.precision(training.precision)
    generator = torch.Generator().manual_seed(training.seed)
    done = 0

    def steps(count: int) -> None:
        nonlocal done
        for _ in range(count):
            x, y = backend.to_device(*data.sample_batch(training.batch_size, generator=generator))
            with backend.autocast(precision):
                _, loss = model(x, y)
            loss.backward()
            if training.grad_clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), training.grad_clip)
            learning_rate = learning_rate_at(done, training)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            done += 1

    return steps


def _text(results: Json) -> str:
    rows = [
        [name, f"{ms['median']:.3f}", f"{ms['least']:.3f} to {ms['most']:.3f}"]
        for name, ms in results["step_milliseconds"].items()
    ]
    percent, ms = results["overhead_percent"], results["overhead_milliseconds_a_step"]
    return (
        f"{table(['', 'ms a step', 'range'], rows)}\noverhead {percent['median']:.2f} % "
        f"({percent['least']:.2f} to {percent['most']:.2f}), {ms['median']:.3f} ms a step; "
        f"{results['overhead_percent_of_least']:.2f} % of the least times; "
        f"a second bare loop: {results['error_percent']['median']:.2f} %"
    )


if __name__ == "__main__":
    main()
