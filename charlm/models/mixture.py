"""`MixtureLM`: a weighted mixture of several models with one vocabulary, as one model.

Counting and learning see different things, so a mixture of a GPT and an n-gram model predicts better than
either. The mixture is a weighted sum of the members' probabilities and of their geometric mean. The weights
depend on the largest probability of each member, so on nothing but the context: a gate, as in Jacobs et al.,
"Adaptive mixtures of local experts", 1991.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import override

from charlm.errors import InputError, shown
from charlm.generation.cache import Cache
from charlm.generation.engine import Engine
from charlm.generation.passes import plan_passes
from charlm.models.base import LanguageModel, cross_entropy
from charlm.models.config import MixtureConfig, ModelConfig, gate_places
from charlm.models.registry import class_of
from charlm.modes import evaluation_mode
from charlm.native.mixture import mixture_engine, why_not_mixture
from charlm.plain import int_from

if TYPE_CHECKING:
    from charlm.data.blocks import BlockDataset

__all__ = ["MixtureLM"]

Floats = NDArray[np.float64]

_IDS_AT_ONCE, _LOGITS_AT_ONCE = 16_384, 2**22  # in a pass of `fit`
_PRIOR = 20.0  # strength of the prior that holds each place of the gate near the common weights, in ids
_TURNS = 100  # rounds of expectation and maximisation


class _Read:
    """A cache of a member with a window, for texts that may be longer.

    Past the window, the member restarts from its last half, as generation with overflow "restart" does.
    """

    def __init__(self, member: LanguageModel) -> None:
        self._member = member
        self._cache: Cache | None = None
        self._ids: Tensor | None = None  # (B, t), from the beginning of the context
        self._known = range(0)  # positions

    def logits(self, idx: Tensor) -> Tensor:
        """Read more ids (B, t), and return the logits (B, t, V) after each."""
        ids = idx if self._ids is None else torch.cat([self._ids, idx], dim=1)
        base, stop = self._known.start, self._known.stop + idx.size(1)
        span, known = range(self._known.stop + 1, stop + 1), range(0) if self._cache is None else self._known
        parts: list[Tensor] = []
        for (one,) in plan_passes([span], [known], self._member.block_size, "restart"):
            if one.start == one.begin:
                self._cache = self._member.new_cache()
            logits, _ = self._member(ids[:, one.start - base : one.stop - base], cache=self._cache)
            parts.append(logits[:, logits.size(1) - one.wanted :])
            self._known = range(one.begin, one.stop)
        self._ids = ids[:, self._known.start - base :]
        return torch.cat(parts, dim=1)

    def truncate(self, length: int) -> bool:
        return False  # an earlier window may be needed again

    def fork(self, rows: Sequence[int]) -> _Read | None:
        twin = _Read(self._member)
        twin._cache = None if self._cache is None else self._cache.fork(rows)
        twin._ids, twin._known = None if self._ids is None else self._ids[list(rows)], self._known
        return twin


class _Caches:
    """A cache that holds those of the members."""

    def __init__(self, caches: Sequence[Cache]) -> None:
        self.caches = caches

    def truncate(self, length: int) -> bool:
        return all(cache.truncate(length) for cache in self.caches)  # if one fails, all is read again

    def fork(self, rows: Sequence[int]) -> _Caches | None:
        twins = [cache.fork(rows) for cache in self.caches]
        forked = [twin for twin in twins if twin is not None]
        return _Caches(forked) if len(forked) == len(twins) else None


class MixtureLM(LanguageModel):
    """A weighted sum of the probabilities of its members; the weights are equal until they are fitted.

    Attributes:
        members: the models.
        gate: (3 ** K, K + 1). Its softmax gives the weights of the K members and of their geometric mean, at
            the places where the largest probability of each member is 0, 1/2 or 1; the first member's
            changes slowest. Between these places the weights are interpolated.

    Args:
        members: one to six models with one vocabulary, on one device. They are not copied.

    Raises:
        InputError: there are no members, one has no `kind` of its own, or their types differ.
        ConfigError: their vocabularies differ in size.

    Example:
        >>> from charlm import BlockDataset, CharTokenizer, GPT, NGramLM
        >>> tokenizer = CharTokenizer("abn")
        >>> rest, aside = BlockDataset.from_text("banana" * 99, tokenizer, block_size=8).set_aside(60)
        >>> gpt = GPT.from_config("cpu-10s", vocab_size=3)  # trained on the rest, in earnest
        >>> mixture = MixtureLM([gpt, NGramLM(3).fit(rest)]).fit(aside)
        >>> tokenizer.decode(mixture.generate(torch.tensor([[1]]), 5, temperature=0)[0])
        'banana'
    """

    kind: ClassVar[str] = "mixture"
    config_class: ClassVar[type[ModelConfig]] = MixtureConfig
    members: nn.ModuleList
    gate: nn.Parameter

    def __init__(self, members: Sequence[LanguageModel]) -> None:
        super().__init__()
        if not members or any(class_of(getattr(m, "kind", "")) is not type(m) for m in members):
            raise InputError(f"members must be models, each with a kind of its own, got {shown(members)}")
        self.members = nn.ModuleList(members)
        _ = self.config  # raises if the members do not go together
        tensors = [t for member in members for t in member.state_dict().values()]
        dtypes = sorted({t.dtype for t in tensors if t.is_floating_point()}, key=str)
        if len(dtypes) > 1:
            raise InputError(f"members must be of one type, got {' and '.join(map(str, dtypes))}")
        J, K, dtype = gate_places(len(members)), len(members), dtypes[0]
        self.gate = nn.Parameter(torch.zeros(J, K + 1, dtype=dtype, device=members[0].device))

    @override
    @classmethod
    def from_config(cls, config: MixtureConfig | Mapping[str, object]) -> Self:
        """Build new members, and a mixture of them.

        Args:
            config: a `MixtureConfig`, or a mapping of its fields.

        Raises:
            ConfigError: a field is unknown, missing or bad.
        """
        if not isinstance(config, MixtureConfig):
            config = MixtureConfig.from_dict(config)
        classes = [class_of(kind) for kind in config.kinds]
        pairs = zip(classes, config.members, strict=True)
        return cls([member.from_config(settings) for member, settings in pairs if member is not None])

    @property
    def config(self) -> MixtureConfig:  # type: ignore[override]
        """The present settings of the members; an n-gram model may be fitted again."""
        return MixtureConfig(
            vocab_size=self._members[0].vocab_size,
            kinds=tuple(member.kind for member in self._members),
            members=tuple(member.config for member in self._members),
        )

    @property
    @override
    def vocab_size(self) -> int:
        return self._members[0].vocab_size

    @property
    def _members(self) -> list[LanguageModel]:
        return [member for member in self.members if isinstance(member, LanguageModel)]

    @override
    def num_parameters(self) -> int:
        """Return the number of parameters of all members and the gate."""
        return sum(member.num_parameters() for member in self._members) + self.gate.numel()

    @override
    def new_cache(self) -> Cache | None:
        caches = [m.new_cache() if m.block_size is None else _Read(m) for m in self._members]
        present = [cache for cache in caches if cache is not None]
        return _Caches(present) if len(present) == len(caches) else None

    @override
    def why_not_native(self) -> str | None:
        return why_not_mixture(self, self._members) if type(self) is MixtureLM else super().why_not_native()

    @override
    def _native_engine(self, rows: int) -> Engine | None:
        return mixture_engine(self, self._members, rows) if type(self) is MixtureLM else None

    @override
    def forward(
        self, idx: Tensor, targets: Tensor | None = None, *, cache: Cache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Predict the next id after each id; the logits are log-probabilities.

        See `LanguageModel.forward`. Past its window, a member sees what generation with overflow "restart"
        shows it. A member without a window sees all.
        """
        self._check_idx(idx, targets)
        if cache is not None and not isinstance(cache, _Caches):
            raise InputError(f"cache must be from new_cache(), got a {type(cache).__name__}")
        voices = self._voices(idx, cache)  # (K + 1, B, T, V)
        weights = self._places(voices) @ self.gate.to(voices.dtype).softmax(dim=-1)  # (B, T, K + 1)
        logits = (voices + weights.log().movedim(-1, 0)[..., None]).logsumexp(dim=0)  # (B, T, V)
        return logits, None if targets is None else cross_entropy(logits, targets)

    def fit(self, data: BlockDataset, *, max_chars: int | None = None) -> Self:
        """Find the weights that make a text likeliest, and replace the present ones.

        The members do not change. They must not have seen this text (`BlockDataset.set_aside`), since a
        member is too sure of a text that it has seen. No random number is drawn.

        Args:
            data: the text, read in separate windows.
            max_chars: read at most about so many tokens, in windows spread over the text; None: all.

        Returns:
            The model itself.

        Raises:
            InputError: the text is not this model's, or `max_chars` is no int of 1 or more.
        """
        places, probs = (
            np.concatenate(parts) for parts in zip(*self._readings(data, max_chars), strict=True)
        )
        weights = _fitted(places, probs)
        with torch.no_grad():
            self.gate.copy_(torch.from_numpy(np.log(weights)))
        return self

    def losses(self, data: BlockDataset, *, max_chars: int | None = None) -> list[float]:
        """Return the loss of each member and of the mixture, in nats per token.

        The losses are those of `evaluate`, from one reading of the text.

        Args:
            data: as for `fit`.
            max_chars: as for `fit`.

        Returns:
            (K + 1,), that of the mixture last.
        """
        weights = self.gate.detach().cpu().double().softmax(dim=-1).numpy()  # (J, K + 1)
        nats, count = np.zeros(len(self.members) + 1), 0
        for places, probs in self._readings(data, max_chars):
            mixed = np.einsum("nk,nk->n", places @ weights, probs)
            nats -= [np.log(p).sum() for p in (*probs.T[:-1], mixed)]
            count += len(probs)
        return [float(loss) for loss in nats / count]

    def _readings(self, data: BlockDataset, max_chars: int | None) -> Iterator[tuple[Floats, Floats]]:
        """Yield the places of n ids in the gate, (n, J), and their probabilities, (n, K + 1)."""
        most = None if max_chars is None else int_from(1, max_chars, "max_chars")
        if most is not None:  # in windows, as in `evaluate`
            most = None if most >= data.n_targets else max(most // data.block_size, 1)
        batch = max(min(_IDS_AT_ONCE, _LOGITS_AT_ONCE // self.vocab_size) // data.block_size, 1)
        for x, y in data.blocks(batch, most=most):
            with torch.no_grad(), evaluation_mode(self):
                idx, targets = x.to(self.device), y.to(self.device)
                self._check_idx(idx, targets)
                voices = self._voices(idx, None)  # (K + 1, B, T, V)
                places = self._places(voices).flatten(0, 1).cpu().double()  # (B T, J)
                at = targets.expand(len(voices), *targets.shape)[..., None]
                probs = voices.gather(-1, at).flatten(1).T.cpu().double().exp()  # (B T, K + 1)
            yield places.numpy(), probs.numpy()

    @override
    def _check_values(self) -> None:
        for member in self._members:
            member._check_values()

    def _voices(self, idx: Tensor, cache: _Caches | None) -> Tensor:
        """Return the log-probabilities of the members and of their geometric mean, (K + 1, B, T, V)."""
        caches = [None] * len(self.members) if cache is None else cache.caches
        logits = [_member_logits(member, idx, one) for member, one in zip(self._members, caches, strict=True)]
        log_p = torch.stack(
            [z.to(torch.promote_types(z.dtype, torch.float32)).log_softmax(dim=-1) for z in logits]
        )
        return torch.cat([log_p, log_p.mean(dim=0, keepdim=True).log_softmax(dim=-1)])

    @staticmethod
    def _places(voices: Tensor) -> Tensor:
        """Return the weights of the places of the gate in the interpolation, (B, T, J); they sum to 1."""
        shares = torch.ones_like(voices[0, ..., :1])  # (B, T, 1)
        for sure in voices[:-1].amax(dim=-1).exp():  # (B, T), of each member
            low, high = (1 - 2 * sure).clamp(min=0), (2 * sure - 1).clamp(min=0)
            own = torch.stack([low, 1 - low - high, high], dim=-1)  # (B, T, 3)
            shares = (shares[..., None] * own[..., None, :]).flatten(-2)
        return shares


def _member_logits(member: LanguageModel, idx: Tensor, cache: Cache | None) -> Tensor:
    """Return a member's logits (B, S, V) after ids (B, S), past its window as with overflow "restart"."""
    if isinstance(cache, _Read):
        return cache.logits(idx)
    T, S = member.block_size, idx.size(1)
    if T is None or S <= T:
        return member(idx, cache=cache)[0]
    step = T + 1 - max(T // 2, 1)  # from the beginning of one context to the next
    more = -((T - S) // step)  # contexts after the first
    padded = F.pad(idx, (0, more * step + T - S))  # later ids do not count
    windows = padded.unfold(1, T, step)  # (B, 1 + more, T)
    logits = member(windows.flatten(0, 1))[0].view(*windows.shape, -1)  # (B, 1 + more, T, V)
    return torch.cat([logits[:, 0], logits[:, 1:, T - step :].flatten(1, 2)], dim=1)[:, :S]


def _fitted(places: Floats, probs: Floats) -> Floats:
    """Return the weights (J, K + 1) that make N ids likeliest, by expectation and maximisation.

    Args:
        places: (N, J) interpolation weights of the places of the gate for each id.
        probs: (N, K + 1) probabilities of the ids, from the members and their geometric mean.
    """
    alone = np.full((1, probs.shape[1]), 1 / probs.shape[1])
    for _ in range(_TURNS):
        shares = alone * probs
        alone = (shares / shares.sum(axis=1, keepdims=True)).mean(axis=0, keepdims=True)
    weights: Floats = np.repeat(alone, places.shape[1], axis=0)
    for _ in range(_TURNS):
        total = np.einsum("nk,nk->n", places @ weights, probs)  # (N,)
        counts = weights * (places.T @ (probs / total[:, None])) + _PRIOR * alone  # (J, K + 1)
        weights = counts / counts.sum(axis=1, keepdims=True)
    return np.clip(weights, 1e-12, 1.0)
