"""The guard alone: its two forms judge a series of steps alike, as a plain count says."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from charlm.training.guard import MaskedGuard, WaitingGuard

BAD = [math.nan, math.inf, -math.inf]
series = st.lists(st.sampled_from([1.0, 1.0, 1.0, *BAD]), max_size=40)


def scalar(value: float) -> Tensor:
    return torch.tensor(value)


def first_end(losses: list[float], limit: int) -> int | None:
    """Return the first step with which `limit` in a row were not finite."""
    row = 0
    for step, loss in enumerate(losses):
        row = 0 if math.isfinite(loss) else row + 1
        if row >= limit:
            return step
    return None


@settings(deadline=None)  # the first optimizer of a process takes a second to import
@given(series, st.sampled_from([1, 2, 3, 10]))
def test_the_waiting_form_moves_skips_and_ends_as_a_plain_count_says(losses: list[float], limit: int) -> None:
    guard, end = WaitingGuard(limit), first_end(losses, limit)
    for step, loss in enumerate(losses):
        verdict = guard.judge(step, scalar(loss), scalar(1.0), [])
        if math.isfinite(loss):
            assert verdict == "move"
        else:
            assert verdict == ("end" if step == end else "skip")
        if step == end:
            break
    done = len(losses) if end is None else end
    skipped = [step + 1 for step, loss in enumerate(losses[:done]) if not math.isfinite(loss)]
    assert [bad.step for bad in guard.skipped(done)] == skipped
    assert guard.skipped(done) == []


@settings(deadline=None)  # the first optimizer of a process takes a second to import
@given(series, st.sampled_from([1, 2, 3, 10]))
def test_the_masked_form_leaves_the_same_steps_out_and_knows_the_same_end(
    losses: list[float], limit: int
) -> None:
    guard, end = MaskedGuard(limit), first_end(losses, limit)
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], fused=True)
    for step, loss in enumerate(losses):
        assert guard.judge(step, scalar(loss), scalar(1.0), [optimizer]) == "move"
        masked = bool(optimizer.found_inf)  # type: ignore[attr-defined]  # as torch's gradient scaler sets it
        assert masked == (not math.isfinite(loss) or (end is not None and step >= end))
    assert guard.ended_at() == guard.ended_at() == end
    done = len(losses) if end is None else end
    skipped = [step + 1 for step, loss in enumerate(losses[:done]) if not math.isfinite(loss)]
    assert [bad.step for bad in guard.skipped(done)] == (skipped if limit > 1 else [])


@given(st.lists(st.sampled_from(BAD), min_size=1, max_size=5))
def test_a_gradient_counts_like_a_loss_and_is_reported_with_it(norms: list[float]) -> None:
    guard = WaitingGuard(limit=10)
    for step, norm in enumerate(norms):
        assert guard.judge(step, scalar(2.0), scalar(norm), []) == "skip"
    found = guard.skipped(len(norms))
    assert [bad.loss for bad in found] == [2.0] * len(norms)
    assert [repr(bad.grad_norm) for bad in found] == [repr(norm) for norm in norms]
    assert all(b.step == a.step + 1 for a, b in pairwise(found))


@settings(deadline=None)
@given(series, st.sampled_from([2, 3, 10]), st.integers(0, 40), st.booleans())
def test_a_row_goes_on_where_a_resumed_run_had_come_to(
    losses: list[float], limit: int, at: int, masked: bool
) -> None:
    end = first_end(losses, limit)
    at = min(at, len(losses) if end is None else end)
    before, after = (
        (MaskedGuard(limit), MaskedGuard(limit)) if masked else (WaitingGuard(limit), WaitingGuard(limit))
    )
    for step in range(at):
        before.judge(step, scalar(losses[step]), scalar(1.0), [])
    after.begin(before.in_a_row())
    verdicts = [after.judge(step, scalar(losses[step]), scalar(1.0), []) for step in range(at, len(losses))]
    found = after.ended_at() if masked else verdicts.index("end") + at if "end" in verdicts else None
    assert found == end
