"""`CharLM`: a model and its tokenizer together, text in and text out; and `load`, which finds both.

This is what most users hold. It adds no options of its own: sampling is `charlm.generation`'s, losses are
`charlm.evaluation`'s, files are `charlm.models.saving`'s.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray
from typing_extensions import Unpack

from charlm.backends.base import DeviceBackend
from charlm.backends.registry import get_backend
from charlm.data.blocks import BlockDataset
from charlm.errors import CheckpointError, DataError, InputError, quoted, shown
from charlm.evaluation.evaluate import EvalResult, evaluate
from charlm.evaluation.surprisal import Surprisal, surprisal
from charlm.generation.decode import next_ids
from charlm.generation.options import Overflow, Sampling, SamplingOptions
from charlm.generation.stopping import StopMatcher
from charlm.generation.stream import continue_ids, continued
from charlm.models.base import LanguageModel
from charlm.models.config import unlimited_window
from charlm.models.extending import extended
from charlm.models.saving import CONFIG_FILE, build_model, build_tokenizer, save_model
from charlm.native.storage import Storage, round_weights
from charlm.patterns.wishes import automaton_of
from charlm.plain import as_path, as_text, int_from
from charlm.runs.choosing import model_files_at
from charlm.text.choosing import banned_ids
from charlm.text.streaming import StreamDecoder, start_ids
from charlm.text.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer, unit_of

__all__ = ["CharLM", "load"]

_RANKED_AT_ONCE = 64  # texts, which bounds the memory of their caches


class CharLM:
    """A language model that takes and gives text.

    Args:
        model: any `LanguageModel`.
        tokenizer: the one that the model was trained with.
        backend: what the model was prepared with, as `load` does; None: a plain one for the model's device.

    Raises:
        InputError: their vocabularies differ in size.

    Example:
        >>> from charlm import BigramLM, CharTokenizer
        >>> lm = CharLM(BigramLM(3), CharTokenizer("abc"))
        >>> len(lm.generate("ab", 10, seed=1))
        12
    """

    def __init__(
        self, model: LanguageModel, tokenizer: Tokenizer, *, backend: DeviceBackend | None = None
    ) -> None:
        if not isinstance(model, LanguageModel) or not isinstance(tokenizer, Tokenizer):
            raise InputError(
                f"CharLM takes a LanguageModel and a tokenizer, got {shown(model)} and {shown(tokenizer)}"
            )
        if backend is not None and not isinstance(backend, DeviceBackend):
            raise InputError(f"backend must be a DeviceBackend, got {shown(backend)}")
        if model.vocab_size != tokenizer.vocab_size:
            raise InputError(
                f"model and tokenizer must have one vocabulary, got {model.vocab_size} and "
                f"{tokenizer.vocab_size} ids"
            )
        self.model = model
        self.tokenizer = tokenizer
        self._backend, self._place = backend, model.device

    @property
    def backend(self) -> DeviceBackend:
        """The device on which it evaluates; where the model was moved since, a plain one for that place."""
        if self._backend is None or self.model.device != self._place:
            return DeviceBackend(self.model.device)
        return self._backend

    def __repr__(self) -> str:
        return f"CharLM({self.model!r}, {self.tokenizer!r})"

    @overload
    def generate(
        self,
        prompt: str = "",
        max_new_tokens: int = 500,
        *,
        stop: Sequence[str] = (),
        keep_stop: bool = False,
        banned: str = "",
        allowed: str | None = None,
        regex: str | None = None,
        choices: Sequence[str] | None = None,
        **sampling: Unpack[Sampling],
    ) -> str: ...
    @overload
    def generate(
        self,
        prompt: list[str] | tuple[str, ...],
        max_new_tokens: int = 500,
        *,
        stop: Sequence[str] = (),
        keep_stop: bool = False,
        banned: str = "",
        allowed: str | None = None,
        regex: str | None = None,
        choices: Sequence[str] | None = None,
        **sampling: Unpack[Sampling],
    ) -> list[str]: ...

    def generate(
        self,
        prompt: str | list[str] | tuple[str, ...] = "",
        max_new_tokens: int = 500,
        *,
        stop: Sequence[str] = (),
        keep_stop: bool = False,
        banned: str = "",
        allowed: str | None = None,
        regex: str | None = None,
        choices: Sequence[str] | None = None,
        **sampling: Unpack[Sampling],
    ) -> str | list[str]:
        """Continue a text, or several texts at once.

        Args:
            prompt: a text, or a list or tuple of texts of any lengths. An empty one begins where a new line
                begins: after a line feed, which is not returned.
            max_new_tokens: the most ids to add to each: characters, or bytes with a `ByteTokenizer`.
            stop: strings that end a text, looked for in what is new; the text ends before the first.
            keep_stop: let it end with the stop string instead.
            banned: characters that are never written; with a `ByteTokenizer`, of ASCII.
            allowed: the only characters that are written; None: all but the banned ones.
            regex: a regular expression, as Python's `re` has it, which all that is new matches, from its
                beginning to its end. It ends where the model would go on otherwise, at the latest with
                `max_new_tokens`; see the guide to generation.
            choices: texts, one of which is all that is new. At most one of regex, choices and the option
                constraint may be given, and no stop beside them.
            sampling: temperature, top_k, top_p, min_p, filters, banned_ids, repetition_penalty, seed,
                use_cache, overflow, draft and constraint, as in `LanguageModel.generate`, but that overflow
                is "restart" if not given.

        Returns:
            The prompt with its continuation; a list of them, in order, for a list. A
            prompt gets the same text alone and in a batch if it stands at the same place in it.
            With a `ByteTokenizer`, bytes that are no whole character, as at the end, are U+FFFD; to go on
            behind them, give the ids to `LanguageModel.generate`.

        Raises:
            UnknownCharacterError: a prompt or a choice has a character that the tokenizer lacks.
            InputError: an option is wrong, all characters are banned, or no text of at most `max_new_tokens`
                ids matches.

        Example:
            >>> from charlm import BigramLM, CharTokenizer
            >>> lm = CharLM(BigramLM(3), CharTokenizer("abc"))
            >>> [len(text) for text in lm.generate(["a", "abc"], 7, seed=1)]
            [8, 10]
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        contexts = self._contexts(prompts)
        count, options = self._options(max_new_tokens, sampling, banned, allowed)
        options = self._constrained(options, regex, choices, stop)
        matchers = [StopMatcher(stop, keep=keep_stop) for _ in prompts]
        new = self._continued(contexts, count, options, matchers if stop else [])
        texts = [f"{as_text(given)}{added}" for given, added in zip(prompts, new, strict=True)]
        return texts[0] if isinstance(prompt, str) else texts

    def stream(
        self,
        prompt: str = "",
        max_new_tokens: int = 500,
        *,
        stop: Sequence[str] = (),
        keep_stop: bool = False,
        banned: str = "",
        allowed: str | None = None,
        regex: str | None = None,
        choices: Sequence[str] | None = None,
        **sampling: Unpack[Sampling],
    ) -> Iterator[str]:
        """Yield what `generate` would add to one prompt, in pieces of whole characters, as they come.

        Arguments and errors are those of `generate`; they are checked here, before the first piece.
        Closing the iterator ends the work.

        Example:
            >>> from charlm import BigramLM, CharTokenizer
            >>> lm = CharLM(BigramLM(3), CharTokenizer("abc"))
            >>> "ab" + "".join(lm.stream("ab", 10, seed=1)) == lm.generate("ab", 10, seed=1)
            True
        """
        if not isinstance(prompt, str):
            raise InputError(f"prompt must be a str, got {type(prompt).__name__}; generate() takes several")
        contexts = self._contexts([prompt])
        count, options = self._options(max_new_tokens, sampling, banned, allowed)
        options = self._constrained(options, regex, choices, stop)
        matcher = StopMatcher(stop, keep=keep_stop)
        return self._pieces(continue_ids(self.model, self._tensors(contexts), count, options), matcher)

    def log_probs(
        self, text: str, *, prompt: str = "", overflow: Overflow = "restart"
    ) -> NDArray[np.float64]:
        """Return how likely the model holds each character of a text, where it stands.

        Args:
            text: what is scored, at least one character.
            prompt: what stands before it; an empty one is a line feed, as in `generate`.
            overflow: as in `generate`, whose texts are then scored as they were predicted.

        Returns:
            (n,) natural logarithms of the probabilities, at temperature 1 and without filters; one for each
            character, with a `ByteTokenizer` one for each byte.

        Raises:
            UnknownCharacterError: there is a character that the tokenizer lacks.
            InputError: an argument is wrong.

        Example:
            >>> from charlm import BigramLM, CharTokenizer
            >>> lm = CharLM(BigramLM(3), CharTokenizer("abc"))
            >>> lm.log_probs("abc").shape
            (3,)
        """
        if not isinstance(text, str) or not text:
            raise InputError(f"text must be a str of at least one character, got {shown(text)}")
        state = self.model.new_state(overflow=overflow)
        state.observe(self._tensors(self._contexts([prompt])))
        return state.score(self._tensors([self.tokenizer.encode(text)]))[0].cpu().numpy()

    def rank(
        self, continuations: Sequence[str], *, prompt: str = "", overflow: Overflow = "restart"
    ) -> list[tuple[str, float]]:
        """Return continuations of one prompt with how likely the model holds each, the likeliest first.

        Longer ones are less likely; to compare them by the character, divide by their lengths.

        Args:
            continuations: texts, each of at least one character.
            prompt: what stands before each of them; an empty one is a line feed, as in `generate`.
            overflow: as in `log_probs`.

        Returns:
            Each with the natural logarithm of its probability, the sum of its `log_probs`. Of equals, the
            earlier comes first.

        Raises:
            UnknownCharacterError: there is a character that the tokenizer lacks.
            InputError: an argument is wrong.

        Example:
            >>> from charlm import CharTokenizer, NGramLM
            >>> tokenizer = CharTokenizer("abc")
            >>> data = BlockDataset.from_text("abc" * 50, tokenizer, block_size=3)
            >>> lm = CharLM(NGramLM(3).fit(data), tokenizer)
            >>> [text for text, _ in lm.rank(["bcb", "bca"], prompt="a")]
            ['bca', 'bcb']
        """
        if not isinstance(continuations, list | tuple):
            raise InputError(f"continuations must be a list or tuple of str, got {shown(continuations)}")
        for text in continuations:
            if not isinstance(text, str) or not text:
                raise InputError(
                    f"each continuation must be a str of at least one character, got {shown(text)}"
                )
        ids = self._tensors([self.tokenizer.encode(text) for text in continuations])
        state = self.model.new_state(overflow=overflow)
        state.observe(self._tensors(self._contexts([prompt])))
        found: list[tuple[str, float]] = []
        for at in range(0, len(ids), _RANKED_AT_ONCE):
            some = ids[at : at + _RANKED_AT_ONCE]
            scores = state.fork([0] * len(some)).score(some)  # the prompt is read once
            found += zip(continuations[at:], (score.sum().item() for score in scores), strict=False)
        return sorted(found, key=lambda one: -one[1])

    def evaluate(self, text: str, *, block_size: int | None = None) -> EvalResult:
        """Score a text exactly: every character but the first is predicted once.

        With a `ByteTokenizer`, the figures per character are per byte.

        Args:
            text: at least two characters.
            block_size: length of the windows, each read by itself, at most the text's. None: the model's
                block_size, or 4,096 for a model without a limit (fewer with a vocabulary of thousands).

        Raises:
            UnknownCharacterError: the text has a character that the tokenizer lacks.
            DataError: the text has fewer than two characters.

        Example:
            >>> from charlm import BigramLM, CharTokenizer
            >>> lm = CharLM(BigramLM(2), CharTokenizer("ab"))
            >>> lm.evaluate("abab").n_chars
            3
        """
        data = self._windows(text, block_size)
        result = evaluate(self.model, data, backend=self.backend)
        return dataclasses.replace(result, n_bytes=self._predicted_bytes(text))

    def surprisal(self, text: str, *, block_size: int | None = None, top: int = 0) -> Surprisal:
        """Return how surprised the model is by each character of a text, in the windows of `evaluate`.

        The first character of the text has nothing before it and is not predicted: its `bits` are NaN, its
        `rank` and `context` 0. The mean over all others is the loss of `evaluate`. With a `ByteTokenizer`
        there is one figure for each byte. `charlm.evaluation.surprisal_page` shows the text with them.

        Args:
            text: at least two characters, N.
            block_size: as in `evaluate`: a character is predicted from those before it in its window.
            top: how many of the likeliest candidates to keep for each character.

        Returns:
            Bits, entropy, rank and context of each character, (N,) each, and the evaluation of the text.

        Raises:
            UnknownCharacterError: the text has a character that the tokenizer lacks.
            DataError: the text has fewer than two characters.
            InputError: `top` is wrong.

        Example:
            >>> from charlm import BigramLM, CharTokenizer
            >>> lm = CharLM(BigramLM(2), CharTokenizer("ab"))
            >>> found = lm.surprisal("abab")
            >>> found.bits.shape, found.context.tolist()
            ((4,), [0, 1, 2, 3])
        """
        data = self._windows(text, block_size)
        found = surprisal(self.model, data, top=top, backend=self.backend)
        result = dataclasses.replace(found.result, n_bytes=self._predicted_bytes(text))
        return dataclasses.replace(found, result=result, text=text)

    def extend(self, text: str, *, block_size: int | None = None) -> CharLM:
        """Return a copy that knows the characters of a text, too, to be trained on it.

        Old characters keep their ids, and what the model has learnt of them stays, bit for bit: their logits
        are those of the model. A new character begins as the mean of the old ones. `Trainer` trains
        `lm.model` on a `BlockDataset` made with `lm.tokenizer`; a tenth of a recipe's learning rate is a good
        begin.

        Args:
            text: the new text, or all characters that are to be known.
            block_size: T of the copy: shorter, or with rotary positions longer. None: as it is.

        Returns:
            A new `CharLM`; this one stays as it is. With a `ByteTokenizer` there is nothing to add.

        Raises:
            InputError: the model counts characters, as an `NGramLM` does, or the tokenizer is not one of
                charlm's.
            ConfigError: there can be no such `block_size`.

        Example:
            >>> from charlm import BigramLM, CharTokenizer
            >>> lm = CharLM(BigramLM(3), CharTokenizer("abc"))
            >>> lm.extend("cabbage").tokenizer
            <CharTokenizer of 5 characters: 'abceg'>
        """
        tokenizer = self.tokenizer
        if isinstance(tokenizer, CharTokenizer):
            tokenizer = tokenizer.extend(text)
        elif not isinstance(tokenizer, ByteTokenizer):
            raise InputError(f"extend needs one of charlm's tokenizers, and the model has {shown(tokenizer)}")
        changes = {} if block_size is None else {"block_size": block_size}
        return CharLM(extended(self.model, tokenizer.vocab_size, **changes), tokenizer, backend=self._backend)

    def save(self, directory: str | Path) -> None:
        """Write config.json, tokenizer.json and model.safetensors into a directory of their own.

        Args:
            directory: missing, empty, or one that holds a saved model, which is replaced.

        Raises:
            CheckpointWriteError: it could not be written. What was there before is intact.
            RunExistsError: the directory holds other files.
        """
        save_model(self.model, directory, self.tokenizer)

    def _windows(self, text: str, block_size: int | None) -> BlockDataset:
        """Return a text in the windows in which it is evaluated."""
        ids = self.tokenizer.encode_array(text)
        if len(ids) < 2:
            unit = unit_of(self.tokenizer)
            raise DataError(f"the text must have at least two {unit}s to predict one, got {len(ids)}")
        if block_size is None:
            block_size = self.model.block_size or unlimited_window(self.model.vocab_size)
        return BlockDataset(ids, min(int_from(1, block_size, "block_size"), len(ids) - 1))

    def _predicted_bytes(self, text: str) -> int:
        """Return the bytes of UTF-8 of all characters but the first; with a `ByteTokenizer`, all but one."""
        first = 1 if isinstance(self.tokenizer, ByteTokenizer) else len(text[0].encode())
        return len(text.encode()) - first

    def _contexts(self, prompts: Sequence[str]) -> list[list[int]]:
        if not isinstance(prompts, list | tuple) or not all(isinstance(prompt, str) for prompt in prompts):
            raise InputError("prompt must be a str, or a list or tuple of str")
        return [self.tokenizer.encode(prompt) or start_ids(self.tokenizer) for prompt in prompts]

    def _options(
        self, max_new_tokens: int, sampling: Sampling, banned: str, allowed: str | None
    ) -> tuple[int, SamplingOptions]:
        count = int_from(0, max_new_tokens, "max_new_tokens")
        options: Sampling = {"overflow": "restart", **sampling}
        if banned or allowed is not None:
            chosen = SamplingOptions.from_keywords({"banned_ids": sampling.get("banned_ids", ())}).banned_ids
            options["banned_ids"] = [*chosen, *banned_ids(self.tokenizer, banned, allowed)]
        beside = ["max_new_tokens", "stop", "keep_stop", "banned", "allowed", "regex", "choices"]
        return count, SamplingOptions.from_keywords(options, beside=beside)

    def _constrained(
        self, options: SamplingOptions, regex: str | None, choices: Sequence[str] | None, stop: Sequence[str]
    ) -> SamplingOptions:
        """Return options with what is wished for as their constraint."""
        given = {"regex": regex, "choices": choices, "constraint": options.constraint}
        names = [name for name, value in given.items() if value is not None]
        if len(names) > 1 or (names and stop):
            names += ["stop"] if stop else []
            raise InputError(f"{' and '.join(names)} exclude each other; give one of them")
        if regex is None and choices is None:
            return options
        constraint = automaton_of(self.tokenizer, regex, choices, options.banned_ids)
        return dataclasses.replace(options, constraint=constraint)

    def _tensors(self, contexts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        return [
            torch.tensor(ids, dtype=torch.int64, device=self.model.device) for ids in contexts
        ]  # (t,) each

    def _continued(
        self,
        contexts: Sequence[Sequence[int]],
        max_new_tokens: int,
        options: SamplingOptions,
        matchers: Sequence[StopMatcher],
    ) -> list[str]:
        """Return the new text of each row; no matchers: no stop strings."""
        if not contexts:
            return []
        if len(matchers) > 1:
            return self._until_stopped(contexts, max_new_tokens, options, matchers)
        if matchers:
            steps = continue_ids(self.model, self._tensors(contexts), max_new_tokens, options)
            return ["".join(self._pieces(steps, matchers[0]))]
        texts = continued(self.model, self._tensors(contexts), max_new_tokens, options)
        return [self.tokenizer.decode(text[len(ids) :]) for text, ids in zip(texts, contexts, strict=True)]

    def _until_stopped(
        self,
        contexts: Sequence[Sequence[int]],
        max_new_tokens: int,
        options: SamplingOptions,
        matchers: Sequence[StopMatcher],
    ) -> list[str]:
        """Return the new text of several rows, each up to its stop string, where it leaves the loop."""
        state = self.model.new_state(len(contexts), overflow=options.overflow, use_cache=options.use_cache)
        state.observe(self._tensors(contexts))
        decoders = [StreamDecoder(self.tokenizer) for _ in contexts]
        texts: list[list[str]] = [[] for _ in contexts]
        going = list(range(len(contexts)))
        for _ in range(max_new_tokens):
            for row, i in zip(going, next_ids(state, options, going).tolist(), strict=True):
                texts[row].append(matchers[row].feed(decoders[row].feed([i])))
            left = [at for at, row in enumerate(going) if not matchers[row].stopped]
            if not left:
                break
            if len(left) < len(going):  # the others need not wait for those that are done
                state, going = state.fork(left), [going[at] for at in left]
        rest = [m.feed(d.finish()) + m.finish() for m, d in zip(matchers, decoders, strict=True)]
        return ["".join(pieces) + end for pieces, end in zip(texts, rest, strict=True)]

    def _pieces(self, steps: Iterator[torch.Tensor], matcher: StopMatcher) -> Iterator[str]:
        decoder = StreamDecoder(self.tokenizer)
        for ids in steps:
            piece = matcher.feed(decoder.feed(ids.tolist()))
            if piece:
                yield piece
            if matcher.stopped:
                return
        piece = matcher.feed(decoder.finish()) + matcher.finish()
        if piece:
            yield piece


def load(
    path: str | Path,
    *,
    device: str | DeviceBackend = "auto",
    mixture: bool = True,
    weights: Storage | None = None,
) -> CharLM:
    """Open a saved model, a checkpoint, or the result of a training run, without executing anything.

    The result of a run is the model of its best checkpoint or, where `charlm train` found that one better,
    the mixture of that and the n-gram model.

    Args:
        path: the directory.
        device: where the model goes: a name for `get_backend`, or a backend.
        mixture: of a run, take the mixture if there is one. False: the trained model alone.
        weights: "float32", or round a GPT's matrices so that 16 ("bfloat16") or 8 ("int8") bits hold them.
            The model stays one in float32, and predicts, scores and saves what the rounded weights say; the
            compiled engine reads the fewer bits, which is quicker. None: as saved.

    Raises:
        InputError: there are no such weights, or the model is no GPT.
        CheckpointError: nothing that can be loaded lies there.
        FileFormatError: a file's content is refused.

    Example:
        >>> import tempfile
        >>> from charlm import BigramLM, CharTokenizer
        >>> folder = tempfile.mkdtemp() + "/model"
        >>> CharLM(BigramLM(3), CharTokenizer("abc")).save(folder)
        >>> load(folder, device="cpu").tokenizer
        <CharTokenizer of 3 characters: 'abc'>
    """
    directory = as_path(path)
    backend = get_backend(device)
    files, where = model_files_at(directory, mixture=mixture)
    if CONFIG_FILE not in files:
        raise CheckpointError(
            f"{quoted(str(where))} is a training-only checkpoint of a module that is no LanguageModel; "
            "go on with Trainer.resume(..., model=...)"
        )
    tokenizer = build_tokenizer(files, where)
    model = build_model(files, where, LanguageModel)
    if weights is not None:
        round_weights(model, weights)
    backend.prepare(model)
    return CharLM(model.eval(), tokenizer, backend=backend)
