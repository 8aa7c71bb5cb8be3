"""Numbers, switches and texts of any type that says what it is, wherever the package takes one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from decimal import Decimal
from enum import Enum, IntEnum, StrEnum
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness.tiny_models import tiny_config, tiny_gpt
from harness.tiny_training import TEXT, TOKENIZER, quick_config, tiny_split
from hypothesis import example, given, settings
from hypothesis import strategies as st

from charlm import (
    GPT,
    BigramLM,
    CharLM,
    CharTokenizer,
    GPTConfig,
    Trainer,
    get_backend,
    load,
    load_corpus,
    register_backend,
)
from charlm.backends.cpu import CPUBackend
from charlm.config import Config
from charlm.errors import ConfigError, InputError
from charlm.evaluation import evaluate
from charlm.evaluation.surprisal import surprisal
from charlm.generation import SamplingOptions
from charlm.generation.stopping import StopMatcher
from charlm.models.config import BigramConfig, NGramConfig
from charlm.plain import as_bool, as_float, as_int, as_text, int_from, share_of
from charlm.text.inspection import inspect_text
from charlm.training import (
    Timetable,
    TrainerConfig,
    list_checkpoints,
    read_history,
    recommend,
    steps_within,
    training_bytes,
)

INTS: tuple[Callable[[int], Any], ...] = (
    int,
    np.int8,
    np.uint8,
    np.int16,
    np.int32,
    np.uint32,
    np.int64,
    np.uint64,
    lambda n: IntEnum("Number", {"IT": n}).IT,  # type: ignore[attr-defined]  # made of a value
)
FLOATS: tuple[Callable[[float], Any], ...] = (
    float,
    np.float16,
    np.float32,
    np.float64,
    np.longdouble,
    Fraction,
)
BOOLS: tuple[Callable[[bool], Any], ...] = (bool, np.bool_)
TEXTS: tuple[Callable[[str], Any], ...] = (
    str,
    np.str_,
    lambda s: StrEnum("Word", {"IT": s}).IT,  # type: ignore[attr-defined]
    lambda s: Enum("Word", {"IT": s}, type=str).IT,  # type: ignore[attr-defined]
)

NUMPY: Any = np  # its numbers are no int and no float to a type checker
HALF: Any = Fraction(1, 2)

CONFIGS: tuple[Config, ...] = (
    quick_config(
        minutes=2.0,
        eval_chars=64,
        save_interval=4,
        sample_interval=4,
        patience=3,
        max_seconds=9.0,
        eval_interval=4,
    ),
    tiny_config(mlp_width=24, attention_dropout=0.25),
    BigramConfig(vocab_size=7),
    NGramConfig(vocab_size=7, n_ngrams=3),
)


EACH_CONFIG = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
NO_NUMBERS = (
    *(np.float64(math.nan), np.float32(math.inf), Fraction(10**400), -Fraction(10**400), Decimal("0.5")),
    *(np.complex64(1), np.array(1), torch.tensor(1), np.bytes_(b"muon"), np.datetime64(4, "s"), "0.5"),
)


def in_other_types(value: object) -> list[Any]:
    """Return the same value, as far as its type holds it, in all types that say they are its kind."""
    if isinstance(value, tuple):
        return list(zip(*map(in_other_types, value), strict=True))
    kinds: tuple[Callable[[Any], Any], ...] = TEXTS
    if isinstance(value, bool):
        kinds = BOOLS
    elif isinstance(value, int):
        kinds = tuple(kind for kind in INTS if value < 100 or kind not in (np.int8, np.uint8, np.int16))
    elif isinstance(value, float):
        kinds = (*FLOATS, int, np.int64) if value.is_integer() else FLOATS
    return [kind(value) for kind in kinds]


def plain(value: object) -> bool:
    """Say whether a value is exactly of one of Python's own types."""
    if isinstance(value, tuple):
        return all(map(plain, value))
    return type(value) in {bool, int, float, str, type(None)}


@EACH_CONFIG
def test_every_field_keeps_a_plain_value_whatever_type_it_came_in(config: Config) -> None:
    for name, own in vars(config).items():
        assert own is not None, "a config of this test must have a value in each field"
        for given_value in in_other_types(own):
            changed = {name: given_value}
            for again in (config.replace(**changed), type(config)(**{**vars(config), **changed})):
                kept = getattr(again, name)
                assert plain(kept), changed
                assert type(kept) is type(own), changed
                expected = own if not isinstance(own, (float, tuple)) else pytest.approx(own, rel=1e-3)
                assert kept == expected, changed
                assert json.loads(json.dumps(again.to_dict()))[name] == again.to_dict()[name], changed
                assert type(config).from_dict(again.to_dict()) == again, changed


