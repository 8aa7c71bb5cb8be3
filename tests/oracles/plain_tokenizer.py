"""Encoding written from its definition: one dictionary, one character at a time."""

from __future__ import annotations

from collections.abc import Sequence


def plain_encode(vocab: Sequence[str], text: str, on_unknown: str, unknown: str | None) -> list[int]:
    """Return the ids of a text; an unknown character raises KeyError where `on_unknown` is "error"."""
    id_of = {character: i for i, character in enumerate(vocab)}
    ids = []
    for character in text:
        if character in id_of or on_unknown == "error":
            ids.append(id_of[character])
        elif on_unknown == "replace" and unknown is not None:
            ids.append(id_of[unknown])
    return ids
