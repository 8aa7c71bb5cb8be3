"""Tables of characters against characters: the next characters of a model, and the attention of a GPT."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from charlm.errors import InputError, shown
from charlm.models.base import LanguageModel
from charlm.modes import evaluation_mode
from charlm.plain import int_from
from charlm.plotting.figures import new_figure
from charlm.plotting.labels import readable, token_labels
from charlm.text.tokenizer import Tokenizer, unit_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

__all__ = ["plot_attention", "plot_bigram"]

_BATCH_SIZE = 256  # ids
_CELL_INCHES = 0.15
_POINTS_PER_INCH = 72
_LARGEST_LABEL, _SMALLEST_LABEL = 10.0, 5.0  # points
_LARGEST_GRID = 24.0  # inches of all panels together
_SHOWN_SHARES = (0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1)


def plot_bigram(
    model: LanguageModel, tokenizer: Tokenizer, *, most: int = 80, ax: Axes | None = None
) -> Axes:
    r"""Draw the probability of each next character after each character, as in the table of a bigram model.

    A model with a longer context gets a text of that one character.

    Args:
        model: any.
        tokenizer: that of the model.
        most: the largest number of characters that are drawn: those that the model would generate most often
            if it saw one character at a time.
        ax: the axes, or None for a new figure, large enough for the labels.

    Returns:
        The axes. Row and column i stand for the i-th character drawn, in the order of the ids.

    Raises:
        CharLMError: matplotlib is not installed.
        InputError: `most` is no positive int, or the tokenizer does not fit the model.

    Example:
        >>> from charlm import BigramLM, CharTokenizer
        >>> ax = plot_bigram(BigramLM(3), CharTokenizer("ab\n"))
        >>> [label.get_text() for label in ax.get_yticklabels()][:3]
        ['a', 'b', '↵']
    """
    most = int_from(1, most, "most")
    V = model.vocab_size
    if tokenizer.vocab_size != V:
        raise InputError(f"the tokenizer must have the model's {V} ids, got one of {tokenizer.vocab_size}")
    table = _next_probabilities(model)  # (V, V)
    ids = np.sort(_frequencies(table).argsort(kind="stable")[::-1][:most]) if most < V else np.arange(V)
    if ax is None:
        side = max(3.0, len(ids) * _CELL_INCHES)
        ax = new_figure(side + 1.6, side + 0.8).subplots()
    ax.tick_params(top=True, labeltop=True, right=True, labelright=True)
    image = _draw(ax, table[np.ix_(ids, ids)], token_labels(tokenizer, ids.tolist()))
    unit = unit_of(tokenizer)
    ax.set_ylabel(unit)
    ax.set_xlabel(f"next {unit}" + (f" (the {len(ids)} most frequent of {V:,})" if most < V else ""))
    _scale(image, ax, "probability")
    return ax


def plot_attention(
    weights: Tensor, labels: Sequence[str], *, axes: NDArray[Any] | None = None
) -> NDArray[Any]:
    """Draw the attention of each character of a text, with a panel for each layer and head.

    Args:
        weights: the result of `GPT.attention` for one text, (L, 1, H, T, T) or (L, H, T, T): row t of a head
            has the weights of character t.
        labels: the T characters, for example the text itself. `token_labels` makes the labels of ids.
        axes: (L, H) axes, as from `figure.subplots(L, H, squeeze=False)`, or None for a new figure.

    Returns:
        The axes, (L, H).

    Raises:
        CharLMError: matplotlib is not installed.
        InputError: a shape does not fit.

    Example:
        >>> from charlm import GPT
        >>> model = GPT.from_config("lecture", vocab_size=3, n_layer=2, n_head=3, n_embd=48)
        >>> plot_attention(model.attention(torch.tensor([[0, 1, 2, 0]])), "abca").shape
        (2, 3)
    """
    table = _checked_attention(weights, labels)  # (L, H, T, T)
    L, H, T, _ = table.shape
    if axes is None:
        side = max(1.6, min(T * _CELL_INCHES, _LARGEST_GRID / max(L, H)))
        axes = new_figure(H * side + 1.6, L * side + 1).subplots(L, H, squeeze=False)
    elif axes.shape != (L, H):
        raise InputError(f"axes must have the shape ({L}, {H}), layers and heads, got {axes.shape}")
    for layer, row in enumerate(axes):
        for head, ax in enumerate(row):
            image = _draw(ax, table[layer, head], labels, down=head == 0, across=layer == L - 1)
            ax.set_title(f"layer {layer + 1}, head {head + 1}", fontsize="small")
    figure = axes[0, 0].figure
    figure.supxlabel("looked at", fontsize="medium")
    figure.supylabel("character that looks", fontsize="medium")
    _scale(image, axes, "share of its attention")
    return axes


def _next_probabilities(model: LanguageModel) -> NDArray[np.float64]:
    """Return (V, V): row i is the distribution of the id after id i."""
    rows = []
    with torch.no_grad(), evaluation_mode(model):
        for ids in torch.arange(model.vocab_size, device=model.device).split(_BATCH_SIZE):
            logits, _ = model(ids[:, None])  # (n, 1, V)
            rows.append(logits[:, 0].float().softmax(dim=-1).cpu())  # (n, V)
    return torch.cat(rows).numpy().astype(np.float64)


def _frequencies(table: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return (V,): the frequency of each id in a long text that is drawn from the table."""
    share = np.full(len(table), 1 / len(table))
    for _ in range(100):
        share = (share + share @ np.nan_to_num(table)) / 2  # the mean converges in a cycle, too
    return share


