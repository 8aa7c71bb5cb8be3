"""The n-gram model that a training is compared with: counted from the same text, without a gradient.

It lies in RUN/ngram as a saved model. What it takes is bounded for a text of any size, and it draws no random
number, so the training itself does not change by one bit.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from charlm.cli.output import Console
from charlm.data.blocks import BlockDataset
from charlm.errors import CharLMError
from charlm.evaluation.evaluate import evaluate
from charlm.lm import CharLM
from charlm.models.ngram import NGramLM
from charlm.text.tokenizer import Tokenizer

__all__ = ["BASELINE_FOLDER", "Baseline", "compared", "count_baseline"]

BASELINE_FOLDER = "ngram"
_MOST_COUNTED = 4_000_000  # characters: 2 s and 0.4 GB for a text, 7 s and 1.2 GB for pure noise
_MOST_SCORED = 50_000_000  # probabilities, V for each character
_LEAST_SCORED = 20_000  # characters


@dataclass(frozen=True)
class Baseline:
    """A counted model and how well it does."""

    lm: CharLM
    values: dict[str, object]
    """What train.json keeps: order, loss_nats or None, and how many characters were counted and scored."""

    def save(self, run: Path, console: Console) -> None:
        """Write it into a run; the training does not end if that fails."""
        try:
            self.lm.save(run / BASELINE_FOLDER)
        except CharLMError as error:
            console.complain(f"warning: {error}; the run goes on without its n-gram model")


def count_baseline(
    train: BlockDataset, val: BlockDataset | None, tokenizer: Tokenizer, console: Console
) -> Baseline:
    """Count the end of the training text, score the beginning of the validation text, and say so."""
    began = time.perf_counter()
    counted = train.ids[-_MOST_COUNTED:]
    model = NGramLM(tokenizer.vocab_size).fit(BlockDataset(counted, 1))
    part = "" if len(counted) == len(train.ids) else f" from the last {len(counted):,} characters"
    loss, scored = None, 0
    if val is not None:
        most = max(_MOST_SCORED // tokenizer.vocab_size, _LEAST_SCORED, val.block_size + 1)
        ids = val.ids[:most]
        loss, scored = evaluate(model, BlockDataset(ids, val.block_size)).loss_nats, len(ids)
    values: dict[str, object] = {
        "order": model.order,
        "loss_nats": loss,
        "counted": len(counted),
        "scored": scored,
    }
    seconds = time.perf_counter() - began
    line = f"n-gram  baseline of order {model.order}, counted{part} in {seconds:.1f} s"
    if loss is not None and val is not None:
        line += f": {loss:.4f} nats ({loss / math.log(2):.4f} bits/char)"
        line += "" if scored == len(val.ids) else f" on the first {scored:,} characters of validation"
    console.say(line)
    return Baseline(CharLM(model, tokenizer), values)


def compared(values: object, loss_nats: float) -> str | None:
    """Return whether a model with this validation loss beats the baseline of train.json, if there is one."""
    known: dict[str, Any] = values if isinstance(values, dict) else {}
    baseline = known.get("loss_nats")
    if not isinstance(baseline, float):
        return None
    ahead = baseline - loss_nats
    verdict = f"beaten by {ahead:.4f}" if ahead > 0 else f"not beaten, {-ahead:.4f} better than the model"
    return f"baseline {baseline:.4f} nats, {verdict}"
