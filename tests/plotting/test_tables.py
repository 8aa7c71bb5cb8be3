"""Tables of characters: the numbers are the model's, and every label can be read."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from harness.tiny_models import random_ids, tiny_config, tiny_gpt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from charlm import BigramLM, BlockDataset, ByteTokenizer, CharTokenizer, LanguageModel, NGramLM
from charlm.errors import InputError
from charlm.plotting import plot_attention, plot_bigram, token_labels

TEXT = "to be, or\tnot to be:\nthat is the question "


def rows(ax: Axes) -> list[str]:
    return [label.get_text() for label in ax.get_yticklabels() if label.get_position()[0] == 0]


def columns(ax: Axes) -> list[str]:
    return [label.get_text() for label in ax.get_xticklabels() if label.get_position()[1] == 0]


def drawn(ax: Axes) -> NDArray[Any]:
    (image,) = ax.images
    table = image.get_array()
    assert table is not None
    return np.asarray(table)


def causal(L: int, H: int, T: int) -> Tensor:
    """Return attention as the formula has it, of random queries and keys: (L, H, T, T)."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, L, H, T, 4, generator=generator)
    weights = torch.zeros(L, H, T, T)
    for layer in range(L):
        for head in range(H):
            for t in range(T):
                scores = [float(q[layer, head, t] @ k[layer, head, s]) / 2 for s in range(t + 1)]
                total = sum(math.exp(score) for score in scores)
                for s, score in enumerate(scores):
                    weights[layer, head, t, s] = math.exp(score) / total
    return weights


def test_the_table_of_a_bigram_model_has_its_probabilities_and_readable_labels() -> None:
    tokenizer = CharTokenizer.from_text(TEXT)
    data = BlockDataset.from_text(TEXT, tokenizer, 4)
    ax = plot_bigram(BigramLM(tokenizer.vocab_size).fit(data, smoothing=0), tokenizer)
    for i, one in enumerate(tokenizer.vocab):
        for j, other in enumerate(tokenizer.vocab):
            pairs = sum(TEXT[at : at + 2] == one + other for at in range(len(TEXT)))
            assert drawn(ax)[i, j] == pytest.approx(pairs / TEXT[:-1].count(one), abs=1e-6)
    shown = [{"\t": "⇥", "\n": "↵", " ": "␣"}.get(character, character) for character in tokenizer.vocab]
    assert rows(ax) == columns(ax) == shown
    assert (ax.get_ylabel(), ax.get_xlabel()) == ("character", "next character")
    assert isinstance(ax.figure, Figure)
    assert [other.get_ylabel() for other in ax.figure.axes[1:]] == ["probability"]


@pytest.mark.parametrize(
    "model", [tiny_gpt(tiny_config(dropout=0.5)), NGramLM(13, order=3)], ids=["gpt", "ngram"]
)
def test_any_model_is_asked_about_each_single_character(model: LanguageModel) -> None:
    if isinstance(model, NGramLM):
        model.fit(BlockDataset(random_ids(tiny_config(), 1, 300)[0], 8))
    model.train()
    ax = plot_bigram(model, CharTokenizer("abcdefghijklm"))
    assert model.training
    model.eval()
    for i in range(13):
        logits, _ = model(torch.tensor([[i]]))
        assert np.allclose(drawn(ax)[i], logits[0, 0].softmax(0).detach(), atol=1e-6)
    assert drawn(ax).sum(axis=1) == pytest.approx(1, abs=1e-5)


