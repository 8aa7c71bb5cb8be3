"""Numbers that are not finite, put into losses and gradients at random: no weight and no moment ever moves.

One value of one gradient, or the loss, of one micro-batch becomes NaN or an infinity, on a device that is
asked at each step and on one that works on its own. Where the run ends, the error names the step and the
parameter, and training goes on from there as if nothing had been. Where the step is skipped, the run ends as
one does whose steps were taken by hand, those left out.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.campaign import Campaign
from harness.far_backend import FarBackend
from harness.tiny_training import TOKENIZER, quick_config, same_tensors, tensors_of, tiny_split
from torch import Tensor

from charlm import GPT, BigramLM, Trainer
from charlm.backends.cpu import CPUBackend
from charlm.errors import NonFiniteError
from charlm.runs.log import read_metrics
from charlm.training import list_checkpoints

pytestmark = pytest.mark.slow

STEPS = 10
V = TOKENIZER.vocab_size


@dataclass(frozen=True)
class Kind:
    """One way to train."""

    model: str
    far: bool
    settings: dict[str, Any]

    def trainer(self, **changes: Any) -> Trainer:
        train, val = tiny_split()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = (
                BigramLM(V)
                if self.model == "bigram"
                else GPT.from_config("cpu-1min", vocab_size=V, block_size=8, n_layer=1, n_head=1, n_embd=8)
            )
        settings = {"max_steps": STEPS, "eval_interval": 100, "log_interval": 5, **self.settings, **changes}
        backend = FarBackend() if self.far else CPUBackend()
        out_dir = settings.pop("out_dir", None)
        return Trainer(model, train, quick_config(**settings), val_data=val, device=backend, out_dir=out_dir)


KINDS = [
    Kind("bigram", far=False, settings={}),
    Kind("gpt", far=False, settings={"optimizer": "muon", "accumulate": 2}),
    Kind("gpt", far=True, settings={"optimizer": "muon"}),
    Kind("gpt", far=True, settings={"precision": "bf16", "accumulate": 2, "grad_clip": None}),
    Kind("gpt", far=False, settings={"optimizer": "muon", "precision": "bf16", "replacement": False}),
]


@contextmanager
def poisoned(trainer: Trainer, draw: random.Random) -> Iterator[str | None]:
    """Let one forward or backward pass inside the block give a bad number; yields the parameter's name."""
    bad = draw.choice([math.nan, math.inf, -math.inf])
    passes = draw.randrange(trainer.config.accumulate)  # how many pass before it
    count = iter(range(1_000))
    if draw.random() < 0.3:

        def spoil(module: Any, args: Any, output: tuple[Tensor, Tensor]) -> Any:
            return (output[0], output[1] * bad) if next(count) == passes else output

        handle = trainer.model.register_forward_hook(spoil)
        name = None
    else:
        name, parameter = draw.choice(list(trainer.model.named_parameters()))
        place = draw.randrange(parameter.numel())

        def poison(gradient: Tensor) -> Tensor:
            if next(count) != passes:
                return gradient
            gradient = gradient.clone(memory_format=torch.contiguous_format)
            gradient.view(-1)[place] = bad
            return gradient

        handle = parameter.register_hook(poison)
    try:
        yield name
    finally:
        handle.remove()


def error_of(trainer: Trainer, steps: Iterator[object]) -> NonFiniteError:
    """Take a step that is to fail, and return its error."""
    with pytest.raises(NonFiniteError) as caught:  # noqa: PT012 - the save is where a far device is asked
        next(steps)
        trainer.save()
    if isinstance(steps, Generator):
        steps.close()
    return caught.value


def unmoved(trainer: Trainer, before: dict[str, Tensor]) -> bool:
    """Say whether all is as it was; moments may have been made, if they are still zero."""
    now = tensors_of(trainer)
    made = now.keys() - before.keys()
    return same_tensors({k: now[k] for k in before}, before) and not any(now[k].any() for k in made)


