"""`LanguageModel`: what every model of this library is and can do.

A model maps ids (B, T) to the logits of each next id (B, T, V). From that alone this class gives
`generate` and `stream`; saving and loading are `charlm.models.saving`'s. It knows nothing of
characters, training or devices beyond where its parameters lie.
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
    """Return the mean negative log likelihood of the targets, in nats; targets of -1 do not count.

    Args:
        logits: (B, T, V). Half precision is widened to float32 first.
        targets: (B, T) int64.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide.flatten(0, 1), targets.flatten(), ignore_index=-1)


class LanguageModel(nn.Module, ABC):
    """Base of all models: ids in, logits of the next id out.

    A subclass sets `kind` and `config_class`, and gives `__init__`, `from_config` and `forward`; a cache
    is optional. Its config is a `charlm.models.config.ModelConfig` that says `num_parameters()`. A
    subclass of a model here needs a `kind` of its own to be saved.

    Attributes:
        kind: the name under which config.json records the class.
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
            config: an instance of `config_class`, or a mapping of its fields, such as one read from JSON.

        Raises:
            ConfigError: a field is unknown, missing or bad.
        """

    @property
    def vocab_size(self) -> int:
        """V, number of different ids."""
        return self.config.vocab_size

    @property
    def block_size(self) -> int | None:
        """The most ids that the model sees at once; None: no limit."""
        return None

    @property
    def device(self) -> torch.device:
        """Where the model's tensors lie."""
        return next(itertools.chain(self.parameters(), self.buffers())).device

    @abstractmethod
    def forward(
        self, idx: Tensor, targets: Tensor | None = None, *, cache: Cache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Predict the next id after each id.

        Args:
            idx: (B, T) int64 in [0, V), T at most `block_size` (together with what is in the cache).
            targets: (B, T) int64, the ids that follow; -1 where none is to be predicted.
            cache: what the model has read before these ids; it is added to. Only without gradients.

        Returns:
            Logits (B, T, V), and the mean loss in nats over the targets that are not -1 (NaN if all
            are), or None without targets.

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
        except IndexError:  # torch's own, from an embedding or a loss; costs nothing where all is well
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
            max_new_tokens: how many ids to add, 0 or more.
            sampling: options by name, those of `SamplingOptions`. temperature divides the logits, 0 always
                takes the likeliest id. top_k, top_p and min_p keep the likeliest ids. filters are functions
                (logits (B, V), ids so far (B, t)) -> logits, applied last. banned_ids are never chosen,
                and repetition_penalty makes what stands among the last 64 ids less likely. The same seed
                gives the same ids for any batch size; None is one draw from torch's global generator.
                use_cache changes speed, never the result. overflow is what happens past `block_size`: "slide"
                by one id each time, or "restart" from the last half. draft is a quicker model of the same
                vocabulary, such as an `NGramLM`, that guesses ahead where there is one row; it changes speed,
                and in PyTorch rounding may change an id once in a long while. constraint is what the new part
                of each text has to match, a `charlm.generation.Constraint`.

        Returns:
            (B, T0 + max_new_tokens) int64: the prompt and what follows. With a constraint texts may end
            before; they are as wide as the longest, with -1 behind an end.

        Raises:
            TypeError: an option is unknown; names the likely right one.
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
            (B,) int64, `max_new_tokens` times; with a constraint until all texts have ended, and -1 for those
            that have.

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
        """Return a state that has observed nothing: predict, observe and fork by hand.

        `generate`, `stream` and `log_probs` stand on it.

        Args:
            rows: B, how many texts it follows at once.
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
        """Return why this model, as it is now, generates in PyTorch; None: the compiled engine does it.

        The first call on a machine compiles the engine, which takes about a second.

        Example:
            >>> from charlm import BigramLM
            >>> BigramLM(65).why_not_native()
            'there is no compiled engine for a BigramLM'
        """
        return f"there is no compiled engine for a {type(self).__name__}"

    def _native_engine(self, rows: int) -> Engine | None:
        """Return the compiled engine, where `why_not_native` has no reason against it."""
        return None

    def log_probs(self, idx: Tensor, *, overflow: Overflow = "slide") -> Tensor:
        """Return how likely the model holds each id where it stands, whether it was generated or given.

        Args:
            idx: (B, T) int64, T at least 1; may be longer than `block_size`.
            overflow: as in `generate`, whose ids are then scored as they were predicted.

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
        """Return how many parameters the model has; a tied matrix counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def save(self, directory: str | Path) -> None:
        """Write config.json and model.safetensors into a directory of their own.

        Args:
            directory: missing, empty, or one that holds a saved model, which is replaced.

        Raises:
            CheckpointWriteError: it could not be written. What was there before is intact.
            RunExistsError: the directory holds other files.
        """
        save_model(self, directory)

    @classmethod
    def load(cls, directory: str | Path) -> Self:
        """Read a model that `save` wrote, or that of a checkpoint, onto the CPU.

        On `LanguageModel` itself it makes whichever kind was saved.

        Args:
            directory: where it lies.

        Raises:
            CheckpointError: no model lies there, or one of another class.
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
        """Raise InputError if the tensors hold values that cannot be the model's: asked after loading.

        Here all are accepted. For subclasses whose tensors index one another.
        """

    def _check_idx(self, idx: Tensor, targets: Tensor | None = None) -> None:
        """Refuse ids that do not have the type, shape and device that `forward` needs.

        Their range is not looked at: that would make a GPU wait.

        Args:
            idx: (B, T) int64, B and T at least 1.
            targets: of the same shape, or None.

        Raises:
            InputError: they are something else; says what.
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