@EACH_CONFIG
def test_what_is_no_finite_number_stays_refused_in_every_field(config: Config) -> None:
    for name in vars(config):
        for value in NO_NUMBERS:
            with pytest.raises(ConfigError, match=rf"{name} must be "):
                config.replace(**{name: value})


@EACH_CONFIG
def test_a_bool_is_no_number_and_a_number_no_bool(config: Config) -> None:
    for name, own in vars(config).items():
        for value in (np.int64(1), np.float64(1.0), 1) if isinstance(own, bool) else (True, np.True_):
            with pytest.raises(ConfigError, match=rf"{name} must be "):
                config.replace(**{name: value})


def test_a_whole_float_is_no_int() -> None:
    for value in (2.0, np.float64(2.0), np.float32(2.0), Fraction(2)):
        with pytest.raises(ConfigError, match="n_layer must be an int"):
            tiny_config(n_layer=value)


def test_a_narrow_float_keeps_its_own_value() -> None:
    config = quick_config(learning_rate=np.float32(0.1))
    assert config.learning_rate == float(np.float32(0.1)) != 0.1


def test_the_helpers_tell_the_kinds_apart() -> None:
    assert [as_int(value) for value in (np.int8(-3), True, np.True_, 2.0, "2", None)] == [-3, *[None] * 5]
    assert [as_float(value) for value in (np.int8(3), Fraction(1, 2), True, np.True_, "2", None, 1j)] == [
        3.0,
        0.5,
        *[None] * 5,
    ]
    assert as_float(-(10**400)) == -math.inf
    assert as_float(Fraction(10**400, 3)) == math.inf
    assert [as_bool(value) for value in (np.True_, np.False_, False, 1, np.int8(1), None)] == [
        *(True, False, False),
        *[None] * 3,
    ]
    assert as_bool(torch.tensor(True)) is None
    assert [as_text(value) for value in (np.str_("a"), b"a", None, 1)] == ["a", None, None, None]
    assert int_from(0, np.int64(0), "it") == 0


def test_sampling_options_keep_plain_values() -> None:
    given_options: dict[str, Any] = {
        "temperature": np.float64(0.5),
        "top_k": np.int64(5),
        "top_p": np.float32(0.5),
        "min_p": Fraction(1, 4),
        "seed": np.int64(3),
        "use_cache": np.True_,
        "overflow": np.str_("restart"),
    }
    options = SamplingOptions(**given_options)
    assert options == SamplingOptions(
        temperature=0.5, top_k=5, top_p=0.5, min_p=0.25, seed=3, use_cache=True, overflow="restart"
    )
    assert all(type(getattr(options, name)) in {float, int, bool, str} for name in given_options)
    with pytest.raises(InputError, match=r"temperature .*; top_k .*; use_cache "):
        SamplingOptions(temperature=Decimal(1), top_k=np.True_, use_cache=np.int64(1))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", TEXTS[1:], ids=["numpy", "StrEnum", "Enum"])
def test_a_subclass_of_str_stands_for_the_text_it_holds(kind: Callable[[str], Any]) -> None:
    lm = CharLM(tiny_gpt(tiny_config(vocab_size=TOKENIZER.vocab_size)), TOKENIZER)
    expected = lm.generate("ba", 9, seed=1, stop=["zz"], overflow="slide")
    for text in (
        lm.generate(kind("ba"), 9, seed=1, stop=[kind("zz")], overflow=kind("slide")),
        lm.generate([kind("ba")], 9, seed=1)[0],
        "ba" + "".join(lm.stream(kind("ba"), 9, seed=1)),
    ):
        assert type(text) is str
        assert text == expected
    assert StopMatcher([kind("a")]).feed("ba") == "b"
    assert (lm.log_probs(kind("ba")) == lm.log_probs("ba")).all()
    assert lm.model.new_state(overflow=kind("restart")).overflow == "restart"
    assert type(lm.model.new_state(overflow=kind("restart")).overflow) is str
    assert CharTokenizer.from_text(kind(TEXT)) == TOKENIZER
    assert CharTokenizer([kind("a"), "b"], unknown=kind("a")) == CharTokenizer("ab", unknown="a")
    assert TOKENIZER.encode(kind("ba")) == TOKENIZER.encode("ba")
    assert get_backend(kind("cpu")).name == "cpu"
    register_backend(kind("words"), CPUBackend)
    assert get_backend("words").name == get_backend(kind("words")).name
    assert load_corpus(kind("python-docs")) == load_corpus("python-docs")
    assert (
        GPT.from_config(kind("cpu-10s"), vocab_size=3).config
        == GPT.from_config("cpu-10s", vocab_size=3).config
    )
    assert GPTConfig(vocab_size=3, position=kind("rotary")) == GPTConfig(vocab_size=3, position="rotary")


