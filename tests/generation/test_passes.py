"""Plans of passes: every position is predicted from the ids that it may see, and none is read in vain."""

from __future__ import annotations

from harness.drawn_models import overflows
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.plain_state import plain_window

from charlm.generation import Overflow, Pass
from charlm.generation.passes import plan_passes


@st.composite
def row(draw: st.DrawFn) -> tuple[range, range]:
    """Draw a span of positions, and what has been read: any ids, of this text or of what it was before."""
    start = draw(st.integers(1, 40))
    span = range(start, start + draw(st.integers(0, 30)))
    begin = draw(st.integers(0, 40))
    return span, range(begin, draw(st.integers(0, 50)))  # perhaps taken back to before the context


@settings(deadline=None)
@given(
    rows=st.lists(row(), min_size=1, max_size=4), window=st.none() | st.integers(1, 12), overflow=overflows
)
def test_each_position_of_each_span_is_predicted_once_from_what_it_may_see(
    rows: list[tuple[range, range]], window: int | None, overflow: Overflow
) -> None:
    spans, read = [span for span, _ in rows], [known for _, known in rows]
    rounds = plan_passes(spans, read, window, overflow)
    predicted: list[list[int]] = [[] for _ in rows]
    for passes in rounds:
        assert [one.row for one in passes] == sorted({one.row for one in passes})  # at most one for each
        for one in passes:
            assert one.begin <= one.start < one.stop
            if one.start > one.begin:  # what is not read must have been
                assert read[one.row].start == one.begin
                assert one.start <= read[one.row].stop
            else:
                assert one.start == one.begin
            positions = range(one.stop - one.wanted + 1, one.stop + 1)
            assert one.start < positions[0]
            for position in positions:
                assert position - one.begin == plain_window(position, window, overflow)
            next_begin = one.stop + 1 - plain_window(one.stop + 1, window, overflow)
            assert one.has_room == (next_begin == one.begin)
            predicted[one.row] += positions
            read[one.row] = range(one.begin, one.stop)
    assert predicted == [list(span) for span in spans]


@settings(deadline=None)
@given(length=st.integers(1, 60), window=st.none() | st.integers(1, 12), overflow=overflows)
def test_one_more_id_is_all_that_is_read_while_the_context_goes_on(
    length: int, window: int | None, overflow: Overflow
) -> None:
    begin = length - plain_window(length, window, overflow)
    next_begin = length + 1 - plain_window(length + 1, window, overflow)
    ((one,),) = plan_passes([range(length + 1, length + 2)], [range(begin, length)], window, overflow)
    assert one.wanted == 1
    assert (one.start, one.stop) == (length if next_begin == begin else next_begin, length + 1)


def test_what_was_read_is_read_again_only_for_its_last_prediction() -> None:
    assert plan_passes([range(5, 7)], [range(6)], None, "slide") == [[Pass(0, 0, 4, 6, 2, has_room=True)]]
    assert plan_passes([range(7, 7)], [range(6)], None, "slide") == []
