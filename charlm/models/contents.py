"""All that a module carries: parameters, buffers, extra state; to be written, kept for a while, and put back.

Torch knows four kinds. Parameters and persistent buffers make its state_dict, and are of fixed shape.
Buffers registered with `persistent=False` are in no state_dict, but training may change them as well: they
belong to a run, not to a saved model. Extra state is what a module gives by `get_extra_state`: a tensor, or a
value that JSON has, which is written as the bytes of that JSON.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from charlm.errors import InputError
from charlm.files import strict_json

__all__ = ["extra_name", "extra_tensors", "passing_buffers", "put_tensors", "saved_tensors", "unique_tensors"]

_EXTRA = "_extra_state"  # as torch calls it in a state_dict
_JSON = ".json"


def unique_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and persistent buffers by name, a shared one once, under its first name."""
    seen: dict[int, str] = {}
    state = module.state_dict(keep_vars=True)
    return {
        name: t
        for name, t in state.items()
        if not name.endswith(_EXTRA) and seen.setdefault(id(t), name) == name
    }


def extra_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the extra state of a module and its parts, by the names of a state_dict.

    Raises:
        InputError: it is neither a tensor nor a value that JSON has.
    """
    found = {}
    for name, part in _with_extra_state(module).items():
        state = part.get_extra_state()
        if isinstance(state, Tensor):
            found[name] = state.detach()
            continue
        try:
            data = strict_json.dumps({"state": state})
            strict_json.loads(data, path=name)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"{type(part).__name__}.get_extra_state() must give a tensor or a value that JSON has, got "
                f"{type(state).__name__}: {error}"
            ) from error
        found[name + _JSON] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return found


def extra_name(name: str) -> str | None:
    """Return the name in a state_dict of a stored tensor that is extra state; None: it is something else.

    Its shape is not fixed, and it may be a tensor in one save and JSON in another.
    """
    name = name.removesuffix(_JSON)
    return name if name.endswith(_EXTRA) else None


def passing_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that were registered with `persistent=False`, by name."""
    return {
        f"{path}.{name}" if path else name: buffer
        for path, part in module.named_modules()
        for name, buffer in part._buffers.items()
        if name in part._non_persistent_buffers_set and buffer is not None
    }


def saved_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return what a file of weights holds: all but the buffers that no state_dict has.

    Raises:
        InputError: some extra state cannot be written.
    """
    return {**unique_tensors(module), **extra_tensors(module)}


def put_tensors(module: nn.Module, saved: Mapping[str, Tensor], passing: Mapping[str, Tensor]) -> None:
    """Put what `saved_tensors` and `passing_buffers` returned, or copies of it, back into their module.

    Args:
        module: of the same shape.
        saved: all of them.
        passing: some of them; the others stay as they are.
    """
    with torch.no_grad():
        for name, tensor in unique_tensors(module).items():
            tensor.copy_(saved[name])
        for name, buffer in passing_buffers(module).items():
            if name in passing and buffer.shape == passing[name].shape:
                buffer.copy_(passing[name])
            elif name in passing:  # it grows while the model trains
                path, _, last = name.rpartition(".")
                setattr(module.get_submodule(path), last, passing[name].to(buffer, copy=True))
    for name, part in _with_extra_state(module).items():
        if name in saved:
            part.set_extra_state(saved[name].clone())
        else:
            data = saved[name + _JSON].cpu().numpy().tobytes()
            part.set_extra_state(strict_json.loads(data, path=name)["state"])


def _with_extra_state(module: nn.Module) -> dict[str, nn.Module]:
    return {
        f"{path}.{_EXTRA}" if path else _EXTRA: part
        for path, part in module.named_modules()
        if type(part).get_extra_state is not nn.Module.get_extra_state
    }
