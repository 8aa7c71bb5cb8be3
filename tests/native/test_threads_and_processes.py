"""Several threads that generate from one model at once, processes that fork, and memory over a long text."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from harness.command import environment
from harness.drawn_models import needs_kernel
from harness.own_model import Recurrent
from harness.tiny_models import prompt, tiny_config, tiny_gpt
from harness.warm import WarmPython

from charlm.models.base import LanguageModel

pytestmark = pytest.mark.slow


def in_a_process(python: WarmPython, code: str, *args: str, warnings: str = "error") -> str:
    """Run Python code that can import the tests' helpers, and return what it printed."""
    env = environment(OMP_NUM_THREADS="1")
    env["PYTHONPATH"] = os.pathsep.join([env["PYTHONPATH"], str(Path(__file__).resolve().parents[1])])
    done = subprocess.run(
        python("-W", warnings, "-c", code, *args),
        env=env,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.parametrize(
    ("name", "threads", "helpers"),
    [("fast", 2, 3), ("fast", 4, 1), ("readable", 2, 1), ("readable", 4, 3), ("own", 4, 1)],
)
def test_threads_that_generate_from_one_model_at_once_get_the_right_texts(
    name: str, threads: int, helpers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the fast path one of them has the pool of helpers, and the others compute alone."""
    monkeypatch.setattr("charlm.native.gpt._WORTH_A_THREAD", 1)
    model: LanguageModel
    if name == "own":
        model = Recurrent(13, 8, keeps_cache=True)
    else:
        model = tiny_gpt(tiny_config(), dtype=torch.float64 if name == "readable" else torch.float32)
    count = 200 if name == "fast" else 25

    def text(seed: int) -> list[list[int]]:
        ids = model.generate(prompt(1 + seed % 3, 4), count, seed=seed, overflow="restart")
        rows: list[list[int]] = ids.tolist()
        return rows

    expected = [text(seed) for seed in range(8)]
    before = torch.get_num_threads()
    torch.set_num_threads(helpers)
    try:
        with ThreadPoolExecutor(threads) as pool:
            assert list(pool.map(text, range(8))) == expected
    finally:
        torch.set_num_threads(before)


@needs_kernel
def test_threads_may_generate_while_another_writes_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which weights an id is drawn from is then anybody's guess, but it is an id, and no process ends."""
    model = tiny_gpt(tiny_config())
    others = [tiny_gpt(tiny_config(), seed=seed).state_dict() for seed in range(3)]

    def text(seed: int) -> torch.Tensor:
        if seed % 4 == 0:
            for _ in range(5):
                model.load_state_dict(others[seed % 3])
        return model.generate(prompt(2, 4), 50, seed=seed)

    with ThreadPoolExecutor(4) as pool:
        for ids in pool.map(text, range(24)):
            assert int(ids.min()) >= 0
            assert int(ids.max()) < 13
    model.load_state_dict(others[1])
    wanted = tiny_gpt(tiny_config(), seed=1).generate(prompt(2, 4), 20, seed=0)
    assert torch.equal(model.generate(prompt(2, 4), 20, seed=0), wanted)


FORKING = """
import os, sys, threading
import torch
from charlm.native import gpt
from charlm.native.gpt import NativeGPT
from harness.tiny_models import prompt, tiny_config, tiny_gpt

gpt._WORTH_A_THREAD = 1
torch.set_num_threads(3)
model = tiny_gpt(tiny_config())
if sys.argv[1] == "fast":
    assert isinstance(model.new_state().engine, NativeGPT)
else:
    model = model.double()
    torch.set_num_threads(1)  # torch's own threads do not come along

def text(seed, count=60):
    return model.generate(prompt(3, 4), count, seed=seed, overflow="restart").tolist()

expected = [text(seed) for seed in range(4)]
state = model.new_state(2)
state.observe(prompt(2, 9))
state.predict()
if sys.argv[1] == "fast":  # and while another thread is at work in the kernel
    busy = threading.Event()
    def work():
        for _ in model.stream(prompt(3, 4), 10**9, seed=7, overflow="restart"):
            if busy.is_set():
                return
    worker = threading.Thread(target=work)
    worker.start()
for generation in range(3):
    child = os.fork()
    if child == 0:  # the child's child, too
        try:
            right = [text(seed) for seed in range(4)] == expected
            state.observe(prompt(2, 3))
            fresh = model.new_state(2)
            fresh.observe(torch.cat([prompt(2, 9), prompt(2, 3)], dim=1))
            right = right and torch.allclose(state.predict(), fresh.predict(), atol=1e-5)
            grandchild = os.fork()
            if grandchild == 0:
                os._exit(0 if text(1) == expected[1] else 3)
            right = right and os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1]) == 0
        except BaseException as error:
            print(repr(error), flush=True)
            right = False
        os._exit(0 if right else 2)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == 0, code
if sys.argv[1] == "fast":
    busy.set()
    worker.join()
assert [text(seed) for seed in range(4)] == expected
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("path", [pytest.param("fast", marks=needs_kernel), "readable"])
def test_after_a_fork_parent_child_and_grandchild_generate_the_same_texts(
    path: str, warm_python: WarmPython
) -> None:
    # Python 3.12 warns of any fork where there are threads; that it goes well here is what is shown.
    in_a_process(warm_python, FORKING, path, warnings="ignore")


MEMORY = """
import sys
from pathlib import Path
import torch
from charlm import CharLM, CharTokenizer
from harness.tiny_models import MODELS, prompt, tiny_config, tiny_gpt

def resident_bytes():
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return 1024 * int(line.split()[1])

if sys.argv[1] == "fast":
    model = tiny_gpt(tiny_config("cpu-1min", n_layer=1, n_head=1, n_embd=8, block_size=16))
else:
    model = MODELS[sys.argv[1]](torch.float32)
lm = CharLM(model, CharTokenizer("\\nabcdefghijkl"))
N, never = int(sys.argv[2]), ["aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"]

def growth(steps):
    number = before = 0
    for number, _ in enumerate(steps, start=1):
        if number == 10_000:
            before = resident_bytes()
    assert number > N // 2, number
    return resident_bytes() - before

def whole(generate):
    generate(10_000)
    before = resident_bytes()
    assert len(generate(N)) >= N
    return resident_bytes() - before

print(growth(model.stream(prompt(1, 3), N, seed=1, overflow="restart")))
if len(sys.argv) > 3:
    print(whole(lambda n: model.generate(prompt(1, 3), n, seed=1, overflow="restart")[0]))
    print(growth(lm.stream("ab", N, seed=1, stop=never)))
    print(whole(lambda n: lm.generate("ab", n, seed=1, stop=never)))
"""


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="only Linux tells a process's memory there"
)
@pytest.mark.parametrize(
    "args", [pytest.param(("fast", "25_000", "all"), marks=needs_kernel), ("bigram", "25_000")], ids=str
)
def test_the_memory_of_a_generation_does_not_grow_with_the_text(
    args: tuple[str, ...], warm_python: WarmPython
) -> None:
    """From 10,000 characters on. Ids of 8 bytes in a buffer that doubles, and the text, are under 2 MB."""
    for growth in map(int, in_a_process(warm_python, MEMORY, *args).split()):
        assert growth < 2_000_000
