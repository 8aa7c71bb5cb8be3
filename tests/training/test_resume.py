"""Going on with a run, or being refused with the reason; bit for bit: `reliability/test_resumes.py`."""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.hostile_files import json_of, reseal
from harness.tiny_models import tiny_config, tiny_gpt
from harness.tiny_training import (
    TEXT,
    TOKENIZER,
    Noise,
    Numbers,
    PlainModule,
    global_generators,
    quick_config,
    same_tensors,
    tensors_of,
    tiny_split,
)
from typing_extensions import override

import charlm.runs.checkpoint as checkpoint_module
import charlm.runs.choosing as choosing_module
from charlm import BigramLM, BlockDataset, CharTokenizer, EvalResult, LanguageModel, Trainer, load
from charlm.backends.world import World
from charlm.cli.__main__ import main
from charlm.data.prepare import prepare_corpus
from charlm.data.prepared import PreparedCorpus
from charlm.errors import (
    CharLMError,
    CheckpointCorruptError,
    CheckpointError,
    CheckpointMismatchError,
    ConfigError,
    DataError,
    FileFormatError,
    InputError,
    TrainingInterrupted,
)
from charlm.files import strict_json
from charlm.runs.checkpoint import read_checkpoint
from charlm.runs.directory import RunDirectory
from charlm.runs.log import read_metrics
from charlm.training import Callback, StepRecord, TrainerConfig, list_checkpoints, saving

V = TOKENIZER.vocab_size
SIZE = {"vocab_size": V, "n_embd": 16, "n_layer": 1, "block_size": 8}
STEPS = 12


def model_of(kind: str) -> LanguageModel:
    if kind == "gpt":
        return tiny_gpt(tiny_config("gpt2", **SIZE))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BigramLM(V)


class Interrupt(Callback):
    """Asks the trainer to stop in one step, as a signal handler would."""

    def __init__(self, step: int) -> None:
        self.step = step

    @override
    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        if record.step == self.step:
            trainer.interrupt()


class BestAtFour(Trainer):
    """A trainer whose validation loss is lowest after step 4."""

    @override
    def evaluate(self, data: BlockDataset | None = None, *, max_chars: int | None = None) -> EvalResult:
        result = super().evaluate(data, max_chars=max_chars)
        return dataclasses.replace(result, loss_nats=1.0 + abs(self.step - 4))


def trainer_of(
    kind: str = "bigram",
    out_dir: Path | None = None,
    callbacks: Sequence[Callback] = (),
    cls: type[Trainer] = Trainer,
    **config: object,
) -> Trainer:
    train, val = tiny_split()
    rate = {"learning_rate": 0.01} if kind == "gpt" else {}
    settings = quick_config(**{"max_steps": STEPS, **rate, **config})
    return cls(
        model_of(kind),
        train,
        settings,
        val_data=val,
        device="cpu",
        out_dir=out_dir,
        callbacks=callbacks,
        tokenizer=TOKENIZER,
    )


def resumed(
    out_dir: Path,
    callbacks: Sequence[Callback] = (),
    max_steps: int | None = None,
    cls: type[Trainer] = Trainer,
) -> Trainer:
    train, val = tiny_split()
    return cls.resume(out_dir, train, val_data=val, device="cpu", callbacks=callbacks, max_steps=max_steps)


def test_a_finished_run_goes_on_with_more_steps(tmp_path: Path) -> None:
    trainer_of(out_dir=tmp_path, schedule="constant").fit()
    again = resumed(tmp_path)
    assert (again.fit().steps, again.result().reason) == (STEPS, "max_steps")
    longer = resumed(tmp_path, max_steps=20)
    longer.fit()
    straight = trainer_of(schedule="constant", max_steps=20)
    straight.fit()
    assert same_tensors(tensors_of(longer), tensors_of(straight))
    with pytest.raises(ConfigError, match="max_steps must be"):
        resumed(tmp_path, max_steps=0)
    with pytest.raises(ConfigError, match="max_steps must be at least the 20 steps done, got 3"):
        resumed(tmp_path, max_steps=3)


