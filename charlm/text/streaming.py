"""The two ends of generation: the context of an empty prompt, and decoding of ids as they arrive.

This module knows tokenizers and no models.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from charlm.errors import UnknownCharacterError
from charlm.text.tokenizer import ByteTokenizer, Tokenizer

__all__ = ["StreamDecoder", "start_ids"]


def start_ids(tokenizer: Tokenizer) -> list[int]:
    r"""Return the context of an empty prompt: the id of "\n" if the vocabulary has it, else id 0.

    The lecture starts from `torch.zeros((1, 1))`; id 0 of Tiny Shakespeare is "\n".
    """
    try:
        return tokenizer.encode("\n")
    except UnknownCharacterError:
        return [0]


class StreamDecoder:
    """Decodes ids as they arrive, into whole characters only.

    With a `ByteTokenizer`, the bytes of an unfinished character are kept until the rest arrives. Bytes that
    are no UTF-8 become U+FFFD, as in `ByteTokenizer.decode`.

    Args:
        tokenizer: the tokenizer of the ids.

    Example:
        >>> decoder = StreamDecoder(ByteTokenizer())
        >>> [decoder.feed([byte]) for byte in "é".encode()], decoder.finish()
        (['', 'é'], '')
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")

    @property
    def waiting(self) -> int:
        """How many ids wait for the rest of their character."""
        return len(self._bytes.getstate()[0])

    def feed(self, ids: Sequence[int]) -> str:
        """Return the characters that these ids complete."""
        if isinstance(self._tokenizer, ByteTokenizer):
            return self._bytes.decode(bytes(ids))
        return self._tokenizer.decode(ids)

    def finish(self) -> str:
        """Return U+FFFD for an unfinished character at the end, else an empty text."""
        return self._bytes.decode(b"", final=True)
