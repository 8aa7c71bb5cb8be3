"""Both ends of a generated text: what an empty prompt begins with, and ids turned into text as they come.

It knows tokenizers, and nothing of the models that choose the ids.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from charlm.errors import UnknownCharacterError
from charlm.text.tokenizer import ByteTokenizer, Tokenizer

__all__ = ["StreamDecoder", "start_ids"]


def start_ids(tokenizer: Tokenizer) -> list[int]:
    r"""Return the context of an empty prompt: "\n" where the vocabulary has it, else id 0.

    In the lecture it is `torch.zeros((1, 1))`, and id 0 of Tiny Shakespeare is "\n".
    """
    try:
        return tokenizer.encode("\n")
    except UnknownCharacterError:
        return [0]


class StreamDecoder:
    """Decodes ids piece by piece, into whole characters only.

    With a `ByteTokenizer` the bytes of an unfinished character wait for the rest of it; what is no UTF-8
    becomes U+FFFD, as in `ByteTokenizer.decode`.

    Args:
        tokenizer: the one whose ids come.

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
        """Return the characters that are complete with these ids."""
        if isinstance(self._tokenizer, ByteTokenizer):
            return self._bytes.decode(bytes(ids))
        return self._tokenizer.decode(ids)

    def finish(self) -> str:
        """Return what an unfinished character at the end decodes to."""
        return self._bytes.decode(b"", final=True)
