"""`LanguageModel`: the base class of every model.

A model maps ids (B, T) to the logits (B, T, V) of each next id. This class adds `generate`, `stream` and
`log_probs`; `charlm.models.saving` saves and loads. It knows no characters, no training, and of devices only
the one that holds its parameters.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack, override

from charlm.errors import InputError, shown
from charlm.generation.cache import Cache
from charlm.generation.engine import Engine, TorchEngine
from charlm.generation.options import Overflow, Sampling, SamplingOptions
from charlm.generation.state import PredictionState
from charlm.generation.stream import continue_ids, continued
from charlm.models.config import ModelConfig
from charlm.models.registry import register
from charlm.models.saving import load_model, save_model
from charlm.plain import as_bool, int_from

__all__ = ["LanguageModel", "cross_entropy"]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean negative log likelihood of the targets, in nats; targets of -1 are ignored.

    Args:
        logits: (B, T, V). Half precision is widened to float32 first.
        targets: (B, T) int64.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide.flatten(0, 1), targets.flatten(), ignore_index=-1)


class LanguageModel(nn.Module, ABC):
    """Base of all models: ids in, logits of the next id out.

    A subclass sets `kind` and `config_class`, and defines `__init__`, `from_config` and `forward`; a cache is
    optional. Its config is a `charlm.models.config.ModelConfig` with `num_parameters()`. A subclass of a
    model of charlm needs its own `kind` to be saved.

    Attributes:
        kind: the name of the class in config.json.
        config_class: the class of its settings.
        config: the frozen, complete settings.
    """

    kind: ClassVar[str]
    config_class: ClassVar[type[ModelConfig]]
    config: ModelConfig

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "kind" in cls.__dict__:
            register(cls.kind, cls)

    @classmethod
    @abstractmethod
    def from_config(cls, config: Any) -> Self:
        """Build a new model from its settings.

        Args:
            config: an instance of `config_class`, or a mapping of its fields, for example from JSON.

        Raises:
            ConfigError: a field is unknown, missing or bad.
        """

    @property
    def vocab_size(self) -> int:
        """V, the number of different ids."""
        return self.config.vocab_size

    @property
    def block_size(self) -> int | None:
        """The most ids that the model sees at once; None: no limit."""
        return None

    @property
    def device(self) -> torch.device:
        """The device of the model's tensors."""
        return next(itertools.chain(self.parameters(), self.buffers())).device

    @abstractmethod
    def forward(
        self, idx: Tensor, targets: Tensor | None = None, *, cache: Cache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Predict the next id after each id.

        Args:
            idx: (B, T) int64 in [0, V), T at most `block_size`, the ids in the cache included.
            targets: (B, T) int64, the ids that follow; -1 is ignored.
            cache: the state after the ids before these; the pass updates it. Only without gradients.

        Returns:
            Logits (B, T, V), and the mean loss in nats over the targets that are not -1 (NaN if there are
            none), or None without targets.

        Raises:
            InputError: wrong type, shape, range or device.
        """

    if TYPE_CHECKING:

        @overload
        def __call__(
            self, idx: Tensor, targets: None = None, *, cache: Cache | None = None
        ) -> tuple[Tensor, None]: ...
        @overload
        def __call__(
            self, idx: Tensor, targets: Tensor, *, cache: Cache | None = None
        ) -> tuple[Tensor, Tensor]: ...

    def __call__(
        self, idx: Tensor, targets: Tensor | None = None, *, cache: Cache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Call `forward`, through torch's hooks."""
        try:
            return cast("tuple[Tensor, Tensor | None]", super().__call__(idx, targets, cache=cache))
        except IndexError:  # raised by torch's embedding or loss; this check costs nothing if all is well
            self._check_range("idx", idx, lowest=0)
            if targets is not None:
                self._check_range("targets", targets, lowest=-1)
            raise

    def new_cache(self) -> Cache | None:
        """Return an empty cache for one generation, or None if the model keeps none."""
        return None

    def generate(self, idx: Tensor, max_new_tokens: int, **sampling: Unpack[Sampling]) -> Tensor:
        """Continue each row of ids.

        Args:
            idx: (B, T0) int64, T0 at least 1; may be longer than `block_size`.
            max_new_tokens: the number of ids to add, 0 or more.
            sampling: the options of `SamplingOptions`, by name. temperature divides the logits; 0 always
                takes the likeliest id. top_k, top_p and min_p keep the likeliest ids. filters are functions
                (logits (B, V), ids so far (B, t)) -> logits, applied last. banned_ids are never chosen.
                repetition_penalty makes the last 64 ids less likely. The same seed gives the same ids for
                any batch size; None draws a seed from torch's global generator. use_cache changes speed,
                never the result. overflow says what happens past `block_size`: "slide" by one id each time,
                or "restart" from the last half. draft is a faster model with the same vocabulary, such as an
                `NGramLM`, which guesses ahead if there is one row; it changes speed, though in PyTorch
                rounding may change an id in rare cases. constraint is a `charlm.generation.Constraint` that
                the new ids of each row must match.

        Returns:
            (B, T0 + max_new_tokens) int64: prompt and continuation. With a constraint, texts may end earlier;
            the result is as wide as the longest, padded with -1.

        Raises:
            TypeError: an option is unknown; the message names a similar one.
            InputError: an argument is wrong.
            NonFiniteError: the model's logits hold NaN, or the filters removed every id.

        Example:
            >>> from charlm import BigramLM
            >>> BigramLM(65).generate(torch.zeros(1, 1, dtype=torch.long), 100, seed=1337).shape
            torch.Size([1, 101])
        """
        texts = continued(self, *self._checked(idx, max_new_tokens, sampling))
        return nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=-1)

    def stream(self, idx: Tensor, max_new_tokens: int, **sampling: Unpack[Sampling]) -> Iterator[Tensor]:
        """Yield the ids that `generate` would add, as soon as they are chosen.

        Arguments and errors are those of `generate`; they are checked here, before the first step.

        Yields:
            (B,) int64, `max_new_tokens` times. With a constraint, until all texts have ended; -1 for a text
            that has ended.

        Example:
            >>> from charlm import BigramLM
            >>> steps = BigramLM(65).stream(torch.zeros(1, 1, dtype=torch.long), 100, seed=1337)
            >>> next(steps).shape, len(list(steps))
            (torch.Size([1]), 99)
        """
        return continue_ids(self, *self._checked(idx, max_new_tokens, sampling))

    def _checked(
        self, idx: Tensor, max_new_tokens: int, sampling: Sampling
    ) -> tuple[Tensor, int, SamplingOptions]:
        self._check_idx(idx)
        self._check_range("idx", idx, lowest=0)
        count = int_from(0, max_new_tokens, "max_new_tokens")
        return idx, count, SamplingOptions.from_keywords(sampling, beside=["max_new_tokens"])

    def new_state(
        self, rows: int = 1, *, overflow: Overflow = "slide", use_cache: bool = True
    ) -> PredictionState:
        """Return an empty state, to predict, observe and fork step by step.

        `generate`, `stream` and `log_probs` use it.

        Args:
            rows: B, the number of texts.
            overflow: past `block_size`, "slide" by one id each time, or "restart" from the last half.
            use_cache: changes speed, never the result.

        Raises:
            InputError: an argument is wrong.

        Example:
            >>> from charlm import BigramLM
            >>> state = BigramLM(65).new_state()
            >>> state.observe(torch.tensor([[24, 43]]))
            >>> state.predict().shape
            torch.Size([1, 65])
        """
        cached = as_bool(use_cache)
        if cached is None:
            raise InputError(f"use_cache must be True or False, got {shown(use_cache)}")
        engine = self._native_engine(rows) if cached else None
        return PredictionState(engine or TorchEngine(self, rows, use_cache=cached), overflow=overflow)

    def why_not_native(self) -> str | None:
        """Return the reason why this model generates in PyTorch; None: the compiled engine generates.

        The first call on a machine compiles the engine, which takes about a second.

        Example:
            >>> from charlm import BigramLM
            >>> BigramLM(65).why_not_native()
            'there is no compiled engine for a BigramLM'
        """
        return f"there is no compiled engine for a {type(self).__name__}"

    def _native_engine(self, rows: int) -> Engine | None:
        """Return the compiled engine, or None if `why_not_native` gives a reason."""
        return None

    def log_probs(self, idx: Tensor, *, overflow: Overflow = "slide") -> Tensor:
        """Return the log-probability of each id after those before it.

        Args:
            idx: (B, T) int64, T at least 1; may be longer than `block_size`.
            overflow: as in `generate`; with the same value, generated ids are scored as they were predicted.

        Returns:
            (B, T - 1) float64, natural logarithms of the probabilities of all ids but the first, at
            temperature 1 and without filters.

        Raises:
            InputError: an argument is wrong.

        Example:
            >>> from charlm import BigramLM
            >>> BigramLM(65).log_probs(torch.tensor([[24, 43, 58]])).shape
            torch.Size([1, 2])
        """
        self._check_idx(idx)
        self._check_range("idx", idx, lowest=0)
        state = self.new_state(idx.size(0), overflow=overflow)
        state.observe(idx[:, :1])
        return torch.stack(state.score(idx[:, 1:]))

    def num_parameters(self) -> int:
        """Return the number of parameters; a tied matrix counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def save(self, directory: str | Path) -> None:
        """Write config.json and model.safetensors into a directory of their own.

        Args:
            directory: missing, empty, or that of a saved model, which is replaced.

        Raises:
            CheckpointWriteError: it could not be written. A model that was there before is intact.
            RunExistsError: the directory holds other files.
        """
        save_model(self, directory)

    @classmethod
    def load(cls, directory: str | Path) -> Self:
        """Read a saved model, or the model of a checkpoint, onto the CPU.

        `LanguageModel.load` reads a model of any kind.

        Args:
            directory: of the saved model or checkpoint.

        Raises:
            CheckpointError: there is no model, or one of another class.
            FileFormatError: a file's content is refused.

        Example:
            >>> import tempfile
            >>> from charlm import BigramLM
            >>> folder = tempfile.mkdtemp() + "/model"
            >>> BigramLM(65).save(folder)
            >>> LanguageModel.load(folder)
            BigramLM(vocab_size=65)  # 4,225 parameters
        """
        return load_model(directory, cls)

    @override
    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in self.config.to_dict().items())
        return f"{type(self).__name__}({fields})  # {self.num_parameters():,} parameters"

    def _check_values(self) -> None:
        """Raise InputError if the tensors hold impossible values; called after loading.

        All values are accepted here. Subclasses whose tensors index one another override it.
        """

    def _check_idx(self, idx: Tensor, targets: Tensor | None = None) -> None:
        """Raise InputError unless ids and targets have the type, shape and device that `forward` needs.

        The range is not checked, since that would make a GPU wait.
        """
        device = self.device
        for name, ids in (("idx", idx), ("targets", targets)):
            if name == "targets" and ids is None:
                continue
            if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
                got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
                raise InputError(f"{name} must be an int64 tensor, got {got}")
            if ids.ndim != 2 or ids.size(0) == 0 or ids.size(1) == 0:
                raise InputError(
                    f"{name} must have shape (B, T) with at least one row and one id, got {tuple(ids.shape)}"
                )
            if ids.device != device:
                raise InputError(f"{name} must be on the model's device {device}, got {ids.device}")
        if targets is not None and targets.shape != idx.shape:
            raise InputError(
                f"targets must have the shape of idx, {tuple(idx.shape)}, got {tuple(targets.shape)}"
            )

    def _check_range(self, name: str, ids: Tensor, *, lowest: int) -> None:
        wrong = ((ids < lowest) | (ids >= self.vocab_size)).nonzero()
        if len(wrong):
            row, column = wrong[0].tolist()
            raise InputError(
                f"{name} must be from {lowest} to {self.vocab_size - 1} (vocab_size {self.vocab_size}), "
                f"got {int(ids[row, column])} at row {row}, column {column}"
            )
