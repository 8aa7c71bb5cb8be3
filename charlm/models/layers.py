"""The parts of a GPT: norms, rotary positions, causal self-attention, the feed-forward network, the block.

Lay this file beside the lecture: `CausalSelfAttention` is its heads side by side, `FeedForward` and
`Block` are its classes of those names. Parameter names are GPT-2's, by way of nanoGPT.
Shapes: B batch, T time, C channels, H heads, D = C / H.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from charlm.generation.cache import LayerCache
from charlm.models import fast
from charlm.models.config import GPTConfig

__all__ = [
    "Block",
    "CausalSelfAttention",
    "Dropout",
    "FeedForward",
    "attention_weights",
    "causal_mask",
    "fused_attention",
    "make_norm",
    "plain_attention",
    "rotary_tables",
    "rotate",
]


def make_norm(config: GPTConfig) -> nn.Module:
    """Return the normalisation before a branch: LayerNorm, or RMSNorm (arXiv:1910.07467) without a gain.

    A matrix follows each norm, and can learn what a gain would.
    """
    if config.norm == "layernorm":
        return nn.LayerNorm(config.n_embd, bias=config.bias)
    return RMSNorm(config.n_embd, eps=1e-6, elementwise_affine=False)


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm; without a gain, on a CPU, in one pass less."""

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Return (..., C) from (..., C)."""
        return fast.rms_norm(x, self.eps or 0.0) if fast.usable(x) else super().forward(x)


class Dropout(nn.Dropout):
    """torch's Dropout; on a CPU with random numbers that are several times cheaper."""

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Return x with a share of its elements set to zero, and the others scaled up, while training."""
        if self.training and self.p and fast.usable(x):
            return fast.dropout(x, self.p)
        return super().forward(x)


def rotary_tables(start: int, T: int, head_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of the angles of positions start ... start + T - 1, (T, D / 2) each.

    Pair i of a head turns by `position / 10000 ** (2 i / D)`: RoFormer, arXiv:2104.09864. Made anew in each
    pass, which costs next to nothing, so that a long window takes no memory before it is used.
    """
    dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
    speeds = 10_000.0 ** (-torch.arange(0, head_size, 2, dtype=dtype, device=device) / head_size)  # (D / 2,)
    positions = torch.arange(start, start + T, dtype=dtype, device=device)  # (T,)
    angles = positions[:, None] * speeds  # (T, D / 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn queries or keys by their positions' angles; the first half of a head pairs with the second.

    Args:
        x: (..., T, D).
        cos: (T, D / 2).
        sin: (T, D / 2).
    """
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    left, right = x.chunk(2, dim=-1)  # (..., T, D / 2)
    return torch.cat((left * cos - right * sin, left * sin + right * cos), dim=-1)  # (..., T, D)


def causal_mask(T: int, S: int, like: Tensor) -> Tensor:
    """Return (T, S), what to add to the scores of the last T of S characters: -inf where one may not look.

    A character may look at itself and at those before it.
    """
    return torch.full((T, S), -torch.inf, dtype=like.dtype, device=like.device).triu(diagonal=S - T + 1)


def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    """Return how much each character gathers from each, as the lecture writes it: scores, mask, softmax.

    Args:
        q: (B, H, T, D), queries of the last T of S characters.
        k: (B, H, S, D).

    Returns:
        (B, H, T, S), the shares of each query, which sum to 1.
    """
    T, D, S = q.size(-2), q.size(-1), k.size(-2)
    scores = (q * (1 / math.sqrt(D))) @ k.transpose(-2, -1)  # (B, H, T, S)
    if T > 1:
        scores = scores + causal_mask(T, S, scores)
    return scores.softmax(dim=-1)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """Causal attention as the lecture writes it: the weighted sum of what the characters offer.

    Args:
        q: (B, H, T, D), queries of the last T of S characters.
        k: (B, H, S, D).
        v: (B, H, S, D).
        dropout: share of the weights set to zero.

    Returns:
        (B, H, T, D).
    """
    return F.dropout(attention_weights(q, k), dropout) @ v


def fused_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """Do what `plain_attention` does, in one call of torch's fused kernels (arXiv:2205.14135)."""
    T, S = q.size(-2), k.size(-2)
    if T == S:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    mask = None if T == 1 else causal_mask(T, S, q)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


