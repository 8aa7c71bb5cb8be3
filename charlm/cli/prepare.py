"""`charlm prepare`: a text of any length as files of ids on disk, for `charlm train DATA`."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from charlm.cli.output import Console, as_word, check_output, emit, refuse
from charlm.cli.preparing import Bar
from charlm.cli.reading import wrong_val_fraction
from charlm.cli.signals import Interrupted, Signals
from charlm.data.prepare import prepare_corpus
from charlm.terminal import escaped

__all__ = ["run"]


def run(args: argparse.Namespace, console: Console, signals: Signals, began: float) -> int:
    """Prepare the text, describe the result, and write the name of the folder to standard output."""
    refuse(wrong_val_fraction(args.val_fraction))
    out = Path(args.out)
    check_output(out, directory=True)
    try:
        with Bar(console) as bar:
            index = prepare_corpus(
                args.files,
                out,
                tokenizer=args.tokenizer,
                encoding=args.encoding,
                val_fraction=args.val_fraction,
                on_progress=bar.tell,
            )
    except (Interrupted, KeyboardInterrupt):
        console.say("stopped; the same command goes on")
        raise
    unit = "byte" if args.tokenizer == "byte" else "character"
    n_chars = index.n_ids if index.n_chars is None else index.n_chars
    documents = f"{index.n_documents:,} document{'s' * (index.n_documents > 1)}"
    console.say(
        f"text    {n_chars:,} characters in {documents}, vocabulary {index.vocab_size:,}; "
        f"{index.train_ids:,} {unit}s to train on, {index.n_ids - index.train_ids:,} for validation"
    )
    seconds = time.perf_counter() - began
    size, files = index.n_ids * index.id_bytes, f"{len(index.shards):,} file{'s' * (len(index.shards) > 1)}"
    console.say(
        f"data    {escaped(args.out)}: {size / 1e6:,.1f} MB in {files}, in {seconds:.1f} s "
        f"({(index.n_bytes or size) / 1e6 / seconds:.0f} MB/s)"
    )
    console.say(f"next    charlm train {as_word(args.out)} -o runs/one")
    emit(f"{args.out}\n")
    return 0
