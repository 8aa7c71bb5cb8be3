"""`GPT`: embeddings, a stack of blocks, a norm, and a linear layer that gives the logits of the next token.

The blocks are in `layers.py`; this file holds the language model around them. Layout and parameter names are
those of GPT-2 in nanoGPT, for every setting.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Self, cast

import torch
from torch import Tensor, nn
from typing_extensions import Unpack, override

from charlm.errors import ConfigError, InputError, did_you_mean
from charlm.generation.cache import Cache, KVCache
from charlm.generation.engine import Engine
from charlm.models.base import LanguageModel, cross_entropy
from charlm.models.config import PRESETS, GPTConfig, GPTConfigFields, ModelConfig, PresetName
from charlm.models.layers import Block, CausalConv, Dropout, make_norm
from charlm.models.memory import check_fits
from charlm.models.ops import rotary_tables
from charlm.modes import evaluation_mode
from charlm.native.gpt import gpt_engine, why_not_gpt
from charlm.plain import as_text

__all__ = ["GPT", "Transformer"]


class Transformer(nn.Module):
    """Embeddings, blocks and the last norm. `GPT` adds the output layer.

    Args:
        config: settings of the model.
    """

    head_size: int
    wte: nn.Embedding
    wpe: nn.Embedding | None
    conv: CausalConv | None
    drop: Dropout
    h: nn.ModuleList
    ln_f: nn.Module

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.head_size = config.head_size
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = None
        if config.position == "learned":
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.conv = CausalConv(config) if config.conv_width > 1 else None
        self.drop = Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = make_norm(config)

    def embed(self, idx: Tensor, cache: KVCache | None = None) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Return the input of the first block for ids (B, T) that follow those in the cache.

        Returns:
            (B, T, C); and with rotary positions cosine and sine of the angles, (T, D / 2) each, else None.
        """
        _, T = idx.shape
        start = 0 if cache is None else cache.length
        if self.conv is None:
            x = self.wte(idx)  # (B, T, C)
        else:
            context = idx if cache is None else cache.read(idx)  # (B, start + T)
            x = self.conv(self.wte(context[:, -T - len(self.conv.weight) :]), T)  # (B, T, C)
        if self.wpe is not None:
            return self.drop(x + self.wpe.weight[start : start + T]), None
        return self.drop(x), rotary_tables(start, T, self.head_size, idx.device)

    def forward(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """Return (B, T, C) for ids (B, T) that follow those in the cache."""
        _, T = idx.shape
        if cache is not None:
            cache.truncate(cache.length)  # after an interrupted pass, some layers may hold more
        x, rotary = self.embed(idx, cache)  # (B, T, C)
        for i, block in enumerate(self.h):
            x = block(x, rotary, None if cache is None else cache.layers[i])
        if cache is not None:
            cache.advance(T)
        out: Tensor = self.ln_f(x)
        return out


class GPT(LanguageModel):
    """A decoder-only transformer over characters or bytes.

    Args:
        config: all settings. `GPT.from_config` also takes a mapping or the name of a preset.

    Raises:
        NotEnoughMemoryError: the weights are larger than the memory that is available.

    Example:
        >>> model = GPT.from_config("lecture", vocab_size=65, n_layer=2, n_head=2, n_embd=32, block_size=16)
        >>> logits, loss = model(torch.zeros(4, 16, dtype=torch.long), torch.ones(4, 16, dtype=torch.long))
        >>> logits.shape, loss.shape
        (torch.Size([4, 16, 65]), torch.Size([]))
    """

    kind: ClassVar[str] = "gpt"
    config_class: ClassVar[type[ModelConfig]] = GPTConfig
    config: GPTConfig
    transformer: Transformer
    lm_head: nn.Linear

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        if not isinstance(config, GPTConfig):
            raise ConfigError(
                f"config must be a GPTConfig, got {type(config).__name__}. "
                "GPT.from_config takes a mapping or the name of a preset."
            )
        check_fits(config)
        self.config = config
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=config.head_bias)
        if config.tie_weights:  # arXiv:1608.05859
            self.lm_head.weight = self.transformer.wte.weight
        self._initialise()

    @override
    @classmethod
    def from_config(
        cls,
        config: GPTConfig | Mapping[str, object] | PresetName,
        **overrides: Unpack[GPTConfigFields],
    ) -> Self:
        """Build a new model.

        Args:
            config: a `GPTConfig`, a mapping of its fields, or the name of a preset: "lecture", "gpt2",
                "cpu-10s", "cpu-1min", "cpu-5min". A preset needs `vocab_size` among the overrides.
            overrides: fields that replace those of `config`.

        Raises:
            ConfigError: lists every field that is unknown, missing or bad.

        Example:
            >>> GPT.from_config("lecture", vocab_size=65).num_parameters()
            10788929
        """
        name = as_text(config)
        if name is not None:
            fields: Mapping[str, object] = PRESETS.get(cast("PresetName", name), {})
            if not fields or "vocab_size" not in overrides:
                problems = [_preset_problem(name), *GPTConfig.check({**fields, **overrides})]
                raise ConfigError("; ".join(problems), problems=problems)
        elif isinstance(config, GPTConfig):
            fields = config.to_dict()
        elif isinstance(config, Mapping):
            fields = config
        else:
            raise ConfigError(
                f"config must be a GPTConfig, a mapping or a preset's name, got {type(config).__name__}"
            )
        return cls(GPTConfig.from_dict({**fields, **overrides}))

    @property
    @override
    def block_size(self) -> int:
        """T, the most tokens that the model sees at once."""
        return self.config.block_size

    @override
    def forward(
        self, idx: Tensor, targets: Tensor | None = None, *, cache: Cache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        self._check_idx(idx, targets)
        if cache is not None and not isinstance(cache, KVCache):
            raise InputError(f"cache must be from new_cache(), got a {type(cache).__name__}")
        self._check_length(idx.size(1), 0 if cache is None else cache.length)
        logits = self.lm_head(self.transformer(idx, cache))  # (B, T, V)
        return logits, None if targets is None else cross_entropy(logits, targets)

    @torch.no_grad()
    def attention(self, idx: Tensor) -> Tensor:
        """Return the attention weights of every layer and head: how much each token looks at each.

        A token looks at itself and at those before it. `charlm.plotting.plot_attention` draws the weights.

        Args:
            idx: (B, T) int64 in [0, V), T at most `block_size`.

        Returns:
            (L, B, H, T, T), without dropout. Row t of a head holds the shares that token t takes from each
            token. It sums to 1, and is 0 beyond t.

        Raises:
            InputError: wrong type, shape, range or device.

        Example:
            >>> model = GPT.from_config("lecture", vocab_size=65, n_layer=2, n_head=3, n_embd=48)
            >>> model.attention(torch.tensor([[18, 47, 56, 57]])).shape
            torch.Size([2, 1, 3, 4, 4])
        """
        self._check_idx(idx)
        self._check_range("idx", idx, lowest=0)
        self._check_length(idx.size(1))
        weights = []
        with evaluation_mode(self):
            x, rotary = self.transformer.embed(idx)  # (B, T, C)
            for block in cast("list[Block]", list(self.transformer.h)):
                weights.append(block.attn.weights(block.ln_1(x), rotary))  # (B, H, T, T)
                x = block(x, rotary)
        return torch.stack(weights).to(torch.promote_types(x.dtype, torch.float32))

    def _check_length(self, T: int, cached: int = 0) -> None:
        if cached + T > self.block_size:
            in_cache = f" and {cached} in the cache" if cached else ""
            raise InputError(
                f"idx must have at most block_size = {self.block_size} ids a row, got {T}{in_cache}. "
                "Keep the last ones: idx[:, -model.block_size:]"
            )

    @override
    def new_cache(self) -> KVCache:
        """Return an empty cache with room for one window."""
        return KVCache(len(self.transformer.h), self.block_size)

    @override
    def why_not_native(self) -> str | None:
        if type(self) is not GPT:
            return super().why_not_native()
        return why_not_gpt(self)

    @override
    def _native_engine(self, rows: int) -> Engine | None:
        if type(self) is not GPT:  # a subclass may have its own `forward`
            return None
        window, head_size = self.block_size, self.config.head_size
        return gpt_engine(self, rows, lambda: rotary_tables(0, window, head_size, torch.device("cpu")))

    @torch.no_grad()
    def _initialise(self) -> None:
        """Draw the weights from torch's global generator, in the order of the modules."""
        init = self.config.init
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                # A tied embedding is the head, too: with 0.5 the first predictions would be far too sure.
                wide = 0.05 if self.config.tie_weights else 0.5
                nn.init.normal_(module.weight, std=wide if init == "zero" else 0.02)
            elif isinstance(module, nn.Linear):
                residual = name.endswith("c_proj")
                if init == "zero":
                    # At first, blocks are the identity and predictions uniform (Fixup, arXiv:1901.09321).
                    zero = residual or (name == "lm_head" and not self.config.tie_weights)
                    std = 0.0 if zero else 0.5 / math.sqrt(module.in_features)
                else:
                    # This scale keeps the variance of the stream from growing with depth.
                    scaled = residual and init == "gpt2"
                    std = 0.02 / math.sqrt(2 * self.config.n_layer) if scaled else 0.02
                if not (name == "lm_head" and self.config.tie_weights):
                    nn.init.normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


def _preset_problem(name: str) -> str:
    """Return the error of a preset: an unknown name, or a missing vocab_size."""
    if name in PRESETS:
        return (
            f"preset {name!r} needs the vocabulary's size: "
            f"GPT.from_config({name!r}, vocab_size=tokenizer.vocab_size)"
        )
    hint = did_you_mean(name, PRESETS, f"there are {', '.join(map(repr, PRESETS))}")
    return f"unknown preset {name!r}; {hint} (to read a saved model: charlm.load(path))"
