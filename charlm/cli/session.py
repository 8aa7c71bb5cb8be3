"""`Session`: a text that a person and a model write by turns. It knows no terminal and no page.

The model's cache goes on with the text: a step reads what is new, and a step back reads next to nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import unicodedata
from collections.abc import Generator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from charlm.cli.reading import named
from charlm.errors import CharLMError, UnknownCharacterError
from charlm.generation.decode import next_ids
from charlm.generation.options import Sampling, SamplingOptions
from charlm.generation.state import PredictionState
from charlm.lm import CharLM
from charlm.text.choosing import banned_ids
from charlm.text.streaming import StreamDecoder, start_ids
from charlm.text.tokenizer import Tokenizer

__all__ = ["Candidate", "Session", "options_of", "refusal_of", "sampling_of"]

_LONGEST = 12  # characters of a candidate
_SCORED_AT_ONCE = 256  # ids
_JOINING = "'’"  # within a word


class Candidate(NamedTuple):
    """A continuation, up to the end of a word, and how likely it is as a whole."""

    text: str
    probability: float


def sampling_of(args: argparse.Namespace) -> Sampling:
    """Return the options of sampling in a command line, but for the seed."""
    return {
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "min_p": args.min_p,
        "overflow": args.overflow,
        "repetition_penalty": args.repetition_penalty,
    }


def options_of(args: argparse.Namespace, tokenizer: Tokenizer, seed: int) -> SamplingOptions:
    """Return the options of sampling in a command line, with what is banned.

    Raises:
        InputError: a value is wrong, or no character is left to be written.
    """
    options = SamplingOptions(**sampling_of(args))
    return dataclasses.replace(options, banned_ids=banned_ids(tokenizer, args.ban, args.allow), seed=seed)


def refusal_of(error: CharLMError) -> str:
    """Return what to say of an error to whoever writes."""
    if isinstance(error, UnknownCharacterError):
        return f"not known to the model: {named(error.characters)}"
    return str(error)


class Session:
    """A text that grows by turns.

    Args:
        lm: the partner.
        prompt: what stands there already; an empty one begins as that of `CharLM.generate` does.
        options: how the model chooses; they may be replaced between two steps.

    Attributes:
        options: as given, or as replaced.

    Raises:
        UnknownCharacterError: the tokenizer lacks a character of the prompt.

    Example:
        >>> from charlm import BigramLM, CharTokenizer
        >>> session = Session(CharLM(BigramLM(3), CharTokenizer("abc")), "ab", SamplingOptions(seed=1))
        >>> session.write("c")
        >>> len("".join(session.go_on(4))), len(session.text)
        (4, 7)
        >>> session.undo(), session.text
        (True, 'abc')
    """

    def __init__(self, lm: CharLM, prompt: str, options: SamplingOptions) -> None:
        self.options = options
        self._tokenizer = lm.tokenizer
        self._device = lm.model.device
        self._state: PredictionState = lm.model.new_state(overflow=options.overflow)
        before = [] if prompt else start_ids(lm.tokenizer)
        self._first = len(before)  # ids that are not shown
        self._observe(before + self._tokenizer.encode(prompt))
        self._marks: list[int] = []  # lengths to go back to
        self._nats = [math.nan]  # log-probabilities of the first ids, of as many as were asked for

    @property
    def length(self) -> int:
        """How many ids the text has."""
        return self._state.lengths[0]

    @property
    def text(self) -> str:
        """The whole text."""
        return self._tokenizer.decode(self._state.text(0)[self._first :])

    def write(self, text: str) -> None:
        """Add a text: one step.

        Raises:
            UnknownCharacterError: the tokenizer lacks a character. Nothing is added.
        """
        ids = self._tokenizer.encode(text)
        self._marks.append(self.length)
        self._observe(ids)

    def go_on(self, count: int) -> Generator[str, None, None]:
        """Let the model add characters, and yield them as they come: one step, wherever it is left.

        Args:
            count: how many characters. Of one of bytes nothing stays that is not whole.

        Raises:
            NonFiniteError: nothing can be drawn. What came before stays.
        """
        self._marks.append(self.length)
        decoder, written = StreamDecoder(self._tokenizer), 0
        try:
            while written < count:
                piece = decoder.feed([self._next_id()])
                written += len(piece)
                if piece:
                    yield piece
        finally:
            self._cut(self.length - decoder.waiting)

    def undo(self) -> bool:
        """Take the last step back that changed the text; return whether there was one."""
        while self._marks:
            before = self._marks.pop()
            if before < self.length:
                self._cut(before)
                return True
        return False

    def move_to(self, text: str) -> None:
        """Let another text stand there; steps before it cannot be undone. The prompt was empty.

        Raises:
            UnknownCharacterError: the tokenizer lacks a character. The text stays as it was.
        """
        ids = self._tokenizer.encode(text)
        old: list[int] = self._state.text(0)[self._first :].tolist()
        same = next((i for i, (a, b) in enumerate(zip(old, ids, strict=False)) if a != b), None)
        same = min(len(old), len(ids)) if same is None else same
        self._marks.clear()
        self._cut(self._first + same)
        self._observe(ids[same:])

    @torch.no_grad()
    def candidates(self, count: int, typed: str = "") -> list[Candidate]:
        """Return the likeliest next characters, each with what likeliest follows, to the end of a word.

        Args:
            count: at most so many.
            typed: what stands behind the text, but is not part of it.

        Returns:
            Each with the chance that the model writes it under the present options (at temperature 0: those
            of temperature 1), the likeliest first.

        Raises:
            UnknownCharacterError: the tokenizer lacks a character of `typed`.
        """
        state = self._state
        if ids := self._tokenizer.encode(typed):
            state = state.fork()
            state.observe([self._tensor(ids)])
        log_probs = self._log_probs(state)[0]  # (V,)
        first = log_probs.argsort(descending=True, stable=True)[:count]  # (K,)
        first = first[log_probs[first] > -math.inf]
        rows = [_Row(self._tokenizer) for _ in first]
        if not rows:
            return []
        ahead, best, nats = state.fork([0] * len(rows)), first, log_probs[first]
        while True:
            for row, i, n in zip(rows, best.tolist(), nats.tolist(), strict=True):
                row.add(i, n)
            if all(row.ended for row in rows):
                break
            ahead.observe(best.to(self._device))
            nats, best = self._log_probs(ahead).max(dim=-1)  # (K,)
        # Bytes that are no characters cannot be typed.
        encode = self._tokenizer.encode
        known = [row for row in rows if encode(row.text, on_unknown="skip") == row.ids]
        return [Candidate(row.text, math.exp(row.nats)) for row in sorted(known, key=lambda row: -row.nats)]

    def score_some(self) -> bool:
        """Ask for the surprisal of some more characters; return whether some are still left."""
        known, ids = len(self._nats), self._state.text(0)
        if known < len(ids):
            self._state.retract(len(ids) - known)
            end = known + _SCORED_AT_ONCE
            self._nats += self._state.score([ids[known:end]])[0].tolist()
            self._state.observe([ids[end:]])
        return len(self._nats) < len(ids)

    def scored(self, begin: int = 0) -> tuple[str, list[float], int]:
        """Return what was scored from an id on, the bits of each of its characters, and the next id."""
        begin = end = max(begin, self._first)
        ids: list[int] = self._state.text(0)[begin : len(self._nats)].tolist()
        decoder, text, bits, waiting = StreamDecoder(self._tokenizer), "", list[float](), 0.0
        for at, (i, nats) in enumerate(zip(ids, self._nats[begin:], strict=True), begin + 1):
            waiting -= nats / math.log(2)
            if char := decoder.feed([i]):
                bits += [waiting, *[0.0] * (len(char) - 1)]
                text, end, waiting = text + char, at - decoder.waiting, 0.0
        return text, bits, end

    def _next_id(self) -> int:
        """Let the model choose; where all before is scored, so is this."""
        known = len(self._nats) == self.length
        logits = self._state.predict() if known else None
        i = int(next_ids(self._state, self.options))
        if logits is not None:
            self._nats.append(logits[0].cpu().double().log_softmax(dim=-1)[i].item())
        return i

    def _observe(self, ids: Sequence[int]) -> None:
        self._state.observe([self._tensor(ids)])

    def _cut(self, length: int) -> None:
        """Let the text end there."""
        self._state.retract(self.length - length)
        del self._nats[length:]

    def _tensor(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor(ids, dtype=torch.int64, device=self._device)

    def _log_probs(self, state: PredictionState) -> Tensor:
        """Return what comes next in each row under the options, (B, V) on the CPU: not all have float64."""
        penalised = self.options.repetition_penalty != 1
        texts = torch.stack([state.text(row) for row in range(state.rows)]) if penalised else None
        return self.options.filter(state.predict(), texts).cpu().double().log_softmax(dim=-1)


class _Row:
    """A candidate while it grows: what is whole of it, and what was read beyond."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.text, self.ids, self.nats, self.ended = "", list[int](), 0.0, False
        self._decoder = StreamDecoder(tokenizer)
        self._ids, self._nats = list[int](), 0.0

    def add(self, i: int, nats: float) -> None:
        """Take the next id, unless the candidate ends before the character that it makes whole."""
        self._ids.append(i)
        self._nats += nats
        char = self._decoder.feed([i])
        if not char or self.ended:
            return
        self.ended = bool(self.text) and _is_end(self.text[-1], char[0])
        if not self.ended:
            self.text, self.ids, self.nats = self.text + char, [*self._ids], self._nats
            self.ended = len(self.text) >= _LONGEST


def _is_end(last: str, following: str) -> bool:
    """Return whether a word or a line ends between two characters, or what follows is no text."""
    return last == "\n" or following == "\ufffd" or (_in_word(last) and not _in_word(following))


def _in_word(char: str) -> bool:
    return char in _JOINING or unicodedata.category(char)[0] in "LMN"
