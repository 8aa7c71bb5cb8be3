"""Pictures of a training: what is drawn, with which labels, and that nothing is drawn over something else."""

from __future__ import annotations

import dataclasses
import math
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness.command import environment
from harness.warm import WarmPython
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.text import Text

from charlm.errors import InputError
from charlm.plotting import plot_learning_rate, plot_loss, plot_run, plot_runs, plot_speed
from charlm.training import RunHistory

STEPS = np.arange(10, 1_010, 10)
HISTORY = RunHistory(
    name="shakespeare",
    steps=STEPS,
    loss_nats=1.4 + 2.5 * np.exp(-STEPS / 150),
    learning_rate=np.linspace(0.01, 0, 100),
    chars_per_second=np.linspace(40_000, 50_000, 100),
    eval_steps=np.array([250, 500, 750, 1_000]),
    eval_loss_nats=np.array([2.0, 1.6, 1.5, 1.55]),
    skipped_steps=np.array([], np.int64),
    baseline_loss_nats=1.7,
)
NOTHING = np.array([], np.int64)


def changed(**changes: Any) -> RunHistory:
    return dataclasses.replace(HISTORY, **changes)


def legend(ax: Axes) -> list[str]:
    drawn = ax.get_legend()
    return [] if drawn is None else [text.get_text() for text in drawn.get_texts()]


def shown_texts(figure: Figure) -> list[Text]:
    """Return every text that can be seen: labels, titles, legends, and ticks inside the panels."""
    figure.draw_without_rendering()
    texts = {text for text in figure.findobj(Text) if text.get_visible() and text.get_text()}
    for axis in figure.findobj(Axis):
        low, high = sorted(axis.get_view_interval())
        for tick in axis.get_major_ticks():
            if not low <= tick.get_loc() <= high:
                texts -= {tick.label1, tick.label2}
    return sorted(texts, key=str)


def test_loss_is_drawn_with_its_best_evaluation_and_the_baseline() -> None:
    ax = plot_loss(HISTORY)
    assert legend(ax) == [
        "training (one batch)",
        "validation",
        "best: 1.5000 at step 750",
        "n-gram baseline: 1.7000",
    ]
    train, val, best, baseline = ax.lines
    assert np.array_equal(train.get_xydata(), np.column_stack([STEPS, HISTORY.loss_nats]))
    assert np.array_equal(val.get_xydata(), np.column_stack([HISTORY.eval_steps, HISTORY.eval_loss_nats]))
    assert np.array_equal(best.get_xydata(), [[750, 1.5]])
    assert np.array_equal(baseline.get_ydata(), [1.7, 1.7])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("step", "loss (nats per character)")


def test_lines_differ_without_colour() -> None:
    looks = {(line.get_linestyle(), line.get_marker()) for line in plot_loss(HISTORY).lines}
    assert len(looks) == 4


def test_the_second_axis_has_bits() -> None:
    ax = plot_loss(HISTORY)
    (bits,) = ax.child_axes
    assert bits.get_ylabel() == "bits per character"
    assert isinstance(ax.figure, Figure)
    ax.figure.draw_without_rendering()
    assert np.allclose(np.array(ax.get_ylim()) / math.log(2), bits.get_ylim())


def test_a_run_of_bytes_has_their_unit() -> None:
    figure = plot_run(changed(unit="byte"))
    labels = [ax.get_ylabel() for ax in figure.axes]
    assert labels == ["loss (nats per byte)", "learning rate", "bytes per second"]
    assert figure.axes[0].child_axes[0].get_ylabel() == "bits per byte"


