"""The plan of a training: exact points, and that `train` and `inspect` have the same one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from harness.command import Command, environment, text_file
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from charlm.cli import fit, guess
from charlm.cli.output import UsageError
from charlm.cli.plan import Plan, plan_training
from charlm.cli.settings import DEFAULT_PRESET, FIELDS, Settings, gather
from charlm.models.config import PRESETS, PresetName
from charlm.testing import tiny_corpus
from charlm.training.config import MOST_STEPS
from charlm.training.recipes import RECIPES


def settings_of(preset: PresetName = DEFAULT_PRESET, **flags: str) -> Settings:
    return gather(preset, file=None, environment={}, flags=flags)


def plan_of(n_chars: int = 1_000_000, preset: PresetName | None = None, **changes: Any) -> Plan:
    """Return a plan for a text of so many characters; `changes` are flags and what `plan_training` takes."""
    options: dict[str, Any] = {"val_fraction": 0.1, "on_gpu": False, "shares_out": False}
    options |= {name: changes.pop(name) for name in list(changes) if name in options}
    chosen = settings_of(preset or DEFAULT_PRESET, **changes)
    return plan_training(chosen, n_chars, 65, choose=preset is None, **options)


# Exact points


def test_a_step_is_cut_into_micro_batches_for_several_processes_unless_somebody_has_cut_it() -> None:
    alone, shared = plan_of(), plan_of(shares_out=True)
    blocks = alone.training.batch_size * alone.training.accumulate
    assert (shared.training.batch_size, shared.training.accumulate) == (blocks // 8, 8)
    assert shared.shared_out
    assert shared.most_steps == alone.most_steps
    choices: list[dict[str, Any]] = [{"batch_size": "12"}, {"accumulate": "2"}]
    for flags in choices:
        plan = plan_of(shares_out=True, **flags)
        assert not plan.shared_out
        assert plan.training == plan_of(**flags).training


def test_a_preset_that_is_asked_for_is_trained_as_it_is() -> None:
    for preset in PRESETS:
        plan = plan_of(preset=preset)
        assert (plan.preset, plan.reasons, plan.most_steps) == (preset, (), None)
        assert plan.training == RECIPES[preset]
        assert plan.model.to_dict() == {**PRESETS[preset], "vocab_size": 65}


def test_without_a_preset_text_time_and_device_choose_it_and_say_why() -> None:
    assert plan_of().preset == "cpu-1min"
    assert plan_of().reasons[0] == "for 1 min on a CPU"
    assert plan_of(minutes="0.4").preset == "cpu-10s"
    assert plan_of(minutes="2.5").preset == "cpu-5min"
    assert plan_of(on_gpu=True).preset == "cpu-5min"
    assert plan_of(10_000, minutes="60").preset == "cpu-10s"


@pytest.mark.parametrize(
    ("n_chars", "val_fraction", "train", "val"),
    [
        (10, 0.1, 9, 1),
        (1000, 0.07, 930, 70),
        (10, 0.0, 10, 0),
        (9, 0.5, 4, 5),
        (10, 0.999, 0, 10),
        (0, 0.1, 0, 0),
    ],
)
def test_the_text_is_cut_as_the_data_is(n_chars: int, val_fraction: float, train: int, val: int) -> None:
    plan = plan_of(n_chars, val_fraction=val_fraction)
    assert (plan.train_chars, plan.val_chars, plan.val_fraction) == (train, val, val_fraction)


@pytest.mark.parametrize(
    ("n_chars", "preset", "steps"),
    [
        (10, "cpu-10s", 1),  # blocks of 8
        (1_023, "cpu-10s", 4),  # each step sees 16 * 64 characters, and 5 epochs are good for the text
        (1_024, "cpu-10s", 5),
        (49_999, "cpu-10s", 244),
        (50_000, "cpu-1min", 73),  # 16 * 128 characters, 3 epochs
        (819_199, "cpu-1min", 1_199),
        (819_200, "cpu-1min", 1_200),
    ],
)
def test_a_short_text_limits_the_steps(n_chars: int, preset: PresetName, steps: int) -> None:
    plan = plan_of(n_chars, val_fraction=0.0)
    assert (plan.preset, plan.most_steps, plan.training.max_steps) == (preset, steps, steps)
    within = plan_of(n_chars, val_fraction=0.0, minutes="1")
    assert (within.most_steps, within.training.max_steps) == (steps, steps)


def test_a_long_text_leaves_the_steps_to_the_recipe_or_to_the_clock() -> None:
    assert plan_of().most_steps == 3 * 900_000 // (16 * 128) == 1_318
    assert plan_of(accumulate="2").most_steps == 3 * 900_000 // (2 * 16 * 128) == 659
    assert plan_of().training.max_steps == RECIPES["cpu-1min"].max_steps == 1_200
    assert plan_of(minutes="1").training.max_steps == 1_318
    assert plan_of(minutes="1", preset="cpu-1min").training.max_steps == MOST_STEPS


def test_steps_that_a_person_sets_are_not_changed() -> None:
    for plan in (plan_of(1_000, max_steps="777"), plan_of(1_000, max_steps="777", minutes="1")):
        assert (plan.most_steps, plan.training.max_steps) == (None, 777)


def test_within_minutes_the_clock_decides_when_to_evaluate_unless_a_person_has() -> None:
    assert plan_of().training.eval_interval == RECIPES["cpu-1min"].eval_interval
    assert plan_of(minutes="1").training.eval_interval is None
    assert plan_of(minutes="1", eval_interval="40").training.eval_interval == 40


def test_the_shares_of_the_minutes() -> None:
    plan = plan_of(minutes="10")
    assert plan.seconds == 600
    assert plan.counting_seconds == pytest.approx(36)
    assert plan.scoring_seconds == pytest.approx((24, 12))
    assert plan.evaluating_seconds(3.0) == pytest.approx(15)  # five of them
    assert plan.evaluating_seconds(12.1) == pytest.approx(60)  # no more than a tenth
    assert plan_of(minutes="60").evaluating_seconds(1.0) == pytest.approx(30)  # every two minutes
    assert plan_of(minutes="10", eval_chars="99").scoring_seconds is None
    assert plan_of(minutes="10", val_fraction=0.0).scoring_seconds is None
    steps = plan_of()
    assert (steps.seconds, steps.counting_seconds, steps.scoring_seconds) == (None, None, None)
    assert steps.evaluating_seconds(3.0) == 0


def test_what_was_set_goes_together_with_the_chosen_preset_or_is_refused() -> None:
    with pytest.raises(UsageError, match="need an even n_embd / n_head, got 68 / 4"):
        plan_of(minutes="5", n_embd="68")  # two heads in cpu-1min, four in cpu-5min
    assert plan_of(minutes="1", n_embd="68").model.n_embd == 68


@pytest.mark.slow
def test_a_plan_needs_no_torch() -> None:
    program = "import sys, charlm.cli.plan; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], env=environment(), check=True)


# Properties


@st.composite
def inputs(draw: st.DrawFn) -> dict[str, Any]:
    flags = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "minutes": st.floats(0.001, 500).map(str),
                "max_steps": st.integers(1, 10**6).map(str),
                "batch_size": st.integers(1, 64).map(str),
                "accumulate": st.integers(1, 4).map(str),
                "eval_interval": st.integers(1, 99).map(str),
            },
        )
    )
    return {
        "n_chars": draw(st.integers(1_000, 10**7)),
        "preset": draw(st.none() | st.sampled_from(sorted(PRESETS))),
        "val_fraction": draw(st.just(0.0) | st.floats(0.01, 0.9)),
        "on_gpu": draw(st.booleans()),
        **flags,
    }


@given(inputs())
def test_a_plan_depends_on_its_inputs_alone_and_keeps_what_was_set(given_inputs: dict[str, Any]) -> None:
    plan = plan_of(**given_inputs)
    assert plan == plan_of(**given_inputs)
    assert plan.train_chars + plan.val_chars == given_inputs["n_chars"]
    for name in FIELDS.keys() & given_inputs.keys():
        assert str(getattr(plan.training, name)) == given_inputs[name]
    if "max_steps" not in given_inputs:
        assert plan.training.max_steps <= (plan.most_steps or MOST_STEPS)
    if given_inputs["preset"] is None:
        assert plan.reasons
        assert plan.model.block_size < min(plan.train_chars, plan.val_chars or plan.train_chars)


class _SeenError(Exception):
    pass


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n_chars=st.integers(100, 6_000),
    val_fraction=st.just(0.0) | st.floats(0.05, 0.9),
    minutes=st.floats(0.01, 90),
    variables=st.fixed_dictionaries(
        {},
        optional={
            "CHARLM_BATCH_SIZE": st.integers(1, 40).map(str),
            "CHARLM_MAX_STEPS": st.integers(1, 500).map(str),
            "CHARLM_EVAL_INTERVAL": st.integers(1, 50).map(str),
            "CHARLM_N_LAYER": st.integers(1, 3).map(str),
        },
    ),
)
def test_train_and_inspect_plan_the_same_training(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    n_chars: int,
    val_fraction: float,
    minutes: float,
    variables: dict[str, str],
) -> None:
    plans: list[Plan] = []

    def noted(*args: Any, **options: Any) -> Plan:
        plans.append(plan_training(*args, **options))
        raise _SeenError

    text, command = text_file(tmp_path, tiny_corpus(n_chars)), Command(capsys)
    words = ["--minutes", repr(minutes), "--val-fraction", repr(val_fraction)]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        patch.setattr(fit, "plan_training", noted)
        patch.setattr(guess, "plan_training", noted)
        assert command("train", text, "-o", tmp_path / "run", *words) == 1
        assert command("inspect", text, *words) == 1
    trained, inspected = plans
    assert trained == inspected
