"""What a killed process leaves: a run that can be read, with its last save or the one under way.

SIGKILL at random moments, in children of a process of its own that does file operations only, again and
again in the same directories; and the end of the process at every single file-system call of whole saves,
deletions, saved models, tokenizers and logs.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from harness.campaign import Campaign
from harness.failing_calls import Killed, failing
from harness.prepared_saves import PreparedSave, fast_directory, to_be_kept
from harness.tiny_training import TOKENIZER, quick_config, same_tensors, tensors_of, tiny_split

from charlm import BigramLM, CharTokenizer, Trainer
from charlm.errors import CheckpointError
from charlm.files.log import Appender, keep_lines
from charlm.models.saving import load_model, save_model
from charlm.runs.checkpoint import list_checkpoints, read_checkpoint
from charlm.runs.choosing import newest_whole_checkpoint
from charlm.runs.directory import RunDirectory
from charlm.runs.retention import prune_checkpoints, remove_leftovers

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parents[1]
V = TOKENIZER.vocab_size


@pytest.fixture
def memory() -> Iterator[Path]:
    with fast_directory() as path:
        yield path


def leftovers(run: RunDirectory) -> set[str]:
    """Return the names in a run's directories that a finished save does not leave."""
    names = {path.name for folder in (run.path, run.checkpoints) for path in folder.iterdir()}
    return {name for name in names if name.startswith((".tmp-", ".trash-"))}


class KilledRun:
    """A run whose every trainer is killed; `seen` holds the saves that were found there."""

    def __init__(self, path: Path, keep_last: int, keep_best: int) -> None:
        self.run = RunDirectory.create(path)
        self.keep_last, self.keep_best = keep_last, keep_best
        self.seen: dict[int, PreparedSave] = {}
        began = time.perf_counter()
        for number in range(5):
            self.go_on(f"first {number}")
        self.seconds = (time.perf_counter() - began) / 5  # that a save takes here

    def save_of(self, key: str, step: int) -> PreparedSave:
        draw = random.Random(f"{key}/{step}")
        loss = draw.choice([None, draw.uniform(1, 4)])
        return PreparedSave(key, step, loss, size=draw.randrange(1_000, 40_000))

    def save_and_prune(self, save: PreparedSave, saved: Callable[[], object] = int) -> None:
        save.write(self.run)
        saved()
        newest = self.run.checkpoints / save.name
        prune_checkpoints(self.run, newest, keep_last=self.keep_last, keep_best=self.keep_best)

    def child(self, key: str, done: int) -> None:
        """Clean up and save for ever; say "b", then "s" and "p" for each save and pruning."""
        os.write(done, b"b")
        remove_leftovers(self.run)
        step = max(self.seen, default=0)
        while True:
            step += 1
            self.save_and_prune(self.save_of(key, step), lambda: os.write(done, b"s"))
            os.write(done, b"p")

    def kill_one(self, key: str, draw: random.Random) -> tuple[int, str]:
        """Fork a child, kill it, and return how many saves it acknowledged and where it was."""
        reading, writing = os.pipe()
        process = os.fork()
        if process == 0:
            try:
                self.child(key, writing)
            finally:
                os._exit(1)  # an exception is seen as saves that end by themselves
        os.close(writing)
        heard = b"".join(os.read(reading, 1) for _ in range(draw.choice([1, 3])))
        time.sleep(draw.uniform(0, 1.2 * self.seconds))
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        heard += os.read(reading, 1_000)
        os.close(reading)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, f"{key}: the child failed by itself"
        acknowledged = heard.count(b"s")
        in_flight = self.save_of(key, max(self.seen, default=0) + acknowledged + 1)
        if heard.endswith(b"s"):
            return acknowledged, "while pruning"
        if (self.run.checkpoints / in_flight.name).exists():
            return acknowledged, "between rename and return"
        if list(self.run.checkpoints.glob(f".tmp-{process}-*")):
            return acknowledged, "before the rename"
        return acknowledged, "between two saves"

    def check(self, key: str, acknowledged: int) -> None:
        """Check what stands there against what was acknowledged."""
        before = max(self.seen, default=0)
        for step in range(before + 1, before + acknowledged + 1):
            self.seen[step] = self.save_of(key, step)
        run = RunDirectory.open(self.run.path)
        present = {info.step: info for info in list_checkpoints(run.path)}
        in_flight = self.save_of(key, before + acknowledged + 1)
        if in_flight.step in present:
            self.seen[in_flight.step] = in_flight
        for step, info in present.items():
            checkpoint = read_checkpoint(info.path, run.run_id)
            assert self.seen[step].is_what(checkpoint, run), f"{key}: {info.path.name} is not what was saved"
        if self.seen:
            newest = newest_whole_checkpoint(run).info.step  # a damaged one would be a warning, so an error
            assert newest == max(self.seen), f"{key}: step {newest} is newest, {max(self.seen)} was saved"
        kept = to_be_kept(self.seen.values(), keep_last=self.keep_last, keep_best=self.keep_best)
        lost = kept - {info.path.name for info in present.values()}
        assert not lost, f"{key}: {lost} should have been kept"
        self.seen = {step: save for step, save in self.seen.items() if step in present}  # the others are gone

    def go_on(self, key: str) -> None:
        """Clean up and save once more; then exactly what is to be kept is there."""
        remove_leftovers(self.run)
        save = self.save_of(key, max(self.seen, default=0) + 1)
        self.save_and_prune(save)
        self.seen[save.step] = save
        kept = to_be_kept(self.seen.values(), keep_last=self.keep_last, keep_best=self.keep_best)
        names = {path.name for path in self.run.checkpoints.iterdir()}
        assert names == kept, f"{key}: {names} are there, {kept} should be"