def test_learning_rate_and_speed_begin_at_zero_and_have_labels() -> None:
    rate, speed = plot_learning_rate(HISTORY), plot_speed(HISTORY)
    assert rate.get_ylabel() == "learning rate"
    assert speed.get_ylabel() == "characters per second"
    assert rate.get_ylim()[0] == speed.get_ylim()[0] == 0
    assert np.array_equal(rate.lines[0].get_ydata(), HISTORY.learning_rate)
    assert np.array_equal(speed.lines[0].get_ydata(), HISTORY.chars_per_second)
    assert isinstance(speed.figure, Figure)
    ticks = [text.get_text() for text in shown_texts(speed.figure)]
    assert "40k" in ticks
    assert "500" in ticks


def test_what_is_not_finite_is_a_gap_and_a_point_between_two_gaps_is_seen() -> None:
    loss = HISTORY.loss_nats.copy()
    loss[[50, 52]] = np.nan
    ax = plot_loss(changed(loss_nats=loss, skipped_steps=np.array([510, 530])))
    train = ax.lines[0]
    assert train.get_markevery() == [51]
    assert train.get_marker() == "."
    assert np.isnan(np.asarray(train.get_ydata())).sum() == 2
    assert legend(ax)[-1] == "skipped step"
    assert np.array_equal(ax.lines[-1].get_xdata(), [510, 530])


def test_a_long_run_has_some_markers_only() -> None:
    steps = np.arange(1, 10_001)
    ax = plot_loss(changed(eval_steps=steps, eval_loss_nats=1 + 1 / steps))
    marked = ax.lines[1].get_markevery()
    assert isinstance(marked, list)
    assert 20 <= len(marked) <= 31
    assert ax.lines[0].get_markevery() == []


@pytest.mark.parametrize(
    "changes",
    [
        {"eval_steps": NOTHING, "eval_loss_nats": NOTHING, "baseline_loss_nats": None},
        {"eval_steps": np.array([1_000]), "eval_loss_nats": np.array([1.5])},
        {"eval_steps": np.array([1_000]), "eval_loss_nats": np.array([np.nan])},
        {
            "steps": np.array([1]),
            "loss_nats": np.array([4.0]),
            "learning_rate": np.array([0.0]),
            "chars_per_second": np.array([1e-3]),
        },
        {"steps": NOTHING, "loss_nats": NOTHING, "learning_rate": NOTHING, "chars_per_second": NOTHING},
        {"loss_nats": np.full(100, np.nan), "eval_loss_nats": np.full(4, np.nan)},
        {"loss_nats": np.full(100, 3e38), "eval_loss_nats": np.full(4, -3e38)},
        {"learning_rate": np.zeros(100), "chars_per_second": np.full(100, 1e15)},
        {"name": "漢字 $x$ \x1b[2J \u202e 😀 run_1"},
    ],
    ids=[
        "no validation",
        "one evaluation",
        "infinite loss",
        "one step",
        "no steps",
        "nan",
        "huge",
        "flat",
        "name",
    ],
)
def test_every_kind_of_run_is_drawn_without_a_warning(changes: dict[str, Any], tmp_path: Path) -> None:
    plot_run(changed(**changes)).savefig(tmp_path / "run.svg")


def test_a_panel_without_a_finite_value_says_so_and_has_no_scale() -> None:
    nan = np.full(100, np.nan)
    ax = plot_loss(changed(loss_nats=nan, eval_loss_nats=nan[:4], baseline_loss_nats=None))
    assert [text.get_text() for text in ax.texts] == ["no finite value"]
    assert not ax.get_yticks().size
    assert [text.get_text() for text in plot_speed(changed(chars_per_second=nan)).texts] == [
        "no finite value"
    ]
    assert not plot_loss(HISTORY).texts


def test_the_name_of_a_run_is_readable_whatever_it_holds() -> None:
    figure = plot_run(changed(name="漢 $x$ \x1b"))
    assert figure.get_suptitle() == "U+6F22 $x$ U+001B"


