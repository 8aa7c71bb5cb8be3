"""Curves of a training: loss, learning rate and speed against the step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from charlm.errors import InputError
from charlm.plotting.figures import new_figure
from charlm.plotting.labels import readable
from charlm.runs.history import RunHistory
from charlm.text.tokenizer import Unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_learning_rate", "plot_loss", "plot_run", "plot_runs", "plot_speed"]

_SIZE = 6.4, 4.0  # inches of a figure with one panel
_MARKERS = 30  # on a line
_GREY = "0.55"
_STYLES = ("-", "--", "-.", ":")  # of several runs
_SHAPES = "osD^vPX"


def plot_loss(history: RunHistory, *, ax: Axes | None = None) -> Axes:
    """Draw training loss and validation loss against the step, in nats (left axis) and bits (right axis).

    A star marks the best evaluation. A thin line is the loss of the n-gram model that `charlm train` counted.
    A loss that was not finite leaves a gap. A skipped step is a cross at the lower edge.

    Args:
        history: of the run.
        ax: the axes, or None for a new figure.

    Returns:
        The axes.

    Raises:
        CharLMError: matplotlib is not installed.

    Example:
        >>> from tempfile import mkdtemp
        >>> from charlm import BigramLM, BlockDataset, Trainer, TrainerConfig
        >>> from charlm.training import read_history
        >>> run, data = mkdtemp() + "/run", BlockDataset(np.arange(100) % 3, block_size=8)
        >>> config = TrainerConfig(max_steps=20, precision="fp32")
        >>> _ = Trainer(BigramLM(3), data, config, out_dir=run, device="cpu").fit()
        >>> plot_loss(read_history(run)).get_ylabel()
        'loss (nats per character)'
    """
    ax = _axes(ax)
    if len(history.steps):
        _line(ax, history.steps, history.loss_nats, color=_GREY, linewidth=1, label="training (one batch)")
    if len(history.eval_steps):
        label = f"validation{_part(history.eval_part, history.unit)}"
        _line(ax, history.eval_steps, history.eval_loss_nats, color="0", marker="o", label=label)
    best = history.best
    if best is not None:
        step, loss = int(history.eval_steps[best]), float(history.eval_loss_nats[best])
        label = f"best: {loss:.4f} at step {step:,}"
        ax.plot(step, loss, "*", markersize=14, color="0", markerfacecolor="1", zorder=3, label=label)
    if history.baseline_loss_nats is not None:
        label = (
            f"n-gram baseline: {history.baseline_loss_nats:.4f}{_part(history.baseline_part, history.unit)}"
        )
        ax.axhline(history.baseline_loss_nats, color="0", linewidth=0.8, linestyle="--", label=label)
    if history.result is not None:
        kind, loss = history.result
        ax.axhline(loss, color="0", linewidth=0.8, linestyle=":", label=f"result, {kind}: {loss:.4f}")
    if len(history.skipped_steps):
        ax.plot(
            history.skipped_steps,
            np.full(len(history.skipped_steps), 0.03),
            "x",
            color="0",
            transform=ax.get_xaxis_transform(),
            label="skipped step",
        )
    _add_bits(ax, history.unit)
    ax.legend(loc="best")
    _finish(ax, f"loss (nats per {history.unit})", history.loss_nats, history.eval_loss_nats)
    return ax


def plot_learning_rate(history: RunHistory, *, ax: Axes | None = None) -> Axes:
    """Draw the learning rate against the step; for arguments, result and errors, see `plot_loss`.

    Example:
        >>> from tempfile import mkdtemp
        >>> from charlm import BigramLM, BlockDataset, Trainer, TrainerConfig
        >>> from charlm.training import read_history
        >>> run, data = mkdtemp() + "/run", BlockDataset(np.arange(100) % 3, block_size=8)
        >>> config = TrainerConfig(max_steps=20, precision="fp32")
        >>> _ = Trainer(BigramLM(3), data, config, out_dir=run, device="cpu").fit()
        >>> plot_learning_rate(read_history(run)).get_ylabel()
        'learning rate'
    """
    ax = _axes(ax)
    _line(ax, history.steps, history.learning_rate, color="0")
    _finish_rate(ax, history.learning_rate)
    return ax


def plot_speed(history: RunHistory, *, ax: Axes | None = None) -> Axes:
    """Draw characters per second against the step; for arguments, result and errors, see `plot_loss`.

    The time includes evaluations and checkpoints.

    Example:
        >>> from tempfile import mkdtemp
        >>> from charlm import BigramLM, BlockDataset, Trainer, TrainerConfig
        >>> from charlm.training import read_history
        >>> run, data = mkdtemp() + "/run", BlockDataset(np.arange(100) % 3, block_size=8)
        >>> config = TrainerConfig(max_steps=20, precision="fp32")
        >>> _ = Trainer(BigramLM(3), data, config, out_dir=run, device="cpu").fit()
        >>> plot_speed(read_history(run)).get_ylabel()
        'characters per second'
    """
    ax = _axes(ax)
    _line(ax, history.steps, history.chars_per_second, color="0")
    _finish_speed(ax, history.unit, history.chars_per_second)
    return ax


def plot_run(history: RunHistory) -> Figure:
    """Draw loss, learning rate and speed of a run in one figure.

    Args:
        history: of the run.

    Returns:
        A new figure, not registered with pyplot.

    Raises:
        CharLMError: matplotlib is not installed.

    Example:
        >>> from tempfile import mkdtemp
        >>> from charlm import BigramLM, BlockDataset, Trainer, TrainerConfig
        >>> from charlm.training import read_history
        >>> run, data = mkdtemp() + "/run", BlockDataset(np.arange(100) % 3, block_size=8)
        >>> config = TrainerConfig(max_steps=20, precision="fp32")
        >>> _ = Trainer(BigramLM(3), data, config, out_dir=run, device="cpu").fit()
        >>> len(plot_run(read_history(run)).axes)
        3
    """
    figure = new_figure(10, 4.5)
    panels = figure.subplot_mosaic([["loss", "rate"], ["loss", "speed"]], width_ratios=(2, 1), sharex=True)
    plot_loss(history, ax=panels["loss"])
    plot_learning_rate(history, ax=panels["rate"]).set_xlabel("")
    plot_speed(history, ax=panels["speed"])
    title = figure.suptitle(history.name)
    names, families = readable([history.name], title.get_fontproperties(), spaces=False)
    title.set(text=names[0], family=families, parse_math=False)
    return figure


def plot_runs(histories: Sequence[RunHistory]) -> Figure:
    """Draw loss, learning rate and speed of several runs in one figure, labelled by name.

    The loss is the validation loss, or the training loss for a run without validation. Lines differ in
    colour, style and marker.

    Args:
        histories: of the runs, as `read_histories` returns them.

    Returns:
        A new figure, not registered with pyplot.

    Raises:
        CharLMError: matplotlib is not installed.
        InputError: there is no run, or the losses have different units.

    Example:
        >>> from tempfile import mkdtemp
        >>> from charlm import BigramLM, BlockDataset, Trainer, TrainerConfig
        >>> from charlm.training import read_histories
        >>> runs, data = [mkdtemp() + name for name in ("/one", "/two")], BlockDataset(np.arange(100) % 3, 8)
        >>> for seed, run in enumerate(runs):
        ...     config = TrainerConfig(max_steps=20, precision="fp32", seed=seed)
        ...     _ = Trainer(BigramLM(3), data, config, out_dir=run, device="cpu").fit()
        >>> figure = plot_runs(read_histories(runs))
        >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        ['one (training)', 'two (training)']
    """
    units = {history.unit for history in histories}
    if len(units) != 1:
        got = " and ".join(sorted(units)) or "none"
        raise InputError(
            f"histories must be of runs with losses in one unit, per character or byte, got {got}"
        )
    unit = histories[0].unit
    figure = new_figure(10, 4.5)
    panels = figure.subplot_mosaic([["loss", "rate"], ["loss", "speed"]], width_ratios=(2, 1), sharex=True)
    loss, rate, speed = panels["loss"], panels["rate"], panels["speed"]
    names, families = readable(
        [_label(history) for history in histories], loss.title.get_fontproperties(), spaces=False
    )
    for number, (history, name) in enumerate(zip(histories, names, strict=True)):
        look: dict[str, Any] = {
            "color": f"C{number % 10}",
            "linestyle": _STYLES[number % len(_STYLES)],
            "linewidth": 1.2,
        }
        marker = _SHAPES[number % len(_SHAPES)]
        # A name that begins with an underscore would be left out of the legend.
        if len(history.eval_steps):
            _line(
                loss,
                history.eval_steps,
                history.eval_loss_nats,
                marker=marker,
                markersize=4,
                label=f" {name}",
                **look,
            )
        else:
            _line(loss, history.steps, history.loss_nats, label=f" {name}", **look)
        _line(rate, history.steps, history.learning_rate, **look)
        _line(speed, history.steps, history.chars_per_second, **look)
    for text in loss.legend(loc="best").get_texts():
        text.set(text=text.get_text().removeprefix(" "), family=families, parse_math=False)
    _add_bits(loss, unit)
    _finish(loss, f"loss (nats per {unit})", *(_losses(history) for history in histories))
    _finish_rate(rate, *(history.learning_rate for history in histories))
    rate.set_xlabel("")
    _finish_speed(speed, unit, *(history.chars_per_second for history in histories))
    return figure


def _label(history: RunHistory) -> str:
    best = history.best
    if best is not None:
        return f"{history.name}: {history.eval_loss_nats[best]:.4f}{_part(history.eval_part, history.unit)}"
    return history.name if len(history.eval_steps) else f"{history.name} (training)"


def _losses(history: RunHistory) -> NDArray[np.float64]:
    return history.eval_loss_nats if len(history.eval_steps) else history.loss_nats


def _add_bits(ax: Axes, unit: Unit) -> None:
    bits = ax.secondary_yaxis(
        "right",
        functions=(lambda nats: np.divide(nats, math.log(2)), lambda bits: np.multiply(bits, math.log(2))),
    )
    bits.set_ylabel(f"bits per {unit}")


def _finish_rate(ax: Axes, *columns: NDArray[np.float64]) -> None:
    _finish(ax, "learning rate", *columns)
    ax.set_ylim(bottom=0)


def _finish_speed(ax: Axes, unit: Unit, *columns: NDArray[np.float64]) -> None:
    from matplotlib.ticker import EngFormatter  # noqa: PLC0415 - an extra

    ax.yaxis.set_major_formatter(EngFormatter(sep=""))
    _finish(ax, f"{unit}s per second", *columns)
    ax.set_ylim(bottom=0)


def _axes(ax: Axes | None) -> Axes:
    return new_figure(*_SIZE).subplots() if ax is None else ax


def _part(part: tuple[int, int] | None, unit: Unit) -> str:
    return "" if part is None else f" ({part[0]:,} of {part[1]:,} {unit}s)"


def _line(
    ax: Axes, steps: NDArray[np.int64], values: NDArray[np.float64], *, marker: str | None = None, **look: Any
) -> None:
    """Draw a line with at most about `_MARKERS` markers and a gap where a value is not finite.

    Without a marker, dots show points that are few, or that have no neighbour for a line.
    """
    finite = np.isfinite(values)
    beside = np.zeros(len(values), bool)
    beside[1:] |= finite[:-1]
    beside[:-1] |= finite[1:]
    every = math.ceil(len(values) / _MARKERS)
    regular = (np.arange(len(values)) % max(every, 1) == 0) & (marker is not None or every == 1)
    marked = np.flatnonzero(finite & (regular | ~beside)).tolist()
    ax.plot(steps, values, marker=marker or "." if marked else "", markevery=marked, **look)


def _finish(ax: Axes, ylabel: str, *columns: NDArray[np.float64]) -> None:
    """Label the axes, and note if no value is finite."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter  # noqa: PLC0415 - an extra

    ax.set_xlabel("step")
    ax.set_ylabel(ylabel)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    ax.grid(linewidth=0.3, color="0.7")
    ax.spines[["top", "right"]].set_visible(False)
    if not any(np.isfinite(column).any() for column in columns):
        ax.text(0.5, 0.5, "no finite value", transform=ax.transAxes, ha="center", va="center")
        for scale in (ax, *ax.child_axes):
            scale.set_yticks([])
