"""The world of one process, and how a larger one is found; real ones are in reliability/test_worlds.py."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from harness.command import environment

from charlm.backends.base import DeviceBackend
from charlm.backends.cuda import CUDABackend
from charlm.backends.host import is_under_torchrun
from charlm.backends.world import World, alone, join
from charlm.errors import InputError

TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}


def test_in_a_world_of_one_everything_is_told_already() -> None:
    world = World()
    assert (world.rank, world.size, world.is_first) == (0, 1, True)
    assert world.tell(lambda: {"a": 1}) == {"a": 1}
    assert world.agree([1, 2.5]) == [[1, 2.5]]
    assert world.rows([(1, 2), (3, 4)]) == [[1, 2], [3, 4]]
    assert world.differing({"text": "a"}) is None
    parts, into = torch.arange(3.0)[None], torch.zeros(1, 3)
    world.trade(parts, into)
    assert torch.equal(into, parts)
    assert torch.equal(world.gather(parts[0]), parts)
    assert torch.equal(world.gather(parts[0], torch.zeros(1, 3)), parts)
    world.copy_first([into])
    with world.telling(), world.unannounced():
        pass
    with pytest.raises(InputError, match="several processes"):
        world.overlapping(torch.nn.Linear(1, 1))
    assert copy.deepcopy(world) is world


def test_torchrun_is_known_by_its_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_under_torchrun(TORCHRUN)
    assert not is_under_torchrun({"RANK": "0", "WORLD_SIZE": "2"})
    assert not is_under_torchrun()
    for name, value in {**TORCHRUN, "WORLD_SIZE": "1", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert join(DeviceBackend()).size == 1
    assert CUDABackend().device == torch.device("cuda:1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with alone():
        assert join(DeviceBackend()).size == 1


def test_a_device_says_how_its_tensors_meet() -> None:
    assert DeviceBackend().collectives == "gloo"
    assert CUDABackend(0).collectives == "cpu:gloo,cuda:nccl"


@pytest.mark.slow
def test_a_training_in_one_process_loads_nothing_of_torch_distributed_that_torch_has_not() -> None:
    code = (
        "import sys, torch; before = {m for m in sys.modules if m.startswith('torch.distributed')}; "
        "from charlm import BigramLM, BlockDataset, Trainer, TrainerConfig; "
        "data = BlockDataset(torch.arange(99) % 3, block_size=8); "
        "Trainer(BigramLM(3), data, TrainerConfig(max_steps=2, accumulate=4), device='cpu').fit(); "
        "print(sorted({m for m in sys.modules if m.startswith('torch.distributed')} - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), check=True, stdout=subprocess.PIPE)
    assert done.stdout == b"[]\n"