@pytest.mark.parametrize("steps", [7, 700, 99_999, 12_345_678])
def test_no_text_lies_over_another(steps: int) -> None:
    at = np.unique((STEPS * steps / 1_000).astype(np.int64))
    columns = {
        name: getattr(HISTORY, name)[: len(at)] for name in ("loss_nats", "learning_rate", "chars_per_second")
    }
    figure = plot_run(
        changed(steps=at, eval_steps=np.array([steps]), eval_loss_nats=np.array([1.5]), **columns)
    )
    texts = shown_texts(figure)
    boxes = [text.get_window_extent() for text in texts]
    inside = figure.bbox
    for i, (text, box) in enumerate(zip(texts, boxes, strict=True)):
        assert inside.contains(*box.min), text
        assert inside.contains(*box.max), text
        for other, beside in zip(texts[:i], boxes[:i], strict=True):
            assert not box.overlaps(beside), (text, other)


def test_the_legend_makes_way_for_a_loss_that_rises_again() -> None:
    steps = np.arange(100, 3_001, 100)
    history = changed(eval_steps=steps, eval_loss_nats=1.4 + 3 * np.exp(-steps / 400) + steps / 1_500)
    ax = plot_loss(history)
    figure = ax.figure
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()
    drawn = ax.get_legend()
    assert drawn is not None
    points = ax.transData.transform(np.column_stack([history.eval_steps, history.eval_loss_nats]))
    assert not drawn.get_window_extent().count_contains(points)


def test_the_axes_that_are_given_are_used_and_returned() -> None:
    figure = Figure()
    above, below = figure.subplots(2)
    assert plot_loss(HISTORY, ax=above) is above
    assert plot_speed(HISTORY, ax=below) is below
    assert figure.axes == [above, below]


@pytest.mark.slow
def test_matplotlib_s_state_is_left_alone(tmp_path: Path, warm_python: WarmPython) -> None:
    program = """
import sys
import matplotlib
before = list(dict.items(matplotlib.rcParams))  # asked in the usual way, the backend would be chosen
import numpy as np
from charlm.plotting import *
from charlm.training import RunHistory
from charlm import BigramLM, CharTokenizer
import torch
one = np.ones(1)
history = RunHistory(name="x", steps=np.array([1]), loss_nats=one, learning_rate=one, chars_per_second=one,
                     eval_steps=np.array([1]), eval_loss_nats=one, skipped_steps=np.array([1]))
save_picture(plot_run(history), sys.argv[1])
plot_bigram(BigramLM(2), CharTokenizer("ab"))
plot_attention(torch.ones(1, 1, 1, 1), "a")
assert list(dict.items(matplotlib.rcParams)) == before
assert "matplotlib.pyplot" not in sys.modules
"""
    done = subprocess.run(
        warm_python("-W", "error", "-c", program, tmp_path / "run.svg"),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_several_runs_are_told_apart_by_name_colour_style_and_marker() -> None:
    without = changed(name="naïve", eval_steps=NOTHING, eval_loss_nats=np.array([]))
    part = changed(name="_hidden $x$", eval_part=(100, 5_000))
    figure = plot_runs([HISTORY, part, without])
    loss, rate, speed = figure.axes
    assert legend(loss) == [
        "shakespeare: 1.5000",
        "_hidden $x$: 1.5000 (100 of 5,000 characters)",
        "naïve (training)",
    ]
    for ax in (loss, rate, speed):
        looks = {(line.get_color(), line.get_linestyle()) for line in ax.get_lines()}
        assert len(looks) == len(ax.get_lines()) == 3
    assert len({line.get_marker() for line in loss.get_lines()}) == 3
    assert np.array_equal(loss.get_lines()[0].get_ydata(), HISTORY.eval_loss_nats)
    assert np.array_equal(loss.get_lines()[2].get_ydata(), HISTORY.loss_nats)
    assert shown_texts(figure)


def test_losses_of_two_units_are_not_drawn_beside_each_other() -> None:
    with pytest.raises(InputError, match="in one unit, per character or byte, got byte and character"):
        plot_runs([HISTORY, changed(unit="byte")])
    with pytest.raises(InputError, match="got none"):
        plot_runs([])
