"""The options of sampling, which are checked once and applied in a fixed order.

`Sampling` types the keyword arguments, and `SamplingOptions` holds them. The defaults, temperature 1 and no
filter, sample from the model's own distribution.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Protocol, Self, TypedDict, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from charlm import randomness
from charlm.errors import InputError, did_you_mean, shown
from charlm.generation.constraints import Constraint
from charlm.generation.filters import (
    Filter,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalise_repetition,
    remove_ids,
    scale_temperature,
)
from charlm.plain import as_bool, as_float, as_int, as_text

__all__ = ["Draft", "Overflow", "Sampling", "SamplingOptions"]

Overflow = Literal["slide", "restart"]
"""The context past the window: see `charlm.generation.context_start`."""


_REQUIREMENTS = {
    "temperature": "0, or from 1e-6 to 1e6",
    "top_k": "an int, 1 or more, or None",
    "top_p": "above 0 and at most 1, or None",
    "min_p": "from 0 to 1, or None",
    "filters": "a sequence of functions",
    "banned_ids": "ids, 0 or more",
    "repetition_penalty": "from 0.01 to 100",
    "seed": "an int of at most 64 bits, or None",
    "use_cache": "True or False",
    "overflow": "'slide' or 'restart'",
    "draft": "a language model, or None",
    "constraint": "an object with the methods of a Constraint, or None",
}


class Draft(Protocol):
    """A model that can guess ahead. Every `charlm.LanguageModel` can."""

    @property
    def vocab_size(self) -> int:
        """V, the same as that of the other model."""

    def new_state(self, rows: int = 1, *, overflow: Overflow = "slide", use_cache: bool = True) -> Any:
        """Return a `charlm.generation.PredictionState`; see `LanguageModel.new_state`."""


class Sampling(TypedDict, total=False):
    """Keyword arguments of `generate` and `stream`; `SamplingOptions` explains each."""

    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    filters: Sequence[Filter]
    banned_ids: Collection[int]
    repetition_penalty: float
    seed: int | None
    use_cache: bool
    overflow: Overflow
    draft: Draft | None
    constraint: Constraint | None


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How the next token is chosen.

    Penalty and bans are applied first, then the others in the order of the fields.

    Raises:
        InputError: lists every value that is out of its range.

    Example:
        >>> options = SamplingOptions(temperature=0.5, top_k=2)
        >>> options.filter(torch.tensor([[1.0, 3.0, 2.0]]), ids=torch.tensor([[0]]))
        tensor([[-inf, 6., 4.]])
    """

    temperature: float = 1.0
    """Divides the logits, from 1e-6 to 1e6. 0 always takes the likeliest token."""
    top_k: int | None = None
    """Keep the k likeliest tokens, 1 or more. None: keep all."""
    top_p: float | None = None
    """Keep the likeliest tokens that together have this probability, in (0, 1]. None: keep all."""
    min_p: float | None = None
    """Remove tokens that are less likely than this share of the largest probability, in [0, 1]. None: keep
    all."""
    filters: Sequence[Filter] = ()
    """Functions (logits (B, V), ids so far (B, t)) -> logits, applied last, in their order."""
    banned_ids: Collection[int] = ()
    """Ids that are never chosen; they are removed before the filters see the logits."""
    repetition_penalty: float = 1.0
    """Above 1, tokens among the last 64 become less likely; applied first. 1: off."""
    seed: int | None = None
    """The same seed gives the same text. None: drawn from torch's global generator (`charlm generate` takes a
    new one each time, which -v shows)."""
    use_cache: bool = True
    """Keep keys and values of the tokens so far. Changes speed, never the result. False also switches the
    compiled engine off."""
    overflow: Overflow = "slide"
    """The context of a text that is longer than the block size. slide: exactly the last block, which moves on
    by one token. restart: whenever the block is full, continue from its last half, which is much faster."""
    draft: Draft | None = None
    """A faster model that guesses ahead for a single text. Changes speed, and rounding at most."""
    constraint: Constraint | None = None
    """A constraint that the new part of each text must match; a text may end before it has all its tokens.
    Tokens that may not follow are removed before anything else."""

    def __new__(cls, **options: Any) -> Self:
        """Refuse unknown names with a hint, before the dataclass's constructor refuses them without one."""
        _refuse_unknown(options)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        t, p, m = as_float(self.temperature), as_float(self.top_p), as_float(self.min_p)
        k, seed, r = as_int(self.top_k), as_int(self.seed), as_float(self.repetition_penalty)
        banned = _as_ids(self.banned_ids)
        use_cache, overflow = as_bool(self.use_cache), as_text(self.overflow)
        fits = {
            "temperature": t is not None and (t == 0 or 1e-6 <= t <= 1e6),
            "top_k": self.top_k is None or (k is not None and k >= 1),
            "top_p": self.top_p is None or (p is not None and 0 < p <= 1),
            "min_p": self.min_p is None or (m is not None and 0 <= m <= 1),
            "filters": isinstance(self.filters, Sequence) and all(map(callable, self.filters)),
            "banned_ids": banned is not None,
            "repetition_penalty": r is not None and 0.01 <= r <= 100,
            "seed": self.seed is None or (seed is not None and seed.bit_length() <= 64),
            "use_cache": use_cache is not None,
            "overflow": overflow in get_args(Overflow),
            "draft": self.draft is None or callable(getattr(self.draft, "new_state", None)),
            "constraint": self.constraint is None or isinstance(self.constraint, Constraint),
        }
        problems = [
            f"{name} must be {_REQUIREMENTS[name]}, got {shown(getattr(self, name))}"
            for name in fits
            if not fits[name]
        ]
        if problems:
            raise InputError("; ".join(problems))
        plain = {"temperature": t, "top_k": k, "top_p": p, "min_p": m, "seed": seed, "repetition_penalty": r}
        others = {"banned_ids": banned, "use_cache": use_cache, "overflow": overflow}
        for name, value in {**plain, **others}.items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_keywords(cls, sampling: Sampling, *, beside: Sequence[str] = ()) -> Self:
        """Return the options of a call; a missing seed is drawn from torch's global generator.

        Args:
            sampling: the keyword arguments of the call.
            beside: other parameters of the function, which the hint for an unknown option may name.

        Raises:
            TypeError: an option is unknown; the message names a similar one.
            InputError: an option is bad.
        """
        _refuse_unknown(sampling, beside)
        return cls(**sampling).seeded()

    def seeded(self) -> Self:
        """Return options with a seed; a missing one is drawn from torch's global generator."""
        if self.seed is not None or self.temperature == 0:
            return self
        return replace(self, seed=int(torch.randint(2**62, (), device="cpu")))

    def uniforms(self, addresses: Sequence[int], positions: Sequence[int]) -> NDArray[np.float64] | None:
        """Return the uniform numbers (n,) for drawing ids, or None if the likeliest ids are taken.

        Args:
            addresses: (n,) addresses of the rows, for the random numbers.
            positions: (n,) positions of the ids to be drawn.
        """
        seed = self.seeded().seed
        if seed is None or self.temperature == 0:
            return None
        return randomness.uniforms(seed, addresses, positions)

    @property
    def filters_by_itself(self) -> bool:
        """Whether a filter is in use that the compiled engines do not implement."""
        return bool(self.filters or self.banned_ids) or self.repetition_penalty != 1

    def filter(self, logits: Tensor, ids: Tensor | None = None) -> Tensor:
        """Apply penalty, bans, temperature, top-k, top-p, min-p and the caller's filters, in this order.

        Args:
            logits: (B, V), the model's prediction of the next token.
            ids: (B, t), all ids so far, prompt included; filters and the repetition penalty need them.

        Returns:
            (B, V) logits, -inf for removed tokens. Half precision is widened to float32 first.

        Raises:
            InputError: a caller's filter does not return logits (B, V), or `ids` is missing.
        """
        if ids is None and (self.filters or self.repetition_penalty != 1):
            raise InputError("ids must be given: filters are shown the texts so far")
        if logits.dtype in (torch.bfloat16, torch.float16):  # too coarse to add up probabilities
            logits = logits.float()
        shape = logits.shape
        if ids is not None:
            logits = penalise_repetition(logits, ids, self.repetition_penalty)
        logits = remove_ids(logits, self.banned_ids)
        logits = scale_temperature(logits, self.temperature)
        if self.top_k is not None:
            logits = keep_top_k(logits, self.top_k)
        if self.top_p is not None:
            logits = keep_top_p(logits, self.top_p)
        if self.min_p is not None:
            logits = keep_min_p(logits, self.min_p)
        for own in self.filters:
            logits = own(logits, cast("Tensor", ids))
            if not isinstance(logits, Tensor) or logits.shape != shape:
                got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                raise InputError(f"a filter must return logits {tuple(shape)}, got {got}")
        return logits


def _as_ids(ids: object) -> tuple[int, ...] | None:
    """Return ids sorted and without repeats, or None if they are no ids."""
    if not isinstance(ids, Collection) or isinstance(ids, str | bytes):
        return None
    values = {as_int(i) for i in ids}
    plain = {i for i in values if i is not None and i >= 0}
    return tuple(sorted(plain)) if plain == values else None


def _refuse_unknown(options: Mapping[str, object], beside: Sequence[str] = ()) -> None:
    """Raise TypeError if an option is unknown; the message also lists bad values of the others."""
    names = [field.name for field in fields(SamplingOptions)]
    all_of_them = f"the options are {', '.join(names)}"
    hints = [
        f"unknown option {shown(name)}; {did_you_mean(name, [*names, *beside], all_of_them)}"
        for name in options
        if name not in names
    ]
    if not hints:
        return
    try:
        SamplingOptions(**cast("Sampling", {n: value for n, value in options.items() if n in names}))
    except InputError as error:
        hints.append(str(error))
    raise TypeError("; ".join(hints))
