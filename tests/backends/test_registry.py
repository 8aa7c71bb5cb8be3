"""The registry of backends: names, factories, plug-ins by entry point."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from charlm.backends import registry
from charlm.backends.base import DeviceBackend
from charlm.backends.cpu import CPUBackend
from charlm.backends.cuda import CUDABackend
from charlm.backends.mps import MPSBackend
from charlm.backends.registry import get_backend, register_backend
from charlm.errors import BackendError, InputError


class Mine(DeviceBackend):
    """The smallest backend of a user's own."""

    name = "mine"


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each test a registry of its own."""
    monkeypatch.setattr(registry, "_registered", {})


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.mark.usefixtures("no_gpu")
def test_auto_is_the_processor_where_there_is_nothing_else() -> None:
    assert isinstance(get_backend(), CPUBackend)
    assert isinstance(get_backend("auto"), CPUBackend)
    assert isinstance(get_backend("cpu"), CPUBackend)


@pytest.mark.usefixtures("two_gpus")
def test_auto_is_the_gpu_where_there_is_one() -> None:
    assert isinstance(get_backend("auto"), CUDABackend)
    assert get_backend("cuda").device == torch.device("cuda")
    assert get_backend("cuda:1").device == torch.device("cuda:1")
    assert repr(get_backend("cuda:1")) == "CUDABackend('cuda:1')"
    with pytest.raises(BackendError, match="'cuda:2' is not available on this machine"):
        get_backend("cuda:2")


@pytest.mark.usefixtures("no_gpu")
def test_auto_is_apples_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert isinstance(get_backend("auto"), MPSBackend)
    assert get_backend("mps").device == torch.device("mps")


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:1", "mps"])
def test_an_absent_device_is_an_error_that_says_what_to_use(name: str) -> None:
    message = f"'{name}' is not available on this machine; use device='auto' or 'cpu'"
    with pytest.raises(BackendError, match=message) as caught:
        get_backend(name)
    assert isinstance(caught.value, RuntimeError)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("cud", "did you mean 'cuda'?"),
        ("CPU", "known are 'auto', 'cpu', 'cuda', 'mps'"),
        ("cpu0", "did you mean 'cpu'?"),
        ("gpu", "did you mean 'cuda'?"),
        ("cuda:-1", "did you mean 'cuda'?"),
        ("cuda:x", "did you mean 'cuda'?"),
        ("cuda:999", "did you mean 'cuda'?"),
        ("cuda:" + "9" * 50, "known are"),
        ("tpu-of-mine", "known are"),
        ("", "known are"),
    ],
)
def test_an_unknown_name_is_an_error_with_the_likely_right_one(name: str, hint: str) -> None:
    with pytest.raises(BackendError, match="unknown device") as caught:
        get_backend(name)
    assert hint in str(caught.value)


@pytest.mark.parametrize("name", [None, 5, torch.device("cpu"), ["cpu"]])
def test_a_device_is_a_name_or_a_backend(name: Any) -> None:
    with pytest.raises(InputError, match="device must be a name or a DeviceBackend, got "):
        get_backend(name)


def test_a_backend_is_returned_as_it_is_if_it_can_run() -> None:
    class Absent(Mine):
        def is_available(self) -> bool:
            return False

    backend = Mine()
    assert get_backend(backend) is backend
    with pytest.raises(BackendError, match="'mine' is not available"):
        get_backend(Absent())


def test_a_registered_factory_is_called_each_time() -> None:
    register_backend("mine", Mine)
    first, second = get_backend("mine"), get_backend("mine")
    assert type(first) is type(second) is Mine
    assert first is not second
    with pytest.raises(BackendError, match="did you mean 'mine'"):
        get_backend("mone")
    other = Mine()
    register_backend("mine", lambda: other)
    assert get_backend("mine") is other


@pytest.mark.parametrize("name", ["auto", "cpu", "cuda", "mps", "", 5, None])
def test_the_shipped_names_cannot_be_taken(name: Any) -> None:
    with pytest.raises(
        InputError, match="a backend's name must be a string other than 'auto', 'cpu', 'cuda'"
    ):
        register_backend(name, Mine)


def test_a_factory_that_makes_no_backend_is_an_error() -> None:
    register_backend("odd", dict)  # type: ignore[arg-type]  # the point of the test
    with pytest.raises(BackendError, match="the factory of 'odd' made a dict, not a DeviceBackend"):
        get_backend("odd")


@pytest.fixture
def plug_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An installed package, as pip leaves it: a module and a dist-info folder on sys.path."""
    (tmp_path / "charlm_plug_in_of_a_test.py").write_text(
        "from charlm.backends.base import DeviceBackend\n\n\n"
        "class Plugged(DeviceBackend):\n    name = 'plugged'\n\n\n"
        "def wrong():\n    return 'no backend'\n",
        encoding="utf-8",
    )
    info = tmp_path / "charlm_plug_in_of_a_test-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: charlm-plug-in-of-a-test\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[charlm.backends]\n"
        "plugged = charlm_plug_in_of_a_test:Plugged\n"
        "plugged-wrong = charlm_plug_in_of_a_test:wrong\n"
        "cpu = charlm_plug_in_of_a_test:wrong\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("charlm_plug_in_of_a_test", None)


@pytest.mark.usefixtures("plug_in")
def test_an_installed_package_brings_its_backend_by_entry_point() -> None:
    assert type(get_backend("plugged")).__name__ == "Plugged"
    with pytest.raises(BackendError, match="the factory of 'plugged-wrong' made a str"):
        get_backend("plugged-wrong")
    with pytest.raises(BackendError, match="did you mean 'plugged'"):
        get_backend("pluged")


@pytest.mark.usefixtures("plug_in", "no_gpu")
def test_a_package_cannot_take_a_shipped_name_and_is_not_loaded_by_other_names() -> None:
    assert isinstance(get_backend("cpu"), CPUBackend)
    assert isinstance(get_backend("auto"), CPUBackend)
    assert "charlm_plug_in_of_a_test" not in sys.modules


@pytest.mark.usefixtures("plug_in")
def test_what_is_registered_by_hand_wins_over_a_package() -> None:
    register_backend("plugged", Mine)
    assert type(get_backend("plugged")) is Mine
