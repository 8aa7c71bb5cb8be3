"""One draw from a distribution, by inversion.

The character is where a uniform number falls in the cumulated probabilities. With a uniform number
that has an address (`charlm.randomness.uniforms`) the same seed gives the same text for any batch
size, streamed or not, which a stateful generator such as `torch.multinomial`'s cannot give.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from charlm.backends.traits import has_float64
from charlm.errors import NonFiniteError

__all__ = ["nothing_to_draw", "sample"]


def sample(logits: Tensor, uniforms: NDArray[np.float64] | None) -> Tensor:
    """Choose one id in each row.

    Args:
        logits: (B, V), filtered; -inf removes a character.
        uniforms: (B,) numbers in [0, 1), one for each row. None: the likeliest id, the smaller of equals.

    Returns:
        (B,) int64.

    Raises:
        NonFiniteError: a row holds NaN or +inf, or nothing but -inf.

    Example:
        >>> import numpy as np
        >>> sample(torch.tensor([[0.0, 0.0]]), np.array([0.6]))
        tensor([1])
    """
    best = logits.amax(dim=-1)  # (B,) NaN if any is
    if not bool(torch.isfinite(best).all()):
        row = int((~torch.isfinite(best)).nonzero()[0])
        raise nothing_to_draw(row, best[row].item())
    if uniforms is None:
        return logits.argmax(dim=-1)
    # float64, so that a probability's rounding is far below what a sample could show. A device without it
    # leaves it to the CPU. (On MPS, which is one, draws in float32 have given ids out of range elsewhere.)
    device = logits.device if has_float64(logits.device) else torch.device("cpu")
    cumulated = logits.to(device).double().softmax(dim=-1).cumsum(dim=-1)  # (B, V)
    total = cumulated[:, -1:]  # (B, 1), 1 up to rounding
    threshold = torch.from_numpy(uniforms).to(device)[:, None] * total  # (B, 1)
    # Strictly below the total, so that a removed character at the end is never reached.
    threshold = torch.minimum(threshold, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulated, threshold, right=True)[:, 0].to(logits.device)  # (B,)


def nothing_to_draw(row: int, largest: float) -> NonFiniteError:
    """Return the error for a row of which the largest logit is not finite."""
    return NonFiniteError(
        f"no character can be drawn in row {row}: its largest logit is {largest}. "
        "The model's weights are not finite, or the filters removed every character."
    )
