"""The surprisal of each character of a text: the loss of `evaluate` in detail.

Windows and precision are those of `evaluate`, so the mean of `bits` is its loss. This module knows ids alone:
`CharLM.surprisal` takes a text, and `charlm.evaluation.page` shows it.
The term is from Tribus (Thermostatics and Thermodynamics, 1961), the measure from Shannon (1948).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from charlm.backends.base import DeviceBackend
from charlm.data.blocks import BlockDataset
from charlm.evaluation.evaluate import EvalResult, predictions
from charlm.evaluation.markup import char_bits, coloured_text
from charlm.plain import int_from

__all__ = ["Surprisal", "surprisal"]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Surprisal:
    """Figures of each of the N characters of a text; the first one is not predicted.

    With a `ByteTokenizer`, the figures are those of bytes.
    """

    bits: NDArray[np.float64]
    """(N,) -log2 of the probability that the model gave to the character; NaN for the first."""
    entropy_bits: NDArray[np.float64]
    """(N,) entropy of the model's prediction, which is its expected surprisal; NaN for the first."""
    rank: NDArray[np.int64]
    """(N,) rank of the character among all, 1 for the likeliest, ties by id; 0 for the first."""
    context: NDArray[np.int64]
    """(N,) number of characters before it in its window, from which it was predicted; 0 for the first."""
    candidates: NDArray[np.int64]
    """(N, top) the likeliest ids, best first; -1 for the first."""
    candidate_probs: NDArray[np.float64]
    """(N, top) their probabilities; NaN for the first."""
    block_size: int
    """T, length of the windows."""
    result: EvalResult
    """The evaluation of the whole text."""
    text: str | None = None
    """The text, if it is known (from `CharLM.surprisal`); a notebook shows it in colours."""

    def __repr__(self) -> str:
        return f"<Surprisal of {len(self.bits):,} ids in windows of {self.block_size:,}: {self.result!r}>"

    def _repr_html_(self) -> str:
        """Return a table and the coloured text for a notebook."""
        figures = self.result._repr_html_()
        if self.text is None:
            return figures
        rank = self.rank if len(self.bits) == len(self.text) else None  # ranks of bytes are not shown
        return figures + coloured_text(self.text, char_bits(self.text, self.bits), rank)


def surprisal(
    model: nn.Module,
    data: BlockDataset,
    *,
    top: int = 0,
    batch_size: int | None = None,
    backend: DeviceBackend | None = None,
) -> Surprisal:
    """Score every token of a text except its first, as in `evaluate`, and return the figures of each.

    Args:
        model: `model(idx, targets)` returns logits (B, T, V) or (B T, V), and anything second.
        data: the text, N tokens.
        top: number of likeliest candidates for each token, at most V.
        batch_size: windows in one forward pass; changes speed and memory only. None: as in `evaluate`.
        backend: the device of the model; None: the CPU.

    Raises:
        InputError: `data` is no `BlockDataset`, or `top` no int of 0 or more.

    Example:
        >>> from charlm import BigramLM
        >>> data = BlockDataset(torch.tensor([0, 1] * 20), block_size=8)
        >>> found = surprisal(BigramLM(2).fit(data, smoothing=0), data, top=1)
        >>> found.bits[:3].tolist(), found.rank[:3].tolist(), found.candidates[:3, 0].tolist()
        ([nan, 0.0, 0.0], [0, 1, 1], [-1, 1, 0])
    """
    top = int_from(0, top, "top")
    N, T = data.n_ids, data.block_size
    bits, entropy = np.full(N, np.nan), np.full(N, np.nan)
    rank = np.zeros(N, np.int64)
    candidates: list[NDArray[Any]] = []
    probs: list[NDArray[Any]] = []
    hits, at = 0, 1
    for logits, targets in predictions(model, data, batch_size=batch_size, backend=backend):
        V = logits.size(-1)
        here = slice(at, at + len(targets))
        nats = F.cross_entropy(logits, targets, reduction="none")  # (n,)
        p = logits.softmax(dim=-1)  # (n, V)
        bits[here] = _array(nats.clamp(min=0) + 0.0) / math.log(2)  # certainty is 0 bits, and not -0
        entropy[here] = _array(torch.special.entr(p).sum(dim=-1)) / math.log(2)
        own = logits.gather(1, targets[:, None])  # (n, 1)
        earlier = torch.arange(V, device=logits.device) < targets[:, None]  # (n, V)
        rank[here] = _array(1 + (logits > own).sum(dim=-1) + ((logits == own) & earlier).sum(dim=-1))
        best = p.topk(min(top, V), dim=-1)
        candidates.append(_array(best.indices))
        probs.append(_array(best.values))
        hits += int((logits.argmax(dim=-1) == targets).sum())
        at = here.stop
    kept = candidates[0].shape[1]
    context = np.arange(-1, N - 1) % T + 1
    context[0] = 0
    loss = bits[1:].mean() * math.log(2)
    return Surprisal(
        bits=bits,
        entropy_bits=entropy,
        rank=rank,
        context=context,
        candidates=np.concatenate([np.full((1, kept), -1), *candidates]),
        candidate_probs=np.concatenate([np.full((1, kept), np.nan), *probs]),
        block_size=T,
        result=EvalResult(loss_nats=float(loss), accuracy=hits / (N - 1), n_chars=N - 1, unit=data.unit),
    )


def _array(values: Tensor) -> NDArray[Any]:
    return values.cpu().numpy()