def random_kills(places: list[Path], trials: int, seed: int) -> dict[str, int]:
    """Kill a child `trials` times, in four runs in each place, and count where the kills hit."""
    warnings.simplefilter("error")
    draw = random.Random(seed)
    kept = [(keep_last, keep_best) for keep_last in (1, 2) for keep_best in (0, 1)]
    runs = [KilledRun(place / f"{last}-{best}", last, best) for place in places for last, best in kept]
    figures = dict.fromkeys(["kills", "before the rename", "between rename and return", "while pruning"], 0)
    for trial in range(trials):
        killed = draw.choice(runs)
        key = f"seed {seed}, trial {trial}"
        acknowledged, where = killed.kill_one(key, draw)
        figures["kills"] += 1
        figures[where] = figures.get(where, 0) + 1
        try:
            killed.check(key, acknowledged)
            if draw.random() < 0.5:  # else kills pile up on each other
                killed.go_on(f"{key}, next")
        except (OSError, RuntimeWarning) as error:
            error.add_note(f"{key}, killed {where}")
            raise
    return figures


def test_a_run_killed_at_random_moments_has_its_last_save_or_the_one_under_way(
    tmp_path: Path, memory: Path, campaign: Campaign
) -> None:
    code = (
        "import json, sys; from pathlib import Path; from test_kills import random_kills; "
        "trials, seed, *places = sys.argv[1:]; "
        "print(json.dumps(random_kills([*map(Path, places)], int(trials), int(seed))))"
    )
    paths = [str(TESTS.parent), str(TESTS), str(TESTS / "reliability")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    # The writing is done for half of the kills by a disk, for the others in memory, where it takes no time.
    arguments = [str(campaign.trials(short=150)), str(campaign.seed), str(tmp_path), str(memory)]
    command = [sys.executable, "-c", code, *arguments]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2_000:]
    figures: dict[str, int] = json.loads(ended.stdout)
    for what, number in figures.items():
        campaign.counted(what, number)
    campaign.counted("unreadable runs", 0)
    if figures["kills"] >= 150:  # or the delays have missed what they are meant to hit
        assert figures["before the rename"] > figures["kills"] / 20
        assert figures["between rename and return"] + figures["while pruning"] > figures["kills"] / 20


def killed_at(at: int, action: Callable[[], object]) -> tuple[bool, list[str]]:
    """Do it up to the call number `at`; return whether it came to its end, and the calls."""
    ended = True
    with failing(at, how="kill") as calls:
        try:
            action()
        except Killed:
            ended = False
    assert ended == (calls.failed is None)
    return ended, calls.names


