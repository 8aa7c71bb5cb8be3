"""A page that shows the surprisal of each character of a text: one HTML file for any browser.

The page has its own style and script, and loads nothing else. Text and figures are compressed inside it, so
no part of a text is ever read as markup. page.html holds its layout.
"""

from __future__ import annotations

import base64
import html
import json
import math
import re
import unicodedata
import zlib
from importlib import resources

import numpy as np
from numpy.typing import NDArray

from charlm.errors import InputError
from charlm.evaluation.surprisal import Surprisal
from charlm.text.tokenizer import Tokenizer, unit_of

__all__ = ["surprisal_page"]

_PER_BIT = 256  # figures in bits are stored in 256ths
_UNKNOWN, _INFINITE = 65_535, 65_534
_SHARES = 65_535  # a probability of 1


def surprisal_page(text: str, found: Surprisal, tokenizer: Tokenizer, *, title: str = "Surprisal") -> str:
    """Return an HTML page on which each character of a text is coloured by its surprisal.

    Hovering over a character, or moving to it with the arrow keys, shows its figures and the likeliest
    candidates, if `found` has any.

    Args:
        text: N characters, or N bytes of UTF-8 with a `ByteTokenizer`.
        found: the result of `CharLM.surprisal`.
        tokenizer: the tokenizer of the model.
        title: the title of the page; lone surrogates, as in the name of a file, are escaped.

    Raises:
        InputError: text and figures differ in length.

    Example:
        >>> from charlm import BigramLM, CharLM, CharTokenizer
        >>> lm = CharLM(BigramLM(2), CharTokenizer("ab"))
        >>> page = surprisal_page("abab", lm.surprisal("abab", top=2), lm.tokenizer)
        >>> page[:15]
        '<!doctype html>'
    """
    unit = unit_of(tokenizer)
    is_byte = unit == "byte"
    N = len(text.encode()) if is_byte else len(text)
    if len(found.bits) != N:
        raise InputError(f"found must have a figure for each of {N} {unit}s, got {len(found.bits)}")
    V = tokenizer.vocab_size
    ids = "<u2" if V <= _UNKNOWN else "<u4"
    result = found.result
    header = {
        "text": text,
        "names": {c: name for c in set(text) if not c.isprintable() and (name := unicodedata.name(c, ""))},
        "vocab": None if is_byte else [tokenizer.decode([i]) for i in range(V)],
        "count": N,
        "block_size": found.block_size,
        "top": found.candidates.shape[1],
        "wide_ids": ids == "<u4",
    }
    parts = [
        _bits(found.bits),
        _bits(found.entropy_bits),
        found.rank.astype(ids).tobytes(),
        np.maximum(found.candidates, 0).astype(ids).tobytes(),
        _shares(np.nan_to_num(found.candidate_probs)),
    ]
    data = json.dumps(header, ensure_ascii=False).encode()
    blob = zlib.compress(len(data).to_bytes(4, "little") + data + b"".join(parts), 6)
    figures = (
        (f"{N:,}", f"{unit}s" + (", all but the first predicted")),
        (_figure(result.bits_per_char), f"bits per {unit}"),
        (_figure(result.loss_nats), f"nats per {unit}"),
        (_figure(result.perplexity), f"perplexity per {unit}"),
        (f"{100 * result.accuracy:.2f} %", "predicted as the likeliest"),
    )
    window = (
        f"The first {unit} has nothing before it and is not predicted. The text is read in windows of "
        f"{found.block_size:,} {unit}s, each by itself, as <code>charlm eval</code> reads it: a {unit} is "
        "predicted from those before it in its window."
    )
    fields = {
        "TITLE": html.escape(title.encode("utf-8", "backslashreplace").decode()),
        "FIGURES": "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for value, name in figures),
        "WINDOW": window,
        "TEXT": html.escape(text),
        "DATA": base64.b64encode(blob).decode(),
    }
    page = resources.files("charlm.evaluation").joinpath("page.html").read_text(encoding="utf-8")
    return re.sub("%([A-Z]+)%", lambda found: fields[found[1]], page)


def _bits(values: NDArray[np.float64]) -> bytes:
    """Return figures in 256ths of a bit, with codes for unknown and infinite ones."""
    scaled = np.minimum(np.rint(values * _PER_BIT), _INFINITE - 1)
    scaled = np.where(np.isinf(values), _INFINITE, np.where(np.isnan(values), _UNKNOWN, scaled))
    return scaled.astype("<u2").tobytes()


def _shares(probs: NDArray[np.float64]) -> bytes:
    """Return probabilities in 65,535ths; only a probability of 0 becomes 0."""
    return np.maximum(np.rint(probs * _SHARES), probs > 0).astype("<u2").tobytes()


def _figure(value: float) -> str:
    return "∞" if math.isinf(value) else f"{value:.4f}" if value < 1e6 else f"{value:.4g}"