def _checked_attention(weights: Tensor, labels: Sequence[str]) -> NDArray[np.float64]:
    if not isinstance(weights, Tensor) or weights.ndim not in {4, 5}:
        raise InputError(f"weights must be a tensor (L, 1, H, T, T) or (L, H, T, T), got {shown(weights)}")
    if weights.ndim == 5:
        if weights.size(1) != 1:
            raise InputError(
                f"weights must be those of one text, got {weights.size(1)}; choose one: weights[:, 0]"
            )
        weights = weights[:, 0]
    L, H, T, S = weights.shape
    if T != S or 0 in weights.shape:
        raise InputError(f"weights must be square and not empty, got {T} x {S} in {L} layers and {H} heads")
    if len(labels) != T:
        raise InputError(f"labels must name all {T} characters, got {len(labels)}")
    return weights.detach().cpu().double().numpy()


def _draw(
    ax: Axes, table: NDArray[np.float64], labels: Sequence[str], *, down: bool = True, across: bool = True
) -> AxesImage:
    """Draw a table of shares between 0 and 1, with labels at rows and columns and lines between them.

    A label is as high as a row, up to a limit. If rows are too small, some labels are omitted.
    """
    from matplotlib.colors import PowerNorm  # noqa: PLC0415 - an extra

    box = ax.get_window_extent()
    points = min(box.width, box.height) / ax.figure.dpi * _POINTS_PER_INCH / len(table)  # of a row
    every = math.ceil(_SMALLEST_LABEL / points)
    size = min(_LARGEST_LABEL, 0.75 * points * every)
    texts, families = readable(labels, ax.title.get_fontproperties())
    for axis, labelled in ((ax.yaxis, down), (ax.xaxis, across)):
        shown_at = range(0, len(table), every) if labelled else range(0)
        axis.set_ticks(
            shown_at, [texts[i] for i in shown_at], fontsize=size, family=families, parse_math=False
        )
    for label in ax.get_xticklabels():
        label.set_rotation(90 if len(label.get_text()) > 2 else 0)
    ax.tick_params(length=0)
    if every == 1:
        edges = np.arange(len(table) + 1) - 0.5
        ax.hlines(edges, edges[0], edges[-1], color="0.9", linewidth=0.3)
        ax.vlines(edges, edges[0], edges[-1], color="0.9", linewidth=0.3)
    # The colours follow the square root, so that small shares can be seen.
    return ax.imshow(table, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=1), interpolation="nearest")


def _scale(image: AxesImage, ax: Axes | NDArray[Any], label: str) -> None:
    """Draw the scale of colours beside axes or a grid of axes."""
    image.figure.colorbar(
        image, ax=ax, label=label, shrink=0.6, aspect=30, pad=0.02, ticks=_SHOWN_SHARES, format="{x:g}"
    )
