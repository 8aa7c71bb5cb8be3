"""Training on a device that works on while Python goes on: nothing waits, and nothing bad goes unnoticed.

The CPU plays the device; a dispatch mode counts the operations with which torch reads a number from one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.far_backend import FarBackend
from harness.tiny_training import TOKENIZER, Numbers, quick_config, same_tensors, tensors_of, tiny_split
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from charlm import GPT, Trainer
from charlm.backends.cpu import CPUBackend
from charlm.errors import NonFiniteError
from charlm.runs.log import read_metrics
from charlm.training import AdamW, Muon
from charlm.training.optimizers import OptimizerFactory


class Reads(TorchDispatchMode):
    """Counts how often a number is read from a tensor."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}:
            self.count += 1
        return func(*args, **(kwargs or {}))


def trainer_with(
    *,
    far: bool = True,
    out_dir: Path | None = None,
    factory: OptimizerFactory | None = None,
    **changes: object,
) -> Trainer:
    train, _ = tiny_split()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT.from_config(
            "cpu-1min", vocab_size=TOKENIZER.vocab_size, block_size=8, n_layer=1, n_head=1, n_embd=8
        )
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.1)
    config = quick_config(
        **{"optimizer": "muon", "max_steps": 20, "log_interval": 10, "eval_interval": 1000, **changes}
    )
    backend = FarBackend() if far else CPUBackend()
    return Trainer(model, train, config, device=backend, out_dir=out_dir, optimizer=factory)


@contextmanager
def poisoned(trainer: Trainer, name: str) -> Iterator[None]:
    """Let every gradient of one parameter be not a number."""
    handle = trainer.model.get_parameter(name).register_hook(lambda g: torch.full_like(g, math.nan))
    yield
    handle.remove()


@pytest.mark.parametrize("changes", [{}, {"grad_clip": None}, {"accumulate": 2}, {"precision": "bf16"}])
def test_no_step_reads_from_the_device_but_at_the_log_interval(changes: dict[str, Any]) -> None:
    trainer = trainer_with(**changes)
    with Reads() as reads:
        counts = []
        for _ in trainer.steps():
            counts.append(reads.count)
            reads.count = 0
    assert [i + 1 for i, count in enumerate(counts) if count] == [10, 20]


def test_on_the_cpu_and_with_a_strangers_optimizer_every_step_is_checked_at_once() -> None:
    def sgd(named: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for _, p in named], lr=0.1)

    for trainer in (trainer_with(far=False), trainer_with(factory=sgd)):
        steps = trainer.steps()
        next(steps), next(steps)
        before = tensors_of(trainer)
        with poisoned(trainer, "lm_head.weight"), pytest.raises(NonFiniteError, match="step 3:"):
            next(steps)
        assert same_tensors(tensors_of(trainer), before)


@pytest.mark.parametrize("name", ["lm_head.weight", "transformer.h.0.attn.c_attn.weight"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_from_the_first_bad_step_nothing_moves_and_the_error_names_it(
    tmp_path: Path, name: str, optimizer: str
) -> None:
    trainer = trainer_with(out_dir=tmp_path / "run", optimizer=optimizer)
    steps = trainer.steps()
    for _ in range(4):
        next(steps)
    before, chars = tensors_of(trainer), trainer.chars_seen
    with poisoned(trainer, name):
        for _ in range(5):
            next(steps)
        assert same_tensors(tensors_of(trainer), before)
        with pytest.raises(NonFiniteError, match=rf"step 5: .*first bad gradient: {name}") as caught:
            next(steps)
    assert (caught.value.step, caught.value.parameter) == (5, name)
    assert same_tensors(tensors_of(trainer), before)
    assert (trainer.step, trainer.chars_seen) == (4, chars)
    logged = [entry for entry in read_metrics(tmp_path / "run" / "metrics.jsonl") if entry["kind"] == "step"]
    assert logged[-1]["step"] == 5
    undisturbed = trainer_with(optimizer=optimizer)
    assert trainer.fit().steps == undisturbed.fit().steps == 20  # the cause is gone: it goes on from step 4
    assert same_tensors(tensors_of(trainer), tensors_of(undisturbed))


def test_one_bad_step_is_enough_to_stop_those_after_it() -> None:
    trainer = trainer_with()
    steps = trainer.steps()
    for _ in range(4):
        next(steps)
    before = tensors_of(trainer)
    with poisoned(trainer, "lm_head.weight"):
        next(steps)
    for _ in range(4):
        next(steps)  # good ones, but a run does not go on over a hole
    assert same_tensors(tensors_of(trainer), before)
    with pytest.raises(NonFiniteError, match=r"step 5: .*all gradients are finite"):
        next(steps)  # what was bad has gone when the step is taken again
    assert trainer.step == 4


def test_a_checkpoint_is_never_written_of_a_run_that_has_gone_bad(tmp_path: Path) -> None:
    trainer = trainer_with(out_dir=tmp_path / "run")
    steps = trainer.steps()
    next(steps)
    with poisoned(trainer, "lm_head.weight"):
        next(steps)
        with pytest.raises(NonFiniteError, match="step 2:"):
            trainer.save()
    assert trainer.step == 1
    trainer.save()
    assert trainer.checkpoint is not None
    assert trainer.checkpoint.name.startswith("step-000000000001")


def test_masked_steps_train_as_checked_ones_do_bit_for_bit() -> None:
    ends = []
    for far in (True, False):
        trainer, numbers = trainer_with(far=far), Numbers()
        trainer.callbacks = (numbers,)
        trainer.fit()
        ends.append((tensors_of(trainer), numbers.steps))
    assert same_tensors(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


@pytest.mark.parametrize("make", [AdamW, Muon])
def test_an_optimizer_told_of_something_not_finite_changes_nothing(make: type[AdamW | Muon]) -> None:
    weight = nn.Parameter(torch.ones(3, 4))
    optimizer = make([weight], lr=0.1)
    weight.grad = torch.full((3, 4), 0.5)
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert not torch.equal(weight, torch.ones(3, 4))
    before = [weight.detach().clone(), *(t.clone() for t in optimizer.state[weight].values())]
    weight.grad = torch.full((3, 4), math.nan)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    after: list[Tensor] = [weight.detach(), *optimizer.state[weight].values()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