def test_of_a_large_vocabulary_the_most_frequent_are_drawn_and_the_label_says_so() -> None:
    text = "bacab" * 200 + "".join(map(chr, range(0x4E00, 0x4E00 + 300)))
    tokenizer = CharTokenizer.from_text(text)
    model = BigramLM(tokenizer.vocab_size).fit(BlockDataset.from_text(text, tokenizer, 8), smoothing=0)
    with torch.no_grad():  # a loop, so that the rare end does not take all
        model.token_embedding_table.weight[-1] = -torch.inf
        model.token_embedding_table.weight[-1, 0] = 0
    ax = plot_bigram(model, tokenizer, most=3)
    assert rows(ax) == columns(ax) == ["a", "b", "c"]
    assert ax.get_xlabel() == "next character (the 3 most frequent of 303)"
    assert drawn(ax).shape == (3, 3)
    assert plot_bigram(model, tokenizer).get_xlabel() == "next character (the 80 most frequent of 303)"


def test_a_byte_is_labelled_by_its_character_or_as_a_part_of_one_by_its_number() -> None:
    labels = token_labels(ByteTokenizer(), range(256))
    assert labels == [*map(chr, range(128)), *(f"0x{i:02X}" for i in range(128, 256))]


def test_what_a_font_lacks_or_has_no_shape_is_shown_by_its_code_point() -> None:
    text = "a漢😀\u0301אع\u200d\x00\x1b\u00a0\ufdfa\ue000$"
    tokenizer = CharTokenizer(text)
    ax = plot_bigram(BigramLM(tokenizer.vocab_size), tokenizer)
    assert rows(ax) == [
        *(
            "a",
            "U+6F22",
            "😀",
            "U+0301",
            "א",
            "ع",
            "U+200D",
            "U+0000",
            "U+001B",
            "U+00A0",
            "U+FDFA",
            "U+E000",
            "$",
        ),
    ]
    assert isinstance(ax.figure, Figure)
    ax.figure.draw_without_rendering()  # matplotlib would warn of a glyph that is missing
    turned = {label.get_text() for label in ax.get_xticklabels() if label.get_rotation() == 90}
    assert turned == {name for name in rows(ax) if len(name) > 2}


def test_labels_do_not_lie_over_each_other() -> None:
    tokenizer = CharTokenizer([*map(chr, range(0x4E00, 0x4E00 + 30)), *map(chr, range(33, 83))])
    ax = plot_bigram(BigramLM(80), tokenizer)
    figure = ax.figure
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()
    for labels in (ax.get_xticklabels(), ax.get_yticklabels()):
        assert len(labels) == 160
        assert all(float(label.get_fontsize()) > 5 for label in labels)
        boxes = [label.get_window_extent() for label in labels]
        assert not any(box.overlaps(other) for i, box in enumerate(boxes) for other in boxes[:i])


def test_a_probability_has_the_same_colour_in_every_picture() -> None:
    one = plot_bigram(BigramLM(2), CharTokenizer("ab")).images[0]
    other = plot_attention(causal(1, 1, 5), "abcde")[0, 0].images[0]
    assert one.get_clim() == other.get_clim() == (0, 1)
    assert one.to_rgba(np.array([0.3])).tolist() == other.to_rgba(np.array([0.3])).tolist()


def test_colours_grow_darker_all_the_way() -> None:
    colours = plot_bigram(BigramLM(1), CharTokenizer("a")).images[0].cmap(np.linspace(0, 1, 50))
    lightness = colours[:, :3] @ [0.299, 0.587, 0.114]
    assert (np.diff(lightness) < 0).all()


@pytest.mark.parametrize("batch", [False, True])
def test_attention_has_a_panel_for_each_layer_and_head(batch: bool) -> None:
    weights = causal(2, 3, 6)
    axes = plot_attention(weights[:, None] if batch else weights, "to be\n")
    assert axes.shape == (2, 3)
    for layer in range(2):
        for head in range(3):
            ax = axes[layer, head]
            assert np.allclose(drawn(ax), weights[layer, head])
            assert ax.get_title() == f"layer {layer + 1}, head {head + 1}"
            assert rows(ax) == (["t", "o", "␣", "b", "e", "↵"] if head == 0 else [])
            assert columns(ax) == (["t", "o", "␣", "b", "e", "↵"] if layer == 1 else [])
    figure = axes[0, 0].figure
    assert (figure.get_supxlabel(), figure.get_supylabel()) == ("looked at", "character that looks")
    assert figure.axes[-1].get_ylabel() == "share of its attention"