def test_a_text_must_still_be_one_of_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match="optimizer must be one of 'muon', 'adamw', got 'sgd'"):
        TrainerConfig(optimizer=np.str_("sgd"))  # type: ignore[arg-type]  # the point
    with pytest.raises(InputError, match="overflow must be"):
        BigramLM(3).new_state(overflow=np.str_("crop"))  # type: ignore[arg-type]  # the point


def test_whatever_takes_a_number_takes_one_of_numpy() -> None:
    train, val = tiny_split(NUMPY.int64(8))
    assert type(train.block_size) is int
    assert len(train.split(NUMPY.float64(0.5))[0].ids) == len(train.split(0.5)[0].ids)
    assert len(train.split(HALF)[0].ids) == len(train.split(0.5)[0].ids)
    assert train.sample_batch(NUMPY.int64(3))[0].shape == (3, 8)
    assert len(list(val.blocks(NUMPY.int32(7)))) == len(list(val.blocks(7)))
    model = BigramLM(NUMPY.int64(TOKENIZER.vocab_size))
    assert type(model.vocab_size) is type(model.token_embedding_table.num_embeddings) is int
    fitted = model.fit(train, smoothing=NUMPY.float32(0.5))
    assert evaluate(fitted, val, batch_size=NUMPY.int64(3), max_chars=NUMPY.int64(64)) == evaluate(
        fitted, val, batch_size=3, max_chars=64
    )
    assert surprisal(fitted, val, top=NUMPY.int8(1)).candidates.shape[1] == 1
    assert inspect_text(TEXT, val_fraction=NUMPY.float32(0.5)) == inspect_text(TEXT, val_fraction=0.5)
    assert steps_within(NUMPY.float64(0.2), fitted, train, quick_config(), device="cpu").steps >= 1
    lm = CharLM(fitted, TOKENIZER)
    assert lm.generate("ba", NUMPY.int64(5), seed=NUMPY.int64(1)) == lm.generate("ba", 5, seed=1)
    assert lm.evaluate("ba de", block_size=NUMPY.int64(2)) == lm.evaluate("ba de", block_size=2)
    idx = torch.tensor([[1, 2]])
    assert model.generate(idx, NUMPY.int64(3), seed=1).tolist() == model.generate(idx, 3, seed=1).tolist()
    state = model.new_state(NUMPY.int64(2), use_cache=NUMPY.False_)
    state.observe(torch.tensor([[1, 2], [3, 4]]))
    state.retract(NUMPY.int64(1))
    assert state.fork([NUMPY.int64(1), NUMPY.int64(0)]).lengths == [1, 1]
    assert type(state.rows) is int
    assert StopMatcher(["a"], keep=NUMPY.True_).feed("ba") == "ba"


def test_a_timetable_keeps_plain_values() -> None:
    given_table = Timetable(
        ends=((NUMPY.int64(3), NUMPY.int64(9)),), evaluations=(NUMPY.int64(4),), eval_chars=NUMPY.int64(8)
    )
    assert given_table == Timetable(ends=((3, 9),), evaluations=(4,), eval_chars=8)
    assert json.loads(json.dumps(given_table.to_dict())) == given_table.to_dict()
    for wrong in ({"ends": ((True, 9),)}, {"evaluations": (4.0,)}, {"eval_chars": NUMPY.True_}):
        with pytest.raises(InputError):
            Timetable(**wrong)


def test_a_resume_takes_a_new_end_of_numpy(tmp_path: Any) -> None:
    train, val = tiny_split()
    model = BigramLM(TOKENIZER.vocab_size)
    config = quick_config(max_steps=4)
    Trainer(
        model, train, config, val_data=val, tokenizer=TOKENIZER, out_dir=tmp_path / "run", device="cpu"
    ).fit()
    with pytest.raises(ConfigError, match="max_steps must be at least the 4 steps done, got 3"):
        Trainer.resume(tmp_path / "run", train, val_data=val, device="cpu", max_steps=NUMPY.int64(3))
    again = Trainer.resume(tmp_path / "run", train, val_data=val, device="cpu", max_steps=NUMPY.int64(6))
    assert type(again.config.max_steps) is int
    assert again.fit().steps == 6


class Names(str, Enum):  # noqa: UP042 - `str()` of a StrEnum would be its text
    """Paths as texts of a subclass, of which `str()` and `Path` make something else."""

    MODEL = "model"
    VOCAB = "vocab.json"
    TEXT = "my.txt"
    RUN = "run"


