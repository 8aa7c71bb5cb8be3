"""Random batches a second, 64 blocks of 256 characters, beside the lecture's way and nanoGPT's.

A batch is inputs and targets, (B, T) int64 each, on the CPU. The lecture stacks slices of a tensor of
int64; nanoGPT maps its file of uint16 anew for each batch, and copies, widens and stacks its rows. "On disk"
is a prepared corpus, whose files the system keeps in memory here.

    cd tests
    python -m benchmarks.batches --json batches.json
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from benchmarks import lecture, nanogpt
from benchmarks.common import Json, in_turns, machine, new_parser, report, spread, table

from charlm import BlockDataset, CharTokenizer, load_corpus
from charlm.data.prepare import prepare_corpus

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> None:
    """Time the four ways in turns and report."""
    parser = new_parser(__doc__)
    parser.add_argument("--batch-size", type=int, default=64, help="blocks (default: %(default)s)")
    parser.add_argument("--block-size", type=int, default=256, help="characters (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="default: %(default)s")
    parser.add_argument("--batches", type=int, default=300, help="of a turn (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.quick:
        args.rounds, args.batches = 2, 3
    measured_on = machine()
    text = load_corpus(args.data)
    tokenizer = CharTokenizer.from_text(text)
    data = BlockDataset.from_text(text, tokenizer, args.block_size)
    wide = data.ids.long()
    B, T = args.batch_size, args.block_size
    generator = torch.Generator().manual_seed(1337)

    with TemporaryDirectory() as folder:
        Path(folder, "text").write_text(text, encoding="utf-8", newline="")
        prepare_corpus(Path(folder, "text"), Path(folder, "data"))
        stored = BlockDataset.open(Path(folder, "data"), T)
        path = Path(folder, "train.bin")
        tokenizer.encode_array(text).astype("uint16").tofile(path)
        ways: dict[str, Callable[[], object]] = {
            "charlm": lambda: data.sample_batch(B, generator=generator),
            "charlm, on disk": lambda: stored.sample_batch(B, generator=generator),
            "lecture": lambda: lecture.random_blocks(wide, T, B),
            "nanogpt": lambda: nanogpt.random_blocks(path, T, B),
        }

        def turn_of(way: Callable[[], object]) -> Callable[[], None]:
            def turn() -> None:
                for _ in range(args.batches):
                    way()

            return turn

        seconds = in_turns({name: turn_of(way) for name, way in ways.items()}, args.rounds)
    results: Json = {
        name: {"batches_per_second": spread([args.batches / s for s in times])}
        for name, times in seconds.items()
    }
    rows = []
    for name, values in results.items():
        rate = values["batches_per_second"]
        rows.append([name, f"{rate['median']:,.0f}", f"{rate['least']:,.0f} to {rate['most']:,.0f}"])
    report(
        "batches",
        args,
        measured_on=measured_on,
        settings={"batch_size": B, "block_size": T},
        results=results,
        text=table(["", "batches/s", "range"], rows),
    )


if __name__ == "__main__":
    main()
