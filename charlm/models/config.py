"""Settings and presets of the models. They also count a model's parameters and operations in advance.

`GPTConfig` has a few independent switches, enough for the lecture's GPT, GPT-2 and our own recipes. Names are
those of nanoGPT. A released preset never changes its meaning; a better preset gets a new name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, Self, TypedDict, cast

from typing_extensions import override

from charlm.config import Config, Range
from charlm.errors import ConfigError, quoted
from charlm.models.registry import class_of, known_kinds

__all__ = [
    "PRESETS",
    "BigramConfig",
    "GPTConfig",
    "GPTConfigFields",
    "MixtureConfig",
    "ModelConfig",
    "NGramConfig",
    "PresetName",
]


UNLIMITED_WINDOW = 4_096
"""Block size in which a model without a limit is evaluated, in tokens."""


def unlimited_window(vocab_size: int) -> int:
    """Return the block size in which a model without a limit is evaluated, in tokens.

    With a large vocabulary it is smaller, so that the logits take 64 MB.

    Args:
        vocab_size: V.

    Example:
        >>> unlimited_window(65), unlimited_window(6_000)
        (4096, 2796)
    """
    return min(max(2**24 // vocab_size, 256), UNLIMITED_WINDOW)


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Config):
    """Base of the settings of models."""

    vocab_size: Annotated[int, Range(1, 1_114_112)]
    """V, the number of different ids: `tokenizer.vocab_size`."""

    def num_parameters(self) -> int:
        """Return the number of parameters that the model will have; a tied matrix counts once."""
        raise NotImplementedError(f"{type(self).__name__} must say how many parameters its model has")


@dataclass(frozen=True, kw_only=True)
class BigramConfig(ModelConfig):
    """Settings of a `BigramLM`."""

    @override
    def num_parameters(self) -> int:
        return self.vocab_size**2


@dataclass(frozen=True, kw_only=True)
class NGramConfig(ModelConfig):
    """Settings of an `NGramLM`."""

    WINDOW_LENGTHS: ClassVar[int] = 11
    """Tokens in the longest context that is looked for in the window."""
    WINDOW_PLACES: ClassVar[int] = 256
    """The largest number of occurrences of a token that are used in the window: the latest ones."""

    order: Annotated[int, Range(1, 32)] = 7
    """Length of the longest n-grams: each token is predicted from the order - 1 tokens before it."""
    n_ngrams: Annotated[int, Range(0, 2**32)] = 0
    """Number of different n-grams; `fit` sets it."""
    window: Annotated[int, Range(0, 2**16)] = 0
    """Number of preceding tokens in which earlier occurrences of the context are looked for; 0: none."""

    @override
    def num_parameters(self) -> int:
        return 2 * self.n_ngrams + 3 * self.order + 3 * self.window_lengths

    @property
    def window_lengths(self) -> int:
        """Tokens in the longest context that is looked for in the window; 0 without a window."""
        return self.WINDOW_LENGTHS if self.window else 0


_MOST_MEMBERS = 6


def gate_places(members: int) -> int:
    """Return the number of places at which the gate of a mixture of so many members has weights."""
    return int(3**members)


@dataclass(frozen=True, kw_only=True)
class MixtureConfig(ModelConfig):
    """Settings of a `MixtureLM`."""

    kinds: tuple[str, ...]
    """The kind of each member, as in the config.json of a model of this kind."""
    members: tuple[ModelConfig, ...]
    """The settings of each member."""

    @override
    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> Self:
        """Make a config from a mapping, in which the members may be mappings, too.

        Args:
            values: fields by name.

        Raises:
            ConfigError: a field, a member's kind or a member's settings are bad.
        """
        kinds, members = values.get("kinds"), values.get("members")
        if not isinstance(kinds, tuple | list) or not isinstance(members, tuple | list):
            return super().from_dict(values)
        pairs = zip(kinds, members, strict=False)  # `_conflicts` reports different lengths
        return super().from_dict({**values, "members": [_member(kind, fields) for kind, fields in pairs]})

    @classmethod
    @override
    def _conflicts(cls, right: Mapping[str, Any]) -> Iterator[str]:
        kinds, members = right.get("kinds"), right.get("members")
        sizes = [len(given) for given in (kinds, members) if given is not None]
        if len(sizes) == 2 and not 0 < sizes[0] == sizes[1] <= _MOST_MEMBERS:
            yield f"there must be a kind for each of one to {_MOST_MEMBERS} members, got kinds {kinds}"
        V = {member.vocab_size for member in members or ()} | {right.get("vocab_size", 0)}
        if members and len(V) > 1:
            yield f"all members must have the vocab_size of the whole, got {sorted(V)}"

    @override
    def num_parameters(self) -> int:
        K = len(self.members)
        return sum(member.num_parameters() for member in self.members) + gate_places(K) * (K + 1)


def _member(kind: object, fields: object) -> object:
    """Return the settings of a member; a mapping becomes an instance of its config class."""
    if not isinstance(kind, str) or not isinstance(fields, Mapping):
        return fields
    model = class_of(kind)
    if model is None:
        raise ConfigError(
            f"no model is of the kind {quoted(kind, 40)}; the kinds are {', '.join(known_kinds())}"
        )
    return model.config_class.from_dict(fields)


@dataclass(frozen=True, kw_only=True)
class GPTConfig(ModelConfig):
    """Settings of a `GPT`. The defaults are the lecture's model and will stay so; vocab_size has no default.

    Raises:
        ConfigError: lists every field that is missing, unknown, out of range, or in conflict with another.

    Example:
        >>> config = GPTConfig(vocab_size=65, n_layer=4, n_head=4, n_embd=128)
        >>> config.block_size, config.head_size, config.effective_mlp_width
        (256, 32, 512)
    """

    _other_names: ClassVar[Mapping[str, str]] = {
        "attn_pdrop": "attention_dropout",
        "context_length": "block_size",
        "d_model": "n_embd",
        "embd_pdrop": "dropout",
        "hidden_size": "n_embd",
        "intermediate_size": "mlp_width",
        "max_position_embeddings": "block_size",
        "n_ctx": "block_size",
        "n_inner": "mlp_width",
        "n_positions": "block_size",
        "num_attention_heads": "n_head",
        "num_heads": "n_head",
        "num_hidden_layers": "n_layer",
        "num_layers": "n_layer",
        "resid_pdrop": "dropout",
        "tie_word_embeddings": "tie_weights",
    }

    block_size: Annotated[int, Range(1, 1_048_576)] = 256
    """T, the most tokens that the model sees at once."""
    n_layer: Annotated[int, Range(1, 256)] = 6
    """Number of blocks, each with attention and a feed-forward network."""
    n_head: Annotated[int, Range(1, 1_024)] = 6
    """Number of attention heads in each block; it must divide n_embd."""
    n_embd: Annotated[int, Range(1, 65_536)] = 384
    """C, width of the embeddings and of the residual stream."""
    mlp_width: Annotated[int, Range(1, 1_048_576)] | None = None
    """Width inside the feed-forward network. None: 4 C, or 8/3 C with swiglu, which has a third matrix."""
    dropout: Annotated[float, Range(0, below=1)] = 0.2
    """Share of activations set to zero in training: of embeddings, attention weights and both branches."""
    attention_dropout: Annotated[float, Range(0, below=1)] | None = None
    """A different dropout for the attention weights. None: the same. 0 is faster, since they are many."""
    bias: bool = True
    """Biases in linear layers and LayerNorm, except where qkv_bias and head_bias apply."""
    qkv_bias: bool = False
    """Biases in the projection to queries, keys and values. (GPT-2: yes. The lecture: no.)"""
    head_bias: bool = True
    """A bias in the output layer. (GPT-2: no. The lecture: yes.)"""
    position: Literal["learned", "rotary"] = "learned"
    """How the model encodes positions: by a learned embedding, or by rotating queries and keys."""
    conv_width: Annotated[int, Range(1, 64)] = 1
    """The first block reads a weighted sum of the embeddings of so many tokens, the last one included; each
    channel has its own weights. 1: no sum."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Normalisation before each branch and before the output layer; rmsnorm has no parameters here."""
    qk_norm: bool = False
    """Normalise queries and keys in each head to unit root mean square."""
    activation: Literal["relu", "gelu", "gelu_tanh", "relu2", "swiglu"] = "relu"
    """Non-linearity of the feed-forward network; relu2 is ReLU squared."""
    tie_weights: bool = False
    """Use one matrix for the token embedding and the output layer."""
    init: Literal["normal", "gpt2", "zero"] = "normal"
    """Initial weights. normal: N(0, 0.02), as in the lecture's gpt.py (its notebook keeps torch's own). gpt2:
    smaller in the last layer of each branch. zero: 0 in these layers and in the head."""

    @classmethod
    @override
    def _conflicts(cls, right: Mapping[str, Any]) -> Iterator[str]:
        n_embd, n_head = right.get("n_embd", 0), right.get("n_head", 1)
        if n_embd % n_head:
            yield f"n_embd must be a multiple of n_head, got n_embd {n_embd} and n_head {n_head}"
        elif right.get("position") == "rotary" and n_embd // n_head % 2:
            yield f"rotary positions need an even n_embd / n_head, got {n_embd} / {n_head}"

    @property
    def head_size(self) -> int:
        """D, width of one attention head."""
        return self.n_embd // self.n_head

    @property
    def effective_attention_dropout(self) -> float:
        """Share of the attention weights set to zero during training: the given or the default one."""
        return self.dropout if self.attention_dropout is None else self.attention_dropout

    @property
    def effective_mlp_width(self) -> int:
        """Width inside the feed-forward network: the given or the default one."""
        if self.mlp_width is not None:
            return self.mlp_width
        return 8 * self.n_embd // 3 if self.activation == "swiglu" else 4 * self.n_embd

    @override
    def num_parameters(self) -> int:
        """Return the number of parameters that the model will have; a tied matrix counts once.

        Example:
            >>> GPTConfig(vocab_size=65, block_size=32, n_layer=4, n_head=4, n_embd=64).num_parameters()
            209729
        """
        C, V, F = self.n_embd, self.vocab_size, self.effective_mlp_width
        norm = C * (1 + self.bias) if self.norm == "layernorm" else 0
        into = 2 * F if self.activation == "swiglu" else F
        attention = 3 * C * C + 3 * C * self.qkv_bias + C * C + C * self.bias
        feed_forward = C * into + into * self.bias + F * C + C * self.bias
        embeddings = V * C + (self.block_size * C if self.position == "learned" else 0)
        embeddings += (self.conv_width - 1) * C
        head = (0 if self.tie_weights else V * C) + V * self.head_bias
        return embeddings + self.n_layer * (2 * norm + attention + feed_forward) + norm + head

    def flops_per_char(self, *, training: bool = False) -> int:
        """Return the number of floating-point operations for one token of a full block.

        They are counted as in appendix B of PaLM (arXiv:2204.02311): 2 for each weight of a matrix product,
        and 4 C in each layer for each token that attention looks at, T / 2 on average. Embedding look-ups,
        norms and activations are not counted.

        Args:
            training: include the backward pass, which costs twice the forward pass.

        Example:
            >>> GPTConfig(vocab_size=65).flops_per_char()
            22463232
        """
        C, F = self.n_embd, self.effective_mlp_width
        into = 2 * F if self.activation == "swiglu" else F
        weights = self.n_layer * (4 * C * C + C * into + F * C) + C * self.vocab_size
        forward = 2 * weights + self.n_layer * 4 * C * (self.block_size // 2)
        return 3 * forward if training else forward


class GPTConfigFields(TypedDict, total=False):
    """The fields of `GPTConfig` as keyword arguments, for `GPT.from_config(..., n_layer=4)`."""

    vocab_size: int
    block_size: int
    n_layer: int
    n_head: int
    n_embd: int
    mlp_width: int | None
    dropout: float
    attention_dropout: float | None
    bias: bool
    qkv_bias: bool
    head_bias: bool
    position: Literal["learned", "rotary"]
    conv_width: int
    norm: Literal["layernorm", "rmsnorm"]
    qk_norm: bool
    activation: Literal["relu", "gelu", "gelu_tanh", "relu2", "swiglu"]
    tie_weights: bool
    init: Literal["normal", "gpt2", "zero"]


PresetName = Literal["lecture", "gpt2", "cpu-10s", "cpu-1min", "cpu-5min"]
"""What `GPT.from_config` and `charlm train --preset` take."""

_LECTURE = cast("GPTConfigFields", {f.name: f.default for f in fields(GPTConfig) if f.name != "vocab_size"})

_OURS: GPTConfigFields = {
    **_LECTURE,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "bias": False,
    "head_bias": False,
    "position": "rotary",
    "norm": "rmsnorm",
    "qk_norm": True,
    "activation": "relu2",
    "init": "zero",
}

_PRESETS: dict[PresetName, GPTConfigFields] = {
    "lecture": _LECTURE,
    "gpt2": {
        **_LECTURE,
        "block_size": 1024,
        "n_layer": 12,
        "n_head": 12,
        "n_embd": 768,
        "dropout": 0.0,
        "qkv_bias": True,
        "head_bias": False,
        "activation": "gelu_tanh",
        "tie_weights": True,
        "init": "gpt2",
    },
    "cpu-10s": {**_OURS, "block_size": 64, "n_layer": 2, "n_head": 2, "n_embd": 96, "conv_width": 5},
    "cpu-1min": {**_OURS, "block_size": 128, "n_layer": 4, "n_head": 2, "n_embd": 128},
    "cpu-5min": {**_OURS, "block_size": 256, "n_layer": 4, "n_head": 4, "n_embd": 256, "conv_width": 5},
}

PRESETS: Mapping[PresetName, Mapping[str, Any]] = MappingProxyType(
    {name: MappingProxyType(fields) for name, fields in _PRESETS.items()}
)
"""All fields but vocab_size, by name of the preset: the lecture's GPT, the smallest GPT-2, and our own, named
by the time of training on two cores."""
