"""One draw from a distribution, by inversion.

The chosen token is the one where a uniform number falls in the cumulated probabilities. The uniform number
has an address (`charlm.randomness.uniforms`). So the same seed gives the same text for any batch size,
streamed or not; a generator with a state, as in `torch.multinomial`, cannot do that.
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
        logits: (B, V), filtered; -inf removes a token.
        uniforms: (B,) numbers in [0, 1). None: take the likeliest id, and of equals the smallest.

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
    # In float64, rounding is far below anything that a sample could show. A device without float64, such as
    # MPS, leaves the draw to the CPU. (In other projects, float32 draws on MPS gave ids out of range.)
    device = logits.device if has_float64(logits.device) else torch.device("cpu")
    cumulated = logits.to(device).double().softmax(dim=-1).cumsum(dim=-1)  # (B, V)
    total = cumulated[:, -1:]  # (B, 1), 1 up to rounding
    threshold = torch.from_numpy(uniforms).to(device)[:, None] * total  # (B, 1)
    # Strictly below the total, so that a removed token at the end is never chosen.
    threshold = torch.minimum(threshold, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulated, threshold, right=True)[:, 0].to(logits.device)  # (B,)


def nothing_to_draw(row: int, largest: float) -> NonFiniteError:
    """Return the error for a row whose largest logit is not finite."""
    return NonFiniteError(
        f"no token can be drawn in row {row}: its largest logit is {largest}. "
        "The model's weights are not finite, or the filters removed every token."
    )
