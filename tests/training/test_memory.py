"""A training that cannot fit is refused before it begins, and the message says what would fit."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
from harness.tiny_models import tiny_config, tiny_gpt
from harness.tiny_training import PlainModule
from typing_extensions import override

from charlm import BigramLM, BlockDataset, Trainer
from charlm.backends.base import DeviceBackend, MemoryStats, Precision
from charlm.backends.cpu import CPUBackend
from charlm.errors import InputError, NotEnoughMemoryError
from charlm.models.config import PRESETS, GPTConfig, PresetName
from charlm.training import RECIPES
from charlm.training.config import TrainerConfig
from charlm.training.memory import check_memory, training_bytes

pytestmark = pytest.mark.slow

LECTURE = GPTConfig.from_dict({**PRESETS["lecture"], "vocab_size": 65})
P = LECTURE.num_parameters()


EARLIER: dict[tuple[PresetName, str, bool, str, bool], int] = {
    ("lecture", "adamw", False, "fp32", True): 5_574_041_260,
    ("lecture", "muon", False, "bf16", True): 3_570_216_196,
    ("lecture", "muon", False, "fp32", False): 5_487_729_828,
    ("lecture", "adamw", True, "fp32", False): 3_537_752_284,
    ("lecture", "muon", True, "bf16", True): 2_839_400_668,
    ("gpt2", "adamw", False, "fp32", True): 10_560_832_512,
    ("gpt2", "muon", False, "bf16", True): 6_904_811_520,
    ("gpt2", "muon", False, "fp32", False): 9_873_693_696,
    ("gpt2", "adamw", True, "fp32", False): 10_217_263_104,
    ("gpt2", "muon", True, "bf16", True): 6_904_811_520,
    ("cpu-10s", "adamw", False, "fp32", True): 168_447_744,
    ("cpu-10s", "muon", False, "bf16", True): 167_513_088,
    ("cpu-10s", "muon", False, "fp32", False): 25_408_480,
    ("cpu-10s", "adamw", True, "fp32", False): 28_618_544,
    ("cpu-10s", "muon", True, "bf16", True): 142_347_264,
    ("cpu-1min", "adamw", False, "fp32", True): 246_944_768,
    ("cpu-1min", "muon", False, "bf16", True): 243_732_480,
    ("cpu-1min", "muon", False, "fp32", False): 127_700_948,
    ("cpu-1min", "adamw", True, "fp32", False): 139_050_188,
    ("cpu-1min", "muon", True, "bf16", True): 193_400_832,
    ("cpu-5min", "adamw", False, "fp32", True): 613_230_592,
    ("cpu-5min", "muon", False, "bf16", True): 600_514_560,
    ("cpu-5min", "muon", False, "fp32", False): 316_770_140,
    ("cpu-5min", "adamw", True, "fp32", False): 321_768_652,
    ("cpu-5min", "muon", True, "bf16", True): 399_187_968,
}
"""What was estimated for the presets, without a convolution: optimizer, another device than a CPU, precision,
validation text."""


class Given(CPUBackend):
    """The CPU with a memory of our own choice."""

    name = "given"

    def __init__(self, free: int | None) -> None:
        super().__init__()
        self.given = free

    @override
    def memory(self) -> MemoryStats | None:
        return None if self.given is None else MemoryStats(allocated=0, peak=0, total=self.given)


class Elsewhere(DeviceBackend):
    """A device that is no CPU, and fuses attention."""

    def __init__(self, total: int | None = None) -> None:
        super().__init__("meta")
        self.total = total

    @override
    def supported_precisions(self) -> tuple[Precision, ...]:
        return ("bf16", "fp32")

    @override
    def memory(self) -> MemoryStats | None:
        return None if self.total is None else MemoryStats(allocated=0, peak=0, total=self.total)


def estimate(config: TrainerConfig, model: GPTConfig = LECTURE, **changes: object) -> int:
    arguments: dict[str, object] = {"device": "cpu", "evaluates": False}
    return training_bytes(model, config, **{**arguments, **changes})  # type: ignore[arg-type]


def adamw(**fields: object) -> TrainerConfig:
    """Return settings with the optimizer that has two moments."""
    return TrainerConfig.from_dict({"optimizer": "adamw", "precision": "fp32", **fields})


def check(free: int | None, config: TrainerConfig, model: object = LECTURE) -> None:
    check_memory(
        model,  # type: ignore[arg-type]
        config,
        block_size=256,
        backend=Given(free),
        evaluates=False,
    )


def test_what_exceeds_the_free_memory_by_a_quarter_is_refused() -> None:
    config = adamw(batch_size=64)
    needed = estimate(config)
    check(int(needed / 1.25) + 1, config)
    with pytest.raises(NotEnoughMemoryError):
        check(int(needed / 1.25) - 1, config)
    check(None, config)


def test_processes_of_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    config = adamw(batch_size=64)
    needed = estimate(config)
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    check(2 * int(needed / 1.25) + 2, config)
    with pytest.raises(NotEnoughMemoryError, match=r"available to each of 2 processes on given"):
        check(2 * int(needed / 1.25) - 2, config)


def test_the_message_says_what_was_estimated_what_there_is_and_which_batch_would_fit() -> None:
    config = adamw(batch_size=1000, accumulate=2)
    with pytest.raises(NotEnoughMemoryError) as caught:
        check(8 * 10**9, config)
    error = caught.value
    found = re.fullmatch(
        r"training must fit into the memory that is available on given, 8 GB, but takes about (\S+) GB with "
        r"batch_size=1000 and block_size=256\. batch_size=(\d+) would fit; with accumulate=(\d+) a step "
        r"sees as many blocks\.",
        str(error),
    )
    assert found is not None
    fitting, accumulate = int(found[2]), int(found[3])
    assert error.batch_size == fitting
    assert error.available_bytes == 8 * 10**9
    assert error.needed_bytes == estimate(config)
    assert float(found[1]) == pytest.approx(error.needed_bytes / 1e9, rel=0.01)
    assert fitting * accumulate >= 2000 > fitting * (accumulate - 1)
    assert 1.25 * estimate(config.replace(batch_size=fitting)) <= 8 * 10**9
    assert 1.25 * estimate(config.replace(batch_size=2 * fitting)) > 8 * 10**9
    check(8 * 10**9, config.replace(batch_size=fitting, accumulate=accumulate))


def test_the_batch_that_is_said_to_fit_has_the_margin_on_its_side() -> None:
    config = adamw(batch_size=64)
    free = int(1.1 * estimate(config.replace(batch_size=16)))
    with pytest.raises(NotEnoughMemoryError) as caught:
        check(free, config)
    assert caught.value.batch_size == 8


def test_where_no_batch_fits_the_model_is_what_to_reduce() -> None:
    with pytest.raises(
        NotEnoughMemoryError, match=r"Even batch_size=1 is too much: reduce the model"
    ) as caught:
        check(10 * P, adamw(batch_size=3))
    assert caught.value.batch_size is None


def test_a_batch_of_a_million_is_refused_without_allocating_it() -> None:
    before = CPUBackend().memory()
    with pytest.raises(NotEnoughMemoryError):
        check_memory(
            LECTURE,
            adamw(batch_size=1_000_000),
            block_size=256,
            backend=CPUBackend(),
            evaluates=True,
        )
    after = CPUBackend().memory()
    assert before is not None
    assert after is not None
    assert after.peak - before.peak < 2**28


def test_weights_that_lie_there_already_count_once() -> None:
    config = adamw(batch_size=2)
    model = tiny_gpt(tiny_config(n_embd=128))
    needed = training_bytes(model, config, device="cpu", evaluates=False)
    weights = 4 * model.num_parameters()
    for free, fits in ((needed / 1.25 - weights + 9, True), (needed / 1.25 - weights - 9, False)):
        arguments = {"block_size": 16, "evaluates": False}
        if fits:
            check_memory(model, config, backend=Given(int(free)), **arguments)  # type: ignore[arg-type]
        else:
            with pytest.raises(NotEnoughMemoryError):
                check_memory(model, config, backend=Given(int(free)), **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", EARLIER, ids=str)
def test_the_estimate_is_what_it_was(case: tuple[PresetName, str, bool, str, bool]) -> None:
    preset, optimizer, elsewhere, precision, evaluates = case
    config = RECIPES[preset].replace(optimizer=optimizer, precision=precision)
    device = Elsewhere() if elsewhere else "cpu"
    fields = {**PRESETS[preset], "vocab_size": 65, "conv_width": 1}
    if preset == "cpu-5min":
        fields["dropout"] = 0.1  # which it had then
    model = GPTConfig.from_dict(fields)
    assert training_bytes(model, config, device=device, evaluates=evaluates) == EARLIER[case]


def test_without_settings_the_defaults_are_estimated_and_the_models_own_blocks() -> None:
    model = tiny_gpt(tiny_config())
    assert training_bytes(model) == training_bytes(
        model.config, TrainerConfig(), block_size=16, device="auto"
    )
    with pytest.raises(InputError, match="block_size must be given: BigramLM has none of its own"):
        training_bytes(BigramLM(5))


def test_micro_batches_follow_one_another_and_cost_only_the_sums_that_wait() -> None:
    assert estimate(adamw(accumulate=25)) == estimate(adamw(accumulate=2)) == estimate(adamw())
    gradients = estimate(adamw(accumulate=50)) - estimate(adamw())
    assert estimate(adamw(accumulate=8)) == estimate(adamw()) + 2 * gradients > estimate(adamw())


def test_the_settings_that_take_memory_are_counted() -> None:
    config = adamw(batch_size=16)
    plain = estimate(config)
    assert estimate(config, evaluates=True) == plain + 4 * P
    assert estimate(config.replace(restore_best=False), evaluates=True) == plain
    assert estimate(config.replace(precision="bf16")) < plain
    assert estimate(config, device=Elsewhere()) < plain  # attention is fused there
    assert estimate(config, block_size=64) < plain / 2
    assert estimate(config, own_optimizer=True) == plain - 8 * P
    assert estimate(config.replace(optimizer="muon")) == plain - 4 * P
    # While Muon moves the matrices it needs more than a small batch does.
    assert estimate(adamw(batch_size=1, optimizer="muon"), block_size=8) == 28 * P


def test_the_first_evaluation_may_be_what_takes_the_most() -> None:
    config = adamw(batch_size=1, restore_best=False)
    model = LECTURE.replace(n_layer=1, n_embd=6)
    assert estimate(config, model, evaluates=True) > 3 * estimate(config, model)
    assert estimate(config, model, evaluates=True) < 5e8


def test_a_shorter_block_than_the_models_takes_less() -> None:
    model = tiny_gpt(tiny_config(block_size=16))
    sizes = [
        training_bytes(model, adamw(batch_size=64), block_size=T, device="cpu", evaluates=False)
        for T in (4, 8, 16)
    ]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[2] / 2


def test_of_other_models_parameters_and_logits_count() -> None:
    config = adamw(batch_size=4)
    arguments = {"block_size": 8, "device": "cpu", "evaluates": False}
    assert training_bytes(BigramLM(10), config, **arguments) == 16 * 100 + 4 * 8 * (12 * 10 + 16)  # type: ignore[arg-type]
    plain = PlainModule(5)
    count = sum(p.numel() for p in plain.parameters())
    assert training_bytes(plain, config, **arguments) == 16 * count + 4 * 8 * 16  # type: ignore[arg-type]
    for parameter in plain.parameters():
        parameter.requires_grad_(False)
    assert training_bytes(plain, config, **arguments) == 4 * count + 4 * 8 * 16  # type: ignore[arg-type]


def test_on_another_device_the_weights_are_still_to_come() -> None:
    model = tiny_gpt(tiny_config(n_embd=128))

    with pytest.raises(NotEnoughMemoryError, match="available on meta"):
        check_memory(
            model,
            adamw(batch_size=1),
            block_size=1,
            backend=Elsewhere(11 * model.num_parameters()),
            evaluates=False,
        )


CHILD = """
import json, resource, sys, torch
from charlm import GPT, BlockDataset, GPTConfig, Trainer, TrainerConfig
from charlm.backends.cpu import CPUBackend
from charlm.models.config import PRESETS
from charlm.training import training_bytes

