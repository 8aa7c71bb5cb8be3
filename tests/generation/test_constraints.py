"""Texts that have to match: whole, in time, drawn as documented, and the same whatever makes them."""

from __future__ import annotations

import functools
import itertools
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from harness.patterns import CHARACTERS, drawn_pattern
from harness.tiny_models import tiny_config, tiny_gpt
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import override

from charlm import (
    BigramLM,
    BlockDataset,
    ByteTokenizer,
    CharLM,
    CharTokenizer,
    LanguageModel,
    MixtureLM,
    NGramLM,
)
from charlm.errors import InputError, UnknownCharacterError
from charlm.generation import SamplingOptions, next_ids, stream_ids
from charlm.patterns.automaton import Automaton

PATTERNS = int(os.environ.get("CHARLM_PATTERNS", "60"))  # the campaign is the same test with more of them
LETTERS = CharTokenizer("abcdefghijkl\n")
PATTERN = r"[a-f]{2,6}(gh?|[i-k]+)*l?"


@functools.cache
def ngram() -> NGramLM:
    data = BlockDataset.from_text("abghgablkjacebdfgh\n" * 9, LETTERS, block_size=8)
    return NGramLM(LETTERS.vocab_size, order=3).fit(data)


@functools.cache
def model_of(name: str) -> LanguageModel:
    if name == "gpt":
        return tiny_gpt(tiny_config("cpu-1min"))
    if name == "ngram":
        return ngram()
    return MixtureLM([tiny_gpt(tiny_config("lecture")), ngram()])


MODELS = ["gpt", "ngram", "mixture"]


def test_what_is_written_matches_in_full_and_in_time() -> None:
    torch.manual_seed(0)
    tokenizer = CharTokenizer(CHARACTERS)
    small = tiny_gpt(tiny_config(vocab_size=len(CHARACTERS)))
    models = [CharLM(BigramLM(len(CHARACTERS)), tokenizer), CharLM(small, tokenizer)]
    chance = random.Random(1)
    written: Counter[int] = Counter()
    for number in range(PATTERNS):
        pattern, budget = drawn_pattern(4, chance), chance.choice([0, 1, 2, 5, 12])
        lm = models[number % 2]
        try:
            found = lm.generate(["a", "1\n"] * 2, budget, regex=pattern, seed=number)
        except InputError:
            texts = itertools.chain.from_iterable(itertools.product(CHARACTERS, repeat=n) for n in range(5))
            shorter = (t for t in texts if len(t) <= budget)
            assert not any(re.fullmatch(pattern, "".join(text)) for text in shorter), pattern
            continue
        for prompt, text in zip(["a", "1\n"] * 2, found, strict=True):
            new = text.removeprefix(prompt)
            assert re.fullmatch(pattern, new), (pattern, new)
            assert len(new) <= budget
            written[len(new)] += 1
    assert len(written) > 5


def chances(
    follows: NDArray[np.float64], before: int, matches: set[tuple[int, ...]]
) -> dict[tuple[int, ...], float]:
    """The rule, worked out by hand: the chance of each text, from those that match and fit.

    `follows` (V, V): how likely each id is after each.
    """
    found: dict[tuple[int, ...], float] = {}

    def go_on(text: tuple[int, ...], chance: float) -> None:
        here = follows[text[-1] if text else before]
        may = [i for i in range(len(here)) if any(one[: len(text) + 1] == (*text, i) for one in matches)]
        share = 1.0
        if text in matches:
            found[text] = chance * (1 - here[may].sum()) if may else chance
        else:
            share = here[may].sum()
        for i in may:
            go_on((*text, i), chance * here[i] / share)

    go_on((), 1.0)
    return found


@pytest.mark.parametrize(("pattern", "budget"), [("a*(b|ca)*", 3), ("(ab?|c){1,2}", 4), ("a|bca|bcb", 2)])
def test_the_distribution_is_the_rule_worked_out_by_hand(pattern: str, budget: int) -> None:
    """Chi-square over all texts; its 99.9999 % point, so that one seed in a million would fail."""
    torch.manual_seed(3)
    model, n = BigramLM(3), 4_000
    texts = ["".join(t) for length in range(budget + 1) for t in itertools.product("abc", repeat=length)]
    matches = {tuple("abc".index(c) for c in t) for t in texts if re.fullmatch(pattern, t)}
    state = model.new_state(3)
    state.observe(torch.arange(3)[:, None])
    expected = chances(state.predict().double().softmax(dim=-1).detach().numpy(), 1, matches)
    assert sum(expected.values()) == pytest.approx(1)
    prompts = torch.full((n, 1), 1)
    automaton = Automaton.from_regex(pattern, "abc")
    ids = model.generate(prompts, budget, seed=5, constraint=automaton)[:, 1:]
    counts = Counter(tuple(i for i in row if i >= 0) for row in ids.tolist())
    assert counts.keys() <= expected.keys()
    often = {text: share * n for text, share in expected.items() if share * n > 5}
    statistic = sum((counts[text] - mean) ** 2 / mean for text, mean in often.items())
    k = max(len(often) - 1, 1)
    wilson_hilferty = k * (1 - 2 / (9 * k) + 4.75 * (2 / (9 * k)) ** 0.5) ** 3
    assert statistic < wilson_hilferty


