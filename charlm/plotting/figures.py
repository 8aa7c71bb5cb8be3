"""New figures, and figures as files.

The same figure gives the same bytes with the same matplotlib: there is no date, and no random number in the
names of SVG elements.
"""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from charlm.errors import CharLMError, InputError, quoted
from charlm.files.atomic import write_file
from charlm.plain import as_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["new_figure", "picture_format", "save_picture"]

_FORMATS = ("png", "svg")
_PIXELS_PER_INCH = 150


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, in inches. It is not registered with pyplot; notebooks show it.

    Raises:
        CharLMError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise CharLMError("charlm plot needs matplotlib: pip install 'charlm[plot]'") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    figure._repr_png_ = partial(_shown, figure)  # type: ignore[attr-defined]  # IPython asks for it
    return figure


def picture_format(path: str | Path) -> str:
    """Return the format of a picture from the suffix of its file.

    Raises:
        InputError: `save_picture` does not write this format.
    """
    suffix = as_path(path).suffix
    if suffix[1:].lower() not in _FORMATS:
        endings = " or ".join(f".{name}" for name in _FORMATS)
        raise InputError(f"a picture's name must end in {endings}, got {quoted(as_path(path).name)}")
    return suffix[1:].lower()


def save_picture(drawn: Axes | Figure, path: str | Path) -> None:
    """Write a figure to a PNG or SVG file atomically. An existing file is replaced.

    Args:
        drawn: a figure, or axes of it.
        path: the file, with the suffix .png or .svg.

    Raises:
        InputError: the suffix is another one, or the axes have no figure.
        OSError: it could not be written. An earlier file is intact.

    Example:
        >>> from tempfile import mkdtemp
        >>> from charlm import BigramLM, CharTokenizer
        >>> from charlm.plotting import plot_bigram
        >>> ax = plot_bigram(BigramLM(3), CharTokenizer("abc"))
        >>> save_picture(ax, mkdtemp() + "/bigram.png")
    """
    kind = picture_format(path)
    figure = drawn.get_figure(root=True)
    if figure is None:
        raise InputError("the axes must belong to a figure to be saved, got axes that were removed from one")
    write_file(path, _picture(figure, kind, _PIXELS_PER_INCH))


def _shown(figure: Figure) -> bytes:
    return _picture(figure, "png", figure.dpi)


def _picture(figure: Figure, kind: str, pixels_per_inch: float) -> bytes:
    from matplotlib import rc_context  # noqa: PLC0415 - an extra

    data = io.BytesIO()
    with rc_context({"svg.hashsalt": "charlm"}):  # otherwise the names of elements are random
        figure.savefig(
            data,
            format=kind,
            dpi=pixels_per_inch if kind == "png" else None,
            metadata={"Date": None} if kind == "svg" else None,
        )
    return data.getvalue()
