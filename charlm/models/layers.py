"""The parts of a GPT: norms, causal self-attention, the feed-forward network, the block.

Read this file beside the lecture: `CausalSelfAttention` is its heads side by side, `FeedForward` and `Block`
are its classes of these names. They hold the parameters, with the names of GPT-2 in nanoGPT; `ops.py` holds
the computations. Shapes: B batch, T time, C channels, H heads, D = C / H.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import override

from charlm.generation.cache import LayerCache
from charlm.models import ops
from charlm.models.config import GPTConfig

__all__ = ["Block", "CausalConv", "CausalSelfAttention", "Dropout", "FeedForward", "RMSNorm", "make_norm"]


def make_norm(config: GPTConfig) -> nn.Module:
    """Return the normalisation before a branch: LayerNorm, or RMSNorm without a gain.

    RMSNorm needs no gain, since the matrix after each norm can learn it.
    """
    if config.norm == "layernorm":
        return nn.LayerNorm(config.n_embd, bias=config.bias)
    return RMSNorm(config.n_embd)


class RMSNorm(nn.RMSNorm):
    """Division by the root mean square (arXiv:1910.07467), without a gain.

    Args:
        width: C.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6, elementwise_affine=False)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Return (..., C) from (..., C)."""
        return ops.rms_norm(x, self.eps or 0.0)


class Dropout(nn.Dropout):
    """torch's Dropout, with random numbers that are several times cheaper on a CPU."""

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Return x; in training, a share of its elements is set to zero and the others are scaled up."""
        return ops.dropout(x, self.p) if self.training else x


class CausalConv(nn.Module):
    """Adds the weighted embeddings of the few tokens before to that of each token; each channel has weights.

    So the first block sees n-grams, which attention would need a layer to form. It is a depthwise
    convolution, as in Primer (arXiv:2109.08668), but of the embeddings alone, so that a cache needs nothing
    but ids. At first it is the identity.

    Args:
        config: uses n_embd and conv_width.
    """

    weight: nn.Parameter

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.conv_width - 1, config.n_embd))

    def forward(self, x: Tensor, T: int) -> Tensor:
        """Return (B, T, C) for the last T tokens of (B, S, C)."""
        return ops.causal_conv(x, self.weight, T)


class CausalSelfAttention(nn.Module):
    """All heads of one layer: each token gathers from itself and the tokens before it.

    Args:
        config: uses n_embd, n_head, dropout, attention_dropout, bias, qkv_bias and qk_norm.
    """

    n_head: int
    dropout: float
    qk_norm: bool
    c_attn: nn.Linear
    c_proj: nn.Linear

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        C = config.n_embd
        self.n_head = config.n_head
        self.dropout = config.effective_attention_dropout
        self.qk_norm = config.qk_norm
        self.c_attn = nn.Linear(C, 3 * C, bias=config.qkv_bias)
        self.c_proj = nn.Linear(C, C, bias=config.bias)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Return (B, T, C) from (B, T, C).

        Args:
            x: the normalised residual stream.
            rotary: cosine and sine of these T positions, (T, D / 2) each, or None.
            cache: keys and values of earlier tokens; those of `x` are added.
        """
        y = ops.causal_attention(
            self.c_attn(x),  # (B, T, 3 C)
            self.n_head,
            rotary,
            qk_norm=self.qk_norm,
            dropout=self.dropout if self.training else 0.0,
            cache=cache,
        )
        out: Tensor = self.c_proj(y)  # (B, T, C)
        return out

    def weights(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Return the attention weights of (B, T, C), (B, H, T, T), for plots."""
        q, k, _ = ops.heads(self.c_attn(x), self.n_head, rotary, qk_norm=self.qk_norm)
        return ops.attention_weights(q, k)


class FeedForward(nn.Module):
    """The network that processes each token by itself.

    Args:
        config: uses n_embd, mlp_width, activation and bias.
    """

    c_fc: nn.Linear
    c_proj: nn.Linear

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        C, hidden = config.n_embd, config.effective_mlp_width
        self.activation = config.activation
        self.c_fc = nn.Linear(C, 2 * hidden if self.activation == "swiglu" else hidden, bias=config.bias)
        self.c_proj = nn.Linear(hidden, C, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, T, C) from (B, T, C)."""
        return ops.feed_forward(x, self.c_fc, self.c_proj, self.activation)


class Block(nn.Module):
    """Communication, then computation, each on a branch of the residual stream.

    Args:
        config: settings of the model.
    """

    ln_1: nn.Module
    attn: CausalSelfAttention
    ln_2: nn.Module
    mlp: FeedForward
    drop: Dropout

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = make_norm(config)
        self.mlp = FeedForward(config)
        self.drop = Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Return (B, T, C) from (B, T, C)."""
        x = x + self.drop(self.attn(self.ln_1(x), rotary, cache))
        out: Tensor = x + self.drop(self.mlp(self.ln_2(x)))
        return out
