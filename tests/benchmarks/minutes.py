"""Whether `charlm train FILE --minutes M` takes M minutes, and what comes of them.

`texts`: on each text of a folder (see `benchmarks.texts`), with one thread and more: the time of the whole
process, how soon its first line stands there, its peak memory, and the losses of the GPT, of the n-gram model
and of the result over the same characters; and beside the result in bits what xz and zstd need for each
character of the last tenth of the text, if they have seen the rest.

`seeds`: a text with three seeds, each run evaluated once, at its end: what a row of "time to a loss" needs.

`loads`: trainings on a machine that gets busy, or idle, in the middle. Each is repeated from its record,
which must give the same weights, and is compared with a run that is asked for the same number of steps from
the start. The loads are other processes that do nothing but take a core.

`threads`: how long a step takes alone, beside busy loops and beside a second training.

    cd tests
    python -m benchmarks.minutes texts FOLDER --minutes 1 --threads 1 2 --json texts.json
    python -m benchmarks.minutes seeds tinyshakespeare --keep ../runs --json seeds.json
    python -m benchmarks.minutes loads tinyshakespeare --trainings 24 --json loads.json
    python -m benchmarks.minutes threads tinyshakespeare --json threads.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.common import Json, announce, machine, new_parser, report, spread, table

__all__ = ["main"]

_BUSY = "while True: pass"
_MOST_PACKED = 20_000_000  # characters


def main(argv: Sequence[str] | None = None) -> None:
    """Run one of the four and report."""
    parser = new_parser(__doc__, data=False)
    parser.add_argument("what", choices=("texts", "seeds", "loads", "threads"))
    parser.add_argument("source", help="a folder of texts, or one text: a path, or a named corpus")
    parser.add_argument("--minutes", type=float, default=1.0, help="of texts and seeds (default: 1)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="of texts (default: 1 2)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337, 1, 2], help="(default: 1337 1 2)")
    parser.add_argument("--train", default="", metavar="FLAGS", help="of seeds: more flags of charlm train")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="of seeds: keep each run, in DIR/SEED")
    parser.add_argument("--trainings", type=int, default=24, help="of loads (default: 24)")
    parser.add_argument("--seed", type=int, default=1, help="of loads (default: 1)")
    parser.add_argument("--rounds", type=int, default=3, help="of threads (default: 3)")
    args = parser.parse_args(argv)
    if args.quick:
        args.minutes, args.threads, args.trainings, args.rounds = 0.1, args.threads[:1], 1, 1
        args.seeds = args.seeds[:1]
    measured_on = machine()
    results, text = {"texts": _texts, "seeds": _seeds, "loads": _loads, "threads": _threads}[args.what](args)
    report(f"minutes {args.what}", args, measured_on=measured_on, settings={}, results=results, text=text)


def _train(source: str, run: Path, *options: str, threads: int | None = None) -> Json:
    """Train with the command in a process of its own; return what it took and came to."""
    words = [sys.executable, "-m", "charlm", "train", *([source] if source else []), "-o", str(run), *options]
    environment = {**os.environ, **({} if threads is None else {"OMP_NUM_THREADS": str(threads)})}
    began = time.perf_counter()
    process = subprocess.Popen(words, stderr=subprocess.PIPE, env=environment, text=True)
    lines, first = [], None
    for line in process.stderr or ():
        first = first or time.perf_counter() - began
        lines.append(line.rstrip())
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - began
    if process.returncode:
        raise SystemExit(f"error: {words} failed:\n" + "\n".join(lines))
    state, record = _state(run), json.loads((run / "train.json").read_text(encoding="utf-8"))
    return {
        "seconds": seconds,
        "first_line_seconds": first,
        "peak_memory_bytes": usage.ru_maxrss * 1024,
        "steps": state["step"],
        "loss_nats": state["best"]["loss_nats"],
        "final_loss_nats": state["last"]["loss_nats"],
        "n_chars": state["best"]["n_chars"],
        "best_step": state["best"]["step"],
        "evaluations": state.get("timetable", {}).get("evaluations"),
        "ends": state.get("timetable", {}).get("ends"),
        **{name: record.get(name) for name in ("baseline", "preset", "result")},
        "lines": lines,
    }


def _state(run: Path) -> Json:
    newest = max((run / "checkpoints").glob("step-*"), key=lambda path: path.name)
    state: Json = json.loads((newest / "state.json").read_text(encoding="utf-8"))
    return {"step": int(newest.name.split("-")[1]), **state}


def _texts(args: argparse.Namespace) -> tuple[Json, str]:
    rows, found = [], []
    for path in sorted(Path(args.source).glob("*.txt"), key=lambda path: path.stat().st_size):
        packed = [_packed(path, *words) for words in (("xz", "-9e"), ("zstd", "--ultra", "-22", "--long=27"))]
        for threads in args.threads:
            announce(f"{path.stem}, {threads} threads")
            with tempfile.TemporaryDirectory() as folder:
                run = _train(str(path), Path(folder, "run"), "--minutes", str(args.minutes), threads=threads)
            found.append({"text": path.stem, "bytes": path.stat().st_size, "threads": threads, **run})
            losses = run["result"]["loss_nats"] if run["result"] else {"gpt": run["loss_nats"]}
            ngram = losses.get("ngram", run["baseline"]["loss_nats"])
            kind = run["result"]["kind"] if run["result"] else "gpt"
            loss = losses[kind]
            rows.append(
                (
                    path.stem,
                    f"{path.stat().st_size / 1e6:.2f}",
                    threads,
                    f"{run['seconds']:.1f}",
                    f"{100 * (run['seconds'] / 60 / args.minutes - 1):+.1f} %",
                    f"{run['steps']:,}",
                    f"{run['loss_nats']:.4f}",
                    f"{ngram:.4f}",
                    f"{loss:.4f}, {kind}",
                    f"{ngram - loss:+.4f}",
                    f"{loss / math.log(2):.3f}",
                    *packed,
                    f"{run['n_chars']:,}",
                    f"{run['first_line_seconds']:.1f}",
                    f"{run['peak_memory_bytes'] / 1e6:,.0f}",
                )
            )
    head = [
        "text",
        "MB",
        "threads",
        "seconds",
        "off by",
        "steps",
        "GPT",
        "n-gram",
        "result",
        "ahead",
        "bits",
        "xz",
        "zstd",
        "scored",
        "first line, s",
        "peak, MB",
    ]
    return {"runs": found}, table(head, rows)


def _seeds(args: argparse.Namespace) -> tuple[Json, str]:
    flags = ["--minutes", str(args.minutes), "--eval-interval", "999999", *shlex.split(args.train)]
    rows, found = [], []
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            kept = Path(folder) if args.keep is None else args.keep
            run = _train(args.source, kept / str(seed), "--seed", str(seed), *flags)
            result = run["result"] or {"kind": "gpt", "loss_nats": {"gpt": run["loss_nats"]}}
            found.append({"seed": seed, **run})
            losses = [f"{loss:.4f}" for loss in result["loss_nats"].values()]
            own = f"{run['loss_nats']:.4f}"
            rows.append((seed, f"{run['seconds']:.1f}", f"{run['steps']:,}", own, *losses, result["kind"]))
            announce(" | ".join(map(str, rows[-1])))
    head = ["seed", "seconds", "steps", "GPT in its window", "GPT", "n-gram", "mixture", "result"]
    return {"runs": found}, table([*head[: len(rows[0]) - 1], "result"], rows)


def _packed(path: Path, *packer: str) -> str:
    """Return the bits for each character of the last tenth, behind the rest of the text; "-": not known."""
    text = path.read_text(encoding="utf-8")
    if shutil.which(packer[0]) is None or len(text) > _MOST_PACKED:
        return "-"
    cut = int(0.9 * len(text))
    sizes = [
        len(subprocess.run([*packer, "-c"], input=part.encode(), stdout=subprocess.PIPE, check=True).stdout)
        for part in (text, text[:cut])
    ]
    return f"{8 * (sizes[0] - sizes[1]) / (len(text) - cut):.3f}"


def _loads(args: argparse.Namespace) -> tuple[Json, str]:
    draw = random.Random(args.seed)
    rows, found = [], []
    for number in range(args.trainings):
        seconds = draw.uniform(20, 25) if not args.quick else 6.0
        kind, busy = draw.choice(["comes", "goes", "stays", "passes"]), draw.randint(1, 3)
        announce(f"{number + 1}: {busy} busy processes, load {kind}, {seconds:.1f} s")
        options = ("--seed", str(number))
        with tempfile.TemporaryDirectory() as folder:
            one, two, three = (Path(folder, name) for name in ("one", "two", "three"))
            with _load(kind, busy, seconds, draw.uniform(0.2, 0.8)):
                run = _train(args.source, one, *options, "--minutes", f"{seconds / 60:.5f}")
            again = _train("", two, "--repeat", str(one))
            same = _weights(one) == _weights(two) and run["best_step"] == again["best_step"]
            exact = ("--eval-interval", "999999", "--preset", run["preset"])
            direct = _train(args.source, three, *options, *exact, "--max-steps", str(run["steps"]))
            whole = [_whole(folder, path, args.source) for path in (one, three)]
        off, behind = run["seconds"] / seconds - 1, whole[0] - whole[1]
        found.append(
            {
                "asked_seconds": seconds,
                "load": kind,
                "busy": busy,
                "bit_equal": same,
                "off": off,
                "behind_nats": behind,
                "run": run,
                "direct": direct,
            }
        )
        rows.append(
            (
                number + 1,
                f"{busy} {kind}",
                f"{seconds:.1f}",
                f"{run['seconds']:.1f}",
                f"{100 * off:+.1f} %",
                run["steps"],
                " ".join(f"{at}:{end}" for at, end in run["ends"]),
                "yes" if same else "NO",
                f"{whole[0]:.4f}",
                f"{behind:+.4f}",
            )
        )
        announce(" | ".join(map(str, rows[-1])))
    head = [
        "training",
        "load",
        "asked, s",
        "took, s",
        "off by",
        "steps",
        "ends",
        "repeated",
        "loss",
        "behind direct",
    ]
    behind_all = [one["behind_nats"] for one in found]
    summary = {
        "off": spread([one["off"] for one in found]),
        "behind_nats": {"mean": statistics.fmean(behind_all), **spread(behind_all)},
        "bit_equal": sum(one["bit_equal"] for one in found),
    }
    off, mean = summary["off"], summary["behind_nats"]["mean"]
    text = (
        f"{table(head, rows)}\n\ntime off by {100 * off['least']:+.1f} to {100 * off['most']:+.1f} %; loss "
        f"behind direct runs {mean:+.4f} on average ({min(behind_all):+.4f} to {max(behind_all):+.4f}); "
        f"{summary['bit_equal']} of {len(found)} repetitions equal"
    )
    return {"summary": summary, "trainings": found}, text


def _weights(run: Path) -> Mapping[str, str]:
    """Return a digest of the weights of each checkpoint, by its step."""
    return {
        path.parent.name.split("-")[1]: hashlib.sha256(_tensors(path.read_bytes())).hexdigest()
        for path in (run / "checkpoints").glob("step-*/model.safetensors")
    }


def _tensors(file: bytes) -> bytes:
    """Return a safetensors file without its header, which names the run."""
    return file[8 + int.from_bytes(file[:8], "little") :]


def _whole(folder: str, run: Path, source: str) -> float:
    """Return the exact loss of a run's best checkpoint over its validation text."""
    from charlm import load_corpus

    text = load_corpus(source)
    val = Path(folder, "val.txt")
    val.write_text(text[int(0.9 * len(text)) :], encoding="utf-8", newline="")
    words = [sys.executable, "-m", "charlm", "eval", str(run), str(val), "--json"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    loss: float = json.loads(done.stdout)["loss_nats"]
    return loss


@contextmanager
def _load(kind: str, busy: int, seconds: float, share: float) -> Iterator[None]:
    """Keep so many processes busy inside the block: from a share of the time on, up to it, or always."""
    ends = {
        "stays": (0.0, seconds),
        "comes": (share * seconds, seconds),
        "goes": (0.0, share * seconds),
        "passes": (share * seconds / 2, share * seconds),
    }
    start, stop = ends[kind]
    over = threading.Event()

    def keep() -> None:
        if over.wait(start):
            return
        processes = [subprocess.Popen([sys.executable, "-c", _BUSY]) for _ in range(busy)]
        over.wait(stop - start + 5 * (kind in {"stays", "comes"}))
        for process in processes:
            process.kill()
            process.wait()

    keeper = threading.Thread(target=keep)
    keeper.start()
    try:
        yield
    finally:
        over.set()
        keeper.join()


def _threads(args: argparse.Namespace) -> tuple[Json, str]:
    settings = {
        "as charlm does": {},
        "GNU's default": {"GOMP_SPINCOUNT": "300000"},
        "passive": {"OMP_WAIT_POLICY": "passive"},
        "one thread": {"OMP_NUM_THREADS": "1"},
    }
    steps: dict[str, dict[str, list[float]]] = {name: {} for name in settings}
    for _ in range(args.rounds):
        for name, environment in settings.items():
            for beside in ("alone", "2 busy", "a second"):
                busy = 2 if beside == "2 busy" else 0
                with tempfile.TemporaryDirectory() as folder, _load("stays", busy, 99.0, 1.0):
                    runs = [Path(folder, str(n)) for n in range(2 if beside == "a second" else 1)]
                    processes = [_begin(args.source, run, environment) for run in runs]
                    for process in processes:
                        process.wait()
                    steps[name].setdefault(beside, []).extend(_state(run)["step"] for run in runs)
                announce(f"{name}, {beside}: {steps[name][beside]}")
    alone = statistics.median(steps["GNU's default"]["alone"])
    rows = [
        (
            name,
            *(
                f"{statistics.median(v):.0f} ({min(v)} to {max(v)}), {alone / statistics.median(v):.2f}"
                for v in found.values()
            ),
        )
        for name, found in steps.items()
    ]
    head = (
        "steps in the time; times slower than GNU's default alone",
        "alone",
        "beside 2 busy loops",
        "two at once",
    )
    return {"steps": steps}, table(head, rows)


def _begin(source: str, run: Path, environment: Mapping[str, str]) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "charlm", "train", source, "-o", str(run), "--preset", "cpu-1min", "-q"]
    words += ["--no-baseline", "--val-fraction", "0", "--schedule", "constant", "--minutes", "0.2"]
    return subprocess.Popen(words, env={**os.environ, **environment}, text=True)


if __name__ == "__main__":
    main()