def test_a_path_may_be_an_enum_and_means_its_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train, val = tiny_split()
    lm = CharLM(BigramLM(TOKENIZER.vocab_size), TOKENIZER)
    lm.save(Names.MODEL)
    TOKENIZER.save(Names.VOCAB)
    Path("my.txt").write_text(TEXT, encoding="utf-8")
    assert load_corpus(Names.TEXT) == TEXT
    assert CharTokenizer.load(Names.VOCAB) == TOKENIZER
    assert load(Names.MODEL, device="cpu").tokenizer == TOKENIZER
    config = quick_config(max_steps=4)
    parts: dict[str, Any] = {"val_data": val, "tokenizer": TOKENIZER, "device": "cpu"}
    Trainer(lm.model, train, config, out_dir=Names.RUN, **parts).fit()
    assert [info.step for info in list_checkpoints(Names.RUN)] == [4]
    assert read_history(Names.RUN).name == "run"
    assert Trainer.resume(Names.RUN, train, val_data=val, device="cpu").step == 4
    assert {path.name for path in tmp_path.iterdir()} == {"model", "vocab.json", "my.txt", "run"}


def test_a_recommendation_and_an_estimate_take_any_integer() -> None:
    assert recommend(NUMPY.int64(3_000), NUMPY.int8(40)) == recommend(3_000, 40)
    assert recommend(NUMPY.int32(300_000_000), NUMPY.int32(400_000)).most_chars == 3 * 300_000_000
    for wrong in ({"train_chars": -5, "val_chars": None}, {"train_chars": 5, "val_chars": -1}):
        with pytest.raises(InputError, match="must be an int, 0 or more"):
            recommend(**wrong)
    with pytest.raises(InputError, match="minutes must be above 0"):
        recommend(5, 5, minutes=-1)
    model, config = BigramLM(650), TrainerConfig(batch_size=4096)
    expected = training_bytes(model, config, block_size=256, device="cpu")
    assert training_bytes(model, config, block_size=NUMPY.int32(256), device="cpu") == expected
    for block_size in (0, -3, True, 2.5):
        with pytest.raises(InputError, match="block_size must be an int, 1 or more"):
            training_bytes(model, config, block_size=block_size, device="cpu")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="config must be a TrainerConfig"):
        training_bytes(model, {"batch_size": 4}, block_size=8, device="cpu")  # type: ignore[arg-type]


def test_the_seconds_of_a_run_are_a_time(tmp_path: Path) -> None:
    train, val = tiny_split()
    model = BigramLM(TOKENIZER.vocab_size)
    trainer = Trainer(
        model,
        train,
        quick_config(max_steps=4),
        val_data=val,
        tokenizer=TOKENIZER,
        out_dir=tmp_path / "run",
        device="cpu",
    )
    trainer.seconds += NUMPY.float64(1.5)
    assert trainer.fit().seconds > 1.5
    for wrong in (-0.1, float("nan"), float("inf"), "1", None):
        with pytest.raises(InputError, match="seconds must be a finite number, 0 or more"):
            trainer.seconds = wrong  # type: ignore[assignment]
    assert Trainer.resume(tmp_path / "run", train, val_data=val, device="cpu").seconds > 1.5


def test_what_is_no_backend_and_no_count_is_refused() -> None:
    train, _ = tiny_split()
    with pytest.raises(InputError, match="backend must be a DeviceBackend, got 'cpu'"):
        CharLM(BigramLM(TOKENIZER.vocab_size), TOKENIZER, backend="cpu")  # type: ignore[arg-type]
    for wrong in (0, -1, 2.5, True):
        with pytest.raises(InputError, match="most must be an int, 1 or more"):
            list(train.blocks(2, most=wrong))  # type: ignore[arg-type]
    model = BigramLM(TOKENIZER.vocab_size)
    for count in (-1, "x"):
        arguments: dict[str, Any] = {"evaluations": count, "device": "cpu"}
        with pytest.raises(InputError, match="evaluations must be an int, 0 or more"):
            steps_within(1.0, model, train, quick_config(), **arguments)


@settings(max_examples=50)
@given(st.integers(0, 2_000_000), st.integers(0, 10**6), st.integers(1, 10**6))
@example(1000, 70_000, 10**6)
@example(100, 290_000, 10**6)
def test_a_share_is_cut_as_the_decimal_or_the_fraction_that_is_meant(
    count: int, part: int, whole: int
) -> None:
    part = min(part, whole)
    for exact in (Fraction(part, whole), Fraction(part, 10**6)):
        rest = 1 - exact
        assert share_of(count, float(exact)) == math.floor(exact * count)
        assert share_of(count, 1 - float(exact)) == share_of(count, float(rest)) == math.floor(rest * count)


@given(st.integers(0, 10**12), st.floats(0, 1))
def test_a_share_is_never_more_than_one_beside_the_product(count: int, share: float) -> None:
    assert 0 <= share_of(count, share) <= count
    assert share_of(count, share) - int(share * count) in {0, 1}