def test_a_step_that_is_not_finite_ends_the_run_with_nothing_moved(
    campaign: Campaign, tmp_path: Path
) -> None:
    draw = random.Random(campaign.seed)
    whole = []
    for kind in KINDS:
        undisturbed = kind.trainer()
        undisturbed.fit()
        whole.append(tensors_of(undisturbed))
    for trial in range(campaign.trials(10)):
        number, kind = trial % len(KINDS), KINDS[trial % len(KINDS)]
        trainer = kind.trainer(out_dir=tmp_path / str(trial))
        at = draw.randrange(STEPS)
        steps = trainer.steps()
        for _ in range(at):
            next(steps)
        before = tensors_of(trainer)
        with poisoned(trainer, draw) as name:
            caught = error_of(trainer, steps)
        told = f"trial {trial}, step {at}, {name}"
        assert unmoved(trainer, before), told
        assert (caught.step, trainer.step) == (at + 1, at), told
        # With another micro-batch the loss alone tells; asked later, the bad pass is not seen again.
        if name is not None and not kind.far:
            assert caught.parameter == name, told
        assert f"step {at + 1}:" in str(caught)
        assert "learning rate" in str(caught)
        assert f"seed {trainer.config.seed}" in str(caught)
        assert list_checkpoints(tmp_path / str(trial)) == [], told
        assert trainer.fit().steps == STEPS
        assert same_tensors(tensors_of(trainer), whole[number]), told
        campaign.counted("injections, the run ends")
        campaign.counted("of them into a gradient", int(name is not None))


def test_a_step_that_is_not_finite_is_left_out_and_logged(campaign: Campaign, tmp_path: Path) -> None:
    draw = random.Random(campaign.seed + 1)
    for trial in range(campaign.trials(10)):
        kind = KINDS[trial % len(KINDS)]
        trainer = kind.trainer(nonfinite="skip", out_dir=tmp_path / str(trial))
        bad = sorted(draw.sample(range(STEPS), draw.randint(1, 3)))
        steps = trainer.steps()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for step in range(STEPS):
                if step not in bad:
                    assert not next(steps).skipped
                    continue
                before = tensors_of(trainer)
                with poisoned(trainer, draw):
                    assert next(steps).skipped
                assert unmoved(trainer, before), f"trial {trial}, step {step}"
            list(steps)
        by_hand = kind.trainer()
        for step in range(STEPS):
            if step not in bad:
                by_hand.model.train()
                by_hand._stepper.take(step)
        assert same_tensors(tensors_of(trainer), tensors_of(by_hand)), f"trial {trial}: {bad}"
        log = read_metrics(tmp_path / str(trial) / "metrics.jsonl")
        skipped = [record for record in log if record["kind"] == "skip"]
        assert [record["step"] for record in skipped] == [step + 1 for step in bad], f"trial {trial}"
        assert all(record["nonfinite"] for record in skipped)
        assert all(
            f"step {step + 1} was skipped" in str(w.message) for step, w in zip(bad, told, strict=True)
        )
        assert trainer.best is not None
        assert math.isfinite(trainer.best.result.loss_nats)
        campaign.counted("injections, the step is skipped", len(bad))


@pytest.mark.filterwarnings("ignore:step .* was skipped")
@pytest.mark.parametrize("kind", KINDS)
def test_ten_in_a_row_end_a_run_that_skips(kind: Kind) -> None:
    trainer = kind.trainer(nonfinite="skip", max_steps=40, log_interval=1)
    steps = trainer.steps()
    hook = trainer.model.register_forward_hook(lambda module, args, output: (output[0], output[1] * math.nan))
    next(steps)
    for _ in range(8):
        next(steps)
    hook.remove()
    next(steps)  # the row is broken
    before = tensors_of(trainer)
    hook = trainer.model.register_forward_hook(lambda module, args, output: (output[0], output[1] * math.nan))
    for _ in range(9):
        next(steps)
    with pytest.raises(NonFiniteError, match="the 10th in a row") as caught:
        next(steps)
    assert (caught.value.step, trainer.step) == (20, 19)
    assert unmoved(trainer, before)
    hook.remove()
    assert trainer.fit().steps == 40
