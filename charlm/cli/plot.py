"""`charlm plot`: a picture of a training, or of its model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from charlm.cli.output import Console, UsageError, check_output, emit, writing
from charlm.cli.signals import Signals
from charlm.errors import InputError, quoted
from charlm.lm import load
from charlm.models.gpt import GPT
from charlm.plotting import plot_attention, plot_bigram, plot_run, plot_runs, save_picture, token_labels
from charlm.plotting.figures import picture_format
from charlm.runs.history import read_histories, read_history
from charlm.text.tokenizer import unit_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["run"]


def run(args: argparse.Namespace, console: Console, signals: Signals, began: float) -> int:
    """Draw, write the file, and write its name to standard output."""
    out = _target(args)
    check_output(out)
    drawn, what = _drawn(args)
    with writing(out):
        save_picture(drawn, out)
    console.say(f"{what}, drawn into {quoted(str(out))}")
    emit(f"{out}\n")
    return 0


def _target(args: argparse.Namespace) -> Path:
    """Return the path of the picture."""
    if args.attention == "":
        raise UsageError("--attention must be at least one character, got none")
    if len(args.runs) > 1 and (args.bigram or args.attention is not None):
        raise UsageError("--bigram and --attention draw the model of one RUN; give one")
    run = Path(args.runs[0]).resolve()
    if args.out is None:
        kind = "" if args.attention is None else "-attention"
        name = run.name if len(args.runs) == 1 else "runs"
        out = Path(name + ("-bigram" if args.bigram else kind) + ".png")
        if {Path(name).resolve() for name in args.runs} & {Path.cwd(), *Path.cwd().parents}:
            raise UsageError(
                "the picture would lie among the files of the run; say where it is to go with -o"
            )
        return out
    try:
        picture_format(args.out)
    except InputError as error:
        raise UsageError(str(error)) from error
    return Path(args.out)


def _drawn(args: argparse.Namespace) -> tuple[Axes | Figure, str]:
    """Return the picture and its description."""
    if len(args.runs) > 1:
        histories = read_histories(args.runs)
        return plot_runs(histories), f"the trainings of {', '.join(quoted(h.name) for h in histories)}"
    (run,) = args.runs
    if args.attention is None and not args.bigram:
        history = read_history(run)
        last = max([*history.steps[-1:].tolist(), *history.eval_steps[-1:].tolist()])
        return plot_run(history), f"the training of {quoted(history.name)} up to step {last:,}"
    lm = load(run, device="cpu", mixture=False)
    if args.bigram:
        shows = f"probabilities of the model after each {unit_of(lm.tokenizer)}"
        return plot_bigram(lm.model, lm.tokenizer), shows
    if not isinstance(lm.model, GPT):
        raise InputError(f"--attention needs a GPT, got a model of the kind {lm.model.kind!r}. Try --bigram.")
    ids = lm.tokenizer.encode(args.attention)
    axes = plot_attention(lm.model.attention(torch.tensor([ids])), token_labels(lm.tokenizer, ids))
    return axes[0, 0], "where each layer and head looks"
