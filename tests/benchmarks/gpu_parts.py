"""The parts of `benchmarks.gpu` that are no whole trainings: `python -m benchmarks.gpu_parts SPEC`.

`StaticDecoder` measures what could be won on a GPU. A step over buffers of a fixed size launches the same
kernels with the same arguments each time, so it can be captured once and replayed: nothing is decided in
Python, and nothing waits for the device, until the whole text is there.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, cast

from benchmarks.common import Json, in_turns, spread

if TYPE_CHECKING:
    from charlm import GPT, Trainer

__all__ = ["Spec", "StaticDecoder"]

_ROUNDS = 3
_STEPS = 20
_MOST_APART = 1e-3


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What is to be measured."""

    part: str
    """A name in `PARTS`."""
    device: str
    """A name for `get_backend`."""
    data: str
    """Path of the text, or its name."""
    quick: bool
    """As small as it gets."""
    model: Json
    """Fields of `GPTConfig` but vocab_size."""
    training: Json
    """Fields of `TrainerConfig`."""


class StaticDecoder:
    """Writes texts with a `GPT`, each character by the same calls on the same memory.

    Args:
        model: in evaluation mode, where the texts are to be written.
        rows: B, how many texts at once.

    Attributes:
        ids: (B, S + 1), the texts; the first column is the prompt.
        logits: (B, V) of the last step.
    """

    def __init__(self, model: GPT, rows: int) -> None:
        import torch

        from charlm.models import ops

        self._model, config, device = model, model.config, model.device
        S = config.block_size
        shape = (len(model.transformer.h), 2, rows, config.n_head, S, config.head_size)
        self._cache = torch.zeros(shape, device=device)
        self._place = torch.zeros(1, dtype=torch.int64, device=device)
        self._places = torch.arange(S, device=device)
        self._tables = ops.rotary_tables(0, S, config.head_size, device)
        self.ids = torch.zeros(rows, S + 1, dtype=torch.int64, device=device)
        self.logits = torch.zeros(rows, config.vocab_size, device=device)

    def step(self) -> None:
        """Read the character at the place, and write the next one."""
        import torch
        import torch.nn.functional as F

        from charlm.models import ops
        from charlm.models.layers import Block

        transformer, config, place = self._model.transformer, self._model.config, self._place
        B, H = len(self.ids), config.n_head
        x = transformer.wte(self.ids.index_select(1, place))  # (B, 1, C)
        if transformer.conv is not None:  # of what stands before the text, nothing is added
            for back, weights in enumerate(transformer.conv.weight, start=1):
                before = transformer.wte(self.ids.index_select(1, (place - back).clamp(min=0)))  # (B, 1, C)
                x = x + weights * before * (place >= back)
        if transformer.wpe is not None:
            x = x + transformer.wpe(place)
        cos, sin = (part.index_select(0, place) for part in self._tables)  # (1, D / 2)
        rotary = (cos, sin) if transformer.wpe is None else None
        seen = (self._places <= place)[None]  # (1, S)
        for block, (keys, values) in zip(cast("list[Block]", transformer.h), self._cache, strict=True):
            q, k, v = ops.heads(block.attn.c_attn(block.ln_1(x)), H, rotary, qk_norm=config.qk_norm)
            keys.index_copy_(2, place, k)  # (B, H, S, D)
            values.index_copy_(2, place, v)
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen)  # (B, H, 1, D)
            x = x + block.attn.c_proj(y.transpose(1, 2).reshape(B, 1, -1))
            x = x + block.mlp(block.ln_2(x))
        self.logits.copy_(self._model.lm_head(transformer.ln_f(x))[:, 0])
        waits = torch.empty_like(self.logits).exponential_()  # the first to come is a draw from the softmax
        chosen = (self.logits.softmax(dim=-1) / waits).argmax(dim=-1, keepdim=True)
        self.ids.index_copy_(1, place + 1, chosen)
        self._place.add_(1)

    def write(self, count: int, step: Callable[[], object] | None = None) -> None:
        """Write so many characters after the first, by `step` or a capture of it."""
        self._place.zero_()
        for _ in range(count):
            (step or self.step)()

    def captured(self) -> Callable[[], None]:
        """Return a step that replays the kernels of one as a CUDA graph."""
        import torch

        warm = torch.cuda.Stream()
        warm.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm):
            self.write(3)
        torch.cuda.current_stream().wait_stream(warm)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        return graph.replay

    def check(self, count: int) -> float:
        """Return how far the logits of the last step lie from the model's own for the same text."""
        expected = self._model(self.ids[:, :count])[0][:, -1]
        apart = float((expected - self.logits).abs().max())
        if not apart <= _MOST_APART:
            raise SystemExit(f"error: the static step's logits are {apart:g} away from the model's")
        return apart


