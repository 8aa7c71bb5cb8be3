"""`CharLM`: a model with its tokenizer, text in and text out; and `load`, which reads both.

Most programs use this class. `charlm.generation` samples, `charlm.evaluation` computes losses, and
`charlm.models.saving` reads and writes files.
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

_RANKED_AT_ONCE = 64  # texts, to limit the memory of their caches


class CharLM:
    """A language model that takes and returns text.

    Args:
        model: any `LanguageModel`.
        tokenizer: the tokenizer that the model was trained with.
        backend: the backend that prepared the model, as in `load`; None: a plain one for its device.

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
        """The backend for evaluations; a plain one if the model was moved to another device."""
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
            prompt: a text, or a list or tuple of texts of any lengths. An empty prompt begins at a new line:
                after a line feed, which is not returned.
            max_new_tokens: the most tokens to add to each text: characters, or bytes with a `ByteTokenizer`.
            stop: strings that end the new text; the text ends before the first one.
            keep_stop: keep the stop string as the end of the text.
            banned: characters that are never generated; with a `ByteTokenizer`, only of ASCII.
            allowed: the only characters that are generated; None: all but the banned ones.
            regex: a regular expression of Python's `re` that the new text matches as a whole. The text may
                end wherever it matches, and ends after `max_new_tokens` at the latest; see the guide to
                generation.
            choices: texts; the new text is one of them. At most one of regex, choices and the option
                constraint may be given, and none of them with stop.
            sampling: temperature, top_k, top_p, min_p, filters, banned_ids, repetition_penalty, seed,
                use_cache, overflow, draft and constraint, as in `LanguageModel.generate`; but the default of
                overflow is "restart".

        Returns:
            The prompt with its continuation, or a list of these in the order of the prompts. A prompt gets
            the same text alone and in a batch, if it has the same place in the list. With a `ByteTokenizer`,
            the bytes of an incomplete character become U+FFFD; to continue such a text, use the ids with
            `LanguageModel.generate`.

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
        """Yield the continuation of one prompt in pieces of whole characters, as soon as they are generated.

        Arguments and errors are those of `generate`; they are checked before the first piece. Closing the
        iterator stops the generation.

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
        """Return the log-probability of each character of a text.

        Args:
            text: the text to score, at least one character.
            prompt: the text before it; an empty one is a line feed, as in `generate`.
            overflow: as in `generate`; with the same value, generated texts are scored as they were
                predicted.

        Returns:
            (n,) natural logarithms of the probabilities of the characters, or bytes with a `ByteTokenizer`,
            at temperature 1 and without filters.

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
        """Return continuations of one prompt with their log-probabilities, the likeliest first.

        Longer texts are less likely; to compare texts per character, divide by their lengths.

        Args:
            continuations: texts, each of at least one character.
            prompt: the text before each of them; an empty one is a line feed, as in `generate`.
            overflow: as in `log_probs`.

        Returns:
            Each continuation with the sum of its `log_probs`. Equal ones keep their order.

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
        ranked: list[tuple[str, float]] = []
        for at in range(0, len(ids), _RANKED_AT_ONCE):
            some = ids[at : at + _RANKED_AT_ONCE]
            scores = state.fork([0] * len(some)).score(some)  # the prompt is read once
            ranked += zip(continuations[at:], (score.sum().item() for score in scores), strict=False)
        return sorted(ranked, key=lambda one: -one[1])

    def evaluate(self, text: str, *, block_size: int | None = None) -> EvalResult:
        """Evaluate the model on a text exactly: every character but the first is predicted once.

        With a `ByteTokenizer`, the figures are per byte.

        Args:
            text: at least two characters.
            block_size: length of the windows, each read by itself; at most the length of the text. None: the
                model's block_size, or 4,096 for a model without a limit (fewer with a large vocabulary).

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
        """Return the surprisal of each character of a text, in the windows of `evaluate`.

        The first character is not predicted: its `bits` are NaN, its `rank` and `context` 0. The mean over
        all others is the loss of `evaluate`. With a `ByteTokenizer`, the figures are those of bytes.
        `charlm.evaluation.surprisal_page` shows the text with the figures.

        Args:
            text: N characters, at least two.
            block_size: as in `evaluate`: a character is predicted from those before it in its window.
            top: number of likeliest candidates for each character.

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
        """Return a copy whose vocabulary also has the characters of a text, to be trained on it.

        Old characters keep their ids and their logits, bit for bit. A new character begins as the mean of the
        old ones. Train `lm.model` on a `BlockDataset` made with `lm.tokenizer`; a tenth of a recipe's
        learning rate is a good start.

        Args:
            text: the new text, or all new characters.
            block_size: T of the copy: shorter, or with rotary positions also longer. None: the same.

        Returns:
            A new `CharLM`; this one does not change. With a `ByteTokenizer`, no character is added.

        Raises:
            InputError: the model counts n-grams, or the tokenizer is not one of charlm's.
            ConfigError: the model cannot have this `block_size`.

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
            directory: missing, empty, or that of a saved model, which is replaced.

        Raises:
            CheckpointWriteError: it could not be written. A model that was there before is intact.
            RunExistsError: the directory holds other files.
        """
        save_model(self.model, directory, self.tokenizer)

    def _windows(self, text: str, block_size: int | None) -> BlockDataset:
        """Return a text in the windows of its evaluation."""
        ids = self.tokenizer.encode_array(text)
        if len(ids) < 2:
            unit = unit_of(self.tokenizer)
            raise DataError(f"the text must have at least two {unit}s to predict one, got {len(ids)}")
        if block_size is None:
            block_size = self.model.block_size or unlimited_window(self.model.vocab_size)
        T = min(int_from(1, block_size, "block_size"), len(ids) - 1)
        return BlockDataset(ids, T, tokenizer=self.tokenizer)

    def _predicted_bytes(self, text: str) -> int:
        """Return the number of UTF-8 bytes of all predicted characters, or of all bytes but the first."""
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
        """Return options with the constraint of `regex` or `choices`."""
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
        device = self.model.device
        return [torch.tensor(ids, dtype=torch.int64, device=device) for ids in contexts]  # (t,) each

    def _continued(
        self,
        contexts: Sequence[Sequence[int]],
        max_new_tokens: int,
        options: SamplingOptions,
        matchers: Sequence[StopMatcher],
    ) -> list[str]:
        """Return the new text of each row; without matchers there are no stop strings."""
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
        """Return the new text of several rows; a row leaves the loop at its stop string."""
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
            if len(left) < len(going):
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
    """Load a saved model, a checkpoint, or the result of a training run. Nothing in a file is executed.

    The result of a run is the model of its best checkpoint, or its mixture with an n-gram model if
    `charlm train` found that one better.

    Args:
        path: the directory.
        device: the device of the model: a name for `get_backend`, or a backend.
        mixture: load the mixture of a run, if there is one. False: load the trained model alone.
        weights: "float32", or round the matrices of a GPT to 16 ("bfloat16") or 8 ("int8") bits. The
            parameters stay float32 tensors with the rounded values; the compiled engine reads fewer bits,
            which is faster. None: as saved.

    Raises:
        InputError: there is no such value of `weights`, or the model is no GPT.
        CheckpointError: there is nothing to load.
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
