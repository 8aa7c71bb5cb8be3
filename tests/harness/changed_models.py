"""What a GPT's generation says, against what the model itself computes, whatever was done to it."""

from __future__ import annotations

import torch
from harness.drawn_models import random_rows
from oracles.plain_state import plain_logits

from charlm.models.gpt import GPT
from charlm.native.gpt import NativeGPT

__all__ = ["assert_says_what_it_computes", "kind_of_state"]

ROWS = random_rows([3, 9, 30])


def kind_of_state(model: GPT) -> str:
    """Return which path the next generation takes; the model must say the same."""
    fast = isinstance(model.new_state().engine, NativeGPT)
    assert fast == (model.why_not_native() is None)
    return "fast" if fast else "readable"


def assert_says_what_it_computes(model: GPT, tolerance: float = 1e-4) -> None:
    """Compare what a new state predicts with what the model says of the whole context."""
    state = model.new_state(3)
    state.observe(ROWS)
    wanted = torch.stack([plain_logits(model, row.tolist(), "slide") for row in ROWS])
    torch.testing.assert_close(state.predict(), wanted, rtol=1e-5, atol=tolerance, check_dtype=False)
