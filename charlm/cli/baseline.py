"""The n-gram baseline of a training, counted from the same text. It is saved in RUN/ngram.

Its time and memory are bounded for a text of any size. It draws no random number, so it does not change the
training by one bit.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from charlm.cli.output import Console
from charlm.cli.verdict import UNLIKE
from charlm.data.blocks import BlockDataset
from charlm.errors import CharLMError
from charlm.evaluation.evaluate import EvalResult, evaluate
from charlm.lm import CharLM
from charlm.models.ngram import NGramLM
from charlm.text.tokenizer import Tokenizer, Unit
from charlm.training.progress import BITS, scored_part

__all__ = [
    "BASELINE_FOLDER",
    "Baseline",
    "Counted",
    "compared",
    "count_end",
    "count_within",
    "entropy_nats",
    "score_baseline",
]

BASELINE_FOLDER = "ngram"
_MOST_COUNTED = 4_000_000  # characters: 2 s and 0.4 GB for a text, 7 s and 1.2 GB for pure noise
_LONG = 100_000_000  # characters: of a text of this length only half as many are counted, to save memory
_MOST_SCORED = 50_000_000  # probabilities, V for each character
_LEAST_SCORED = 20_000  # characters
_TRIAL = 200_000  # characters of a trial that measures the speed: 0.1 s
_MORE = 1.5  # the largest time of a further character, relative to the trial
_HARDLY = 0.85  # a loss above this share of the entropy of single characters is hardly a prediction
_MUCH = 1.1  # a text is unlike if its loss is above this multiple of the loss on pieces of the counted text
_AT_ONCE, _MOST_PIECES = 2**22, 64  # ids that are counted together, and how often at most
_PIECE, _EACH = 100, 10  # characters of such a piece; every tenth piece is taken


@dataclass(frozen=True)
class Counted:
    """An n-gram model of the end of a text."""

    model: NGramLM
    chars: int
    """Number of counted characters."""
    seconds: float
    """Time of the counting."""


@dataclass(frozen=True)
class Baseline:
    """A counted model and its loss."""

    lm: CharLM
    unlike: bool
    """Whether the end of the text is unlike its beginning, as in a sorted list."""
    line: str
    """A description for a person to read."""
    values: dict[str, object]
    """The values in train.json: order, loss_nats or None, the numbers of counted and scored characters, and
    entropy_nats, the entropy of single characters in the validation text."""

    def show(self, console: Console) -> None:
        """Describe it, and warn about a text on which every loss will mislead."""
        console.say(self.line)
        if self.unlike:
            console.complain(UNLIKE)

    def save(self, run: Path, console: Console) -> None:
        """Save it in a run; a failure gives only a warning."""
        try:
            self.lm.save(run / BASELINE_FOLDER)
        except CharLMError as error:
            console.complain(f"warning: {error}; the run goes on without its n-gram model")


def count_within(train: BlockDataset, vocab_size: int, seconds: float | None = None) -> Counted:
    """Count as much of the end of a text as fits into a time; None: as much as is sensible."""
    began = time.perf_counter()
    most = min(train.n_ids, _MOST_COUNTED if train.n_ids < _LONG else _MOST_COUNTED // 2)
    chars = most if seconds is None else min(most, _TRIAL)
    model = count_end(train, vocab_size, chars)
    spent = time.perf_counter() - began
    if seconds is not None and chars < most:
        fitting = min(most, int(_TRIAL * (seconds - spent) / (_MORE * spent)))
        if fitting > chars:
            chars = fitting
            model = count_end(train, vocab_size, chars)
    return Counted(model, chars, time.perf_counter() - began)


def count_end(train: BlockDataset, vocab_size: int, chars: int) -> NGramLM:
    """Count the last `chars` characters of a text."""
    return NGramLM(vocab_size).fit(BlockDataset(train.ids_between(train.n_ids - chars, train.n_ids), 1))


def score_baseline(
    counted: Counted,
    train: BlockDataset,
    val: BlockDataset | None,
    tokenizer: Tokenizer,
    eval_chars: int | None = None,
) -> Baseline:
    """Score the validation text with a counted model.

    Args:
        counted: the model.
        train: the training text.
        val: the validation text, if there is one.
        tokenizer: of both.
        eval_chars: score as many characters as the training's evaluations. None: as many as is sensible.
    """
    began = time.perf_counter()
    result, entropy, loss = None, None, ""
    if val is not None:
        most = max(_MOST_SCORED // tokenizer.vocab_size, _LEAST_SCORED, val.block_size + 1)
        result = evaluate(counted.model, val, max_chars=most if eval_chars is None else eval_chars)
        entropy = entropy_nats(val)
        loss = f": {result.loss_nats:.4f} nats ({result.bits_per_char:.4f} {BITS[val.unit]})"
        loss += scored_part(result, val.unit)
    seconds = counted.seconds + time.perf_counter() - began
    part = "" if counted.chars == train.n_ids else f" from the last {counted.chars:,} {train.unit}s"
    line = f"n-gram  baseline of order {counted.model.order}, counted{part} in {seconds:.1f} s{loss}"
    left_out = 0 if result is None else result.n_left_out
    scored = 0 if result is None or val is None else result.n_chars if left_out else val.n_targets + 1
    values: dict[str, object] = {
        "order": counted.model.order,
        "loss_nats": None if result is None else result.loss_nats,
        "counted": counted.chars,
        "n_left_out": left_out,
        "scored": scored,
        "entropy_nats": entropy,
    }
    unlike = val is not None and result is not None and _is_unlike(train, val, tokenizer, result)
    return Baseline(CharLM(counted.model, tokenizer), unlike, line, values)


def _is_unlike(train: BlockDataset, val: BlockDataset, tokenizer: Tokenizer, result: EvalResult) -> bool:
    """Return whether the training text predicts itself well, but hardly predicts the validation text.

    Noise predicts neither, and a text of many parts, such as source code, may predict other parts worse.
    """
    if result.loss_nats < _HARDLY * entropy_nats(val):
        return False
    ids = train.ids_between(max(train.n_ids - _TRIAL, 0), train.n_ids)
    pieces = ids[: len(ids) // _PIECE * _PIECE].view(-1, _PIECE)  # (n, 100)
    if len(pieces) < 2 * _EACH:
        return False
    out = torch.arange(len(pieces)) % _EACH == _EACH // 2
    model = NGramLM(tokenizer.vocab_size).fit(BlockDataset(pieces[~out].flatten(), 1))
    near = evaluate(model, BlockDataset(pieces[out].flatten(), _PIECE - 1))
    far = evaluate(model, val.in_blocks_of(min(val.block_size, _PIECE - 1)), max_chars=near.n_chars)
    return far.loss_nats > _MUCH * near.loss_nats


def entropy_nats(data: BlockDataset) -> float:
    """Return the entropy of single characters in nats; of a long text, from pieces spread over it."""
    counts = np.zeros(data.max_id + 1, dtype=np.int64)
    step = max(_AT_ONCE, data.n_ids // _MOST_PIECES)
    for start in range(0, data.n_ids, step):  # bincount takes eight bytes per id
        counts += np.bincount(data.ids_between(start, start + _AT_ONCE).numpy(), minlength=len(counts))
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def compared(values: object, result: EvalResult, unit: Unit) -> str | None:
    """Return the comparison of a result with the baseline of train.json, if there is one."""
    fields: dict[str, Any] = values if isinstance(values, dict) else {}
    baseline = fields.get("loss_nats")
    if not isinstance(baseline, float):
        return None
    ahead = baseline - result.loss_nats
    verdict = f"beaten by {ahead:.4f}" if ahead > 0 else f"not beaten, {-ahead:.4f} better than the GPT"
    verdict = "as good as the GPT" if abs(ahead) < 5e-5 else verdict
    scored = fields.get("scored")
    others = isinstance(scored, int) and abs(scored - result.n_chars) > 1
    return f"baseline {baseline:.4f} nats{f' on {scored:,} {unit}s' if others else ''}, {verdict}"