def test_filters_see_what_the_pattern_leaves() -> None:
    class Fixed(BigramLM):
        kind = "fixed"

        @override
        def forward(self, idx: Tensor, targets: Any = None, **rest: Any) -> Any:
            return torch.tensor([0.0, 3.0, 2.0, 1.0]).expand(*idx.shape, 4), None

    lm = CharLM(Fixed(4), CharTokenizer("abcd"))
    assert lm.generate("a", 1, regex="[acd]", temperature=0) == "ac"
    assert lm.generate("a", 1, regex="[acd]", top_k=1, seed=1) == "ac"
    assert lm.generate("a", 1, regex="[ad]", top_p=0.5, seed=1) == "ad"
    assert lm.generate("a", 1, regex="[ad]", min_p=0.9, seed=1) == "ad"
    # In a text that may end, nothing is removed: the likeliest, b, ends it.
    assert lm.generate("a", 9, regex="[acd]+", temperature=0) == "ac"
    assert lm.generate("a", 9, regex="b+", temperature=0) == "a" + 9 * "b"
    assert lm.generate("a", 9, regex="[abc]+", banned="b", temperature=0) == "a" + 9 * "c"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("pattern", "budget", "lengths"), [(PATTERN, 40, 4), ("([a-f]{3})*[g-l]|[j-l]+a?", 9, 3)]
)
def test_the_text_is_the_same_whatever_makes_it(name: str, pattern: str, budget: int, lengths: int) -> None:
    model = model_of(name)
    lm = CharLM(model, LETTERS)
    assert model.why_not_native() is None
    prompts = ["ab", "cdl", "ab\n", "abc"]

    def written(**options: Any) -> list[list[str]]:
        return [lm.generate(prompts, budget, regex=pattern, seed=seed, **options) for seed in range(6)]

    together = written()
    assert len({len(text) for texts in together for text in texts}) >= lengths
    for seed, texts in enumerate(together):
        assert lm.generate("ab", budget, regex=pattern, seed=seed) == texts[0]
        assert "ab" + "".join(lm.stream("ab", budget, regex=pattern, seed=seed)) == texts[0]
        for draft in (ngram(), BigramLM(LETTERS.vocab_size)):
            assert lm.generate("ab", budget, regex=pattern, seed=seed, draft=draft) == texts[0]
            assert "ab" + "".join(lm.stream("ab", budget, regex=pattern, seed=seed, draft=draft)) == texts[0]
    assert written(filters=[lambda logits, ids: logits]) == together  # the readable choice
    assert written(use_cache=False) == together  # and the readable model
    greedy = lm.generate(prompts, budget, regex=pattern, temperature=0)
    assert lm.generate(prompts, budget, regex=pattern, temperature=0, use_cache=False) == greedy


def test_ids_of_texts_that_have_ended_are_minus_one() -> None:
    constraint = Automaton.from_choices([[1], [2, 3, 4]], vocab_size=13)
    idx = torch.tensor([[1], [2], [3], [4]])
    ids = model_of("gpt").generate(idx, 9, seed=1, constraint=constraint)
    assert ids.shape == (4, 4)
    assert all(row[1:] in ([1, -1, -1], [2, 3, 4]) for row in ids.tolist())
    assert len({row[1] for row in ids.tolist()}) == 2
    steps = list(model_of("gpt").stream(idx, 9, seed=1, constraint=constraint))
    assert torch.equal(torch.stack(steps, dim=1), ids[:, 1:])


def test_a_choice_is_written_whole() -> None:
    lm = CharLM(ngram(), LETTERS)
    choices = ["a", "ab", "abcd", "l\n", ""]
    new = [
        text.removeprefix("ab")
        for s in range(20)
        for text in lm.generate(["ab"] * 3, 5, choices=choices, seed=s)
    ]
    assert {*new} <= {*choices}
    assert len({*new}) > 2
    assert lm.generate("ab", 5, choices=[""]) == "ab"
    assert list(lm.stream("ab", 0, choices=[""])) == []


