"""Grids of weights that can be stored in 16 or 8 bits: rounding to one, and finding the one of a model.

Weights are rounded to a grid once, in place (`charlm.load(..., weights=...)`), so every engine computes with
the same values. The compiled engine stores weights on a grid in fewer bits. After a write to a weight, they
are usually off the grid, and are stored in 32 bits again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from charlm.errors import InputError, shown
from charlm.plain import as_text

__all__ = ["STORAGES", "Storage", "round_weights", "rounded", "storage_of", "to_int8"]

Storage = Literal["float32", "bfloat16", "int8"]
STORAGES: tuple[Storage, ...] = ("float32", "bfloat16", "int8")
"""In the order of `kernel.c`."""

_LEAST = 1e-30  # a row of smaller weights is one of zeros
_MOST_INPUTS = 65_000  # of a sum of products of bytes that 32 bits are sure to hold


def rounded(weights: Tensor, storage: Storage) -> Tensor:
    """Return a matrix (N, K) rounded to a grid, in its own type. A second rounding changes nothing.

    Args:
        weights: of a linear layer, float32 or wider.
        storage: "bfloat16": 8 bits of a float's 24 are kept. "int8": each output's weights are integers from
            -127 to 127 times one number.
    """
    if storage == "int8":
        integers, scales = to_int8(weights)
        return (integers * scales[:, None]).to(weights.dtype)
    return weights.to(getattr(torch, storage)).to(weights.dtype)


def to_int8(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return integers (N, K) int8 and scales (N,) float32 whose products are close to the weights.

    A scale has 8 significant bits, so a product is exact in float32, and the factors can be recovered from
    it.
    """
    largest = weights.detach().float().abs().amax(dim=1)  # (N,)
    scales = torch.where(largest > _LEAST, (largest / 127).bfloat16().float(), 1.0)
    integers = (weights.detach().float() / scales[:, None]).round().clamp(-127, 127).to(torch.int8)
    return integers, scales


def storage_of(matrices: Iterable[Tensor]) -> Storage:
    """Return the narrowest storage that holds all given matrices exactly."""
    left: list[Storage] = ["int8", "bfloat16"]
    for weights in matrices:
        wide = weights.detach().float()
        left = [storage for storage in left if torch.equal(rounded(wide, storage), wide)]
        if wide.size(1) > _MOST_INPUTS:
            left = [storage for storage in left if storage != "int8"]
        if not left:
            return "float32"
    return left[0]


@torch.no_grad()
def round_weights(model: nn.Module, storage: Storage) -> None:
    """Convert a model's weights to float32, and round those of its linear layers to a grid, in place.

    Biases, norms and embeddings are not rounded, except for an embedding that is also a linear layer's
    matrix. A saved model has the rounded weights.

    Raises:
        InputError: there is no such storage, or the model has no linear layers.
    """
    if as_text(storage) not in STORAGES:
        raise InputError(f"weights must be one of {', '.join(STORAGES)}, or None, got {shown(storage)}")
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    if not layers:
        raise InputError(f"weights can be chosen for a GPT; a {type(model).__name__} has no linear layers")
    model.float()
    for layer in layers:
        layer.weight.copy_(rounded(layer.weight, storage))
