"""The time that an evaluation takes, and the part of a text that can be evaluated within a time."""

from __future__ import annotations

import time

from torch import nn

from charlm.backends.base import DeviceBackend
from charlm.data.blocks import BlockDataset
from charlm.evaluation.evaluate import evaluate

__all__ = ["chars_within", "evaluation_seconds"]

_LEAST_SECONDS = 0.05  # of a trial; a shorter one is noise


def evaluation_seconds(
    model: nn.Module, data: BlockDataset, *, backend: DeviceBackend, max_chars: int | None = None
) -> float:
    """Return the time that `evaluate` will take, from trials on small parts of the text.

    Args:
        model: on the backend's device.
        data: the text.
        backend: the device.
        max_chars: as for `evaluate`.
    """
    N = data.n_targets
    scored = N if max_chars is None else min(max_chars, N)
    chars = data.block_size
    while True:
        evaluate(model, data, backend=backend, max_chars=min(chars, scored))  # warms up for this shape
        began = time.perf_counter()
        result = evaluate(model, data, backend=backend, max_chars=min(chars, scored))
        seconds = time.perf_counter() - began
        if chars >= scored:
            return seconds
        if seconds >= _LEAST_SECONDS:
            return seconds * scored / result.n_chars
        chars *= 4


def chars_within(
    seconds: float, model: nn.Module, data: BlockDataset, *, backend: DeviceBackend
) -> tuple[int | None, float]:
    """Return the number of characters that can be evaluated within a time, and the time that they take.

    Args:
        seconds: the time.
        model: on the backend's device.
        data: the text.
        backend: the device.

    Returns:
        `max_chars` for `evaluate`, None for all, and the seconds.
    """
    whole = evaluation_seconds(model, data, backend=backend)
    if whole <= seconds:
        return None, whole
    N, T = data.n_targets, data.block_size
    chars = max(T, int(N * seconds / whole) // T * T)
    return chars, whole * chars / N
