"""`Engine` computes predictions; `TorchEngine` does so with any model, in PyTorch, on every device.

A `PredictionState` owns the texts and plans the passes. An engine executes them, and keeps a cache of the ids
that it has read. `charlm.native` has faster engines for a small GPT and for n-grams on a CPU.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import override

from charlm.generation.cache import Cache
from charlm.generation.options import SamplingOptions
from charlm.generation.passes import Pass
from charlm.generation.sampling import sample
from charlm.modes import evaluation_mode
from charlm.plain import int_from

if TYPE_CHECKING:
    from charlm.generation.state import PredictionState

__all__ = ["Engine", "Predictor", "TorchEngine"]


class Engine(ABC):
    """Computes predictions for some rows of text. An engine belongs to one `PredictionState`.

    Args:
        rows: B.
        vocab_size: V.
        block_size: the most ids that it sees at once; None: no limit.
        device: of its logits.

    Raises:
        InputError: `rows` is no int of 1 or more.

    Example:
        >>> from charlm.generation import PredictionState
        >>> class Uniform(Engine):
        ...     def logits(self, texts, passes):
        ...         return [torch.zeros(one.wanted, self.vocab_size) for one in passes]
        ...     def fork(self, rows):
        ...         return Uniform(len(rows), vocab_size=3, block_size=None, device=self.device)
        >>> engine = Uniform(1, vocab_size=3, block_size=None, device=torch.device("cpu"))
        >>> state = PredictionState(engine)
        >>> state.observe(torch.tensor([0]))
        >>> state.predict()
        tensor([[0., 0., 0.]])
    """

    def __init__(self, rows: int, *, vocab_size: int, block_size: int | None, device: torch.device) -> None:
        self.rows: int = int_from(1, rows, "rows")
        self.vocab_size: int = vocab_size
        self.block_size: int | None = block_size
        self.device: torch.device = device

    @abstractmethod
    def logits(self, texts: NDArray[np.int64], passes: Sequence[Pass]) -> list[Tensor]:
        """Execute passes of different rows, and return the logits (t, V) that each asks for.

        If the engine has lost ids that a pass counts as read, it reads them again.

        Args:
            texts: (B, room), the ids of all rows.
            passes: increasing in their rows.
        """

    @abstractmethod
    def fork(self, rows: Sequence[int]) -> Self:
        """Return a copy for some rows; a number may occur several times."""

    def choose(
        self, logits: Tensor, options: SamplingOptions, uniforms: NDArray[np.float64] | None
    ) -> Tensor:
        """Filter, and draw one id for each row of logits.

        Args:
            logits: (n, V), of this engine.
            options: how to choose, without filters of the caller.
            uniforms: (n,) uniform numbers; None: take the likeliest id.

        Returns:
            (n,) int64.

        Raises:
            NonFiniteError: no id can be chosen in a row.
        """
        return sample(options.filter(logits), uniforms)

    def turn(
        self, state: PredictionState, options: SamplingOptions, addresses: Sequence[int]
    ) -> Tensor | None:
        """Do a whole turn of the loop at once, if the engine has a faster way than `decode.one_turn`.

        Args:
            state: the state of this engine; it is told by `took`.
            options: as for `next_ids`.
            addresses: as for `next_ids`.

        Returns:
            (B,) int64; None if the engine has no faster way, as here.
        """
        return None

    def turns(
        self, state: PredictionState, options: SamplingOptions, addresses: Sequence[int], most: int
    ) -> Tensor | None:
        """Do one or more turns at once; the engine chooses how many. By default it is one `turn`.

        Args:
            state: as for `turn`.
            options: as for `turn`.
            addresses: as for `turn`.
            most: the most turns.

        Returns:
            (t B,) int64, one turn after the other; None if the engine has no faster way.
        """
        return self.turn(state, options, addresses)


class Predictor(Protocol):
    """The interface of a model in generation. Every `charlm.LanguageModel` has it."""

    @property
    def vocab_size(self) -> int:
        """V, the number of different ids."""

    @property
    def block_size(self) -> int | None:
        """The most ids that it can see at once; None: no limit."""

    @property
    def device(self) -> torch.device:
        """The device of the ids."""

    def new_cache(self) -> Cache | None:
        """Return an empty cache for one generation, or None if the model keeps none."""

    def modules(self) -> Iterator[nn.Module]:
        """Iterate over the model and its parts, as `nn.Module.modules` does."""

    def __call__(
        self, idx: Tensor, targets: None = None, *, cache: Cache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the logits (B, t, V) after each of the ids (B, t), which follow those in the cache."""


