"""The training loop: what it learns, when it stops, what it refuses, and what it leaves alone."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from harness.tiny_models import tiny_config, tiny_gpt
from harness.tiny_training import (
    TOKENIZER,
    Numbers,
    PlainModule,
    global_generators,
    quick_config,
    same_tensors,
    tensors_of,
    tiny_split,
)
from torch import Tensor, nn
from typing_extensions import override

from charlm import BigramLM, BlockDataset, CharTokenizer, Trainer, load
from charlm.backends.base import DeviceBackend, Precision
from charlm.errors import (
    BackendError,
    CheckpointError,
    DataError,
    InputError,
    NonFiniteError,
    TrainingInterrupted,
)
from charlm.evaluation import evaluate
from charlm.models.config import PresetName
from charlm.models.gpt import GPT
from charlm.randomness import derive_seed
from charlm.runs.log import read_metrics
from charlm.training import RECIPES, Callback, StepRecord, TrainerConfig, learning_rate_at

V = TOKENIZER.vocab_size


def bigram(seed: int = 0) -> BigramLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BigramLM(V)


def gpt(**changes: object) -> GPT:
    small: dict[str, object] = {"vocab_size": V, "n_embd": 16, "n_layer": 1, "block_size": 8}
    return tiny_gpt(tiny_config("gpt2", **{**small, **changes}))


def trainer_of(model: nn.Module | None = None, **config: object) -> Trainer:
    train, val = tiny_split()
    return Trainer(model or bigram(), train, quick_config(**config), val_data=val, device="cpu")


def test_fit_is_a_loop_over_steps() -> None:
    by_fit, by_hand = trainer_of(), trainer_of()
    result = by_fit.fit()
    records = list(by_hand.steps())
    assert [record.step for record in records] == list(range(1, 13))
    assert same_tensors(tensors_of(by_fit), tensors_of(by_hand))
    assert (result.steps, result.reason) == (12, "max_steps")
    assert result.chars_seen == 12 * 4 * 8 == sum(record.chars for record in records)
    assert [e.step for e in result.history] == [4, 8, 12]
    assert by_hand.result().final == result.final
    assert all(record.chars_per_second > 0 for record in records)
    assert result.checkpoint is None


def test_the_first_step_is_the_one_that_can_be_done_by_hand() -> None:
    model, other = gpt(dropout=0.2), gpt(dropout=0.2)
    train, _ = tiny_split()
    config = quick_config(max_steps=3, warmup_steps=1, accumulate=2, grad_clip=0.1, schedule="linear")
    optimizer = torch.optim.SGD(other.parameters(), lr=0.0)
    record = next(Trainer(model, train, config, device="cpu", optimizer=sgd).steps())
    loss = 0.0
    for micro in range(2):
        generator = torch.Generator().manual_seed(derive_seed(config.seed, "data", 0, micro))
        x, y = train.sample_batch(4, generator=generator)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(config.seed, "dropout", 0, micro))
            part = other(x, y)[1] / 2
            part.backward()
        loss += part.item()
    norm = torch.nn.utils.clip_grad_norm_(other.parameters(), 0.1)
    optimizer.param_groups[0]["lr"] = learning_rate_at(0, config)
    optimizer.step()
    assert record.loss == pytest.approx(loss, rel=1e-6)
    assert record.grad_norm == pytest.approx(norm.item(), rel=1e-6)
    assert record.learning_rate == 0.05
    for name, tensor in other.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-6, atol=1e-8)


def sgd(named: Iterator[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for _, p in named], lr=123.0)


def test_the_loss_falls() -> None:
    trainer = trainer_of(gpt(), max_steps=60, batch_size=16, learning_rate=0.01)
    before = trainer.evaluate()
    after = trainer.fit().final
    assert after is not None
    assert after.loss_nats < before.loss_nats - 0.5
    assert after.accuracy > before.accuracy


def test_a_bigram_model_comes_near_its_closed_form(shakespeare: str) -> None:
    text = shakespeare[:100_000]
    tokenizer = CharTokenizer.from_text(text)
    data = BlockDataset.from_text(text, tokenizer, 32)
    torch.manual_seed(1337)
    model = BigramLM(tokenizer.vocab_size)
    config = quick_config(max_steps=1_000, batch_size=64, learning_rate=0.1, weight_decay=0.0)
    Trainer(model, data, config, device="cpu").fit()
    best = evaluate(BigramLM(tokenizer.vocab_size).fit(data, smoothing=0), data).loss_nats
    assert best < evaluate(model, data).loss_nats < best + 0.03


def test_accumulation_is_the_gradient_of_the_whole_batch() -> None:
    """4 micro-batches of 8 move the weights as one batch of the same 32 blocks does."""
    train, _ = tiny_split()
    config = quick_config(max_steps=1, warmup_steps=0, batch_size=8, accumulate=4, grad_clip=None)
    model = gpt()
    whole = gpt()
    record = next(Trainer(model, train, config, device="cpu", optimizer=sgd).steps())
    batches = [
        train.sample_batch(
            8, generator=torch.Generator().manual_seed(derive_seed(config.seed, "data", 0, micro))
        )
        for micro in range(4)
    ]
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))  # (32, T)
    _, loss = whole(x, y)
    loss.backward()
    assert record.loss == pytest.approx(loss.item(), rel=1e-6)
    for (name, moved), start in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert start.grad is not None
        expected = start - 0.05 * start.grad
        torch.testing.assert_close(moved, expected, rtol=1e-5, atol=1e-6, msg=name)


def test_micro_batches_are_different_blocks_and_a_step_is_repeatable() -> None:
    class Watcher(PlainModule):
        seen: list[Tensor]

        @override
        def forward(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            self.seen = [*getattr(self, "seen", []), idx]
            return super().forward(idx, targets)

    models = [Watcher(V), Watcher(V)]
    for model in models:
        Trainer(model, tiny_split()[0], quick_config(max_steps=3, accumulate=2), device="cpu").fit()
    assert len({str(x.tolist()) for x in models[0].seen}) == 6
    assert all(torch.equal(*pair) for pair in zip(models[0].seen, models[1].seen, strict=True))


def test_a_large_gradient_is_clipped_and_its_norm_is_told_as_it_was() -> None:
    train, _ = tiny_split()
    start = bigram()
    moved = bigram()
    config = quick_config(max_steps=1, warmup_steps=0, grad_clip=1e-3, learning_rate=1.0)
    record = next(Trainer(moved, train, config, device="cpu", optimizer=sgd).steps())
    assert record.grad_norm > 0.05
    change = torch.cat(
        [(a - b).flatten() for a, b in zip(start.parameters(), moved.parameters(), strict=True)]
    )
    assert change.norm().item() == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize(
    ("schedule", "precision", "optimizer"),
    [
        ("wsd", "fp32", "adamw"),
        ("cosine", "bf16", "adamw"),
        ("linear", "fp32", "muon"),
        ("constant", "bf16", "muon"),
    ],
)
def test_every_schedule_precision_and_optimizer_trains(schedule: str, precision: str, optimizer: str) -> None:
    numbers = Numbers()
    config = quick_config(schedule=schedule, precision=precision, optimizer=optimizer, learning_rate=0.01)
    model = gpt()
    Trainer(model, tiny_split()[0], config, device="cpu", callbacks=[numbers]).fit()
    assert [rate for _, _, rate, _ in numbers.steps] == [learning_rate_at(s, config) for s in range(12)]
    assert all(math.isfinite(loss) and norm > 0 for _, loss, _, norm in numbers.steps)
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_a_precision_that_the_device_lacks_is_refused() -> None:
    with pytest.raises(BackendError, match="cpu cannot train in fp16; it offers"):
        trainer_of(precision="fp16")


class HalfBackend(DeviceBackend):
    """The CPU with fp16, as a GPU has it: autocast and a gradient scaler."""

    @override
    def supported_precisions(self) -> tuple[Precision, ...]:
        return ("fp16", "fp32")


def test_fp16_scales_its_gradients_and_skips_a_step_that_overflows(tmp_path: Path) -> None:
    train, _ = tiny_split()
    config = quick_config(precision="fp16", learning_rate=0.01, max_steps=30, grad_clip=1.0)
    model = gpt()
    trainer = Trainer(model, train, config, device=HalfBackend("cpu"), out_dir=tmp_path)
    assert trainer.scaler is not None
    trainer.scaler._init_scale = 2.0**40  # overflows fp16 at first, and is halved until it does not
    before = [p.clone() for p in model.parameters()]
    steps = trainer.steps()
    first = next(steps)
    assert math.isfinite(first.loss)
    assert not math.isfinite(first.grad_norm)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    *_, last = steps
    assert math.isfinite(last.grad_norm)
    assert last.loss < first.loss
    again = Trainer.resume(tmp_path, train, device=HalfBackend("cpu"))
    assert again.scaler is not None
    assert again.scaler.state_dict() == trainer.scaler.state_dict()


def test_per_group_learning_rates_scale_the_schedule() -> None:
    def factory(named: Iterator[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        parameters = dict(named)
        small = parameters.pop("output.bias")
        groups: list[dict[str, Any]] = [
            {"params": list(parameters.values())},
            {"params": [small], "lr_scale": 0.5},
        ]
        return torch.optim.SGD(groups, lr=1.0)

    trainer = Trainer(PlainModule(V), tiny_split()[0], quick_config(), device="cpu", optimizer=factory)
    for record in trainer.steps():
        rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
        assert rates == [record.learning_rate, 0.5 * record.learning_rate]


def test_parameters_that_no_optimizer_moves_do_not_disturb() -> None:
    def output_only(named: Iterator[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for name, p in named if name.startswith("output")], lr=1.0)

    torch.manual_seed(0)
    model = PlainModule(V)
    frozen = model.embedding.weight.clone()
    numbers = Numbers()
    Trainer(
        model, tiny_split()[0], quick_config(), device="cpu", optimizer=output_only, callbacks=[numbers]
    ).fit()
    assert torch.equal(model.embedding.weight, frozen)
    assert all(p.grad is None for p in model.parameters())
    assert max(norm for *_, norm in numbers.steps) < 2


def test_gradients_that_the_caller_left_are_not_trained_on() -> None:
    clean, dirty = bigram(), bigram()
    train, _ = tiny_split()
    dirty(*train.sample_batch(4))[1].mul(1e3).backward()
    for model in (clean, dirty):
        Trainer(model, train, quick_config(), device="cpu").fit()
    assert torch.equal(clean.token_embedding_table.weight, dirty.token_embedding_table.weight)


def test_a_plain_module_trains_but_its_checkpoint_is_no_model(tmp_path: Path) -> None:
    train, val = tiny_split()
    model = PlainModule(V)
    result = Trainer(
        model, train, quick_config(), val_data=val, device="cpu", out_dir=tmp_path, tokenizer=TOKENIZER
    ).fit()
    assert result.checkpoint is not None
    names = {path.name for path in result.checkpoint.iterdir()}
    assert names == {
        "tokenizer.json",
        "model.safetensors",
        "train.safetensors",
        "state.json",
        "manifest.json",
    }
    for path in (tmp_path, result.checkpoint):
        with pytest.raises(CheckpointError, match=r"training-only checkpoint.*Trainer\.resume"):
            load(path)
    with pytest.raises(CheckpointError, match="does not say how to build its model; pass model="):
        Trainer.resume(tmp_path, train, val_data=val)
    other = PlainModule(V)
    resumed = Trainer.resume(tmp_path, train, val_data=val, model=other, max_steps=14, device="cpu")
    assert resumed.model is other
    assert resumed.tokenizer == TOKENIZER
    assert resumed.fit().steps == 14


@pytest.mark.parametrize("training", [True, False])
def test_leaving_the_loop_early_leaves_nothing_behind(tmp_path: Path, training: bool) -> None:
    train, val = tiny_split()
    model = gpt(dropout=0.1).train(training)
    model.transformer.ln_f.eval()
    trainer = Trainer(model, train, quick_config(), val_data=val, device="cpu", out_dir=tmp_path)
    before = global_generators()
    for record in trainer.steps():
        assert torch.is_grad_enabled()
        if record.step == 5:
            break
    assert global_generators() == before
    assert model.training is training
    assert not model.transformer.ln_f.training
    resumed = Trainer.resume(tmp_path, train, val_data=val, device="cpu")
    assert resumed.step == 4
    assert next(resumed.steps()).step == 5  # the directory is not locked
    assert next(trainer.steps()).step == 6


def test_a_callback_that_fails_at_the_start_leaves_nothing_locked(tmp_path: Path) -> None:
    class Broken(Callback):
        @override
        def on_train_start(self, trainer: Trainer) -> None:
            raise RuntimeError("broken")

    train, _ = tiny_split()
    model = gpt().eval()
    trainer = Trainer(model, train, quick_config(), device="cpu", out_dir=tmp_path, callbacks=[Broken()])
    with pytest.raises(RuntimeError, match="broken"):
        trainer.fit()
    assert not model.training
    trainer.callbacks = ()
    assert trainer.fit().steps == 12


def test_training_is_quiet_and_leaves_the_global_generators_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    train, val = tiny_split()
    before = global_generators()
    config = quick_config(sample_interval=3, sample_chars=5)
    with caplog.at_level(logging.DEBUG, "charlm"):
        Trainer(
            gpt(dropout=0.2), train, config, val_data=val, device="cpu", out_dir=tmp_path, tokenizer=TOKENIZER
        ).fit()
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []
    assert global_generators() == before


def test_the_log_has_every_step_evaluation_and_sample(tmp_path: Path) -> None:
    train, val = tiny_split()
    config = quick_config(sample_interval=6, sample_chars=5, log_interval=5)
    trainer = Trainer(gpt(), train, config, val_data=val, device="cpu", out_dir=tmp_path, tokenizer=TOKENIZER)
    numbers = {record.step: record for record in trainer.steps()}
    records = list(read_metrics(tmp_path / "metrics.jsonl"))
    assert [(r["kind"], r["step"]) for r in records] == [
        ("eval", 4),
        ("step", 5),
        ("sample", 6),
        ("eval", 8),
        ("step", 10),
        ("step", 12),
        ("sample", 12),
        ("eval", 12),
    ]
    for record in records:
        if record["kind"] == "step":
            step = numbers[int(str(record["step"]))]
            assert (record["loss"], record["learning_rate"]) == (step.loss, step.learning_rate)
            assert record["grad_norm"] == step.grad_norm
        if record["kind"] == "sample":
            assert len(str(record["text"])) == 5
    assert trainer.best is not None
    assert [r["loss_nats"] for r in records if r["kind"] == "eval"] == [
        e.result.loss_nats for e in trainer.history
    ]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"train_data": [1, 2]}, InputError, "train_data must be a BlockDataset, got list"),
        ({"val_data": "text"}, InputError, "val_data must be a BlockDataset, got str"),
        ({"config": {"max_steps": 3}}, InputError, "config must be a TrainerConfig, got dict"),
        ({"config": {}}, InputError, "config must be a TrainerConfig, got dict"),
        ({"callbacks": [Callback]}, InputError, "callbacks must be Callback objects"),
        ({"optimizer": list}, InputError, "must make a torch.optim.Optimizer, got list"),
        ({"tokenizer": CharTokenizer("ab")}, InputError, "the tokenizer has 2 ids, but"),
        ({"model": BigramLM(3)}, DataError, "train_data holds the id 7, but the model's vocab_size is 3"),
        ({"model": gpt(block_size=4)}, DataError, "train_data has blocks of 8, .*the model sees only 4"),
        ({"config": quick_config(sample_interval=2)}, InputError, "sample_interval needs a LanguageModel"),
        ({"device": "abacus"}, BackendError, "unknown device 'abacus'"),
    ],
)
def test_arguments_are_checked_at_once(
    change: dict[str, object], error: type[Exception], message: str
) -> None:
    train, val = tiny_split()
    arguments: dict[str, object] = {"model": bigram(), "train_data": train, "val_data": val, "device": "cpu"}
    with pytest.raises(error, match=message):
        Trainer(**{**arguments, **change})  # type: ignore[arg-type]  # wrong types are the point


def test_samples_of_a_plain_module_are_refused() -> None:
    with pytest.raises(InputError, match="sample_interval needs a LanguageModel and its tokenizer"):
        Trainer(
            PlainModule(V),
            tiny_split()[0],
            quick_config(sample_interval=2),
            tokenizer=TOKENIZER,
            device="cpu",
        )


def test_the_defaults_train_and_evaluating_needs_data() -> None:
    trainer = Trainer(bigram(), tiny_split()[0], device="cpu")
    assert trainer.config == TrainerConfig()
    with pytest.raises(DataError, match="there is nothing to evaluate"):
        trainer.evaluate()
    with pytest.raises(InputError, match="out_dir must be given to save"):
        trainer.save()
    assert trainer.evaluate(tiny_split()[1]).n_chars > 100


@pytest.mark.parametrize("preset", get_args(PresetName))
def test_every_recipe_trains_its_preset(preset: PresetName) -> None:
    model = GPT(tiny_config(preset, vocab_size=V))
    config = RECIPES[preset].replace(max_steps=4, warmup_steps=1, batch_size=2)
    numbers = Numbers()
    Trainer(model, tiny_split()[0], config, device="cpu", callbacks=[numbers]).fit()
    assert all(math.isfinite(loss) for _, loss, _, _ in numbers.steps)


@contextlib.contextmanager
def poisoned(model: nn.Module, name: str, at_step: int, trainer: Trainer) -> Iterator[None]:
    """Make one gradient NaN in one step."""
    parameter = dict(model.named_parameters())[name]
    hook = parameter.register_hook(lambda g: g * torch.nan if trainer.step == at_step else g)
    yield
    hook.remove()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("grad_clip", [None, 1.0])
def test_a_bad_gradient_changes_nothing_and_is_named(optimizer: str, grad_clip: float | None) -> None:
    model = gpt()
    trainer = trainer_of(model, optimizer=optimizer, grad_clip=grad_clip, learning_rate=0.01)
    name = "transformer.h.0.attn.c_proj.weight"
    steps = trainer.steps()
    with poisoned(model, name, 5, trainer):
        for _ in range(5):
            next(steps)
        before = tensors_of(trainer)
        with pytest.raises(NonFiniteError, match=rf"step 6: .* learning rate 0\.\d+; .*{name}") as caught:
            next(steps)
    assert (caught.value.step, caught.value.parameter) == (6, name)
    assert "nan" in str(caught.value)
    assert same_tensors(tensors_of(trainer), before)
    assert all(p.grad is None for p in model.parameters())
    assert trainer.step == 5
    assert trainer.fit().steps == 12  # without the poison the run can go on


def test_an_infinite_loss_changes_nothing() -> None:
    class Exploding(PlainModule):
        explodes = False

        @override
        def forward(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            logits, loss = super().forward(idx, targets)
            return logits, loss + (math.inf if self.explodes else 0.0)

    model = Exploding(V)
    trainer = Trainer(model, tiny_split()[0], quick_config(), device="cpu")
    steps = trainer.steps()
    for _ in range(3):
        next(steps)
    before = tensors_of(trainer)
    model.explodes = True
    with pytest.raises(NonFiniteError, match=r"the loss is inf.*all gradients are finite") as caught:
        next(steps)
    assert caught.value.parameter is None
    assert same_tensors(tensors_of(trainer), before)


def test_a_request_to_stop_saves_first(tmp_path: Path) -> None:
    class Signal(Callback):
        @override
        def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
            if record.step == 7:
                trainer.interrupt()

    train, val = tiny_split()
    trainer = Trainer(
        bigram(), train, quick_config(), val_data=val, device="cpu", out_dir=tmp_path, callbacks=[Signal()]
    )
    with pytest.raises(
        TrainingInterrupted, match="training stopped after step 7; the state is saved"
    ) as caught:
        trainer.fit()
    assert caught.value.step == 7
    assert caught.value.checkpoint == str(trainer.checkpoint)
    assert Trainer.resume(tmp_path, train, val_data=val, callbacks=[Signal()], device="cpu").step == 7


def test_a_request_that_comes_before_the_start_is_not_lost() -> None:
    trainer = trainer_of()
    trainer.interrupt()
    with pytest.raises(TrainingInterrupted, match=r"training stopped after step 1$") as caught:
        trainer.fit()
    assert caught.value.checkpoint is None
    assert trainer.fit().steps == 12


def test_a_request_in_the_last_step_lets_the_run_end() -> None:
    trainer = trainer_of()
    for record in trainer.steps():
        if record.step == 11:
            trainer.interrupt()
            break
    steps = trainer.steps()
    trainer.interrupt()
    assert [record.step for record in steps] == [12]
    assert trainer.result().reason == "max_steps"
    assert trainer.last is not None
    assert trainer.last.step == 12


@pytest.mark.parametrize("replacement", [True, False])
def test_torch_s_default_device_plays_no_part_in_training(tmp_path: Path, replacement: bool) -> None:
    config = quick_config(max_steps=6, replacement=replacement, eval_interval=3, save_interval=3)
    gpt = tiny_config("cpu-1min", vocab_size=TOKENIZER.vocab_size, block_size=8, dropout=0.1)

    def trained(folder: str, device: str) -> dict[str, Tensor]:
        train, val = tiny_split()
        torch.manual_seed(0)
        trainer = Trainer(
            GPT(gpt),
            train,
            config,
            val_data=val,
            tokenizer=TOKENIZER,
            device="cpu",
            out_dir=tmp_path / folder,
        )
        with torch.device(device):
            trainer.fit()
            resumed = Trainer.resume(tmp_path / folder, train, val_data=val, device="cpu")
        assert same_tensors(tensors_of(trainer), tensors_of(resumed))
        return tensors_of(trainer)

    assert same_tensors(trained("one", "cpu"), trained("other", "meta"))


def test_a_callback_logs_records_of_its_own(tmp_path: Path) -> None:
    class Widths(Callback):
        @override
        def on_evaluate(self, trainer: Trainer, evaluation: object) -> None:
            trainer.log("width", {"value": 3.0, "bad": math.inf})
            with pytest.raises(InputError, match="kind must be a name of your own, got 'eval'"):
                trainer.log("eval", {})

    train, val = tiny_split()
    model = BigramLM(TOKENIZER.vocab_size)
    for out_dir in (None, tmp_path / "run"):
        Trainer(
            model, train, quick_config(), val_data=val, out_dir=out_dir, device="cpu", callbacks=[Widths()]
        ).fit()
    found = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "width"]
    assert [(r["step"], r["value"], r["bad"]) for r in found] == [
        (4, 3.0, None),
        (8, 3.0, None),
        (12, 3.0, None),
    ]
