"""Pictures as files: kinds, bytes that do not change, and fonts."""

from __future__ import annotations

import pickle
import struct
import warnings
from pathlib import Path

import matplotlib as mpl
import pytest
from fontTools.fontBuilder import FontBuilder  # type: ignore[import-untyped]
from fontTools.pens.ttGlyphPen import TTGlyphPen  # type: ignore[import-untyped]
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, fontManager

from charlm import BigramLM, CharTokenizer
from charlm.errors import InputError
from charlm.plotting import plot_bigram, save_picture
from charlm.plotting.labels import readable


def figure() -> Figure:
    made = Figure(layout="constrained")
    ax = made.subplots()
    ax.plot([1, 2], label="line")
    ax.legend()
    return made


@pytest.mark.parametrize(
    ("name", "begins"), [("a.png", b"\x89PNG\r\n"), ("a.SVG", b"<?xml"), ("a.b.svg", b"<?xml")]
)
def test_the_end_of_the_name_says_what_is_written_and_a_file_is_replaced(
    tmp_path: Path, name: str, begins: bytes
) -> None:
    path = tmp_path / name
    path.write_bytes(b"before")
    save_picture(figure(), path)
    assert path.read_bytes().startswith(begins)
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["a.png", "a.svg"])
def test_the_same_picture_has_the_same_bytes(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    for second in ("100000000", "1700000000"):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", second)  # what matplotlib takes for the time
        save_picture(figure(), tmp_path / name)
        written.append((tmp_path / name).read_bytes())
    assert written[0] == written[1]
    assert b"1970" not in written[0]
    assert mpl.rcParams["svg.hashsalt"] is None


@pytest.mark.parametrize("name", ["a.pdf", "a", "png", ".png", "a.png.txt", "a.\x1b"])
def test_another_ending_is_refused_with_those_that_there_are(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"a picture's name must end in \.png or \.svg, got '"):
        save_picture(figure(), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_axes_are_saved_with_their_whole_figure(tmp_path: Path) -> None:
    whole = figure()
    save_picture(whole, tmp_path / "figure.png")
    save_picture(whole.axes[0], tmp_path / "axes.png")
    assert (tmp_path / "figure.png").read_bytes() == (tmp_path / "axes.png").read_bytes()
    ax = whole.axes[0]
    ax.remove()
    with pytest.raises(InputError, match="the axes must belong to a figure"):
        save_picture(ax, tmp_path / "removed.png")


def test_axes_of_a_part_of_a_figure_are_saved_with_the_figure(tmp_path: Path) -> None:
    whole = Figure()
    part = whole.add_subfigure(whole.add_gridspec(1, 2)[0])
    ax = plot_bigram(BigramLM(2), CharTokenizer("ab"), ax=part.subplots())
    save_picture(ax, tmp_path / "part.svg")
    assert (tmp_path / "part.svg").stat().st_size > 1_000


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        save_picture(figure(), tmp_path / "missing" / "a.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(OSError, match="directory"):
        save_picture(figure(), tmp_path / "folder.png")
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder.png"]


def test_a_character_is_looked_for_in_each_font_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    few = "STIXSizeOneSym"  # comes with matplotlib, and has brackets but no letters
    for families, text, shown in (
        ([few, "no such font", "DejaVu Sans"], "(a\n", "(a↵"),
        (["no such font"], "a", "a"),  # then matplotlib takes its own
        ([few], "(a\n", "(a↵"),  # a and the arrow from any other
    ):
        assert readable([text], FontProperties(family=families))[0] == [shown]
    monkeypatch.setattr(fontManager, "ttflist", [])  # no other is installed
    assert readable(["(a\n"], FontProperties(family=[few])) == (["(U+0061U+000A"], [few])


def test_characters_of_another_script_are_drawn_where_an_installed_font_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fontManager, "ttflist", [e for e in fontManager.ttflist if "DejaVu" in e.name])
    tokenizer = CharTokenizer("a漢")
    ax = plot_bigram(BigramLM(2), tokenizer)
    assert [label.get_text() for label in ax.get_yticklabels()][:2] == ["a", "U+6F22"]
    fontManager.addfont(font_with(tmp_path / "han.ttf", "漢"))
    drawn = plot_bigram(BigramLM(2), tokenizer)
    assert [label.get_text() for label in drawn.get_yticklabels()][:2] == ["a", "漢"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a missing glyph is a warning
        save_picture(drawn, tmp_path / "han.png")


def font_with(path: Path, character: str) -> Path:
    """Write a font that has a square for one character, and nothing else."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 900), (900, 900), (900, 0)):
        pen.lineTo(corner)
    pen.closePath()
    square = pen.glyph()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "square"])
    builder.setupCharacterMap({ord(character): "square"})
    builder.setupGlyf({".notdef": square, "square": square})
    builder.setupHorizontalMetrics({".notdef": (1000, 0), "square": (1000, 0)})
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": "One Han", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    return path


def png_size(picture: bytes) -> tuple[int, ...]:
    return struct.unpack(">II", picture[16:24])


def test_a_notebook_shows_a_figure_that_we_made(tmp_path: Path) -> None:
    """IPython asks an object for `_repr_png_`, and does it the last line of a cell."""
    ax = plot_bigram(BigramLM(2), CharTokenizer("ab"))
    shown = ax.figure._repr_png_()  # type: ignore[union-attr]  # set on the object
    assert shown.startswith(b"\x89PNG\r\n")
    ax.figure.dpi *= 2
    assert png_size(ax.figure._repr_png_()) == tuple(2 * side for side in png_size(shown))  # type: ignore[union-attr]
    again = pickle.loads(pickle.dumps(ax.figure))
    assert again._repr_png_().startswith(b"\x89PNG\r\n")
    assert again._repr_png_.args[0] is again


def test_a_space_may_stay_one() -> None:
    assert readable(["a b\t"], FontProperties(), spaces=False)[0] == ["a b⇥"]
