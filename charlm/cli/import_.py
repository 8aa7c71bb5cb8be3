"""`charlm import`: a GPT of another library as a saved model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from charlm.cli.output import Console, UsageError, as_word, check_output, emit
from charlm.cli.signals import Signals
from charlm.errors import CheckpointError, InputError, RunExistsError, quoted
from charlm.interchange import from_transformers
from charlm.interchange.nanogpt import from_either
from charlm.lm import CharLM
from charlm.models.saving import MODEL_FILES
from charlm.text.corpus import load_corpus
from charlm.text.tokenizer import CharTokenizer, Tokenizer

__all__ = ["run"]


def run(args: argparse.Namespace, console: Console, signals: Signals, began: float) -> int:
    """Read, check and save the model, describe it, and write the name of the folder to standard output."""
    out = Path(args.out)
    check_output(out, directory=True)
    if any(Path(path).exists() and out.exists() and out.samefile(path) for path in args.paths):
        raise UsageError("-o DIR must be another directory than PATH")
    names = {entry.name for entry in out.iterdir()} if out.is_dir() else set()
    if foreign := names.difference(MODEL_FILES):
        raise RunExistsError(
            f"{quoted(args.out)} holds files that are no part of a saved model "
            f"({quoted(min(foreign), 80)}), so --overwrite replaces nothing. Choose another directory."
        )
    if names and not args.overwrite:
        raise RunExistsError(
            f"{quoted(args.out)} holds a saved model. Replace it (--overwrite), or choose another directory."
        )
    lm, source = _read(args.paths[0], args.paths[1:], args.n_head)
    lm.save(out)
    console.say(
        f"model   GPT of {lm.model.num_parameters():,} parameters from {source}, vocabulary "
        f"{lm.tokenizer.vocab_size:,}, window {lm.model.block_size:,}"
    )
    console.say(f"next    charlm generate {as_word(args.out)}")
    emit(f"{args.out}\n")
    return 0


def _read(source: str, rest: Sequence[str], n_head: int | None) -> tuple[CharLM, str]:
    """Return the model and the name of its library."""
    path = Path(source)
    if not path.exists():
        raise CheckpointError(f"{quoted(source)} does not exist")
    if path.is_dir():
        inside = [path / name for name in ("ckpt.pt", "model.pt") if (path / name).is_file()]
        if not inside and not (path / "config.json").exists():
            raise CheckpointError(
                f"no model of another library in {quoted(source)}: it has no config.json of transformers, no "
                "ckpt.pt of nanoGPT, no model.pt of minGPT"
            )
        if not inside:
            return from_transformers(path, _vocabulary(rest) if rest else None), "transformers"
        path = inside[0]
    beside = path.with_name("meta.pkl")
    if not rest and beside.is_file():
        rest = [str(beside)]
    if not rest:
        raise InputError(
            f"{quoted(source)} does not say which characters it speaks in; give its vocabulary behind it: "
            "the meta.pkl of its data, or the text that it learnt"
        )
    return from_either(path, _vocabulary(rest), n_head)


def _vocabulary(paths: Sequence[str]) -> str | Path | Tokenizer:
    """Return a meta.pkl, or the tokenizer of texts."""
    path = Path(paths[0])
    meta = path / "meta.pkl" if path.is_dir() else path
    if len(paths) == 1 and (path.is_dir() or path.suffix == ".pkl"):
        return meta
    return CharTokenizer.from_text(load_corpus(paths))
