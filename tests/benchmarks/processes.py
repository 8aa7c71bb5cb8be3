"""What several processes gain: one of two threads beside two of one, the exact sum beside the fast one.

All train the same recipe, a step of 8 micro-batches: in one process that takes every core, in W processes
with one thread each, and in one process with one thread, all of the step and a Wth of its micro-batches.
The fast sum's drift is how far its losses are from the exact ones after the same steps. Exchanges themselves
are timed, too, for the model in docs/guides/scale.md.

    cd tests
    python -m benchmarks.processes --json processes.json
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from benchmarks.common import Json, machine, new_parser, report, table

from charlm import GPT, BlockDataset, CharTokenizer, Trainer, get_backend, load_corpus
from charlm.backends.world import join, leave
from charlm.models.config import PRESETS
from charlm.training import RECIPES

__all__ = ["main"]

_WARM_UP = 5


def main(argv: Sequence[str] | None = None) -> None:
    """Time the worlds in turns and report."""
    parser = new_parser(__doc__)
    parser.add_argument("--preset", default="cpu-1min", choices=tuple(PRESETS), help="default: %(default)s")
    parser.add_argument("--processes", type=int, default=2, help="W (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="of each run (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    args = parser.parse_args(argv)
    if args.quick:
        args.steps, args.rounds = 8, 1
    measured_on = machine()
    W, cores = args.processes, os.cpu_count() or 1
    ways = {
        f"1 process, {cores} threads": (1, cores, 8, "exact"),
        "1 process, 1 thread": (1, 1, 8, "exact"),
        f"1 process, 1 thread, 1/{W} of the step": (1, 1, 8 // W, "exact"),
        f"{W} processes, exact": (W, 1, 8, "exact"),
        f"{W} processes, fast": (W, 1, 8, "fast"),
    }
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    with TemporaryDirectory() as folder:
        for _ in range(args.rounds):
            for name, (size, threads, count, reduce) in ways.items():
                found[name].append(
                    _measured(
                        Path(folder, "out.json"),
                        size,
                        threads,
                        (args.data, args.preset, args.steps, count, reduce),
                    )
                )
    exact, fast = found[f"{W} processes, exact"][0], found[f"{W} processes, fast"][0]
    alone = found["1 process, 1 thread"][0]
    results: Json = {
        "step_seconds": {name: [run["step_seconds"] for run in runs] for name, runs in found.items()},
        "exchange_seconds": exact["exchange_seconds"],
        "sum_seconds": exact["sum_seconds"],
        "bytes": exact["bytes"],
        "equal_to_one_process": exact["losses"] == alone["losses"] and exact["weights"] == alone["weights"],
        "drift_of_losses": max(abs(a - b) for a, b in zip(exact["losses"], fast["losses"], strict=True)),
    }
    one = statistics.median(results["step_seconds"]["1 process, 1 thread"])
    rows = [
        [
            name,
            *(f"{1e3 * value:.1f} ms" for value in (statistics.median(times), min(times), max(times))),
            f"{one / statistics.median(times):.2f}",
        ]
        for name, times in results["step_seconds"].items()
    ]
    lines = [
        table(["", "a step", "least", "most", "times one thread"], rows),
        f"The exact sum of {W} processes equals one process: {results['equal_to_one_process']}. The fast "
        f"one's losses are within {results['drift_of_losses']:.2g} nats after {args.steps + _WARM_UP} steps.",
        f"An exchange of numbers takes {1e6 * results['exchange_seconds']:.0f} µs, the exact sum of "
        f"{results['bytes'] / 1e6:.1f} MB {1e3 * results['sum_seconds']:.2f} ms.",
    ]
    report(
        "processes",
        args,
        measured_on=measured_on,
        settings={"preset": args.preset, "processes": W, "steps": args.steps},
        results=results,
        text="\n\n".join(lines),
    )


def _measured(file: Path, size: int, threads: int, given: tuple[object, ...]) -> dict[str, Any]:
    """Run a world, and return what its first process has measured."""
    program = [str(Path(__file__)), str(file), *map(str, given)]
    start = [sys.executable]
    if size > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}
    subprocess.run([*start, *program], env=environment, check=True, stderr=subprocess.DEVNULL)
    values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return values


def _measure(file: Path, corpus: str, preset: str, steps: int, count: int, reduce: str) -> None:
    """Train in this process, which may be one of several, and write what was measured."""
    text = load_corpus(corpus)
    tokenizer = CharTokenizer.from_text(text)
    torch.manual_seed(1337)
    model = GPT.from_config({**PRESETS[preset], "vocab_size": tokenizer.vocab_size})  # type: ignore[index]
    recipe = RECIPES[preset]  # type: ignore[index]
    blocks = recipe.batch_size * recipe.accumulate
    config = recipe.replace(
        batch_size=blocks // 8,
        accumulate=count,
        max_steps=steps + _WARM_UP,
        reduce=reduce,
        eval_interval=None,
    )
    train = BlockDataset.from_text(text, tokenizer, model.block_size)
    trainer = Trainer(model, train, config, device="cpu")
    times, losses = [time.perf_counter()], []
    for record in trainer.steps():
        losses.append(record.loss)
        times.append(time.perf_counter())
    taken = [after - before for before, after in itertools.pairwise(times)][_WARM_UP:]
    world = join(get_backend("cpu"))
    row = torch.zeros(world.size, -(-model.num_parameters() // world.size))
    other = torch.zeros_like(row)

    def add_up() -> None:
        world.trade(row, other)
        world.gather(other[0], row)

    found = {
        "step_seconds": statistics.median(taken),
        "losses": losses,
        "weights": float(sum(parameter.detach().double().sum() for parameter in model.parameters())),
        "exchange_seconds": _each(world.agree, 300),
        "sum_seconds": _each(add_up, 30),
        "bytes": row.nbytes,
    }
    if world.is_first:
        file.write_text(json.dumps(found), encoding="utf-8")
    leave()
    os._exit(0)  # as the command does: gloo makes an end abort now and then


def _each(work: Any, times: int) -> float:
    began = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - began) / times


if __name__ == "__main__":
    if len(sys.argv) == 7 and not sys.argv[1].startswith("-"):
        file, corpus, preset, steps, count, reduce = sys.argv[1:]
        _measure(Path(file), corpus, preset, int(steps), int(count), reduce)
    else:
        main()