def test_attention_of_a_gpt_is_drawn_as_it_comes() -> None:
    model = tiny_gpt(tiny_config())
    weights = model.attention(random_ids(tiny_config(), 1, 9))
    axes = plot_attention(weights.requires_grad_(), "abcabcabc")
    assert np.allclose(drawn(axes[1, 0]), weights[1, 0, 0].detach())


def test_a_long_text_in_many_panels_keeps_a_size_and_readable_labels() -> None:
    axes = plot_attention(torch.ones(1, 1, 200, 200).tril() / 200, "x" * 200)
    figure = axes[0, 0].figure
    assert max(figure.get_size_inches()) < 26
    figure.draw_without_rendering()
    labels = axes[0, 0].get_xticklabels()
    assert 50 < len(labels) <= 200
    boxes = [label.get_window_extent() for label in labels]
    assert not any(box.overlaps(other) for i, box in enumerate(boxes) for other in boxes[:i])
    many = plot_attention(torch.ones(6, 6, 40, 40), "y" * 40)
    assert max(many[0, 0].figure.get_size_inches()) < 26


def test_the_axes_that_are_given_are_used_and_returned() -> None:
    figure = Figure()
    grid = figure.subplots(2, 1, squeeze=False)
    assert plot_attention(causal(2, 1, 3), "abc", axes=grid) is grid
    ax = Figure().subplots()
    assert plot_bigram(BigramLM(2), CharTokenizer("ab"), ax=ax) is ax


@pytest.mark.parametrize(
    ("weights", "labels", "message"),
    [
        ([[1.0]], "a", r"weights must be a tensor \(L, 1, H, T, T\) or \(L, H, T, T\), got"),
        (torch.ones(2, 2), "ab", "weights must be a tensor"),
        (torch.ones(1, 2, 1, 3, 3), "abc", r"must be those of one text, got 2; choose one: weights\[:, 0\]"),
        (torch.ones(1, 1, 2, 3), "ab", "weights must be square and not empty, got 2 x 3"),
        (torch.ones(1, 0, 3, 3), "abc", "weights must be square and not empty"),
        (torch.ones(1, 1, 3, 3), "ab", "labels must name all 3 characters, got 2"),
    ],
)
def test_attention_of_a_wrong_shape_is_refused(weights: Any, labels: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        plot_attention(weights, labels)


def test_other_arguments_that_do_not_fit_are_refused() -> None:
    with pytest.raises(
        InputError, match=r"axes must have the shape \(2, 1\), layers and heads, got \(1, 2\)"
    ):
        plot_attention(causal(2, 1, 3), "abc", axes=Figure().subplots(1, 2, squeeze=False))
    with pytest.raises(InputError, match="the tokenizer must have the model's 3 ids, got one of 2"):
        plot_bigram(BigramLM(3), CharTokenizer("ab"))
    for most in (0, -1, 2.5, True):
        with pytest.raises(InputError, match="most must be an int, 1 or more, got"):
            plot_bigram(BigramLM(3), CharTokenizer("abc"), most=most)  # type: ignore[arg-type]


def test_a_byte_that_is_no_character_is_named_by_its_number() -> None:
    ids = ByteTokenizer().encode("né\n")
    assert token_labels(ByteTokenizer(), ids) == ["n", "0xC3", "0xA9", "\n"]
    assert token_labels(CharTokenizer("nα"), [1, 0]) == ["α", "n"]
    assert columns(plot_attention(causal(1, 1, 4), token_labels(ByteTokenizer(), ids))[0, 0])[1:] == [
        *("0xC3", "0xA9", "↵"),
    ]
    for wrong in (-1, 256):
        with pytest.raises(InputError):
            token_labels(ByteTokenizer(), [wrong])
