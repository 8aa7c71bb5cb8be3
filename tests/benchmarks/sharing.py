"""What processes lose that work at once on the same cores: generations, trainings, loops that only compute.

Each process takes as many threads as torch gives it, as a user's would. First one of a kind works alone, then
n at once; of each the speed alone is divided by n times its speed then. So 1 is a fair share of what one
makes alone; more is time lost to waiting for threads that have no core.

    cd tests
    python -m benchmarks.sharing --json sharing.json
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from benchmarks.common import Json, announce, environment, machine, new_parser, report, spread, table

__all__ = ["main"]

_MIXES = (
    ("generate", "generate"),
    ("stream", "stream"),
    ("generate",) * 4,
    ("generate", "busy"),
    ("generate", "busy", "busy"),
    ("generate", "train"),
    ("train", "train"),
    ("train", "busy", "busy"),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run each mix and report; with `--child`, be one of its processes."""
    parser = new_parser(__doc__, data=False)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each mix (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--only", metavar="KIND+KIND,...", help="mixes, such as generate+busy,train+train")
    parser.add_argument("--child", choices=tuple(_KINDS), help="for this program itself")
    args = parser.parse_args(argv)
    if args.child:
        _work(_KINDS[args.child], args.seconds)
        return
    if args.quick:
        args.seconds, args.rounds = 0.2, 1
    mixes = _MIXES if args.only is None else [tuple(mix.split("+")) for mix in args.only.split(",")]
    kinds = [(kind,) for kind in dict.fromkeys(kind for mix in mixes for kind in mix if kind != "busy")]
    measured_on = machine()
    speeds: dict[tuple[str, ...], list[list[float]]] = {mix: [] for mix in (*kinds, *mixes)}
    for _ in range(args.rounds):
        for mix, rounds in speeds.items():
            announce(" beside ".join(mix))
            rounds.append(_at_once(mix, args.seconds))
    results: Json = {}
    for mix in mixes:
        shares = [
            speeds[kind,][turn][0] / (len(mix) * speed)
            for turn, rates in enumerate(speeds[mix])
            for kind, speed in zip(mix, rates, strict=True)
            if kind != "busy"
        ]
        results[" + ".join(mix)] = {"times_a_fair_share": spread(shares)}
    alone = {kind: spread([rates[0] for rates in speeds[kind,]]) for (kind,) in kinds}
    rows = [
        [mix, *(f"{found['times_a_fair_share'][which]:.2f}" for which in ("median", "least", "most"))]
        for mix, found in results.items()
    ]
    text = table(["at once", "times a fair share, median", "least", "most"], rows)
    text += "\n\n" + table(
        ["alone", "a second"], [[kind, f"{found['median']:,.1f}"] for kind, found in alone.items()]
    )
    report("sharing", args, measured_on=measured_on, settings={}, results=results | alone, text=text)


def _at_once(mix: Sequence[str], seconds: float) -> list[float]:
    """Return what each process of a mix makes in a second, while all of them work."""
    command = [sys.executable, "-m", "benchmarks.sharing", "--seconds", str(seconds), "--child"]
    processes = [
        subprocess.Popen(
            [*command, kind], env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for kind in mix
    ]
    try:
        for process in processes:  # each is ready, and waits
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise SystemExit(f"error: {' '.join(command)} failed")
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        return [float(json.loads(process.communicate()[0])) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _work(kind: Callable[[], Iterator[int]], seconds: float) -> None:
    """Begin, say so, wait for the word, work for so long, and print what was made in a second."""
    steps = kind()
    next(steps)
    print("ready", flush=True)
    sys.stdin.readline()
    began, made = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        made += next(steps)
    print(json.dumps(made / (time.perf_counter() - began)))


def _generate() -> Iterator[int]:
    """Make windows of characters, 0.8 million parameters."""
    import torch
    from benchmarks.peers import SIZES, build

    model, idx = build(SIZES["0.8M"]), torch.zeros(1, 1, dtype=torch.int64)
    while True:
        yield model.generate(idx, 255, seed=1).numel()


def _stream() -> Iterator[int]:
    """Make one character after the other."""
    import torch
    from benchmarks.peers import SIZES, build

    model, idx = build(SIZES["0.8M"]), torch.zeros(1, 1, dtype=torch.int64)
    for ids in model.stream(idx, 10**9, seed=1, overflow="restart"):
        yield len(ids)


def _train() -> Iterator[int]:
    """Train as the command does."""
    from charlm.cli.threads import sharing_cores

    with sharing_cores():  # before torch is imported
        from charlm import GPT, BlockDataset, CharTokenizer, Trainer, load_corpus
        from charlm.training import RECIPES

        text = load_corpus("python-docs")
        tokenizer = CharTokenizer.from_text(text)
        model = GPT.from_config("cpu-1min", vocab_size=tokenizer.vocab_size)
        data = BlockDataset.from_text(text, tokenizer, model.block_size)
        for _ in Trainer(model, data, RECIPES["cpu-1min"]).steps():
            yield 1


def _busy() -> Iterator[int]:
    """Compute, on one core."""
    while True:
        yield sum(range(1000))


_KINDS: dict[str, Callable[[], Iterator[int]]] = {
    "generate": _generate,
    "stream": _stream,
    "train": _train,
    "busy": _busy,
}


if __name__ == "__main__":
    main()