def train(config, B):
    data = BlockDataset(torch.arange(4000) % 65, config.block_size)
    training = TrainerConfig(max_steps=2, batch_size=B, precision="fp32", warmup_steps=0)
    Trainer(GPT(config), data, training, device="cpu").fit()
    return training_bytes(config, training, device="cpu", evaluates=False)

base = {**PRESETS[sys.argv[1]], "vocab_size": 65, "block_size": 128, "n_layer": 3, "n_head": 4}
train(GPTConfig.from_dict({**base, "block_size": 8, "n_embd": 16}), 2)
before = CPUBackend().memory().peak
estimated = train(GPTConfig.from_dict({**base, "n_embd": 128}), 96)
print(json.dumps([estimated, CPUBackend().memory().peak - before]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs the resident memory")
@pytest.mark.parametrize("preset", ["lecture", "cpu-1min"])
def test_the_estimate_is_near_what_a_training_really_takes(preset: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD, preset], check=True, capture_output=True, text=True
    )
    estimated, measured = json.loads(done.stdout)
    assert measured > 2**28
    assert 0.7 < estimated / measured < 1.4


def test_a_trainer_refuses_before_anything_is_moved() -> None:
    model = BigramLM(50)
    backend = Given(4 * 2500)
    with pytest.raises(NotEnoughMemoryError, match="batch_size=4096"):
        Trainer(model, BlockDataset(torch.arange(40), 8), adamw(batch_size=4096), device=backend)