def _backend(spec: Spec) -> Json:
    import torch

    from charlm import get_backend
    from charlm.testing import check_backend

    backend = get_backend(spec.device)
    check_backend(backend)
    memory = backend.memory()
    found: Json = {"name": backend.name, "precision": backend.precision(), "cuda": torch.version.cuda}
    if backend.device.type == "cuda":
        found["capability"] = torch.cuda.get_device_capability(backend.device)
    return {**found, "memory": None if memory is None else asdict(memory)}


def _memory(spec: Spec) -> Json:
    import torch

    from charlm.training import training_bytes

    trainer = _trainer(spec)
    before = trainer.backend.memory()
    if trainer.backend.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(trainer.backend.device)
    list(itertools.islice(trainer.steps(), 3))  # the first makes the optimizers' moments
    trainer.backend.synchronize()
    after = trainer.backend.memory()
    if before is None or after is None:
        raise SystemExit(f"error: {trainer.backend!r} does not tell its memory")
    estimate = training_bytes(trainer.model, trainer.config, device=trainer.backend, evaluates=False)
    return {
        "allocated_before_bytes": before.allocated,
        "allocated_bytes": after.allocated,
        "peak_bytes": after.peak,
        "estimate_bytes": estimate,
        "batch_size": trainer.config.batch_size,
        "precision": trainer.precision,
    }


def _compile(spec: Spec) -> Json:
    found: Json = {}
    for way in ("eager", "compiled"):
        trainer = _trainer(spec, compile=way == "compiled")
        steps = trainer.steps()

        def turn(count: int, trainer: Trainer = trainer, steps: Generator[object] = steps) -> float:
            began = time.perf_counter()
            list(itertools.islice(steps, count))
            trainer.backend.synchronize()
            return time.perf_counter() - began

        first = turn(1)
        turn(2)
        times = [1_000 * turn(_STEPS) / _STEPS for _ in range(_ROUNDS)]
        found[way] = {"first_step_seconds": first, "step_milliseconds": spread(times)}
        steps.close()
    return found


def _generation(spec: Spec) -> Json:
    import torch
    from benchmarks.peers import QUICK_SIZE, SIZES, build

    from charlm import get_backend

    backend = get_backend(spec.device)
    speeds: Json = {}
    apart: Json = {}
    for name, size in SIZES.items():
        model = cast("GPT", backend.prepare(build(QUICK_SIZE if spec.quick else size)))
        count = model.block_size - 1
        speeds[name], apart[name] = {}, {}
        for rows in (1, 4 if spec.quick else 64):
            with torch.no_grad():
                found = _ways(model, rows, count, backend.synchronize)
            speeds[name][rows], apart[name][rows] = found
    return {"chars_per_second": speeds, "logits_apart": apart}


def _ways(model: GPT, rows: int, count: int, synchronize: Callable[[], None]) -> tuple[Json, float]:
    """Return characters a second of each way to write `count` characters after one, for so many rows."""
    import torch

    prompt = torch.zeros(rows, 1, dtype=torch.int64, device=model.device)
    decoder = StaticDecoder(model, rows)
    steps: dict[str, Callable[[], None]] = {"static step": decoder.step}
    if model.device.type == "cuda":
        steps["CUDA graph"] = decoder.captured()

    def writing(step: Callable[[], None]) -> Callable[[], None]:
        def turn() -> None:
            decoder.write(count, step)
            synchronize()

        return turn

    turns: dict[str, Callable[[], object]] = {"generate": lambda: model.generate(prompt, count, seed=1)}
    turns |= {name: writing(step) for name, step in steps.items()}
    seconds = in_turns(turns, _ROUNDS)
    found: Json = {name: spread([rows * count / s for s in times]) for name, times in seconds.items()}
    if "CUDA graph" not in found:
        found["CUDA graph"] = {"skipped": f"{model.device.type} has no CUDA graphs"}
    return found, decoder.check(count)


def _trainer(spec: Spec, *, compile: bool = False) -> Trainer:
    import torch

    from charlm import GPT, BlockDataset, CharTokenizer, GPTConfig, Trainer, TrainerConfig, load_corpus

    text = load_corpus(spec.data)
    tokenizer = CharTokenizer.from_text(text)
    config = GPTConfig.from_dict({**spec.model, "vocab_size": tokenizer.vocab_size})
    training = TrainerConfig.from_dict({**spec.training, "max_steps": 10_000, "compile": compile})
    torch.manual_seed(training.seed)
    data, _ = BlockDataset.from_text(text, tokenizer, config.block_size).split(0.9)
    return Trainer(GPT(config), data, training, tokenizer=tokenizer, device=spec.device)


PARTS = {"backend": _backend, "memory": _memory, "compile": _compile, "generation": _generation}

if __name__ == "__main__":
    given = Spec(**json.loads(sys.argv[1]))
    print(json.dumps(PARTS[given.part](given), allow_nan=False))