def trainer_in(place: Path) -> Trainer:
    torch.manual_seed(0)
    config = quick_config(keep_last=1, keep_best=0)
    return Trainer(BigramLM(V), tiny_split()[0], config, device="cpu", out_dir=place / "run")


def changed(trainer: Trainer, step: int) -> Trainer:
    """Give the trainer other weights and a step, as a training step does."""
    trainer._state.step = step
    torch.nn.init.constant_(next(trainer.model.parameters()), step + 0.5)
    return trainer


def test_a_run_killed_at_any_call_of_its_first_save_has_it_or_can_begin_again(
    memory: Path, campaign: Campaign
) -> None:
    for at in range(10_000):
        place = memory / str(at)
        place.mkdir()
        trainer = trainer_in(place)
        ended, names = killed_at(at, trainer.save)
        try:
            run = RunDirectory.open(place / "run")
        except CheckpointError:
            trainer_in(place).save()  # nothing is in the way of a new beginning
            run = RunDirectory.open(place / "run")
        else:
            present = list_checkpoints(run.path)
            assert len(present) <= 1
            if present:
                assert newest_whole_checkpoint(run).info == present[0]
                resumed = Trainer.resume(place / "run", trainer.train_data, device="cpu")
                assert same_tensors(tensors_of(resumed), tensors_of(trainer))
            else:
                assert not ended
                assert trainer_in(place).fit().checkpoint is not None  # begun anew, and cleaned up
        remove_leftovers(run)
        assert not leftovers(run), f"call {at}"
        campaign.counted("kills")
        if ended:
            break
    assert names.count("mkdir") == 3
    assert names.count("fsync") > 9
    campaign.counted("violations", 0)


def test_a_run_that_ended_before_its_first_checkpoint_begins_anew_after_a_kill_at_any_call_of_that(
    memory: Path, campaign: Campaign
) -> None:
    for at in range(10_000):
        place = memory / str(at)
        place.mkdir()
        first = RunDirectory.create(place / "run")
        first.metrics.write_bytes(b"what the first run logged\n")
        save_model(BigramLM(V), first.path / "ngram")
        (first.path / "train.json").write_bytes(b"{}")
        trainer = trainer_in(place)
        ended, names = killed_at(at, trainer.save)
        present = list_checkpoints(first.path)
        if not present:
            assert not ended
            again = trainer_in(place).fit()
            assert again.checkpoint is not None
        logs = [path.read_bytes() for path in first.path.glob("abandoned-*.jsonl")]
        assert b"what the first run logged\n" in logs, f"call {at}"
        assert not (first.path / "ngram").exists()
        assert not (first.path / "train.json").exists()
        run = RunDirectory.open(first.path)
        assert run.run_id != first.run_id
        remove_leftovers(run)
        assert not leftovers(run), f"call {at}"
        campaign.counted("kills")
        if ended:
            break
    assert names.count("unlink") == 3  # the beginning's own calls are among those killed at
    campaign.counted("violations", 0)


@pytest.mark.parametrize("steps", [(1, 2), (2, 2)], ids=["a later step", "the same step"])
def test_a_run_killed_at_any_call_of_a_save_with_pruning_has_the_old_or_the_new(
    memory: Path, campaign: Campaign, steps: tuple[int, int]
) -> None:
    seen = set()
    for at in range(10_000):
        place = memory / str(at)
        place.mkdir()
        trainer = changed(trainer_in(place), steps[0])
        old = trainer.save()
        tensors = {0: tensors_of(trainer), 1: tensors_of(changed(trainer, steps[1]))}
        ended, names = killed_at(at, trainer.save)
        run = RunDirectory.open(place / "run")
        newest = newest_whole_checkpoint(run)  # a damaged one would be a warning, so an error
        for info in list_checkpoints(run.path):
            read_checkpoint(info.path)
        is_new = newest.info.path != old
        resumed = Trainer.resume(place / "run", trainer.train_data, device="cpu")
        assert same_tensors(tensors_of(resumed), tensors[int(is_new)]), f"call {at}"
        assert resumed.step == steps[int(is_new)]
        seen.add((is_new, ended))
        changed(resumed, 3)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            remove_leftovers(run)
            resumed.save()
        assert [path.name[:17] for path in run.checkpoints.iterdir()] == ["step-000000000003"], f"call {at}"
        assert not leftovers(run), f"call {at}"
        campaign.counted("kills")
        if ended:
            break
    assert {(False, False), (True, False), (True, True)} <= seen
    assert names.count("rename") == 2  # the save's and the deletion's
    assert names.count("unlink") == 5  # the calls of the deletion are among those killed at
    campaign.counted("violations", 0)


