"""A text on disk for `charlm eval`: the part that is scored, and its score."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from charlm.cli.encoded import corpus_of
from charlm.cli.output import Console
from charlm.data.blocks import BlockDataset
from charlm.data.prepared import is_prepared
from charlm.errors import DataError, quoted
from charlm.evaluation.evaluate import EvalResult, evaluate
from charlm.lm import CharLM
from charlm.models.config import unlimited_window
from charlm.text.tokenizer import ByteTokenizer, CharTokenizer

__all__ = ["MOST_EVALUATED", "score_stored", "stored_text"]

MOST_EVALUATED = 1_000_000
"""By default, an evaluation scores so many characters of a long text, in windows spread over it."""


def stored_text(sources: Sequence[str], encoding: str, lm: CharLM, console: Console) -> BlockDataset:
    """Return the validation part of a prepared corpus, or a text that is prepared now, in a model's windows.

    Raises:
        DataError: it was prepared with another tokenizer than the model's.
        CharLMError: as in `corpus_of`.
    """
    own = lm.tokenizer
    if not isinstance(own, CharTokenizer | ByteTokenizer):
        raise DataError(f"a text on disk needs one of charlm's tokenizers, and the model has {own!r}")
    corpus = corpus_of(sources, encoding, own, console=console, on_disk=True)
    if corpus is None or corpus.tokenizer != own:
        raise DataError(
            f"{quoted(sources[0])} was prepared with another tokenizer than the model's, so its ids stand "
            "for other characters; give the text itself"
        )
    data = BlockDataset.open(corpus.path, 1)
    if is_prepared(sources[0]) and 1 < corpus.index.train_ids < data.n_ids - 1:
        _, data = data.split()
    window = lm.model.block_size or unlimited_window(lm.model.vocab_size)
    return data.in_blocks_of(min(window, data.n_ids - 1))


def score_stored(lm: CharLM, data: BlockDataset) -> EvalResult:
    """Score a text on disk, at most `MOST_EVALUATED` characters of it."""
    result = evaluate(lm.model, data, backend=lm.backend, max_chars=MOST_EVALUATED)
    if isinstance(lm.tokenizer, ByteTokenizer):
        return dataclasses.replace(result, n_bytes=result.n_chars)
    most = None if not result.n_left_out else result.n_chars // data.block_size
    counts = np.zeros(lm.tokenizer.vocab_size, np.int64)
    for _, targets in data.blocks(64, most=most):
        counts += np.bincount(targets.flatten().numpy(), minlength=len(counts))
    lengths = [len(lm.tokenizer.decode([i]).encode()) for i in range(len(counts))]
    return dataclasses.replace(result, n_bytes=int(counts @ lengths))
