"""Milliseconds of a training step: charlm in float32 and bfloat16, the lecture's loop, and nanoGPT.

A step is all that a loop does for one: batch, forward, backward, update. All loops run in one process, in
turns of a few steps, so that a machine that changes its speed changes it for all. By default the model is
nanoGPT's own architecture at the batch of its README's CPU recipe, with AdamW: 4 layers of 4 heads, width
128, no biases, exact GELU, tied, block 64, batch 12. Another --preset or --set changes the sizes for
everyone, and architecture and optimizer for charlm.

    cd tests
    python -m benchmarks.step_time --nanogpt ../../nanoGPT
    python -m benchmarks.step_time --preset cpu-1min --json cpu-1min.json
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from benchmarks import lecture, nanogpt
from benchmarks.common import (
    TINY,
    Json,
    add_settings,
    in_turns,
    machine,
    new_parser,
    report,
    settings_of,
    spread,
    table,
)

from charlm import (
    GPT,
    BlockDataset,
    CharTokenizer,
    GPTConfig,
    Trainer,
    TrainerConfig,
    get_backend,
    load_corpus,
)

__all__ = ["main"]

Loop = Callable[[int], object]
"""Trains for so many steps."""

NANOGPT_MODEL = (
    *("block_size=64", "batch_size=12", "n_layer=4", "n_head=4", "n_embd=128", "dropout=0.0"),
    *("bias=False", "qkv_bias=False", "activation=gelu"),
    *("learning_rate=1e-3", "betas=(0.9,0.99)", "min_lr_ratio=0.1"),
)
"""What nanoGPT's config/train_shakespeare_char.py and its CPU options change in the preset gpt2."""


def main(argv: Sequence[str] | None = None) -> None:
    """Time all loops in turns and report."""
    args = _parser().parse_args(argv)
    if args.preset is None:
        args.preset, args.changes = "gpt2", [*NANOGPT_MODEL, *args.changes]
    if args.quick:
        args.changes = [*args.changes, *TINY]
        args.rounds, args.steps = 2, 2
    measured_on = machine()
    settings = settings_of(args.preset, args.changes)
    text = load_corpus(args.data)
    tokenizer = CharTokenizer.from_text(text)
    config = GPTConfig.from_dict({**settings.model, "vocab_size": tokenizer.vocab_size})
    total = (args.rounds + 1) * args.steps  # one untimed turn
    training = TrainerConfig.from_dict({**settings.training, "max_steps": total, "max_seconds": None})
    backend = get_backend(args.device)
    train, _ = BlockDataset.from_text(text, tokenizer, config.block_size).split(0.9)
    loops: dict[str, Loop] = {}
    with contextlib.ExitStack() as stack:
        for precision in args.precisions:
            loops[f"charlm {precision}"] = _charlm(
                config, training.replace(precision=precision), train, args.device, stack
            )
        loops["lecture"] = lecture.training_steps(
            config, train.ids.long(), training.batch_size, backend.device
        )
        if args.nanogpt is not None:
            copy = stack.enter_context(nanogpt.prepared(args.nanogpt, text))
            loops["nanogpt"] = _nanogpt(copy, config, training.batch_size, backend.device)

        def turn_of(loop: Loop) -> Callable[[], None]:
            def turn() -> None:
                loop(args.steps)
                backend.synchronize()

            return turn

        seconds = in_turns({name: turn_of(loop) for name, loop in loops.items()}, args.rounds)
    results: Json = {
        name: {"step_milliseconds": spread([1_000 * s / args.steps for s in times])}
        for name, times in seconds.items()
    }
    base = "nanogpt" if "nanogpt" in results else "lecture"
    for name, times in seconds.items():
        ratios = [theirs / ours for theirs, ours in zip(seconds[base], times, strict=True)]
        results[name][f"times_faster_than_{base}"] = spread(ratios)
    report(
        "step_time",
        args,
        measured_on=measured_on,
        settings={"model": config.to_dict(), "training": training.to_dict()},
        results=results,
        text=_text(results, base),
    )


def _parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    add_settings(parser)
    parser.set_defaults(preset=None, device="cpu")
    parser.add_argument("--nanogpt", type=Path, metavar="DIR", help="a checkout of nanoGPT to time beside")
    parser.add_argument(
        "--precisions", nargs="+", default=["fp32", "bf16"], help="charlm's (default: fp32 bf16)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=20, help="of a turn (default: %(default)s)")
    return parser


def _charlm(
    config: GPTConfig, training: TrainerConfig, data: BlockDataset, device: str, stack: contextlib.ExitStack
) -> Loop:
    torch.manual_seed(1337)
    steps = Trainer(GPT(config), data, training, device=device).steps()
    stack.enter_context(contextlib.closing(steps))
    return lambda count: list(itertools.islice(steps, count))


def _nanogpt(copy: Path, config: GPTConfig, batch_size: int, device: torch.device) -> Loop:
    """Return nanoGPT's model and optimizer in a loop that does what its train.py does in each step."""
    model = nanogpt.build_model(nanogpt.load_model_code(copy), config).to(device)
    with contextlib.redirect_stdout(sys.stderr):  # it prints what it decays
        optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), device.type)
    data = copy / "data" / "shakespeare_char" / "train.bin"

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        x, y = nanogpt.random_blocks(data, config.block_size, batch_size)
        return x.to(device), y.to(device)

    x, y = batch()

    def steps(count: int) -> None:
        nonlocal x, y
        for _ in range(count):
            for group in optimizer.param_groups:
                group["lr"] = 1e-3
            _, loss = model(x, y)
            x, y = batch()  # the next one, while a GPU would be busy
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss.item()  # it logs every step, as its README's command says

    return steps


def _text(results: Json, base: str) -> str:
    rows = []
    for name, values in results.items():
        ms, faster = values["step_milliseconds"], values[f"times_faster_than_{base}"]
        rows.append(
            [
                name,
                f"{ms['median']:.2f}",
                f"{ms['least']:.2f} to {ms['most']:.2f}",
                f"{faster['median']:.2f}",
                f"{faster['least']:.2f} to {faster['most']:.2f}",
            ]
        )
    return table(["", "ms a step", "range", f"times faster than {base}", "range"], rows)


if __name__ == "__main__":
    main()
