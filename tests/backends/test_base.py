"""What every backend does, and the CPU's own choices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness.tiny_models import random_ids, tiny_config, tiny_gpt
from torch import nn

from charlm.backends.base import DeviceBackend
from charlm.backends.cpu import CPUBackend
from charlm.backends.cuda import CUDABackend
from charlm.errors import BackendError, InputError


class Mine(DeviceBackend):
    """The smallest backend of a user's own."""

    name = "mine"


CPUS = [CPUBackend, DeviceBackend, Mine]


@pytest.mark.parametrize("make", CPUS)
def test_seeded_gives_the_same_numbers_and_restores_the_state(make: type[DeviceBackend]) -> None:
    backend = make()
    before = torch.get_rng_state()
    draws = []
    for _ in range(2):
        with backend.seeded(7):
            draws.append(torch.rand(5))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(draws[0], draws[1])
    with backend.seeded(8):
        assert not torch.equal(torch.rand(5), draws[0])


@pytest.mark.parametrize("make", CPUS)
def test_seeded_restores_the_state_after_an_exception(make: type[DeviceBackend]) -> None:
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), make().seeded(7):
        torch.rand(()).item() / 0
    assert torch.equal(torch.get_rng_state(), before)


def test_seeded_makes_dropout_repeatable() -> None:
    backend = CPUBackend()
    model = tiny_gpt(tiny_config(dropout=0.5))
    idx = random_ids(model.config, 2, 9)
    results = []
    for _ in range(2):
        with backend.seeded(2**63 - 1):
            results.append(model(idx)[0])
    assert torch.equal(results[0], results[1])


@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"
)  # in torch itself
@pytest.mark.parametrize("compile", [False, True])
def test_prepare_works_in_place_and_keeps_the_parameters_names(compile: bool) -> None:
    model = tiny_gpt(tiny_config("gpt2"))
    names = list(model.state_dict())
    prepared = CPUBackend().prepare(model, compile=compile)
    assert prepared is model
    assert list(model.state_dict()) == names
    assert [name for name, _ in model.named_parameters()] == names[:-1]  # the head is tied
    assert model.lm_head.weight is model.transformer.wte.weight
    assert (model._compiled_call_impl is not None) == compile


def test_to_device_returns_what_is_there_already_as_it_is() -> None:
    a, b = torch.zeros(2), torch.ones(3)
    moved = CPUBackend().to_device(a, b)
    assert moved[0] is a
    assert moved[1] is b
    assert DeviceBackend("meta").to_device(a)[0].device.type == "meta"


def test_the_base_class_is_named_after_its_device() -> None:
    assert DeviceBackend().name == "cpu"
    assert DeviceBackend("meta").name == "meta"
    assert DeviceBackend(torch.device("cuda:1")).name == "cuda:1"
    assert Mine("meta").name == "mine"
    assert repr(Mine("meta")) == "Mine('meta')"
    assert DeviceBackend().is_available()
    assert DeviceBackend().memory() is None
    assert DeviceBackend().precision() == "fp32"
    assert DeviceBackend().optimizer_options("AdamW") == {}
    DeviceBackend().synchronize()


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ({"avx512_bf16": True}, ("bf16", "fp32")),
        ({"amx_bf16": True, "avx512_bf16": False}, ("bf16", "fp32")),
        ({"avx2": True}, ("fp32", "bf16")),
        ({}, ("fp32", "bf16")),
    ],
)
def test_auto_precision_is_bf16_where_the_processor_multiplies_in_it(
    monkeypatch: pytest.MonkeyPatch, features: dict[str, bool], expected: tuple[str, ...]
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    backend = CPUBackend()
    assert backend.supported_precisions() == expected
    assert backend.precision() == backend.precision("auto") == expected[0]
    assert backend.precision("fp32") == "fp32"
    assert backend.precision("bf16") == "bf16"
    with pytest.raises(BackendError, match="cpu cannot train in fp16; it offers "):
        backend.precision("fp16")


@pytest.mark.parametrize("wanted", ["fp64", "bfloat16", "", "FP32", None, 32])
def test_an_unknown_precision_is_an_error(wanted: Any) -> None:
    with pytest.raises(InputError, match="precision must be 'auto', 'fp32', 'bf16' or 'fp16', got"):
        CPUBackend().precision(wanted)


def test_autocast_makes_products_in_the_given_precision() -> None:
    backend = CPUBackend()
    layer = nn.Linear(4, 4)
    x = torch.zeros(2, 4)
    with backend.autocast("fp32"):
        assert layer(x).dtype == torch.float32
    with backend.autocast("bf16"):
        assert layer(x).dtype == torch.bfloat16
    assert layer(x).dtype == layer.weight.dtype == torch.float32


def test_a_gpt_trains_under_bf16_autocast_with_a_float32_loss() -> None:
    backend = CPUBackend()
    for preset in ("lecture", "cpu-1min"):
        model = tiny_gpt(tiny_config(preset))
        idx = random_ids(model.config, 2, 9)
        exact = model(idx, idx)[1]
        with backend.autocast("bf16"):
            logits, loss = model(idx, idx)
        assert (logits.dtype, loss.dtype) == (torch.bfloat16, torch.float32)
        assert loss.item() == pytest.approx(exact.item(), rel=0.02)
        loss.backward()
        assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


def test_only_fp16_needs_a_scaler() -> None:
    backend = CPUBackend()
    assert backend.scaler("fp32") is None
    assert backend.scaler("bf16") is None
    assert isinstance(backend.scaler("fp16"), torch.amp.GradScaler)


@pytest.mark.parametrize("backend", [CPUBackend(), CUDABackend()])
def test_fused_optimizers_are_used_where_torch_has_them(backend: DeviceBackend) -> None:
    assert backend.optimizer_options("AdamW") == {"fused": True}
    assert backend.optimizer_options("SGD") == {"fused": True}
    assert backend.optimizer_options("LBFGS") == {}


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "Adagrad"])
def test_torch_takes_the_options_that_the_processor_backend_gives(name: str) -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = getattr(torch.optim, name)([weight], lr=0.1, **CPUBackend().optimizer_options(name))
    weight.sum().backward()
    optimizer.step()
    assert (weight < 1).all()


@pytest.mark.parametrize("device", ["meta", "cuda:99"])
def test_a_device_without_a_known_generator_is_not_seeded_by_the_wrong_one(device: str) -> None:
    with pytest.raises(BackendError, match=f"must override default_generator\\(\\) for {device}"):
        DeviceBackend(device).default_generator()


def test_what_a_device_is_can_be_asked_without_a_backend() -> None:
    from charlm.backends.traits import has_float64, is_host

    devices = [torch.device(name) for name in ("cpu", "cuda", "mps", "meta")]
    assert [is_host(device) for device in devices] == [True, False, False, False]
    assert [has_float64(device) for device in devices] == [True, True, False, True]
    assert [DeviceBackend(device).is_host for device in devices] == [True, False, False, False]
