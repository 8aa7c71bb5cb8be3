"""The sum of a step's gradients: the same for every world that shares it out, in the order of the tree."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from harness.shares import KINDS, outcome
from harness.threads import in_world
from harness.tiny_training import (
    TOKENIZER,
    PlainModule,
    quick_config,
    same_tensors,
    tensors_of,
    tiny_split,
)
from torch import Tensor, nn
from typing_extensions import override

from charlm import Trainer
from charlm.backends.world import World
from charlm.errors import ConfigError
from charlm.training.reduction import TreeSum, check_world


@pytest.mark.parametrize("kind", KINDS)
def test_every_world_that_divides_the_micro_batches_trains_alike_bit_for_bit(kind: str) -> None:
    steps, tensors = outcome(kind)
    assert len(steps) == 6
    for size in (2, 4):
        found = in_world(size, lambda world: outcome(kind))
        assert found[0][0] == steps
        assert [numbers for numbers, _ in found[1:]] == [[]] * (size - 1)  # callbacks run in the first alone
        assert all(same_tensors(others, tensors) for _, others in found)


def test_a_step_that_is_skipped_is_skipped_in_every_process() -> None:
    class Bad(PlainModule):
        @override
        def forward(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            logits, loss = super().forward(idx, targets)
            return logits, loss * (float("nan") if int(idx.sum()) % 5 == 0 else 1)

    def losses(world: World) -> tuple[list[float], dict[str, Tensor]]:
        torch.manual_seed(2)
        config = quick_config(accumulate=2, nonfinite="skip", max_steps=20, batch_size=1)
        trainer = Trainer(copy.deepcopy(model), tiny_split()[0], config, device="cpu")
        return [record.loss for record in trainer.steps()], tensors_of(trainer)

    with torch.random.fork_rng(devices=[]):
        model = Bad(TOKENIZER.vocab_size)
        with pytest.warns(RuntimeWarning, match="was skipped"):
            alone, wanted = losses(World())
        with pytest.warns(RuntimeWarning, match="was skipped"):
            both = in_world(2, losses)
    assert any(loss != loss for loss in alone)
    assert any(loss == loss for loss in alone)
    for found, tensors in both:
        assert torch.equal(torch.tensor(found).nan_to_num(7), torch.tensor(alone).nan_to_num(7))
        assert same_tensors(tensors, wanted)


def plain_sum(parts: Sequence[Tensor]) -> Tensor:
    """The tree as its definition says it."""
    if len(parts) % 2 == 0:
        half = len(parts) // 2
        return plain_sum(parts[:half]) + plain_sum(parts[half:])
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6, 7, 8, 12, 20, 24, 64])
def test_gradients_and_losses_are_added_in_the_tree(count: int) -> None:
    draw = torch.Generator().manual_seed(count)
    parts = [
        torch.randn(7, generator=draw) * 10.0 ** float(torch.randint(-4, 4, (), generator=draw))
        for _ in range(count)
    ]
    losses = [part.abs().sum() for part in parts]
    sizes = [size for size in (1, 2, 4, 8, 16, 32, 64) if count % size == 0]
    orders = set()
    for size in sizes:

        def add_up(world: World) -> tuple[Tensor, Tensor]:
            weight = nn.Parameter(torch.zeros(7))

            def backward(model: nn.Module, micro: int, shares: int) -> Tensor:
                assert shares == count
                weight.grad = parts[micro].clone() if weight.grad is None else weight.grad.add_(parts[micro])
                loss: Tensor = losses[micro]
                return loss

            loss = TreeSum(nn.Module(), [weight], count, world).run(backward)
            assert weight.grad is not None
            return weight.grad, loss

        for grad, loss in in_world(size, add_up):
            assert torch.equal(grad, plain_sum(parts))
            assert torch.equal(loss, plain_sum(losses))
            orders.add(tuple(grad.tolist()))
    assert len(orders) == 1
    if count <= 2:  # what was done before there was a tree
        assert torch.equal(plain_sum(parts), sum(parts[1:], start=parts[0]))


@pytest.mark.parametrize(
    ("changes", "size", "said"),
    [
        (
            {"batch_size": 16},
            2,
            r"multiple of the 2 processes, got 1\. .* batch_size=8, accumulate=2 \(--batch-size 8 ",
        ),
        ({"batch_size": 4, "accumulate": 4}, 8, r"got 4\. The same 16 blocks .* batch_size=2, accumulate=8"),
        ({"batch_size": 3, "accumulate": 1}, 2, r"got 1\. Use at most 3 processes, or larger steps"),
        ({"batch_size": 4, "accumulate": 3}, 3, r"1, 2, 4, 8, … processes, got 3"),
        ({"batch_size": 4, "accumulate": 4, "reduce": "fast"}, 3, r"multiple of the 3 processes, got 4"),
    ],
)
def test_a_world_that_the_micro_batches_do_not_allow_is_refused(
    changes: dict[str, object], size: int, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        check_world(quick_config(**changes), size)


def test_a_world_that_the_micro_batches_allow_is_not_refused() -> None:
    check_world(quick_config(accumulate=3), 1)
    check_world(quick_config(accumulate=6), 2)
    check_world(quick_config(accumulate=6, reduce="fast"), 3)
