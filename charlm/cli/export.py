"""`charlm export`: a GPT and its vocabulary for other libraries."""

from __future__ import annotations

import argparse
from pathlib import Path

from charlm.cli.output import Console, check_output, emit
from charlm.cli.signals import Signals
from charlm.errors import InputError
from charlm.interchange import to_onnx, to_transformers
from charlm.lm import CharLM, load
from charlm.models.gpt import GPT
from charlm.models.mixture import MixtureLM
from charlm.runs.choosing import MIXTURE_FOLDER
from charlm.terminal import escaped

__all__ = ["run"]


def run(args: argparse.Namespace, console: Console, signals: Signals, began: float) -> int:
    """Write the folder, describe it, and write its name to standard output."""
    check_output(args.out, directory=True)
    lm = load(args.run, device="cpu", mixture=False)
    mixed = (Path(args.run) / MIXTURE_FOLDER).exists()
    if isinstance(lm.model, MixtureLM):  # a saved one
        gpt = next((member for member in lm.model.members if isinstance(member, GPT)), None)
        if gpt is None:
            raise InputError("only a GPT can be exported, and there is none in this mixture")
        lm, mixed = CharLM(gpt, lm.tokenizer), True
    what, reader = "GPT", f"onnxruntime.InferenceSession({str(Path(args.out, 'model.onnx'))!r})"
    if args.to == "transformers":
        what = to_transformers(lm, args.out, overwrite=args.overwrite)
        reader = f"transformers.AutoModelForCausalLM.from_pretrained({args.out!r})"
    else:
        to_onnx(lm, args.out, overwrite=args.overwrite)
    console.say(
        f"model   {what} of {lm.model.num_parameters():,} parameters, vocabulary "
        f"{lm.tokenizer.vocab_size:,}, window {lm.model.block_size:,}"
    )
    if mixed:
        console.say("        without the n-gram model: its losses are those of eval --no-mixture")
    console.say(f"next    {escaped(reader)}")
    emit(f"{args.out}\n")
    return 0