def test_the_best_weights_are_found_again(tmp_path: Path) -> None:
    """The best evaluation was before the stop; its weights must come back at the end."""
    whole = trainer_of(cls=BestAtFour)
    assert whole.fit().best_step == 4
    trainer = trainer_of(out_dir=tmp_path, cls=BestAtFour)
    for record in trainer.steps():
        if record.step == 8:
            break
    again = resumed(tmp_path, cls=BestAtFour)
    assert again.fit().best_step == 4
    assert same_tensors(again.model.state_dict(), whole.model.state_dict())
    assert not same_tensors(again.model.state_dict(), trainer.model.state_dict())
    finished = resumed(tmp_path, cls=BestAtFour)
    assert finished.fit().steps == STEPS
    assert same_tensors(finished.model.state_dict(), whole.model.state_dict())


@pytest.mark.parametrize("how", ["not kept", "damaged"])
def test_lost_best_weights_are_warned_about_and_the_run_goes_on(tmp_path: Path, how: str) -> None:
    trainer = trainer_of(out_dir=tmp_path, cls=BestAtFour, keep_best=0 if how == "not kept" else 1)
    for record in trainer.steps():
        if record.step == 8:
            break
    if how == "damaged":
        best, _ = list_checkpoints(tmp_path)
        flip(best.path / "model.safetensors", -1)
    with pytest.warns(RuntimeWarning, match="the weights of the best evaluation, at step 4, are not on disk"):
        again = resumed(tmp_path, cls=BestAtFour)
    assert again.fit().best_step == 4
    whole = trainer_of(cls=BestAtFour, restore_best=False)
    whole.fit()
    assert same_tensors(again.model.state_dict(), whole.model.state_dict())  # those of the last step


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("how", "file"),
    [
        ("flip", "model.safetensors"),
        ("delete", "manifest.json"),
        ("truncate", "train.safetensors"),
        ("extend", "state.json"),
    ],
)
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, how: str, file: str
) -> None:
    numbers = Numbers()
    whole = trainer_of(callbacks=[numbers])
    whole.fit()
    trainer_of(out_dir=tmp_path, keep_last=3, callbacks=[Callback()]).fit()
    run = RunDirectory.open(tmp_path)
    path = list_checkpoints(run.path)[-1].path / file
    if how == "flip":
        flip(path, path.stat().st_size // 2)
    elif how == "delete":
        path.unlink()
    else:
        content = path.read_bytes()
        path.write_bytes(content[:-1] if how == "truncate" else content + b" ")
    second = Numbers()
    with pytest.warns(RuntimeWarning, match=f"{file}.*; going on from step 8") as caught:
        again = resumed(tmp_path, [second])
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert again.step == 8
    again.fit()
    assert second.steps == numbers.steps[8:]
    assert same_tensors(tensors_of(again), tensors_of(whole))
    assert resumed_quietly(tmp_path).step == STEPS


def resumed_quietly(out_dir: Path) -> Trainer:
    """Resume, past damaged leftovers that a warning names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return resumed(out_dir, [Callback()])


def test_what_is_saved_after_a_fall_back_is_never_pruned_for_the_damaged_one(tmp_path: Path) -> None:
    trainer_of(out_dir=tmp_path, keep_last=2, keep_best=0).fit()
    run = RunDirectory.open(tmp_path)
    damaged = list_checkpoints(run.path)[-1]
    flip(damaged.path / "model.safetensors", -1)
    with pytest.warns(RuntimeWarning, match="has changed since it was saved"):
        again = resumed(tmp_path)
    again.config = again.config.replace(keep_last=1, save_interval=1)
    for record in again.steps():
        assert again.checkpoint is not None
        assert again.checkpoint.is_dir()
        steps = [info.step for info in list_checkpoints(run.path)]
        assert steps == ([record.step, 12] if record.step < 12 else [12])
    assert not damaged.path.exists()


@pytest.mark.parametrize("kept", [1, 2])
def test_a_checkpoint_that_a_run_deletes_meanwhile_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    """The one that is to be read is replaced, as by a training that goes on, and is then no longer there."""
    trainer = trainer_of(out_dir=tmp_path, keep_last=kept, keep_best=0, restore_best=False)
    trainer.fit()
    real = read_checkpoint
    replaced: list[Path] = []

    def read(path: Path, run_id: str | None = None) -> Any:
        if not replaced:
            replaced.append(path)
            trainer.save()  # of the same step, so it takes the other's place
        return real(path, run_id)

    monkeypatch.setattr(choosing_module, "read_checkpoint", read)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = choosing_module.newest_whole_checkpoint(RunDirectory.open(tmp_path))
    assert not replaced[0].exists()
    assert again.info.path == trainer.checkpoint


def test_without_a_whole_checkpoint_there_is_an_error(tmp_path: Path) -> None:
    train, _ = tiny_split()
    with pytest.raises(CheckpointError, match="no run in"):
        Trainer.resume(tmp_path / "nowhere", train)
    trainer = trainer_of(out_dir=tmp_path / "run")
    next(trainer.steps())
    with pytest.raises(CheckpointError, match=r"no whole checkpoint in .*: none was saved"):
        resumed(tmp_path / "run")
    trainer.save()
    flip(next((tmp_path / "run").glob("checkpoints/*/model.safetensors")), -1)
    with pytest.raises(CheckpointError, match=r"no whole checkpoint in .*has changed since it was saved"):
        resumed(tmp_path / "run")


def test_a_checkpoint_of_a_newer_charlm_is_refused_and_not_fallen_back_from(tmp_path: Path) -> None:
    trainer_of(out_dir=tmp_path, keep_last=2).fit()
    *_, newest = list_checkpoints(tmp_path)
    reseal(newest.path, version=2)
    with pytest.raises(CheckpointError, match=r"has version 2 of charlm.checkpoint; .* Update charlm\."):
        resumed(tmp_path)
    assert newest.path.exists()


def test_another_run_format_is_refused(tmp_path: Path) -> None:
    trainer_of(out_dir=tmp_path).fit()
    values = strict_json.loads((tmp_path / "run.json").read_bytes(), path="run.json")
    (tmp_path / "run.json").write_bytes(strict_json.dumps({**values, "version": 2}))
    with pytest.raises(FileFormatError, match=r"has version 2 of charlm.run; .* reads up to 1"):
        resumed(tmp_path)


@pytest.fixture(scope="module")
def run_of_gpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gpt") / "run"
    trainer_of("gpt", path, [Callback()], max_steps=4).fit()
    return path


def refused(run: Path, **changes: object) -> None:
    train, val = tiny_split()
    generators = global_generators()
    arguments: dict[str, object] = {
        "train_data": train,
        "val_data": val,
        "device": "cpu",
        "callbacks": [Callback()],
    }
    with pytest.raises(CheckpointMismatchError, match=str(changes.pop("match"))):
        Trainer.resume(run, **{**arguments, **changes})  # type: ignore[arg-type]  # checked by the pairs above
    assert global_generators() == generators


def test_other_data_is_refused(run_of_gpt: Path) -> None:
    train, val = tiny_split()
    ids = train.ids.clone()
    ids[-1] = (ids[-1] + 1) % V
    whole = BlockDataset.from_text(TEXT, TOKENIZER, 8)
    other_tokenizer = CharTokenizer(list(reversed(TOKENIZER.vocab)))
    for data in (
        BlockDataset(ids, 8),
        whole,
        whole.split(0.8)[0],
        val,
        BlockDataset.from_text(TEXT, other_tokenizer, 8).split()[0],
    ):
        refused(run_of_gpt, train_data=data, match="train_data is not the text that the run was trained with")
    for other in (None, train, whole.split(0.8)[1]):
        refused(run_of_gpt, val_data=other, match="val_data is not the text that the run was trained with")


def test_another_block_size_is_refused(run_of_gpt: Path) -> None:
    shorter = tiny_split(block_size=4)
    refused(run_of_gpt, train_data=shorter[0], match="train_data has blocks of 4, the run was trained with 8")
    refused(run_of_gpt, val_data=shorter[1], match="val_data has blocks of 4, the run was trained with 8")


def test_another_model_is_refused_and_stays_as_it_was(run_of_gpt: Path) -> None:
    for model in (
        BigramLM(V),
        tiny_gpt(tiny_config("gpt2", **{**SIZE, "n_layer": 2})),
        tiny_gpt(tiny_config("lecture", **SIZE)),
    ):
        before = {k: t.clone() for k, t in model.state_dict().items()}
        refused(run_of_gpt, model=model, match="not the model given")
        assert same_tensors(model.state_dict(), before)
    refused(run_of_gpt, model=PlainModule(V), match="the model given is not the one that was saved")


def test_the_callers_own_model_of_the_same_settings_is_filled(run_of_gpt: Path, tmp_path: Path) -> None:
    train, val = tiny_split()
    model = tiny_gpt(tiny_config("gpt2", **SIZE), seed=9)
    trainer = Trainer.resume(
        shutil.copytree(run_of_gpt, tmp_path / "run"),
        train,
        val_data=val,
        model=model,
        device="cpu",
        callbacks=[Callback()],
    )
    assert trainer.model is model
    assert same_tensors(model.state_dict(), LanguageModel.load(trainer.checkpoint or "").state_dict())


def test_other_callbacks_are_refused_if_one_of_those_that_were_there_remembers_something(
    run_of_gpt: Path, tmp_path: Path
) -> None:
    trainer_of(out_dir=tmp_path, callbacks=[Numbers(), Noise()]).fit()
    for callbacks in ([], [Noise()], [Noise(), Noise(), Noise()]):
        refused(tmp_path, callbacks=callbacks, match=f"saved with 2 callbacks, got {len(callbacks)}")
    run = shutil.copytree(run_of_gpt, tmp_path / "run")
    assert resumed(run, [Callback(), Callback()]).step == 4


def test_another_optimizer_is_refused(run_of_gpt: Path) -> None:
    refused(
        run_of_gpt,
        optimizer=lambda named: torch.optim.SGD([p for _, p in named]),
        match=r"the run was trained with \['AdamW'\], got \['SGD'\]",
    )


@pytest.mark.parametrize("name", ["SGD", "Adafactor", "RAdam"])
def test_an_optimizer_of_the_callers_own_resumes_bit_for_bit(tmp_path: Path, name: str) -> None:
    def factory(named: object) -> torch.optim.Optimizer:
        options = {"momentum": 0.9} if name == "SGD" else {}
        made = getattr(torch.optim, name)([p for _, p in named], **options)  # type: ignore[attr-defined]  # pairs
        assert isinstance(made, torch.optim.Optimizer)
        return made

    train, _ = tiny_split()
    whole = Trainer(model_of("gpt"), train, quick_config(), device="cpu", optimizer=factory)
    whole.fit()
    first = Trainer(model_of("gpt"), train, quick_config(), device="cpu", optimizer=factory, out_dir=tmp_path)
    for record in first.steps():
        if record.step == 8:
            break
    again = Trainer.resume(tmp_path, train, device="cpu", optimizer=factory)
    again.fit()
    assert same_tensors(tensors_of(again), tensors_of(whole))


def test_optimizer_state_that_a_checkpoint_cannot_hold_is_refused(tmp_path: Path) -> None:
    def factory(named: object) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD([p for _, p in named], momentum=0.5)  # type: ignore[attr-defined]  # pairs
        for group in optimizer.param_groups:
            optimizer.state[group["params"][0]]["count"] = 3
        return optimizer

    train, _ = tiny_split()
    trainer = Trainer(
        PlainModule(V), train, quick_config(), device="cpu", optimizer=factory, out_dir=tmp_path
    )
    with pytest.raises(ValueError, match=r"SGD keeps a int as 'count' of embedding\.weight"):
        trainer.save()


def test_a_changed_environment_is_warned_about(run_of_gpt: Path, tmp_path: Path) -> None:
    run = shutil.copytree(run_of_gpt, tmp_path / "run")
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.warns(
            RuntimeWarning, match=f"not bit for bit: threads was '?{threads}'?, is {threads + 1}"
        ):
            resumed(run, [Callback()])
    finally:
        torch.set_num_threads(threads)


def test_of_sums_that_depend_on_the_number_of_processes_the_number_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Two(World):
        size = 2

    trainer = trainer_of(out_dir=tmp_path, reduce="fast")
    with monkeypatch.context() as patch:
        patch.setattr(saving, "join", lambda backend: Two())
        next(trainer.steps())
        trainer.save()
    with pytest.warns(RuntimeWarning, match=r"not bit for bit: processes was '2', is 1"):
        resumed(tmp_path)


def test_the_log_is_cut_back_to_the_resumed_step(tmp_path: Path) -> None:
    trainer = trainer_of(out_dir=tmp_path)
    for record in trainer.steps():
        if record.step == 7:
            break
    log = tmp_path / "metrics.jsonl"
    assert [r["step"] for r in read_metrics(log)][-1] == 7
    with log.open("ab") as file:
        file.write(b'no record\n{"kind":"step","step":7,"lo')  # as after a crash
    again = resumed(tmp_path)
    next(again.steps())
    records = list(read_metrics(log))
    assert [r["step"] for r in records if r["kind"] == "step"] == [1, 2, 3, 4, 5]
    assert log.read_bytes().endswith(b"}\n")
    again.fit()
    records = list(read_metrics(log))
    assert [r["step"] for r in records if r["kind"] == "step"] == list(range(1, STEPS + 1))


def test_a_loss_that_is_not_finite_survives_the_log_and_the_resume(tmp_path: Path) -> None:
    train, _ = tiny_split()
    torch.manual_seed(0)
    model = BigramLM(V).fit(train, smoothing=0)
    odd = BlockDataset(torch.tensor([0, 7, 0, 7, 1, 1, 0, 0] * 3), 8)
    config = quick_config(learning_rate=0.0, weight_decay=0.0)
    first = Trainer(model, train, config, val_data=odd, device="cpu", out_dir=tmp_path).fit()
    assert first.final is not None
    records = [r for r in read_metrics(tmp_path / "metrics.jsonl") if r["kind"] == "eval"]
    assert records[-1]["loss_nats"] is None
    assert records[-1]["nonfinite"] == {
        "loss_nats": "inf",
        "bits_per_char": "inf",
        "perplexity": "inf",
    }
    again = Trainer.resume(tmp_path, train, val_data=odd, device="cpu")
    assert again.last is not None
    assert again.last.result == first.final
    assert again.best is None
    (info,) = list_checkpoints(tmp_path)
    assert info.val_loss is None


def test_training_and_validation_blocks_may_differ_in_size(tmp_path: Path) -> None:
    train, long = tiny_split()
    _, short = tiny_split(block_size=4)
    Trainer(model_of("gpt"), train, quick_config(), val_data=short, device="cpu", out_dir=tmp_path).fit()
    assert Trainer.resume(tmp_path, train, val_data=short, device="cpu").step == STEPS
    with pytest.raises(CheckpointMismatchError, match="val_data has blocks of 8, the run was trained with 4"):
        Trainer.resume(tmp_path, train, val_data=long, device="cpu")


def test_a_resume_that_finds_an_optimizer_state_of_another_shape_is_refused(tmp_path: Path) -> None:
    class Odd(torch.optim.AdamW):
        """Keeps a moment of another shape, under torch's name."""

    Odd.__name__ = "AdamW"

    def factory(named: Any) -> torch.optim.Optimizer:
        optimizer = Odd([p for _, p in named])
        for parameter in optimizer.param_groups[0]["params"]:
            optimizer.state[parameter]["exp_avg"] = torch.zeros(2)
        return optimizer

    train, _ = tiny_split()
    Trainer(model_of("gpt"), train, quick_config(), device="cpu", optimizer=factory, out_dir=tmp_path).save()
    with pytest.raises(
        CheckpointMismatchError, match=r"the optimizer state of transformer\.\S+ does not fit"
    ):
        Trainer.resume(tmp_path, train, device="cpu")


def test_a_callback_that_refuses_its_state_leaves_everything_as_it_was(tmp_path: Path) -> None:
    class Refusing(Noise):
        @override
        def load_state(self, state: Mapping[str, object]) -> None:
            raise CharLMError("not today")

    trainer_of(out_dir=tmp_path, callbacks=[Noise()]).fit()
    model = model_of("bigram")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generators = global_generators()
    train, val = tiny_split()
    with pytest.raises(CharLMError, match="not today"):
        Trainer.resume(tmp_path, train, val_data=val, device="cpu", model=model, callbacks=[Refusing()])
    assert same_tensors(model.state_dict(), before)
    assert global_generators() == generators


def test_a_model_of_another_precision_is_refused(tmp_path: Path) -> None:
    trainer_of(out_dir=tmp_path).fit()
    train, val = tiny_split()
    with pytest.raises(CheckpointMismatchError, match=r"not in torch\.float32"):
        Trainer.resume(tmp_path, train, val_data=val, device="cpu", model=model_of("bigram").double())


@pytest.mark.parametrize("wrong", ["train_data", "val_data"])
def test_a_resume_takes_datasets_alone(tmp_path: Path, wrong: str) -> None:
    trainer_of(out_dir=tmp_path).fit()
    train, val = tiny_split()
    data: dict[str, Any] = {"train_data": train, "val_data": val, wrong: "a text"}
    with pytest.raises(InputError, match=f"{wrong} must be a BlockDataset, got 'a text'"):
        Trainer.resume(tmp_path, device="cpu", **data)


def test_a_new_end_is_remembered_before_the_next_checkpoint(tmp_path: Path) -> None:
    trainer_of(out_dir=tmp_path).fit()
    again = resumed(tmp_path, max_steps=STEPS + 50)
    steps = again.steps()
    next(steps)  # and then the process is killed
    del steps, again
    assert resumed(tmp_path).config.max_steps == STEPS + 50


def test_a_dangling_link_in_place_of_a_checkpoint_is_passed_over(tmp_path: Path) -> None:
    """It exists and leads nowhere: a reader must neither take it for a deleted one nor wait for it."""
    trainer_of(out_dir=tmp_path).fit()
    link = tmp_path / "checkpoints" / "step-000000000099-00000000"
    link.symlink_to(tmp_path / "nowhere")
    with pytest.warns(RuntimeWarning, match="going on from step 12"):
        assert resumed(tmp_path).step == 12
    with pytest.warns(RuntimeWarning, match="loading"):
        load(tmp_path, device="cpu")
    assert main(["info", str(tmp_path)]) == 0


def resealed(run: Path, name: str, **changes: object) -> Path:
    """Return a copy of the run whose only checkpoint says something else in state.json."""
    copy = shutil.copytree(run, run.with_name(name))
    for info in list_checkpoints(copy)[:-1]:
        shutil.rmtree(info.path)
    checkpoint = list_checkpoints(copy)[-1].path
    (checkpoint / "state.json").write_bytes(
        strict_json.dumps({**json_of(checkpoint / "state.json"), **changes})
    )
    reseal(checkpoint)
    return copy


@pytest.mark.parametrize("position", [-1, 625, 10**6, True, None])
def test_a_generator_at_a_place_that_it_does_not_have_is_refused(run_of_gpt: Path, position: object) -> None:
    """Numpy does not check it, and would read beyond its numbers."""
    rng = {"numpy": [position, 0, 0.0], "python": [3, None]}
    run = resealed(run_of_gpt, f"at-{position}", rng=rng)
    before = global_generators()
    with pytest.raises(CheckpointCorruptError, match="holds no valid generator states"):
        resumed(run, [Callback()])
    assert global_generators() == before


def test_what_a_state_says_is_shown_in_part_and_without_control_characters(run_of_gpt: Path) -> None:
    for name, change, match in (
        ("names", {"optimizers": ["\x1b[2J" * 9_999]}, "the run was trained with .*, got"),
        ("blocks", {"block_size": {"train": "\x1b[2J" * 9_999, "val": 8}}, "the run was trained with '"),
    ):
        with pytest.raises(CheckpointMismatchError, match=match) as caught:
            resumed(resealed(run_of_gpt, name, **change), [Callback()])
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 500


def test_settings_that_a_state_lacks_are_those_of_the_time_when_it_was_written(tmp_path: Path) -> None:
    then: dict[str, Any] = {
        "replacement": True,
        "optimizer": "adamw",
        "betas": [0.9, 0.99],
        "momentum": 0.95,
        "grad_clip": 1.0,
    }
    assert not then.items() <= TrainerConfig().to_dict().items()
    whole = trainer_of("gpt", eval_interval=6, **then)
    whole.fit()
    trainer = trainer_of("gpt", tmp_path / "run", [Interrupt(6)], eval_interval=6, **then)
    with pytest.raises(TrainingInterrupted):
        trainer.fit()
    kept = {name: value for name, value in trainer.config.to_dict().items() if name not in then}
    again = resumed(resealed(tmp_path / "run", "lacking", config=kept))
    assert again.config == whole.config
    again.fit()
    assert same_tensors(tensors_of(again), tensors_of(whole))


def test_a_state_without_any_settings_resumes_with_the_earlier_defaults(tmp_path: Path) -> None:
    trainer = trainer_of("bigram", tmp_path / "run", max_steps=4)
    trainer.fit()
    config = resumed(resealed(tmp_path / "run", "empty", config={})).config
    assert (config.max_steps, config.batch_size, config.learning_rate) == (2_000, 32, 1e-3)
    assert (config.optimizer, config.replacement, config.warmup_steps) == ("adamw", True, 50)


def swapped(text: str) -> str:
    """Return another text with the same ids: every b became a c, which has its place in the vocabulary."""
    assert "b" in text
    assert "c" not in text
    return text.replace("b", "c")


def blocks(text: str, **arguments: str) -> tuple[BlockDataset, BlockDataset]:
    tokenizer = CharTokenizer(CharTokenizer.from_text(text).vocab, **arguments)
    return BlockDataset.from_text(text, tokenizer, 8).split()


@pytest.mark.parametrize("known", ["by the run's tokenizer", "by the data's", "by the file alone"])
def test_a_text_with_the_same_ids_of_other_characters_is_refused(known: str, tmp_path: Path) -> None:
    train, val = blocks(TEXT)
    tokenizer = None if known == "by the data's" else TOKENIZER
    with pytest.MonkeyPatch.context() as patch:
        if known == "by the file alone":  # as earlier versions wrote it
            encode = checkpoint_module.encode_state
            patch.setattr(
                checkpoint_module,
                "encode_state",
                lambda name, state: encode(name, {k: v for k, v in state.items() if k != "characters"}),
            )
        arguments = {"val_data": val, "tokenizer": tokenizer, "out_dir": tmp_path}
        Trainer(BigramLM(V), train, quick_config(), device="cpu", **arguments).fit()  # type: ignore[arg-type]
    other, other_val = blocks(swapped(TEXT))
    assert torch.equal(other.ids, train.ids)
    for pair in ((other, val), (train, other_val)):
        with pytest.raises(CheckpointMismatchError, match="is not the text that the run was trained with"):
            Trainer.resume(tmp_path, pair[0], val_data=pair[1], device="cpu")
    for pair in (
        (train, val),
        blocks(TEXT, unknown=" "),  # stands for nothing else
        (BlockDataset(other.ids, 8), BlockDataset(val.ids, 8)),  # nobody can know
    ):
        assert Trainer.resume(tmp_path, pair[0], val_data=pair[1], device="cpu").step == 12


def test_texts_of_different_characters_are_not_trained_or_scored_together() -> None:
    train, val = blocks(TEXT)
    other, other_val = blocks(swapped(TEXT))
    mixed: list[dict[str, Any]] = [{"val_data": other_val}, {"tokenizer": other.tokenizer}]
    for changes in mixed:
        with pytest.raises(DataError, match=r"was encoded with .*: the ids stand for other characters"):
            Trainer(BigramLM(V), train, quick_config(), device="cpu", **changes)
    trainer = Trainer(BigramLM(V), train, quick_config(), val_data=val, device="cpu")
    with pytest.raises(DataError, match="data was encoded with"):
        trainer.evaluate(other)
    assert trainer.evaluate(BlockDataset(other.ids, 8)) == trainer.evaluate(train)


def test_a_save_and_a_resume_of_a_text_on_disk_read_nothing_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    prepare_corpus(tmp_path / "text", tmp_path / "data", shard_bytes=700)
    train, val = BlockDataset.open(tmp_path / "data", 8).split()
    config = quick_config(restore_best=False, eval_interval=100)
    run, V = tmp_path / "run", TOKENIZER.vocab_size
    trainer = Trainer(
        BigramLM(V), train, config, val_data=val, tokenizer=TOKENIZER, out_dir=run, device="cpu"
    )
    next(trainer.steps())
    read: list[int] = []
    own = PreparedCorpus.read_into

    def noted(corpus: PreparedCorpus, ids: Any, start: int) -> None:
        read.append(len(ids))
        own(corpus, ids, start)

    monkeypatch.setattr(PreparedCorpus, "read_into", noted)
    trainer.save()
    again = Trainer.resume(run, train, val_data=val, device="cpu")
    assert read == []
    again.fit()
    assert sum(read) < 12 * 4 * 9 + val.n_ids * 2


def test_a_run_on_disk_in_two_lengths_of_files_is_equal_bit_for_bit(tmp_path: Path) -> None:
    """And equal to that in memory, with pieces set aside, in epochs of another order than the text's."""
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    found = []
    for number, size in enumerate((300, 1_100, None)):
        if size is None:
            data = BlockDataset.from_text(TEXT, TOKENIZER, 8)
        else:
            prepare_corpus(tmp_path / "text", tmp_path / str(number), shard_bytes=size)
            data = BlockDataset.open(tmp_path / str(number), 8)
        train, val = data.split(0.8)
        rest, _ = train.set_aside(90)
        torch.manual_seed(1)
        model = BigramLM(TOKENIZER.vocab_size)
        config = quick_config(replacement=False, max_steps=200)
        trainer = Trainer(model, rest, config, val_data=val, device="cpu")
        final = trainer.fit().final
        found.append((tensors_of(trainer), final))
    for weights, final in found[1:]:
        assert same_tensors(weights, found[0][0])
        assert final == found[0][1]


def test_a_text_in_other_documents_is_another_text(tmp_path: Path) -> None:
    texts = [TEXT[:800], TEXT[800:1_700]]
    data = BlockDataset.from_texts(texts, TOKENIZER, 8)
    Trainer(
        BigramLM(TOKENIZER.vocab_size), data, quick_config(), out_dir=tmp_path / "run", device="cpu"
    ).fit()
    assert Trainer.resume(tmp_path / "run", data, device="cpu").step == 12
    for other in (
        BlockDataset.from_text("".join(texts), TOKENIZER, 8),
        BlockDataset.from_texts([TEXT[:801], TEXT[801:1_700]], TOKENIZER, 8),
        BlockDataset.from_texts(texts, TOKENIZER, 8, weights=[1, 2]),
    ):
        with pytest.raises(CheckpointMismatchError, match="train_data is not the text"):
            Trainer.resume(tmp_path / "run", other, device="cpu")


def test_an_end_in_minutes_is_moved_where_the_clock_can(tmp_path: Path) -> None:
    train, val = tiny_split()
    run = tmp_path / "run"
    config = quick_config(minutes=0.01, max_steps=10**6, batch_size=1, eval_interval=None)
    first = Trainer(
        BigramLM(TOKENIZER.vocab_size), train, config, val_data=val, out_dir=run, device="cpu"
    ).fit()
    for minutes, problem in (
        (0.00001, "minutes must be more than the 0.0"),
        (0.0, "minutes must be a finite number above 0"),
    ):
        with pytest.raises(ConfigError, match=problem):
            Trainer.resume(run, train, val_data=val, device="cpu", minutes=minutes)
    with pytest.raises(ConfigError, match="two ends for one run"):
        Trainer.resume(run, train, val_data=val, device="cpu", minutes=1, max_steps=1)
    again = Trainer.resume(run, train, val_data=val, device="cpu", minutes=0.025)
    longer = again.fit()
    assert longer.steps > first.steps
    assert again.timetable is not None
    assert again.timetable.end == longer.steps
    rates: list[Any] = [
        r["learning_rate"] for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "step"
    ]
    assert rates[first.steps] == config.learning_rate > rates[first.steps - 1]
    linear = quick_config(schedule="linear", warmup_steps=0)
    Trainer(BigramLM(TOKENIZER.vocab_size), train, linear, out_dir=tmp_path / "two", device="cpu").fit()
    with pytest.raises(ConfigError, match="a linear schedule needs its end beforehand"):
        Trainer.resume(tmp_path / "two", train, device="cpu", minutes=1)
