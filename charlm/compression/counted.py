"""An n-gram model that is counted from a text when it is needed, instead of being saved.

Counting is exact on every machine, but fitting the discounts is not. So the discounts, a few numbers, are
stored in the compressed text.
"""

from __future__ import annotations

import struct

import numpy as np
import torch

from charlm.data.blocks import BlockDataset
from charlm.errors import FileFormatError, InputError
from charlm.lm import CharLM
from charlm.models.ngram import NGramLM
from charlm.text.tokenizer import CharTokenizer

__all__ = ["count_anew", "counted", "settings_of"]

_SIZES = struct.Struct("<BI")


def counted(text: str) -> CharLM:
    """Return the n-gram model of a text.

    Raises:
        InputError: the text is too short.
    """
    tokenizer, data = _read(text)
    return CharLM(NGramLM(tokenizer.vocab_size).fit(data), tokenizer)


def settings_of(model: NGramLM) -> bytes:
    """Return the settings that `count_anew` needs in addition to the text."""
    numbers = torch.cat([model.discounts, model.window_shares]).detach().numpy().astype("<f4")
    return _SIZES.pack(model.order, model.config.window) + numbers.tobytes()


def count_anew(text: str, settings: bytes) -> CharLM:
    """Return the model with these settings, counted from the text.

    Raises:
        FileFormatError: the settings are not valid.
        InputError: the text is too short.
    """
    tokenizer, data = _read(text)
    try:
        order, window = _SIZES.unpack_from(settings)
        model = NGramLM(tokenizer.vocab_size, order, window)
        numbers = torch.from_numpy(
            np.frombuffer(settings, "<f4", offset=_SIZES.size).astype(np.float32).reshape(-1, 3)
        )
    except (struct.error, ValueError) as error:
        raise FileFormatError("the settings of the model in the header are none") from error
    if numbers.shape != (order + len(model.window_shares), 3):
        raise FileFormatError("the settings of the model in the header are none")
    model._store(data.ids.numpy(), numbers[:order].clone(), numbers[order:].clone())
    return CharLM(model, tokenizer)


def _read(text: str) -> tuple[CharTokenizer, BlockDataset]:
    if len(text) < 2:
        raise InputError("a text that a model is counted from must have at least two characters")
    tokenizer = CharTokenizer.from_text(text)
    return tokenizer, BlockDataset.from_text(text, tokenizer, 1)
