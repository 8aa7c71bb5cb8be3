"""The loss of a model on a text: every target is scored once; losses are summed, and divided once at the end.

No batches are sampled, so the result is exact and the same for any batch size. (nanoGPT reports the mean over
200 random batches.) Evaluation runs in the precision of the parameters, draws no random number and restores
training flags.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from charlm.backends.base import DeviceBackend
from charlm.backends.traits import has_float64
from charlm.backends.world import World
from charlm.data.batches import batches_on
from charlm.data.blocks import BlockDataset
from charlm.errors import InputError, shown
from charlm.evaluation.markup import figure, table
from charlm.models.base import LanguageModel
from charlm.modes import evaluation_mode
from charlm.plain import int_from
from charlm.text.tokenizer import Unit

__all__ = ["EvalResult", "default_batch_size", "evaluate", "evaluate_together", "predictions"]

_CHARS_PER_BATCH = 16_384
_LOGITS_PER_BATCH = 2**24


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """The result of an evaluation. All figures are per character, or per byte with a `ByteTokenizer`.

    Example:
        >>> result = EvalResult(loss_nats=1.5, accuracy=0.5, n_chars=100)
        >>> round(result.bits_per_char, 3), round(result.perplexity, 3)
        (2.164, 4.482)
    """

    loss_nats: float
    """Mean negative log likelihood, in nats; infinite if the model gave probability 0 to a character."""
    accuracy: float
    """Share of characters that were the likeliest prediction."""
    n_chars: int
    """Number of predicted characters."""
    n_bytes: int | None = None
    """Their length in UTF-8, if the text is known."""
    n_left_out: int = 0
    """Number of characters that `max_chars` left out; 0: the result is exact."""
    unit: Unit = field(default="character", repr=False)
    """The unit of the figures, "character" or "byte"."""

    @property
    def bits_per_char(self) -> float:
        """The loss in bits: `loss_nats / ln 2`."""
        return self.loss_nats / math.log(2)

    @property
    def bits_per_byte(self) -> float | None:
        """The loss per byte of UTF-8, which compares tokenizers; None if the text is unknown."""
        return None if self.n_bytes is None else self.bits_per_char * self.n_chars / self.n_bytes

    @property
    def perplexity(self) -> float:
        """Per character: `exp(loss_nats)`."""
        return math.inf if self.loss_nats >= 709 else math.exp(self.loss_nats)

    def _repr_html_(self) -> str:
        """Return a table for a notebook."""
        left_out = f" of {self.n_chars + self.n_left_out:,}, spread over them" if self.n_left_out else ""
        rows = [
            ["loss", figure(self.loss_nats), f"nats per {self.unit}"],
            ["", figure(self.bits_per_char), f"bits per {self.unit}"],
            ["perplexity", figure(self.perplexity), f"per {self.unit}"],
            ["accuracy", f"{100 * self.accuracy:.2f}", "% predicted as the likeliest"],
            ["predicted", f"{self.n_chars:,}", f"{self.unit}s{left_out}"],
        ]
        if self.bits_per_byte is not None and self.unit != "byte":
            rows.insert(2, ["", figure(self.bits_per_byte), "bits per byte of UTF-8"])
        return table(rows)


def evaluate(
    model: nn.Module,
    data: BlockDataset,
    *,
    batch_size: int | None = None,
    backend: DeviceBackend | None = None,
    max_chars: int | None = None,
) -> EvalResult:
    """Score every token of a text except its first, in windows of the data's block_size.

    Windows do not overlap: a token is predicted from those before it in its own window, on average half a
    window. The last window may be shorter.

    Args:
        model: `model(idx, targets)` returns logits (B, T, V) or (B T, V), and anything second.
        data: the text.
        batch_size: windows in one forward pass; changes speed and memory only. None: about 16,000 tokens,
            fewer with a large vocabulary.
        backend: the device of the model; None: the CPU.
        max_chars: score at most so many tokens, but at least one window. The windows are spread evenly over
            the text, always the same ones. None: all.

    Returns:
        The result over N - 1 tokens (with documents, over all but the first of each), or fewer with
        `max_chars`.

    Raises:
        InputError: `data` is no `BlockDataset`, or `max_chars` no int of 1 or more.

    Example:
        >>> from charlm import BigramLM
        >>> data = BlockDataset(torch.tensor([0, 1] * 20), block_size=8)
        >>> result = evaluate(BigramLM(2).fit(data, smoothing=0), data)
        >>> round(result.loss_nats, 6), result.accuracy, result.n_chars
        (0.0, 1.0, 39)
    """
    return evaluate_together(
        World(), model, data, batch_size=batch_size, backend=backend, max_chars=max_chars
    )


def evaluate_together(
    world: World,
    model: nn.Module,
    data: BlockDataset,
    *,
    batch_size: int | None = None,
    backend: DeviceBackend | None = None,
    max_chars: int | None = None,
) -> EvalResult:
    """Compute `evaluate` with several processes, each of which scores every Wth batch.

    The sums of the batches are added in the order of the text, so the result of all processes is that of one
    process, bit for bit.
    """
    sums = []
    for logits, targets in predictions(
        model,
        data,
        batch_size=batch_size,
        backend=backend,
        max_chars=max_chars,
        turn=(world.rank, world.size),
    ):
        losses = F.cross_entropy(logits, targets, reduction="none")  # (n,)
        nats = losses.sum(dtype=torch.float64 if has_float64(logits.device) else None).item()
        sums.append((nats, int((logits.argmax(dim=-1) == targets).sum()), len(targets)))
    total, hits, count = 0.0, 0, 0
    for nats, right, scored in world.rows(sums):
        total, hits, count = total + nats, hits + int(right), count + int(scored)
    left_out = data.n_targets - count
    return EvalResult(
        loss_nats=max(total, 0.0) / count,
        accuracy=hits / count,
        n_chars=count,
        n_left_out=left_out,
        unit=data.unit,
    )


def predictions(
    model: nn.Module,
    data: BlockDataset,
    *,
    batch_size: int | None,
    backend: DeviceBackend | None,
    max_chars: int | None = None,
    turn: tuple[int, int] = (0, 1),
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the model's logits for every token but the first, in order, with the targets.

    Arguments and errors are those of `evaluate`. With `turn` (r, W), every Wth batch from batch r on is read.

    Yields:
        Logits (n, V), at least in float32, and targets (n,) int64, on the model's device.
    """
    if not isinstance(data, BlockDataset):
        raise InputError(f"data must be a BlockDataset, got {shown(data)}")
    backend = backend or DeviceBackend("cpu")
    if batch_size is None:
        V = model.vocab_size if isinstance(model, LanguageModel) else data.max_id + 1
        batch_size = default_batch_size(data.block_size, V)
    most = _most_windows(data, max_chars)
    blocks = batches_on(data, backend).blocks(batch_size, most=most)
    for x, y in islice(blocks, turn[0], None, turn[1]):  # (B, T)
        with torch.no_grad(), evaluation_mode(model):
            logits = model(x, y)[0].flatten(0, -2)  # (B T, V)
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        yield wide, y.flatten()


def _most_windows(data: BlockDataset, max_chars: int | None) -> int | None:
    """Return the number of windows that `max_chars` allows; None: all."""
    if max_chars is None:
        return None
    most = int_from(1, max_chars, "max_chars")
    return None if most >= data.n_targets else max(1, most // data.block_size)


def default_batch_size(block_size: int, vocab_size: int) -> int:
    """Return the number of windows that `evaluate` scores at once by default.

    Args:
        block_size: T, tokens in a window.
        vocab_size: V; 0: unknown. The logits of a batch take at most 64 MB, unless those of one window take
            more.

    Example:
        >>> default_batch_size(64, 65), default_batch_size(64, 5_000), default_batch_size(10**6, 65)
        (256, 52, 1)
    """
    tokens = min(_CHARS_PER_BATCH, _LOGITS_PER_BATCH // max(1, vocab_size))
    return max(1, tokens // block_size)
