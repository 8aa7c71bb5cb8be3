"""`charlm eval`: how well a model predicts a text."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from charlm.cli.baseline import BASELINE_FOLDER
from charlm.cli.output import Console, aligned, emit
from charlm.cli.signals import Signals
from charlm.errors import CharLMError
from charlm.evaluation.evaluate import EvalResult
from charlm.lm import CharLM, load
from charlm.text.corpus import load_corpus
from charlm.text.tokenizer import ByteTokenizer

__all__ = ["run"]


def run(args: argparse.Namespace, console: Console, signals: Signals, began: float) -> int:
    """Write the figures as a table or as JSON."""
    text = load_corpus(args.files)
    lm = load(args.run, device=args.device)
    result = lm.evaluate(text)
    baseline = _baseline(Path(args.run), text, lm, console)
    unit = "byte" if isinstance(lm.tokenizer, ByteTokenizer) else "character"
    values = {
        "loss_nats": result.loss_nats,
        "bits_per_char": result.bits_per_char,
        "bits_per_byte": result.bits_per_byte,
        "perplexity": result.perplexity,
        "accuracy": result.accuracy,
        "n_chars": result.n_chars,
        "unit": unit,
        "baseline_loss_nats": None if baseline is None else baseline.loss_nats,
    }
    if args.json:
        # JSON has no infinity, which the loss is if the model held a character of the text impossible.
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        emit(json.dumps(finite) + "\n")
        return 0
    per_byte = result.bits_per_byte
    rows = [
        ("loss", f"{result.loss_nats:.4f}", f"nats per {unit}"),
        ("", f"{result.bits_per_char:.4f}", f"bits per {unit}"),
        ("", f"{math.nan if per_byte is None else per_byte:.4f}", "bits per byte of UTF-8"),
        ("perplexity", f"{result.perplexity:.4f}", f"per {unit}"),
        ("accuracy", f"{100 * result.accuracy:.2f}", "% predicted as the likeliest"),
        ("predicted", f"{result.n_chars:,}", f"{unit}s, all but the first"),
    ]
    if baseline is not None:
        ahead = baseline.loss_nats - result.loss_nats
        verdict = f"beaten by {ahead:.4f}" if ahead > 0 else f"{-ahead:.4f} better than the model"
        rows.append(("n-gram", f"{baseline.loss_nats:.4f}", f"nats per {unit}, the baseline: {verdict}"))
    emit(aligned(rows))
    return 0


def _baseline(run: Path, text: str, lm: CharLM, console: Console) -> EvalResult | None:
    """Score the text with the n-gram model of a run, if it has one, in the windows of its model."""
    if not (run / "run.json").exists() or not (run / BASELINE_FOLDER).exists():
        return None
    try:
        return load(run / BASELINE_FOLDER, device="cpu").evaluate(text, block_size=lm.model.block_size)
    except (CharLMError, OSError) as error:
        console.complain(f"warning: no baseline: {error}")
        return None