@dataclass
class _Kept:
    """A cache of the ids at the positions `begin` to `stop` of some rows."""

    rows: list[int]  # at the time of the pass; some of them may have another cache since
    cache: Cache
    begin: int
    stop: int


class TorchEngine(Engine):
    """Runs the model in PyTorch. Rows that are read at the same positions share their passes.

    Args:
        model: the model. It is in evaluation mode during each pass, and restored after it.
        rows: B.
        use_cache: keep a cache of the ids that were read. Changes speed, never the result.

    Example:
        >>> from charlm import BigramLM
        >>> from charlm.generation import PredictionState
        >>> state = PredictionState(TorchEngine(BigramLM(65), rows=2))
        >>> state.observe([torch.tensor([24, 43]), torch.tensor([58])])
        >>> state.lengths, state.predict().shape
        ([2, 1], torch.Size([2, 65]))
    """

    def __init__(self, model: Predictor, rows: int = 1, *, use_cache: bool = True) -> None:
        super().__init__(rows, vocab_size=model.vocab_size, block_size=model.block_size, device=model.device)
        self._model = model
        self._use_cache = use_cache
        self._kept: dict[int, _Kept] = {}  # by row; rows that were read together share one

    @override
    def logits(self, texts: NDArray[np.int64], passes: Sequence[Pass]) -> list[Tensor]:
        together: dict[tuple[int | None, Pass], list[int]] = {}
        for one in passes:
            shared = id(self._kept.get(one.row)) if one.start > one.begin else None
            together.setdefault((shared, one._replace(row=-1)), []).append(one.row)
        results: dict[int, Tensor] = {}
        for (_, one), rows in together.items():
            results.update(zip(rows, self._run(texts, rows, one), strict=True))
        return [results[one.row] for one in passes]

    def _run(self, texts: NDArray[np.int64], rows: list[int], one: Pass) -> Tensor:
        """Execute a pass for several rows with a common cache, and return (Bg, t, V)."""
        # A cache may be written to later, when the caller has left inference mode.
        with torch.inference_mode(mode=False), torch.no_grad(), evaluation_mode(self._model):
            kept = self._taken_up(rows, one) if one.start > one.begin else None
            if kept is None:
                cache = self._model.new_cache() if self._use_cache and one.has_room else None
                start = one.begin
            else:
                cache, start = kept.cache, one.start
            ids = torch.from_numpy(texts[rows, start : one.stop]).to(self.device)  # (Bg, t)
            for row in rows:
                self._kept.pop(row, None)  # until the pass has succeeded
            logits, _ = self._model(ids, cache=cache)  # (Bg, t, V)
        if cache is not None:
            kept = _Kept(rows, cache, one.begin, one.stop)
            self._kept.update(dict.fromkeys(rows, kept))
        return logits[:, logits.size(1) - one.wanted :]

    def _taken_up(self, rows: list[int], one: Pass) -> _Kept | None:
        """Return the cache of these rows up to the start of the pass, or None if it is lost."""
        kept = self._kept.get(rows[0])
        if kept is None or kept.begin != one.begin or kept.stop < one.start:
            return None
        cache: Cache | None = kept.cache
        if kept.rows != rows:
            cache = kept.cache.fork([kept.rows.index(row) for row in rows])
        if cache is None or (kept.stop > one.start and not cache.truncate(one.start - one.begin)):
            return None
        return _Kept(rows, cache, one.begin, one.start)

    @override
    def fork(self, rows: Sequence[int]) -> Self:
        twin = type(self)(self._model, len(rows), use_cache=self._use_cache)
        together: dict[int, list[int]] = {}  # new numbers of the rows that share a cache
        for new, old in enumerate(rows):
            if old in self._kept:
                together.setdefault(id(self._kept[old]), []).append(new)
        for picked in together.values():
            kept = self._kept[rows[picked[0]]]
            with torch.inference_mode(mode=False):
                cache = kept.cache.fork([kept.rows.index(rows[new]) for new in picked])
            if cache is not None:
                copy = _Kept(picked, cache, kept.begin, kept.stop)
                twin._kept.update(dict.fromkeys(picked, copy))
        return twin
