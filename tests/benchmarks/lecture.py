"""The lecture's GPT and its loop, in the lecture's structure and our words: what a learner's notebook does.

A class for one head, heads in a ModuleList, a mask as a buffer, biases, ReLU, torch's AdamW as it comes. The
lecture is "Let's build GPT: from scratch, in code, spelled out" (https://github.com/karpathy/ng-video-lecture).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from charlm import GPTConfig

__all__ = ["random_blocks", "training_steps"]


class _Head(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.key = nn.Linear(config.n_embd, config.head_size, bias=False)
        self.query = nn.Linear(config.n_embd, config.head_size, bias=False)
        self.value = nn.Linear(config.n_embd, config.head_size, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.tril: Tensor
        self.register_buffer("tril", torch.tril(torch.ones(config.block_size, config.block_size)))

    @override
    def forward(self, x: Tensor) -> Tensor:
        _, T, _ = x.shape
        k, q, v = self.key(x), self.query(x), self.value(x)  # (B, T, D)
        weights = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5  # (B, T, T)
        weights = weights.masked_fill(self.tril[:T, :T] == 0, float("-inf"))
        weights = self.dropout(F.softmax(weights, dim=-1))
        y: Tensor = weights @ v  # (B, T, D)
        return y


class _Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        C = config.n_embd
        self.heads = nn.ModuleList([_Head(config) for _ in range(config.n_head)])
        self.proj = nn.Linear(C, C)
        self.dropout = nn.Dropout(config.dropout)
        self.feed_forward = nn.Sequential(
            nn.Linear(C, 4 * C), nn.ReLU(), nn.Linear(4 * C, C), nn.Dropout(config.dropout)
        )
        self.ln1, self.ln2 = nn.LayerNorm(C), nn.LayerNorm(C)

    @override
    def forward(self, x: Tensor) -> Tensor:
        normed = self.ln1(x)  # (B, T, C)
        x = x + self.dropout(self.proj(torch.cat([head(normed) for head in self.heads], dim=-1)))
        y: Tensor = x + self.feed_forward(self.ln2(x))
        return y


class _LectureGPT(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.positions = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.Sequential(*(_Block(config) for _ in range(config.n_layer)))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size)

    @override
    def forward(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        B, T = idx.shape
        x = self.tokens(idx) + self.positions(torch.arange(T, device=idx.device))  # (B, T, C)
        logits = self.head(self.ln_f(self.blocks(x)))  # (B, T, V)
        return logits, F.cross_entropy(logits.view(B * T, -1), targets.view(B * T))


def random_blocks(ids: Tensor, block_size: int, batch_size: int) -> tuple[Tensor, Tensor]:
    """Return a batch as the lecture makes it: a stack of slices, (B, T) and (B, T) int64."""
    starts = torch.randint(len(ids) - block_size, (batch_size,))
    x = torch.stack([ids[i : i + block_size] for i in starts])  # i is a tensor, as in the lecture
    y = torch.stack([ids[i + 1 : i + block_size + 1] for i in starts])
    return x, y


def training_steps(
    config: GPTConfig, ids: Tensor, batch_size: int, device: torch.device
) -> Callable[[int], None]:
    """Return a function that trains the lecture's model of these sizes for so many steps.

    Args:
        config: block_size, n_layer, n_head, n_embd, dropout and vocab_size are used.
        ids: (N,) int64, as the lecture keeps its text.
        batch_size: blocks in a step.
        device: where to train.
    """
    model = _LectureGPT(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)

    def steps(count: int) -> None:
        for _ in range(count):
            x, y = random_blocks(ids, config.block_size, batch_size)
            _, loss = model(x.to(device), y.to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    return steps