def test_bytes_can_be_held_to_a_pattern() -> None:
    torch.manual_seed(0)
    lm = CharLM(BigramLM(256), ByteTokenizer())
    for seed in range(5):
        assert re.fullmatch("[^b]{9}", lm.generate("é", 9, regex="[^b]{9}", seed=seed)[1:])
        assert lm.generate("é", 9, choices=["schön", "é"], seed=seed)[1:] in {"schön", "é"}


class Brackets:
    """Texts of a and l, at least one, which open and close; of the vocabulary of `LETTERS`."""

    def allowed(self, state: int | None, left: int) -> tuple[NDArray[np.bool_], bool]:
        depth = state or 0
        which = np.zeros(13, dtype=np.bool_)
        which[0], which[11] = depth + 2 <= left, 0 < depth <= left
        return which, state == 0

    def after(self, state: int | None, token: int) -> int:
        return (state or 0) + (1 if token == 0 else -1)


@pytest.mark.parametrize("name", MODELS)
def test_any_object_may_be_the_constraint(name: str) -> None:
    lm = CharLM(model_of(name), LETTERS)
    lengths = set()
    for seed in range(20):
        text = lm.generate("ab", 12, constraint=Brackets(), seed=seed)
        assert "ab" + "".join(lm.stream("ab", 12, constraint=Brackets(), seed=seed, draft=ngram())) == text
        left = text[2:]
        lengths.add(len(left))
        while "al" in left:
            left = left.replace("al", "")
        assert not left
    assert 12 >= max(lengths) > min(lengths) > 0


def wrong(answer: object) -> Any:
    class Wrong:
        def allowed(self, state: object, left: int) -> object:
            return answer

        def after(self, state: object, token: int) -> object:
            return state

    return Wrong()


class Unread(BigramLM):
    """Fails when it is asked."""

    kind = "unread"

    @override
    def forward(self, *given: Any, **options: Any) -> Any:
        raise AssertionError("it was asked")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"regex": "a{7,}"}, "at least 7.*got 5"),
        ({"choices": ["abcabc"]}, "at least 6.*got 5"),
        ({"regex": "aé"}, "needs 'é'"),
        ({"regex": "ac|bc", "banned": "ab"}, "needs 'a' or 'b'"),
        ({"regex": r"(a)\1"}, "back references"),
        ({"regex": "(a"}, "regular expression"),
        ({"regex": 3}, "must be a string"),
        ({"choices": "ab"}, "one or more strings"),
        ({"choices": []}, "one or more strings"),
        ({"regex": "a", "choices": ["a"]}, "regex and choices exclude"),
        ({"choices": ["a"], "constraint": Brackets()}, "choices and constraint exclude"),
        ({"regex": "a", "stop": ["b"]}, "regex and stop exclude"),
        ({"constraint": "a"}, "methods of a Constraint"),
        ({"constraint": wrong((np.zeros(13, dtype=np.bool_), False))}, "leaves no text"),
        ({"constraint": wrong((np.zeros(12, dtype=np.bool_), True))}, r"array of bool, \(13,\)"),
        ({"constraint": wrong(([True] * 13, True))}, r"array of bool, \(13,\)"),
    ],
)
def test_what_is_impossible_is_refused_before_any_work(options: dict[str, Any], reason: str) -> None:
    lm = CharLM(Unread(13), LETTERS)
    calls: Sequence[Callable[..., object]] = (lm.generate, lm.stream)
    for call in calls:
        with pytest.raises(InputError, match=reason):
            call("a", 5, **options)


def test_a_choice_of_unknown_characters_is_refused() -> None:
    with pytest.raises(UnknownCharacterError, match="'é'"):
        CharLM(Unread(13), LETTERS).generate("a", 5, choices=["ab", "é"])


def test_a_single_turn_is_told_to_be_a_stream() -> None:
    state = ngram().new_state()
    state.observe(torch.tensor([[1]]))
    options = SamplingOptions(constraint=Brackets(), seed=1)
    with pytest.raises(InputError, match="use stream_ids"):
        next_ids(state, options)
    assert len(list(stream_ids(state, 2, options))) == 2
    state.observe(torch.tensor([[1]]))
    assert len(list(stream_ids(state, 3, SamplingOptions(seed=1)))) == 3  # of which nothing is left behind


def test_a_model_that_knows_nothing_of_the_end_still_ends() -> None:
    """A draft of another mind, and logits that are all the same."""
    flat = nn.Module.requires_grad_(BigramLM(13), requires_grad=False)
    flat.load_state_dict({name: torch.zeros_like(value) for name, value in flat.state_dict().items()})
    lm = CharLM(flat, LETTERS)
    for seed in range(10):
        text = lm.generate("a", 7, regex="a*l", seed=seed, draft=ngram())
        assert re.fullmatch("aa*l", text)
        assert len(text) <= 8
