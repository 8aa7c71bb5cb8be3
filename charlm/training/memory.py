"""Checks that a training fits into the device's memory before anything is allocated.

A machine that runs out of memory kills the process without a message; a GPU fails in the first step. The
estimate adds weights, gradients and moments, the activations of a GPT, the copy of the best weights, and the
evaluation. For other models, only parameters and logits are counted.
"""

from __future__ import annotations

from torch import nn

from charlm.backends.base import DeviceBackend
from charlm.backends.host import processes_here
from charlm.backends.registry import get_backend
from charlm.errors import InputError, NotEnoughMemoryError, shown
from charlm.evaluation.evaluate import default_batch_size
from charlm.models.base import LanguageModel
from charlm.models.config import GPTConfig
from charlm.models.gpt import GPT
from charlm.models.memory import in_units
from charlm.models.ops import LONGEST_PLAIN
from charlm.plain import int_from
from charlm.training.config import TrainerConfig
from charlm.training.reduction import copies_kept

__all__ = ["activation_bytes", "check_memory", "training_bytes"]

_MARGIN = 1.25
"""A training is refused if its estimate is more than so many times the free memory: it may be too high."""


def check_memory(
    model: nn.Module | GPTConfig,
    config: TrainerConfig,
    *,
    block_size: int,
    backend: DeviceBackend,
    evaluates: bool,
    own_optimizer: bool = False,
) -> None:
    """Raise unless a training fits into the device's free memory, by the estimate of `training_bytes`.

    The estimate is not exact, so up to 1.25 times the free memory is accepted: refusing a training that fits
    would be worse. If the device does not report its memory, every training is accepted. The processes of
    torchrun on a machine share its memory evenly.

    Args:
        model: the model, or the settings of a GPT that is not built yet.
        config: the settings of the run.
        block_size: T of the data.
        backend: the device.
        evaluates: whether there is a validation text.
        own_optimizer: whether the optimizer is the caller's; its moments are unknown.

    Raises:
        NotEnoughMemoryError: it does not fit; the message says which batch size would.
    """
    memory = backend.memory()
    if memory is None:
        return
    sharing = processes_here() if backend.is_host else 1
    free = memory.free // sharing
    if isinstance(model, nn.Module):  # the estimate includes weights that are already on the device
        free += sum(p.nbytes for p in model.parameters() if p.device.type == backend.device.type)

    def estimate(batch_size: int) -> int:
        return training_bytes(
            model,
            config.replace(batch_size=batch_size),
            block_size=block_size,
            device=backend,
            evaluates=evaluates,
            own_optimizer=own_optimizer,
        )

    needed = estimate(config.batch_size)
    if needed <= _MARGIN * free:
        return
    fitting = 2 ** (config.batch_size.bit_length() - 1)  # the largest power of two that is no larger
    while fitting and estimate(fitting) > free / _MARGIN:  # the estimate may also be too low by this factor
        fitting //= 2
    if fitting:
        accumulate = -(-config.batch_size * config.accumulate // fitting)
        advice = f"batch_size={fitting} would fit; with accumulate={accumulate} a step sees as many blocks."
    else:
        advice = "Even batch_size=1 is too much: reduce the model (n_embd, n_layer) or block_size."
    each = f" to each of {sharing} processes" if sharing > 1 else ""
    raise NotEnoughMemoryError(
        f"training must fit into the memory that is available{each} on {backend.name}, {in_units(free)}, but "
        f"takes about {in_units(needed)} with batch_size={config.batch_size} and block_size={block_size}. "
        f"{advice}",
        needed_bytes=needed,
        available_bytes=free,
        batch_size=fitting or None,
    )


def training_bytes(
    model: nn.Module | GPTConfig,
    config: TrainerConfig | None = None,
    *,
    block_size: int | None = None,
    device: str | DeviceBackend = "auto",
    evaluates: bool = True,
    own_optimizer: bool = False,
) -> int:
    """Estimate the peak memory of a training, weights included.

    The micro-batches of `accumulate` follow one another, so one of them counts; their sum in a tree takes a
    few copies of the gradients.

    Args:
        model: the model, or the settings of a GPT that is not built yet.
        config: the settings of the run; batch_size, accumulate, precision, optimizer and restore_best are
            used. None: the defaults.
        block_size: T of the data; None: the model's.
        device: a name for `get_backend`, or a backend.
        evaluates: whether there is a validation text.
        own_optimizer: whether the optimizer is the caller's; its moments are unknown.

    Returns:
        Bytes. For a GPT on a CPU, the estimate was within 15 % of the measured 0.3 to 1.5 GB.

    Raises:
        BackendError: the device is absent.
        InputError: `block_size` is missing, and the model has none; or an argument is of the wrong kind.

    Example:
        >>> from charlm import GPTConfig, TrainerConfig
        >>> for batch_size in (8, 64):
        ...     config = TrainerConfig(batch_size=batch_size, precision="fp32")
        ...     print(f"{training_bytes(GPTConfig(vocab_size=65), config, device='cpu') / 1e9:.1f} GB")
        1.0 GB
        5.5 GB
    """
    config = TrainerConfig() if config is None else config
    if not isinstance(config, TrainerConfig):
        raise InputError(f"config must be a TrainerConfig, got {shown(config)}")
    backend = get_backend(device)
    precision = backend.precision() if config.precision == "auto" else config.precision
    on_cpu = backend.is_host
    own_block_size = model.block_size if isinstance(model, GPTConfig | LanguageModel) else None
    if block_size is None and own_block_size is None:
        raise InputError(f"block_size must be given: {type(model).__name__} has none of its own")
    T = int_from(1, own_block_size if block_size is None else block_size, "block_size")
    B = config.batch_size
    gpt = model.config if isinstance(model, GPT) else model if isinstance(model, GPTConfig) else None
    if isinstance(model, nn.Module):
        parameters = sum(p.numel() for p in model.parameters())
        moved = sum(p.numel() for p in model.parameters() if p.requires_grad)
        V = model.vocab_size if isinstance(model, LanguageModel) else 0
    else:
        parameters = moved = model.num_parameters()
        V = model.vocab_size
    step = 12 * B * T * V  # logits, their softmax and their gradient
    pass_over_text = 3 * V  # floats per token
    if gpt is not None:
        gpt = gpt.replace(block_size=min(T, gpt.block_size))
        # A CPU uses fused attention for long blocks only, and not with dropout.
        fused = not on_cpu or T > LONGEST_PLAIN
        step = activation_bytes(
            gpt, B, fused_attention=fused and not (on_cpu and gpt.dropout), half_precision=precision != "fp32"
        )
        # One layer at a time: there is no backward pass.
        pass_over_text += 12 * gpt.n_embd + 2 * gpt.effective_mlp_width + (0 if fused else 3 * gpt.n_head * T)
    # Gradients and moments. AdamW has two moments; Muon has one, and some copies of the matrices in a step.
    state, moving = {"adamw": (12, 0), "muon": (8, 16)}[config.optimizer]
    if own_optimizer:
        state, moving = 4, 0
    best = 4 * parameters if evaluates and config.restore_best else 0
    evaluation = 4 * default_batch_size(T, V) * T * pass_over_text if evaluates else 0
    kept = 4 * moved * copies_kept(config.accumulate)
    return 4 * parameters + state * moved + kept + best + max(step + 16 * B * T, moving * moved, evaluation)


def activation_bytes(
    config: GPTConfig, batch_size: int, *, fused_attention: bool, half_precision: bool
) -> int:
    """Estimate the memory of the activations of a step of a GPT, with those of its backward pass.

    The factors are fitted to the resident memory of trainings on a CPU, of all presets, fp32 and bf16, which
    took 0.3 to 1.5 GB in all. The estimated total is between 0.85 and 1.15 of the measured one.

    Args:
        config: of the model; its block_size is the length of the blocks.
        batch_size: B, blocks in one forward pass.
        fused_attention: whether attention does not store its weights.
        half_precision: whether matrix products run in bf16 or fp16; weights stay float32.
    """
    B, T, C, V = batch_size, config.block_size, config.n_embd, config.vocab_size
    F, H = config.effective_mlp_width, config.n_head
    hidden = 4 * F if config.activation == "swiglu" else 2 * F  # each product of the feed-forward network
    norms, rotary = 2 * C, config.position == "rotary"
    if fused_attention or config.effective_attention_dropout:
        # torch computes norms and rotations in several operations.
        norms += 2 * C * (config.norm == "rmsnorm")
        turned = 4 * C * config.qk_norm + 2 * C * rotary
        # With dropout there are scores, softmax and mask.
        weights = 0.0 if fused_attention else (1.1 if half_precision else 3.0) * H * T
    else:  # with derivatives written out
        turned = 4 * C * (config.qk_norm or rotary)
        weights = (0.7 if half_precision else 1.3) * H * T
    branches = norms + 3 * C + turned + C + hidden
    stream = 2 * C + 2 * C * bool(config.dropout)
    share = (0.95 if config.dropout else 0.75) if half_precision else 1.2  # a dropped-out stream is float32
    products = share * (config.n_layer * (branches + stream) + 3 * C)
    return 4 * int(B * T * (products + 1.1 * config.n_layer * weights + 3 * V))