def test_a_deletion_killed_at_any_call_is_finished_by_one_of_the_next_trainers(
    memory: Path, campaign: Campaign
) -> None:
    for at in range(10_000):
        run = RunDirectory.create(memory / str(at))
        saves = [PreparedSave("one", step) for step in (1, 2, 3)]
        for save in saves:
            save.write(run)
        newest = run.checkpoints / saves[-1].name
        ended, _ = killed_at(at, lambda: prune_checkpoints(run, newest, keep_last=1, keep_best=0))  # noqa: B023 - called at once
        for again in range(at % 7, 1_000):  # a cleaning up may be killed, too
            done, _ = killed_at(again, lambda: remove_leftovers(run))  # noqa: B023 - called at once
            assert saves[-1].is_what(newest_whole_checkpoint(run), run), f"call {at}, then {again}"
            for info in list_checkpoints(run.path):
                assert saves[info.step - 1].is_what(read_checkpoint(info.path), run), f"call {at}"
            campaign.counted("kills")
            if done:
                break
        assert not leftovers(run), f"call {at}"
        prune_checkpoints(run, newest, keep_last=1, keep_best=0)
        assert [path.name for path in run.checkpoints.iterdir()] == [saves[-1].name]
        shutil.rmtree(run.path)
        if ended:
            break
    campaign.counted("violations", 0)


def test_a_model_or_a_tokenizer_killed_at_any_call_of_its_replacement_is_the_old_or_the_new(
    memory: Path, campaign: Campaign
) -> None:
    models = [BigramLM(V), BigramLM(V)]
    tokenizers = [CharTokenizer("ab"), CharTokenizer("abc")]
    for what in ("model", "tokenizer"):
        seen = []
        for at in range(10_000):
            place = memory / what / str(at)
            if what == "model":
                save_model(models[0], place / "m", tokenizers[0])
                ended, _ = killed_at(at, lambda: save_model(models[1], place / "m", tokenizers[1]))  # noqa: B023 - called at once
                standing = load_model(place / "m", BigramLM)
                equal = [same_tensors(standing.state_dict(), model.state_dict()) for model in models]
                save_model(models[1], place / "m")
                assert same_tensors(load_model(place / "m", BigramLM).state_dict(), models[1].state_dict())
                assert not (place / ".old-m").exists()
            else:
                place.mkdir(parents=True)
                tokenizers[0].save(place / "t")
                ended, _ = killed_at(at, lambda: tokenizers[1].save(place / "t"))  # noqa: B023 - called at once
                equal = [CharTokenizer.load(place / "t") == tokenizer for tokenizer in tokenizers]
            assert sum(equal) == 1, f"{what}, call {at}"
            seen.append(equal[1])
            campaign.counted("kills")
            if ended:
                break
        assert not seen[0]
        assert seen[-1]
    campaign.counted("violations", 0)


def test_a_log_killed_at_any_call_loses_no_line_that_was_written(memory: Path, campaign: Campaign) -> None:
    def cut_and_append() -> None:
        keep_lines(path, lambda line: line != b"cut")
        with Appender(path) as log:
            log.append(b"three\n")
            log.flush()

    for at in range(10_000):
        path = memory / str(at) / "log"
        path.parent.mkdir()
        path.write_bytes(b"one\ncut\ntwo\ntorn")
        ended, _ = killed_at(at, cut_and_append)
        found = path.read_bytes()
        allowed = {b"one\ncut\ntwo\ntorn", b"one\ntwo\n", b"one\ntwo\nthree\n"}
        assert found in allowed, f"call {at}"
        assert not ended or found == b"one\ntwo\nthree\n"
        campaign.counted("kills")
        if ended:
            break
    campaign.counted("violations", 0)
