"""The computations of the layers: attention, norm, dropout and the feed-forward network, written plainly.

`layers.py` holds the parameters and calls these functions. Five of them have a faster version for the CPU in
`cpu_kernels.py`; tests hold its values and gradients equal to the plain version. `_kernel_applies` says where
it may be used, and each of the five functions adds its own conditions.
Shapes: B batch, T time, C channels, H heads, D = C / H; S tokens in the context, of which the last T are the
queries.
"""

from __future__ import annotations

import math
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from charlm.backends.traits import has_float64, is_host
from charlm.generation.cache import LayerCache
from charlm.models import cpu_kernels

__all__ = [
    "LONGEST_PLAIN",
    "attention_weights",
    "causal_attention",
    "causal_conv",
    "causal_mask",
    "dropout",
    "feed_forward",
    "fused_attention",
    "heads",
    "plain_attention",
    "rms_norm",
    "rotary_tables",
    "rotate",
]

LONGEST_PLAIN = 512
"""Up to this T, attention on a CPU forms all its weights: it trains faster than torch's fused attention."""


def rotary_tables(start: int, T: int, head_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of the angles of positions start ... start + T - 1, (T, D / 2) each.

    Pair i of a head turns by `position / 10000 ** (2 i / D)` (RoFormer, arXiv:2104.09864). The tables are
    computed in each pass: that is cheap, and a long window takes no memory before it is used.
    """
    dtype = torch.float64 if has_float64(device) else torch.float32
    speeds = 10_000.0 ** (-torch.arange(0, head_size, 2, dtype=dtype, device=device) / head_size)  # (D / 2,)
    positions = torch.arange(start, start + T, dtype=dtype, device=device)  # (T,)
    angles = positions[:, None] * speeds  # (T, D / 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys by the angles of their positions.

    The first half of a head pairs with the second.

    Args:
        x: (..., T, D).
        cos: (T, D / 2).
        sin: (T, D / 2).
    """
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    left, right = x.chunk(2, dim=-1)  # (..., T, D / 2)
    return torch.cat((left * cos - right * sin, left * sin + right * cos), dim=-1)  # (..., T, D)


def causal_mask(T: int, S: int, like: Tensor) -> Tensor:
    """Return the mask (T, S) that is added to the scores of the last T of S tokens: -inf for later tokens.

    A token may look at itself and at the tokens before it.
    """
    return torch.full((T, S), -torch.inf, dtype=like.dtype, device=like.device).triu(diagonal=S - T + 1)


def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    """Return how much each token gathers from each, as in the lecture: scores, mask, softmax.

    Args:
        q: (B, H, T, D), queries of the last T of S tokens.
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
    """Causal attention as in the lecture: the weighted sum of the values.

    Args:
        q: (B, H, T, D), queries of the last T of S tokens.
        k: (B, H, S, D).
        v: (B, H, S, D).
        dropout: share of the weights set to zero.

    Returns:
        (B, H, T, D).
    """
    return F.dropout(attention_weights(q, k), dropout) @ v


def fused_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """Compute `plain_attention` in one call of torch's fused kernels (arXiv:2205.14135)."""
    T, S = q.size(-2), k.size(-2)
    if T == S:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    mask = None if T == 1 else causal_mask(T, S, q)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


def heads(
    qkv: Tensor, n_head: int, rotary: tuple[Tensor, Tensor] | None, *, qk_norm: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values of each head, (B, H, T, D) each.

    Args:
        qkv: (B, T, 3 C), queries, keys and values side by side.
        n_head: H.
        rotary: cosine and sine of the positions' angles, (T, D / 2) each, or None.
        qk_norm: whether queries and keys are normalised in each head (arXiv:2010.04245).
    """
    B, T, _ = qkv.shape
    qkv = qkv.view(B, T, 3, n_head, -1).permute(2, 0, 3, 1, 4)
    qk, v = qkv[:2], qkv[2]  # (2, B, H, T, D) and (B, H, T, D)
    if qk_norm:
        qk = F.rms_norm(qk, (qk.size(-1),), eps=cpu_kernels.QK_EPS)
    if rotary is not None:
        qk = rotate(qk, *rotary)
    return qk[0], qk[1], v


def causal_attention(
    qkv: Tensor,
    n_head: int,
    rotary: tuple[Tensor, Tensor] | None = None,
    *,
    qk_norm: bool = False,
    dropout: float = 0.0,
    cache: LayerCache | None = None,
) -> Tensor:
    """Compute an attention layer between its two projections.

    Args:
        qkv: as for `heads`.
        n_head: as for `heads`.
        rotary: as for `heads`.
        qk_norm: as for `heads`.
        dropout: share of the attention weights set to zero.
        cache: keys and values of earlier tokens; those of the new tokens are added.

    Returns:
        (B, T, C), the weighted sums of the values.
    """
    B, T, _ = qkv.shape
    plain = is_host(qkv.device) and T <= LONGEST_PLAIN
    if plain and cache is None and dropout == 0 and _kernel_applies(qkv):
        return cpu_kernels.causal_attention(qkv, n_head, rotary, qk_norm=qk_norm)
    q, k, v = heads(qkv, n_head, rotary, qk_norm=qk_norm)  # (B, H, T, D) each
    if cache is not None:
        k, v = cache.append(k, v)  # (B, H, S, D)
    attend = plain_attention if plain else fused_attention
    y = attend(q, k, v, dropout)  # (B, H, T, D)
    return y.transpose(1, 2).reshape(B, T, -1)


def causal_conv(x: Tensor, weight: Tensor, T: int) -> Tensor:
    """Return x_t + w_1 x_(t-1) + w_2 x_(t-2) + …, channel by channel, for the last T tokens.

    Args:
        x: (B, S, C); tokens before the first count as zero.
        weight: (K, C), w_1 to w_K.
        T: at most S.

    Returns:
        (B, T, C).
    """
    if x.size(1) == T and _kernel_applies(x):
        return cpu_kernels.causal_conv(x, weight)
    K, S = weight.size(0), x.size(1)
    before = F.pad(x, (0, 0, K, 0))  # (B, K + S, C)
    y = x[:, S - T :]
    for k in range(1, K + 1):
        y = y + weight[k - 1] * before[:, K + S - T - k : K + S - k]
    return y


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """Return x (..., C) divided by the root mean square of its last dimension (arXiv:1910.07467)."""
    if _kernel_applies(x):
        return cpu_kernels.rms_norm(x, eps)
    return F.rms_norm(x, (x.size(-1),), eps=eps)


def dropout(x: Tensor, p: float) -> Tensor:
    """Set a share p of the elements to zero, and scale the others up to keep the mean."""
    if p and _kernel_applies(x):
        return cpu_kernels.dropout(x, p)
    return F.dropout(x, p)


def feed_forward(x: Tensor, up: nn.Module, down: nn.Module, activation: str) -> Tensor:
    """Apply two linear layers with an activation between them to each token by itself.

    Args:
        x: (B, T, C).
        up: to (B, T, F); with swiglu to (B, T, 2 F), gates first.
        down: from (B, T, F).
        activation: relu, relu2, gelu, gelu_tanh or swiglu.

    Returns:
        (B, T, C).
    """
    if activation == "relu2" and _kernel_applies(x) and _is_matrix(up) and _is_matrix(down):
        return cpu_kernels.relu_squared_mlp(x, up.weight, down.weight)
    x = up(x)  # (B, T, F)
    if activation == "relu":
        x = F.relu(x)
    elif activation == "relu2":  # Primer, arXiv:2109.08668
        x = F.relu(x).square()
    elif activation == "gelu":  # arXiv:1606.08415
        x = F.gelu(x)
    elif activation == "gelu_tanh":  # as in GPT-2
        x = F.gelu(x, approximate="tanh")
    else:  # swiglu, arXiv:2002.05202
        gate, value = x.chunk(2, dim=-1)
        x = F.silu(gate) * value
    out: Tensor = down(x)
    return out


def _kernel_applies(x: Tensor) -> bool:
    """Return whether `cpu_kernels` may replace the plain code: on a CPU, and not inside a transform.

    `torch.compile` fuses the plain code by itself; `torch.func` cannot transform a hand-written derivative.
    """
    return (
        is_host(x.device)
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


def _is_matrix(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Return whether a layer is a plain matrix: no bias, no replaced class or `forward`, no hooks."""
    hooks = (
        layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    )
    return (
        type(layer) is nn.Linear
        and layer.bias is None
        and not hooks
        and not nn.modules.module._has_any_global_hook()
        and "forward" not in layer.__dict__
    )
