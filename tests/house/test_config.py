"""`Config` with fields of every kind it knows."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from charlm.config import Config, Range
from charlm.errors import ConfigError, shown


@dataclass(frozen=True, kw_only=True)
class Sample(Config):
    """One field of every kind."""

    count: Annotated[int, Range(1, 10)]
    rate: Annotated[float, Range(above=0, maximum=1)] = 0.5
    share: float = 0.0
    limit: float | None = None
    steps: Annotated[int, Range(0)] | None = None
    name: str = "x"
    flag: bool = False
    kind: Literal["a", "b"] = "a"
    betas: tuple[float, float] = (0.9, 0.95)
    sizes: tuple[Annotated[int, Range(1)], Literal["s", "m"]] = (1, "s")

    @classmethod
    def _conflicts(cls, right: Mapping[str, Any]) -> Iterator[str]:
        if right.get("flag") and right.get("kind") == "b":
            yield "flag needs kind a"
        if right.get("flag") and right.get("name") == "":
            yield "flag needs a name"


samples = st.builds(
    Sample,
    count=st.integers(1, 10),
    rate=st.floats(0, 1, exclude_min=True),
    share=st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**6), 10**6),
    limit=st.none() | st.floats(0, 1),
    steps=st.none() | st.integers(0),
    name=st.text(max_size=5),
    betas=st.tuples(st.floats(0, 1), st.integers(0, 1)),
    sizes=st.tuples(st.integers(1), st.sampled_from("sm")),
)


@settings(max_examples=50, deadline=None)
@given(samples)
def test_a_config_survives_every_round_trip(config: Sample) -> None:
    for again in (
        Sample.from_dict(config.to_dict()),
        Sample.from_dict(json.loads(json.dumps(config.to_dict()))),
        config.replace(),
        dataclasses.replace(config),
        pickle.loads(pickle.dumps(config)),
        copy.copy(config),
        copy.deepcopy(config),
    ):
        assert again == config
        assert hash(again) == hash(config)
        assert again.to_dict() == config.to_dict()
        assert [type(v) for v in vars(again).values()] == [type(v) for v in vars(config).values()]


def test_to_dict_has_every_field_in_order_as_json_values() -> None:
    assert Sample(count=2).to_dict() == {
        "count": 2,
        "rate": 0.5,
        "share": 0.0,
        "limit": None,
        "steps": None,
        "name": "x",
        "flag": False,
        "kind": "a",
        "betas": [0.9, 0.95],
        "sizes": [1, "s"],
    }
    assert list(Sample(count=2).to_dict()) == [field.name for field in dataclasses.fields(Sample)]


def test_a_list_stands_for_a_tuple_and_an_int_for_a_float() -> None:
    config = Sample.from_dict({"count": 1, "betas": [0, 1], "sizes": [3, "m"], "limit": 2, "share": 3})
    assert config.betas == (0.0, 1.0)
    assert {type(beta) for beta in config.betas} == {float}
    assert config.sizes == (3, "m")
    assert (type(config.limit), type(config.share)) == (float, float)
    assert hash(config) == hash(config.replace(share=3.0))


def test_the_constructor_casts_what_from_dict_casts() -> None:
    fields: dict[str, Any] = {"count": 1, "betas": [0, 1], "share": 3}
    assert Sample(**fields) == Sample.from_dict(fields)


def test_replace_changes_some_fields_and_checks_them() -> None:
    config = Sample(count=2)
    assert config.replace(count=3, name="y") == Sample(count=3, name="y")
    assert config.count == 2
    with pytest.raises(ConfigError, match="count must be an int at least 1 and at most 10, got 11"):
        config.replace(count=11)
    with pytest.raises(ConfigError, match="unknown field 'cuont'; did you mean 'count'"):
        config.replace(cuont=1)


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Sample(count=2).count = 3  # type: ignore[misc]  # the point of the test


def test_fields_are_keywords_alone() -> None:
    with pytest.raises(TypeError):
        Sample(2)  # type: ignore[call-arg]  # the point of the test


BAD: list[tuple[str, object, str]] = [
    ("count", 0, "an int at least 1 and at most 10, got 0"),
    ("count", "2", "an int at least 1 and at most 10, got '2'"),
    ("count", True, "an int at least 1 and at most 10, got True"),
    ("count", 2.0, "an int at least 1 and at most 10, got 2.0"),
    ("count", None, "an int at least 1 and at most 10, got None"),
    ("count", 2**5000, "an int at least 1 and at most 10, got an int of 5001 bits"),
    ("rate", 0, "a finite number above 0 and at most 1, got 0"),
    ("rate", 1.5, "a finite number above 0 and at most 1, got 1.5"),
    ("share", math.nan, "a finite number, got nan"),
    ("share", -math.inf, "a finite number, got -inf"),
    ("share", 10**400, "a finite number, got an int of 1329 bits"),
    ("share", False, "a finite number, got False"),
    ("limit", "none", "a finite number, or None, got 'none'"),
    ("steps", -1, "an int at least 0, or None, got -1"),
    ("name", 5, "a string, got 5"),
    ("name", b"x", "a string, got b'x' (bytes)"),
    ("flag", 1, "True or False, got 1"),
    ("flag", "yes", "True or False, got 'yes'"),
    ("kind", "c", "one of 'a', 'b', got 'c'"),
    ("kind", None, "one of 'a', 'b', got None"),
    ("kind", ["a"], "one of 'a', 'b', got ['a'] (list)"),
    ("betas", 0.9, "(a finite number, a finite number), got 0.9"),
    ("betas", [0.9], "(a finite number, a finite number), got [0.9] (list)"),
    ("betas", (0.9, "x"), "(a finite number, a finite number), got (0.9, 'x') (tuple)"),
    ("sizes", (0, "s"), "(an int at least 1, one of 's', 'm'), got (0, 's') (tuple)"),
    ("sizes", {1, 2}, "(an int at least 1, one of 's', 'm'), got {1, 2} (set)"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD, ids=lambda x: "" if isinstance(x, int) else None)
def test_a_bad_value_is_reported_with_what_must_be(name: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Sample.from_dict({"count": 1, name: value})
    assert caught.value.problems == (f"{name} must be {message}",)
    assert str(caught.value) == f"Sample: {name} must be {message}"


def test_missing_unknown_and_bad_fields_are_reported_together() -> None:
    with pytest.raises(ConfigError) as caught:
        Sample.from_dict({"rate": 2, "flagg": True})
    assert caught.value.problems == (
        "unknown field 'flagg'; did you mean 'flag'?",
        "rate must be a finite number above 0 and at most 1, got 2",
        "count is missing",
    )
    assert str(caught.value) == "Sample: 3 problems: " + "; ".join(caught.value.problems)


def test_conflicts_are_reported_together() -> None:
    with pytest.raises(ConfigError) as caught:
        Sample(count=1, flag=True, kind="b", name="")
    assert caught.value.problems == ("flag needs kind a", "flag needs a name")


@given(st.lists(st.sampled_from(BAD), unique_by=lambda bad: bad[0]), st.booleans(), st.booleans())
def test_no_problem_hides_another(bad: list[tuple[str, object, str]], misspelt: bool, missing: bool) -> None:
    """Each bad value is told, an unknown name, a missing field, and a conflict whose fields are right."""
    values: dict[str, Any] = {"count": 1, "flag": True, "kind": "b", "name": ""}
    values |= {name: value for name, value, _ in bad} | ({"flagg": 1} if misspelt else {})
    wrong = {name for name, _, _ in bad}
    expected = {f"{name} must be {message}" for name, _, message in bad}
    expected |= {"flag needs kind a"} if wrong.isdisjoint({"flag", "kind"}) else set()
    expected |= {"flag needs a name"} if wrong.isdisjoint({"flag", "name"}) else set()
    expected |= {"unknown field 'flagg'; did you mean 'flag'?"} if misspelt else set()
    if missing and "count" not in wrong:
        del values["count"]
        expected |= {"count is missing"}
    ways: list[Callable[[], object]] = [lambda: Sample.from_dict(values)]
    if expected != {"count is missing"}:  # that alone is Python's to say
        ways.append(lambda: Sample(**values))
    for make in ways if expected else []:
        with pytest.raises(ConfigError) as caught:
            make()
        assert len(caught.value.problems) == len(expected)
        assert set(caught.value.problems) == expected
    assert set(Sample.check(values)) == expected - {"count is missing"}


def test_check_tells_the_problems_of_some_fields_without_making_a_config() -> None:
    assert Sample.check({"rate": 2, "flagg": True}) == [
        "unknown field 'flagg'; did you mean 'flag'?",
        "rate must be a finite number above 0 and at most 1, got 2",
    ]
    assert Sample.check({"rate": 0.5}) == []


def test_a_bad_default_is_reported_too() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Careless(Config):
        size: Annotated[int, Range(1)] = 0

    with pytest.raises(ConfigError, match="Careless: size must be an int at least 1, got 0"):
        Careless()
    assert Careless(size=1).size == 1


@pytest.mark.parametrize("values", [None, [], ["count"], "count", 5])
def test_from_dict_wants_a_mapping(values: Any) -> None:
    with pytest.raises(ConfigError, match="Sample: the fields must be a mapping, got "):
        Sample.from_dict(values)


@pytest.mark.parametrize("key", ["\x1b[31m" + "x" * 500, 5, None, ""])
def test_an_unknown_name_is_shown_safely(key: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        Sample.from_dict({"count": 1, key: 1})
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    ("bounds", "text", "inside", "outside"),
    [
        (Range(1, 10), "at least 1 and at most 10", (1, 10), (0, 11)),
        (Range(above=0, below=1), "above 0 and below 1", (0.5,), (0, 1)),
        (Range(0), "at least 0", (0, 10**9), (-1,)),
        (Range(maximum=0.5), "at most 0.5", (-5, 0.5), (0.6,)),
    ],
)
def test_a_range_knows_its_bounds(
    bounds: Range, text: str, inside: tuple[float, ...], outside: tuple[float, ...]
) -> None:
    assert str(bounds) == text
    assert all(number in bounds for number in inside)
    assert not any(number in bounds for number in outside)


def test_shown_is_one_short_printable_line_for_anything() -> None:
    for value in (10**300, 2.5, None, True, "a\nb", ["\x00"] * 50, object(), b"\x00" * 99):
        assert shown(value).isprintable()
        assert len(shown(value)) < 250
    assert shown(12) == "12"
    assert shown("a\nb") == r"'a\nb'"


def test_of_many_unknown_fields_four_are_named() -> None:
    with pytest.raises(ConfigError) as caught:
        Sample.from_dict({"count": 1, **{f"field{i}" * 100: i for i in range(20_000)}})
    assert "Sample: 5 problems" in str(caught.value)
    assert str(caught.value).endswith("; 19996 more unknown fields")
    assert len(str(caught.value)) < 1_000
