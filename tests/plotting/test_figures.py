"""Pictures as files: kinds, bytes that do not change, and fonts."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import pytest
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties

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


def test_a_character_is_looked_for_in_each_font_that_is_asked_for() -> None:
    assert readable(["a漢↵"], FontProperties(family=["DejaVu Sans"])) == ["aU+6F22↵"]
    few = "STIXSizeOneSym"  # comes with matplotlib, and has brackets but no letters
    assert readable(["(a\n"], FontProperties(family=[few])) == ["(U+0061U+000A"]
    assert readable(["(a\n"], FontProperties(family=[few, "no such font", "DejaVu Sans"])) == ["(a↵"]
    assert readable(["a"], FontProperties(family=["no such font"])) == ["a"]  # then matplotlib takes its own


def test_a_space_may_stay_one() -> None:
    assert readable(["a b\t"], FontProperties(), spaces=False) == ["a b⇥"]