class CausalSelfAttention(nn.Module):
    """All heads of one layer: each character gathers from those before it.

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
        self.dropout = config.dropped_attention
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
            cache: keys and values of earlier characters; this layer adds its own.
        """
        T = x.size(1)
        qkv = self.c_attn(x)  # (B, T, 3 C)
        dropout = self.dropout if self.training else 0.0
        if cache is None and dropout == 0 and T <= fast.LONGEST and fast.usable(x):
            y = fast.causal_attention(qkv, self.n_head, rotary, qk_norm=self.qk_norm)  # (B, T, C)
        else:
            y = self._attend(qkv, rotary, cache, dropout)
        out: Tensor = self.c_proj(y)
        return out

    def weights(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Return (B, H, T, T), how much each character of (B, T, C) gathers from each; for looking at."""
        q, k, _ = self._heads(self.c_attn(x), rotary)
        return attention_weights(q, k)

    def _heads(self, qkv: Tensor, rotary: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of each head, (B, H, T, D) each, from (B, T, 3 C)."""
        B, T, _ = qkv.shape
        qkv = qkv.view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
        qk, v = qkv[:2], qkv[2]  # (2, B, H, T, D) and (B, H, T, D)
        if self.qk_norm:  # arXiv:2010.04245
            qk = F.rms_norm(qk, (qk.size(-1),), eps=1e-6)
        if rotary is not None:
            qk = rotate(qk, *rotary)
        return qk[0], qk[1], v

    def _attend(
        self, qkv: Tensor, rotary: tuple[Tensor, Tensor] | None, cache: LayerCache | None, dropout: float
    ) -> Tensor:
        """Return (B, T, C), what each character gathered, from (B, T, 3 C)."""
        B, T, _ = qkv.shape
        q, k, v = self._heads(qkv, rotary)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, H, S, D)
        # On a CPU the fused kernel's backward pass is slower than plain matrix products at short T.
        fused = qkv.device.type != "cpu" or T > fast.LONGEST
        attend = fused_attention if fused else plain_attention
        y = attend(q, k, v, dropout)  # (B, H, T, D)
        return y.transpose(1, 2).reshape(B, T, -1)


class FeedForward(nn.Module):
    """The network that each character passes through by itself.

    Args:
        config: uses n_embd, mlp_width, activation and bias.
    """

    c_fc: nn.Linear
    c_proj: nn.Linear

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        C, hidden = config.n_embd, config.hidden_size
        self.activation = config.activation
        self.c_fc = nn.Linear(C, 2 * hidden if self.activation == "swiglu" else hidden, bias=config.bias)
        self.c_proj = nn.Linear(hidden, C, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, T, C) from (B, T, C)."""
        if self.activation == "relu2" and self.c_fc.bias is None and fast.usable(x):
            return fast.relu_squared_mlp(x, self.c_fc.weight, self.c_proj.weight)
        x = self.c_fc(x)  # (B, T, hidden), twice that for swiglu
        if self.activation == "relu":
            x = F.relu(x)
        elif self.activation == "relu2":  # Primer, arXiv:2109.08668
            x = F.relu(x).square()
        elif self.activation == "gelu":  # arXiv:1606.08415
            x = F.gelu(x)
        elif self.activation == "gelu_tanh":  # as in GPT-2
            x = F.gelu(x, approximate="tanh")
        else:  # swiglu, arXiv:2002.05202
            gate, value = x.chunk(2, dim=-1)
            x = F.silu(gate) * value
        out: Tensor = self.c_proj(x)
        return out


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
