"""The whole state of a module: parameters, buffers and extra state, to be written, copied and restored.

Parameters and persistent buffers make the state_dict of a module; their shapes are fixed. Buffers registered
with `persistent=False` are in no state_dict, but training may change them, so they belong to a run and not to
a saved model. Extra state is the result of `get_extra_state`. To be saved it must be a tensor or a value of
JSON, which is written as the bytes of that JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from charlm.errors import InputError
from charlm.files import strict_json

__all__ = ["Contents", "extra_name", "passing_buffers", "saved_tensors", "unique_tensors"]

_EXTRA = "_extra_state"  # torch's name in a state_dict
_JSON = ".json"


def unique_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and persistent buffers by name; a shared one occurs once, under its first name."""
    seen: dict[int, str] = {}
    state = module.state_dict(keep_vars=True)
    return {
        name: t
        for name, t in state.items()
        if extra_name(name) is None and seen.setdefault(id(t), name) == name
    }


def extra_name(name: str) -> str | None:
    """Return the name in a state_dict of a stored tensor if it is extra state, else None.

    Extra state has no fixed shape, and may be a tensor in one save and JSON in another.
    """
    name = name.removesuffix(_JSON)
    return name if name.rpartition(".")[2] == _EXTRA else None


def passing_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that were registered with `persistent=False`, by name."""
    return {
        f"{path}.{name}" if path else name: buffer
        for path, part in module.named_modules()
        for name, buffer in part._buffers.items()
        if name in part._non_persistent_buffers_set and buffer is not None
    }


def saved_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a file of weights: parameters, persistent buffers and extra state.

    Raises:
        InputError: some extra state is neither a tensor nor a value of JSON.
    """
    extra = {}
    for name, part in _with_extra_state(module).items():
        state = part.get_extra_state()
        if isinstance(state, Tensor):
            extra[name] = state.detach()
            continue
        try:
            data = strict_json.dumps({"state": state})
            strict_json.loads(data, path=name)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"{type(part).__name__}.get_extra_state() must give a tensor or a value that JSON has, got "
                f"{type(state).__name__}: {error}"
            ) from error
        extra[name + _JSON] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return {**unique_tensors(module), **extra}


@dataclass(frozen=True)
class Contents:
    """The whole state of a module at one moment."""

    tensors: Mapping[str, Tensor]
    """All of `unique_tensors`."""
    passing: Mapping[str, Tensor]
    """Some or all of `passing_buffers`; `put_into` leaves the others as they are."""
    extra: Mapping[str, object]
    """Extra state, by its name in a state_dict."""

    @classmethod
    def of(cls, module: nn.Module) -> Self:
        """Return a copy of the present state of a module."""
        return cls(
            {name: tensor.detach().clone() for name, tensor in unique_tensors(module).items()},
            {name: buffer.detach().clone() for name, buffer in passing_buffers(module).items()},
            _extra_of(module),
        )

    @classmethod
    def saved(cls, stored: Mapping[str, Tensor], passing: Mapping[str, Tensor]) -> Self:
        """Return the state from the tensors of a file of weights and from non-persistent buffers."""
        extra: dict[str, object] = {}
        for stored_name, tensor in stored.items():
            name = extra_name(stored_name)
            if name is not None and stored_name != name:
                data = tensor.cpu().numpy().tobytes()
                extra[name] = strict_json.loads(data, path=name)["state"]
            elif name is not None:
                extra[name] = tensor
        return cls({n: t for n, t in stored.items() if extra_name(n) is None}, passing, extra)

    def put_into(self, module: nn.Module) -> None:
        """Restore this state. If `set_extra_state` raises, the module stays as it was."""
        before = _extra_of(module)
        try:
            if before:
                _set_extra(module, self.extra)
        except BaseException:
            _set_extra(module, before)
            raise
        with torch.no_grad():
            for name, tensor in unique_tensors(module).items():
                tensor.copy_(self.tensors[name])
            for name, kept in self.passing.items():
                path, _, last = name.rpartition(".")
                part = module.get_submodule(path)
                if last not in part._non_persistent_buffers_set:
                    continue
                own = part._buffers[last]
                if own is not None and own.shape == kept.shape and own.is_contiguous():
                    own.copy_(kept)
                else:  # it is created or grows during training
                    setattr(part, last, kept.clone())


def _with_extra_state(module: nn.Module) -> dict[str, nn.Module]:
    return {
        f"{path}.{_EXTRA}" if path else _EXTRA: part
        for path, part in module.named_modules()
        if type(part).get_extra_state is not nn.Module.get_extra_state
    }


def _extra_of(module: nn.Module) -> dict[str, object]:
    return {name: deepcopy(part.get_extra_state()) for name, part in _with_extra_state(module).items()}


def _set_extra(module: nn.Module, extra: Mapping[str, object]) -> None:
    for name, part in _with_extra_state(module).items():
        part.set_extra_state(deepcopy(extra[name]))
