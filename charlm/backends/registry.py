"""Backends by name.

Three are part of charlm. Others are added by `register_backend`, or by an installed package with an entry in
the entry-point group "charlm.backends":

    [project.entry-points."charlm.backends"]
    mydevice = "my_package:MyBackend"
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from importlib.metadata import entry_points

from charlm.backends.base import DeviceBackend
from charlm.backends.cpu import CPUBackend
from charlm.backends.cuda import CUDABackend
from charlm.backends.mps import MPSBackend
from charlm.errors import BackendError, InputError, did_you_mean
from charlm.plain import as_text

__all__ = ["ENTRY_POINT_GROUP", "get_backend", "register_backend"]

ENTRY_POINT_GROUP = "charlm.backends"

_BUILTIN: dict[str, Callable[[], DeviceBackend]] = {"cuda": CUDABackend, "mps": MPSBackend, "cpu": CPUBackend}
_registered: dict[str, Callable[[], DeviceBackend]] = {}


def get_backend(name: str | DeviceBackend = "auto") -> DeviceBackend:
    """Return a backend that this machine can run.

    Args:
        name: "auto" (the first available of cuda, mps, cpu), "cpu", "cuda", "cuda:1", "mps", a
            registered name, the name of a plug-in; or a backend, which is returned unchanged.

    Raises:
        BackendError: the name is unknown, or the device is absent.

    Example:
        >>> get_backend("cpu")
        CPUBackend('cpu')
    """
    text = as_text(name)
    if isinstance(name, DeviceBackend):
        backend = name
    elif text is None:
        raise InputError(f"device must be a name or a DeviceBackend, got {type(name).__name__}")
    elif text == "auto":
        return next(b for b in (factory() for factory in _BUILTIN.values()) if b.is_available())
    else:
        backend = _named(text)
    if not backend.is_available():
        shown = backend.name if text is None else text
        raise BackendError(f"{shown!r} is not available on this machine; use device='auto' or 'cpu'")
    return backend


def register_backend(name: str, factory: Callable[[], DeviceBackend]) -> None:
    """Let `get_backend(name)` return `factory()`.

    Args:
        name: any name but "auto" and those of charlm's backends. A registered name is replaced.
        factory: called without arguments each time, for example a `DeviceBackend` subclass.

    Raises:
        InputError: the name belongs to charlm, or is no string.

    Example:
        >>> class Quiet(DeviceBackend):
        ...     name = "quiet"
        >>> register_backend("quiet", Quiet)
        >>> get_backend("quiet")
        Quiet('cpu')
    """
    text = as_text(name)
    if not text or text in {"auto", *_BUILTIN}:
        raise InputError(
            f"a backend's name must be a string other than 'auto', {_listed(_BUILTIN)}; got {name!r}"
        )
    _registered[text] = factory


def _named(name: str) -> DeviceBackend:
    factory = _registered.get(name) or _BUILTIN.get(name)
    if factory is not None:
        return _made(name, factory)
    if re.fullmatch("cuda:[0-9]{1,2}", name):
        return CUDABackend(int(name.removeprefix("cuda:")))
    plugins = entry_points(group=ENTRY_POINT_GROUP)
    if name in plugins.names:
        return _made(name, plugins[name].load())
    names = {*_registered, *_BUILTIN, *plugins.names}
    meant = "cuda" if name == "gpu" else name
    hint = did_you_mean(meant, names, f"known are 'auto', {_listed(names)}")
    raise BackendError(f"unknown device {name!r}; {hint}")


def _made(name: str, factory: Callable[[], DeviceBackend]) -> DeviceBackend:
    backend = factory()
    if not isinstance(backend, DeviceBackend):
        raise BackendError(f"the factory of {name!r} made a {type(backend).__name__}, not a DeviceBackend")
    return backend


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(n) for n in sorted(names))
