"""Five functions of `ops.py` with hand-written derivatives, for faster training on a CPU.

Read `ops.py` for the mathematics; this file computes the same with fewer passes over memory. With a short
context, a CPU spends more time between matrix products than in them: autograd stores and re-reads each
intermediate tensor of a norm, a rotation or a softmax, and torch's fused attention has a slow backward pass.
Tests hold values and gradients of each function equal to the plain one. The functions can be differentiated
once. `ops.py` decides where they run.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["QK_EPS", "causal_attention", "causal_conv", "dropout", "relu_squared_mlp", "rms_norm"]


QK_EPS = 1e-6
"""Epsilon of the norm of queries and keys."""


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the type of matrix products of `x`: that of autocast, if it is on."""
    if x.dtype != torch.float64 and torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu")
    return x.dtype


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """Return x divided by the root mean square of its last dimension, in the type of matrix products.

    Args:
        x: (..., C).
        eps: added to the mean square.
    """
    out: Tensor = _RMSNorm.apply(x, eps, compute_dtype(x))  # type: ignore[no-untyped-call]
    return out


def relu_squared_mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Return max(x @ up.T, 0) ** 2 @ down.T."""
    out: Tensor = _ReLUSquaredMLP.apply(x.flatten(0, -2), up, down, compute_dtype(x))  # type: ignore[no-untyped-call]
    return out.view(x.shape)


def causal_attention(
    qkv: Tensor, n_head: int, rotary: tuple[Tensor, Tensor] | None, *, qk_norm: bool
) -> Tensor:
    """Compute `ops.causal_attention` without dropout and cache.

    Args:
        qkv: (B, T, 3 C), queries, keys and values side by side.
        n_head: H.
        rotary: cosine and sine of the positions' angles, (T, D / 2) each, or None.
        qk_norm: whether queries and keys are normalised in each head.

    Returns:
        (B, T, C).
    """
    tables = None
    if rotary is not None:
        cos, sin = (table.to(qkv.dtype) for table in rotary)
        # The rotation of x is x * cos + roll(x) * sin; a roll by half a head swaps its two halves.
        tables = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)  # (T, D) each
    out: Tensor = _CausalAttention.apply(qkv, n_head, tables, QK_EPS if qk_norm else None)  # type: ignore[no-untyped-call]
    return out


def causal_conv(x: Tensor, weight: Tensor) -> Tensor:
    """Compute `ops.causal_conv` for all tokens."""
    out: Tensor = _CausalConv.apply(x, weight)  # type: ignore[no-untyped-call]
    return out


def dropout(x: Tensor, p: float) -> Tensor:
    """Set about a share p of the elements to zero, and scale the others up to keep the mean.

    Each element uses sixteen random bits of numpy's Philox, which torch's generator seeds; torch alone would
    take four times as long. The share is p rounded to a multiple of 2 ** -16; the scale fits the rounded
    share.

    Args:
        x: any shape.
        p: in [0, 1).
    """
    seed = int(torch.randint(2**63 - 1, (), device="cpu"))
    words = np.random.Philox(seed).random_raw(-(-x.numel() // 4))
    bits = torch.from_numpy(words).view(torch.int16)[: x.numel()].view(x.shape)
    dropped = min(round(p * 2**16), 2**16 - 1)
    kept = (bits >= dropped - 2**15).to(x.dtype).mul_(2**16 / (2**16 - dropped))
    return x * kept


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        scale = _inverse_rms(x, eps)  # (..., 1)
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        y, scale = ctx.saved_tensors
        return _through_norm(grad.to(y.dtype), y, scale), None, None


class _ReLUSquaredMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor, down: Tensor, dtype: torch.dtype) -> Tensor:
        x, up_, down_ = x.to(dtype), up.to(dtype), down.to(dtype)
        hidden = torch.mm(x, up_.t()).clamp_min_(0)  # (M, F)
        squared = hidden * hidden
        ctx.save_for_backward(x, hidden, squared, up_, down_)
        return torch.mm(squared, down_.t())  # (M, C)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, hidden, squared, up, down = ctx.saved_tensors
        d_hidden = torch.mm(grad, down * 2).mul_(hidden)  # (M, F); the 2 costs less on the matrix
        return torch.mm(d_hidden, up), torch.mm(d_hidden.t(), x), torch.mm(grad.t(), squared), None


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        y = x.clone()
        for k, row in enumerate(weight[: x.size(1) - 1], start=1):
            y[:, k:].addcmul_(x[:, :-k], row)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        d_x, d_weight = grad.clone(), torch.zeros_like(weight)
        for k, row in enumerate(weight[: x.size(1) - 1], start=1):
            d_x[:, :-k].addcmul_(grad[:, k:], row)
            d_weight[k - 1] = (grad[:, k:] * x[:, :-k]).sum(dim=(0, 1))
        return d_x, d_weight


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, n_head: int, tables: tuple[Tensor, Tensor] | None, eps: float | None
    ) -> Tensor:
        B, T, _ = qkv.shape
        H = n_head
        D = qkv.size(-1) // (3 * H)
        with torch.autocast("cpu", enabled=False):
            split = qkv.view(B, T, 3, H, D).permute(2, 0, 3, 1, 4).contiguous()  # (3, B, H, T, D)
            qk, v = split[:2], split[2].view(B * H, T, D)
            scale = None
            if eps is not None:
                scale = _inverse_rms(qk, eps).to(qk.dtype)  # (2, B, H, T, 1)
                qk = qk * scale
            if tables is not None:
                cos, sin = tables
                qk = torch.addcmul(qk * cos, qk.roll(D // 2, dims=-1), sin)
            q, k = qk.view(2, B * H, T, D)
            mask = qkv.new_full((T, T), -torch.inf).triu(diagonal=1)  # (T, T)
            scores = torch.baddbmm(mask, q, k.mT, alpha=1 / math.sqrt(D))  # (B H, T, T)
            weights = torch.softmax(scores, dim=-1)
            y = torch.bmm(weights, v)  # (B H, T, D)
        ctx.save_for_backward(qk, v, weights, scale, *(tables or (None, None)))
        return y.view(B, H, T, D).transpose(1, 2).reshape(B, T, H * D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        qk, v, weights, scale, cos, sin = ctx.saved_tensors
        _, B, H, T, D = qk.shape
        q, k = qk.view(2, B * H, T, D)
        grad = grad.view(B, T, H, D).transpose(1, 2).reshape(B * H, T, D)
        out = qk.new_empty(3, B, H, T, D)
        torch.bmm(weights.mT, grad, out=out[2].view(B * H, T, D))
        # Softmax: subtract the weighted mean of each row. Masked places have weight 0, so their gradient is
        # 0.
        d_scores = torch._softmax_backward_data(torch.bmm(grad, v.mT), weights, -1, weights.dtype)
        d_qk = torch.empty_like(qk)
        torch.bmm(d_scores, k, out=d_qk[0].view(B * H, T, D))
        torch.bmm(d_scores.mT, q, out=d_qk[1].view(B * H, T, D))
        if scale is not None:  # this may come before the inverse rotation, which keeps inner products
            d_qk = _through_norm(d_qk, qk, scale)
        d_qk.mul_(1 / math.sqrt(D))
        if cos is None:
            out[:2] = d_qk
        else:  # the inverse rotation turns by minus the angle
            torch.addcmul(d_qk * cos, d_qk.roll(D // 2, dims=-1), sin, value=-1, out=out[:2])
        return out.permute(1, 3, 0, 2, 4).reshape(B, T, 3 * H * D), None, None, None


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """Return 1 / sqrt(mean of squares + eps) over the last dimension, (..., 1), at least in float32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
    scale: Tensor = norm.square_().mul_(1 / x.size(-1)).add_(eps).rsqrt_()
    return scale


def _through_norm(grad: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """Return the gradient at x of y = x * scale(x): the part along y vanishes, the rest is scaled."""
    along = (grad * y).sum(dim=-1, keepdim=True)  # (..., 1)
    return torch.addcmul(grad, y, along, value=-1 / y.size(-1)).mul_(scale)
