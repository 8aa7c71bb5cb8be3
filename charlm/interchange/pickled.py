"""Files of torch.save, read without executing code: tensors and plain values; others are refused."""

from __future__ import annotations

import io
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from charlm.errors import CheckpointError, quoted
from charlm.files.reading import read_file, refusal

__all__ = ["read_pickled", "read_state", "state_of"]


def read_pickled(path: Path) -> dict[Any, Any]:
    """Return the dict of a file of torch.save.

    Raises:
        CheckpointError: there is no such file.
        FileFormatError: it holds no dict, or objects other than tensors and plain values.
    """
    try:
        data = read_file(path, max_bytes=2**48)
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no file {quoted(str(path))}") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about other formats, which are refused below
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - torch raises many kinds; one explains how to execute the file
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        kind = quoted(name[1], 80) if name else type(error).__name__
        raise refusal(
            path,
            "must be a file of torch.save with tensors and plain values alone, got something else "
            f"({kind}); nothing was executed.",
        ) from None
    if not isinstance(content, dict):
        raise refusal(path, f"must hold a dict, got a {type(content).__name__}.")
    return content


def read_state(path: Path) -> dict[str, Tensor]:
    """Return the weights of a file that holds a state_dict."""
    return state_of(read_pickled(path), path)


def state_of(content: object, path: Path) -> dict[str, Tensor]:
    """Return a state_dict without the prefixes of compiled and distributed modules.

    Raises:
        FileFormatError: it is no state_dict, or its tensors are larger than the file.
    """
    if not isinstance(content, dict) or not content:
        raise refusal(path, "must hold weights by name, got something else.")
    state: dict[str, Tensor] = {}
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise refusal(
                path,
                f"must hold a dense tensor for each name, got something else for {quoted(str(name), 80)}.",
            )
        while name.startswith(("_orig_mod.", "module.")):
            name = name.removeprefix("_orig_mod.").removeprefix("module.")  # noqa: PLW2901 - the same name
        state[name] = tensor.detach()
    # A tensor may claim to repeat stored numbers many times; a tied one does so twice.
    if sum(tensor.numel() * tensor.itemsize for tensor in state.values()) > 2 * path.stat().st_size:
        raise refusal(
            path, "must hold all numbers of its tensors, got tensors that are larger than the file."
        )
    return state
