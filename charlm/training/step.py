"""One step of gradient descent: forward, backward, update.

It knows a model, its batches and its optimizers, and no runs, logs or checkpoints. All random numbers of a
step come from the step's own address, so a step depends on earlier ones only through the weights and the
optimizers' state. guard.py decides whether a step may move the weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from charlm.backends.base import DeviceBackend, Precision
from charlm.backends.world import World
from charlm.data.batches import batches_on
from charlm.data.blocks import BlockDataset
from charlm.data.order import order_of
from charlm.errors import InputError, NonFiniteError
from charlm.randomness import derive_seed
from charlm.training.config import TrainerConfig
from charlm.training.guard import Guard, guard_for
from charlm.training.optimizers import OptimizerFactory, build_optimizers, made_by
from charlm.training.records import StepRecord
from charlm.training.reduction import reduction_for

__all__ = ["Stepper"]


class Stepper:
    """Takes the steps of a run, in any order.

    Args:
        model: on the backend's device.
        data: the training text.
        config: the settings of the run.
        backend: the device.
        precision: the type of matrix products.
        optimizer: makes the optimizer; None: the one that the config names.
        learning_rate: gives the learning rate of a step, counted from 0.
        world: the processes that share a step's micro-batches.

    Attributes:
        optimizers: each trained parameter is in exactly one of them.
        scaler: of the gradients, in fp16; else None.
        guard: prevents updates by steps that are not finite.
        chars_per_step: tokens predicted in one step.
        rates_are_shares: whether `made_by` has turned the learning rates of the caller's groups into shares.
        is_moving: whether the weights have changed in a step that is not counted yet; an interrupt may
            leave it so.
    """

    optimizers: list[Optimizer]
    scaler: GradScaler | None
    guard: Guard
    chars_per_step: int
    rates_are_shares: bool
    is_moving: bool

    def __init__(
        self,
        model: nn.Module,
        data: BlockDataset,
        config: TrainerConfig,
        *,
        backend: DeviceBackend,
        precision: Precision,
        optimizer: OptimizerFactory | None,
        learning_rate: Callable[[int], float],
        world: World,
    ) -> None:
        self._model = model
        self._data = data
        self._config = config
        self._backend = backend
        self._precision = precision
        self._learning_rate = learning_rate
        self.scaler = backend.scaler(precision)
        self.rates_are_shares = self.is_moving = False
        if optimizer is None:
            self.optimizers = build_optimizers(model, config, backend)
        else:
            made, self.rates_are_shares = made_by(optimizer, model)
            self.optimizers = [made]
        moved = {id(p) for made in self.optimizers for group in made.param_groups for p in group["params"]}
        self._parameters = [p for p in model.parameters() if id(p) in moved]
        self._all_parameters = list(model.parameters())
        self.chars_per_step = config.accumulate * config.batch_size * data.block_size
        self._generator = torch.Generator()  # re-seeded for each batch
        self._batches = batches_on(data, backend)
        self._order = None if config.replacement else order_of(data, config.batch_size, config.seed)
        self.guard = guard_for(
            config, backend, scaler=self.scaler, optimizers=self.optimizers, must_wait=world.size > 1
        )
        self._reduction = reduction_for(model, self._parameters, config, world)

    def take(self, step: int) -> StepRecord:
        """Take one step.

        Args:
            step: its number, from 0.

        Raises:
            NonFiniteError: the loss or a gradient is not finite, and the run must end; no weight has changed.
        """
        began = time.perf_counter()
        config = self._config
        loss = self._accumulate_gradients(step)
        learning_rate = self._learning_rate(step)
        active = [optimizer for optimizer in self.optimizers if _has_gradients(optimizer)]
        for optimizer in active:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * group.get("lr_scale", 1.0)
        with self._unscaled(active):
            norm = self._gradient_norm()
            verdict = self.guard.judge(step, loss, norm, active)
            if verdict == "end":
                self._refuse(step, loss, norm, learning_rate)
            if verdict == "move":
                if config.grad_clip is not None:
                    torch.nn.utils.clip_grads_with_norm_(self._parameters, config.grad_clip, norm)
                self.is_moving = True  # until the caller has counted the step
                for optimizer in active:
                    optimizer.step()
        self._drop_gradients()
        return StepRecord(
            step=step + 1,
            learning_rate=learning_rate,
            chars=self.chars_per_step,
            seconds=time.perf_counter() - began,
            loss_tensor=loss,
            grad_norm_tensor=norm,
        )

    def check(self) -> None:
        """Wait for the device, and raise if the run must end because of an earlier step.

        Raises:
            NonFiniteError: it names the step; no weight has changed since.
        """
        step = self.guard.ended_at()
        if step is None:
            return
        # The weights are still those before that step: compute it again to see its numbers.
        loss = self._accumulate_gradients(step)
        self._refuse(step, loss, self._gradient_norm(), self._learning_rate(step))

    def _drop_gradients(self) -> None:
        for parameter in self._all_parameters:  # model.zero_grad would collect them in each step
            parameter.grad = None

    def _gradient_norm(self) -> Tensor:
        return torch.nn.utils.get_total_norm(p.grad for p in self._parameters if p.grad is not None)

    @torch.inference_mode(False)
    @torch.enable_grad()  # a Ctrl-C inside torch may have left either mode changed
    def _accumulate_gradients(self, step: int) -> Tensor:
        """Compute the mean gradient of all micro-batches, and return their mean loss, on the device."""
        return self._reduction.run(partial(self._backward, step))

    def _backward(self, step: int, model: nn.Module, micro: int, count: int) -> Tensor:
        """Add the gradient of a micro-batch, and return its part of the mean loss."""
        config, backend = self._config, self._backend
        if self._order is None:
            self._generator.manual_seed(derive_seed(config.seed, "data", step, micro))
            x, y = self._batches.sample(config.batch_size, self._generator)  # (B, T)
        else:
            x, y = self._batches.at(self._order.starts(step * config.accumulate + micro))  # (B, T)
        with backend.seeded(derive_seed(config.seed, "dropout", step, micro)):
            with backend.autocast(self._precision):
                loss = _loss_of(model(x, y))
            if count > 1:
                loss = loss / count  # micro-batches have equally many characters
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        return loss.detach()

    @contextmanager
    def _unscaled(self, active: Sequence[Optimizer]) -> Iterator[None]:
        """Divide the gradients by the scaler's factor; after the block, the scaler updates the factor."""
        if self.scaler is None or not active:
            yield
            return
        for optimizer in active:
            self.scaler.unscale_(optimizer)
        try:
            yield
        finally:
            self.scaler.update()

    def _refuse(self, step: int, loss: Tensor, norm: Tensor, learning_rate: float) -> NoReturn:
        """Raise NonFiniteError, with the first parameter whose gradient is not finite."""
        bad = next(
            (
                name
                for name, p in self._model.named_parameters()
                if p.grad is not None and not bool(torch.isfinite(p.grad).all())
            ),
            None,
        )
        self._drop_gradients()
        raise NonFiniteError(
            f"step {step + 1}: the loss is {loss.item()} and the gradient's norm {norm.item()} at learning "
            f"rate {learning_rate:g}; batch seed {self._config.seed}, "
            + (f"first bad gradient: {bad}. " if bad else "all gradients are finite. ")
            + ("" if self.guard.limit == 1 else f"It is the {self.guard.limit}th in a row. ")
            + "The weights are those before this step. Lower the learning rate, or set grad_clip.",
            step=step + 1,
            parameter=bad,
            loss=loss.item(),
            grad_norm=norm.item(),
        )


def _loss_of(output: object) -> Tensor:
    """Return the loss from the output of a model."""
    match output:
        case (_, Tensor() as loss) if loss.dim() == 0:
            return loss
    raise InputError(
        "model must return (logits, loss) from forward(idx, targets), the loss a tensor with one number; "
        f"got {type(output).__name__}"
    )


def _has_gradients(optimizer: Optimizer) -> bool:
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])
