"""Real signals at random moments: what was trained is saved, and going on comes to the same, bit for bit.

Most of them meet one long-lived process that calls `charlm train` again and again, and must leave the
process's own handlers as they were; others meet whole processes. After each signal: the exit code, the
message, and every checkpoint that is on disk, one of them of the step that was finished. Each run is gone on
with until it ends, and compared with one that no signal met. A second Ctrl-C ends a process within a second.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.campaign import Campaign
from harness.command import end_at_once, start
from harness.command_runs import (
    FLAGS,
    LAST_STEP,
    check_whole,
    newest_step,
    next_command,
    stopped_after,
    write_text,
)
from harness.long_lived import LongLived
from harness.stopped_runs import (
    assert_equal,
    callbacks,
    kind_data,
    kind_trainer,
    outcome,
    outcome_on_disk,
    seed_generators,
)
from harness.warm import WarmPython

from charlm import Trainer
from charlm.errors import TrainingInterrupted

pytestmark = pytest.mark.slow

TRAINING = {"a save", "an evaluation", "a step", "a training"}
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def command(worker: LongLived, args: list[str]) -> dict[str, Any]:
    """Call the command in the process, undisturbed."""
    said: dict[str, Any] = worker.call("harness.long_lived:command", args=args)
    assert said["code"] == 0, said["err"]
    return said


@pytest.mark.timeout(0)
def test_a_process_that_is_signalled_again_and_again_goes_on_bit_for_bit(
    tmp_path: Path, warm_python: WarmPython, campaign: Campaign
) -> None:
    draw = random.Random(campaign.seed)
    text = write_text(tmp_path)
    with LongLived(warm_python) as worker:
        command(worker, ["train", str(text), "-o", str(tmp_path / "first"), *FLAGS])  # all is loaded
        said = command(worker, ["train", str(text), "-o", str(tmp_path / "whole"), *FLAGS])
        seconds = said["seconds"]
        wanted = outcome_on_disk(tmp_path / "whole", generators=False)
        run, runs = tmp_path / "run", 0
        for trial in range(campaign.trials(6)):
            number = draw.choice(SIGNALS)
            where = f"trial {trial} of seed {campaign.seed}, {number.name}"
            before = newest_step(run)
            worker.ask("harness.long_lived:command", args=next_command(run, text, *FLAGS))
            time.sleep(draw.uniform(0, 0.6 * seconds))
            os.kill(worker.pid, number)
            said = worker.answer()
            after = newest_step(run)
            check_whole(run)
            assert said["restored"], f"{where}: the handlers are not as they were: {said}"
            assert said["code"] in {0, 128 + number}, f"{where}: {said}"
            assert after >= before, f"{where}: from step {before} back to {after}"
            assert "Traceback" not in said["err"], f"{where}: {said}"
            if said["code"] == 0:
                assert after == LAST_STEP, f"{where}: {said}"
            elif TRAINING.intersection(said["met"]):  # what was finished is saved, and said
                assert stopped_after(said["err"]) == after, f"{where}: {said}"
                assert said["err"].endswith(f"To go on: charlm train --resume -o {run}\n"), f"{where}: {said}"
            campaign.counted(f"{number.name}")
            campaign.counted(f"in {said['met'][0]}" if said["met"] else "before or after the command")
            if after == LAST_STEP:
                assert_equal(outcome_on_disk(run, generators=False), wanted, where)
                shutil.rmtree(run)
                runs += 1
        command(worker, next_command(run, text, *FLAGS))
        assert_equal(outcome_on_disk(run, generators=False), wanted, f"the last run, seed {campaign.seed}")
    campaign.counted("runs brought to their end", runs + 1)


@pytest.mark.timeout(0)
def test_whole_commands_end_with_the_code_of_the_signal_and_go_on_bit_for_bit(
    tmp_path: Path, warm_python: WarmPython, campaign: Campaign
) -> None:
    draw = random.Random(campaign.seed)
    text, run = write_text(tmp_path), tmp_path / "run"
    python = warm_python if campaign.asked is None else None  # the longer form meets Python's own start, too
    with LongLived(warm_python) as worker:
        command(worker, ["train", str(text), "-o", str(tmp_path / "whole"), *FLAGS])
        wanted = outcome_on_disk(tmp_path / "whole", generators=False)
        for trial in range(max(2, campaign.trials(20) // 10)):
            number = SIGNALS[trial % 2]
            where = f"trial {trial} of seed {campaign.seed}, {number.name}"
            before = newest_step(run)
            process = start(*next_command(run, text, *FLAGS), "--verbose", python=python)
            message = (
                read_up_to(process, b"steps  ") if campaign.asked is None or draw.random() < 0.7 else b""
            )
            time.sleep(draw.uniform(0.05, 0.2) if message else draw.uniform(0.3, 2))
            process.send_signal(number)
            message += process.communicate(timeout=300)[1]
            code, after, said = process.returncode, newest_step(run), stopped_after(message.decode())
            check_whole(run)
            campaign.counted(f"{number.name} to a command")
            if code == -number:  # Python itself was still starting
                assert not message or b"KeyboardInterrupt" in message, f"{where}: {message!r}"
                assert after == before, where
                campaign.counted("of them before it had handlers")
                continue
            assert code in {0, 128 + number}, f"{where}: {code}, {message!r}"
            assert b"Traceback" not in message, f"{where}: {message!r}"
            assert said in {None, after}, f"{where}: {message!r}"
            if said is not None:
                assert b"stopping after this step, and saving; Ctrl-C ends at once\n" in message, where
                assert message.endswith(f"To go on: charlm train --resume -o {run}\n".encode()), where
            campaign.counted(
                f"of them {'before or after the training' if said is None else 'in the training'}"
            )
            if code == 0 or after == LAST_STEP:
                assert_equal(outcome_on_disk(run, generators=False), wanted, where)
                shutil.rmtree(run)
                campaign.counted("runs brought to their end")
        command(worker, next_command(run, text, *FLAGS))
    assert_equal(outcome_on_disk(run, generators=False), wanted, f"the last run, seed {campaign.seed}")


def read_up_to(process: subprocess.Popen[bytes], text: bytes) -> bytes:
    """Read standard error up to a line that begins with a text."""
    assert process.stderr is not None
    read = b""
    for line in process.stderr:
        read += line
        if line.startswith(text):
            return read
    raise AssertionError(read)


@pytest.mark.timeout(0)
def test_a_second_ctrl_c_ends_within_a_second_and_damages_nothing(
    tmp_path: Path, warm_python: WarmPython, campaign: Campaign
) -> None:
    draw = random.Random(campaign.seed)
    text, run = write_text(tmp_path), tmp_path / "run"
    # A step takes half a second or more.
    slow = (*FLAGS, "--accumulate", "600", "--max-steps", "2", "--eval-interval", "1", "--save-interval", "1")
    with LongLived(warm_python) as worker:
        worker.ask("harness.long_lived:command", args=["train", str(text), "-o", str(tmp_path / "w"), *slow])
        for trial in range(max(1, campaign.trials(10) // 10)):
            where = f"trial {trial} of seed {campaign.seed}"
            if newest_step(run) == 2:
                shutil.rmtree(run)
            process = start(*next_command(run, text, *slow), python=warm_python)
            read_up_to(process, b"steps  ")
            time.sleep(draw.uniform(0.02, 0.3))
            process.send_signal(signal.SIGINT)
            time.sleep(draw.uniform(0.11, 0.2))
            seconds, message = end_at_once(process)
            check_whole(run)
            if process.returncode == 0:  # the last step was under way
                assert newest_step(run) == 2, f"{where}: {message!r}"
                campaign.counted("ended by themselves")
                continue
            assert process.returncode == 130, f"{where}: {process.returncode}, {message!r}"
            assert seconds < 1, f"{where}: {seconds:.2f} seconds after the second Ctrl-C"
            ended = "first" if stopped_after(message.decode()) else "second"
            campaign.counted(f"ended by the {ended} Ctrl-C")
        assert worker.answer()["code"] == 0
        command(worker, next_command(run, text, *slow))
    assert_equal(
        outcome_on_disk(run, generators=False), outcome_on_disk(tmp_path / "w", generators=False), where
    )


def test_another_thread_may_request_the_stop_at_any_moment(tmp_path: Path, campaign: Campaign) -> None:
    draw = random.Random(campaign.seed)
    listeners = callbacks()
    seed_generators()
    whole = kind_trainer("gpt", tmp_path / "whole", listeners)
    began = time.monotonic()
    whole.fit()
    seconds = time.monotonic() - began
    wanted = outcome(whole, listeners[1])
    left = campaign.trials(2)
    while left > 0:
        run = tmp_path / f"run {left}"
        listeners = callbacks()
        seed_generators()
        trainer, steps = kind_trainer("gpt", run, listeners), listeners[1].steps
        while True:
            timer = threading.Timer(draw.uniform(0, seconds / 3), trainer.interrupt)
            timer.start()
            stopped: TrainingInterrupted | None = None
            try:
                trainer.fit()
            except TrainingInterrupted as error:
                stopped = error
            timer.cancel()
            timer.join()
            if stopped is None:
                break
            assert stopped.step == trainer.step == newest_step(run)
            campaign.counted("stops requested by a thread")
            left -= 1
            check_whole(run)
            train, val = kind_data()
            torch.rand(7)  # whatever a new process does before
            listeners = callbacks()
            trainer = Trainer.resume(run, train, val_data=val, device="cpu", callbacks=listeners)
            steps += listeners[1].steps
            listeners[1].steps = steps
        assert_equal(outcome(trainer, listeners[1]), wanted, f"{run.name} of seed {campaign.seed}")
        campaign.counted("runs brought to their end")


def test_time_that_is_over_ends_with_a_checkpoint_from_which_the_run_goes_on(
    tmp_path: Path, campaign: Campaign
) -> None:
    settings: dict[str, object] = {"max_steps": 60, "restore_best": False}
    kind = "gpt with dropout and accumulation"
    whole = kind_trainer(kind, tmp_path / "whole", (), **settings)
    whole.fit()
    trainer = kind_trainer(kind, tmp_path / "run", (), max_seconds=0.03, **settings)
    train, val = kind_data()
    while trainer.fit().reason == "max_seconds":
        assert newest_step(tmp_path / "run") == trainer.step
        check_whole(tmp_path / "run")
        campaign.counted("ends by time")
        trainer = Trainer.resume(tmp_path / "run", train, val_data=val, device="cpu")
    found, wanted = outcome_on_disk(tmp_path / "run"), outcome_on_disk(tmp_path / "whole")
    for part in ("model.safetensors", "train.safetensors"):  # each end by time has an evaluation of its own
        found[part] = {k: v for k, v in found[part].items() if not k.startswith("rng.")}
        wanted[part] = {k: v for k, v in wanted[part].items() if not k.startswith("rng.")}
        assert found[part] == wanted[part]
    assert campaign.figures["ends by time"] > 1
